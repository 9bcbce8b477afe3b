"""Images that tests train on: learnt within a few steps, small enough for one core."""

from pathlib import Path

import torch
from PIL import Image

from cnx_deploy.data import image_like_batches


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
