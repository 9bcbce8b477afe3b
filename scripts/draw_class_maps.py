"""Draw docs/plots/class-maps.png: a network learns to name the colour of one disc, and is shown pictures with two.

    python scripts/draw_class_maps.py FOLDER  # pictures, run and maps go there; a few minutes on a CPU

Nobody tells the network where the disc is. Its maps for two classes lie on the two discs.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import cnx_deploy as cnx
from cnx_deploy.core.variants import Variant, register_variant

COLOURS = {"red": (220, 70, 60), "green": (70, 180, 80), "blue": (70, 110, 220), "yellow": (230, 200, 60)}
PAIRS = (("red", "blue"), ("green", "yellow"), ("blue", "green"))
SIDE, PLOT = 160, Path(__file__).parents[1] / "docs" / "plots" / "class-maps.png"


def clouds(random: np.random.Generator) -> Image.Image:
    """Grey noise with the spectrum of photographs."""
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None]).clip(1 / SIDE)
    field = np.fft.irfft2(np.fft.rfft2(random.standard_normal((SIDE, SIDE))) / frequency, s=(SIDE, SIDE))
    grey = (128 + 35 * field / field.std()).clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def add_disc(image: Image.Image, colour: str, random: np.random.Generator, columns: tuple[int, int]) -> None:
    """Draw a disc of random size whose middle is in these columns."""
    radius = int(random.integers(16, 28))
    x = int(random.integers(max(radius, columns[0]), min(SIDE - radius, columns[1])))
    y = int(random.integers(radius, SIDE - radius))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])


def main(folder: Path) -> None:
    """Make the pictures, train, draw the maps of those with two discs, and put them below each other."""
    random = np.random.default_rng(0)
    for split, count in (("train", 100), ("val", 20)):
        for colour in COLOURS:
            (folder / "discs" / split / colour).mkdir(parents=True)
            for index in range(count):
                image = clouds(random)
                add_disc(image, colour, random, (0, SIDE))
                image.save(folder / "discs" / split / colour / f"{index:03d}.png")
    (folder / "pairs").mkdir()
    for left, right in PAIRS:
        image = clouds(random)
        add_disc(image, left, random, (30, 60))
        add_disc(image, right, random, (100, 130))
        image.save(folder / "pairs" / f"{left}-{right}.png")
    register_variant(Variant("small", (1, 1, 2, 1), (24, 48, 96, 192), 0, None))
    options = {"image_size": SIDE, "epochs": 6, "batch_size": 16, "flip": False, "min_crop_area": 1.0, "seed": 0}
    run = cnx.train(
        folder / "discs", "small", learning_rate=2e-3, label_smoothing=0.0, run_dir=folder / "run", **options
    )
    print(f"{run.best_top1_percent:.1f} % of the pictures with one disc are right")
    with cnx.load(folder / "run" / "best.safetensors", outputs=("logits", "class-maps")) as model:
        drawn = model.explain(sorted((folder / "pairs").iterdir()), folder / "maps", top=2)
    pictures = [Image.open(path).convert("RGB") for path in drawn]
    plot = Image.new("RGB", (max(each.width for each in pictures), sum(each.height for each in pictures)), "white")
    top = 0
    for picture in pictures:
        plot.paste(picture, (0, top))
        top += picture.height
    plot.quantize(128).save(PLOT, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
