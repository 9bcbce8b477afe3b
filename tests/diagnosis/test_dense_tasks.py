"""Ranges, layers and modules of a task with maps and scores: a neck that gives several maps, and one head."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnx_deploy as cnx
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES, OutputSpec
from cnx_deploy.core.variants import Variant
from cnx_deploy.diagnosis import chain
from cnx_deploy.diagnosis.bisect import bisect_artifact, report_lines
from cnx_deploy.diagnosis.layer_outputs import LOGITS
from cnx_deploy.diagnosis.layerwise import compare_artifact, compare_layers
from cnx_deploy.diagnosis.mixed_precision import MixedForm, case_of, probe_recorded
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy_layers import convolution, doubles, widen
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.model.tasks import base
from cnx_deploy.model.tasks.base import Outputs, Prediction, Task, find_task, register_task
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.verify import Reference
from tests.support.hot_networks import images_for
from tests.support.layer_faults import beginnings, planted, shifted, with_constant

WIDTH = 8


class Neck(nn.Module):
    """Two maps (N, C, H, W) -> two of one width, the coarser one added to the finer, with an activation in place."""

    def __init__(self, fine: nn.Module, coarse: nn.Module) -> None:
        super().__init__()
        self.fine, self.coarse, self.act = fine, coarse, nn.ReLU(inplace=True)

    def forward(self, maps: Mapping[int, Tensor]) -> list[Tensor]:
        coarse = self.coarse(maps[3].to(self.coarse.weight.dtype))
        fine = self.fine(maps[2].to(self.fine.weight.dtype))
        return [self.act(fine + F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")), self.act(coarse)]


def given(logits: Tensor) -> Outputs:
    """The outputs from (N, K, H, W): indices, truths and results in pairs are among what is computed."""
    values, classes = logits.max(dim=1)
    best = torch.where((classes >= 0) & (values > 0), values, values * 0.5).flatten(1).topk(3).values
    return {"logits": logits, "best": best}


class Maps(Task):
    """A map of class scores, and the image's best scores where the map is above zero."""

    name = "test-maps"
    levels = (2, 3)
    class_layers = ("scores",)

    def outputs(self, num_classes: int, words: Any = (), maps: Any = ()) -> tuple[OutputSpec, ...]:
        sides = maps[2][1:] if maps else ()
        return (
            OutputSpec("logits", (num_classes, *sides), "logit"),
            OutputSpec("best", (3,), "logit", is_ranked=True),
        )

    def modules(self, variant: Variant, num_classes: int) -> dict[str, nn.Module]:
        neck = Neck(nn.Conv2d(variant.dims[2], WIDTH, 1), nn.Conv2d(variant.dims[3], WIDTH, 1))
        return {"neck": neck, "scores": nn.Conv2d(WIDTH, num_classes, 1)}

    def forward(
        self, network: Any, maps: Mapping[int, Tensor], words: Any = (), *, temperature: float = 1.0
    ) -> Outputs:
        return given(network.scores(network.neck(maps)[0]))

    def deployed_modules(self, model: ConvNeXtV2, spec: Any) -> dict[str, nn.Module]:
        neck: Any = model.neck
        parts = [convolution(*doubles(part)) for part in (neck.fine, neck.coarse)]
        return {"neck": Neck(*parts), "scores": convolution(*doubles(model.scores))}  # type: ignore[arg-type]

    def deployed_forward(self, network: Any, maps: Mapping[int, Tensor], words: Any = ()) -> Outputs:
        return given(widen(network.scores(network.neck(maps)[0].to(network.scores.weight.dtype))))

    def predictions(self, outputs: Any, paths: Sequence[str], class_names: Any, *, top: int) -> list[Prediction]:
        return [Prediction(path) for path in paths]

    def num_classes_in(self, state: Mapping[str, Tensor]) -> int | None:
        return len(state["scores.weight"]) if "scores.weight" in state else None


@pytest.fixture(scope="module")
def task() -> Iterator[Maps]:
    task = Maps()
    register_task(task)
    yield task
    del base._TASKS[task.name]


def exported(model: ConvNeXtV2, folder: Path, *precisions: str, **words: Any) -> list[cnx.Artifact]:
    checkpoint = save_checkpoint(folder / "weights.safetensors", model)
    options: dict[str, Any] = {"image_size": 64, "batch": (2, 2, 2), "output_dir": folder, **words}
    return cnx.export(model.variant.name, checkpoint=checkpoint, precision=precisions, **options)


def hot(task: Task, variant: Variant) -> ConvNeXtV2:
    """The same function from weights that FP16 holds, with maps of the neck that it does not."""
    model: Any = random_model(variant, 4, task=task)
    with torch.no_grad():
        for tensor in (*model.neck.parameters(), model.scores.weight):
            tensor.mul_(1e-6 if tensor is model.scores.weight else 1e6)
    return model


