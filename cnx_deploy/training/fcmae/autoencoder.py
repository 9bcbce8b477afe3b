"""The masked autoencoder: an encoder that sees visible patches, a light decoder that predicts the hidden ones.

Source: Woo et al., arXiv:2301.00808, section 3.1 (decoder of one block, width 512). The decoder's parameters have the
names and shapes of the reference code (facebookresearch/ConvNeXt-V2, models/fcmae.py), so its files can be read.
"""

import copy
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from cnx_deploy.core.errors import CheckpointError
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, create_model
from cnx_deploy.model.layers import Block
from cnx_deploy.model.layouts import WRAPPERS, difference_table, shape_differences
from cnx_deploy.model.weight_files import read_weight_file
from cnx_deploy.training.fcmae.encoder import masked_features
from cnx_deploy.training.fcmae.patches import PATCH_VALUES

__all__ = ["DECODER_WIDTH", "MaskedAutoencoder", "create_autoencoder", "load_autoencoder", "without_head"]

DECODER_WIDTH = 512
ENCODER = "encoder."
WRAPPED = f"^(?:{'|'.join(map(re.escape, WRAPPERS))})+"


class MaskedAutoencoder(nn.Module):
    """Predicts the hidden patches of images.

    Shape: (N, 3, H, W) normalised images and (N, H/32, W/32) masks, True where hidden -> (N, L, 3072) values of all
    patches, normalised as `patches.patch_statistics` has it. The encoder is a copy without a head.
    """

    def __init__(self, encoder: ConvNeXtV2) -> None:
        super().__init__()
        self.encoder = without_head(encoder)
        self.proj = nn.Conv2d(encoder.variant.dims[-1], DECODER_WIDTH, kernel_size=1)
        self.mask_token = nn.Parameter(torch.zeros(1, DECODER_WIDTH, 1, 1))
        self.decoder = nn.Sequential(Block(DECODER_WIDTH))
        self.pred = nn.Conv2d(DECODER_WIDTH, PATCH_VALUES, kernel_size=1)
        for part in (self.proj, self.decoder, self.pred):
            part.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, masks: Tensor) -> Tensor:
        """Predict; see the class for shapes."""
        encoded = self.proj(masked_features(self.encoder, images, masks)[-1])  # (N, 512, h, w)
        filled = torch.where(masks.unsqueeze(1), self.mask_token.to(encoded.dtype), encoded)
        predicted: Tensor = self.pred(self.decoder(filled))
        return predicted.flatten(2).transpose(1, 2)


def without_head(model: ConvNeXtV2) -> ConvNeXtV2:
    """A copy of which no parameter belongs to classification: neither the head nor the norm before it."""
    encoder = copy.deepcopy(model)
    encoder.norm = cast(nn.LayerNorm, nn.Identity())
    encoder.head = cast(nn.Linear, nn.Identity())
    encoder.num_classes = 0
    return encoder


def create_autoencoder(variant: Variant | str, *, seed: int = 0) -> MaskedAutoencoder:
    """Freshly initialised from `seed`, the caller's random numbers left alone: truncated normal (0.02), zero biases.

    The reference code draws the decoder, the linear layers and the depthwise kernels with deviation 1, which is what
    its initialiser does when no deviation is given; here all are as in the classifier.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedAutoencoder(create_model(variant, 1))


def load_autoencoder(
    path: Path, variant: Variant | str | None = None, *, seed: int = 0
) -> tuple[MaskedAutoencoder, LoadedModel]:
    """Read an encoder from a file of any known layout, and the decoder where the file is an autoencoder's.

    Else the decoder is drawn from `seed`. What is known of the weights comes along, and its notes say which it was.
    Raises CheckpointError when the encoder or a part of the decoder does not fit; see `model.checkpoint`.
    """
    loaded = load_checkpoint(path, variant, num_classes=1, reset_head=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MaskedAutoencoder(loaded.model)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(ENCODER)}
    decoder = _decoder_of(read_weight_file(path).tensors, {name.partition(".")[0] for name in expected})
    if decoder and (differences := shape_differences(decoder, expected)):
        raise CheckpointError(
            f"{path} has a decoder that does not fit: expected one block of width {DECODER_WIDTH}. Leave it out of the "
            f"file to start from the encoder alone.\n{difference_table(differences)}"
        )
    model.load_state_dict(decoder, strict=False)
    notes = (loaded.notes[0], "the decoder is the file's" if decoder else "new decoder, drawn at random")
    return model, dataclasses.replace(loaded, notes=notes)


def _decoder_of(tensors: Mapping[str, Tensor], parts: set[str]) -> dict[str, Tensor]:
    """The decoder's tensors without what training wrappers put before every name; none in other files."""
    bare = {re.sub(WRAPPED, "", name): tensor for name, tensor in tensors.items()}
    if not any(name.startswith(ENCODER + "downsample_layers.") for name in bare):
        return {}
    return {name: tensor for name, tensor in bare.items() if name.partition(".")[0] in parts}


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
