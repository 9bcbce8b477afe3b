"""What `--resume` reads, run.json and the states: read safely, every lie named by its place, a broken one replaced."""

import copy
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

from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, InputError, RefusedArtifactError, TrainingError
from cnx_deploy.training import Progress, TrainingSpec, train
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.run_folder import REQUEST, STATE, STATE_BEFORE, keep_state, open_run, usable_state
from tests.support.lies import (
    FEW,
    LONG,
    ODD_JSON,
    QUICK,
    check_command,
    documents,
    lying,
    placed,
    put,
    refused,
    result_or_error,
    spoilt,
)  # fmt: skip
from tests.support.training_data import difference, table, write_colours

KINDS = (CorruptArtifactError, InputError, RefusedArtifactError)
IMAGES = {
    TrainingSpec: {"class_names": ["blue", "red"], "train_images": 8, "val_images": 4},
    PretrainingSpec: {"train_images": 14, "held_images_taken": 2},
}
"""What is known of the images when a run begins."""


# --- the request ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def specs(tiny_variant):
    data = Path("data")
    return {
        "training": TrainingSpec(data, tiny_variant, image_size=32),
        "pretraining": PretrainingSpec(data, tiny_variant, image_size=64, held_images=2),
    }


@pytest.fixture(scope="module")
def requests(specs, tmp_path_factory):
    """What training and pre-training write when they begin."""
    root = tmp_path_factory.mktemp("requests")
    for name, spec in specs.items():
        open_run(dataclasses.replace(spec, run_dir=root / name), name, **IMAGES[type(spec)])
    return {name: json.loads((root / name / REQUEST).read_text()) for name in specs}


@pytest.fixture
def resume(specs, tmp_path):
    """Resume in a folder whose run.json holds the bytes."""

    def begin(before, name="training"):
        put(tmp_path / REQUEST, before)
        spec = dataclasses.replace(specs[name], run_dir=tmp_path, resume=True)
        return open_run(spec, name, **IMAGES[type(spec)])

    return begin


@pytest.mark.parametrize("kind", ["training", "pretraining"])
def test_a_request_is_resumed_as_it_was_written(resume, requests, kind):
    resume(json.dumps(requests[kind]).encode(), kind)
    for_people = {name: value for name, value in requests[kind].items() if name != "resolved"}
    resume(json.dumps(for_people).encode(), kind)
    other = requests["training" if kind == "pretraining" else "pretraining"]
    refused(lambda: resume(json.dumps(other).encode(), kind), InputError, "was started otherwise")


@pytest.mark.parametrize(
    ("place", "lie", "reason"),
    [
        (("spec",), None, "spec: Expected object, got null"),
        (("spec", "epochs"), [2], "spec[...]: Expected bool | int | float | str | null, got array"),
        (("train_images",), "8", "train_images: Expected int, got str"),
        (("train_images",), -1, "train_images: Expected int >= 0"),
        (("class_names",), "red", "class_names: Expected array | null, got str"),
        (("class_names",), [1], "class_names[0]: Expected str, got int"),
        (("preprocessing",), [], "preprocessing: Expected object, got array"),
        (("preprocessing", "mean"), [0], "preprocessing.mean: Expected array of length 3"),
        (("resolved",), 1, "resolved: Expected object, got int"),
    ],
)
def test_a_lie_of_the_request_is_named_by_its_field(resume, requests, place, lie, reason):
    before = json.dumps(placed(requests["training"], place, lie)).encode()
    refused(lambda: resume(before), CorruptArtifactError, f"{REQUEST} cannot be read ({reason}", "without --resume")


@pytest.mark.parametrize(
    ("field", "then", "reason"),
    [
        ("epochs", 3, "epochs 3 then, 30 now"),
        ("accumulate", True, "accumulate True then, 1 now"),
        ("schedule", "x" * 9000, "schedule xxxxx"),
    ],
)
def test_another_request_is_told_by_its_field_and_briefly(resume, requests, field, then, reason):
    before = json.dumps(placed(requests["training"], ("spec", field), then)).encode()
    assert len(refused(lambda: resume(before), InputError, reason)) < 700


def test_a_number_is_the_same_with_and_without_a_point(resume, requests):
    resume(json.dumps(placed(requests["training"], ("spec", "accumulate"), 1.0)).encode())


@pytest.mark.parametrize("name", ODD_JSON)
def test_what_is_no_request_is_corrupt(resume, name):
    refused(lambda: resume(ODD_JSON[name]), CorruptArtifactError, "run.json cannot be read (")


