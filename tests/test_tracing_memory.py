"""What an export leaves in the process: no symbolic shapes, no generated sources."""

import gc
import linecache
from pathlib import Path

import pytest
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cnx_deploy import onnx_export
from cnx_deploy.artifacts import ModelRecord, WeightsRecord
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeploySpec
from cnx_deploy.onnx_export import ExportSpec, export_onnx
from cnx_deploy.tracing_memory import GENERATED

RECORD = ModelRecord("tiny-test", 10, 32, WeightsRecord("random", "0", "0" * 64, "none"), {})


def left_by_an_export(model: ConvNeXtV2, folder: Path) -> tuple[int, int]:
    """Environments of symbolic shapes and generated sources beyond those that were there."""

    def counted() -> tuple[int, int]:
        gc.collect()
        environments = sum(type(each) is ShapeEnv for each in gc.get_objects())
        return environments, sum(name.startswith(GENERATED) for name in linecache.cache)

    before = counted()
    export_onnx(model, RECORD, ExportSpec(deploy=DeploySpec("fp32", 32)), folder)
    after = counted()
    return after[0] - before[0], after[1] - before[1]


def test_an_export_leaves_nothing_of_its_trace(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    assert left_by_an_export(tiny_model, tmp_path) == (0, 0)


def test_without_letting_go_each_export_leaves_its_shapes(
    tiny_model: ConvNeXtV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_export, "release_shapes", lambda program: None)
    assert left_by_an_export(tiny_model, tmp_path)[0] >= 1


def test_the_graph_is_the_same_bytes_after_an_export_that_let_go(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    first, second = (
        export_onnx(tiny_model, RECORD, ExportSpec(deploy=DeploySpec("fp32", 32)), tmp_path / name)[0] for name in "ab"
    )
    assert first.sha256 == second.sha256
