"""Parity where it is most easily lost, beside what `test_parity.py` and others hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from torch import Tensor, nn

from cnx_deploy.api import ExportRequest, run_exports
from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.parity import differences
from tests.support.foreign_models import randomise
from tests.support.hot_networks import images_for

# --- every variant ----------------------------------------------------------------------------------------------------


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


def images_of_both_kinds(side: int) -> Tensor:
    """A random image and one like a photograph, normalised."""
    photo = (next(image_like_batches(1, side, batch_size=1)).permute(0, 3, 1, 2) / 255.0 - 0.45) / 0.225
    return torch.cat([torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(3)), photo])


@pytest.mark.parametrize(
    "name", [each if each == "atto" else pytest.param(each, marks=pytest.mark.slow) for each in VARIANTS]
)
def test_parity_all_variants_fp32_every_stage_is_timms(name: str, tmp_path: Path) -> None:
    theirs = randomise(timm.create_model(f"convnextv2_{name}", pretrained=False).eval())
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = load_checkpoint(tmp_path / "timm.pt").model
    assert (ours.variant.name, sum(each.numel() for each in ours.parameters())) == (
        name,
        VARIANTS[name].parameter_count,
    )
    images = images_of_both_kinds(64)
    expected, found = stage_features(theirs, images), stage_features(ours, images)
    assert list(found) == ["stage 0", "stage 1", "stage 2", "stage 3", "logits"]
    for part, tensor in found.items():
        largest = float((tensor - expected[part]).abs().max())
        assert largest <= (1e-5 if part == "logits" else 1e-4 * float(expected[part].abs().max())), part
    with torch.no_grad():
        ours.stages[2][-1].grn.beta.add_(1e-2)
    assert float((stage_features(ours, images)["logits"] - expected["logits"]).abs().max()) > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 288, 384])
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


LIES: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "name": (renamed, "The outputs of tiny-test-32-fp32.onnx are called scores, and its manifest says logits."),
    "shape": (
        cut,
        "The outputs of tiny-test-32-fp32.onnx are of the type and shape {'logits': ['FLOAT', 'batch', 9]}, and its "
        "manifest says {'logits': ['FLOAT', 'batch', 10]}.",
    ),
    "tolerance": (shifted, "tiny-test-32-fp32.onnx differ from PyTorch by more than the gate allows"),
}


@pytest.mark.parametrize("lie", LIES)
def test_parity_shape_or_name_mismatch_has_a_message_of_its_own(
    lie: str,
    tiny_onnx_fp32: Artifact,
    tiny_model: ConvNeXtV2,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A file of another form under a manifest that vouches for its bytes."""
    loaded = LoadedModel(tiny_model, tiny_onnx_fp32.manifest.model.weights)
    monkeypatch.setattr("cnx_deploy.verification.verify.recorded_model", lambda _: loaded)  # the variant is in no table
    change, told = LIES[lie]
    model, path = onnx.load(tiny_onnx_fp32.path), tmp_path / tiny_onnx_fp32.path.name
    change(model)
    onnx.save(model, path)
    record = json.loads(tiny_onnx_fp32.path.with_suffix(".json").read_text(encoding="utf-8"))
    record["files"][0].update(sha256=sha256_of_file(path), size_bytes=path.stat().st_size)
    path.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(path), "--samples", "1"])
    said = capsys.readouterr().err
    assert (stop.value.code, told in said) == (3, True), said
    others = [text for other, (_, text) in LIES.items() if other != lie]
    assert not any(text in said for text in others)


# --- one image, whoever is beside it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gpu", "cpu"])
def test_batch_invariance_in_fp32_and_not_of_a_network_that_sums_over_the_batch(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = deployed_runner(random_model("atto", 10, seed=0), DeploySpec("fp32", 64, layout=layout))
    images = runner_input(next(image_like_batches(5, 64, batch_size=5)), "float")

    def largest_difference() -> float:
        alone = torch.cat([runner.run(image[None])["logits"] for image in images])
        return float((runner.run(images)["logits"] - alone).abs().max())

    assert largest_difference() <= 2e-5  # 3e-6 here; what sums over the batch is at 1e-3
    real = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *more: real(x + 1e-3 * x.mean(0, keepdim=True), *more))
    assert largest_difference() > 1e-4
