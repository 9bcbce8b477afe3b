"""OpenVINO gives PyTorch's answers in the type it is asked for, or says why it cannot."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy import Artifact, export, verify
from cnx_deploy.bench.conditions import isa_flags
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.system import Machine
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.runners import openvino as module
from cnx_deploy.runners import openvino_library
from cnx_deploy.runners.openvino import OpenVinoRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.parity import differences
from tests.runners.test_runner_inputs import foreign
from tests.runners.test_runners import images_for, with_fixed_batch

SPEC = DeploySpec("fp32", 32)
CPU = Machine("cpu", ())
# Not asked of OpenVINO: its library would be loaded by every process that collects tests.
HAS_BF16 = not {"avx512_bf16", "amx_bf16"}.isdisjoint(isa_flags())
WORDS: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "optimize_for": "openvino"}
ANSWERS = {"outputs": ("logits", "top5", "unit-embedding"), "input_kind": "uint8"}


@pytest.fixture(scope="session")
def own_form(made_once: Path) -> Artifact:
    """The smallest network, written for OpenVINO."""
    return export("tiny-test", precision="fp32", output_dir=made_once / "openvino", **WORDS)


@pytest.fixture(scope="session")
def own_bf16(made_once: Path) -> Artifact:
    """The same in BF16, of other weights: rounding takes those of seed 0 to the gate, in every layout."""
    return export("tiny-test", seed=1, precision="bf16", output_dir=made_once / "openvino-bf16", **WORDS)


def logits_of(model: ConvNeXtV2, images: Tensor) -> Tensor:
    return reference_runner(model, SPEC).run(images)["logits"]


# The same numbers


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("words", [{}, {"threads": 2, "thread_per_image": True}, {"fixed_shapes": False}])
@pytest.mark.parametrize("layout", ["cpu", "openvino"])
def test_openvino_computes_the_logits_of_each_image(
    request: pytest.FixtureRequest, tiny_model: ConvNeXtV2, layout: str, words: dict[str, Any], batch: int
) -> None:
    artifact = request.getfixturevalue("own_form" if layout == "openvino" else "tiny_onnx_fp32")
    images = images_for(SPEC, batch)
    expected, runner = logits_of(tiny_model, images), OpenVinoRunner(artifact.path, **words)
    found = runner.run(images)["logits"]
    assert GATES["fp32"].failures(differences(found, expected)) == ()
    assert batch == 1 or GATES["fp32"].failures(differences(found, expected.roll(1, dims=0)))
    kept = found.clone()
    assert GATES["fp32"].failures(differences(runner.run(images.flip(0))["logits"].flip(0), kept)) == ()


def test_images_that_are_not_contiguous_are_read_right(own_form: Artifact) -> None:
    images = images_for(SPEC, 4)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for words in ({}, {"threads": 2, "thread_per_image": True}):
        runner = OpenVinoRunner(own_form.path, **words)
        assert torch.equal(runner.run(strided)["logits"], runner.run(images)["logits"])


@pytest.fixture(scope="module")
def answering(made_once: Path) -> Artifact:
    """It takes bytes and gives several outputs, one of them indices."""
    return export("tiny-test", precision="fp32", output_dir=made_once / "openvino-answers", **WORDS, **ANSWERS)


@pytest.mark.parametrize("words", [{}, {"threads": 2, "thread_per_image": True}])
def test_raw_bytes_and_several_outputs_with_indices(answering: Artifact, words: dict[str, Any]) -> None:
    runner, model = OpenVinoRunner(answering.path, **words), recorded_model(answering).model
    spec = answering.manifest.deploy
    images = images_for(spec, 3)
    given, expected = runner.run(images), dict(reference_runner(model, spec).run(images))
    del expected["probabilities"]  # the reference gives what indices point into, too
    assert list(given) == list(expected) == ["logits", "top5_probabilities", "top5_classes", "unit_embedding"]
    assert {name: output.dtype for name, output in given.items()} == {
        name: output.dtype for name, output in expected.items()
    }
    assert torch.equal(given.pop("top5_classes"), expected["top5_classes"])
    for name, output in given.items():
        torch.testing.assert_close(output, expected[name], rtol=1e-4, atol=1e-4)
    graph = onnx.load(answering.path).graph
    norms = sum(node.op_type == "ReduceL2" for node in graph.node)
    assert norms == 6, "five of blocks and one of the embedding"


def test_open_height_and_width_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = {**WORDS, "image_size": ((32, 32), (64, 64), (96, 96))}
    artifact = export("tiny-test", precision="fp32", output_dir=tmp_path, **words)
    runner, model = OpenVinoRunner(artifact.path), recorded_model(artifact).model
    assert dict(runner.info.details)["shapes"] == "open"
    monkeypatch.setattr(runner, "_compiled", lambda *_: pytest.fail("compiled again"))
    for batch, size in ((1, (32, 96)), (3, (64, 64))):
        images = torch.rand(batch, 3, *size)
        expected = reference_runner(model, replace(artifact.manifest.deploy, image_size=size)).run(images)["logits"]
        assert GATES["fp32"].failures(differences(runner.run(images)["logits"], expected)) == ()


@pytest.mark.parametrize(
    "name",
    [
        "tiny_onnx_fp16",
        pytest.param("tiny_onnx_bf16", marks=pytest.mark.skipif(HAS_BF16, reason="OpenVINO computes it in BF16 here")),
    ],
)
def test_half_files_are_computed_in_fp32_which_the_runner_says(
    request: pytest.FixtureRequest, tiny_model: ConvNeXtV2, name: str
) -> None:
    artifact, images = request.getfixturevalue(name), images_for(SPEC, 2)
    precision = artifact.manifest.precision.name
    runner = open_runner(artifact, "openvino", RunnerOptions(threads=1))
    assert (runner.info.precision, runner.info.arithmetic) == (precision, "fp32")
    found = differences(runner.run(images)["logits"], logits_of(tiny_model, images))
    assert GATES[precision].failures(found) == ()
    assert GATES["fp32"].failures(found), "the weights are rounded"
    assert find_runner("openvino").widens_half


DETECTS: dict[str, Any] = {
    "task": "detect", "precision": "fp32", "image_size": 128, "num_classes": 5, "optimize_for": "openvino",
    "task_options": {
        "channels": 8, "box_channels": 8, "proposals": 40, "candidates": 50, "detections": 10, "masks": False,
    },
}  # fmt: skip


@pytest.mark.slow
def test_what_looks_up_rows_has_an_open_batch_and_the_right_answers_or_is_refused(tmp_path: Path) -> None:
    """With its batch fixed to one OpenVINO 2026.4 reads other rows: boxes are 100 px away."""
    artifact = export("tiny-test", batch=(1, 1, 2), output_dir=tmp_path / "open", **DETECTS)
    runner = OpenVinoRunner(artifact.path, threads=2, thread_per_image=True)
    assert (dict(runner.info.details)["shapes"], runner._each) == ("open", [])
    assert verify(artifact, samples=3, backends=("openvino",)).passed
    fixed = export("tiny-test", batch=(1, 1, 1), output_dir=tmp_path / "fixed", **DETECTS)
    with pytest.raises(InputError, match=r"a fixed batch of one and looks up rows .* --batch 1:1:2"):
        OpenVinoRunner(fixed.path)


# The type it computes in


def test_every_layer_of_a_file_computes_in_fp32(own_form: Artifact) -> None:
    runner = OpenVinoRunner(own_form.path)
    layers = dict(part.split(" in ")[::-1] for part in dict(runner.info.details)["layers"].split(", "))
    assert int(layers["f32"]) > 20
    assert not {"bf16", "f16"} & layers.keys()


@pytest.mark.skipif(not HAS_BF16, reason="OpenVINO computes no BF16 on this processor: its default is FP32 here")
def test_without_the_hint_openvino_computes_fp32_files_in_bf16(own_form: Artifact, tiny_model: ConvNeXtV2) -> None:
    compiled = openvino_library.openvino_core().compile_model(str(own_form.path), "CPU")
    images = images_for(SPEC, 4)
    found = torch.from_numpy(compiled(images.numpy())[0])
    assert GATES["fp32"].failures(differences(found, logits_of(tiny_model, images)))


@pytest.mark.skipif(HAS_BF16, reason="this processor computes BF16")
def test_a_type_that_is_not_given_is_refused_and_nothing_runs_in_another(own_bf16: Artifact) -> None:
    """OpenVINO itself takes the hint, says nothing, and computes in FP32."""
    with pytest.raises(MissingRequirementError, match=r"computes .*bf16\.onnx in f32 .*, where bf16 was asked for"):
        OpenVinoRunner(own_bf16.path, arithmetic="bf16")


def test_an_fp32_compilation_with_a_narrow_layer_is_refused(
    own_form: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module._layer_types
    monkeypatch.setattr(module, "_layer_types", lambda compiled: [*real(compiled), "f16"])
    with pytest.raises(MissingRequirementError, match="in f16 on this processor, where f32 was asked for"):
        OpenVinoRunner(own_form.path)


@pytest.mark.skipif(not HAS_BF16, reason="OpenVINO computes no BF16 on this processor: not run")
def test_bf16_passes_its_gate_and_is_not_fp32(own_bf16: Artifact) -> None:
    report = verify(own_bf16, samples=8, backends=("openvino-bf16",))
    assert report.passed
    assert report.results[0].results[0].differences.relative_l2_max > GATES["fp32"].relative_l2_max


def test_who_cannot_run_says_why_and_the_way_out(
    own_form: Artifact, own_bf16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(name: str, artifact: Artifact, machine: Machine = CPU) -> CnxDeployError | None:
        return find_runner(name).reason_against(artifact, machine)

    monkeypatch.setattr(module, "capabilities", lambda: ["FP32"])
    assert reason("openvino", own_form) is reason("openvino", own_bf16) is None
    told = str(reason("openvino-bf16", own_form))
    assert "is FP32: openvino-bf16 computes BF16 files" in told
    assert "--precision bf16 --optimize-for openvino" in told
    lacking = reason("openvino-bf16", own_bf16)
    assert isinstance(lacking, MissingRequirementError)
    assert "lacks AMX and AVX512-BF16" in str(lacking)
    monkeypatch.setattr(module, "capabilities", lambda: ["FP32", "BF16"])
    assert reason("openvino", own_form) is reason("openvino-bf16", own_bf16) is None
    taken = reason("openvino", own_bf16)
    assert isinstance(taken, InputError)
    assert "computes such files in BF16 on this processor" in str(taken)
    on_gpu = reason("openvino", own_form, Machine("cuda", ()))
    assert isinstance(on_gpu, InputError)
    assert "runs files on the CPU here, not on cuda" in str(on_gpu)


# Files and machines that lack something


def test_without_openvino_it_is_a_missing_requirement_and_the_others_run(
    own_form: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "openvino_core", openvino_library.openvino_core.__wrapped__)  # nobody has made one
    with pytest.raises(MissingRequirementError, match=r'pip install "cnx-deploy\[openvino\]"'):
        open_runner(own_form, "openvino")
    with pytest.raises(MissingRequirementError, match="OpenVINO is not installed"):
        OpenVinoRunner(own_form.path)
    assert open_runner(own_form).info.backend == "onnxruntime"


def test_files_that_are_none_or_take_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage, not protobuf")
    with pytest.raises(CorruptArtifactError, match=r"OpenVINO cannot read .*garbage\.onnx"):
        OpenVinoRunner(tmp_path / "garbage.onnx")
    with pytest.raises(InputError, match=r"takes tokens f32 .*; expected one batch of images"):
        OpenVinoRunner(foreign(tmp_path / "foreign.onnx", tokens=("batch", 3072)))
    sides = ("batch", 3, 32, 32)
    with pytest.raises(InputError, match=r"takes images f32 .*, extra f32 .*; expected one batch of images"):
        OpenVinoRunner(foreign(tmp_path / "two.onnx", images=sides, extra=sides))


def test_a_graph_of_one_batch_only_that_promises_any_is_one_message(tmp_path: Path) -> None:
    path = foreign(tmp_path / "four.onnx", images=("batch", 3, 32, 32))
    model = onnx.load(path)
    model.graph.initializer.append(onnx.helper.make_tensor("four", onnx.TensorProto.INT64, [2], [4, 3072]))
    model.graph.node[1].CopyFrom(onnx.helper.make_node("Reshape", ["sum", "four"], ["logits"]))
    onnx.save(model, path)
    with pytest.raises(CnxDeployError, match=r"OpenVINO cannot .* .*four\.onnx"):
        OpenVinoRunner(path).run(torch.zeros(2, 3, 32, 32))


def test_a_fixed_batch_and_a_range_are_those_of_the_file(own_form: Artifact, tmp_path: Path) -> None:
    assert OpenVinoRunner(own_form.path).input_spec == InputSpec("float", 32, 1, 8)
    fixed = with_fixed_batch(own_form.path, tmp_path / "fixed.onnx", 4)
    runner = OpenVinoRunner(fixed, threads=2, thread_per_image=True)
    assert (runner.input_spec, dict(runner.info.details)["a thread has"]) == (
        InputSpec("float", 32, 4, 4),
        "a share of each operator",
    )
    assert runner.run(images_for(SPEC, 4))["logits"].shape == (4, 10)


def test_one_compilation_is_kept_and_used_again(own_form: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, made = OpenVinoRunner(own_form.path), []
    real = runner._compiled
    monkeypatch.setattr(runner, "_compiled", lambda batch: (made.append(batch), real(batch))[1])
    for batch in (1, 4, 4, 1):
        runner.run(images_for(SPEC, batch))
    assert made == [4, 1]


IN_CHILD = """
import sys
from pathlib import Path
import torch
from cnx_deploy.runners.openvino import OpenVinoRunner
OpenVinoRunner(Path(sys.argv[1])).run(torch.zeros(1, 3, 32, 32))
print([name for name in sys.modules if name.startswith("openvino_telemetry")])
"""


def test_openvinos_telemetry_neither_loads_nor_leaves_an_identity(own_form: Artifact, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_CHILD, str(own_form.path)]
    home = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=home)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert not (tmp_path / "intel").exists()


TWO_RUNNERS = """
import faulthandler, gc, signal, sys
from pathlib import Path
from cnx_deploy.runners.openvino import OpenVinoRunner

