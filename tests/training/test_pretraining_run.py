"""A pre-training run: its data, its files, what interrupts it, and what goes on from it."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file

from cnx_deploy.cli.pretrain import PretrainingOnTerminal
from cnx_deploy.cli.pretrain import pretrain as pretrain_command
from cnx_deploy.cli.train import train as train_command
from cnx_deploy.core.errors import (
    CheckpointError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
    TrainingError,
)
from cnx_deploy.data import ImageFiles
from cnx_deploy.model.checkpoint import load_checkpoint, resolve_model
from cnx_deploy.training import TrainingSpec, initial_model, train
from cnx_deploy.training.augmentation import ImageAugmentation
from cnx_deploy.training.fcmae import (
    PretrainingSpec,
    SilentPretraining,
    create_autoencoder,
    divide_images,
    find_images_below,
    load_autoencoder,
    pretrain,
    readable_images,
)
from tests.support.foreign_models import randomise
from tests.support.training_data import write_colours

ROOT = Path(__file__).parents[2]
CONDITIONS = ("seconds", "images_per_second")
RATE = 2e-3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """24 images to pre-train on, 2 of them held out; 8 more in val/."""
    return write_colours(tmp_path_factory.mktemp("colours"), side=48)


@pytest.fixture
def spec(colours, tiny_variant, tmp_path):
    return PretrainingSpec(
        colours, tiny_variant, tmp_path / "runs", epochs=2, image_size=64, batch_size=4, learning_rate=RATE
    )


def table(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open() as stream:
        return [{name: each for name, each in row.items() if name not in CONDITIONS} for row in csv.DictReader(stream)]


class InterruptIn(SilentPretraining):
    """Presses Ctrl-C in an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def step(self, report) -> None:
        if report.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def finished(colours, tiny_variant, tmp_path_factory):
    """A run of 2 epochs of 6 steps. Shared: do not change it."""
    runs = tmp_path_factory.mktemp("finished")
    return pretrain(
        PretrainingSpec(colours, tiny_variant, runs, epochs=2, image_size=64, batch_size=4, learning_rate=RATE)
    )


def test_the_loss_falls_in_training_and_on_held_images(finished):
    rows = [{name: float(each) for name, each in row.items()} for row in table(finished.run_dir)]
    assert finished.last_loss < 0.9 * finished.first_loss
    assert rows[1]["held_loss"] < 0.9 * rows[0]["held_loss"]
    assert (finished.first_loss, finished.last_loss) == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    assert finished.best_held_loss == pytest.approx(min(row["held_loss"] for row in rows), rel=1e-5)


def test_a_run_leaves_weights_records_pictures_and_state_and_nothing_else(finished):
    assert finished.run_dir.name == "tiny-test-fcmae-001"
    assert {path.relative_to(finished.run_dir).as_posix() for path in finished.run_dir.rglob("*")} == {
        "best.safetensors",
        "last.ckpt",
        "last.safetensors",
        "metrics.csv",
        "previous.ckpt",
        "reconstructions",
        "reconstructions/epoch-0001.png",
        "reconstructions/epoch-0002.png",
        "run.json",
    }
    assert list(table(finished.run_dir)[0]) == ["epoch", "loss", "held_loss", "learning_rate"]
    request = json.loads((finished.run_dir / "run.json").read_text())
    assert (request["train_images"], request["held_images_taken"]) == (22, 2)
    assert request["resolved"]["hidden_patches"] == 2


def test_the_encoder_is_written_without_a_head_and_takes_a_new_one(finished, tiny_variant):
    assert not any(name.startswith(("head.", "norm.", "decoder.")) for name in load_file(finished.last))
    loaded = load_checkpoint(finished.last, tiny_variant, num_classes=3, reset_head=True)
    assert loaded.model.head.out_features == 3
    assert (loaded.weights.licence, loaded.preprocessing["image_size"]) == ("MIT", 64)
    with pytest.raises(CheckpointError, match=r"no classification head.*--reset-head"):
        resolve_model(tiny_variant, checkpoint=finished.last)


def test_training_goes_on_from_the_encoder(finished, colours, tiny_variant, tmp_path):
    spec = TrainingSpec(colours, tiny_variant, tmp_path / "runs", epochs=1, image_size=32, batch_size=8)
    loaded = initial_model(spec, checkpoint=finished.best, reset_head=True)
    written = load_file(finished.best)
    assert all(torch.equal(each, written[name]) for name, each in loaded.model.state_dict().items() if name in written)
    assert train(spec, loaded.model).epochs_run == 1


