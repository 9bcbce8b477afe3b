"""Images that tests train on, learnt within a few steps and small enough for one core; what a run of them has left."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
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


def write_squares(root: Path, train: int = 24, val: int = 6, side: int = 64) -> Path:
    """Red and blue squares on grey noise with their masks, classes 1 and 2; every second picture is wide."""
    for split, count in (("train", train), ("val", val)):
        for index in range(count):
            random = np.random.default_rng((count, index))
            size = (side, side) if index % 2 else (3 * side // 4, side)
            pixels = random.integers(60, 120, (*size, 1)).repeat(3, axis=2)
            mask = np.zeros(size, np.uint8)
            for label, channel in ((1, 0), (2, 2)):
                top, left = (int(random.integers(limit - 24)) for limit in size)
                mask[top : top + 24, left : left + 24] = label
                pixels[top : top + 24, left : left + 24] = np.eye(3, dtype=np.int64)[channel] * 200 + 20
            for kind, values in (("images", pixels.astype(np.uint8)), ("masks", mask)):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / kind / split / f"{index:03}.png")
    (root / "classes.txt").write_text("ground\nred\nblue\n")
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
