"""What a run of either task does: its files, what interrupts it, what goes on from it, and several processes."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cnx_deploy.core.errors import (
    CheckpointError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
    TrainingError,
)
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.training import Progress, TrainingSpec, train
from cnx_deploy.training.fcmae import PretrainingSpec, create_autoencoder, pretrain
from cnx_deploy.training.run import OWN_LICENCE
from tests.support.foreign_models import randomise
from tests.support.training_data import InterruptIn, difference, table, write_colours

FILES = {"best.safetensors", "last.safetensors", "metrics.csv", "run.json", "last.ckpt", "previous.ckpt"}
PICTURES = {"reconstructions", "reconstructions/epoch-0001.png", "reconstructions/epoch-0002.png"}


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, a small request of two epochs, a model to start from, and what an undisturbed run has given."""

    name: str
    run: Callable[..., Any]
    spec: Any
    model: Callable[[], torch.nn.Module]
    files: set[str]
    whole: Any = None

    def spec_in(self, folder, **changes):
        return dataclasses.replace(self.spec, output_dir=folder / "runs", **changes)


@pytest.fixture(scope="module", params=["training", "pretraining"])
def shared_task(request, colours, tiny_variant, tmp_path_factory) -> Task:
    runs = tmp_path_factory.mktemp(request.param)
    if request.param == "training":
        spec = TrainingSpec(
            colours, tiny_variant, runs, epochs=2, image_size=32, batch_size=8, drop_path_rate=0.3, mixup_alpha=0.2
        )
        made = Task("tiny-test", train, spec, lambda: random_model(tiny_variant, 2, seed=3), FILES)
    else:
        spec = PretrainingSpec(colours, tiny_variant, runs, epochs=2, image_size=64, batch_size=4, learning_rate=2e-3)
        model = lambda: randomise(create_autoencoder(tiny_variant)).eval()  # noqa: E731
        made = Task("tiny-test-fcmae", pretrain, spec, model, FILES | PICTURES)
    return dataclasses.replace(made, whole=made.run(spec))


by_training = pytest.mark.parametrize("shared_task", ["training"], indirect=True)
"""What the loop and the folder do alike for both."""


@pytest.fixture
def task(shared_task) -> Task:
    """`whole` is shared: do not change it."""
    return shared_task


@pytest.fixture
def spec(task, tmp_path):
    return task.spec_in(tmp_path)


def test_a_run_leaves_its_files_and_nothing_else(task):
    run_dir = task.whole.run_dir
    assert run_dir == task.spec.output_dir / f"{task.name}-001"
    assert {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*")} == task.files
    assert [row["epoch"] for row in table(run_dir)] == ["1", "2"]
    request = json.loads((run_dir / "run.json").read_text())
    assert (request["spec"], request["resolved"]) == (task.spec.to_dict(), task.spec.resolved())
    assert request["preprocessing"] == task.spec.preprocessing.to_dict()
    loaded = load_checkpoint(task.whole.best, task.spec.network, num_classes=2, reset_head=True)
    assert (loaded.preprocessing, loaded.weights.licence) == (task.spec.preprocessing, OWN_LICENCE)


@pytest.mark.parametrize(
    "shared_task", ["training", pytest.param("pretraining", marks=pytest.mark.slow)], indirect=True
)
def test_the_same_request_gives_the_same_weights_whatever_the_workers(task, spec):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    again = task.run(dataclasses.replace(spec, workers=1))
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers are left alone
    assert difference(again.last, task.whole.last) == 0.0
    assert table(again.run_dir) == table(task.whole.run_dir)


@by_training
def test_another_seed_gives_another_run_in_a_folder_of_its_own(task):
    other = task.run(dataclasses.replace(task.spec, seed=1, epochs=1))
    assert other.run_dir.name == f"{task.name}-002"
    assert difference(other.last, task.whole.last) > 1e-4
    assert table(other.run_dir)[0] != table(task.whole.run_dir)[0]


@pytest.mark.parametrize(("epoch", "workers"), [pytest.param(1, 0, marks=pytest.mark.slow), (2, 1)])
def test_train_resume_exact_after_an_interruption(task, spec, epoch, workers):
    cut = dataclasses.replace(spec, workers=workers)
    interrupted = task.run(cut, progress=InterruptIn(epoch))
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C works again
        signal.raise_signal(signal.SIGINT)
    assert (interrupted.interrupted, interrupted.epochs_run) == (True, epoch - 1)
    going_on = InterruptIn()
    resumed = task.run(dataclasses.replace(cut, resume=True), progress=going_on)
    assert going_on.begun_after == [epoch - 1]
    assert (resumed.run_dir, resumed.interrupted) == (interrupted.run_dir, False)
    assert table(resumed.run_dir) == table(task.whole.run_dir)
    assert difference(resumed.last, task.whole.last) == 0.0


@by_training
def test_resuming_a_finished_run_changes_nothing(task):
    kept = [path for path in task.whole.run_dir.rglob("*") if path.suffix in (".safetensors", ".csv")]
    before = [path.read_bytes() for path in kept]
    again = task.run(dataclasses.replace(task.spec, run_dir=task.whole.run_dir, resume=True))
    assert again.to_dict() == task.whole.to_dict()
    assert [path.read_bytes() for path in kept] == before


def test_a_run_starts_and_resumes_from_a_model_and_leaves_it_as_it_was(task, spec, tmp_path):
    model = task.model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slow = dataclasses.replace(spec, learning_rate=1e-9)
    task.run(slow, model, InterruptIn(1), licence="CC-BY-NC-4.0")
    result = task.run(dataclasses.replace(slow, resume=True), licence="CC-BY-NC-4.0")
    written, prefix = load_file(result.last), "encoder." if task.run is pretrain else ""
    assert all(torch.allclose(tensor, before[prefix + name], atol=1e-6) for name, tensor in written.items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    loaded = load_checkpoint(result.last, spec.network, num_classes=2, reset_head=True)
    assert loaded.weights.licence == "CC-BY-NC-4.0"


def test_another_request_or_a_model_of_another_variant_is_refused(task, spec):
    for change in ({"epochs": 3}, {"batch_size": 5}, {"seed": 1}, {"min_crop_area": 0.3}):
        with pytest.raises(InputError, match=f"started otherwise: {next(iter(change))}"):
            task.run(dataclasses.replace(spec, run_dir=task.whole.run_dir, resume=True, **change))
    other = dataclasses.replace(spec, variant=dataclasses.replace(spec.network, name="other", depths=(1, 1, 1, 1)))
    with pytest.raises(CheckpointError, match=r"tiny-test.*other"):
        task.run(other, task.model())


@by_training
def test_a_folder_without_a_run_with_one_or_that_cannot_be_written_is_refused(task, spec, tmp_path):
    with pytest.raises(InputError, match=f"no run of {task.name} to resume"):
        task.run(dataclasses.replace(spec, resume=True))
    with pytest.raises(OutputExistsError, match="holds a run already"):
        task.run(dataclasses.replace(spec, run_dir=task.whole.run_dir))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        task.run(dataclasses.replace(spec, output_dir=tmp_path / "file"))


@by_training
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_epochs_before(task, spec):
    factors = [1.0]

    class Break(Progress):
        def end_epoch(self, record, is_best):
            factors[0] = float("nan")

    model = task.model()
    model.register_forward_hook(lambda module, inputs, output: output * factors[0])
    with pytest.raises(TrainingError, match="In epoch 2 the loss became nan"):
        task.run(spec, model, Break())
    run_dir = spec.output_dir / f"{task.name}-001"
    assert [row["epoch"] for row in table(run_dir)] == ["1"]
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(run_dir / "last.safetensors").values())


@by_training
def test_what_the_machine_lacks_is_told_before_anything_is_written(task, spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match="--precision fp32 or bf16"):
        task.run(dataclasses.replace(spec, precision="fp16"))
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingRequirementError, match=r"pip install .cnx-deploy\[train\]"):
        task.run(spec)
    assert not spec.output_dir.exists()


