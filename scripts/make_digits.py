"""Write scikit-learn's 1,797 handwritten digits as an image folder: DIR/{train,val}/{0..9}/NNNN.png.

Each 8×8 image becomes 64×64 pixels of grey; every class is split 80/20 by a fixed seed. The folder appears whole or
not at all; one that is complete already is left as it is.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

SIDE = 64
COUNT = 1797
FULL_SCALE = 16.0
"""scikit-learn's digits count dark pixels of a 4×4 field: 0 to 16."""


def main() -> int:
    """Make the folder; exit code 2 when something else is at its place."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder to make")
    return make_folder(parser, f"{COUNT} digits", COUNT, write_images)


def make_folder(parser: argparse.ArgumentParser, what: str, count: int, write: Callable[[Path], None]) -> int:
    """Have `count` images written below the folder that the command line names, unless they are there."""
    directory: Path = parser.parse_args().directory
    found = len(list(directory.glob("*/*/*.png")))
    if directory.exists() and found != count:
        parser.error(f"{directory} exists with {found} images, not the {what}: remove it or name another")
    if directory.exists():
        print(f"{directory} holds the {what} already.")
        return 0
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary:
        write(Path(temporary) / "images")
        (Path(temporary) / "images").rename(directory)
    print(f"Wrote {what} to {directory}.")
    return 0


def write_images(directory: Path) -> None:
    """Write all images below `directory`, named by their place in scikit-learn's order."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    _, val = train_test_split(range(COUNT), test_size=0.2, random_state=0, stratify=digits.target)
    held_out = set(val)
    for index, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = directory / ("val" if index in held_out else "train") / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray((values * (255.0 / FULL_SCALE)).round().astype("uint8"))
        grey.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{index:04}.png")


if __name__ == "__main__":
    sys.exit(main())
