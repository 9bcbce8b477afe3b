"""Exported files where parity is most easily lost: all variants, real sizes, odd images, files that lie."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from google.protobuf.message import EncodeError
from torch import Tensor, nn

from cnx_deploy.api import ExportRequest, run_exports
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.parity import differences
from tests.core.test_files import ENVIRONMENT
from tests.support.foreign_models import randomise
from tests.support.hot_networks import images_for
from tests.support.lies import run

# --- what an export is made of ----------------------------------------------------------------------------------------

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
    shaped = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    assert [node.name for node in model.graph.node if not set(node.output) <= shaped] == []


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_onnx_over_2gib_huge_lies_in_two_files_and_cannot_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2.6 GB of weights, read from another working directory."""
    model = random_model("huge", 1000, seed=0)
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord("huge", 1000, 32, weights, Preprocessing())
    artifact = export_onnx(model, record, ExportSpec(DeploySpec("fp32", 32), batch=(1, 1, 2)), tmp_path / "export")
    sizes = {file.name: file.size_bytes for file in artifact.manifest.files}
    assert list(sizes) == ["huge-32-fp32.onnx", "huge-32-fp32.onnx.data"]
    assert sizes["huge-32-fp32.onnx"] < 10_000_000 < 4 * VARIANTS["huge"].parameter_count < sum(sizes.values()) + 1e6
    assert sizes["huge-32-fp32.onnx.data"] > onnx.checker.MAXIMUM_PROTOBUF
    monkeypatch.chdir("/")
    images = images_for(32, 1)
    expected = reference_runner(model, DeploySpec("fp32", 32)).run(images)["logits"]
    del model
    found = OrtRunner(open_artifact(artifact.path).path).run(images)["logits"]
    assert GATES["fp32"].failures(differences(found, expected)) == ()
    with pytest.raises((ValueError, EncodeError), match=r"2 ?GB|2 ?GiB|exceeds|too large|serialize"):
        onnx.load(artifact.path).SerializeToString()


# --- every variant, real sizes ----------------------------------------------------------------------------------------


