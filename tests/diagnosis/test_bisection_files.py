"""`cnx-deploy diagnose bisect` over files: healthy, faulty and hopeless ones, and that the command it prints works."""

import json
import math
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import pytest
import torch

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Gate
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.diagnosis import bisect as bisection
from cnx_deploy.diagnosis.bisect import bisect_artifact, export_command, failure, report_lines, run_bisection
from cnx_deploy.diagnosis.mixed_precision import (
    Case,
    ExportedProbe,
    MixedForm,
    Probe,
    RecordedProbe,
    case_of,
    probe_recorded,
)
from cnx_deploy.model.checkpoint import LoadedModel, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import FORM
from cnx_deploy.verification.parity import differences
from tests.support.faulty_networks import NO_WEIGHTS, hot_hidden, parts

FILE_SIZE = 64
"""Pixels at which blocks of both kinds are there: GRN's gain in the weight, and on the hidden tensor."""


def bisected(artifact: Artifact, model: ConvNeXtV2, gate: Gate = GATES["fp16"]) -> bisection.Bisection:
    return bisect_artifact(artifact, LoadedModel(model, NO_WEIGHTS), lambda _: None, gate=gate)


@pytest.fixture
def without_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are judged as their form is, which agrees with them (shown below): an export takes seconds."""

    forms: list[MixedForm] = []

    def export_and_probe(kept: Collection[str], case: Case) -> ExportedProbe:
        if not forms:
            forms.append(MixedForm(case.loaded.model, case.spec.deploy))
        outputs = forms[0].outputs(case.batches, kept)
        return ExportedProbe(case.judge(kept, outputs, exported=True), 0.25, 0.5, verifies=True)

    monkeypatch.setattr(bisection, "export_and_probe", export_and_probe)


def test_a_healthy_file_needs_nothing(tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2) -> None:
    found = bisected(tiny_onnx_fp16, tiny_model)
    assert (found.outcome, found.kept, found.probes, failure(found)) == ("none needed", None, (), None)
    (line,) = report_lines(found)
    assert "passes as it is" in line


def test_nan_weights_end_in_exit_code_3_and_are_told_from_rounding(
    tiny_onnx_fp16: Artifact,
    tiny_model: ConvNeXtV2,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with torch.no_grad():
        tiny_model.stage_blocks()[1][0].pwconv1.bias[0] = math.nan
    monkeypatch.setattr(bisection, "recorded_model", lambda _: LoadedModel(tiny_model, NO_WEIGHTS))
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", "bisect", str(tiny_onnx_fp16.path), "--json"])
    printed = capsys.readouterr()
    document = json.loads(printed.out)
    assert stop.value.code == 3
    assert (document["outcome"], document["reference_nonfinite"]) == ("nothing helps", 40)
    assert document["images"] == 4
    assert "PyTorch in FP32 gives 40 values" in printed.err


def test_a_gate_that_fp32_fails_ends_in_exit_code_3(tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2) -> None:
    bisection = bisected(tiny_onnx_fp16, tiny_model, Gate("exact", 0.0, 1.0, 1.0, 0.0))
    error = failure(bisection)
    assert error is not None
    assert (bisection.outcome, error.exit_code, len(bisection.probes)) == ("nothing helps", 3, 1)
    assert "fails with every module in FP32 too (relative L2" in str(error)


@pytest.mark.usefixtures("without_files")
def test_files_that_contradict_the_probes_are_believed(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot_hidden(tiny_model, 2, 1)

    def misled(case: Case) -> Callable[[Collection[str]], Probe]:
        return lambda kept: case.judge(
            kept, case.expected if "stages.0.0" in kept else {"logits": torch.zeros(4, 10)}, exported=False
        )

    monkeypatch.setattr(bisection, "form_judge", misled)
    monkeypatch.setattr(bisection, "probe_recorded", overflowing)
    notes: list[str] = []
    loaded = LoadedModel(tiny_model, NO_WEIGHTS)
    found = bisect_artifact(tiny_onnx_fp16, loaded, notes.append, gate=GATES["fp16"])
    assert found.kept == parts("2.1.pwconv1", "2.1.pwconv2")
    assert not any(probe.passed for probe in found.neighbours)
    assert any(note.startswith("The files contradict the probes") for note in notes)


def test_files_that_fail_with_everything_kept_are_believed_too(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_and_probe(kept: Collection[str], case: Case) -> ExportedProbe:
        return ExportedProbe(case.judge(kept, {"logits": torch.zeros(4, 10)}, exported=True), 0.25, 0.5, verifies=False)

    hot_hidden(tiny_model, 2, 1)
    monkeypatch.setattr(bisection, "probe_recorded", overflowing)
    monkeypatch.setattr(bisection, "export_and_probe", export_and_probe)
    found = bisected(tiny_onnx_fp16, tiny_model)
    assert (found.outcome, found.kept, found.final) == ("nothing helps", None, None)
    assert "fails with every module in FP32 too (relative L2 1, gate" in str(failure(found))


@pytest.mark.usefixtures("without_files")
def test_a_file_that_keeps_the_wrong_parts_is_searched_from_nothing_kept(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    hot_hidden(tiny_model, 2, 1)
    manifest = tiny_onnx_fp16.manifest
    request = replace(manifest.request, deploy=replace(manifest.deploy, keep_fp32=("head",)))
    artifact = replace(tiny_onnx_fp16, manifest=replace(tiny_onnx_fp16.manifest, request=request))
    monkeypatch.setattr(bisection, "probe_recorded", overflowing)
    found = bisected(artifact, tiny_model)
    assert found.recorded.probe.kept == ("head",)
    assert found.kept == parts("2.1.pwconv1", "2.1.pwconv2")


def overflowing(artifact: Artifact, case: Case) -> RecordedProbe:
    """As if the file held the network of `case`."""
    recorded = probe_recorded(artifact, case)
    return replace(
        recorded, probe=case.judge(recorded.probe.kept, {"logits": torch.full((4, 10), math.nan)}, exported=True)
    )


def test_what_is_no_half_precision_file_is_refused(
    tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact, engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    for artifact in (tiny_onnx_fp32, engine):
        with pytest.raises(InputError, match="no ONNX file of half precision"):
            run_bisection(artifact.path, print)
    with pytest.raises(InputError, match="samples must be at least 1"):
        run_bisection(tiny_onnx_fp16.path, print, samples=0)
    manifest = tiny_onnx_fp16.manifest
    earlier = replace(tiny_onnx_fp16, manifest=replace(manifest, request=replace(manifest.request, form=FORM - 1)))
    monkeypatch.setattr(bisection, "open_artifact", lambda _: earlier)
    with pytest.raises(InputError, match="an earlier deploy form"):
        run_bisection(earlier.path, print)


# The command


def command(
    artifact: Artifact,
    record: ModelRecord | None = None,
    *,
    stem: str = "tiny-test-32-fp16",
    verifies: bool = True,
    **request: object,
) -> str:
    """The command for `artifact` with another record, stem, or entries of its request."""
    manifest = artifact.manifest
    batch, deploy = request.pop("batch", manifest.batch), replace(manifest.deploy, **request)
    asked = replace(manifest.request, batch=batch, deploy=deploy)
    files = (replace(manifest.files[0], name=f"{stem}.onnx"),)
    changed = replace(manifest, model=record or manifest.model, request=asked, stem=stem, files=files)
    probe = Probe((), differences(torch.ones(1, 2), torch.ones(1, 2)), (), exported=True)
    final = ExportedProbe(probe, 0.0, 0.0, verifies)
    return export_command(replace(artifact, manifest=changed), ("stages.2.1.grn", "head"), final)


def test_the_command_names_weights_of_every_origin(tiny_onnx_fp16: Artifact) -> None:
    folder, record = tiny_onnx_fp16.path.parent, tiny_onnx_fp16.manifest.model
    assert command(tiny_onnx_fp16) == (
        "cnx-deploy export --variant tiny-test --seed 0 --num-classes 10 --image-size 32 --precision fp16 "
        f"--batch 1:4:8 --output-dir {folder} --keep-fp32 stages.2.1.grn --keep-fp32 head --force"
    )
    checkpoint = WeightsRecord("checkpoint", "../runs/best.safetensors", "0" * 64, "MIT")
    assert f"--checkpoint {folder.parent}/runs/best.safetensors --image" in command(
        tiny_onnx_fp16, replace(record, weights=checkpoint)
    )
    published = WeightsRecord("pretrained", "convnextv2_atto.fcmae", "0" * 64, "CC-BY-NC-4.0")
    with_head = command(tiny_onnx_fp16, replace(record, weights=published, head_is_new=True))
    assert "--pretrained convnextv2_atto.fcmae --num-classes 10 --reset-head --image" in with_head


def test_the_command_repeats_what_the_export_was_told_of_images_and_classes(tiny_onnx_fp16: Artifact) -> None:
    weights = WeightsRecord("checkpoint", "../runs/best.pth", "0" * 64, "MIT", "teacher")
    told = {"mean": "option", "crop_mode": "option", "std": "config.json", "class_names": "option"}
    images = Preprocessing(32, mean=(0.1, 0.2, 0.3), crop_mode="squash")
    record = replace(tiny_onnx_fp16.manifest.model, weights=weights, origins=told, preprocessing=images)
    words = command(tiny_onnx_fp16, record)
    assert " --entry teacher " in words
    assert " --mean 0.1,0.2,0.3 --crop-mode squash --class-names class-names.txt " in words
    assert "--std" not in words


def test_the_command_asks_for_what_the_file_was_asked_for(tiny_onnx_fp16: Artifact) -> None:
    words = command(
        tiny_onnx_fp16,
        stem="mine-32-fp16",
        verifies=False,
        input_kind="uint8",
        layout="cpu",
        leave_out=("blocked", "grn-beta"),
        batch=(1, 8, 64),
    )
    assert "--precision fp16 --input uint8 --optimize-for cpu --without-fold blocked --without-fold grn-beta" in words
    assert " --name mine --output-dir " in words
    assert words.endswith(" --force --no-verify")


@dataclass(frozen=True)
class Replayed:
    """A result, the file that its command wrote, and the model behind both."""

    found: bisection.Bisection
    kept: tuple[str, ...]
    final: ExportedProbe
    file: Artifact
    model: ConvNeXtV2


@pytest.fixture(scope="module")
def found_and_replayed(tiny_variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Replayed:
    """From a checkpoint that overflows: its file, the document of `bisect`, and the file that its command writes."""
    folder = tmp_path_factory.mktemp("bisected")
    model = random_model(tiny_variant, 10, seed=0)
    hot_hidden(model, 2, 1)
    checkpoint = save_checkpoint(folder / "hot.safetensors", model)
    source = ["--variant", tiny_variant.name, "--checkpoint", str(checkpoint), "--image-size", str(FILE_SIZE)]
    options = ["--precision", "fp16", "--batch", "1:2:4", "--no-verify", "--output-dir", str(folder / "hot")]
    file = folder / "hot" / f"tiny-test-{FILE_SIZE}-fp16.onnx"
    run(["export", *source, *options])
    found = run_bisection(file, lambda _: None)
    words = shlex.split(found.to_dict()["command"])
    run([*words[1:], "--output-dir", str(folder / "cool")])
    assert found.kept is not None
    assert found.final is not None
    return Replayed(found, found.kept, found.final, open_artifact(folder / "cool" / file.name), model)


def run(words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert not stop.value.code


@pytest.mark.slow
def test_the_printed_command_writes_a_file_that_passes_where_the_first_one_fails(found_and_replayed: Replayed) -> None:
    replayed, found = found_and_replayed.file, found_and_replayed.found
    assert found.outcome == "found"
    assert replayed.manifest.deploy.keep_fp32 == found_and_replayed.kept == parts("2.1.pwconv1", "2.1.pwconv2")
    case = case_of(replayed, LoadedModel(found_and_replayed.model, NO_WEIGHTS), GATES["fp16"], None, 4)
    again = probe_recorded(replayed, case)
    assert again.probe.found == found_and_replayed.final.probe.found
    assert (again.probe.passed, again.first_nonfinite) == (True, None)
    assert found.recorded.first_nonfinite is not None
    assert found.recorded.first_nonfinite.startswith("stages.2.1.pwconv1/")


@pytest.mark.slow
def test_files_without_one_of_the_names_fail_and_probes_say_what_files_say(found_and_replayed: Replayed) -> None:
    found, kept = found_and_replayed.found, found_and_replayed.kept
    assert [probe.kept for probe in found.neighbours] == [(kept[1],), (kept[0],)]
    assert all(probe.exported and not probe.passed for probe in found.neighbours)
    by_form = {probe.kept: probe.found for probe in found.probes if not probe.exported}
    by_file = {probe.kept: probe.found for probe in found.probes if probe.exported}
    assert by_file[kept].relative_l2_max == pytest.approx(by_form[kept].relative_l2_max, rel=0.02)
    assert set(by_file) <= set(by_form)
    text = "\n".join(report_lines(found))
    assert "First operator whose result is NaN or infinite: stages.2.1.pwconv1/" in text
    assert "Without stages.2.1.pwconv2 among them: FAIL: 40 values are NaN or infinite" in text
    assert "--keep-fp32 stages.2.1.pwconv1 --keep-fp32 stages.2.1.pwconv2" in text
    document = json.loads(json.dumps(found.to_dict()))
    assert (document["outcome"], document["keep_fp32"]) == ("found", list(kept))
    assert 0.05 < document["fp32_share"]["parameters"] < 0.5
