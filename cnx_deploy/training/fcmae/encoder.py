"""The encoder on visible patches only: the training form's own layers, with dense convolutions and masks between them.

Equal to submanifold sparse convolution, in which hidden positions do not exist. A window of the stem or of a
downsampling lies within one patch, so only the depthwise convolutions and GRN's statistics look across patches. Source:
Woo et al., arXiv:2301.00808, section 3.1; "the binary masking is numerically identical to sparse conv",
facebookresearch/ConvNeXt-V2, TRAINING.md.
"""

from torch import Tensor

from cnx_deploy.core.variants import check_image_size
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.layers import Block
from cnx_deploy.training.fcmae.masking import enlarged

__all__ = ["masked_features"]


def masked_features(encoder: ConvNeXtV2, images: Tensor, masks: Tensor) -> list[Tensor]:
    """(N, 3, H, W) normalised images and (N, H/32, W/32) masks -> features of each stage, zero where hidden.

    No value of a hidden pixel, not even NaN, is in the result. Without anything hidden these are the features of the
    ordinary forward pass. Raises InputError where the masks are not of the images' patches.
    """
    check_image_size(images.shape[-2], images.shape[-1])
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
