"""Fixtures that every test file shares: the smallest network that has every part of the real ones."""

import pytest
from hypothesis import settings

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant, register_variant
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model

# The same examples each time, so that a run that fails fails again. --hypothesis-profile explore draws new ones, and
# "long", of the slow run, twenty times as many of what reads untrusted input (tests/support/lies.py).
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.register_profile("long", derandomize=False)
settings.load_profile("repeatable")

TINY_TEST = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
TINY_V1_TEST = Variant("tiny-v1-test", (1, 1, 2, 1), (8, 16, 32, 64), 137_040, None, version=1)
register_variant(TINY_TEST)  # so that commands and the Python API take it by name


LONGEST_FIRST = (
    "test_comparison.py",
    "test_chain.py",
    "test_fp16_safety.py",
    "test_cli.py",
    "test_onnx_export.py",
    "test_verification.py",
)
"""Files are shared out whole: begun last, a long one would keep one process busy while the other has nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files; the order within a file stays."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FIRST)


@pytest.fixture(scope="session")
def tiny_variant() -> Variant:
    """Four stages, one with two blocks; 138,104 parameters with 1000 classes."""
    return TINY_TEST


@pytest.fixture(scope="session")
def tiny_v1_variant() -> Variant:
    """The same of ConvNeXt V1."""
    return TINY_V1_TEST


@pytest.fixture
def tiny_v1_model(tiny_v1_variant: Variant) -> ConvNeXtV2:
    """ConvNeXt V1 with ten classes, every parameter random and LayerScale of the order of one; a fresh copy each."""
    return random_model(tiny_v1_variant, 10, seed=0)


@pytest.fixture
def tiny_model(tiny_variant: Variant) -> ConvNeXtV2:
    """Ten classes, evaluation mode, every parameter random and non-zero (seed 0); a fresh copy for each test."""
    return random_model(tiny_variant, 10, seed=0)


@pytest.fixture(scope="session")
def tiny_onnx_fp16(tiny_variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The smallest network's FP16 file at 32 px, batch 1 to 8. Shared: do not change it."""
    return _exported(tiny_variant, DeploySpec(precision="fp16", image_size=32), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_onnx_fp32(tiny_variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The smallest network's FP32 file at 32 px, batch 1 to 8. Shared: do not change it."""
    return _exported(tiny_variant, DeploySpec(precision="fp32", image_size=32), tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_engine(tiny_onnx_fp16: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An engine of it for sm89, built ahead of time by TensorRT-RTX. Shared: do not change it."""
    spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1), (1, 4, 8)))
    return build_engine(tiny_onnx_fp16, spec, tmp_path_factory.mktemp("engine"))


def _exported(variant: Variant, deploy: DeploySpec, folders: pytest.TempPathFactory) -> Artifact:
    record = ModelRecord(
        variant.name, 10, 32, WeightsRecord("random", "0", "0" * 64, "none (random weights)"), Preprocessing()
    )
    spec = ExportSpec(deploy=deploy, batch=(1, 4, 8))
    return export_onnx(random_model(variant, 10, seed=0), record, spec, folders.mktemp("onnx"))