def stage_features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each stage gives, and the logits."""
    found: dict[str, Tensor] = {}
    stages: Any = model.stages
    hooks = [
        stage.register_forward_hook(lambda _, __, output, at=at: found.update({f"stage {at}": output}))
        for at, stage in enumerate(stages)
    ]
    with torch.no_grad():
        found["logits"] = model(images)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_parity_all_variants_fp32_every_stage_is_timms(name: str, tmp_path: Path) -> None:
    """Of a random image and one like a photograph; `test_model.py` compares the logits of three variants."""
    theirs = randomise(timm.create_model(f"convnextv2_{name}", pretrained=False).eval())
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = load_checkpoint(tmp_path / "timm.pt").model
    assert ours.variant.name == name
    photo = (next(image_like_batches(1, 64, batch_size=1)).permute(0, 3, 1, 2) / 255.0 - 0.45) / 0.225
    images = torch.cat([torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(3)), photo])
    expected, found = stage_features(theirs, images), stage_features(ours, images)
    assert list(found) == ["stage 0", "stage 1", "stage 2", "stage 3", "logits"]
    for part, tensor in found.items():
        largest = float((tensor - expected[part]).abs().max())
        assert largest <= (1e-5 if part == "logits" else 1e-4 * float(expected[part].abs().max())), part


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 384])
def test_parity_all_variants_fp32_onnx_runtime_at_real_sizes(size: int, tmp_path: Path) -> None:
    """ONNX Runtime on one, two and the largest batch, by the gate and by rtol 1e-3, atol 1e-4."""
    request = ExportRequest(variant="atto", image_size=size, batch=(1, 2, 4), precisions=("fp32",), output_dir=tmp_path)
    (artifact,) = run_exports(request, print)
    model = recorded_model(artifact).model
    with OrtRunner(artifact.path) as runner:
        for batch in (1, 2, 4):
            images = images_for(size, batch)
            found, expected = (
                runner.run(images)["logits"],
                reference_runner(model, DeploySpec("fp32", size)).run(images)["logits"],
            )
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
            assert GATES["fp32"].failures(differences(found, expected)) == ()


# --- FP16 on images that nobody photographs ---------------------------------------------------------------------------


def checkerboard(side: int) -> Tensor:
    lines = torch.arange(side)
    return ((lines[:, None] + lines) % 2).float().expand(1, 3, side, side).contiguous()


STRESS: dict[str, Callable[[int], Tensor]] = {
    "zeros": lambda side: torch.zeros(1, 3, side, side),
    "255s": lambda side: torch.ones(1, 3, side, side),
    "times ten": lambda side: 10.0 * images_for(side, 1),
    "checkerboard": checkerboard,
}


@pytest.mark.parametrize("stress", STRESS)
def test_parity_fp16_stress_no_overflow_on_images_that_nobody_photographs(
    stress: str, tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2
) -> None:
    images = STRESS[stress](32)
    found = EmulatedRunner(tiny_onnx_fp16.path).run(images)["logits"]
    verdict = differences(found, reference_runner(tiny_model, DeploySpec("fp32", 32)).run(images)["logits"])
    assert (GATES["fp16"].failures(verdict), verdict.nonfinite_count) == ((), 0)
    assert verdict.centred_cosine_min >= 0.9995


# --- another name, another shape, other values: three messages --------------------------------------------------------


def renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "scores"
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "logits" else name for name in node.output]


def cut(model: onnx.ModelProto) -> None:
    """Nine classes of ten."""
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
    for tensor in model.graph.initializer:
        if tensor.name.startswith("head."):
            values = onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[:9].copy(), tensor.name))


def shifted(model: onnx.ModelProto) -> None:
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == "head.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 0.1, bias.name))


TOLD = {
    renamed: "are called scores",
    cut: "['FLOAT', 'batch', 9]",
    shifted: "differ from PyTorch by more than the gate",
}


@pytest.mark.parametrize("change", TOLD)
def test_parity_shape_or_name_mismatch_has_a_message_of_its_own(
    change: Callable[[onnx.ModelProto], None],
    tiny_onnx_fp32: Artifact,
    tiny_model: ConvNeXtV2,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file of another form under a manifest that vouches for its bytes."""
    loaded = LoadedModel(tiny_model, tiny_onnx_fp32.manifest.model.weights)
    monkeypatch.setattr(
        "cnx_deploy.verification.originals.recorded_model", lambda _: loaded
    )  # the variant is in no table
    model, path = onnx.load(tiny_onnx_fp32.path), tmp_path / tiny_onnx_fp32.path.name
    change(model)
    onnx.save(model, path)
    record = json.loads(tiny_onnx_fp32.path.with_suffix(".json").read_text(encoding="utf-8"))
    record["files"][0].update(sha256=sha256_of_file(path), size_bytes=path.stat().st_size)
    path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    code, said = run("verify", path, "--samples", "1")
    assert (code, [text for text in TOLD.values() if text in said]) == (3, [TOLD[change]]), said


# --- one image, whoever is beside it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gpu", "cpu"])
def test_batch_invariance_in_fp32_and_not_of_a_network_that_sums_over_the_batch(
    layout: str, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = deployed_runner(tiny_model, DeploySpec("fp32", 32, layout=layout))
    images = images_for(32, 5)

    def largest_difference() -> float:
        alone = torch.cat([runner.run(image[None])["logits"] for image in images])
        return float((runner.run(images)["logits"] - alone).abs().max())

    assert largest_difference() <= 2e-5  # 3e-6 here; what sums over the batch is at 1e-3
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *more: real(x + 1e-3 * x.mean(0, keepdim=True), *more))
    assert largest_difference() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_recorded_atto_is_what_is_exported_today_to_the_byte(tmp_path: Path, precision: str) -> None:
    recorded = json.loads(
        (Path(__file__).parents[2] / "export" / f"atto-224-{precision}.json").read_text(encoding="utf-8")
    )
    (made,) = run_exports(
        ExportRequest(variant="atto", precisions=(precision,), output_dir=tmp_path, no_verify=True), lambda text: None
    )
    if any(made.manifest.tools[name] != recorded["tools"][name] for name in ("torch", "onnx", "onnxscript")):
        pytest.skip("the recorded file was written by other releases")
    assert [(file.name, file.sha256) for file in made.manifest.files] == [
        (file["name"], file["sha256"]) for file in recorded["files"]
    ]
