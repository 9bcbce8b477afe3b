"""Files in eight bits in every command: what runs them, what is refused, and what is not claimed of them."""

import json
import math
from dataclasses import replace

import pytest

import cnx_deploy
from cnx_deploy import api
from cnx_deploy.bench.comparison import NOT_JUDGED, gains_nothing
from cnx_deploy.bench.record import FileFacts
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.precision import PRECISIONS
from cnx_deploy.runners.registry import open_runner
from tests.support.artifacts import copy_artifact
from tests.support.bench_rows import network_of, row


@pytest.fixture(scope="module")
def fp8_file(eight_bit_words, made_once) -> cnx_deploy.Artifact:
    """The FP8 file; its engines are built here."""
    words = {**eight_bit_words, "no_engine_gates": True}
    return cnx_deploy.export("narrow-test", precision="fp8", output_dir=made_once / "fp8", **words)


@pytest.fixture(scope="module")
def half_file(eight_bit_words, made_once) -> cnx_deploy.Artifact:
    """The same network in FP16."""
    words = {name: eight_bit_words[name] for name in ("checkpoint", "image_size", "batch")}
    return cnx_deploy.export("narrow-test", precision="fp16", output_dir=made_once / "half", **words)


# --- verify ---


def test_verify_of_a_named_file_asks_for_images(int8_file, cnx):
    code, out, err = cnx("verify", int8_file.path)
    assert (code, out) == (2, "")
    assert "is INT8, whose scales were measured on images" in err
    assert "with --data" in err


def test_verify_of_everything_lists_it_as_not_run(int8_file, tmp_path):
    report = cnx_deploy.verify(export_dir=int8_file.path.parent, engines_dir=tmp_path)
    (result,) = report.results
    assert report.passed
    assert result.results == ()
    assert "says nothing" in result.not_run[0]


def test_verify_with_images_is_judged_by_onnx_runtime_and_the_emulator(int8_file, colours_and_weights):
    (result,) = cnx_deploy.verify(int8_file, data=colours_and_weights[0], samples=20).results
    assert result.passed
    assert [each.candidate for each in result.results] == ["onnxruntime int8", "emulator int8"]
    assert {each.gate.name for each in result.results} == {"int8"}


# --- what runs it, and what cannot ---


def test_predict_and_eval_answer_as_the_classes_are(int8_file, colours_and_weights):
    images = colours_and_weights[0]
    for backend in ("onnxruntime", "openvino"):
        result = cnx_deploy.evaluate(int8_file, images, backend=backend)
        assert result.top1_percent == 100.0
    assert cnx_deploy.predict(int8_file, images / "red" / "0.png", backend="emulate-fp16", top=1)


def test_openvino_says_that_it_computes_in_int8(int8_file):
    with open_runner(int8_file, "openvino") as runner:
        assert (runner.info.precision, runner.info.arithmetic) == ("int8", "int8")


def test_limits_of_eight_bits_are_written_of_such_files_alone(int8_file, half_file):
    """Manifests of other files keep their bytes."""
    gates = []
    for artifact in (int8_file, half_file):
        document = json.loads(artifact.path.with_suffix(".json").read_text(encoding="utf-8"))
        gates.append(document["facts"]["parity"][0]["gate"])
        assert ("eight_bits" in document["facts"]) == (artifact is int8_file) == ("eight_bits" in deploy_of(document))
    assert (gates[0]["flip_share_max"], gates[0]["relative_l2_median_max"]) == (0.01, 0.02)
    assert not {"flip_share_max", "relative_l2_median_max"} & gates[1].keys()


def deploy_of(document):
    return document["request"]["deploy"]


