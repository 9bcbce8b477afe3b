"""Reconstructions as a picture: one row an image, what it is, what is hidden, and what the decoder makes of it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy.core.files import whole_file
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.training.fcmae.autoencoder import MaskedAutoencoder
from cnx_deploy.training.fcmae.masking import enlarged
from cnx_deploy.training.fcmae.patches import images_of_patches, patch_statistics, patches_of

__all__ = ["PICTURED", "reconstruction_cells", "save_reconstructions"]

PICTURED = 8
"""Rows of a picture."""
GREY = 128
GAP = 4


def save_reconstructions(
    path: Path, model: MaskedAutoencoder, preprocessing: Preprocessing, pixels: Tensor, masks: Tensor
) -> Path:
    """Write a PNG file of `reconstruction_cells`, one row an image, whole or not at all."""
    rows = [np.pad(row, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
            for row in reconstruction_cells(model, preprocessing, pixels, masks).numpy()]  # fmt: skip
    sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)[:-GAP, :-GAP]
    with whole_file(path) as temporary:
        Image.fromarray(sheet).save(temporary)
    return path


def reconstruction_cells(
    model: MaskedAutoencoder, preprocessing: Preprocessing, pixels: Tensor, masks: Tensor
) -> Tensor:
    """(N, S, S, 3) uint8 and (N, h, w) masks -> (N, 4, S, S, 3) uint8.

    The four: the image; the same with hidden patches grey; with them predicted; the prediction alone. The decoder
    predicts normalised patches, so each is given back the mean and deviation of the true one.
    """
    device = model.mask_token.device
    images = normalise(pixels.to(device), preprocessing)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        predicted = model(images, masks.to(device)).float()
    model.train(was_training)
    restored = patch_statistics(patches_of(images)).restore(predicted)
    grid = (masks.shape[1], masks.shape[2])
    alone = _pixels(images_of_patches(restored, grid), preprocessing)
    hidden = enlarged(masks, (pixels.shape[1], pixels.shape[2])).permute(0, 2, 3, 1)  # (N, S, S, 1)
    masked = pixels.masked_fill(hidden, GREY)
    return torch.stack([pixels, masked, torch.where(hidden, alone, pixels), alone], dim=1)


def _pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """(N, 3, S, S) normalised -> (N, S, S, 3) uint8 on the processor."""
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    unit = (images * std + mean).clamp(0.0, 1.0)
    return (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