def test_the_state_holds_the_autoencoder_that_the_weights_are_of(finished, tiny_variant):
    model, source = load_autoencoder(finished.run_dir / "last.ckpt", tiny_variant)
    assert source.notes == ("layout fcmae", "the decoder is the file's")
    written = load_file(finished.last)
    assert written.keys() == model.encoder.state_dict().keys()
    assert all(torch.equal(each, written[name]) for name, each in model.encoder.state_dict().items())


@pytest.mark.slow
def test_the_same_request_gives_the_same_weights_whatever_the_workers(spec, finished):
    torch.manual_seed(11)
    again = pretrain(dataclasses.replace(spec, workers=1))
    first, second = load_file(finished.last), load_file(again.last)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert table(finished.run_dir) == table(again.run_dir)


def test_another_seed_gives_other_masks_and_losses(spec, finished):
    other = pretrain(dataclasses.replace(spec, seed=1, epochs=1))
    assert table(other.run_dir)[0]["loss"] != table(finished.run_dir)[0]["loss"]


@pytest.mark.parametrize("epoch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_interrupted_run_resumes_to_what_it_would_have_been(spec, finished, epoch):
    interrupted = pretrain(spec, progress=InterruptIn(epoch))
    assert (interrupted.interrupted, interrupted.epochs_run) == (True, epoch - 1)
    resumed = pretrain(dataclasses.replace(spec, resume=True))
    assert (resumed.run_dir, resumed.interrupted) == (interrupted.run_dir, False)
    assert table(resumed.run_dir) == table(finished.run_dir)
    expected, found = load_file(finished.last), load_file(resumed.last)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


KILLED = """
import sys
from pathlib import Path
from cnx_deploy.training.fcmae import PretrainingSpec, SilentPretraining, pretrain
from cnx_deploy.core.variants import Variant
class Tell(SilentPretraining):
    def step(self, report): print(report.epoch, flush=True)
variant = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
pretrain(PretrainingSpec(Path(sys.argv[1]), variant, run_dir=Path(sys.argv[2]), epochs=2, image_size=64, batch_size=4,
                         learning_rate=2e-3), progress=Tell())
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_train_resume_exact_of_pre_training_after_a_kill(spec, colours, finished, tmp_path, delay):
    script = tmp_path / "pretrain.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, colours, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    while process.stdout.readline().strip() != "2":
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    resumed = pretrain(dataclasses.replace(spec, run_dir=tmp_path / "run", resume=True))
    assert table(resumed.run_dir) == table(finished.run_dir)


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from cnx_deploy.training.fcmae import PretrainingSpec, pretrain
from cnx_deploy.training import launch_from_environment
from cnx_deploy.core.variants import Variant
variant = Variant("tiny-test", (1, 1, 2, 1), (8, 16, 32, 64), 138_104, 0.0)
launch = launch_from_environment(os.environ)
pretrain(PretrainingSpec(Path(sys.argv[1]), variant, run_dir=Path(sys.argv[2]), epochs=3, image_size=64,
                         learning_rate=1e-3, batch_size=4 // launch.processes, accumulate=2, launch=launch))
"""


@pytest.mark.slow
def test_train_ddp_equals_single_in_pre_training(colours, tmp_path):
    script = tmp_path / "pretrain.py"
    script.write_text(TWO_PROCESSES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command, name in (([sys.executable], "one"), (torchrun, "two")):
        words = [*command, str(script), str(colours), str(tmp_path / name)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(words, check=True, capture_output=True, env=environment, timeout=240)
    for first, second in zip(table(tmp_path / "one"), table(tmp_path / "two"), strict=True):
        expected, found = ({name: float(each) for name, each in row.items()} for row in (first, second))
        assert found == pytest.approx(expected, rel=1e-3)


def test_resuming_a_finished_run_changes_nothing(spec, finished, tmp_path):
    copied = shutil.copytree(finished.run_dir, tmp_path / "copied")
    again = pretrain(dataclasses.replace(spec, run_dir=copied, resume=True))
    assert (again.epochs_run, again.last_loss) == (2, finished.last_loss)
    assert table(copied) == table(finished.run_dir)


@pytest.mark.parametrize("change", [{"epochs": 3}, {"mask_ratio": 0.75}, {"min_crop_area": 0.5}], ids=str)
def test_a_run_is_not_resumed_by_another_request(spec, finished, change):
    with pytest.raises(InputError, match=f"started otherwise: {next(iter(change))}"):
        pretrain(dataclasses.replace(spec, run_dir=finished.run_dir, resume=True, **change))


def test_a_run_folder_in_use_is_not_overwritten(spec, finished):
    with pytest.raises(OutputExistsError, match="holds a run already"):
        pretrain(dataclasses.replace(spec, run_dir=finished.run_dir))


def test_a_run_starts_from_an_autoencoder_and_leaves_it_as_it_was(spec):
    model = randomise(create_autoencoder(spec.network))
    before = {name: each.clone() for name, each in model.state_dict().items()}
    slow = dataclasses.replace(spec, epochs=1, learning_rate=1e-9)
    written = load_file(pretrain(slow, model, licence="CC-BY-NC-4.0").last)
    assert all(torch.allclose(each, before[f"encoder.{name}"], atol=1e-6) for name, each in written.items())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_an_autoencoder_of_another_variant_is_refused(spec):
    other = dataclasses.replace(spec.network, name="other", depths=(1, 1, 1, 1))
    with pytest.raises(CheckpointError, match="other, tiny-test was asked for"):
        pretrain(spec, create_autoencoder(other))


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_epochs_before(spec):
    factors = [1.0]

    class BreakPredictions(SilentPretraining):
        def end_epoch(self, record, is_best):
            factors[0] = float("nan")

    model = create_autoencoder(spec.network)
    model.register_forward_hook(lambda module, inputs, predicted: predicted * factors[0])
    with pytest.raises(TrainingError, match="In epoch 2 the loss became nan"):
        pretrain(spec, model, BreakPredictions())
    assert [row["epoch"] for row in table(spec.output_dir / "tiny-test-fcmae-001")] == ["1"]


def test_fp16_without_a_gpu_is_refused(spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingRequirementError, match="expected --precision fp32 or bf16"):
        pretrain(dataclasses.replace(spec, precision="fp16"))


@pytest.mark.slow
def test_bf16_follows_fp32(spec, finished):
    half = pretrain(dataclasses.replace(spec, precision="bf16", epochs=2))
    expected = [float(row["loss"]) for row in table(finished.run_dir)]
    assert [float(row["loss"]) for row in table(half.run_dir)] == pytest.approx(expected, rel=0.02)


def test_the_learning_rate_is_scaled_to_the_images_of_a_step_and_ends_at_zero(spec, finished):
    base = dataclasses.replace(spec, learning_rate=None, batch_size=64, accumulate=8)
    assert base.training.resolved_learning_rate == pytest.approx(1.5e-4 * 512 / 256)
    assert base.training.beta2 == 0.95
    assert (dataclasses.replace(base, epochs=800).resolved_warmup_epochs, base.resolved_warmup_epochs) == (40.0, 0.1)
    rates = [float(row["learning_rate"]) for row in table(finished.run_dir)]
    # The last of 6 steps an epoch, of 12, the first of which is half the warm-up.
    expected = [RATE / 2 * (1 + np.cos(np.pi * step / 11)) for step in (4, 10)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_a_random_crop_is_the_only_augmentation(spec):
    assert [type(step).__name__ for step in ImageAugmentation(spec.training).steps] == ["RandomResizedCrop"]
    assert ImageAugmentation(spec.training).steps[0].scale == (0.2, 1.0)


@pytest.mark.parametrize(
    "change",
    [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"image_size": 32}, {"epochs": 0}, {"held_images": 0},
     {"picture_every": 0}, {"image_size": 100}, {"precision": "int8"}, {"warmup_epochs": 3.0}],
    ids=str,
)  # fmt: skip
def test_a_request_that_cannot_be_pretrained_is_refused(spec, change):
    with pytest.raises(InputError):
        dataclasses.replace(spec, **change)


def write_image(path: Path, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), 90, np.uint8)).save(path)
    return path


def test_images_are_found_at_any_depth_with_or_without_classes(tmp_path):
    expected = {write_image(tmp_path / name) for name in ("flat.png", "cat/1.png", "cat/deep/2.jpg", "val/3.png")}
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    write_image(tmp_path / ".hidden" / "4.png")
    found = find_images_below(tmp_path)
    assert set(found.paths) == expected
    assert found.labels == ()


def test_beside_a_training_folder_validation_and_test_images_are_left_out(tmp_path):
    expected = {write_image(tmp_path / name) for name in ("train/a/1.png", "unlabelled/2.png", "3.png")}
    for name in ("val/a/4.png", "Test/5.png"):
        write_image(tmp_path / name)
    assert set(find_images_below(tmp_path).paths) == expected


@pytest.mark.parametrize(
    "make", [lambda root: root / "absent", lambda root: root, lambda root: write_image(root / "a.png")]
)
def test_a_path_without_images_below_is_refused(tmp_path, make):
    with pytest.raises(InputError, match="expected"):
        find_images_below(make(tmp_path))


def test_dataset_bad_files_are_counted_in_pre_training(tmp_path):
    good = [write_image(tmp_path / f"{number}.png") for number in range(3)]
    (tmp_path / "broken.png").write_bytes(good[0].read_bytes()[:60])
    images, report = readable_images(find_images_below(tmp_path))
    assert (list(images.paths), report.count, len(report.broken)) == (good, 4, 1)
    for path in good:
        path.write_bytes(b"")
    with pytest.raises(InputError, match="None of 4 images can be read"):
        readable_images(find_images_below(tmp_path))


@pytest.mark.parametrize(("count", "asked", "held"), [(2, 64, 1), (30, 64, 3), (30, 2, 2), (1000, 64, 64)])
def test_at_most_a_tenth_is_held_out_and_no_image_is_on_both_sides(count, asked, held):
    paths = tuple(Path(f"{number}.png") for number in range(count))
    divided = divide_images(ImageFiles(paths), asked)
    assert len(divided.held.paths) == held
    assert sorted((*divided.train.paths, *divided.held.paths)) == sorted(paths)


def test_a_single_image_is_not_enough(tmp_path):
    write_image(tmp_path / "1.png")
    with pytest.raises(InputError, match="at least two images"):
        divide_images(find_images_below(tmp_path), 64)


@pytest.fixture
def command(colours, tmp_path):
    return [
        str(colours), "--variant", "atto", "--image-size", "64", "--epochs", "1", "--batch-size", "22",
        "--output-dir", str(tmp_path / "runs"),
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_pretrains_and_train_takes_its_weights(command, colours, tmp_path):
    (tmp_path / "images").mkdir()
    shutil.copytree(colours / "train", tmp_path / "images" / "train")
    (tmp_path / "images" / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n")
    command[0] = str(tmp_path / "images")
    done = CliRunner().invoke(pretrain_command, [*command, "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["best"] == str(tmp_path / "runs" / "atto-fcmae-001" / "best.safetensors")
    assert "1 of 25 images cannot be read and are left out" in done.stderr
    assert "22 images to train on, 2 held out" in done.stderr
    assert "Epoch 1/1: loss" in done.stderr
    words = [str(colours), "--variant", "atto", "--image-size", "32", "--epochs", "1", "--checkpoint", result["best"]]
    trained = CliRunner().invoke(train_command, [*words, "--reset-head", "--output-dir", str(tmp_path / "runs")])
    assert trained.exit_code == 0, trained.stderr
    assert (tmp_path / "runs" / "atto-001" / "best.safetensors").is_file()


@pytest.mark.slow
def test_the_command_exits_130_on_ctrl_c_and_resumes(command, tmp_path, monkeypatch):
    class PressCtrlC(PretrainingOnTerminal):
        def step(self, report):
            super().step(report)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr("cnx_deploy.cli.pretrain.PretrainingOnTerminal", PressCtrlC)
        stopped = CliRunner().invoke(pretrain_command, command)
    assert stopped.exit_code == 130
    assert "same command and --resume" in stopped.stderr
    assert "no epoch finished" in stopped.stdout
    resumed = CliRunner().invoke(pretrain_command, [*command, "--resume"])
    assert resumed.exit_code == 0, resumed.stderr
    assert "Epoch 1/1: loss" in resumed.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["atto-fcmae-001"]


def test_the_command_shows_its_configuration_and_trains_nothing(command, tmp_path):
    done = CliRunner().invoke(pretrain_command, [*command, "--show-config"])
    shown = json.loads(done.stdout)
    assert (shown["learning_rate"], shown["hidden_patches"]) == (pytest.approx(1.5e-4 * 22 / 256), 2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_atto_learns_to_predict_hidden_patches_of_digits(tmp_path):
    digits = tmp_path / "digits"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_digits.py", digits], check=True, capture_output=True)
    spec = PretrainingSpec(digits, "atto", tmp_path / "runs", epochs=5, image_size=64, learning_rate=1e-3)
    result = pretrain(spec)
    assert result.first_loss > 0.7
    assert result.last_loss < 0.55
