"""The masked autoencoder: an encoder that sees visible patches, a light decoder that predicts the hidden ones.

The encoder is the training form's own layers, with dense convolutions and masks between them. That equals submanifold
sparse convolution, in which hidden positions do not exist: a window of the stem or of a downsampling lies within one
patch, so only the depthwise convolutions and GRN's statistics look across patches.

Source: Woo et al., arXiv:2301.00808, section 3.1 (decoder of one block, width 512). "The binary masking is numerically
identical to sparse conv": facebookresearch/ConvNeXt-V2, TRAINING.md. The decoder's parameters have the names and shapes
of the reference code (models/fcmae.py), so its files can be read.
"""

import copy
import dataclasses
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from cnx_deploy.core.errors import CheckpointError, InputError
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.image_size import STRIDE
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.model.layers import Block
from cnx_deploy.model.layouts import difference_table, shape_differences
from cnx_deploy.model.weight_files import read_weight_file
from cnx_deploy.training.fcmae.masking import enlarged, images_of_patches, normalised_patches

__all__ = ["MaskedAutoencoder", "create_autoencoder", "load_autoencoder", "masked_features", "reconstruction_cells",
           "save_reconstructions"]  # fmt: skip

DECODER_WIDTH = 512
ENCODER = "encoder."
GREY = 128
"""Of hidden patches in a picture."""
GAP = 4
"""Pixels between the cells of a picture."""


def masked_features(encoder: ConvNeXtV2, images: Tensor, masks: Tensor) -> list[Tensor]:
    """Compute the features of each stage from visible patches; they are zero where hidden.

    No value of a hidden pixel, not even NaN, is in the result. Without anything hidden these are the features of the
    ordinary forward pass.

    Args:
        encoder: Network of either version; its head is not used.
        images: (N, C, H, W), normalised.
        masks: (N, H/32, W/32), True where hidden.

    Raises:
        InputError: The masks are not of the images' patches.
    """
    if any(side % STRIDE for side in images.shape[-2:]):
        raise InputError(f"Masked images need sides that {STRIDE} divides, not {tuple(images.shape[-2:])}.")
    conv, norm = encoder.stem_layers()
    features = norm(conv(images))
    downsamplings = encoder.downsampling_layers()
    stages: list[Tensor] = []
    for blocks in encoder.stage_blocks():
        if stages:
            norm, conv = downsamplings[len(stages) - 1]
            features = conv(norm(features))
        hidden = enlarged(masks, (features.shape[-2], features.shape[-1]))  # (N, 1, h, w)
        features = _hide(features, hidden)
        for block in blocks:
            features = _hide(_masked_block(block, features, hidden), hidden)
        stages.append(features)
    return stages


def _masked_block(block: Block, features: Tensor, hidden: Tensor) -> Tensor:
    """One block of either version: V2 has GRN, V1 has LayerScale (`gamma`) in its place."""
    last = block.dwconv(features).permute(0, 2, 3, 1)  # (N, h, w, C)
    wide = block.act(block.pwconv1(block.norm(last)))  # (N, h, w, 4C)
    # The depthwise convolution spreads visible values to hidden positions, which GRN would count.
    branch = block.pwconv2(block.grn(_hide(wide, hidden.permute(0, 2, 3, 1))))
    if block.gamma is not None:
        branch = block.gamma * branch
    output: Tensor = features + block.drop_path(branch.permute(0, 3, 1, 2))
    return output


def _hide(features: Tensor, hidden: Tensor) -> Tensor:
    """Zero where hidden; a product with zero would keep NaN and infinity."""
    return features.masked_fill(hidden, 0.0)


