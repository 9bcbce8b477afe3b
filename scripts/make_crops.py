"""Write crops of twenty photographs as an image folder, DIR/{train,val}/{photograph}/NNNN.png: which one is it of?

The photographs come with scikit-image and scikit-learn. Each is cut into tiles, of which every third is for validation,
and a crop lies within a tile, so that no pixel is in both. Crops are turned, scaled, brightened or darkened and noisy,
by a fixed seed, and grey: colour would give most of them away. The folder appears whole or not at all.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from make_digits import make_folder

SIDE = 64
TILE = 96
TRAIN, VAL = 240, 60
"""Crops of each photograph."""
SKIMAGE = (
    "astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "clock_motion.png", "coffee.png",
    "coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png",
    "page.png", "retina.jpg", "rocket.jpg", "text.png",
)  # fmt: skip
SKLEARN = ("china.jpg", "flower.jpg")


def main() -> int:
    """Make the folder; exit code 2 when something else is at its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder to make")
    count = (TRAIN + VAL) * (len(SKIMAGE) + len(SKLEARN))
    return make_folder(parser, f"{count} crops", count, write_images)


def write_images(directory: Path) -> None:
    """Write all crops below `directory`."""
    import skimage
    import sklearn

    folders = {skimage: "data", sklearn: "datasets/images"}
    for module, names in ((skimage, SKIMAGE), (sklearn, SKLEARN)):
        for name in names:
            path = Path(str(module.__file__)).parent / folders[module] / name
            write_crops(path, directory, np.random.default_rng(sum(name.encode())))


def write_crops(photograph: Path, directory: Path, chance: np.random.Generator) -> None:
    """Write the crops of one photograph."""
    from PIL import Image

    grey = Image.open(photograph).convert("L")
    tiles: dict[str, list[Any]] = {"train": [], "val": []}
    for row, column in itertools.product(range(grey.height // TILE), range(grey.width // TILE)):
        tile = grey.crop((TILE * column, TILE * row, TILE * (column + 1), TILE * (row + 1)))
        tiles["val" if (row + column) % 3 == 2 else "train"].append(tile)
    for split, count in (("train", TRAIN), ("val", VAL)):
        folder = directory / split / photograph.stem
        folder.mkdir(parents=True)
        for index in range(count):
            tile = tiles[split][index % len(tiles[split])]
            Image.fromarray(crop(tile, chance)).save(folder / f"{index:04}.png")


def crop(part: Any, chance: np.random.Generator) -> np.ndarray[Any, Any]:
    """A turned and scaled window of a picture, (SIDE, SIDE) uint8, brighter or darker and noisy."""
    from PIL import Image

    window = int(min(chance.uniform(0.8, 1.5) * SIDE, part.width, part.height))
    left, top = (int(chance.integers(0, side - window + 1)) for side in part.size)
    square = part.crop((left, top, left + window, top + window)).rotate(90 * int(chance.integers(4)))
    values = np.asarray(square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    values = (values - 128.0) * chance.uniform(0.6, 1.2) + 128.0 + chance.uniform(-30.0, 30.0)
    noisy: np.ndarray[Any, Any] = (values + chance.normal(0.0, 8.0, values.shape)).clip(0, 255).astype(np.uint8)
    return noisy


if __name__ == "__main__":
    sys.exit(main())
