"""`cnx-deploy train` and `cnx-deploy pretrain` from the command line's end."""

import json
import shutil
import signal

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from cnx_deploy.cli.pretrain import pretrain
from cnx_deploy.cli.train import train
from cnx_deploy.cli.training_options import SECTIONS
from cnx_deploy.cli.training_progress import TerminalProgress
from cnx_deploy.core.errors import OutputExistsError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from tests.support.training_data import write_colours

COMMANDS = {
    train: ("--image-size", "32", "--batch-size", "12"),
    pretrain: ("--image-size", "64", "--batch-size", "22"),
}


def invoke(command, data, *more):
    done = CliRunner().invoke(
        command, [str(word) for word in (data, "--variant", "tiny-test", *COMMANDS[command], *more)]
    )
    assert done.exit_code in (0, 130), done.stderr
    return done


def test_train_prints_one_json_document_and_progress_apart(colours, tmp_path):
    done = invoke(train, colours, "--epochs", 1, "--json", "--output-dir", tmp_path)
    result = json.loads(done.stdout)
    assert result["best"] == str(tmp_path / "tiny-test-001" / "best.safetensors")
    assert (result["epochs_run"], result["interrupted"]) == (1, False)
    assert len(done.stderr.splitlines()) == 5  # the classes, and one epoch
    assert "Epoch 1/1: loss" in done.stderr
    assert (tmp_path / "tiny-test-001" / "curves.svg").is_file()


@pytest.mark.parametrize("command", [train, pretrain])
def test_a_folder_with_a_run_is_refused_before_images_are_read(colours, tmp_path, command):
    (tmp_path / "run.json").write_text("{}", encoding="utf-8")
    words = [colours, "--variant", "tiny-test", *COMMANDS[command], "--run-dir", tmp_path]
    done = CliRunner().invoke(command, [str(word) for word in words])
    assert isinstance(done.exception, OutputExistsError)
    assert not done.stderr


@pytest.mark.slow
def test_pretrain_leaves_broken_images_out_and_train_takes_its_weights(colours, tmp_path):
    shutil.copytree(colours / "train", tmp_path / "images" / "train")
    (tmp_path / "images" / "train" / "red" / "broken.png").write_bytes(b"\x89PNG\r\n")
    done = invoke(pretrain, tmp_path / "images", "--epochs", 1, "--json", "--output-dir", tmp_path)
    result = json.loads(done.stdout)
    assert result["best"] == str(tmp_path / "tiny-test-fcmae-001" / "best.safetensors")
    assert "1 of 25 images cannot be read and are left out" in done.stderr
    assert "22 images to train on, 2 held out" in done.stderr
    assert "Epoch 1/1: loss" in done.stderr
    words = ("--epochs", 1, "--checkpoint", result["best"], "--reset-head", "--output-dir", tmp_path)
    assert "Note: new head for 2 classes" in invoke(train, colours, *words).stderr
    assert (tmp_path / "tiny-test-001" / "best.safetensors").is_file()


