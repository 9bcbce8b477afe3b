"""Images that tests train on, learnt within a few steps and small enough for one core; what a run of them has left."""

import csv
import os
import signal
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from cnx_deploy.data import image_like_batches
from cnx_deploy.training.records import CONDITIONS, Progress, StepReport

Weights = dict[str, torch.Tensor]


def write_colours(root: Path, train: int = 12, val: int = 4, side: int = 40) -> Path:
    """Reddish and bluish noise in train/ and val/, so many images a class."""
    for split, count in (("train", train), ("val", val)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            pixels = torch.cat(list(image_like_batches(count, side, batch_size=count, seed=channel + count))) // 2
            pixels[..., channel] += 100
            for index, image in enumerate(pixels):
                Image.fromarray(image.numpy()).save(folder / f"{index}.png")
    return root


def rows(run_dir: Path) -> list[dict[str, str]]:
    """The table of a run."""
    with (run_dir / "metrics.csv").open() as stream:
        return list(csv.DictReader(stream))


def table(run_dir: Path) -> list[dict[str, str]]:
    """The same without how long each epoch took."""
    return [{name: value for name, value in row.items() if name not in CONDITIONS} for row in rows(run_dir)]


def difference(first: Weights | Path, second: Weights | Path) -> float:
    """Largest absolute difference of two files or sets of weights of the same names."""
    one, two = (load_file(weights) if isinstance(weights, Path) else weights for weights in (first, second))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


class InterruptIn(Progress):
    """Presses Ctrl-C in an epoch; notes after how many epochs a run begins."""

    def __init__(self, epoch: int | None = None) -> None:
        self.epoch = epoch
        self.begun_after: list[int] = []

    def begin(self, epochs: int, steps_per_epoch: int, epochs_done: int) -> None:
        self.begun_after.append(epochs_done)

    def step(self, report: StepReport) -> None:
        if report.epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGINT)
