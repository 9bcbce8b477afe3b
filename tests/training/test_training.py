import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cnx_deploy.cli.train import train as train_command
from cnx_deploy.cli.training_progress import TerminalProgress
from cnx_deploy.core.errors import (
    CheckpointError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
    TrainingError,
)
from cnx_deploy.core.system import cpu_count
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import create_model, random_model
from cnx_deploy.training import Silence, StepReport, TrainingSpec, initial_model, train
from cnx_deploy.training.records import CONDITIONS
from tests.support.training_data import write_colours

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread, for seconds when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Reddish and bluish noise, 12 training and 4 validation images each, 40 px: learnt within a few steps."""
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture
def spec(colours, tiny_variant, tmp_path):
    return TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=2, image_size=32, batch_size=8)


def records(run_dir: Path) -> list[dict[str, float]]:
    """The table without how long each epoch took."""
    with (run_dir / "metrics.csv").open() as stream:
        return [
            {name: float(value) for name, value in row.items() if name not in CONDITIONS and value}
            for row in csv.DictReader(stream)
        ]


def weights(path: Path, variant) -> dict[str, torch.Tensor]:
    return load_checkpoint(path, variant).model.state_dict()


class InterruptIn(Silence):
    """Presses Ctrl-C in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def step(self, report: StepReport) -> None:
        if report.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGINT)


def test_training_learns_what_is_easy_to_learn(spec):
    result = train(dataclasses.replace(spec, epochs=8, learning_rate=5e-3))
    assert result.best_top1_percent == 100.0


def test_a_run_leaves_weights_records_and_state_and_nothing_else(spec):
    result = train(spec)
    assert result.run_dir == spec.output_dir / "tiny-test-001"
    assert {path.name for path in result.run_dir.iterdir()} == {
        "best.safetensors",
        "last.ckpt",
        "last.safetensors",
        "metrics.csv",
        "previous.ckpt",
        "run.json",
    }
    assert [row["epoch"] for row in records(result.run_dir)] == [1.0, 2.0]


def test_written_weights_carry_classes_preprocessing_and_licence(spec):
    result = train(spec, licence="CC-BY-NC-4.0")
    loaded = load_checkpoint(result.best, spec.network)
    assert loaded.class_names == ("blue", "red")
    assert loaded.preprocessing == spec.preprocessing
    assert loaded.weights.licence == "CC-BY-NC-4.0"


def test_each_run_has_a_folder_of_its_own(spec):
    one_epoch = dataclasses.replace(spec, epochs=1)
    assert [train(one_epoch).run_dir.name for _ in range(2)] == ["tiny-test-001", "tiny-test-002"]


def test_the_same_request_gives_the_same_weights_whatever_the_workers(spec):
    drops = dataclasses.replace(spec, drop_path_rate=0.3, epochs=1)
    torch.manual_seed(1)
    alone = train(drops)
    torch.manual_seed(2)
    helped = train(dataclasses.replace(drops, workers=1))
    first, second = weights(alone.last, spec.network), weights(helped.last, spec.network)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights(spec):
    one_epoch = dataclasses.replace(spec, epochs=1)
    first = weights(train(one_epoch).last, spec.network)
    second = weights(train(dataclasses.replace(one_epoch, seed=1)).last, spec.network)
    assert not torch.equal(first["head.weight"], second["head.weight"])