@pytest.mark.parametrize("command", [train, pytest.param(pretrain, marks=pytest.mark.slow)])
def test_ctrl_c_ends_with_130_and_the_same_command_resumes(colours, tmp_path, monkeypatch, command):
    class PressCtrlC(TerminalProgress):
        def end_epoch(self, record, is_best):
            super().end_epoch(record, is_best)
            signal.raise_signal(signal.SIGINT)

    words = ("--epochs", "2", "--output-dir", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("cnx_deploy.cli.training_progress.TerminalProgress", PressCtrlC)
        stopped = invoke(command, colours, *words)
    assert stopped.exit_code == 130
    assert "same command and --resume" in stopped.stderr
    resumed = invoke(command, colours, *words, "--resume")
    assert resumed.exit_code == 0
    assert "Epoch 2/2: loss" in resumed.stderr
    assert "Epoch 1/2" not in resumed.stderr
    assert len(list(tmp_path.iterdir())) == 1


def test_the_whole_configuration_is_printed_and_nothing_trained(colours, tmp_path):
    words = ("--show-config", "--output-dir", tmp_path)
    shown = json.loads(invoke(train, "nowhere", "--recipe", "fine-tune", "--epochs", 3, *words).stdout)
    assert (shown["recipe"], shown["epochs"], shown["layer_decay"], shown["ema_decay"]) == ("fine-tune", 3, 0.9, 0.9999)
    assert shown["learning_rate"] == pytest.approx(2e-4 * 12 * 16 / 256)
    shown = json.loads(invoke(pretrain, "nowhere", *words).stdout)
    assert (shown["learning_rate"], shown["hidden_patches"]) == (pytest.approx(1.5e-4 * 22 / 256), 2)
    assert list(tmp_path.iterdir()) == []


def test_dataset_bad_files_and_uneven_classes_are_said(tmp_path):
    data = write_colours(tmp_path / "colours", train=22)
    (data / "train" / "red" / "0.png").write_bytes(b"no image")
    for index in range(3, 22):
        (data / "train" / "red" / f"{index}.png").unlink()
    done = invoke(train, data, "--epochs", 1, "--run-dir", tmp_path / "run")
    assert "1 of 33 images cannot be read and are left out" in done.stderr
    assert "red/0.png" in done.stderr
    assert "largest to smallest 11.0:1" in done.stderr
    assert "Warning: The classes are uneven" in done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train_images"] == 24


def test_train_takes_uneven_classes_and_says_what_it_does_and_what_weights_bring(colours, tmp_path):
    uneven = tmp_path / "uneven"
    shutil.copytree(colours, uneven)
    for index in range(1, 12):
        (uneven / "train" / "red" / f"{index}.png").unlink()
    weights = save_checkpoint(
        tmp_path / "half.safetensors",
        random_model("tiny-test", 2),
        preprocessing=Preprocessing(32, std=(0.5, 0.5, 0.5)),
    )
    words = ("--epochs", 1, "--loss", "focal", "--init", weights, "--mean", "0.4,0.5,0.6")
    (tmp_path / "weights.txt").write_text("red=6\nblue=1\n")
    done = invoke(train, uneven, *words, "--class-weights", tmp_path / "weights.txt", "--run-dir", tmp_path / "run")
    assert "Class weights: from 0.722 (blue) to 4.33 (red)" in done.stderr
    assert "Note: pixels have std (0.5, 0.5, 0.5) as the weights do (header); --std would say otherwise" in done.stderr
    assert "Warning" not in done.stderr
    assert "mean recall" in done.stdout
    loaded = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert (loaded.preprocessing.mean, loaded.preprocessing.std) == ((0.4, 0.5, 0.6), (0.5, 0.5, 0.5))
    assert loaded.training == {"class_weights": {"red": 6.0, "blue": 1.0}, "loss": "focal", "focal_gamma": 2.0}


def test_the_help_of_train_puts_every_option_under_a_heading():
    text = CliRunner().invoke(train, ["--help"]).stdout
    assert {name for name in SECTIONS if f"\n{name}:\n" in text} == SECTIONS.keys()
    listed = [name for names in SECTIONS.values() for name in names]
    known = {parameter.name for parameter in train.params if isinstance(parameter, click.Option)}
    assert sorted(listed) == sorted(known - {"as_json"})
    assert "DATA" not in text.partition("Network:")[2]
    assert text.index("Loss and uneven classes:") < text.index("--class-weights") < text.index("Computation:")


def test_what_is_left_out_and_missing_and_nearly_black_is_said_and_the_white_level_is_kept_for_later(tmp_path):
    data = write_colours(tmp_path / "colours", train=4)
    shutil.rmtree(data / "val" / "red")
    (data / "train" / "blue" / "label.xml").write_text("<a/>")
    for path in data.glob("*/*/*.png"):
        grey = np.asarray(Image.open(path).convert("L"))
        Image.fromarray(np.round(grey * (1023 / 255)).astype(np.uint16)).save(path)
    done = invoke(train, data, "--epochs", 1, "--run-dir", tmp_path / "run")
    assert f"{data / 'train' / 'blue'}: 1 of 5 files left out: 1 .xml (label.xml)." in done.stderr
    assert "1 class has no validation images: red" in done.stderr
    assert done.stderr.count("--white-level 1023") == 1
    done = invoke(train, data, "--epochs", 1, "--run-dir", tmp_path / "bright", "--white-level", 1023)
    assert "--white-level" not in done.stderr
    recorded = [load_checkpoint(tmp_path / name / "best.safetensors").preprocessing for name in ("run", "bright")]
    assert [preprocessing.white_level for preprocessing in recorded] == [None, 1023]
    assert load_checkpoint(tmp_path / "run" / "best.safetensors").class_names == ("blue", "red")
