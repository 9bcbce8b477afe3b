"""What `--resume` reads, run.json and the states: compared, read safely, a broken newest one replaced."""

import dataclasses
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, InputError, RefusedArtifactError
from cnx_deploy.training import Progress, TrainingSpec, train
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.run_folder import REQUEST, STATE, STATE_BEFORE, keep_state, open_run, usable_state
from tests.support.lies import (
    FEW,
    ODD_JSON,
    QUICK,
    check_command,
    documents,
    placed,
    put,
    refused,
    result_or_error,
    spoilt,
)
from tests.support.training_data import difference, table, write_colours

IMAGES = {"class_names": ["blue", "red"], "train_images": 8, "val_images": 4}
"""What is known of the images when a run begins."""


# --- the request ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spec(tiny_variant):
    return TrainingSpec(Path("data"), tiny_variant, image_size=32)


@pytest.fixture(scope="module")
def request_before(spec, tmp_path_factory):
    """What training writes when it begins."""
    run_dir = tmp_path_factory.mktemp("request") / "run"
    open_run(dataclasses.replace(spec, run_dir=run_dir), "name", **IMAGES)
    return json.loads((run_dir / REQUEST).read_text())


@pytest.fixture
def resume(spec, tmp_path):
    """Resume in a folder whose run.json holds the bytes."""

    def begin(before):
        put(tmp_path / REQUEST, before if isinstance(before, bytes) else json.dumps(before).encode())
        return open_run(dataclasses.replace(spec, run_dir=tmp_path, resume=True), "name", **IMAGES)

    return begin


def test_a_request_is_resumed_as_it_was_written_and_as_json_has_its_numbers(resume, request_before):
    resume(request_before)
    resume({name: value for name, value in request_before.items() if name != "resolved"})  # is for people alone
    resume(placed(request_before, ("spec", "accumulate"), 1.0))


@pytest.mark.parametrize(
    ("place", "then", "reason"),
    [
        (("spec", "epochs"), 3, "epochs 3 then, 30 now"),
        (("spec", "accumulate"), True, "accumulate True then, 1 now"),
        (("spec", "schedule"), "x" * 9000, "schedule xxxxx"),
        (("train_images",), 9, "train_images 9 then, 8 now"),
        (("class_names",), ["red", "blue"], "class_names ['red', 'blue'] then"),
        (("preprocessing", "mean"), [0], "preprocessing {"),
    ],
)
def test_another_request_is_told_by_its_field_and_briefly(resume, request_before, place, then, reason):
    assert len(refused(lambda: resume(placed(request_before, place, then)), InputError, reason)) < 700


@pytest.mark.parametrize("content", [*ODD_JSON.values(), b'{"spec": 1}'], ids=[*ODD_JSON, "no spec"])
def test_what_is_no_request_is_corrupt(resume, content):
    refused(lambda: resume(content), CorruptArtifactError, "run.json cannot be read (", "without --resume")


@QUICK
@given(data=st.data())
def test_fuzz_a_request_is_compared_or_corrupt(resume, request_before, data):
    lies = data.draw(documents(request_before))
    result_or_error(lambda: resume(lies), CorruptArtifactError, InputError)


# --- states -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of two epochs of which one is done, and how it is gone on with; `copy` is free to be spoilt."""

    spec: Any
    resume: Callable[[Any], Any]
    whole: Path

    def copy(self, folder):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.spec.run_dir, folder)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, run_dir=folder))

    @property
    def folder(self):
        return Path(self.spec.run_dir)

    def go_on(self):
        return self.resume(self.spec)

    def content(self):
        return torch.load(self.folder / STATE, weights_only=True)

    def put_state(self, content):
        torch.save(content, self.folder / STATE)
        return self.folder / STATE


def begun(spec, resume):
    """Train both epochs, keep the result, and go back to the state after the first."""
    resume(spec)
    whole = shutil.copytree(spec.run_dir, spec.run_dir.with_name("whole"))
    (spec.run_dir / STATE_BEFORE).replace(spec.run_dir / STATE)
    return Run(dataclasses.replace(spec, resume=True), resume, whole)


@pytest.fixture(scope="module")
def training(tmp_path_factory, tiny_variant):
    folder = tmp_path_factory.mktemp("training")
    data = write_colours(folder / "colours", 4, 2)
    spec = TrainingSpec(data, tiny_variant, run_dir=folder / "run", epochs=2, image_size=32, batch_size=8)
    return begun(spec, train)


@pytest.fixture
def run(training, tmp_path):
    return training.copy(tmp_path / "run")


