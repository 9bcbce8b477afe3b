"""What an export leaves in the process: no symbolic shapes, no generated sources.

In a process of its own: pytest keeps log records, and with them what they speak of.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

COUNTED = """
import gc, linecache, sys, tempfile
from pathlib import Path
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from cnx_deploy import onnx_export
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.exporters.tracing_memory import GENERATED
from cnx_deploy.core.variants import Variant

if sys.argv[1] == "kept":
    onnx_export.release_shapes = lambda program: None
model = random_model(Variant("one", (1, 1, 1, 1), (8, 8, 8, 8), 0, None), 2, seed=0)
record = ModelRecord("one", 2, 32, WeightsRecord("random", "0", "0" * 64, "none"), Preprocessing())
spec = onnx_export.ExportSpec(deploy=DeploySpec("fp32", 32))
hashes = set()
for turn in range(4):
    with tempfile.TemporaryDirectory() as folder:
        hashes.add(onnx_export.export_onnx(model, record, spec, Path(folder)).sha256)
    gc.collect()
    shapes = sum(type(each) is ShapeEnv for each in gc.get_objects())
    print(shapes, sum(name.startswith(GENERATED) for name in linecache.cache), len(hashes))
"""


def left_after_each_export(mode: str) -> list[list[int]]:
    """After the first to fourth: environments of symbolic shapes, generated sources, different files."""
    command = [sys.executable, "-c", COUNTED, mode]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def test_soak_memory_exports_leave_nothing_of_their_traces() -> None:
    shapes, sources, files = zip(*left_after_each_export("released"), strict=True)
    assert max(shapes) <= 2  # torch keeps the latest
    assert (max(sources), files) == (0, (1, 1, 1, 1))


def test_without_letting_go_each_export_leaves_its_shapes() -> None:
    assert [shapes for shapes, _, _ in left_after_each_export("kept")] == [1, 2, 3, 4]
