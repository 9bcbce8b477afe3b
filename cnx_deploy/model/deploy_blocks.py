"""The block of the deploy form: on tokens for a GPU, channels first for a CPU.

`folds` names the folds that are made (`folds.FOLDS`); one that is not leaves the training form's operation in place.
`stream_type` is the type of the tensor that runs through the blocks; each part casts its input to its own type.
A block of ConvNeXt V1 has no GRN, so nothing is scaled between the pointwise layers, and LayerScale behind them.
"""

from collections.abc import Set

import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.model.deploy_layers import (
    GainedLinear,
    NormResponseGain,
    PooledResponseGain,
    ResponseGain,
    TokenNorm,
    convolution,
    depthwise,
    doubles,
    linear,
    map_norm,
    type_of,
)
from cnx_deploy.model.folds import fold_affine_into_linear, fold_grn_beta, fold_layer_scale
from cnx_deploy.model.layers import Block, GlobalResponseNorm

__all__ = ["ChannelsFirstBlock", "TokenBlock", "images_from_tokens"]


class TokenBlock(nn.Module):
    """The block on tokens. (N, C, H, W) -> (N, C, H, W), tokens (N, HW, C) between the two.

    `open_size`: they are (N, H, W, C), so that the graph computes no shapes where height and width are open.
    `gain_in_weight`: GRN's gain scales the second weight, which becomes one a sample; else it scales the hidden
    tensor, and the second pointwise layer is a 1×1 convolution that takes bias and residual along. V1 has neither: its
    two linear layers in a row compile to fewer bytes than a convolution behind the first (atto: 23.0 and 31.1 MB an
    image at batch 64).
    """

    def __init__(
        self,
        block: Block,
        *,
        gain_in_weight: bool,
        folds: Set[str],
        stream_type: torch.dtype,
        open_size: bool = False,
    ) -> None:
        super().__init__()
        self.stream_type, self.open_size = stream_type, open_size
        gamma = _grn_gamma(block)
        self.gain_in_weight = gain_in_weight and gamma is not None and {"grn-gain", "grn-beta"} <= folds
        self.dwconv = depthwise(*doubles(block.dwconv))
        affine, pointwise = _first_pointwise(block, folds)
        self.norm = TokenNorm(*affine)
        self.pwconv1 = linear(*pointwise)
        self.act = nn.GELU()
        self.grn = None if gamma is None else ResponseGain(gamma, open_size=open_size)
        beta, (weight, bias) = _second_pointwise(block, folds)
        self.beta = None if beta is None else nn.Parameter(beta)
        self.scale = _layer_scale(block, folds)
        if self.gain_in_weight:
            self.pwconv2: nn.Module = GainedLinear(weight, bias)
        elif "residual" in folds and self.grn is not None:
            self.pwconv2 = convolution(weight[:, :, None, None], bias)
        else:
            self.pwconv2 = linear(weight, bias)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        images, size = images.to(self.stream_type), images.shape[2:]
        # Permuted before it is flattened: the other way round TensorRT copies the tensor twice at batch 8.
        tokens = self.dwconv(images.to(type_of(self.dwconv))).permute(0, 2, 3, 1)
        if not self.open_size:
            tokens = tokens.flatten(1, 2)  # (N, HW, C)
        hidden = self.act(self.pwconv1(self.norm(tokens).to(type_of(self.pwconv1))))  # (N, HW, 4C)
        gain = None if self.grn is None else self.grn(hidden)  # (N, 1, 4C)
        return (images + _scaled_branch(self._branch(hidden, gain, size), self.scale)).to(self.stream_type)

    def _branch(self, hidden: Tensor, gain: Tensor | None, size: torch.Size) -> Tensor:
        """Hidden tensor and gain -> what is added to the stream, (N, C, H, W)."""
        if self.gain_in_weight:
            return images_from_tokens(self.pwconv2(hidden, gain), size)
        if isinstance(self.pwconv2, nn.Conv2d):
            # Unflattened before it is scaled: the other way round TensorRT stores the squares at batch 1.
            if not self.open_size:
                hidden, gain = hidden.reshape(-1, *size, hidden.shape[-1]), None if gain is None else gain[:, None]
            scaled = self._scaled(hidden, gain)
            branch: Tensor = self.pwconv2(scaled.to(type_of(self.pwconv2)).permute(0, 3, 1, 2))
            return branch
        scaled = self._scaled(hidden, gain)
        return images_from_tokens(self.pwconv2(scaled.to(type_of(self.pwconv2))), size)

    def _scaled(self, hidden: Tensor, gain: Tensor | None) -> Tensor:
        if gain is None:
            return hidden
        return hidden * gain if self.beta is None else hidden * gain + self.beta