@pytest.mark.parametrize("damage", ["none", "cut", "flipped", "missing"])
def test_train_resume_exact_a_broken_newest_state_gives_way(run, damage):
    content = bytearray((run.folder / STATE).read_bytes())
    if damage != "none":
        (run.folder / STATE).rename(run.folder / STATE_BEFORE)
    if damage in ("cut", "flipped"):
        content[len(content) // 2] ^= 1
        put(run.folder / STATE, bytes(content if damage == "flipped" else content[: len(content) // 2]))
    assert usable_state(run.folder).name == (STATE if damage == "none" else STATE_BEFORE)
    if damage in ("none", "cut"):
        assert run.go_on().epochs_run == 2
        assert table(run.folder) == table(run.whole)


def test_two_broken_states_are_one_error_and_none_is_another(run):
    for name in (STATE, STATE_BEFORE):
        put(run.folder / name, b"not a state")
    refused(run.go_on, CorruptArtifactError, "last.ckpt and previous.ckpt cannot be read whole")
    for name in (STATE, STATE_BEFORE):
        (run.folder / name).unlink()
    refused(run.go_on, InputError, "has no last.ckpt to resume from")


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    keep_state(tmp_path, lambda path: torch.save({"epoch": 1}, path))

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    refused(lambda: keep_state(tmp_path, fail), DiskFullError, "last.ckpt (No space left on device)")
    assert torch.load(usable_state(tmp_path), weights_only=True) == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_moving_average_is_resumed_too(training, tmp_path):
    class Stop(Progress):
        def end_epoch(self, record, is_best):
            raise InterruptedError

    spec = dataclasses.replace(training.spec, ema_decay=0.9, resume=False, run_dir=tmp_path / "whole")
    whole = train(spec).run_dir
    cut = dataclasses.replace(spec, run_dir=tmp_path / "cut")
    with pytest.raises(InterruptedError):
        train(cut, progress=Stop())
    resumed = train(dataclasses.replace(cut, resume=True)).run_dir
    assert difference(whole / "last-ema.safetensors", resumed / "last-ema.safetensors") == 0.0


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_state_that_would_run_something_is_refused_and_runs_nothing(run, tmp_path):
    path = run.put_state({**run.content(), "callbacks": Evil(tmp_path / "ran")})
    refused(run.go_on, RefusedArtifactError, f"{path} is refused", "foreign code")
    assert not (tmp_path / "ran").exists()


def test_archives_that_unpack_to_more_or_that_nobody_writes_are_not_read(run):
    content = bytearray((run.folder / STATE).read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 0xFF  # a version for which zipfile raises NotImplementedError
    put(run.folder / STATE, bytes(content))
    refused(lambda: usable_state(run.folder), CorruptArtifactError, "last.ckpt cannot be read whole")
    with zipfile.ZipFile(run.folder / STATE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    refused(run.go_on, RefusedArtifactError, "is compressed, and unpacked it would take 50,000,000 bytes")


RECORDS = ("callbacks", "RunWriter", "records")


@pytest.mark.parametrize(
    ("place", "lie", "reason"),
    [
        (("epoch",), 5, "it is of epoch 5, from 0, with records of the epochs [1]"),
        (("callbacks",), {}, "RunWriter: Expected object, got null"),
        ((*RECORDS, 0, "epoch"), 2, "records of the epochs [2]"),
        ((*RECORDS, 0, "seconds"), "1", "RunWriter[...][0].seconds: Expected float, got str"),
        (("optimizer_states",), [], "optimizer_states: there is none"),
        (("optimizer_states", 0, "param_groups"), [], "ValueError: loaded state dict has a different number of"),
        (("lr_schedulers",), None, "TypeError: "),
        (("state_dict", "model.head.bias"), torch.zeros(3), "RuntimeError: Error(s) in loading state_dict"),
        (("state_dict", "more"), torch.zeros(1), 'Unexpected key(s) in state_dict: "more"'),
    ],
)
def test_a_state_that_does_not_fit_the_run_is_refused_with_the_reason(run, place, lie, reason):
    path = run.put_state(placed(run.content(), place, lie))
    refused(run.go_on, CorruptArtifactError, f"{path} is no state that this run can go on from (", reason)


def test_the_state_of_another_task_is_refused(run, tmp_path, tiny_variant):
    class Stop(Progress):
        def step(self, report):
            raise InterruptedError

    other = PretrainingSpec(run.spec.data, tiny_variant, run_dir=tmp_path / "other", epochs=2, image_size=64)
    with pytest.raises(InterruptedError):
        pretrain(other, progress=Stop())
    (tmp_path / "other" / STATE).replace(run.folder / STATE)
    refused(run.go_on, CorruptArtifactError, "is no state that this run can go on from")


@settings(FEW, max_examples=6)
@given(data=st.data())
def test_fuzz_spoilt_bytes_of_a_state_are_refused_or_harmless(training, tmp_path, data):
    run = training.copy(tmp_path / "fuzzed")
    put(run.folder / STATE, data.draw(spoilt((run.folder / STATE).read_bytes())))
    result_or_error(run.go_on, CorruptArtifactError, InputError, RefusedArtifactError)


@settings(FEW, max_examples=5)
@given(data=st.data())
def test_fuzz_train_resume_ends_with_a_message(training, tmp_path, data):
    """run.json lies, and where it does not the state does: of another network, or no state at all."""
    folder = tmp_path / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    open_run(TrainingSpec(training.spec.data, "atto", run_dir=folder, image_size=32), "atto", **IMAGES)
    if data.draw(st.booleans()):
        put(folder / REQUEST, data.draw(documents(json.loads((folder / REQUEST).read_text(encoding="utf-8")))))
    if data.draw(st.booleans()):
        put(folder / STATE, data.draw(spoilt((training.folder / STATE).read_bytes())))
    words = ("--variant", "atto", "--image-size", 32, "--no-image-check", "--run-dir", folder, "--resume")
    check_command("train", training.spec.data, *words, allowed=frozenset({2, 4}))
