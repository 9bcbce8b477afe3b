"""Images made from a seed, for measurements that need no photographs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["image_like_batches"]


def image_like_batches(count: int, image_size: int, *, batch_size: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield (N, S, S, 3) uint8 batches, `count` images in all, drawn from `seed` and alike for every `batch_size`.

    Each image is coloured noise with the 1/f spectrum of photographs, of its own brightness and contrast, under
    shapes with sharp edges; each reaches both 0 and 255.
    """
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        yield torch.stack([_image_like(image_size, np.random.default_rng((seed, index))) for index in indices])


def _image_like(side: int, random: np.random.Generator) -> Tensor:
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # no constant part: the brightness below is the mean
    spectrum = np.fft.rfft2(random.standard_normal((3, side, side))) / frequency
    field = np.einsum("oc,chw->hwo", random.standard_normal((3, 3)) + 1.0, np.fft.irfft2(spectrum, s=(side, side)))
    canvas = random.uniform(0.3, 0.7) + random.uniform(0.05, 0.3) * field / field.std()
    rows, columns = np.mgrid[:side, :side] / side
    colours: Sequence[Any] = [*random.uniform(0.0, 1.0, (4, 3)), 0.0, 1.0]  # black and white last, so both are seen
    for colour in colours:
        (top, left), (height, width) = random.uniform(0.0, 0.9, 2), random.uniform(0.04, 0.3, 2)
        down, along = np.abs(rows - top) / height, np.abs(columns - left) / width
        inside = down**2 + along**2 < 1 if random.random() < 0.5 else np.maximum(down, along) < 1
        canvas[inside] = colour
    return torch.from_numpy((canvas.clip(0.0, 1.0) * 255.0).round().astype(np.uint8))
