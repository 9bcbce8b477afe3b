"""Ranges against an independent computation in float64, verdicts at known values, the command as a user meets it."""

import contextlib
import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis.headroom import (
    Headroom,
    HeadroomRequest,
    failure,
    measure_headroom,
    report_lines,
    run_headroom,
    safe_image_size,
)
from cnx_deploy.diagnosis.plots import plot_headroom
from cnx_deploy.diagnosis.ranges import HALF_MAX, larger, parameter_ranges, rank, recorded_form, stage_of
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form, parts_of
from cnx_deploy.runners.emulator.graph import Graph
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from tests.conftest import Command

WIDE_STEM = Variant("wide-stem", (1, 1, 1, 1), (192, 8, 16, 32), 0, 0.0)
"""Wide enough in stage 1 for the stem's norm to be on the patches, as in large and huge; GRN's gain goes both ways."""
WEIGHTS = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
IMAGES = 3


def measured(model: ConvNeXtV2, size: int = 64, margin: float = 4.0, batch: int = 2) -> Headroom:
    batches = image_like_batches(IMAGES, size, batch_size=batch)
    loaded = LoadedModel(model, WEIGHTS)
    return measure_headroom(loaded, Preprocessing(image_size=size), batches, source="test", margin=margin)


def stored(found: Headroom, module: str, what: str = "output") -> float:
    (each,) = (each for each in found.tensors if (each.module, each.what) == (module, what))
    return each.largest


