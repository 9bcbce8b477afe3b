"""Write scenes of handwritten digits on photographs, with exact masks, for segmentation and for detection.

Photographs are those that scikit-learn and scikit-image carry, digits are scikit-learn's; validation has digits and
parts of the photographs of its own. DIR/images/{train,val} holds pictures, DIR/masks/{train,val} the class of each
pixel, and DIR/annotations/instances_{train,val}.json the digits one by one, as COCO has them. One seed gives the same
bytes. The folder appears whole or not at all; one of the same request is left as it is.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PHOTOGRAPHS = (
    "china.jpg", "flower.jpg", "astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png",
    "camera.png", "coins.png", "brick.png", "grass.png", "gravel.png", "ihc.png", "moon.png",
)  # fmt: skip
SPLIT = 0.7
"""Share of a photograph's width, from the left, that training has; the rest is validation's."""
FORM = 2
"""The version of the scenes that one request gives."""
SIDES = (0.25, 0.55)
"""Height of a digit as a share of the side of a scene."""
DIGITS = (1, 4)
"""Fewest and most in a scene."""
SHAPES = ((1.0, 1.0), (1.0, 1.0), (0.75, 1.0), (1.0, 0.75))
"""Height and width of a scene in sides: half of them are square."""
MOST_HIDDEN = 0.1
"""Share of a digit's ink that later ones may cover."""
CONTRAST = 100.0
"""Least distance in RGB between a digit's colour and the mean of what it lies on."""
PALETTE = (
    (0, 0, 0), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 190),
)  # fmt: skip


def main() -> int:
    """Make the folder; exit code 2 when something else is at its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=600, help="training scenes [600]")
    parser.add_argument("--val", type=int, default=150, help="validation scenes [150]")
    parser.add_argument("--side", type=int, default=96, help="longer side of a scene in pixels [96]")
    parser.add_argument("--classes", choices=("ink", "digits"), default="ink", help="one class for all digits, or ten")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn [0]")
    request = parser.parse_args()
    directory: Path = request.directory
    asked = {name: value for name, value in vars(request).items() if name != "directory"}
    written = {**asked, "form": FORM}
    if directory.exists():
        record = directory / "scenes.json"
        if not record.is_file() or json.loads(record.read_text()) != written:
            parser.error(f"{directory} exists and holds other scenes: remove it or name another")
        print(f"{directory} holds these scenes already.")
        return 0
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        write_scenes(Path(temporary) / "scenes", **asked)
        (Path(temporary) / "scenes" / "scenes.json").write_text(json.dumps(written) + "\n")
        (Path(temporary) / "scenes").rename(directory)
    print(f"Wrote {request.train} training and {request.val} validation scenes to {directory}.")
    return 0


def write_scenes(root: Path, *, train: int, val: int, side: int = 96, classes: str = "ink", seed: int = 0) -> None:
    """Write all files below `root`."""
    names = ["ink"] if classes == "ink" else [str(digit) for digit in range(10)]
    root.mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(["background", *names]) + "\n")
    (root / "annotations").mkdir()
    for split, count in (("train", train), ("val", val)):
        backgrounds, digits = [photograph(name, split) for name in PHOTOGRAPHS], list(digits_of(split))
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(count):
            random = np.random.default_rng((seed, split == "val", index))
            pixels, owners, labels = scene(random, backgrounds, digits, side)
            values = np.array([0, *(1 if classes == "ink" else 1 + label for label in labels)], np.uint8)
            Image.fromarray(pixels).save(root / "images" / split / f"{index:05}.png")
            mask = Image.fromarray(values[owners])
            mask.putpalette([value for colour in PALETTE for value in colour])
            mask.save(root / "masks" / split / f"{index:05}.png")
            height, width = owners.shape
            images.append({"id": index + 1, "file_name": f"{index:05}.png", "height": height, "width": width})
            for number, value in enumerate(values[1:].tolist(), 1):
                known = {"id": len(annotations) + 1, "image_id": index + 1, "category_id": value}
                annotations.append({**known, **outline(owners == number)})
        document = {
            "images": images, "annotations": annotations,
            "categories": [{"id": at, "name": name} for at, name in enumerate(names, 1)],
        }  # fmt: skip
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document) + "\n")


def scene(
    random: np.random.Generator, backgrounds: list[np.ndarray], digits: list[tuple[np.ndarray, int]], side: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Pixels (H, W, 3) uint8; which digit owns each pixel (H, W), from 1, 0 for none; and the digits' labels."""
    height, width = (round(side * share) for share in SHAPES[random.integers(len(SHAPES))])
    pixels = cut_out(random, backgrounds[random.integers(len(backgrounds))], height, width)
    owners, labels = np.zeros((height, width), np.uint8), list[int]()
    for _ in range(random.integers(DIGITS[0], DIGITS[1] + 1)):
        grey, label = digits[random.integers(len(digits))]
        tall = round(side * random.uniform(*SIDES))
        wide = round(tall * random.uniform(0.7, 1.0))
        enlarged = Image.fromarray(grey).resize((wide, tall), Image.Resampling.BICUBIC)
        turned = enlarged.rotate(random.uniform(-20, 20), Image.Resampling.BICUBIC, expand=True)
        ink = np.asarray(turned)[:height, :width] > 127
        top, left = random.integers(height - ink.shape[0] + 1), random.integers(width - ink.shape[1] + 1)
        place = owners[top : top + ink.shape[0], left : left + ink.shape[1]]
        if not ink.any() or is_hidden(owners, place, ink):
            continue
        under = pixels[top : top + ink.shape[0], left : left + ink.shape[1]]
        colour = drawn_colour(random, under[ink].mean(axis=0))
        under[ink] = (colour + random.normal(0.0, 6.0, (int(ink.sum()), 3))).clip(0, 255)
        place[ink] = len(labels) + 1
        labels.append(label)
    return pixels, owners, labels


