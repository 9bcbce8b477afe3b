"""Fixtures that every test file shares: the smallest network that has every part of the real ones.

Nothing heavy is imported before a fixture needs it: the process that hands tests to the workers reads this file too.
"""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

import cnx_deploy as cnx
from cnx_deploy.core.variants import Variant, register_variant

if TYPE_CHECKING:
    from cnx_deploy.model.convnextv2 import ConvNeXtV2

# The same examples each time, so that a run that fails fails again. --hypothesis-profile explore draws new ones, and
# "long", of the slow run, twenty times as many of what reads untrusted input (tests/support/lies.py).
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.register_profile("long", derandomize=False)
settings.load_profile("repeatable")

TINY_TEST = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
TINY_V1_TEST = Variant("tiny-v1-test", (1, 1, 2, 1), (8, 16, 32, 64), 137_040, None, version=1)
NARROW_TEST = Variant("narrow-test", (1, 1, 1, 1), (16, 32, 64, 128), 363_208, None)
"""Half of atto's width: INT8 moves 0.79 of FP16's bytes, where that of tiny-test stays above the gate."""
register_variant(NARROW_TEST)
register_variant(TINY_TEST)  # so that commands and the Python API take it by name

Command = Callable[..., tuple[int, str, str]]

LONGEST_FIRST = (
    "test_tasks.py",
    "test_onnx_export.py",
    "test_runs.py",
    "test_chain.py",
    "test_fp16_safety.py",
    "test_comparison.py",
    "test_untrusted_onnx.py",
    "test_trt_compiled.py",
    "test_half_precision.py",
    "test_provenance.py",
    "test_peers.py",
    "test_plot_performance.py",
    "test_deploy_properties.py",
)
"""Files are shared out whole: begun last, a long one would keep one process busy while the other has nothing to do.

The first makes its own files and the second the shared ones, so that neither process waits for the other.
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, in this order; the order within a file stays."""
    place = {name: at for at, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector the half million objects of what is imported: an export takes a tenth less.

    Hypothesis also draws constants that stand in those of our modules that are loaded. Which are loaded depends on what
    ran before in the process, so a repeatable run does without them.
    """
    if settings.get_current_profile_name() == "repeatable":
        providers._get_local_constants = providers.Constants  # there is no public switch
    gc.collect()
    gc.freeze()


@pytest.fixture(name="cnx")
def command_line(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `cnx-deploy` with some words in this process: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        from cnx_deploy.cli import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def tiny_variant() -> Variant:
    """Four stages, one with two blocks; 138,104 parameters with 1000 classes."""
    return TINY_TEST


@pytest.fixture(scope="session")
def tiny_v1_variant() -> Variant:
    """The same of ConvNeXt V1."""
    return TINY_V1_TEST


@pytest.fixture
def tiny_v1_model(tiny_v1_variant: Variant) -> "ConvNeXtV2":
    """ConvNeXt V1 with ten classes, every parameter random and LayerScale of the order of one; a fresh copy each."""
    from cnx_deploy.model.convnextv2 import random_model

    return random_model(tiny_v1_variant, 10, seed=0)


@pytest.fixture
def tiny_model(tiny_variant: Variant) -> "ConvNeXtV2":
    """Ten classes, evaluation mode, every parameter random and non-zero (seed 0); a fresh copy for each test."""
    from cnx_deploy.model.convnextv2 import random_model

    return random_model(tiny_variant, 10, seed=0)


# Artifacts are made once a run: of the worker processes that ask for one, one makes it and the others reuse it.


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all worker processes of this run share."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"


@pytest.fixture(scope="session")
def tiny_onnx_fp16(made_once: Path) -> cnx.Artifact:
    """The smallest network's verified FP16 file at 32 px, batch 1 to 8, weights of seed 0. Shared: do not change it."""
    return _exported("fp16", made_once)


@pytest.fixture(scope="session")
def tiny_onnx_fp32(made_once: Path) -> cnx.Artifact:
    """The same in FP32. Shared: do not change it."""
    return _exported("fp32", made_once)


@pytest.fixture(scope="session")
def tiny_onnx_bf16(made_once: Path) -> cnx.Artifact:
    """The same in BF16. Shared: do not change it."""
    return _exported("bf16", made_once)


@pytest.fixture(scope="session")
def tiny_engine(tiny_onnx_fp16: cnx.Artifact, made_once: Path) -> cnx.Artifact:
    """An engine of it for sm89, built ahead of time by TensorRT-RTX. Shared: do not change it."""
    options = {"target": "sm89", "runtime": "tensorrt-rtx", "batches": ((1, 1, 1), (1, 4, 8))}
    return cnx.build_engine(tiny_onnx_fp16, output_dir=made_once / "engine", **options)


@pytest.fixture(scope="session")
def tiny_project(
    tiny_onnx_fp32: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact, tiny_engine: cnx.Artifact,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A folder with both files in `export` and the engine in `engines`. Shared: do not change it."""
    from tests.support.artifacts import copy_artifact

    root = tmp_path_factory.mktemp("project")
    for artifact, folder in ((tiny_onnx_fp32, "export"), (tiny_onnx_fp16, "export"), (tiny_engine, "engines")):
        copy_artifact(artifact, root / folder)
    return root


def _exported(precision: str, made_once: Path) -> cnx.Artifact:
    words = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8)}
    return cnx.export("tiny-test", precision=precision, output_dir=made_once / precision, **words)


@pytest.fixture(scope="module")
def quick_timing() -> Iterator[None]:
    """Measure as always, but without the rest before each call and for three windows, whether they agree or not."""
    from cnx_deploy.bench import timing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "REST_SECONDS", 0.0)
        patch.setattr(timing, "AGREEMENT", {"cpu": 1e9, "cuda": 1e9})
        yield