@QUICK
@given(data=st.data())
def test_fuzz_a_request_is_compared_or_corrupt(resume, requests, data):
    kind = data.draw(st.sampled_from(["training", "pretraining"]))
    lies = data.draw(documents(requests[kind]))
    result_or_error(lambda: resume(lies, kind), CorruptArtifactError, InputError)


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
        (self.folder / STATE_BEFORE).unlink(missing_ok=True)
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


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory, tiny_variant):
    folder = tmp_path_factory.mktemp("pretraining")
    data = write_colours(folder / "colours", 8, 2)
    spec = PretrainingSpec(
        data, tiny_variant, run_dir=folder / "run", epochs=2, image_size=64, batch_size=8, held_images=2
    )
    return begun(spec, pretrain)


@pytest.fixture(params=["training", pytest.param("pretraining", marks=pytest.mark.slow)])
def run_of(request, tmp_path):
    return request.getfixturevalue(request.param).copy(tmp_path / "run")


def test_a_sound_folder_is_gone_on_with(run_of):
    assert run_of.go_on().epochs_run == 2
    assert table(run_of.folder) == table(run_of.whole)


@pytest.mark.parametrize(
    "damage", ["cut", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flipped", "missing"))]
)
def test_train_resume_exact_a_broken_newest_state_gives_way(training, tmp_path, damage):
    run = training.copy(tmp_path / "run")
    whole, content = run.folder / STATE_BEFORE, bytearray((run.folder / STATE).read_bytes())
    (run.folder / STATE).rename(whole)
    if damage != "missing":
        content[len(content) // 2] ^= 1
        put(run.folder / STATE, bytes(content if damage == "flipped" else content[: len(content) // 2]))
    assert usable_state(run.folder) == whole
    run.go_on()
    assert table(run.folder) == table(run.whole)


def test_two_broken_states_are_one_error_and_none_is_another(training, tmp_path):
    run = training.copy(tmp_path / "run")
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


def test_a_state_that_would_run_something_is_refused_and_runs_nothing(run_of, tmp_path):
    path = run_of.put_state({**run_of.content(), "callbacks": Evil(tmp_path / "ran")})
    refused(run_of.go_on, RefusedArtifactError, f"{path} is refused", "foreign code")
    assert not (tmp_path / "ran").exists()


def test_a_state_that_unpacks_to_more_than_it_has_is_refused_before_it_is_unpacked(run_of):
    (run_of.folder / STATE_BEFORE).unlink(missing_ok=True)
    with zipfile.ZipFile(run_of.folder / STATE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    refused(run_of.go_on, RefusedArtifactError, "is compressed, and unpacked it would take 50,000,000 bytes")


def test_an_archive_of_a_version_that_nobody_writes_is_broken(run_of):
    """zipfile raises NotImplementedError for it."""
    (run_of.folder / STATE_BEFORE).unlink(missing_ok=True)
    content = bytearray((run_of.folder / STATE).read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 0xFF  # of the first entry of the central directory
    put(run_of.folder / STATE, bytes(content))
    refused(lambda: usable_state(run_of.folder), CorruptArtifactError, "last.ckpt cannot be read whole")


RECORDS = ("callbacks", "RunWriter", "records")
STATES = [
    (("epoch",), "1", "epoch: Expected int, got str"),
    (("epoch",), 5, "epoch: it is 5 with records of 1 epochs"),
    (("global_step",), -1, "global_step: Expected int >= 0"),
    (("pytorch-lightning_version",), None, "pytorch-lightning_version: Expected str, got null"),
    (("state_dict",), [], "state_dict: Expected object, got array"),
    (("state_dict", "model.head.bias"), 0, "state_dict[...]: Expected StoredTensor, got int"),
    (("state_dict", "model.head.bias"), torch.zeros(2, 2), "state_dict.model.head.bias: it is (2, 2) torch.float32"),
    (("state_dict", "more"), torch.zeros(1), "state_dict: more is none of the run"),
    (("loops",), {}, "loops: Object missing required field fit_loop"),
    (("loops", "fit_loop", "epoch_progress"), 1, "loops.fit_loop.epoch_progress: Expected object, got int"),
    (("loops", "fit_loop", "epoch_progress", "current"), {}, "epoch_progress.current: Object missing required field"),
    (("loops", "fit_loop"), torch.zeros(2), "loops.fit_loop: Expected object, got StoredTensor"),
    (("callbacks",), {}, "callbacks: there is no "),
    ((*RECORDS, 0, "epoch"), 2, "records: the epochs are [2], expected them to count from 1"),
    ((*RECORDS, 0, "seconds"), "1", "records[0].seconds: Expected float, got str"),
    ((*RECORDS, 0), {"epoch": 1}, "records[0]: Object missing required field"),
    (RECORDS, [None], "records[0]: Expected object, got null"),
    (("optimizer_states",), [], "optimizer_states: Expected array of length >= 1"),
    (("optimizer_states", 0, "param_groups", 0, "lr"), "fast", "param_groups[0].lr: Expected float, got str"),
    (("optimizer_states", 0, "param_groups", 0, "lr"), float("inf"), "param_groups[0].lr: Expected float <= 1e+150"),
    (("optimizer_states", 0, "param_groups", 0, "betas"), "x", "optimizer_states: betas is 'x', expected one like"),
    (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(3), "exp_avg is (3,), expected a tensor of"),
    (("optimizer_states", 0, "state", 0), {"step": torch.tensor(1.0)}, "exp_avg is None, expected a tensor of"),
    (("lr_schedulers", 0, "last_epoch"), None, "lr_schedulers[0].last_epoch: Expected int, got null"),
    (("lr_schedulers", 0), 3, "lr_schedulers[0]: Expected object, got int"),
]


@pytest.mark.parametrize(("place", "lie", "reason"), STATES, ids=[reason[:40] for *_, reason in STATES])
def test_a_lie_of_a_state_is_named_by_its_field(training, tmp_path, place, lie, reason):
    run = training.copy(tmp_path / "run")
    path = run.put_state(placed(run.content(), place, lie))
    refused(run.go_on, CorruptArtifactError, f"{path} is no state that this run can go on from (", reason)


@pytest.mark.slow
def test_the_state_of_another_task_is_refused(training, pretraining, tmp_path):
    run = pretraining.copy(tmp_path / "run")
    run.put_state(training.content())
    refused(run.go_on, CorruptArtifactError, "(state_dict: ", "is missing")


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from([[], {}, [[]], {"a": 1}]).map(copy.deepcopy),
    st.sampled_from([(), (0,), (2, 2), (0, 3)]).map(torch.zeros),
    st.just(0).map(lambda _: torch.zeros(2, dtype=torch.int64)),
)  # fmt: skip


def fuzz_state(run, folder, data):
    """Lies in the fields of a state, or flipped bytes of one."""
    run = run.copy(folder)
    if data.draw(st.integers(0, 3)):
        run.put_state(data.draw(lying(run.content(), PLAIN)))
    else:
        (run.folder / STATE_BEFORE).unlink(missing_ok=True)
        put(run.folder / STATE, data.draw(spoilt((run.folder / STATE).read_bytes())))
    result_or_error(run.go_on, *KINDS, TrainingError)


@settings(FEW, max_examples=6)
@given(data=st.data())
def test_fuzz_a_state_is_gone_on_from_or_refused(training, tmp_path, data):
    fuzz_state(training, tmp_path / "fuzzed", data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(LONG, max_examples=500)
@given(data=st.data())
def test_fuzz_a_state_at_length(training, pretraining, tmp_path, data):
    fuzz_state(data.draw(st.sampled_from([training, training, pretraining])), tmp_path / "fuzzed", data)


# --- the commands -----------------------------------------------------------------------------------------------------

COMMANDS = {
    "train": (TrainingSpec, "atto", {"image_size": 32}),
    "pretrain": (PretrainingSpec, "atto-fcmae", {"image_size": 64, "held_images": 2}),
}


def fuzz_command(command, run, folder, data):
    """run.json lies, and where it does not the state does: of another network, or no state at all."""
    shutil.rmtree(folder, ignore_errors=True)
    spec, name, options = COMMANDS[command]
    open_run(spec(run.spec.data, "atto", run_dir=folder, **options), name, **IMAGES[spec])
    if data.draw(st.booleans()):
        request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        put(folder / REQUEST, data.draw(documents(request)))
    if data.draw(st.booleans()):
        put(folder / STATE, data.draw(spoilt((run.folder / STATE).read_bytes())))
    words = (word for option, value in options.items() for word in (f"--{option.replace('_', '-')}", value))
    where = ("--no-image-check", "--run-dir", folder, "--resume")
    check_command(command, run.spec.data, "--variant", "atto", *words, *where, allowed=frozenset({2, 4}))


@settings(FEW, max_examples=5)
@given(data=st.data())
def test_fuzz_train_resume(training, tmp_path, data):
    fuzz_command("train", training, tmp_path / "run", data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("command", COMMANDS)
@settings(LONG, max_examples=500)
@given(data=st.data())
def test_fuzz_resume_at_length(training, pretraining, tmp_path, command, data):
    fuzz_command(command, training if command == "train" else pretraining, tmp_path / "run", data)
