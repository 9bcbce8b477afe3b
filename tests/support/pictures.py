"""Pictures of given widths and heights, smooth as photographs are and different in every part."""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def smooth_pictures(sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Coarse noise, enlarged to each width and height."""
    random = np.random.default_rng(seed)
    coarse = [random.integers(0, 256, (5, 7, 3), dtype=np.uint8) for _ in sizes]
    return [
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
        for pixels, size in zip(coarse, sizes, strict=True)
    ]