class ChannelsFirstBlock(nn.Module):
    """The block with pointwise layers as 1×1 convolutions, as ONNX Runtime or as OpenVINO runs it best.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, block: Block, spec: DeploySpec, stream_type: torch.dtype) -> None:
        super().__init__()
        folds, self.open_size = spec.folds, spec.size_range is not None
        self.stream_type = stream_type
        self.dwconv = depthwise(*doubles(block.dwconv))
        affine, (weight, bias) = _first_pointwise(block, folds)
        self.norm = map_norm(spec, *affine)
        self.pwconv1 = convolution(weight[:, :, None, None], bias)
        self.act = nn.GELU()
        gamma = _grn_gamma(block)
        self.grn = None if gamma is None else _gain_of_maps(gamma, spec)
        beta, (weight, bias) = _second_pointwise(block, folds)
        self.beta = None if beta is None else nn.Parameter(beta[:, None, None])
        self.pwconv2 = convolution(weight[:, :, None, None], bias)
        self.scale = _layer_scale(block, folds)

    def forward(self, images: Tensor) -> Tensor:
        """Apply the block; see the class for shapes."""
        images = images.to(self.stream_type)
        normed = self.norm(self.dwconv(images.to(type_of(self.dwconv))))
        hidden = self.act(self.pwconv1(normed.to(type_of(self.pwconv1))))  # (N, 4C, H, W)
        branch: Tensor = self.pwconv2(self._scaled(hidden).to(type_of(self.pwconv2)))
        output: Tensor = images + _scaled_branch(branch, self.scale)
        return output.to(self.stream_type)

    def _scaled(self, hidden: Tensor) -> Tensor:
        if self.grn is None:
            return hidden
        if isinstance(self.grn, ResponseGain) and not self.open_size:
            scaled: Tensor = hidden * self.grn(hidden.flatten(2))[..., None]
        else:
            scaled = hidden * self.grn(hidden)
        return scaled if self.beta is None else scaled + self.beta


Affine = tuple[Tensor, Tensor] | tuple[()]


def _gain_of_maps(gamma: Tensor, spec: DeploySpec) -> nn.Module:
    """GRN's gain of hidden tensors (N, 4C, H, W), from operators that the layout's runtime runs best."""
    if spec.layout == "openvino" and "channels-last" in spec.folds:
        return NormResponseGain(gamma)
    open_size = spec.size_range is not None
    if spec.layout == "cpu" and "blocked" in spec.folds and not open_size:  # a pool of the whole map has a size
        return PooledResponseGain(gamma)
    return ResponseGain(gamma, channel_axis=1, open_size=open_size)


def _first_pointwise(block: Block, folds: Set[str]) -> tuple[Affine, tuple[Tensor, Tensor]]:
    """The affine that stays with the norm, and weight and bias of the first pointwise layer."""
    pointwise, affine = doubles(block.pwconv1), doubles(block.norm)
    return ((), fold_affine_into_linear(*pointwise, *affine)) if "norm-affine" in folds else (affine, pointwise)


def _second_pointwise(block: Block, folds: Set[str]) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
    """The beta (4C,) that stays with GRN, and weight and bias of the second pointwise layer."""
    weight, bias = doubles(block.pwconv2)
    if block.gamma is not None and "layer-scale" in folds:
        weight, bias = fold_layer_scale(weight, bias, _flat(block.gamma))
    if not isinstance(block.grn, GlobalResponseNorm):
        return None, (weight, bias)
    beta = _flat(block.grn.beta)
    return (None, (weight, fold_grn_beta(weight, bias, beta))) if "grn-beta" in folds else (beta, (weight, bias))


def images_from_tokens(tokens: Tensor, size: torch.Size) -> Tensor:
    """(N, HW, C) -> (N, C, H, W). Unflattened before it is permuted: the other way round costs TensorRT a kernel."""
    if tokens.ndim == 4:
        return tokens.permute(0, 3, 1, 2)
    return tokens.reshape(-1, *size, tokens.shape[-1]).permute(0, 3, 1, 2)


def _grn_gamma(block: Block) -> Tensor | None:
    """GRN's gamma (4C,); None in a block of V1."""
    return _flat(block.grn.gamma) if isinstance(block.grn, GlobalResponseNorm) else None


def _layer_scale(block: Block, folds: Set[str]) -> nn.Parameter | None:
    """LayerScale's gamma (C, 1, 1) where the block has it and it is not folded."""
    if block.gamma is None or "layer-scale" in folds:
        return None
    return nn.Parameter(_flat(block.gamma)[:, None, None])


def _scaled_branch(branch: Tensor, scale: Tensor | None) -> Tensor:
    """(N, C, H, W), times (C, 1, 1) where there is a scale."""
    return branch if scale is None else branch * scale


def _flat(parameter: Tensor) -> Tensor:
    """A parameter such as GRN's (1, 1, 1, 4C) as a float64 copy (4C,)."""
    return parameter.detach().to(torch.float64, copy=True).flatten()