faulthandler.enable()  # as pytest does: from then on Python's handlers run on the alternate stack
first, second = (OpenVinoRunner(Path(sys.argv[1])) for _ in range(2))
del first
gc.collect()
del second
gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_after_two_runners_is_an_interrupt(own_form: Artifact) -> None:
    """With a Core for each runner the second gave back a signal stack that the first had unmapped: SIGSEGV."""
    command = [sys.executable, "-c", TWO_RUNNERS, str(own_form.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


# In every command


def test_every_command_takes_it_by_name(own_form: Artifact, cnx: Any, tmp_path: Path) -> None:
    Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "noise.png")
    code, printed, said = cnx("verify", own_form.path, "--samples", 4, "--backend", "openvino", "--json")
    assert code == 0, said
    (judged,) = json.loads(printed)["verifications"]
    assert (judged["results"][0]["candidate"], judged["passed"]) == ("openvino fp32", True)
    code, printed, said = cnx(
        "bench", own_form.path, "--batch", 2, "--threads", 2, "--duration", 0.1,
        "--backend", "onnxruntime", "--backend", "openvino", "--backend", "openvino-bf16", "--json",
    )  # fmt: skip
    assert code == 0, said
    record, name = json.loads(printed), own_form.path.name
    assert [(row["name"], row["backend"], row["status"] == "INVALID") for row in record["rows"]] == [
        (f"{name} [onnxruntime]", "onnxruntime", False),
        (f"{name} [openvino]", "openvino", False),
    ]
    assert [row["name"] for row in record["not_run"]] == [f"{name} [openvino-bf16]"]
    best = []
    for words in ((), ("--backend", "openvino")):
        code, printed, said = cnx("predict", own_form.path, tmp_path / "noise.png", "--json", *words)
        assert code == 0, said
        best.append(json.loads(printed)["predictions"][0]["scores"][0])
    assert best[0]["index"] == best[1]["index"]
    assert best[0]["probability"] == pytest.approx(best[1]["probability"], abs=1e-5)
