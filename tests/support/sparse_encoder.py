"""The encoder as sparse convolutions have it: hidden positions do not exist, visible ones are visited one by one.

Independent of the package's masked forward pass: it reads weights by their names and calls no module. float64, one
image at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

Sites = dict[tuple[int, int], Tensor]
"""(row, column) -> (C,)."""


def sparse_features(state: dict[str, Tensor], depths: tuple[int, ...], image: Tensor, mask: Tensor) -> list[Tensor]:
    """(3, H, W) and (H/32, W/32) -> (C, h, w) of each stage, zero where there is no site."""
    sites = _stem(state, image, mask)
    stages = []
    for stage, depth in enumerate(depths):
        if stage:
            sites = _downsampling(state, f"downsample_layers.{stage}", sites)
        for block in range(depth):
            sites = _block(state, f"stages.{stage}.{block}", sites)
        stages.append(_scattered(sites, (image.shape[1] >> (stage + 2), image.shape[2] >> (stage + 2))))
    return stages


def _stem(state: dict[str, Tensor], image: Tensor, mask: Tensor) -> Sites:
    kernel, bias = state["downsample_layers.0.0.weight"], state["downsample_layers.0.0.bias"]
    sites = {}
    for row in range(image.shape[1] // 4):
        for column in range(image.shape[2] // 4):
            if not mask[row // 8, column // 8]:
                window = image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                sites[row, column] = _norm(state, "downsample_layers.0.1", (kernel * window).sum(dim=(1, 2, 3)) + bias)
    return sites


def _downsampling(state: dict[str, Tensor], name: str, sites: Sites) -> Sites:
    kernel, bias = state[f"{name}.1.weight"], state[f"{name}.1.bias"]
    sums: Sites = {}
    for (row, column), values in sites.items():
        at = (row // 2, column // 2)
        sums[at] = sums.get(at, bias) + kernel[:, :, row % 2, column % 2] @ _norm(state, f"{name}.0", values)
    return sums


def _block(state: dict[str, Tensor], name: str, sites: Sites) -> Sites:
    wide = {}
    for at in sites:
        values = _norm(state, f"{name}.norm", _depthwise(state, f"{name}.dwconv", sites, at))
        wide[at] = F.gelu(state[f"{name}.pwconv1.weight"] @ values + state[f"{name}.pwconv1.bias"])
    if f"{name}.grn.gamma" in state:
        energy = torch.stack(list(wide.values())).square().sum(dim=0).sqrt()
        share = energy / (energy.mean() + 1e-6)
        gamma, beta = (state[f"{name}.grn.{part}"].flatten() for part in ("gamma", "beta"))
        wide = {at: gamma * share * values + beta + values for at, values in wide.items()}
    scale = state.get(f"{name}.gamma", torch.ones(()))
    weight, bias = state[f"{name}.pwconv2.weight"], state[f"{name}.pwconv2.bias"]
    return {at: sites[at] + scale * (weight @ wide[at] + bias) for at in sites}


def _depthwise(state: dict[str, Tensor], name: str, sites: Sites, at: tuple[int, int]) -> Tensor:
    kernel, total = state[f"{name}.weight"], state[f"{name}.bias"]
    for row in range(-3, 4):
        for column in range(-3, 4):
            neighbour = sites.get((at[0] + row, at[1] + column))
            if neighbour is not None:
                total = total + kernel[:, 0, row + 3, column + 3] * neighbour
    return total


def _norm(state: dict[str, Tensor], name: str, values: Tensor) -> Tensor:
    centred = values - values.mean()
    scaled = centred / (centred.square().mean() + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _scattered(sites: Sites, size: tuple[int, int]) -> Tensor:
    dense = torch.zeros(len(next(iter(sites.values()))), *size, dtype=torch.float64)
    for (row, column), values in sites.items():
        dense[:, row, column] = values
    return dense
