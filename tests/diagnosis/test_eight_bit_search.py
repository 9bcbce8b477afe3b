"""The smallest set of parts in FP16: found for a block that is planted, by the form, by files and by the command."""

import json
import shlex
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS, EngineCheck
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.manifest import Artifact, ModelRecord, OnnxManifest
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.diagnosis.calibration import calibrate
from cnx_deploy.diagnosis.eight_bit_search import (
    EightBitSearch,
    bisect_artifact,
    failure,
    parts_in_eight_bits,
    report_lines,
    sensitivity_of,
    smallest_set,
)
from cnx_deploy.diagnosis.eight_bit_trials import Trial, Trials, _changed, fewer_scales
from cnx_deploy.diagnosis.mixed_precision import Case, EightBitForm, Probe, RoundedOperators
from cnx_deploy.exporters.onnx import ExportSpec
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.parity import differences
from tests.conftest import TINY_TEST, TINY_V1_TEST, Command
from tests.support.faulty_networks import NO_WEIGHTS

SIDE = 64
"""At this size the smallest network has blocks of both kinds, and one of which only pwconv1 is in eight bits."""
NO_GAINS = tuple(GAIN_FOLDS.values())
V2_CHOICES, V1_CHOICES = ("pwconv1", "grn", "pwconv2"), ("pwconv1", "pwconv2")


def with_outliers(variant: Variant, stage: int, index: int) -> ConvNeXtV2:
    """One block has two hidden channels 64 times as large before its second layer, which costs FP32 nothing.

    All other blocks add a tenth of what they did, so that their own rounding is far below the gate.
    """
    model = random_model(variant, 10, seed=0)
    blocks = {(at, inside): block for at, row in enumerate(model.stage_blocks()) for inside, block in enumerate(row)}
    with torch.no_grad():
        for block in blocks.values():
            block.pwconv2.weight *= 0.1
            block.pwconv2.bias *= 0.1
        block = blocks[stage, index]
        block.pwconv1.weight[:2] *= 64
        block.pwconv1.bias[:2] *= 64
        block.pwconv2.weight *= 10
        block.pwconv2.weight[:, :2] /= 64
    return model


def images(count: int, seed: int) -> list[Tensor]:
    return [runner_input(pixels, "float") for pixels in image_like_batches(count, SIDE, batch_size=4, seed=seed)]


def case_of(model: ConvNeXtV2, precision: str, leave_out: tuple[str, ...] = NO_GAINS) -> Case:
    """The network on eight images, calibrated on eight others."""
    spec = DeploySpec(precision, SIDE, leave_out=leave_out)
    spec = replace(spec, eight_bits=calibrate(model, spec, lambda: images(8, seed=0)))
    batches = tuple(images(8, seed=1))
    runner = reference_runner(model, spec)
    expected = {"logits": torch.cat([runner.run(batch)["logits"] for batch in batches])}
    record = ModelRecord(model.variant.name, 10, SIDE, NO_WEIGHTS, Preprocessing())
    return Case(LoadedModel(model, NO_WEIGHTS), record, ExportSpec(deploy=spec), batches, expected, GATES[precision])


@dataclass
class Judge:
    """A judge by the form."""

    case: Case
    form: EightBitForm

    def __call__(self, kept: Collection[str]) -> Probe:
        return self.case.judge(kept, self.form.outputs(self.case.batches, kept), exported=False)


def searched(case: Case, choices: tuple[str, ...]) -> tuple[dict[str, dict[str, float]], tuple[str, ...] | None, Judge]:
    deploy = case.spec.deploy
    assert deploy.eight_bits is not None
    judge, parts = Judge(case, EightBitForm(case.loaded.model, deploy)), parts_in_eight_bits(deploy.eight_bits)
    sensitivity = sensitivity_of(parts, judge)
    kept = smallest_set(parts, tuple(sensitivity), lambda names: judge(names).passed, choices, case.units)
    return sensitivity, kept, judge


# On the form


