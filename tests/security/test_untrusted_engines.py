"""Engines given to TensorRT's own deserialiser, which works without a GPU up to the driver.

Always in a child process, hash checks left out: what the runtime itself does with a damaged engine.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters import untrusted
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.exporters.untrusted import describe_engine, description_task, runtime_of
from cnx_deploy.runners import tensorrt as tensorrt_runner
from cnx_deploy.runners.tensorrt import TensorRTRunner
from cnx_deploy.verification.inspect import inspect_file, trusted_engine
from cnx_deploy.verification.verify import Reference, verify_artifact
from tests.support.lies import run
from tests.support.trt_double import double_of

without_gpu = pytest.mark.skipif(bool(find_gpus()), reason="what the runtime says where there is no GPU")


@pytest.fixture
def alone(tiny_engine: Artifact, tmp_path: Path) -> Path:
    """The engine without its manifest."""
    return Path(shutil.copy(tiny_engine.path, tmp_path / "alone.engine"))


@without_gpu
def test_a_truncated_engine_is_a_message_and_no_crash_with_the_hash_check_off(alone: Path) -> None:
    """The whole one gets as far as the driver, so the refusals are of what was cut and not of the machine."""
    with pytest.raises(MissingRequirementError, match="has a sound header, and tensorrt-rtx needs an NVIDIA GPU"):
        describe_engine(alone)
    content = alone.read_bytes()
    alone.write_bytes(content[: int(len(content) * 0.9999)])
    with pytest.raises(CorruptArtifactError, match=r"refuses alone\.engine \(.*failed.* Build it again"):
        describe_engine(alone)


@without_gpu
@pytest.mark.parametrize("count", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_seen_by_no_deserialiser_only_by_our_hash(count: int, alone: Path) -> None:
    """It says of engines with one bit flipped what it says of the whole one."""
    whole, *flipped = run_isolated(
        "tests.support.native_faults:answers_to_flips",
        {"engine": str(alone), "count": count},
        Limits(300.0, 8 << 30),
        what="Reading flipped engines",
        failure=BuildError,
    )
    assert flipped == [whole] * count


def test_an_engine_is_described_by_its_tensors_and_profiles_with_host_code_off(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double refuses to deserialise while host code is allowed."""
    module, _ = double_of(load_backend("tensorrt-rtx").trt, tiny_onnx_fp16.path, [(1, 1, 1), (1, 4, 8)])
    monkeypatch.setattr(untrusted, "load_backend", lambda name: Backend("tensorrt-rtx", module))
    described = json.loads(json.dumps(description_task(str(tiny_engine.path), "tensorrt-rtx")))
    assert described["layers"] == 7
    shapes = [[[size, 3, 32, 32] for size in sizes] for sizes in ((1, 1, 1), (1, 4, 8))]
    assert described["tensors"] == [
        {"name": "images", "mode": "input", "kind": "FLOAT", "shape": [-1, 3, 32, 32], "profiles": shapes},
        {"name": "logits", "mode": "output", "kind": "FLOAT", "shape": [-1, 10], "profiles": []},
    ]
    assert module.Runtime.plans == [tiny_engine.path.read_bytes()]


def test_no_library_is_asked_of_the_builder(tiny_onnx_fp16: Artifact) -> None:
    build = NetworkBuild(load_backend("tensorrt-rtx"), tiny_onnx_fp16.path)
    config = build.config("sm89", allow_tf32=False, batches=((1, 4, 8),))
    assert list(config.plugins_to_serialize) == []


def test_a_childs_answer_of_another_form_than_asked_for_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has run what was in the engine: its word is data from outside."""
    forged = {"runtime": "tensorrt-rtx", "runtime_version": "1", "layers": "many", "tensors": []}
    monkeypatch.setattr(untrusted, "run_isolated", lambda *words, **named: forged)
    with pytest.raises(CorruptArtifactError, match="its process gave another answer"):
        describe_engine(Path("a.engine"), "tensorrt-rtx")


def test_the_runtime_is_told_by_the_first_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.engine"
    for head, runtime in ((b"vtrt", "tensorrt-rtx"), (b"ftrt", "tensorrt")):
        path.write_bytes(head + bytes(60))
        assert runtime_of(path) == runtime
    path.write_bytes(b"\x08\x0a\x12\x07")
    with pytest.raises(InputError, match="is no engine"):
        runtime_of(path)


# --- who reads one, and when ------------------------------------------------------------------------------------------


@without_gpu
def test_inspect_reads_an_engine_without_a_manifest_only_when_it_is_trusted(alone: Path) -> None:
    alone.write_bytes(alone.read_bytes()[:5000])
    for words, expected in (((), 0), (("--trust",), 4)):
        code, said = run("inspect", alone, *words, "--json")
        assert (code, '"CorruptArtifactError"' in said) == (expected, expected == 4)


def test_trust_means_nothing_where_a_manifest_says_what_it_is(tiny_engine: Artifact, tiny_onnx_fp16: Artifact) -> None:
    for artifact in (tiny_engine, tiny_onnx_fp16):
        with pytest.raises(InputError, match="only an engine without one is to be trusted"):
            trusted_engine(inspect_file(artifact.path))


@without_gpu
@pytest.mark.parametrize("child_first", [True, False])
def test_verify_has_a_child_read_an_engine_before_this_process_does_and_bench_reads_it_once(
    child_first: bool, tiny_engine: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks for a GPU are taken for passed: what ends `verify` then is the child."""
    started: list[object] = []
    monkeypatch.setattr(tensorrt_runner, "require_gpu", lambda: None)
    monkeypatch.setattr(tensorrt_runner, "_current_target", lambda: "sm89")
    monkeypatch.setattr(TensorRTRunner, "_start", lambda *words: started.append(words))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    if child_first:
        result = verify_artifact(tiny_engine, Reference.__new__(Reference))
        assert "needs an NVIDIA GPU" in result.not_run[0]
    else:
        TensorRTRunner(tiny_engine)
    assert len(started) == (0 if child_first else 1)