# --- processes of their own -------------------------------------------------------------------------------------------

SCRIPT = """
import os, pickle, sys
from dataclasses import replace
from pathlib import Path
from cnx_deploy.training import Progress, TrainingSpec, launch_from_environment, train
from cnx_deploy.training.fcmae import pretrain

class Tell(Progress):
    def step(self, report): print(report.epoch, flush=True)

spec, launch = pickle.loads(Path(sys.argv[1]).read_bytes()), launch_from_environment(os.environ)
spec = replace(spec, launch=launch, batch_size=spec.batch_size // launch.processes)
(train if isinstance(spec, TrainingSpec) else pretrain)(spec, progress=Tell())
"""
DETERMINED = {
    train: {
        "optimizer": "sgd", "learning_rate": 0.05, "ema_decay": 0.9, "drop_path_rate": 0.0, "mixup_alpha": 0.0,
        "class_weights": {"blue": 1.0, "red": 3.0}, "sampling": "balanced", "loss": "focal",
    },
    pretrain: {"learning_rate": 1e-3},
}  # fmt: skip
"""What makes an epoch the same for one process and two: nothing is drawn by each process for itself."""


@pytest.fixture
def uneven(task, tmp_path):
    """26 and 10 images in three epochs: the last step of each has fewer than the others."""
    return task.spec_in(tmp_path, data=write_colours(tmp_path / "uneven", train=13, val=5), epochs=3)


def words_for(spec, tmp_path) -> list[str]:
    """A command's arguments that run a request."""
    script, request = tmp_path / "script.py", tmp_path / f"{spec.run_dir.name}.pickle"
    script.write_text(SCRIPT)
    request.write_bytes(pickle.dumps(spec))
    return [str(script), str(request)]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.03, 0.0])
def test_train_resume_exact_after_a_kill(task, uneven, tmp_path, delay):
    spec = dataclasses.replace(uneven, run_dir=tmp_path / "run")
    process = subprocess.Popen([sys.executable, *words_for(spec, tmp_path)], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed = task.run(dataclasses.replace(spec, resume=True))
    whole = task.run(dataclasses.replace(uneven, run_dir=tmp_path / "whole"))
    assert resumed.epochs_run == 3
    assert table(resumed.run_dir) == table(whole.run_dir)
    assert difference(resumed.last, whole.last) == 0.0


@pytest.mark.slow
def test_train_ddp_equals_single(task, uneven, tmp_path):
    """To 1e-5 in the weights; not for AdamW, whose first steps have the sign of a gradient, even of one near zero."""
    spec = dataclasses.replace(uneven, accumulate=2, **DETERMINED[task.run])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        words = [*command, *words_for(dataclasses.replace(spec, run_dir=tmp_path / name), tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, check=True, capture_output=True, env=environment, timeout=240)
    for first, second in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        expected, shared = ({name: float(value) for name, value in row.items() if value} for row in (first, second))
        assert shared == pytest.approx(expected, rel=1e-4 if task.run is train else 1e-3)
    for name in ("last.safetensors", "last-ema.safetensors") if task.run is train else ():
        assert difference(tmp_path / "one" / name, tmp_path / "two" / name) < 1e-5