@pytest.mark.parametrize(
    ("variant", "precision", "stage", "index"),
    [
        (TINY_TEST, "int8", 2, 1),
        (TINY_TEST, "fp8", 2, 0),
        (TINY_V1_TEST, "int8", 1, 0),
        pytest.param(TINY_TEST, "int8", 0, 0, marks=pytest.mark.slow),
        pytest.param(TINY_V1_TEST, "int8", 3, 0, marks=pytest.mark.slow),
    ],
)
def test_the_block_with_outliers_is_worst_and_nothing_but_it_is_kept(
    variant: Variant, precision: str, stage: int, index: int
) -> None:
    block = f"stages.{stage}.{index}"
    case = case_of(with_outliers(variant, stage, index), precision)
    sensitivity, kept, judge = searched(case, V2_CHOICES if variant.version == 2 else V1_CHOICES)
    assert not judge(()).passed
    assert next(iter(sensitivity)) == block
    errors = [row["block"] for row in sensitivity.values()]
    assert errors[0] > 5 * errors[1]
    assert kept
    assert all(f"{name}.".startswith(f"{block}.") for name in kept)
    assert judge(kept).passed
    assert not any(judge([other for other in kept if other != name]).passed for name in kept)


def test_with_gains_the_same_block_needs_nothing() -> None:
    """What the search finds above is what the gains mend."""
    case = case_of(with_outliers(TINY_V1_TEST, 1, 0), "int8", leave_out=())
    judge = Judge(case, EightBitForm(case.loaded.model, case.spec.deploy))
    assert judge(()).passed


def test_a_blind_judge_finds_nothing() -> None:
    model = with_outliers(TINY_TEST, 2, 1)
    case = case_of(model, "int8")
    form = EightBitForm(model, case.spec.deploy)
    blind = replace(case, expected=form.outputs(case.batches))
    judge = Judge(blind, form)
    parts = parts_in_eight_bits(case.spec.deploy.eight_bits)
    units = tuple(parts)
    assert smallest_set(parts, units, lambda kept: judge(()).passed, V2_CHOICES, case.units) == ()
    assert smallest_set(parts, units, lambda kept: False, V2_CHOICES, case.units) is None


@pytest.mark.parametrize("leave_out", [(), NO_GAINS])
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("variant", [TINY_TEST, TINY_V1_TEST])
def test_keeping_parts_is_the_form_with_fewer_scales(
    variant: Variant, precision: str, leave_out: tuple[str, ...]
) -> None:
    model = random_model(variant, 10, seed=0)
    case = case_of(model, precision, leave_out)
    deploy = case.spec.deploy
    assert deploy.eight_bits is not None
    form, whole = EightBitForm(model, deploy), None
    for kept in ((), ("stages.2.1",), ("stages.0.0.grn", "stages.1.0.pwconv2"), ("stages.2", "stages.3.0.pwconv1")):
        record = fewer_scales(deploy.eight_bits, kept)
        # A block without scales stays what computes gains, as in the form whose parts are kept from call to call.
        record = replace(record, blocks={**deploy.eight_bits.without_rounding().blocks, **record.blocks})
        alone = deploy_form(model, replace(deploy, eight_bits=record))
        with torch.inference_mode(), RoundedOperators():
            expected = torch.cat([alone(batch) for batch in case.batches])
        found = form.outputs(case.batches, kept)["logits"]
        assert torch.equal(found, expected)
        whole = found if whole is None else whole
        assert bool(kept) != torch.equal(found, whole)
    assert torch.equal(form.outputs(case.batches)["logits"], whole)


def test_parts_are_those_with_tensors_in_eight_bits_and_a_block_of_few_positions_has_one() -> None:
    record = case_of(random_model(TINY_TEST, 10, seed=0), "int8").spec.deploy.eight_bits
    assert record is not None
    assert parts_in_eight_bits(record) == {
        **dict.fromkeys(("stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1"), V2_CHOICES),
        "stages.3.0": ("pwconv1",),
    }
    assert fewer_scales(record, ("stages.3.0.pwconv1",)).blocks.keys() == record.blocks.keys() - {"stages.3.0"}


