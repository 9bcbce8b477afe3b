"""`rescue` over libraries, sizes, precisions, opsets and exporters: whole files, from export to proof."""

from pathlib import Path

import pytest

import cnx_deploy as cnx
from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.variants import find_variant
from tests.support.foreign_files import exported, network

pytestmark = pytest.mark.slow

VARIANTS = ("atto", "femto", "pico")
OPSETS = (17, 18, 19, 20, 21, 22)


@pytest.fixture(scope="module")
def networks() -> dict[tuple[str, str], object]:
    return {}


def made(networks, library: str, variant: str):
    key = (library, variant)
    if key not in networks:
        networks[key] = network(library, find_variant(variant))
    return networks[key]


def check(path: Path, folder: Path, variant: str) -> cnx.Artifact:
    found, size = cnx.rescue(path, output_dir=folder), find_variant(variant)
    assert found.islands == {"GRN": size.block_count, "LayerNorm": size.block_count + 5, "pool": 1}
    assert all(result.passed for result in (*found.fp32, *found.fp16))
    assert found.fp32[0].differences.relative_l2_max < 1e-6
    assert found.fp16
    assert not found.kept
    return found


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("library", "half"), [("timm", False), ("transformers", False), ("transformers", True)])
def test_the_older_exporter_s_files_are_rescued(library, half, variant, opset, networks, tmp_path: Path) -> None:
    path = exported(made(networks, library, variant), tmp_path / "a.onnx", opset=opset, half=half)
    assert check(path, tmp_path, variant).opset == opset


@pytest.mark.parametrize("opset", [18, 20, 22])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_newer_exporter_s_files_are_rescued(library, half, opset, networks, tmp_path: Path) -> None:
    path = exported(made(networks, library, "atto"), tmp_path / "a.onnx", opset=opset, half=half, dynamo=True)
    assert check(path, tmp_path, "atto").opset == opset


def test_timm_s_half_file_of_the_older_exporter_is_refused_as_onnx_itself_refuses_it(networks, tmp_path: Path) -> None:
    """addcmul's decomposition goes on in FP32, so that norms have gains of another type than their tensors."""
    path = exported(made(networks, "timm", "atto"), tmp_path / "a.onnx", half=True)
    with pytest.raises(CorruptArtifactError, match="inconsistent type"):
        cnx.rescue(path, output_dir=tmp_path)


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_segmenter_is_rescued_and_taken_by_verify(dynamo, tiny_variant, tmp_path: Path) -> None:
    """transformers' UPerNet; the older exporter wants sides of which the pools' 1, 2, 3 and 6 are divisors."""
    model = network("segmenter", tiny_variant)
    path = exported(model, tmp_path / "a.onnx", opset=18, dynamo=dynamo, shape=(2, 3, 192, 192))
    found = cnx.rescue(path, output_dir=tmp_path, batch=(1, 2, 2))
    assert (found.islands["GRN"], found.not_recognised) == (5, ())
    assert all(result.passed for result in (*found.fp32, *found.fp16))
    assert found.artifact.manifest.model.graph.outputs["answer"].shape == ("batch", 7, 192, 192)
    assert cnx.verify(found.path, samples=2).passed