@pytest.mark.parametrize(("epoch", "workers"), [(1, 0), (2, 0), (2, 1)])
def test_train_resume_exact_after_an_interruption(spec, epoch, workers):
    whole = train(dataclasses.replace(spec, drop_path_rate=0.3, run_dir=spec.output_dir / "whole"))
    cut = dataclasses.replace(spec, drop_path_rate=0.3, workers=workers)
    interrupted = train(cut, progress=InterruptIn(epoch))
    assert (interrupted.interrupted, interrupted.epochs_run) == (True, epoch - 1)
    resumed = train(dataclasses.replace(cut, resume=True))
    assert (resumed.run_dir, resumed.interrupted) == (interrupted.run_dir, False)
    assert records(resumed.run_dir) == records(whole.run_dir)
    expected, found = weights(whole.last, spec.network), weights(resumed.last, spec.network)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_resumed_run_goes_on_after_its_last_finished_epoch(spec):
    class NoteStart(Silence):
        def begin(self, epochs, steps_per_epoch, epochs_done):
            started_after.append(epochs_done)

    started_after: list[int] = []
    train(spec, progress=InterruptIn(2))
    train(dataclasses.replace(spec, resume=True), progress=NoteStart())
    assert started_after == [1]


def test_resuming_a_finished_run_changes_nothing(spec):
    first = train(spec)
    before = records(first.run_dir)
    again = train(dataclasses.replace(spec, resume=True))
    assert again == first
    assert records(first.run_dir) == before


def test_a_run_started_from_a_model_resumes_from_it(spec):
    model = random_model(spec.network, 2, seed=3)
    whole = train(dataclasses.replace(spec, run_dir=spec.output_dir / "whole"), model)
    train(spec, model, InterruptIn(1))
    resumed = train(dataclasses.replace(spec, resume=True))
    assert records(resumed.run_dir) == records(whole.run_dir)


def test_ctrl_c_works_again_after_an_interrupted_run(spec):
    train(spec, progress=InterruptIn(1))
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("change", [{"epochs": 3}, {"batch_size": 4}, {"flip": False}, {"seed": 1}], ids=str)
def test_a_run_is_not_resumed_by_another_request(spec, change):
    train(spec, progress=InterruptIn(1))
    with pytest.raises(InputError, match=f"started otherwise: {next(iter(change))}"):
        train(dataclasses.replace(spec, resume=True, **change))


def test_resume_without_a_run_is_refused(spec):
    with pytest.raises(InputError, match="no run of tiny-test to resume"):
        train(dataclasses.replace(spec, resume=True))


def test_a_run_folder_in_use_is_not_overwritten(spec):
    named = dataclasses.replace(spec, epochs=1, run_dir=spec.output_dir / "mine")
    train(named)
    with pytest.raises(OutputExistsError, match="holds a run already"):
        train(named)


def test_a_folder_that_cannot_be_written_is_refused(spec, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Cannot write"):
        train(dataclasses.replace(spec, output_dir=tmp_path / "file"))


def test_a_loss_that_is_no_number_ends_training_and_keeps_the_epochs_before(spec):
    factors = [1.0]

    class BreakLogits(Silence):
        def end_epoch(self, record, is_best):
            factors[0] = float("nan")

    model = create_model(spec.network, 2)
    model.register_forward_hook(lambda module, inputs, logits: logits * factors[0])
    with pytest.raises(TrainingError, match="In epoch 2 the loss became nan"):
        train(spec, model, BreakLogits())
    kept = load_checkpoint(spec.output_dir / "tiny-test-001" / "last.safetensors", spec.network)
    assert torch.isfinite(kept.model.head.bias).all()
    assert [row["epoch"] for row in records(spec.output_dir / "tiny-test-001")] == [1.0]


def test_the_model_to_start_from_is_left_as_it_was(spec):
    model = random_model(spec.network, 2, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(dataclasses.replace(spec, epochs=1), model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training


def test_a_model_of_other_classes_is_refused(spec, tiny_model):
    with pytest.raises(CheckpointError, match=r"10 classes.*with 2"):
        train(spec, tiny_model)


def test_a_checkpoint_of_other_classes_takes_reset_head(spec, tiny_model, tmp_path):
    path = save_checkpoint(tmp_path / "ten.safetensors", tiny_model)
    with pytest.raises(CheckpointError, match="--reset-head"):
        initial_model(spec, checkpoint=path, pretrained=None, reset_head=False)
    loaded = initial_model(spec, checkpoint=path, pretrained=None, reset_head=True)
    assert loaded.model.head.out_features == 2
    assert torch.equal(loaded.model.norm.weight, tiny_model.norm.weight)


def test_a_checkpoint_of_as_many_but_other_classes_is_refused(spec, tmp_path):
    path = save_checkpoint(tmp_path / "two.safetensors", random_model(spec.network, 2), class_names=("cat", "dog"))
    with pytest.raises(CheckpointError, match=r"cat, dog.*blue, red"):
        initial_model(spec, checkpoint=path, pretrained=None, reset_head=False)


def test_training_leaves_the_callers_random_numbers_alone(spec):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(dataclasses.replace(spec, epochs=1))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"image_size": 100},
        {"optimizer": "adam"},
        {"precision": "int8"},
        {"learning_rate": 0.0},
        {"warmup_epochs": 3.0},
        {"drop_path_rate": 1.0},
        {"label_smoothing": 1.0},
        {"min_crop_area": 0.0},
        {"crop_ratio": 1.5},
        {"workers": -1},
        {"variant": "micro"},
    ],
    ids=str,
)
def test_a_request_that_cannot_be_trained_is_refused(spec, change):
    with pytest.raises(InputError):
        dataclasses.replace(spec, **change)