@pytest.mark.parametrize(("part", "changed"), [("pwconv1", ()), ("grn", ("g",)), ("pwconv2", ("h",))])
def test_a_new_calibration_changes_what_shares_gains_with_the_part_that_is_kept(
    part: str, changed: tuple[str, ...]
) -> None:
    """The hidden tensor's gains go into the second weight; all other gains stay within their part."""
    model = with_outliers(TINY_TEST, 1, 0)
    deploy = case_of(model, "int8", leave_out=()).spec.deploy
    assert deploy.eight_bits is not None
    for block, expected in (("stages.1.0", changed), ("stages.2.1", ())):  # the latter has the hidden tensor scaled
        kept = (f"{block}.{part}",)
        fresh = calibrate(model, replace(deploy, eight_bits=None), lambda: images(8, seed=0), kept=kept)
        assert _changed(fewer_scales(deploy.eight_bits, kept), fresh) == tuple(f"{block}.{name}" for name in expected)


def test_where_errors_add_up_the_worst_blocks_are_kept_and_not_the_first_ones() -> None:
    errors = {"stages.0.0": 3, "stages.0.1": 9, "stages.1.0": 3, "stages.2.0": 8, "stages.2.1": 3, "stages.3.0": 3}
    parts = dict.fromkeys(errors, ("pwconv1", "grn"))

    def passes(kept: Collection[str]) -> bool:
        names = [(block, f"{block}.{part}") for block in errors for part in parts[block]]
        return sum(errors[block] / 2 for block, name in names if not {block, name} & set(kept)) < 13

    order = sorted(errors, key=lambda block: -errors[block])
    units = tuple(errors)
    assert smallest_set(parts, order, passes, ("pwconv1", "grn"), units) == ("stages.0.1", "stages.2.0")
    assert smallest_set(parts, order[::-1], passes, ("pwconv1", "grn"), units) != ("stages.0.1", "stages.2.0")


# On files


@dataclass(frozen=True)
class Failing:
    """A file that fails its gate, the network in it, and folders of enough and of too few images."""

    artifact: Artifact[OnnxManifest]
    loaded: LoadedModel
    data: Path
    few: Path

    @property
    def deploy(self) -> DeploySpec:
        return self.artifact.manifest.deploy


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Failing:
    folder = tmp_path_factory.mktemp("failing")
    for name, count in (("images", 66), ("few", 12)):
        (folder / name).mkdir()
        for index, pixels in enumerate(image_like_batches(count, SIDE, batch_size=1, seed=count)):
            Image.fromarray(pixels[0].numpy()).save(folder / name / f"{index:02}.png")
    model = with_outliers(TINY_TEST, 2, 1)
    checkpoint = save_checkpoint(folder / "outliers.safetensors", model)
    words = ["--variant", "tiny-test", "--checkpoint", checkpoint, "--image-size", SIDE, "--precision", "int8"]
    words += [word for fold in NO_GAINS for word in ("--without-fold", fold)]
    words += ["--batch", "2:2:4", "--calibration", folder / "images", "--samples", 8, "--no-verify"]
    run(*words, "--output-dir", folder / "export")
    artifact = open_artifact(folder / "export" / f"tiny-test-{SIDE}-int8.onnx")
    return Failing(artifact, load_checkpoint(checkpoint), folder / "images", folder / "few")


def run(*words: object) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, words)])
    assert not stop.value.code


def bisected(failing: Failing, data: Path, gate: Gate = GATES["int8"]) -> EightBitSearch:
    return bisect_artifact(failing.artifact, failing.loaded, lambda _: None, data, gate=gate, has_engines=False)


