"""The states that `train --resume` and `pretrain --resume` go on from: read safely, every lie named by its place."""

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

from cnx_deploy.core.errors import CorruptArtifactError, InputError, RefusedArtifactError, TrainingError
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import find_dataset
from cnx_deploy.training import TrainingSpec, train
from cnx_deploy.training import run as training_run
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training.fcmae import run as pretraining_run
from cnx_deploy.training.fcmae.images import divide_images, find_images_below
from cnx_deploy.training.run_folder import REQUEST, STATE, STATE_BEFORE, usable_state
from tests.support.lies import FEW, LONG, check_command, documents, lying, placed, put, refused, result_or_error, spoilt
from tests.support.training_data import write_colours

Values = dict[Any, Any]
KINDS = (CorruptArtifactError, InputError, RefusedArtifactError)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of two epochs of which one is done, and how it is gone on with; `copy` is free to be spoilt."""

    spec: Any
    resume: Callable[[Any], Any]
    writer: str

    def copy(self, folder: Path) -> "Run":
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.spec.run_dir, folder)
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, run_dir=folder))

    @property
    def folder(self) -> Path:
        return Path(self.spec.run_dir)

    def go_on(self) -> Any:
        return self.resume(self.spec)

    def content(self) -> Values:
        found: Values = torch.load(self.folder / STATE, weights_only=True)
        return found

    def put_state(self, content: object) -> Path:
        (self.folder / STATE_BEFORE).unlink(missing_ok=True)
        torch.save(content, self.folder / STATE)
        return self.folder / STATE


def begun(spec: Any, resume: Callable[[Any], Any], writer: str) -> Run:
    """Train both epochs and go back to the state after the first."""
    resume(spec)
    (spec.run_dir / STATE_BEFORE).replace(spec.run_dir / STATE)
    return Run(dataclasses.replace(spec, resume=True), resume, writer)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory, tiny_variant: Variant) -> Run:
    folder = tmp_path_factory.mktemp("training")
    data = write_colours(folder / "colours", 4, 2)
    spec = TrainingSpec(data, tiny_variant, run_dir=folder / "run", epochs=2, image_size=32, batch_size=8)
    return begun(spec, train, "EpochWriter")


@pytest.fixture(scope="module")
def pretraining(tmp_path_factory: pytest.TempPathFactory, tiny_variant: Variant) -> Run:
    folder = tmp_path_factory.mktemp("pretraining")
    data = write_colours(folder / "colours", 8, 2)
    spec = PretrainingSpec(
        data, tiny_variant, run_dir=folder / "run", epochs=2, image_size=64, batch_size=8, held_images=2
    )
    return begun(spec, pretrain, "PretrainingWriter")


@pytest.fixture(params=["training", pytest.param("pretraining", marks=pytest.mark.slow)])
def run_of(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    found: Run = request.getfixturevalue(request.param)
    return found.copy(tmp_path / "run")


def test_a_sound_folder_is_gone_on_with(run_of: Run) -> None:
    assert run_of.go_on().epochs_run == 2
    assert run_of.go_on().epochs_run == 2  # and a finished one says what it is


# --- states -----------------------------------------------------------------------------------------------------------


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_state_that_would_run_something_is_refused_and_runs_nothing(run_of: Run, tmp_path: Path) -> None:
    path = run_of.put_state({**run_of.content(), "callbacks": Evil(tmp_path / "ran")})
    refused(run_of.go_on, RefusedArtifactError, f"{path} is refused", "foreign code")
    assert not (tmp_path / "ran").exists()


def test_a_state_that_unpacks_to_more_than_it_has_is_refused_before_it_is_unpacked(run_of: Run) -> None:
    (run_of.folder / STATE_BEFORE).unlink(missing_ok=True)
    with zipfile.ZipFile(run_of.folder / STATE, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    said = "is compressed, and unpacked it would take 50,000,000 bytes"
    refused(lambda: usable_state(run_of.folder), RefusedArtifactError, said)
    refused(run_of.go_on, RefusedArtifactError, said)


def test_an_archive_of_a_version_that_nobody_writes_is_broken(run_of: Run) -> None:
    """zipfile raises NotImplementedError for it."""
    (run_of.folder / STATE_BEFORE).unlink(missing_ok=True)
    content = bytearray((run_of.folder / STATE).read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 0xFF  # of the first entry of the central directory
    put(run_of.folder / STATE, bytes(content))
    refused(lambda: usable_state(run_of.folder), CorruptArtifactError, "last.ckpt cannot be read whole")


STATES: list[tuple[tuple[Any, ...], Any, str]] = [
    (("epoch",), "1", "epoch: Expected int, got str"),
    (("epoch",), 5, "epoch: it is 5 with records of 1 epochs"),
    (("global_step",), -1, "global_step: Expected int >= 0"),
    (("pytorch-lightning_version",), None, "pytorch-lightning_version: Expected str, got null"),
    (("state_dict",), [], "state_dict: Expected object, got array"),
    (("state_dict", "model.head.bias"), 0, "state_dict[...]: Expected StoredTensor, got int"),
    (("state_dict", "more"), torch.zeros(1), "state_dict: more is none of the run"),
    (("loops",), {}, "loops: Object missing required field fit_loop"),
    (("loops", "fit_loop", "epoch_progress"), 1, "loops.fit_loop.epoch_progress: Expected object, got int"),
    (("loops", "fit_loop", "epoch_progress", "current"), {}, "epoch_progress.current: Object missing required field"),
    (("callbacks",), {}, "callbacks: there is no "),
    (("loops", "fit_loop"), torch.zeros(2), "loops.fit_loop: Expected object, got StoredTensor"),
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
def test_a_lie_of_a_state_is_named_by_its_field(
    training: Run, tmp_path: Path, place: tuple[Any, ...], lie: Any, reason: str
) -> None:
    run = training.copy(tmp_path / "run")
    path = run.put_state(placed(run.content(), place, lie))
    refused(run.go_on, CorruptArtifactError, f"{path} is no state that this run can go on from (", reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda records: records.clear(), "epoch: it is 0 with"),
        (lambda records: records[0].update(epoch=2), "records: the epochs are [2], expected them to count from 1"),
        (lambda records: records[0].update(seconds="1"), "records[0].seconds: Expected float, got str"),
        (lambda records: records[0].pop("learning_rate"), "records[0]: Object missing required field learning_rate"),
        (lambda records: records.append(None), "records[1]: Expected object, got null"),
    ],
)
def test_a_lie_of_the_records_in_a_state_is_named(run_of: Run, change: Callable[[Any], Any], reason: str) -> None:
    content = run_of.content()
    change(content["callbacks"][run_of.writer]["records"])
    run_of.put_state(content)
    if reason == "epoch: it is 0 with":  # a state of before the first epoch says the same of both
        assert run_of.go_on().epochs_run >= 1
    else:
        refused(run_of.go_on, CorruptArtifactError, f"(callbacks.{run_of.writer}.{reason}")


def test_the_weights_of_another_network_are_told_by_their_shape(run_of: Run) -> None:
    content = run_of.content()
    name = next(name for name, tensor in content["state_dict"].items() if tensor.ndim == 4)
    content["state_dict"][name] = torch.zeros(2, 2)
    run_of.put_state(content)
    refused(run_of.go_on, CorruptArtifactError, f"(state_dict.{name}: it is (2, 2) torch.float32, in this run")


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5),
    st.sampled_from([[], {}, [[]], {"a": 1}]).map(copy.deepcopy),
    st.sampled_from([(), (0,), (2, 2), (0, 3)]).map(torch.zeros),
    st.just(0).map(lambda _: torch.zeros(2, dtype=torch.int64)),
)  # fmt: skip


def fuzz_state(run: Run, folder: Path, data: st.DataObject) -> None:
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
def test_fuzz_a_state_is_gone_on_from_or_refused(training: Run, tmp_path: Path, data: st.DataObject) -> None:
    fuzz_state(training, tmp_path / "fuzzed", data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@settings(LONG, max_examples=500)
@given(data=st.data())
def test_fuzz_a_state_at_length(training: Run, pretraining: Run, tmp_path: Path, data: st.DataObject) -> None:
    fuzz_state(data.draw(st.sampled_from([training, training, pretraining])), tmp_path / "fuzzed", data)


# --- the commands -----------------------------------------------------------------------------------------------------

COMMANDS = {
    "train": ("--variant", "atto", "--image-size", "32"),
    "pretrain": ("--variant", "atto", "--image-size", "64", "--held-images", "2"),
}


def request_of(command: str, data: Path, folder: Path) -> tuple[Any, ...]:
    """Begin a run by the command's own request, without training; the words that go on with it."""
    words: tuple[Any, ...] = (command, data, *COMMANDS[command], "--no-image-check", "--run-dir", folder, "--resume")
    if command == "train":
        spec = TrainingSpec(data, "atto", image_size=32, run_dir=folder)
        training_run._open_run(spec, find_dataset(data))
    else:
        masked = PretrainingSpec(data, "atto", image_size=64, held_images=2, run_dir=folder)
        pretraining_run._open_run(masked, divide_images(find_images_below(data), 2))
    return words


def fuzz_command(command: str, run: Run, folder: Path, data: st.DataObject) -> None:
    """run.json lies, and where it does not the state does: of another network, or no state at all."""
    shutil.rmtree(folder, ignore_errors=True)
    words = request_of(command, run.spec.data, folder)
    if data.draw(st.booleans()):
        request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
        put(folder / REQUEST, data.draw(documents(request)))
    if data.draw(st.booleans()):
        put(folder / STATE, data.draw(spoilt((run.folder / STATE).read_bytes())))
    check_command(*words, allowed=frozenset({2, 4}))


@settings(FEW, max_examples=5)
@given(data=st.data())
def test_fuzz_train_resume(training: Run, tmp_path: Path, data: st.DataObject) -> None:
    fuzz_command("train", training, tmp_path / "run", data)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("command", COMMANDS)
@settings(LONG, max_examples=500)
@given(data=st.data())
def test_fuzz_resume_at_length(
    training: Run, pretraining: Run, tmp_path: Path, command: str, data: st.DataObject
) -> None:
    fuzz_command(command, training if command == "train" else pretraining, tmp_path / "run", data)
