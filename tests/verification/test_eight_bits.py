"""The gates of files in eight bits: what they record, what they refuse, and that each of them can fail."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from PIL import Image

import cnx_deploy
from cnx_deploy.api import ExportRequest, run_exports
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS, PLACEMENTS
from cnx_deploy.core.errors import CheckFailedError, InputError, MissingRequirementError, OutputExistsError, ParityError
from cnx_deploy.core.gates import Gate
from cnx_deploy.core.manifest import Compiled, ModelRecord, WeightsRecord
from cnx_deploy.core.precision import PRECISIONS
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import ImageLike, InputSpec, find_images
from cnx_deploy.diagnosis import calibration
from cnx_deploy.diagnosis.calibration import made_up_scales
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.model import quantised
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.verification import eight_bits, maps
from cnx_deploy.verification.eight_bits import MOST_BYTES, Calibration, check_accuracy, engine_faults
from tests.conftest import NARROW_TEST, TINY_TEST
from tests.support.eight_bits import SIZE, with_outliers

GAINS = tuple(GAIN_FOLDS.values())
NO_LIMITS = Gate("none", float("inf"), -2.0, 0.0, float("inf"))


# --- what is recorded ---


def test_the_manifest_says_what_the_scales_were_measured_on(int8_file, colours_and_weights):
    record = int8_file.manifest.deploy.eight_bits
    assert (record.placement, record.method, record.images, record.kept) == ("int8", "max", 20, ())
    assert sorted(record.blocks) == [f"stages.{stage}.0" for stage in range(4)]
    for block in record.blocks.values():
        second = {"s", "w2"} if "s" in block.scales else {"g", "o"}
        assert block.scales.keys() == {"x", "w1", "p", "h"} | second
        assert block.gains.keys() <= set(PLACEMENTS["int8"].gains)
    assert any(block.gains for block in record.blocks.values())
    source = find_images(colours_and_weights[0])
    digest = hashlib.sha256()
    for batch in source.batches(Preprocessing(SIZE), InputSpec("float", SIZE), 1, source.choice(20)):
        digest.update(batch.images.numpy().tobytes())
    assert record.data_sha256 == digest.hexdigest()


def test_the_manifest_says_what_the_gates_measured(int8_file):
    facts = int8_file.manifest.facts.eight_bits
    assert (facts.held_out.images, facts.held_out.top1, facts.held_out.reference_top1) == (60, 100.0, 100.0)
    assert facts.engines_not_run is None
    assert [(check.target, check.batch, check.faults) for check in facts.engines] == [("sm89", 1, ()), ("sm89", 8, ())]
    for check in facts.engines:
        assert check.kernels <= check.half_kernels
        assert 0.7 < check.share <= MOST_BYTES
    (verdict,) = int8_file.manifest.facts.parity
    assert verdict.passed
    assert (verdict.candidate, verdict.gate.name) == ("emulator int8", "int8")


@pytest.mark.slow  # 30 s: four networks are compiled
def test_the_gpus_that_are_named_judge_the_file_and_get_what_they_have_kernels_for(
    eight_bit_words, tmp_path, monkeypatch
):
    words = {**eight_bit_words, "gate_targets": ("T4",), "batch": (8, 8, 8), "precision": "int8"}
    facts = cnx_deploy.export("narrow-test", output_dir=tmp_path / "kept", **words).manifest.facts.eight_bits
    assert [(check.target, check.faults) for check in facts.engines] == [("sm75", ())]
    assert facts.targets == ("sm75",)
    (path,) = (tmp_path / "kept").glob("*.onnx")
    assert open_artifact(path).manifest.deploy.eight_bits.kept == ("stages.2.0.pwconv2", "stages.3.0.pwconv2")
    monkeypatch.setattr(calibration, "WITHOUT_SCALED_PRODUCT", ())
    with pytest.raises(CheckFailedError, match=r"not worth its eight bits on sm75 at batch 8: .* kernels, FP16 has"):
        cnx_deploy.export("narrow-test", output_dir=tmp_path / "control", **words)
    assert not list((tmp_path / "control").glob("*.onnx"))


def test_an_export_of_the_same_inputs_is_reused_and_of_another_calibration_refused(eight_bit_words, int8_file):
    folder, told = int8_file.path.parent, []
    again = cnx_deploy.export("narrow-test", precision="int8", output_dir=folder, note=told.append, **eight_bit_words)
    assert again.reused
    assert again.sha256 == int8_file.sha256
    assert "Calibrated on 20 of 80 images (max)" in told
    with pytest.raises(OutputExistsError, match="made from other inputs"):
        cnx_deploy.export("narrow-test", precision="int8", output_dir=folder, **{**eight_bit_words, "samples": 10})


def test_without_tensorrt_rtx_the_engines_are_recorded_as_not_run(int8_file, colours_and_weights, monkeypatch):
    def missing(name):
        raise MissingRequirementError("TensorRT-RTX is not installed.")

    monkeypatch.setattr(eight_bits, "load_backend", missing)
    monkeypatch.setattr(eight_bits, "check_accuracy", lambda *_: ((), eight_bits.HeldOut(images=60)))
    told: list[str] = []
    _, facts = eight_bits.prove(int8_file, None, None, told.append)
    assert (facts.engines, facts.engines_not_run) == ((), "TensorRT-RTX is not installed.")
    assert told == ["  bytes and structure of its engines: not run (TensorRT-RTX is not installed.)"]


@pytest.mark.parametrize(("count", "samples", "left"), [(700, 200, 500), (900, 100, 500), (250, 200, 50)])
def test_no_image_is_both_calibrated_on_and_judged_by(count, samples, left):
    split = Calibration.split(ImageLike(count), samples, Preprocessing(32))
    assert (len(split.chosen), len(split.held_out)) == (samples, left)
    assert not set(split.chosen) & set(split.held_out)


@pytest.mark.slow
def test_progress_is_told_of_each_pass_and_each_judge(eight_bit_words, tmp_path):
    told: list[tuple[str, float]] = []
    words = {**eight_bit_words, "no_engine_gates": True, "output_dir": tmp_path}
    run_exports(ExportRequest(variant="narrow-test", precisions=("fp8",), **words), print, lambda *of: told.append(of))
    shares = {text: [share for other, share in told if other == text] for text, _ in told}
    passes = [f"pass {number} of the calibration" for number in (1, 2, 3)]
    assert list(shares) == [*passes, "judging by torch-deploy", "judging by onnxruntime", "judging by emulator"]
    for rising in shares.values():
        assert rising == sorted(rising)
        assert rising[-1] == pytest.approx(1.0)


# --- the command ---


def words_of(words: dict, *more: object) -> list[object]:
    """The options of a fixture as words of the command line."""
    low, typical, high = words["batch"]
    return [
        "export", "--variant", "narrow-test", "--checkpoint", words["checkpoint"], "--image-size", words["image_size"],
        "--batch", f"{low}:{typical}:{high}", "--samples", words["samples"], *more,
    ]  # fmt: skip


def test_the_command_writes_fp8_and_says_what_it_did(eight_bit_words, tmp_path, cnx):
    options = ["--precision", "fp8", "--calibration", eight_bit_words["calibration"], "--no-engine-gates"]
    code, out, err = cnx(*words_of(eight_bit_words, *options, "--output-dir", tmp_path, "--json"))
    assert code == 0
    (made,) = json.loads(out)["artifacts"]
    assert made["path"] == str(tmp_path / "narrow-test-128-fp8.onnx")
    artifact = open_artifact(tmp_path / "narrow-test-128-fp8.onnx")
    assert made["sha256"] == artifact.sha256
    facts = artifact.manifest.facts
    assert (facts.eight_bits.engines, facts.eight_bits.engines_not_run) == ((), "left out")
    assert facts.eight_bits.held_out.top1 == 100.0
    assert "FLOAT8E4M3FN" in facts.types
    for text in (
        "Calibrated on 20 of 80 images (max)",
        "(onnxruntime fp8): 60 images held out",
        ", top-1 100.00 % (PyTorch 100.00 %)",
        "(emulator fp8): 10 images held out",
        "bytes and structure of its engines: not run (left out)",
    ):
        assert text in err


DATA = "--calibration IMAGES"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--precision int8", "Give images that the network will see"),
        (f"--precision int8 {DATA} --samples 40", "leaves 40 to judge by, and at least 50"),
        (f"--precision int8 {DATA} --keep-fp16 stages.9", "No part of narrow-test is called 'stages.9'"),
        (f"--precision int8 {DATA} --calibration-method entropy", "'entropy' is not one of"),
        (f"--precision fp16 {DATA}", "--calibration is of files in eight bits"),
        ("--precision fp16 --keep-fp16 stages.3.0", "--keep-fp16 is of files in eight bits"),
        ("--precision fp16 --no-engine-gates", "--no-engine-gates is of files in eight bits"),
        ("--precision fp16 --gate-target sm89", "--gate-target is of files in eight bits"),
        (f"--precision int8 {DATA} --gate-target sm89 --no-engine-gates", "--no-engine-gates compiles nothing"),
        (f"--precision fp8 {DATA} --gate-target sm86", "sm86 has no FP8 arithmetic; sm89 is the first"),
        (f"--precision int8 {DATA} --gate-target sm90", "No engine for sm90 can judge the file: tensorrt-rtx"),
        (f"--precision int8 {DATA} --gate-target current", "--gate-target names a GPU, such as sm89"),
        (f"--precision int8 {DATA} --gate-target sm70", "sm70 has no INT8 arithmetic"),
        ("--precision fp16 --calibration-method mse", "--calibration-method is of files in eight bits"),
        (f"--precision int8 {DATA} --optimize-for cpu", "layout gpu, not cpu"),
        (f"--precision int8 {DATA} --without-fold grn-gain", "need the fold grn-gain"),
        (f"--precision int8 {DATA} --format pt2", "computes in fp16 or bf16, and int8 is asked for"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_anything_is_written(
    more, message, eight_bit_words, tmp_path, cnx
):
    options = [eight_bit_words["calibration"] if word == "IMAGES" else word for word in more.split()]
    code, out, err = cnx(*words_of(eight_bit_words, *options, "--output-dir", tmp_path / "made"))
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "made").exists()


def test_images_of_other_classes_are_refused_before_the_calibration(eight_bit_words, tmp_path, monkeypatch):
    shutil.copytree(eight_bit_words["calibration"], tmp_path / "images")
    shutil.copytree(next((tmp_path / "images").iterdir()), tmp_path / "images" / "another")
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("it calibrates"))
    words = {**eight_bit_words, "calibration": tmp_path / "images"}
    with pytest.raises(InputError, match="another"):
        cnx_deploy.export("narrow-test", precision="int8", output_dir=tmp_path / "made", **words)


def test_a_broken_image_that_would_judge_is_named_before_the_calibration(eight_bit_words, tmp_path, monkeypatch):
    shutil.copytree(eight_bit_words["calibration"], tmp_path / "images")
    source = find_images(tmp_path / "images")
    held_out = Calibration.split(source, eight_bit_words["samples"], Preprocessing()).held_out
    broken = sorted((tmp_path / "images").glob("*/*"))[held_out[-1]]
    broken.write_bytes(b"no image")
    monkeypatch.setattr(calibration, "calibrate", lambda *_, **__: pytest.fail("it calibrates"))
    words = {**eight_bit_words, "calibration": tmp_path / "images"}
    with pytest.raises(InputError, match="cannot be read as an image"):
        cnx_deploy.export("narrow-test", precision="int8", output_dir=tmp_path / "made", **words)


def test_images_that_are_all_the_same_are_refused_as_judges(tmp_path):
    for index in range(70):
        Image.new("RGB", (8, 8), (0, 0, index // 30)).save(tmp_path / f"{index}.png")
    split = Calibration.split(find_images(tmp_path), 10, Preprocessing(32))
    with pytest.raises(InputError, match="are to judge the file, and 3 of them are different; at least 50 have to be"):
        split.check_images(InputSpec("float", 32))


def test_of_few_images_a_flip_asks_for_more(int8_file, colours_and_weights, monkeypatch):
    flipping = replace(PRECISIONS["int8"].gate, flip_share_max=-1e-3)
    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], gate=flipping))
    preprocessing = int8_file.manifest.model.preprocessing
    split = Calibration.split(find_images(colours_and_weights[0]), 20, replace(preprocessing, image_size=SIZE))
    with pytest.raises(ParityError, match="Of 60 images a single flip is too many: judge by more images first"):
        check_accuracy(int8_file, recorded_model(int8_file).model, split, print)


def test_random_weights_are_refused(eight_bit_words, tmp_path):
    words = {**eight_bit_words, "checkpoint": None}
    with pytest.raises(InputError, match=r"The weights are random.*--checkpoint or --pretrained"):
        cnx_deploy.export("narrow-test", precision="int8", output_dir=tmp_path, **words)
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_of_the_api_is_refused(eight_bit_words, tmp_path):
    with pytest.raises(InputError, match=r"called 'entropy'. Choose one of: max, mse, percentile"):
        cnx_deploy.export(
            "narrow-test", precision="int8", output_dir=tmp_path, calibration_method="entropy", **eight_bit_words
        )


# --- accuracy can fail ---


@pytest.fixture(scope="module")
def outliers(colours_and_weights, tmp_path_factory) -> Path:
    return with_outliers(colours_and_weights[1], tmp_path_factory.mktemp("outliers") / "outliers.safetensors")


@pytest.mark.slow
def test_outlier_channels_without_gains_fail_on_accuracy_and_the_file_of_before_stays(
    eight_bit_words, outliers, tmp_path
):
    words = {**eight_bit_words, "checkpoint": outliers, "output_dir": tmp_path, "no_engine_gates": True}
    (tmp_path / "narrow-test-128-int8.onnx").write_bytes(b"of before")
    with pytest.raises(ParityError) as failure:
        cnx_deploy.export("narrow-test", precision="int8", leave_out=GAINS, force=True, **words)
    for text in (
        "narrow-test-128-int8.onnx (onnxruntime int8) differs from PyTorch on 60 images held out: logits: relative L2",
        "gate 0.02", "was not written", "--keep-fp16", "--precision fp8, or fp16",
    ):  # fmt: skip
        assert text in str(failure.value)
    assert [path.name for path in tmp_path.iterdir()] == ["narrow-test-128-int8.onnx"]
    assert (tmp_path / "narrow-test-128-int8.onnx").read_bytes() == b"of before"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_gains_save_the_network_with_outlier_channels(precision, eight_bit_words, outliers, tmp_path):
    words = {**eight_bit_words, "checkpoint": outliers, "no_engine_gates": True}
    made = cnx_deploy.export("narrow-test", precision=precision, output_dir=tmp_path / "with", **words)
    with_gains = made.manifest.facts.worst_parity.differences.relative_l2_max
    with pytest.raises(ParityError) as failure:
        cnx_deploy.export("narrow-test", precision=precision, output_dir=tmp_path, leave_out=GAINS, **words)
    without = float(str(failure.value).partition("relative L2 ")[2].partition(",")[0])
    assert without > 3 * max(with_gains, 0.01)


def test_lost_classes_fail_by_themselves(int8_file, colours_and_weights, tmp_path, monkeypatch):
    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], gate=NO_LIMITS))
    model = onnx.load(int8_file.path)
    weights = {each.name: each for each in model.graph.initializer}
    for name in next(node for node in model.graph.node if node.op_type == "Gemm").input[1:]:
        weight = numpy_helper.to_array(weights[name])
        swapped = np.flip(weight, axis=weight.shape.index(2))  # the two classes
        weights[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(swapped), name))
    onnx.save(model, tmp_path / int8_file.path.name)
    changed = replace(int8_file, path=tmp_path / int8_file.path.name)
    preprocessing = int8_file.manifest.model.preprocessing
    split = Calibration.split(find_images(colours_and_weights[0]), 20, replace(preprocessing, image_size=SIZE))
    network = recorded_model(int8_file).model
    with pytest.raises(ParityError, match=r"held out: top-1 0.00 %, PyTorch 100.00 %, gate 0.5 points less. narrow"):
        check_accuracy(changed, network, split, print)


def test_a_gain_that_is_not_taken_back_is_not_mistaken_for_rounding(eight_bit_words, tmp_path, monkeypatch):
    def forgetful(self, tokens, tap, weight=None):
        return tap(torch.matmul(tokens, self.constant(self.bias) if weight is None else weight)) + self.bias

    monkeypatch.setattr(quantised.Product, "forward", forgetful)
    with pytest.raises(ParityError, match=r"The form of narrow-test-128-int8.onnx \(torch-deploy fp32\) differs"):
        cnx_deploy.export("narrow-test", precision="int8", output_dir=tmp_path, no_engine_gates=True, **eight_bit_words)


# --- bytes and structure can fail ---


@pytest.mark.slow
def test_a_file_that_keeps_too_much_in_fp16_is_not_written(eight_bit_words, tmp_path, cnx):
    kept = ["--keep-fp16", "stages.0.0", "--keep-fp16", "stages.1.0"]
    options = ["--precision", "int8", "--calibration", eight_bit_words["calibration"], *kept]
    code, out, err = cnx(*words_of(eight_bit_words, *options, "--output-dir", tmp_path))
    assert (code, out) == (3, "")
    assert "is not worth its eight bits on sm89 at batch 1: it moves 0." in err
    assert "of the bytes of FP16, gate 0.80" in err
    assert "Keep less of it in FP16" in err
    assert not list(tmp_path.iterdir())


def compiled(folder: Path, deploy: DeploySpec, edit: Callable[[Path], None] | None = None) -> Compiled:
    """What TensorRT-RTX makes of the narrow network for sm89 at batch 8."""
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord("narrow-test", 10, SIZE, weights, Preprocessing(SIZE))
    spec = ExportSpec(deploy=deploy, batch=(8, 8, 8))
    path = export_onnx(random_model(NARROW_TEST, 10), record, spec, folder).path
    if edit is not None:
        edit(path)
    return measure_compiled(path, batch=8, target="sm89", backend=load_backend("tensorrt-rtx"))


@pytest.fixture(scope="module")
def half(tmp_path_factory) -> Compiled:
    return compiled(tmp_path_factory.mktemp("half"), DeploySpec("fp16", SIZE))


def grn_reads_half(self: quantised.QuantisedBlock, images: torch.Tensor) -> torch.Tensor:
    """QuantisedBlock.forward, but for the two lines in the middle."""
    images, size = images.to(self.stream_type), images.shape[2:]
    tokens = self.dwconv(images.to(quantised.type_of(self.dwconv))).permute(0, 2, 3, 1).flatten(1, 2)
    normed = self._tap("x", self.norm(tokens).to(quantised.type_of(self.pwconv1)))
    hidden = self.act(self._first(normed, partial(self._tap, "p")))
    hidden = hidden if self.hidden_gain is None else hidden * self.hidden_gain
    gain = self.grn(hidden)
    hidden = self._tap("h", hidden)
    return (images + self._branch(hidden, gain, size)).to(self.stream_type)


def rounds_behind_the_bias(self, tokens, tap, weight=None):
    product = torch.matmul(tokens, self.constant(self.bias) if weight is None else weight)
    return tap((product if self.inverse is None else product * self.inverse) + self.bias)


def weights_per_channel(path: Path) -> None:
    """Give each weight in INT8 a scale for each of its outputs."""
    model = onnx.load(path)
    weights = {
        each.name: numpy_helper.to_array(each)
        for each in model.graph.initializer
        if each.data_type == onnx.TensorProto.INT8
    }
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            weight = weights[node.input[0]]
            axis = 0 if weight.ndim == 4 else 1
            node.input[1] = f"{node.name}/scales"
            scales = np.full(weight.shape[axis], 0.003, np.float16)
            model.graph.initializer.append(numpy_helper.from_array(scales, node.input[1]))
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", axis))
    onnx.save(model, path)


USUAL = ("x", "w1", "h", "g", "s", "w2")
CONTROLS = {
    "GRN reads the FP16 tensor": {"forward": grn_reads_half},
    "rounded behind the bias": {"product": rounds_behind_the_bias},
    "a scale a channel of weights": {"edit": weights_per_channel},
    "the usual placement": {"forward": grn_reads_half, "letters": USUAL, "gains": False},
}
QUICK = ("GRN reads the FP16 tensor", "the usual placement")


def faults(half: Compiled, folder: Path, patch, placement: str, control: dict) -> list[str]:
    if "forward" in control:
        patch.setattr(quantised.QuantisedBlock, "forward", control["forward"])
    if "product" in control:
        patch.setattr(quantised.Product, "forward", control["product"])
    words = {name: control[name] for name in ("letters", "gains") if name in control}
    scales = made_up_scales(random_model(NARROW_TEST, 10), placement, SIZE, **words)
    deploy = DeploySpec(placement, SIZE, eight_bits=scales)
    return list(engine_faults(compiled(folder, deploy, control.get("edit")), half, deploy, "narrow-test"))


@pytest.mark.parametrize("placement", [pytest.param("int8"), pytest.param("fp8", marks=pytest.mark.slow)])
def test_the_engine_of_our_placement_has_no_fault(placement, half, tmp_path, monkeypatch):
    assert faults(half, tmp_path, monkeypatch, placement, {}) == []


@pytest.mark.parametrize(
    ("placement", "control"),
    [
        *(pytest.param("int8", name, marks=[] if name in QUICK else pytest.mark.slow) for name in CONTROLS),
        *(pytest.param("fp8", name, marks=pytest.mark.slow) for name in QUICK),
    ],
)
def test_each_other_placement_fails_on_the_compiled_engine(placement, control, half, tmp_path, monkeypatch):
    found = faults(half, tmp_path, monkeypatch, placement, CONTROLS[control])
    assert any("of the bytes of FP16, gate 0.80" in fault for fault in found)
    assert any("of the hidden tensor's size in Half or Float" in fault for fault in found)
    if placement == "fp8":
        assert any("kernels, FP16 has" in fault for fault in found)


# --- a class for each place ---


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `export` takes for UPerNet in eight bits: 70 images with masks, and weights of few ties."""
    folder, generator = tmp_path_factory.mktemp("segmenter"), np.random.default_rng(0)
    model = random_model(TINY_TEST, 5, task=find_task("segment").configured({"channels": 16, "auxiliary_channels": 0}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "grn" in name:
                parameter.zero_()
        model.get_submodule("decode_head.conv_seg").bias[0] += 2.0
    for part in ("images", "masks"):
        (folder / part / "val").mkdir(parents=True)
    for index in range(70):
        pixels, mask = generator.integers(0, 256, (4, 6, 3), np.uint8), generator.integers(0, 5, (64, 96), np.uint8)
        Image.fromarray(pixels).resize((96, 64)).save(folder / "images" / "val" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / "val" / f"{index}.png")
    return {
        "checkpoint": save_checkpoint(folder / "weights.safetensors", model), "calibration": folder, "samples": 20,
        "image_size": (64, 96), "crop_ratio": 1.0, "batch": (1, 4, 8), "precision": "fp8", "no_engine_gates": True,
        "keep_fp16": ("stages.0.0", "stages.1.0"),
    }  # fmt: skip


@pytest.mark.slow
def test_a_segmenter_is_judged_by_its_places_and_by_mean_iou(segmenter, tmp_path, monkeypatch):
    facts = cnx_deploy.export("tiny-test", output_dir=tmp_path, **segmenter).manifest.facts
    ((candidate, reference),) = facts.eight_bits.held_out.metrics.values()
    assert 0 < candidate == pytest.approx(reference, abs=5e-3)
    (verdict,) = facts.parity
    assert verdict.differences.places == 10 * 16 * 24
    monkeypatch.setattr(maps, "MAX_IOU_CHANGE", {"fp8": -1.0})
    with pytest.raises(ParityError, match=r"logits: mean IoU changes by .*, gate -1\. .* was not written"):
        cnx_deploy.export("tiny-test", output_dir=tmp_path / "control", **segmenter)
    assert not list((tmp_path / "control").glob("*.onnx"))