@pytest.mark.slow
def test_the_printed_command_writes_a_file_that_passes_where_the_first_one_fails(
    failing: Failing, cnx: Command, tmp_path: Path
) -> None:
    file = failing.artifact.path
    code, out, _ = cnx("diagnose", "bisect", file, "--data", failing.data, "--no-engine-gates", "--json")
    document = json.loads(out)
    assert (code, document["outcome"], document["images"], document["images_of_probes"]) == (0, "found", 58, 30)
    kept = document["keep_fp16"]
    assert kept
    assert all(f"{name}.".startswith("stages.2.1.") for name in kept)
    assert next(iter(document["sensitivity"])) == "stages.2.1"
    assert [probe["passed"] for probe in document["without_one"]] == [False] * len(kept)
    assert document["final"]["probe"]["passed"]
    words = shlex.split(document["command"])
    code, _, err = cnx(*words[1:], "--output-dir", tmp_path)
    assert code == 0, err
    written = open_artifact(tmp_path / file.name).manifest
    assert written.deploy.eight_bits.kept == tuple(sorted((*kept, "stages.3.0.grn", "stages.3.0.pwconv2")))
    (parity,) = written.facts.parity
    assert parity.passed
    assert parity.differences.relative_l2_max == document["final"]["probe"]["found"]["relative_l2_max"]
    assert not any(name.startswith("stages.3.0") for name in words), "what a calibration keeps of itself is not asked"


def test_the_form_rounds_as_the_file_does(failing: Failing) -> None:
    """They differ by a rounding of the quotient here and there, and from PyTorch fifty times as much."""
    trials = trials_of(failing, failing.data, [])
    form = EightBitForm(failing.loaded.model, failing.deploy)
    some = trials.some(range(4))
    by_form, (batch,) = form.outputs(some.batches)["logits"], some.batches
    with open_runner(failing.artifact, "emulate-fp16") as runner:
        by_file = runner.run(batch)["logits"]
    apart = differences(by_form, by_file).relative_l2_max
    wrong = differences(by_form, some.expected["logits"]).relative_l2_max
    assert apart < 0.05 * wrong
    returned = form.outputs(some.batches, ("stages.2.1",))["logits"]
    assert differences(returned, by_file).relative_l2_max > 0.5 * wrong, "what the form keeps, the file does not"


def test_a_gate_that_fp16_fails_is_told_from_eight_bits(failing: Failing) -> None:
    search = bisected(failing, failing.data, GATES["fp32"])
    error = failure(search)
    assert (search.outcome, search.kept, search.command, search.final) == ("nothing helps", None, None, None)
    assert error is not None
    assert "fails with every part in FP16 too (relative L2" in str(error)
    assert any("stages.2.1" in line for line in report_lines(search))


@pytest.mark.slow
def test_where_everything_has_to_be_kept_the_answer_is_fp16(failing: Failing) -> None:
    search = bisected(failing, failing.data, Gate("strict", 3.0e-3, -1.0, 0.0, 9.0))
    assert search.kept == ("stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0.pwconv1")
    assert (search.outcome, search.final, search.advised) == ("found", None, None)
    assert search.other is not None
    assert (search.other.precision, search.other.probe.passed) == ("fp8", False)
    assert "--precision fp16 " in str(search.command)


def test_a_file_that_passes_says_so_and_nothing_is_tried(failing: Failing) -> None:
    search = bisected(failing, failing.data, Gate("loose", 9.0, -1.0, 0.0, 9.0))
    (line,) = report_lines(search)
    assert "passes as it is" in line
    assert (search.outcome, search.probes, search.sensitivity, failure(search)) == ("none needed", (), {}, None)


@pytest.mark.slow
def test_with_too_few_images_the_scales_stay_and_the_command_has_a_word_for_the_others(failing: Failing) -> None:
    search = bisected(failing, failing.few)
    assert (search.outcome, search.images, search.can_calibrate) == ("found", 12, False)
    lines = list(report_lines(search))
    assert any("on the scales of the file): pass" in line for line in lines)
    assert "--calibration CALIBRATION-IMAGES --samples 8" in lines[-2]
    assert lines[-1].startswith("CALIBRATION-IMAGES stands for the images")


