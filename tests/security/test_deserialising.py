"""Engines given to TensorRT's own deserialiser, which works without a GPU up to the driver.

Always in a child process, hash checks left out: what the runtime itself does with a damaged engine.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cnx_deploy.cli import main
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.trt import deserialising
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.deserialising import EngineTensor, describe_engine, description_task, runtime_of
from cnx_deploy.runners import tensorrt as tensorrt_runner
from cnx_deploy.runners.tensorrt import TensorRTRunner
from cnx_deploy.verification.verify import Reference, verify_artifact
from tests.support.trt_double import double_of

without_gpu = pytest.mark.skipif(bool(find_gpus()), reason="what the runtime says where there is no GPU")


def copied(engine: Artifact, folder: Path) -> Path:
    """The engine alone, without its manifest."""
    return Path(shutil.copy(engine.path, folder / "alone.engine"))


# --- what the runtime itself sees -------------------------------------------------------------------------------------


@without_gpu
@pytest.mark.parametrize("tenth", [0, 1, 5, 9, 10])
def test_engine_truncated_is_a_message_and_no_crash_with_the_hash_check_off(
    tenth: int, tiny_engine: Artifact, tmp_path: Path
) -> None:
    path = copied(tiny_engine, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: max(4, len(content) * tenth // 10 - 1)])
    with pytest.raises(CorruptArtifactError, match=r"refuses alone\.engine \(.*failed.* Build it again"):
        describe_engine(path)


@without_gpu
def test_a_whole_engine_gets_as_far_as_the_driver(tiny_engine: Artifact, tmp_path: Path) -> None:
    """So the refusals above are of what was cut, and not of the machine."""
    with pytest.raises(
        MissingRequirementError, match="has a sound header, and to read on tensorrt-rtx needs an NVIDIA"
    ):
        describe_engine(copied(tiny_engine, tmp_path))


@without_gpu
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_engine_bit_flip_is_seen_by_no_validity_api_and_no_deserialiser_only_by_our_hash(
    count: int, tiny_engine: Artifact, tmp_path: Path
) -> None:
    """Both say of engines with one bit flipped what they say of the whole one."""
    task, path = "tests.support.native_faults:answers_to_flips", copied(tiny_engine, tmp_path)
    limits = Limits(300.0, 8 << 30)
    whole, *flipped = run_isolated(
        task, {"engine": str(path), "count": count}, limits, what="Reading flipped engines", failure=BuildError
    )
    assert len(flipped) == count
    assert [answer for answer in flipped if answer != whole] == []


# --- what it says of an engine (on a GPU: not run) --------------------------------------------------------------------


def test_an_engine_is_described_by_its_tensors_and_profiles(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = load_backend("tensorrt-rtx").trt
    module, _ = double_of(real, tiny_onnx_fp16.path, [(1, 1, 1), (1, 4, 8)])
    monkeypatch.setattr(deserialising, "load_backend", lambda name: Backend("tensorrt-rtx", module))
    found = json.loads(json.dumps(description_task(str(tiny_engine.path), "tensorrt-rtx")))
    assert found["layers"] == 7
    shapes = [[[size, 3, 32, 32] for size in sizes] for sizes in ((1, 1, 1), (1, 4, 8))]
    assert found["tensors"] == [
        {"name": "images", "mode": "input", "kind": "FLOAT", "shape": [-1, 3, 32, 32], "profiles": shapes},
        {"name": "logits", "mode": "output", "kind": "FLOAT", "shape": [-1, 10], "profiles": []},
    ]
    assert module.Runtime.plans == [tiny_engine.path.read_bytes()]


def test_an_answer_of_another_form_than_asked_for_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has run what was in the engine: what it says is data from outside."""

    def lying(*words: object, **named: object) -> Any:
        return {"runtime": "tensorrt-rtx", "runtime_version": "1", "layers": "many", "tensors": []}

    monkeypatch.setattr(deserialising, "run_isolated", lying)
    with pytest.raises(CorruptArtifactError, match="its process gave another answer than was asked for"):
        describe_engine(Path("a.engine"), "tensorrt-rtx")


@pytest.mark.parametrize(("head", "runtime"), [(b"vtrt", "tensorrt-rtx"), (b"ftrt", "tensorrt")])
def test_the_runtime_is_told_by_the_first_bytes(head: bytes, runtime: str, tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(head + bytes(60))
    assert runtime_of(path) == runtime


def test_what_begins_otherwise_is_no_engine(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    path.write_bytes(b"\x08\x0a\x12\x07")
    with pytest.raises(InputError, match=r"begins with b'.*', expected one of b'vtrt', b'ftrt'"):
        runtime_of(path)


# --- the commands -----------------------------------------------------------------------------------------------------


@without_gpu
def test_inspect_reads_an_engine_without_a_manifest_only_when_it_is_trusted(
    tiny_engine: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied(tiny_engine, tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    codes = {}
    for words in ([], ["--trust"]):
        with pytest.raises(SystemExit) as stop:
            main(["inspect", str(path), *words, "--json"])
        (document,) = json.loads(capsys.readouterr().out)
        codes[len(words)] = (stop.value.code or 0, document.get("error", "no error"))
    assert codes == {0: (0, "no error"), 1: (4, "CorruptArtifactError")}


@pytest.mark.parametrize("kind", ["engine", "onnx"])
def test_trust_means_nothing_where_a_manifest_says_what_it_is(
    kind: str, tiny_engine: Artifact, tiny_onnx_fp16: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    path = (tiny_engine if kind == "engine" else tiny_onnx_fp16).path
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path), "--trust"])
    assert stop.value.code == 2
    assert "only an engine without one is to be trusted. Leave out --trust." in capsys.readouterr().err


def test_trusted_engine_shows_what_the_runtime_says(
    tiny_engine: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensor = EngineTensor("images", "input", "FLOAT", (-1, 3, 32, 32), (((1, 3, 32, 32),) * 3,))
    described = deserialising.EngineDescription("tensorrt-rtx", "1.7.1.116", 5, (tensor,))
    monkeypatch.setattr(deserialising, "describe_engine", lambda path: described)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(copied(tiny_engine, tmp_path)), "--trust"])
    printed = capsys.readouterr().out
    assert not stop.value.code
    assert "tensors images     mode input, kind FLOAT, shape [-1, 3, 32, 32]" in printed
    assert "It was read because you trust it: nothing else says where it is from." in printed


@without_gpu
def test_verify_reads_an_engine_in_a_child_before_this_process_does(
    tiny_engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks for a GPU are taken for passed: what ends it then is the child."""
    started: list[object] = []
    monkeypatch.setattr(tensorrt_runner, "require_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_runner, "_current_target", lambda: "sm89")
    monkeypatch.setattr(TensorRTRunner, "_start", lambda *words: started.append(words))
    reference = Reference.__new__(Reference)
    found = verify_artifact(tiny_engine, reference)
    assert started == []
    assert "has a sound header, and to read on tensorrt-rtx needs an NVIDIA GPU" in found.not_run[0]


@without_gpu
def test_bench_reads_it_once(tiny_engine: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(tensorrt_runner, "require_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_runner, "_current_target", lambda: "sm89")
    monkeypatch.setattr(TensorRTRunner, "_start", lambda *words: started.append(words))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    TensorRTRunner(tiny_engine)
    assert len(started) == 1