class MaskedAutoencoder(nn.Module):
    """Predicts the hidden patches of images.

    Shape: (N, C, H, W) normalised images and (N, H/32, W/32) masks, True where hidden -> (N, L, C · 1024) values of all
    patches, normalised as `masking.normalised_patches` has it. The encoder is a copy of which no parameter belongs to
    classification: it has neither the head nor the norm before it.
    """

    def __init__(self, encoder: ConvNeXtV2) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(encoder)
        self.encoder.norm = cast(nn.LayerNorm, nn.Identity())
        self.encoder.head = cast(nn.Linear, nn.Identity())
        self.encoder.num_classes = 0
        self.proj = nn.Conv2d(encoder.variant.dims[-1], DECODER_WIDTH, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, DECODER_WIDTH, 1, 1))
        self.decoder = nn.Sequential(Block(DECODER_WIDTH))
        self.pred = nn.Conv2d(DECODER_WIDTH, encoder.in_chans * STRIDE * STRIDE, kernel_size=1)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Predict; see the class for shapes."""
        encoded = self.proj(masked_features(self.encoder, images, masks)[-1])  # (N, 512, h, w)
        filled = torch.where(masks.unsqueeze(1), self.mask_token.to(encoded.dtype), encoded)
        predicted: Tensor = self.pred(self.decoder(filled))
        return predicted.flatten(2).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def create_autoencoder(variant: Variant | str, *, seed: int = 0, in_chans: int = 3) -> MaskedAutoencoder:
    """Draw an autoencoder from `seed`, the caller's random numbers left alone: truncated normal (0.02), zero biases.

    The reference code draws the decoder, the linear layers and the depthwise kernels with deviation 1, which is what
    its initialiser does when no deviation is given; here all are as in the classifier.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedAutoencoder(create_model(variant, 1, in_chans=in_chans))


def load_autoencoder(
    path: Path,
    variant: Variant | str | None = None,
    *,
    seed: int = 0,
    ema: bool | None = None,
    entry: str | None = None,
    in_chans: int | None = None,
) -> tuple[MaskedAutoencoder, LoadedModel]:
    """Read an encoder from a file of any known layout, and the decoder where the file is an autoencoder's.

    Else the decoder is drawn from `seed`. What is known of the weights comes along, and its notes say which it was.
    `ema` and `entry` choose among several networks, see `model.weight_files`.

    Raises:
        CheckpointError: The encoder or a part of the decoder does not fit; see `model.checkpoint`.
    """
    loaded = load_checkpoint(path, variant, num_classes=1, reset_head=True, ema=ema, entry=entry, in_chans=in_chans)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MaskedAutoencoder(loaded.model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ENCODER)}
    file = read_weight_file(path, ema=ema, entry=entry)
    is_autoencoder = any(name.startswith(ENCODER + "downsample_layers.") for name in file.tensors)
    parts = {name.partition(".")[0] for name in expected} if is_autoencoder else set()
    decoder = {name: tensor for name, tensor in file.tensors.items() if name.partition(".")[0] in parts}
    if decoder and (differences := shape_differences(decoder, expected)):
        raise CheckpointError(
            f"{path} has a decoder that does not fit: expected one block of width {DECODER_WIDTH}. Leave it out of the "
            f"file to start from the encoder alone.\n{difference_table(differences)}"
        )
    model.load_state_dict(decoder, strict=False)
    notes = (loaded.notes[0], *file.notes, "the decoder is the file's" if decoder else "new decoder, drawn at random")
    return model, dataclasses.replace(loaded, notes=notes)


# --- pictures ---------------------------------------------------------------------------------------------------------


def save_reconstructions(
    path: Path, model: MaskedAutoencoder, preprocessing: Preprocessing, pixels: Tensor, masks: Tensor
) -> Path:
    """Write a PNG file of `reconstruction_cells`, one row an image, whole or not at all."""
    cells = reconstruction_cells(model, preprocessing, pixels, masks).flatten(0, 1).permute(0, 3, 1, 2)
    cells = cells[:, :3] if cells.shape[1] > 2 else cells[:, :1].expand(-1, 3, -1, -1)  # what a PNG file shows
    sheet = make_grid(cells, nrow=4, padding=GAP, pad_value=255)[:, GAP:-GAP, GAP:-GAP]
    with whole_file(path) as temporary:
        Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(temporary)
    return path


def reconstruction_cells(
    model: MaskedAutoencoder, preprocessing: Preprocessing, pixels: Tensor, masks: Tensor
) -> Tensor:
    """(N, S, S, C) uint8 and (N, h, w) masks -> (N, 4, S, S, C) uint8.

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
    _, means, deviations = normalised_patches(images)
    restored = images_of_patches(predicted * deviations + means, (masks.shape[1], masks.shape[2]))
    mean, std = (restored.new_tensor(values).view(1, -1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    unit = (restored * std + mean).clamp(0.0, 1.0)
    alone = (unit * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
    hidden = enlarged(masks, (pixels.shape[1], pixels.shape[2])).permute(0, 2, 3, 1)  # (N, S, S, 1)
    return torch.stack([pixels, pixels.masked_fill(hidden, GREY), torch.where(hidden, alone, pixels), alone], dim=1)