def test_scales_of_other_images_are_measured_anew(failing: Failing, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    for path in failing.data.iterdir():
        Image.open(path).rotate(180).save(tmp_path / "x" / path.name)
    notes: list[str] = []
    for data, is_told in ((failing.data, False), (tmp_path / "x", True)):
        trials = trials_of(failing, data, notes)
        trials.calibrate_as_asked()
        assert trials.asked == ()
        assert any("calibrated on other images" in note for note in notes) is is_told
        assert (trials.case.spec.deploy.eight_bits == failing.deploy.eight_bits) is not is_told


def trials_of(failing: Failing, data: Path, notes: list[str]) -> Trials:
    words = {"samples": 500, "white_level": None, "has_engines": False}
    return Trials(failing.artifact, failing.loaded, GATES["int8"], data, notes.append, **words)


def test_labels_that_only_the_file_loses_fail_it(failing: Failing, tmp_path: Path) -> None:
    trials = trials_of(failing, failing.data, [])
    assert trials._lost_labels({"logits": torch.zeros(58, 10)}) == (), "images without labels"
    best = trials.case.expected["logits"].argmax(dim=1)
    for name in range(10):
        (tmp_path / str(name)).mkdir()
    labelled = [path for path in sorted(failing.data.iterdir()) if path.suffix == ".png"]
    for index, path in enumerate(labelled):
        Image.open(path).save(tmp_path / str(index % 10) / path.name)
    trials = trials_of(failing, tmp_path, [])
    right = torch.nn.functional.one_hot(trials._labels, 10).float()
    assert trials._lost_labels({"logits": right}) == ()
    (failed,) = trials._lost_labels({"logits": -right})
    assert failed.startswith("top-1 0.00 %, PyTorch")
    assert best.shape == trials._labels.shape


def test_what_does_not_pay_gives_way_to_the_other_precision_or_to_fp16(failing: Failing) -> None:
    probe = Probe((), bisected(failing, failing.data, Gate("loose", 9.0, -1.0, 0.0, 9.0)).recorded.found, (), True)
    search = EightBitSearch(
        failing.artifact, GATES["int8"], failing.data, 58, replace(probe, failures=("bad",)), 0, True, True,
        kept=("stages.2.1",), neighbours=(replace(probe, failures=("bad",)),),
    )  # fmt: skip
    pays = EngineCheck(
        target="sm89", batch=1, kernels=9, half_kernels=9, megabytes_per_image=1.0, half_megabytes_per_image=2.0
    )
    costs = replace(pays, faults=("it moves 0.9 of the bytes of FP16",))
    kept = Trial("int8", ("stages.2.1",), probe, engines=(pays,))
    dear, other = replace(kept, engines=(pays, costs)), Trial("fp8", (), probe, engines=(pays,))
    wrong = replace(other, probe=replace(probe, failures=("bad",)))
    for trials, precision in (((kept, None), "int8"), ((dear, other), "fp8"), ((dear, wrong), "fp16")):
        found = replace(search, final=trials[0], other=trials[1])
        assert f"--precision {precision} " in str(found.command)
        assert ("--keep-fp16" in str(found.command)) is (precision == "int8")
        assert ("--calibration" in str(found.command)) is (precision != "fp16")
        said = {"int8": "The same file from", "fp8": "What passes and pays is fp8:", "fp16": "What is left is fp16:"}
        assert list(report_lines(found))[-2].startswith(said[precision])


def test_what_is_missing_or_not_for_this_file_is_refused(
    failing: Failing, tiny_onnx_fp16: Artifact, cnx: Command
) -> None:
    code, _, err = cnx("diagnose", "bisect", failing.artifact.path)
    assert (code, "--data DATA" in err) == (2, True)
    code, _, err = cnx("diagnose", "bisect", tiny_onnx_fp16.path, "--no-engine-gates")
    assert (code, "of files in FP8 and INT8" in err) == (2, True)