def test_inspect_says_what_the_gates_measured(int8_file, cnx):
    code, out, _ = cnx("inspect", int8_file.path)
    assert code == 0
    assert "eight bits method  max" in out
    facts = json.loads(cnx("inspect", int8_file.path, "--json")[1])[0]["facts"]["eight_bits"]
    assert (facts["placement"], facts["method"], facts["images"]) == ("int8", "max", 20)
    assert facts["held_out"] == {"images": 60, "top1": 100.0, "reference_top1": 100.0, "metrics": {}}
    assert [check["batch"] for check in facts["engines"]] == [1, 8]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("fused", "own kernels compute in FP16 or BF16. Export it with --precision fp16"),
        ("openvino", "OpenVINO 2026.4 runs no float8 on a CPU. Choose onnxruntime"),
        ("openvino-bf16", "is FP8: openvino-bf16 computes BF16 files"),
        ("emulate-bf16", "is FP8: --backend emulate-bf16 has no BF16 to emulate"),
    ],
)
def test_a_backend_that_cannot_run_it_says_why(backend, reason, fp8_file, colours_and_weights, cnx):
    code, out, err = cnx("predict", fp8_file.path, colours_and_weights[0] / "red" / "0.png", "--backend", backend)
    assert (code, out) == (2, "")
    assert reason in err


def test_rescue_refuses_it(int8_file, tmp_path, cnx):
    code, _, err = cnx("rescue", int8_file.path, "--output-dir", tmp_path)
    assert code == 2
    assert "export the network with --precision fp16" in err


def test_every_module_is_lined_up_and_every_backend_compared(int8_file, colours_and_weights, cnx):
    code, out, _ = cnx("diagnose", "layers", int8_file.path, "--data", colours_and_weights[0], "--samples", "2")
    assert code == 0
    assert "not lined up" not in out
    assert out.count("modules within") == 3


# --- bench ---


@pytest.mark.usefixtures("quick_timing")
def test_bench_does_not_judge_it_by_made_up_images(int8_file, half_file, monkeypatch):
    never = replace(PRECISIONS["int8"].gate, relative_l2_max=0.0)
    monkeypatch.setitem(PRECISIONS, "int8", replace(PRECISIONS["int8"], gate=never))
    files = [int8_file.path, half_file.path]
    record = cnx_deploy.benchmark(files, batch=1, backends="onnxruntime", duration_seconds=0.05)
    eight, half = record.rows
    assert eight.status == "OK"
    assert NOT_JUDGED in eight.remarks
    assert NOT_JUDGED not in half.remarks
    assert list(gains_nothing(eight, record.rows, record.networks[eight.network])) == list(eight.remarks[1:])


@pytest.mark.parametrize(
    ("speeds", "remark"),
    [
        ((100.0, 80.0, 150.0), "INT8 gains nothing here: half.onnx runs 1.50 times as many images a second"),
        ((100.0, 100.0, 90.0), "INT8 gains nothing here: single.onnx runs 1.00 times as many images a second"),
        ((100.0, 90.0, 99.0), None),
    ],
)
def test_a_faster_file_of_the_same_backend_is_named(speeds, remark):
    precisions = {"eight.onnx": "int8", "single.onnx": "fp32", "half.onnx": "fp16"}
    network = network_of(files={name: FileFacts("a" * 64, precision) for name, precision in precisions.items()})
    rows = [row(1, speed, name=name) for name, speed in zip(precisions, speeds, strict=True)]
    peers = [row(1, 900.0, name="torch"), row(1, 900.0, name="half.onnx", backend="another")]
    assert list(gains_nothing(rows[0], [*rows, *peers], network)) == ([] if remark is None else [remark])
    assert list(gains_nothing(rows[2], [*rows, *peers], network)) == []


# --- engines ---


@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86"])
def test_fp8_for_a_gpu_without_it_is_refused_before_the_compiler(target, fp8_file, tmp_path, cnx):
    code, _, err = cnx("build-trt", fp8_file.path, "--target", target, "--output-dir", tmp_path / "engines")
    assert code == 2
    assert f"is FP8, and {target} has no FP8 arithmetic; sm89 is the first that has." in err
    assert "export with --precision int8 or fp16 for this GPU" in err
    assert not (tmp_path / "engines").exists()