def is_hidden(owners: np.ndarray, place: np.ndarray, ink: np.ndarray) -> bool:
    """Whether ink at a place would cover more than `MOST_HIDDEN` of a digit that lies there."""
    covered = np.bincount(place[ink], minlength=256)[1:]
    return bool((covered > MOST_HIDDEN * np.bincount(owners.ravel(), minlength=256)[1:]).any())


def cut_out(random: np.random.Generator, photograph: np.ndarray, height: int, width: int) -> np.ndarray:
    """A part of a photograph, at a scale of its own, mirrored or not: (height, width, 3) uint8."""
    least = max(height / photograph.shape[0], width / photograph.shape[1])
    scale = random.uniform(least, max(least, 1.0))
    tall, wide = min(photograph.shape[0], round(height / scale)), min(photograph.shape[1], round(width / scale))
    top, left = random.integers(photograph.shape[0] - tall + 1), random.integers(photograph.shape[1] - wide + 1)
    part = Image.fromarray(photograph[top : top + tall, left : left + wide])
    resized = np.array(part.resize((width, height), Image.Resampling.BICUBIC))
    return resized[:, ::-1].copy() if random.random() < 0.5 else resized


def drawn_colour(random: np.random.Generator, under: np.ndarray) -> np.ndarray:
    """A colour at least `CONTRAST` away from the mean of what it lies on."""
    while True:
        colour = random.uniform(0, 255, 3)
        if np.linalg.norm(colour - under) >= CONTRAST:
            return colour


def outline(mask: np.ndarray) -> dict[str, Any]:
    """Box, area and run lengths of a mask (H, W), as COCO has them."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
    flat = np.concatenate([[0], mask.ravel(order="F").astype(np.int8), [2]])  # begins with a run of 0
    ends = np.flatnonzero(np.diff(flat))
    counts = np.diff(ends, prepend=0).tolist()
    return {
        "bbox": [float(value) for value in box], "area": int(mask.sum()), "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": counts},
    }  # fmt: skip


def digits_of(split: str) -> Iterator[tuple[np.ndarray, int]]:
    """The digits of a split, (8, 8) uint8 with ink at 255, and their labels; every fifth is of validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if (index % 5 == 4) == (split == "val"):
            yield (values * 15.9375).astype(np.uint8), int(label)


def photograph(name: str, split: str) -> np.ndarray:
    """(H, W, 3) uint8 of the split's part of a photograph that one of the packages carries."""
    import skimage.data
    import sklearn.datasets

    folders = Path(sklearn.datasets.__file__).parent / "images", Path(skimage.data.__file__).parent
    path = next(folder / name for folder in folders if (folder / name).is_file())
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    border = round(SPLIT * pixels.shape[1])
    return pixels[:, :border] if split == "train" else pixels[:, border:]


if __name__ == "__main__":
    sys.exit(main())
