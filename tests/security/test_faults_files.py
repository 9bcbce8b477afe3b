"""Exported files and engines against what may be done to them."""

import json
import re
import subprocess
import sys
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
from tests.core.test_files import ENVIRONMENT
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
    expected = reference_runner(model, DeploySpec("fp32", size)).run(images)["logits"]
    assert GATES["fp32"].failures(differences(OrtRunner(artifact.path).run(images)["logits"], expected)) == ()


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_export_in_two_processes_is_the_same_bytes_and_the_same_manifest_but_for_the_time(tmp_path: Path) -> None:
    words = ["export", "--variant", "atto", "--image-size", "32", "--num-classes", "2", "--precision", "fp32"]
    manifests = []
    for name in "ab":
        command = [sys.executable, "-m", "cnx_deploy", *words, "--batch", "1", "--output-dir", name]
        subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, timeout=120)
        manifest = json.loads((tmp_path / name / "atto-32-fp32.json").read_text(encoding="utf-8"))
        manifests.append({key: value for key, value in manifest.items() if key != "created"})
    assert (tmp_path / "a/atto-32-fp32.onnx").read_bytes() == (tmp_path / "b/atto-32-fp32.onnx").read_bytes()
    assert manifests[0] == manifests[1]


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
    expected = reference_runner(model, DeploySpec("fp32", 32)).run(images)["logits"]
    del model
    found = OrtRunner(open_artifact(artifact.path).path).run(images)["logits"]
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

FORBIDDEN = re.compile(
    r"plugins_to_serialize|load_library|get_plugin_registry|init_libnvinfer_plugins|engine_?from_?(bytes|path)|\bTrtRunner",
    re.IGNORECASE,
)
"""What would put a library into an engine, or open an engine with host code allowed, as Polygraphy does."""

RUNTIME = re.compile(r"^( *)(\S+) = .*\.Runtime\(.*\)\n\1\2\.engine_host_code_allowed = False$", re.MULTILINE)
"""A runtime that is made, and in the next line forbidden to run code that an engine brings."""


def test_no_code_puts_a_library_into_an_engine_or_lets_one_run_from_it() -> None:
    runtimes = 0
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert FORBIDDEN.search(source) is None, path
        made = re.findall(
            r"^( *)(\S+) = .*\.Runtime\(.*\)\n\1\2\.engine_host_code_allowed = False$", source, re.MULTILINE
        )
        assert len(made) == source.count(".Runtime("), f"{path} makes a runtime and leaves host code allowed"
        runtimes += len(made)
    assert runtimes >= 2  # the search sees them: the runner's and the child's that describes an engine


def test_no_library_is_asked_of_the_builder(tiny_onnx_fp16: Artifact) -> None:
    build = NetworkBuild(load_backend("tensorrt-rtx"), tiny_onnx_fp16.path)
    config = build.config("sm89", allow_tf32=False, batches=((1, 4, 8),))
    assert list(config.plugins_to_serialize) == []
    assert build.backend.trt.Runtime(build.log).engine_host_code_allowed is False  # the library's own default
