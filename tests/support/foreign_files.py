"""ONNX files as other people have them: networks of timm, transformers and others, by torch's two exporters."""

import copy
import warnings
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from cnx_deploy.core.variants import Variant
from tests.support.foreign_models import (
    MmClassifier,
    randomise,
    timm_model,
    torchvision_model,
    transformers_model,
)

SIZE = 64


class Logits(nn.Module):
    """The logits of a transformers model, which answers with a record."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


class Tagger(nn.Module):
    """Several labels an image: a sigmoid of each logit."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).sigmoid()


class TextBlock(nn.Module):
    """ConvNeXt V2's block over a sequence (N, C, T), as text-to-speech models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv1d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma, self.beta = (nn.Parameter(torch.zeros(1, 1, 4 * width)) for _ in range(2))

    def forward(self, sequence: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.pwconv1(self.norm(self.dwconv(sequence).transpose(1, 2))))
        response = torch.norm(hidden, p=2, dim=1, keepdim=True)
        share = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        hidden = self.gamma * (hidden * share) + self.beta + hidden
        return sequence + self.pwconv2(hidden).transpose(1, 2)


class TextEncoder(nn.Module):
    """Two such blocks between a convolution and a head, (N, 20, T) -> (N, 8, T)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(20, width, 7, padding=3), TextBlock(width), TextBlock(width), nn.Conv1d(width, 8, 1)
        )

    def forward(self, sequence: Tensor) -> Tensor:
        return self.layers(sequence)


class Plain(nn.Module):
    """A small network without a norm of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def segmenter(variant: Variant, classes: int = 7, width: int = 32) -> nn.Module:
    """transformers' UPerNet over a ConvNeXt V2, `width` channels wide, without its auxiliary head."""
    backbone = transformers.ConvNextV2Config(
        depths=list(variant.depths), hidden_sizes=list(variant.dims), out_features=[f"stage{at}" for at in range(1, 5)]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=width, num_labels=classes, use_auxiliary_head=False
    )
    return transformers.UperNetForSemanticSegmentation(config)


def network(name: str, variant: Variant) -> nn.Module:
    """A network by the library that it is of, every parameter random."""
    made = {
        "timm": lambda: timm_model(variant),
        "transformers": lambda: Logits(transformers_model(variant)),
        "mmpretrain": lambda: MmClassifier(variant),
        "torchvision": lambda: torchvision_model(variant),
        "segmenter": lambda: Logits(segmenter(variant)),
        "tagger": lambda: Tagger(timm_model(variant)),
        "text": TextEncoder,
        "plain": Plain,
    }
    return randomise(made[name]()).eval()


def exported(
    model: nn.Module, path: Path, *, opset: int = 17, half: bool = False, dynamo: bool = False,
    shape: tuple[int, ...] = (2, 3, SIZE, SIZE),
) -> Path:  # fmt: skip
    """Write a file with an open batch; by the older exporter, which takes 0.1 s, unless told otherwise."""
    model, images = copy.deepcopy(model), torch.zeros(shape)
    if half:
        model, images = model.half(), images.half()
    words = {"opset_version": opset, "input_names": ["pixels"], "output_names": ["answer"], "dynamo": dynamo}
    if dynamo:
        words |= {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "verbose": False}
    else:
        words["dynamic_axes"] = {"pixels": {0: "batch"}, "answer": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, **words)
    return path


def heat(model: nn.Module, factor: float) -> nn.Module:
    """Multiply what goes into each GRN of a transformers network, and divide what comes out: it stays the same size."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "pwconv1"):
                for tensor in (module.pwconv1.weight, module.pwconv1.bias, module.grn.bias):
                    tensor.mul_(factor)
                module.pwconv2.weight.div_(factor)
    return model
