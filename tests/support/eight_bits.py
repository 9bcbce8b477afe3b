"""A network small and yet wide enough that the compiler treats its eight bits as those of the real ones."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import InputSpec, find_images
from cnx_deploy.model.convnextv2 import random_model
from tests.conftest import NARROW_TEST

SIZE = 128
"""Pixels at which the last stage has 16 positions."""


def train_on_colours(images: Path, path: Path) -> Path:
    """Learn two colours within seconds, from a start whose blocks do not vanish as those of the paper's do."""
    model = random_model(NARROW_TEST, 2, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "grn" in name:
                parameter.zero_()
    source, optimiser = find_images(images), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(3):
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(epoch)).tolist()
        for batch in source.batches(Preprocessing(SIZE), InputSpec("normalised", SIZE), 16, order):
            optimiser.zero_grad()
            F.cross_entropy(model(batch.images), batch.labels).backward()
            optimiser.step()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


def with_outliers(weights: Path, path: Path, factor: float = 100.0) -> Path:
    """The same with two hidden channels of each block multiplied in the first product and divided in the second."""
    tensors = load_file(weights)
    for name in [name for name in tensors if name.endswith("pwconv1.weight")]:
        block = name.removesuffix("pwconv1.weight")
        for channel in (3, 10):
            tensors[name][channel] *= factor
            tensors[f"{block}pwconv1.bias"][channel] *= factor
            tensors[f"{block}pwconv2.weight"][:, channel] /= factor
    save_file(tensors, path)
    return path
