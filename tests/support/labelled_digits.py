"""Handwritten digits of scikit-learn with several labels each: small, real, and learnt within seconds."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

LABELS = {"even": {0, 2, 4, 6, 8}, "above six": {7, 8, 9}, "prime": {2, 3, 5, 7}, "hole": {0, 6, 8, 9}}


def write_digits(root: Path, count: int = 240, side: int = 32) -> Path:
    """A table of image files, their labels and a split; every fourth image is of validation. 1 has no label."""
    digits = load_digits()
    root.mkdir(parents=True, exist_ok=True)
    with (root / "digits.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["path", "labels", "split"])
        for index in range(count):
            pixels = np.asarray(Image.fromarray((digits.images[index] * 15.9).astype(np.uint8)).resize((side, side)))
            Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(root / f"{index}.png")
            labels = [name for name, members in LABELS.items() if digits.target[index] in members]
            rows.writerow([f"{index}.png", ";".join(labels), "val" if index % 4 == 3 else "train"])
    return root / "digits.csv"