@pytest.fixture(scope="module")
def files(task: Maps, tiny_variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> list[cnx.Artifact]:
    return exported(random_model(tiny_variant, 4, task=task), tmp_path_factory.mktemp("maps"), "fp32", "fp16")


def maps_of_the_neck(model: ConvNeXtV2, size: int) -> list[Tensor]:
    """What the training form's neck gives for the images that a range analysis measures on."""
    seen: list[Tensor] = []
    handle = model.get_submodule("neck").register_forward_hook(lambda *words: seen.extend(words[2]))
    reference_runner(model, DeploySpec(image_size=size)).run(images_for(size, 2))
    handle.remove()
    return seen


def test_maps_of_a_neck_are_among_what_fp16_has_to_hold(task: Maps, tiny_variant: Variant, tmp_path: Path) -> None:
    model = random_model(tiny_variant, 4, task=task)
    cool = cnx.headroom(save_checkpoint(tmp_path / "cool.safetensors", model), samples=2, image_size=64)
    assert cool.passed
    measured = {tensor.module: tensor.largest for tensor in cool.tensors}
    assert measured.keys() >= {"neck.fine", "neck.coarse", "neck.act", "scores"}
    largest = max(float(each.abs().max()) for each in maps_of_the_neck(model, 64))
    assert measured["neck.act"] == pytest.approx(largest, rel=1e-4)
    path = save_checkpoint(tmp_path / "hot.safetensors", hot(task, tiny_variant))
    warm = cnx.headroom(path, samples=2, image_size=64)
    assert {tensor.module for tensor in warm.failing_tensors} >= {"neck.fine", "neck.act"}
    assert warm.keep_fp32 == ("head",)


def test_modules_of_one_output_are_compared_by_layer_and_a_fault_of_the_neck_is_named(
    files: list[cnx.Artifact], tmp_path: Path
) -> None:
    sound = compare_artifact(files[1])
    assert (sound.passed, dict(sound.missing), len(sound.ran)) == (True, {}, 3)
    modules = {output.module for output in sound.ran[0].outputs}
    assert modules >= {"neck.fine", "neck.coarse", "scores", LOGITS}
    assert not modules & {"neck", "neck.act"}, "two outputs, and two runs: what reads them is compared"
    loaded, spec = recorded_model(files[0]), files[0].manifest.deploy
    path = planted(files[0], tmp_path, with_constant("neck.coarse.bias", shifted))
    found = compare_layers(path, loaded.model, spec, [images_for(64)])
    assert beginnings(found) == {"onnxruntime": "neck.coarse"}


@pytest.mark.slow
def test_the_form_with_rounded_operators_is_the_file_and_its_head_is_kept_as_a_whole(
    task: Maps, tiny_variant: Variant, tmp_path: Path
) -> None:
    """Indices, truths, pairs of results and an activation in place come through the rounding."""
    model = hot(task, tiny_variant)
    file = exported(model, tmp_path, "fp16", no_verify=True)[0]
    case = case_of(file, recorded_model(file), GATES["fp16"], None, 2)
    recorded = probe_recorded(file, case)
    assert not recorded.probe.passed
    assert str(recorded.first_nonfinite).startswith("neck.")
    form = MixedForm(model, case.spec.deploy)
    for kept, passes in (((), False), (("head",), True)):
        assert case.judge(kept, form.outputs(case.batches, kept), exported=False).passed is passes
    found = bisect_artifact(file, recorded_model(file), lambda _: None, gate=GATES["fp16"], samples=2)
    assert (found.outcome, found.kept) == ("found", ("head",)), "files say the same as the form"
    command = " ".join(report_lines(found))
    assert "--task test-maps" in command


@pytest.mark.slow
def test_detection_is_measured_and_compared_up_to_its_proposals_and_judged_by_matching(
    tiny_variant: Variant, tmp_path: Path
) -> None:
    few = {"pre_nms": 60, "proposals": 40, "detections": 10, "candidates": 60, "passes": 30}
    options = {"channels": 16, "box_channels": 32, "mask_channels": 8, **few}
    model = random_model(tiny_variant, 3, task=find_task("detect").configured(options))
    file = exported(model, tmp_path, "fp16", no_verify=True)[0]
    layers = compare_artifact(file, samples=2)
    assert (layers.passed, dict(layers.missing), len(layers.ran)) == (True, {}, 3)
    compared = {output.module for output in layers.ran[0].outputs}
    assert "pyramid.inner.3" in compared
    assert not [name for name in compared if name.startswith(("box_head", "mask_head"))]
    assert {"box_head.fc6", "proposals.coder"} <= {*layers.not_compared}
    ranges = cnx.headroom(file.path, samples=1)
    assert {tensor.module for tensor in ranges.tensors} >= {"proposals.predictor", "box_head.fc7", "mask_head.widen"}
    case = case_of(file, recorded_model(file), GATES["fp16"], None, 2)
    form = MixedForm(model, case.spec.deploy)
    for probe in (probe_recorded(file, case).probe, case.judge((), form.outputs(case.batches), exported=False)):
        assert probe.found.detections is not None
        assert probe.found.detections.matched > 0


def test_the_chain_of_a_dense_task_passes_step_by_step(
    files: list[cnx.Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain's first step is the FP32 file that is there: tests/diagnosis/test_chain.py has one exported."""
    monkeypatch.setattr(chain, "_export_fp32", lambda *_: files[0])
    steps = chain.follow_chain(files[1], [], Reference(files[1], None, 2)).steps
    assert [(step.result is not None and step.result.passed) for step in steps] == [True, True, True]
