"""Exported files and engines against what may be done to them."""

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import VARIANTS, Variant
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import differences
from tests.support.hot_networks import images_for

PACKAGE = Path(__file__).parents[2] / "cnx_deploy"
WEIGHTS = WeightsRecord("random", "0", "0" * 64, "none (random weights)")


# --- sizes and operators ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 256, 288, 384])
def test_dynamic_resolution_an_export_of_each_size_equals_pytorch(
    size: int, tiny_variant: Variant, tmp_path: Path
) -> None:
    model = random_model(tiny_variant, 10, seed=0)
    record = ModelRecord(tiny_variant.name, 10, size, WEIGHTS, Preprocessing())
    artifact = export_onnx(model, record, ExportSpec(DeploySpec("fp32", size), batch=(1, 2, 4)), tmp_path)
    images = images_for(size)
    expected = reference_runner(model, DeploySpec("fp32", size)).run(images)
    assert GATES["fp32"].failures(differences(OrtRunner(artifact.path).run(images), expected)) == ()


OPERATORS = {
    "Add", "AveragePool", "Cast", "Concat", "Conv", "Div", "Flatten", "Gather", "Gelu", "Gemm", "Identity",
    "LayerNormalization", "MatMul", "Mul", "Pow", "Reciprocal", "ReduceMean", "ReduceSum", "Reshape", "Shape", "Sqrt",
    "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
"""All that an exported file may be made of."""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_onnx_checker_full_and_shapes_of_an_export_and_its_operators(
    request: pytest.FixtureRequest, precision: str
) -> None:
    path = request.getfixturevalue(f"tiny_onnx_{precision}").path
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    assert {node.op_type for node in model.graph.node} <= OPERATORS
    assert {node.domain for node in model.graph.node} | {each.domain for each in model.opset_import} == {""}
    shaped = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert [node.name for node in model.graph.node if not set(node.output) <= shaped] == []


# --- more than protobuf holds -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_onnx_over_2gib_huge_lies_in_two_files_and_cannot_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.6 GB of weights, read from another working directory."""
    model = random_model("huge", 1000, seed=0)
    record = ModelRecord("huge", 1000, 32, WEIGHTS, Preprocessing())
    artifact = export_onnx(model, record, ExportSpec(DeploySpec("fp32", 32), batch=(1, 1, 2)), tmp_path / "export")
    sizes = {each.name: each.size_bytes for each in artifact.manifest.files}
    assert list(sizes) == ["huge-32-fp32.onnx", "huge-32-fp32.onnx.data"]
    assert sizes["huge-32-fp32.onnx"] < 10_000_000 < 4 * VARIANTS["huge"].parameter_count < sum(sizes.values()) + 1e6
    assert sizes["huge-32-fp32.onnx.data"] > onnx.checker.MAXIMUM_PROTOBUF
    monkeypatch.chdir("/")
    images = images_for(32, 1)
    expected = reference_runner(model, DeploySpec("fp32", 32)).run(images)
    del model
    found = OrtRunner(open_artifact(artifact.path).path).run(images)
    assert GATES["fp32"].failures(differences(found, expected)) == ()
    with pytest.raises(ValueError, match=r"2 ?GB|2 ?GiB|exceeds|too large|serialize"):
        onnx.load(artifact.path).SerializeToString()


# --- what TensorRT says of a plan -------------------------------------------------------------------------------------

VALIDITY = """
import sys
from pathlib import Path
import tensorrt_rtx as trt
plan = Path(sys.argv[1]).read_bytes()
at = len(plan) // 2
runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
for content in (plan, plan[:at] + bytes([plan[at] ^ 1]) + plan[at + 1:], plan[:at], plan[: runtime.engine_header_size]):
    print(*runtime.get_engine_validity(content))
"""


def test_engine_bit_flip_is_nothing_that_tensorrts_validity_sees(tiny_engine: Artifact) -> None:
    """It reads the header alone: whole, flipped, half and a header by itself are one to it, so the hash decides."""
    command = [sys.executable, "-c", VALIDITY, str(tiny_engine.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    answers = [line for line in done.stdout.splitlines() if line.startswith("EngineValidity")]
    assert (len(answers), len(set(answers))) == (4, 1), done.stdout


# --- libraries inside an engine ---------------------------------------------------------------------------------------

FORBIDDEN = {
    "plugins_to_serialize", "load_library", "get_plugin_registry", "init_libnvinfer_plugins",
    "EngineFromBytes", "engine_from_bytes", "EngineFromPath", "engine_from_path", "TrtRunner",
}  # fmt: skip
"""What would put a library into an engine, or open an engine with host code allowed, as Polygraphy does."""


def ways_to_host_code(source: str) -> Iterator[str]:
    """Names that must not be used, and runtimes that are made without the flag being turned off next."""
    for node in ast.walk(ast.parse(source)):
        name = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
        if name in FORBIDDEN:
            yield str(name)
        body = getattr(node, "body", [])
        for statement, after in itertools.pairwise([*body, None]) if isinstance(body, list) else ():
            makes = isinstance(statement, ast.Assign) and ".Runtime(" in ast.unparse(statement)
            if makes and not (after and ast.unparse(after).endswith("engine_host_code_allowed = False")):
                yield ast.unparse(statement)


def test_engine_embedded_plugin_has_no_way_in() -> None:
    found = {path.name: list(ways_to_host_code(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert {name: ways for name, ways in found.items() if ways} == {}
    runtimes = [path.name for path in PACKAGE.rglob("*.py") if ".Runtime(" in path.read_text(encoding="utf-8")]
    assert sorted(runtimes) == ["deserialising.py", "engine.py", "tensorrt_runner.py"]  # what the search has to see


@pytest.mark.parametrize(
    ("source", "way"),
    [
        ("config.plugins_to_serialize = ['a.so']", "plugins_to_serialize"),
        ("from polygraphy.backend.trt import EngineFromBytes", "EngineFromBytes"),
        ("def f():\n    r = trt.Runtime(log)\n    r.deserialize_cuda_engine(plan)", "r = trt.Runtime(log)"),
        (
            "def f():\n    r = trt.Runtime(log)\n    r.engine_host_code_allowed = True",
            "r = trt.Runtime(log)",
        ),
    ],
)
def test_engine_embedded_plugin_a_way_in_would_be_seen(source: str, way: str) -> None:
    assert list(ways_to_host_code(source)) == [way]


def test_engine_embedded_plugin_none_is_asked_of_the_builder(tiny_onnx_fp16: Artifact) -> None:
    build = NetworkBuild(load_backend("tensorrt-rtx"), tiny_onnx_fp16.path)
    config = build.config("sm89", allow_tf32=False, batches=((1, 4, 8),))
    assert list(config.plugins_to_serialize) == []
    assert build.backend.trt.Runtime(build.log).engine_host_code_allowed is False  # the library's own default