def test_the_default_learning_rate_is_that_of_the_optimiser(spec):
    assert dataclasses.replace(spec, optimizer="adamw").resolved_learning_rate == 1e-3
    assert dataclasses.replace(spec, optimizer="sgd").resolved_learning_rate == 5e-3


def test_sgd_trains(spec):
    result = train(dataclasses.replace(spec, optimizer="sgd", epochs=3))
    losses = [row["train_loss"] for row in records(result.run_dir)]
    assert losses[-1] < losses[0]


def test_without_the_train_extra_the_error_names_it(spec, monkeypatch):
    for name in ("loop", "writer"):
        monkeypatch.delitem(sys.modules, f"cnx_deploy.training.{name}", raising=False)
        monkeypatch.delattr(f"cnx_deploy.training.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingRequirementError, match=r"pip install .cnx-deploy\[train\]"):
        train(spec)


def test_the_command_prints_one_json_document_and_progress_apart(colours, tmp_path):
    arguments = [str(colours), "--variant", "atto", "--image-size", "32", "--epochs", "1", "--json"]
    done = CliRunner().invoke(train_command, [*arguments, "--output-dir", str(tmp_path)])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"] == str(tmp_path / "atto-001" / "best.safetensors")
    assert len(done.stderr.splitlines()) == 5  # the classes, and one epoch
    assert "Epoch 1/1: loss" in done.stderr


def test_the_command_exits_130_on_ctrl_c_and_resumes(colours, tmp_path, monkeypatch):
    class PressCtrlC(TerminalProgress):
        def end_epoch(self, record, is_best):
            super().end_epoch(record, is_best)
            signal.raise_signal(signal.SIGINT)

    arguments = [
        str(colours),
        "--variant",
        "atto",
        "--image-size",
        "32",
        "--epochs",
        "2",
        "--output-dir",
        str(tmp_path),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("cnx_deploy.cli.training_progress.TerminalProgress", PressCtrlC)
        stopped = CliRunner().invoke(train_command, arguments)
    assert stopped.exit_code == 130
    assert "same command and --resume" in stopped.stderr
    resumed = CliRunner().invoke(train_command, [*arguments, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    assert "Epoch 2/2" in resumed.stderr
    assert "Epoch 1/2" not in resumed.stderr


@pytest.mark.slow
def test_atto_learns_the_digits_to_98_percent_in_ten_epochs(tmp_path):
    digits = tmp_path / "digits"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_digits.py", digits], check=True, capture_output=True)
    request = TrainingSpec(digits, "atto", tmp_path / "runs", epochs=10, image_size=64, flip=False)
    torch.set_num_threads(cpu_count())
    result = train(request)
    assert result.best_top1_percent >= 98.0