@pytest.fixture
def built(monkeypatch):
    """What would be built, file and target; nothing is compiled."""
    made = []

    def build(artifact, spec, *_, **__):
        made.append((artifact.path.name, spec.target))
        return replace(artifact, reused=True)

    monkeypatch.setattr(api, "build_one_engine", build)
    return made


def test_targets_that_nobody_named_are_left_out_where_a_file_does_not_fit_them(fp8_file, built):
    told = []
    api.run_builds(api.BuildRequest(files=(fp8_file.path,)), told.append)
    assert built == [(fp8_file.path.name, "sm89"), (fp8_file.path.name, "sm120")]
    assert f"Left out: {fp8_file.path.name} is FP8, and sm86 has no FP8 arithmetic" in told[0]


def test_a_file_that_nobody_named_is_left_out_where_it_does_not_fit_the_target(fp8_file, half_file, built, tmp_path):
    for artifact in (fp8_file, half_file):
        copy_artifact(artifact, tmp_path)
    told = []
    api.run_builds(api.BuildRequest(export_dir=tmp_path, targets=("sm86",)), told.append)
    assert built == [(half_file.path.name, "sm86")]
    assert f"Left out: {fp8_file.path.name} is FP8" in told[0]


@pytest.mark.parametrize("targets", [("sm89", "sm90"), ("sm89", "sm86")])
def test_a_target_that_does_not_fit_is_refused_before_the_first_build(targets, fp8_file, built):
    with pytest.raises(InputError, match=r"not sm90|sm86 has no FP8"):
        api.run_builds(api.BuildRequest(files=(fp8_file.path,), targets=targets), lambda _: None)
    assert built == []


def test_own_kernels_refuse_eight_bits(int8_file, tmp_path):
    with pytest.raises(InputError, match="they compute in FP16 or BF16, and it is INT8"):
        cnx_deploy.build_engine(int8_file, target="sm89", fused="auto", output_dir=tmp_path)


@pytest.mark.parametrize(
    ("precision", "target"),
    [
        ("int8", "sm89"),
        *(pytest.param("int8", target, marks=pytest.mark.slow) for target in ("sm75", "sm80", "sm86", "sm120")),
        *(pytest.param("fp8", target, marks=pytest.mark.slow) for target in ("sm89", "sm120")),
    ],
)
def test_an_engine_stores_hidden_tensors_in_eight_bits(precision, target, int8_file, fp8_file, tmp_path, cnx):
    source = int8_file if precision == "int8" else fp8_file
    words, told = {"target": target, "runtime": "tensorrt-rtx", "output_dir": tmp_path}, list[str]()
    engine = cnx_deploy.build_engine(source, note=told.append, **words)
    is_judged = target in source.manifest.facts.eight_bits.targets
    assert any(f"Export it again with --gate-target {target}" in text for text in told) != is_judged
    compiled = open_artifact(engine.path).manifest.facts.compiled
    kind = "Int8" if precision == "int8" else "FP8"
    hidden = [8 * (32 >> stage) ** 2 * 4 * (16 << stage) for stage in range(4)]
    stored = [
        kernel.stage
        for kernel in compiled.kernel_list
        for size in hidden
        if any(math.prod(map(int, shape.split("x"))) == size for shape in _outputs(kernel.tensors, kind))
    ]
    assert {"stages.0", "stages.1", "stages.2", "stages.3"} <= set(stored)
    code, out, _ = cnx("inspect", engine.path)
    assert code == 0
    assert "eight bits" in out


def _outputs(tensors: str, kind: str) -> list[str]:
    words = tensors.replace(",", "").split()
    return [words[at + 1] for at, word in enumerate(words[:-2]) if word == "output" and words[at + 2] == kind]