def seen_by_training_form(model: ConvNeXtV2, size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every module of the training form in float64, on the same images."""
    model = copy.deepcopy(model).double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _module, inputs, output: seen.update({name: (inputs[0], output)})

    for name, module in model.named_modules():
        module.register_forward_hook(keep(name))
    pixels = torch.cat(list(image_like_batches(IMAGES, size, batch_size=1)))
    reference_runner(model, DeploySpec(image_size=size, input_kind="uint8")).run(pixels)["logits"]
    return seen


def scale_hidden(model: ConvNeXtV2, factor: float, stage: int = 0, index: int = 0) -> None:
    """Multiply a block's hidden tensor in front of GRN and divide behind it."""
    block = model.stage_blocks()[stage][index]
    with torch.no_grad():
        for tensor in (block.pwconv1.weight, block.pwconv1.bias, block.grn.beta):
            tensor.mul_(factor)
        block.pwconv2.weight.div_(factor)


def scale_stream(model: ConvNeXtV2, factor: float, stage: int) -> None:
    """Multiply the tensor that runs through a stage's blocks; LayerNorms follow it everywhere."""
    _, conv = model.downsampling_layers()[stage - 1]
    with torch.no_grad():
        for tensor in conv.parameters():
            tensor.mul_(factor)
        for block in model.stage_blocks()[stage]:
            for tensor in (block.dwconv.get_parameter("bias"), *block.pwconv2.parameters()):
                tensor.mul_(factor)


def with_constant_hidden(model: ConvNeXtV2, value: float) -> ConvNeXtV2:
    """The first block's hidden tensor is `value` everywhere, up to GELU, which is the identity from 4.5 on."""
    block = model.stage_blocks()[0][0]
    with torch.no_grad():
        block.pwconv1.weight.zero_()
        block.pwconv1.bias.fill_(value)
    return model


def test_stored_tensors_are_those_of_the_training_form_in_float64(tiny_model: ConvNeXtV2) -> None:
    found, seen = measured(tiny_model), seen_by_training_form(tiny_model, 64)
    agreeing = [f"stages.{block}{part}" for block in ("0.0", "2.1", "3.0") for part in ("", ".dwconv", ".act")]
    for name in (*agreeing, "downsample_layers.0.0", "downsample_layers.0.1", "downsample_layers.2.1", "head"):
        assert stored(found, name) == pytest.approx(float(seen[name][1].abs().max()), rel=1e-5), name


def test_responses_are_those_of_the_training_form_in_float64(tiny_model: ConvNeXtV2) -> None:
    found, seen = measured(tiny_model), seen_by_training_form(tiny_model, 64)
    assert [each.module for each in found.responses] == [name for name in seen if name.endswith(".grn")]
    for each in found.responses:
        hidden = seen[each.module][0]  # (N, H, W, 4C)
        assert each.positions == hidden.shape[1] * hidden.shape[2]
        assert each.square_sum == pytest.approx(float(hidden.square().sum(dim=(1, 2)).max()), rel=1e-5)
        assert each.rms == pytest.approx(float(hidden.square().mean(dim=(1, 2)).sqrt().max()), rel=1e-5)


@pytest.mark.parametrize("variant", ["tiny", "wide-stem"])
def test_deviations_are_those_of_the_training_form_in_float64(tiny_model: ConvNeXtV2, variant: str) -> None:
    model = tiny_model if variant == "tiny" else random_model(WIDE_STEM, 10)
    found, seen = measured(model), seen_by_training_form(model, 64)
    norms = [name for name in seen if name.endswith("norm") or name in ("downsample_layers.0.1",)]
    assert {each.module for each in found.norms} >= set(norms)
    for each in found.norms:
        channels = seen[each.module][0].movedim(1, -1) if "downsample" in each.module else seen[each.module][0]
        centred = channels - channels.mean(dim=-1, keepdim=True)
        assert each.deviation == pytest.approx(float(centred.abs().max()), rel=1e-5), each.module
        assert each.rms == pytest.approx(float(centred.square().mean(dim=-1).sqrt().max()), rel=1e-5), each.module


def half_tensors(path: Path) -> list[tuple[str, float]]:
    """Node and largest absolute value of every half tensor of an ONNX file, in order, but the images and copies."""
    graph = Graph(path)
    pixels = torch.cat(list(image_like_batches(IMAGES, 32, batch_size=1)))
    names = [(step.name, name) for step in graph.steps for name in step.outputs]
    found = graph.evaluate(runner_input(pixels, "float"), [name for _, name in names]).tensors
    made = [(node, found[name]) for node, name in names]
    halves = [(name, float(tensor.abs().max())) for name, tensor in made if tensor.dtype == torch.float16]
    copies = ("Reshape", "Transpose", "Unsqueeze")
    return [each for each in halves if not each[0].partition("/")[2].startswith(copies) and each[0] != "model/Cast"]


@pytest.mark.slow
def test_every_half_tensor_of_the_exported_file_is_recorded_and_no_other(tmp_path: Path) -> None:
    model, record = random_model(WIDE_STEM, 10), ModelRecord(WIDE_STEM.name, 10, 32, WEIGHTS, Preprocessing())
    spec = ExportSpec(deploy=DeploySpec(precision="fp16", image_size=32), batch=(1, 2, 4))
    path = export_onnx(model, record, spec, tmp_path).path
    ranges = measured(model, 32).tensors
    assert {"gained weight", "hidden × gain", "normed patches", "product"} < {each.what for each in ranges}
    for (node, largest), found in zip(half_tensors(path), ranges, strict=True):
        module = node.partition("/")[0]
        assert module in ("model", found.module), node  # the pooled features are the whole model's
        assert found.largest == pytest.approx(largest, rel=0.01), node  # FP16's rounding, added up over the network


def test_the_size_of_a_batch_changes_nothing(tiny_model: ConvNeXtV2) -> None:
    one, all_at_once = measured(tiny_model, batch=1), measured(tiny_model, batch=IMAGES)
    assert one.images == all_at_once.images == IMAGES
    for first, second in zip(one.tensors, all_at_once.tensors, strict=True):
        assert first.largest == pytest.approx(second.largest, rel=1e-5)


def test_a_hotter_hidden_tensor_flips_the_naive_verdict_and_not_ours(tiny_model: ConvNeXtV2) -> None:
    scale_hidden(tiny_model, 4.0)  # far enough for GELU to be nearly a ReLU
    before = measured(tiny_model)
    scale_hidden(tiny_model, 16.0)
    after = measured(tiny_model)
    assert after.responses[0].rms == pytest.approx(16.0 * before.responses[0].rms, rel=0.02)
    assert after.responses[0].share == pytest.approx(256.0 * before.responses[0].share, rel=0.04)
    assert not before.naive_failures
    assert [each.module for each in after.naive_failures] == ["stages.0.0.grn"]
    assert before.passed
    assert after.passed
    assert failure(after) is None
    assert (after.naive_image_size or 0) < 64 <= (before.naive_image_size or 0)


def test_a_stored_tensor_without_the_margin_fails_and_is_named(tiny_model: ConvNeXtV2) -> None:
    scale_hidden(tiny_model, 0.3 * HALF_MAX / stored(measured(tiny_model), "stages.0.0.pwconv1"))
    found = measured(tiny_model)
    assert not found.passed
    assert {each.module for each in found.failing_tensors} == {"stages.0.0.pwconv1", "stages.0.0.act"}
    message = str(failure(found))
    assert message.startswith("stages.0.0.pwconv1")
    assert "30 % of FP16's 65504: with a margin of 4 it may reach 16,376" in message
    assert "--keep-fp32 stages.0.0" in message
    assert measured(tiny_model, margin=2.0).passed


def test_an_rms_of_4_57_at_56_by_56_takes_all_of_the_limit(tiny_model: ConvNeXtV2) -> None:
    (response, *_) = measured(with_constant_hidden(tiny_model, (HALF_MAX / 3136) ** 0.5), size=224).responses
    assert (response.module, response.positions) == ("stages.0.0.grn", 3136)
    assert (response.rms, response.share) == (pytest.approx(4.5703, rel=1e-4), pytest.approx(1.0, rel=1e-4))


@pytest.mark.parametrize(
    ("rms", "stage", "margin", "size"),
    [
        (4.57, 0, 1.0, 224),
        (4.58, 0, 1.0, 192),
        (2.66, 0, 1.0, 384),
        (1.99, 0, 1.0, 512),
        (36.5, 3, 1.0, 224),
        (4.57 / 2, 0, 4.0, 224),
        (300.0, 0, 1.0, 0),
        (1e3, 3, 1.0, 0),
        (math.inf, 0, 4.0, 0),
        (math.nan, 0, 4.0, 0),
        (0.0, 0, 4.0, None),
        (1e-200, 0, 4.0, None),
    ],
)
def test_the_largest_safe_size_at_a_known_rms(rms: float, stage: int, margin: float, size: int | None) -> None:
    assert safe_image_size(rms, stage, margin) == size


def test_the_margin_is_a_factor_on_the_naive_sums_of_squares_and_the_smallest_size_over_the_stages_counts(
    tiny_model: ConvNeXtV2,
) -> None:
    model = with_constant_hidden(tiny_model, 0.6 * (HALF_MAX / 256) ** 0.5)
    narrow, found = measured(model, margin=2.0), measured(model)
    assert found.responses[0].share == pytest.approx(0.36, rel=1e-4)
    assert ([each.module for each in found.naive_failures], narrow.naive_failures) == (["stages.0.0.grn"], ())
    sizes = [safe_image_size(each.rms, stage_of(each.module), 4.0) or 0 for each in found.responses]
    assert found.naive_image_size == min(sizes) < max(sizes)


def test_weights_are_counted_exactly(tiny_model: ConvNeXtV2) -> None:
    planted = {2.0**-15: 3, 2.0**-24: 1, 2.0**-25: 1, 2.0**-26: 2, 2.0**-14: 2, 0.0: 4, 65519.0: 1, 65520.0: 1, -1e5: 1}
    values = torch.tensor([value for value, count in planted.items() for _ in range(count)])
    weight = tiny_model.stage_blocks()[0][0].pwconv2.weight
    with torch.no_grad():
        weight.fill_(0.5).view(-1)[: len(values)] = values
    ranges = parameter_ranges(recorded_form(tiny_model, Preprocessing(image_size=32)))
    found = {each.name: each for each in ranges}["stages.0.0.pwconv2.weight"]
    assert (found.count, found.largest) == (weight.numel(), 1e5)
    assert (found.subnormal, found.flushed, found.nonfinite) == (4, 3, 2)
    assert sum(each.nonfinite for each in ranges) == 2


def test_what_is_counted_are_the_fp16_files_own_parameters(tiny_model: ConvNeXtV2) -> None:
    counted = dict(recorded_form(tiny_model, Preprocessing(image_size=32)).named_parameters())
    exported = dict(deploy_form(tiny_model, DeploySpec(precision="fp16", image_size=32)).named_parameters())
    assert list(counted) == list(exported)
    for name, parameter in exported.items():
        torch.testing.assert_close(counted[name].half(), parameter, rtol=1e-3, atol=2.0**-24)


def test_a_weight_that_is_infinite_in_fp16_fails_and_is_named(tiny_model: ConvNeXtV2) -> None:
    with torch.no_grad():
        # Two channels that cancel: no activation is large.
        tiny_model.stage_blocks()[1][0].pwconv2.weight[:, 0] = 7e4
        for tensor in (tiny_model.stage_blocks()[1][0].pwconv1.weight, tiny_model.stage_blocks()[1][0].pwconv1.bias):
            tensor[0] = 0.0
        tiny_model.stage_blocks()[1][0].grn.beta[..., 0] = 0.0
        tiny_model.stage_blocks()[1][0].grn.gamma[..., 0] = -0.9
    found = measured(tiny_model)
    assert [each.name for each in found.failing_parameters] == ["stages.1.0.pwconv2.weight"]
    assert not found.passed
    message = str(failure(found))
    assert message.startswith("stages.1.0.pwconv2.weight has 16 of 1,024 elements that are no number in FP16")
    assert "--keep-fp32 stages.1.0.pwconv2" in message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_activations_that_are_no_number_fail_and_never_pass(tiny_model: ConvNeXtV2, value: float) -> None:
    with torch.no_grad():
        tiny_model.stage_blocks()[2][0].dwconv.get_parameter("bias")[0] = value
    found = measured(tiny_model)
    assert not found.passed
    assert "stages.2.0.dwconv" in found.to_dict()["failing"]
    assert str(failure(found)).startswith(f"stages.2.0.dwconv is {value} in FP32 already")
    assert found.naive_image_size == 0
    assert found.keep_fp32 == ()
    assert any("FAIL" in line for line in report_lines(found))
    assert not json.loads(json.dumps(found.to_dict()))["passed"]


def test_a_nan_once_seen_stays() -> None:
    assert math.isnan(larger(math.nan, 1.0))
    assert math.isnan(larger(math.inf, math.nan))
    assert larger(2.0, 1.0) == larger(1.0, 2.0) == 2.0
    assert sorted([math.nan, 1.0, math.inf], key=rank)[:2] == [1.0, math.inf]


def test_what_the_message_names_can_be_kept_and_keeping_it_makes_fp16_right(tiny_model: ConvNeXtV2) -> None:
    scale_stream(tiny_model, 3e4, stage=2)
    found = measured(tiny_model, 32)
    assert {"downsample_layers.2", "stages.2.0", "stages.2.1", "downsample_layers.3"} <= set(found.keep_fp32)
    assert set(found.keep_fp32) <= set(parts_of(tiny_model.variant))
    pixels = torch.cat(list(image_like_batches(IMAGES, 32, batch_size=1)))
    images, plain = runner_input(pixels, "float"), DeploySpec(precision="fp16", image_size=32)
    kept = DeploySpec(precision="fp16", image_size=32, keep_fp32=found.keep_fp32)
    expected = reference_runner(tiny_model, plain).run(images)["logits"]
    assert not torch.isfinite(deployed_runner(tiny_model, plain).run(images)["logits"]).all()
    torch.testing.assert_close(deployed_runner(tiny_model, kept).run(images)["logits"], expected, rtol=0.02, atol=0.02)


def test_every_module_that_can_fail_has_a_part_to_keep_and_one_that_leaves_a_unit_its_reader_too(
    tiny_model: ConvNeXtV2,
) -> None:
    found = measured(tiny_model, margin=1e9)  # everything fails
    assert len(found.failing_tensors) == len(found.tensors)
    assert set(found.keep_fp32) <= set(parts_of(tiny_model.variant))
    assert "--precision bf16, or keep" in str(failure(found))
    leaving = next(each for each in found.tensors if each.name == "stages.0.0")
    alone = replace(found, margin=4.0, tensors=tuple(
        replace(each, largest=4e4) if each is leaving else each for each in found.tensors
    ))  # fmt: skip
    assert alone.keep_fp32 == ("stages.0.0", "downsample_layers.1")


def test_summaries_hold_the_worst_of_their_stage_and_block(tiny_model: ConvNeXtV2) -> None:
    found = measured(tiny_model)
    document = found.to_dict()
    assert [stage["name"] for stage in document["stages"]] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    assert [block["name"] for block in document["blocks"]][-3:] == ["downsample_layers.3", "stages.3.0", "head"]
    shares = [each.share for each in found.tensors if each.module.startswith(("stages.2", "downsample_layers.2"))]
    assert document["stages"][2]["stored"]["share"] == max(shares)
    assert document["blocks"][1]["response"] == found.responses[0].to_dict()


def test_the_plot_has_a_panel_a_stage_and_says_what_it_leaves_out(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    found = measured(tiny_model)
    first, second = (plot_headroom(found, tmp_path / "plots" / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    text = first.decode()
    assert [f"stage {stage}" in text for stage in range(1, 6)] == [True] * 4 + [False]
    assert "1/4" in text
    with torch.no_grad():
        tiny_model.head.bias[0] = math.nan
    text = plot_headroom(measured(tiny_model), tmp_path / "a.svg").read_text()
    assert "stage 4: 1 NaN or infinite, not drawn" in text
    assert text.count("not drawn") == 1


def test_the_image_that_exceeds_the_others_is_named_first(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    """Noise among flat images; of two alike neither exceeds the other."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, picture in {
        "flat": Image.new("RGB", (32, 32), (120, 120, 120)),
        "alike": Image.new("RGB", (32, 32), (120, 120, 120)),
        "noise": Image.effect_noise((32, 32), 200).convert("RGB"),
    }.items():
        picture.save(folder / f"{name}.png")
    words: dict[str, Any] = {"variant": "tiny-test", "num_classes": 10, "image_size": 32, "data": folder}
    found = run_headroom(HeadroomRequest(**words, per_image=True), print)
    first, *others = found.per_image
    assert Path(first.image).name == "noise.png"
    assert first.leads > len(found.tensors) / 4
    assert first.over_next > 1.5
    largest = {tensor.name: tensor.largest for tensor in found.tensors}
    assert first.largest == pytest.approx(largest[first.tensor], rel=1e-5)
    assert {entry.over_next <= 1.0 + 1e-6 or entry.leads > 0 for entry in others} == {True}
    assert "× next" in "\n".join(report_lines(found))
    assert [entry["image"] for entry in found.to_dict()["per_image"]] == [entry.image for entry in found.per_image]
    plain = run_headroom(HeadroomRequest(**words), print)
    assert plain.to_dict() == {name: value for name, value in found.to_dict().items() if name != "per_image"}
    with pytest.raises(InputError, match="One image cannot be compared"):
        run_headroom(HeadroomRequest(**words, samples=1, per_image=True), print)


def test_the_command_prints_what_the_function_finds(cnx: Command, tmp_path: Path) -> None:
    words = ("diagnose", "headroom", "--variant", "atto", "--image-size", 64, "--num-classes", 4, "--samples", 2)
    code, out, err = cnx(*words, "--json", "--plot", tmp_path / "atto.svg")
    assert code == 0
    assert "weights are random" in err
    assert (tmp_path / "atto.svg").stat().st_size > 10_000
    request = HeadroomRequest(variant="atto", image_size=64, num_classes=4, samples=2)
    document = run_headroom(request, lambda _: None).to_dict()
    assert json.loads(out) == json.loads(json.dumps(document))
    assert document["schema_version"] == 1
    assert document["arithmetic"].endswith("on a GPU: not run")
    assert len({(each["module"], each["what"]) for each in document["tensors"]}) == len(document["tensors"])
    code, out, _ = cnx(*words, "--all")
    assert code == 0
    assert "on a GPU: not run" in out
    assert all(each["module"] in out for each in document["tensors"])


def test_a_checkpoint_without_the_margin_ends_with_exit_code_3(cnx: Command, tmp_path: Path) -> None:
    model = random_model("atto", 4)
    scale_hidden(model, 6000.0)
    size = Preprocessing(image_size=64)
    path = save_checkpoint(tmp_path / "hot.safetensors", model, preprocessing=size)
    for index, image in enumerate(image_like_batches(2, 80, batch_size=1)):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "images" / f"{index}.png")
    code, out, err = cnx("diagnose", "headroom", path, "--data", tmp_path / "images")
    assert code == 3
    assert "2 images of 64 px" in out
    assert "This project's FP16 file: FAIL" in out
    assert "Error: stages.0.0.pwconv1" in err
    assert "--keep-fp32 stages.0.0" in err
    code, out, err = cnx("diagnose", "headroom", path, "--samples", 1, "--json")
    assert code == 3
    assert json.loads(out)["passed"] is False
    assert json.loads(out)["failing"]


def test_of_a_recorded_file_the_weights_are_measured_that_its_manifest_names(
    tiny_onnx_fp16: Artifact, cnx: Command, tmp_path: Path
) -> None:
    request = HeadroomRequest(variant="tiny-test", num_classes=10, image_size=32, samples=2)
    expected = run_headroom(request, lambda _: None).to_dict()
    for path in (tiny_onnx_fp16.path, tiny_onnx_fp16.path.with_suffix(".json")):
        code, out, err = cnx("diagnose", "headroom", path, "--samples", 2, "--json")
        assert (code, json.loads(out)) == (0, json.loads(json.dumps(expected)))
        assert "Weights behind tiny-test-32-fp16.onnx: random 0" in err
    code, _, err = cnx("diagnose", "headroom", tiny_onnx_fp16.path, "--seed", 1, "--image-size", 64)
    assert (code, "Leave out --seed, --image-size" in err) == (2, True)
    shutil.copy(tiny_onnx_fp16.path, tmp_path / "alone.onnx")
    code, _, err = cnx("diagnose", "headroom", tmp_path / "alone.onnx")
    assert (code, "no manifest beside it names the weights" in err) == (2, True)


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ((), 2, "Random weights need a variant"),
        (("--variant", "atto", "--plot", "plot.png"), 2, "expected the suffix .svg"),
        (("--variant", "atto", "--margin", "0.5"), 2, "margin"),
        (("--variant", "atto", "--margin", "nan"), 2, "margin"),
        (("--variant", "atto", "--samples", "0"), 2, "samples"),
        (("--variant", "atto", "--image-size", "31"), 2, "32 to 65536 pixels"),
        (("--variant", "atto", "--data", "empty"), 2, "holds no images"),
    ],
)
def test_what_cannot_be_measured_is_one_message(
    cnx: Command, tmp_path: Path, words: tuple[str, ...], code: int, reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    with contextlib.chdir(tmp_path):
        found, _, err = cnx("diagnose", "headroom", *words)
    assert found == code
    assert reason in err


def test_without_matplotlib_nothing_is_measured_and_the_message_says_what_to_install(
    cnx: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = cnx("diagnose", "headroom", "--variant", "atto", "--plot", tmp_path / "plot.svg")
    assert code == 5
    assert "cnx-deploy[report]" in err
    assert out == ""
    assert not list(Path(tmp_path).iterdir())
