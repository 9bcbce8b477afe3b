"""The emulator on graphs that other exporters write of networks with ConvNeXt V2 blocks, against ONNX Runtime."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from cnx_deploy.runners.emulator.graph import Graph

SIZES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]}


class SpeechBlock(nn.Module):
    """ConvNeXt V2 in one dimension, as vocoders have it: (N, C, T) -> (N, C, T)."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pwconv1, self.pwconv2 = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.gamma, self.beta = nn.Parameter(torch.randn(4 * channels)), nn.Parameter(torch.randn(4 * channels))

    def forward(self, signal: Tensor) -> Tensor:
        hidden = F.gelu(self.pwconv1(self.norm(self.dwconv(signal).transpose(1, 2))))
        norm = hidden.norm(p=2, dim=1, keepdim=True)
        share = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return signal + self.pwconv2(hidden + self.gamma * (hidden * share) + self.beta).transpose(1, 2)


class Tagger(nn.Module):
    """A picture, and a mask of the tags asked for -> probabilities, the three best, and how many exceed a half."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("convnextv2_atto", depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=6)

    def forward(self, pictures: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tags = torch.where(asked > 0.5, torch.sigmoid(self.backbone(pictures)), 0.0)
        best = tags.topk(3, dim=1)
        return best.values, best.indices, (tags > 0.5).sum(1)


class Segmenter(nn.Module):
    """transformers' UPerNet over ConvNeXt V2, with the classes of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        backbone = transformers.ConvNextV2Config(**SIZES, out_features=["stage1", "stage2", "stage3", "stage4"])
        config = transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=8, num_labels=5, auxiliary_channels=8, pool_scales=[1, 2]
        )
        self.network = transformers.UperNetForSemanticSegmentation(config)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.network(pictures).logits
        return logits, logits.argmax(1)


class Classifier(nn.Module):
    """transformers' classifier, without its output class."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.ConvNextV2Config(**SIZES, num_labels=6)
        self.network = transformers.ConvNextV2ForImageClassification(config)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.network(pictures).logits


PICTURES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ASKED = torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0, 1.0]] * 2)
SIGNAL = torch.randn(2, 8, 33, generator=torch.Generator().manual_seed(0))
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str]] = {
    "speech": (SpeechBlock, (SIGNAL,), "signal"),
    "tagger": (Tagger, (PICTURES, ASKED), "pictures asked"),
    "segmenter": (Segmenter, (PICTURES,), "pictures"),
    "classifier": (Classifier, (PICTURES,), "pictures"),
}


def exported(name: str, dynamo: bool, opset: int, half: bool, path: Path) -> tuple[Path, dict[str, Tensor]]:
    build, inputs, names = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
        for parameter_name, parameter in network.named_parameters():
            if parameter_name.rpartition(".")[2] in ("gamma", "beta", "weight", "bias") and parameter.ndim != 4:
                nn.init.normal_(parameter, std=0.5)
    if half:
        network, inputs = network.half(), tuple(tensor.half() for tensor in inputs)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, inputs, path, dynamo=dynamo, opset_version=opset, input_names=names.split(), verbose=False
        )
    return path, dict(zip(names.split(), inputs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamo", "opset"),
    [
        *((name, dynamo, opset) for name in NETWORKS for dynamo, opset in ((True, 18), (True, 22), (False, 17))),
        ("speech", False, 20),
    ],
)
def test_other_exporters_graphs_give_what_onnx_runtime_gives(
    name: str, dynamo: bool, opset: int, tmp_path: Path
) -> None:
    path, inputs = exported(name, dynamo, opset, False, tmp_path / "foreign.onnx")
    graph = Graph(path)
    tensors = graph.evaluate(inputs).tensors
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    for output, wanted in zip(graph.outputs, expected, strict=True):
        assert tensors[output].shape == wanted.shape
        if wanted.dtype == np.int64:
            assert float((tensors[output].numpy() == wanted).mean()) > 0.99  # pixels between two classes
        else:
            np.testing.assert_allclose(tensors[output].numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_a_speech_block_in_fp16_is_within_rounding_of_the_reference_evaluator(tmp_path: Path) -> None:
    path, inputs = exported("speech", False, 17, True, tmp_path / "speech.onnx")
    graph = Graph(path)
    evaluation = graph.evaluate(inputs)
    (expected,) = ReferenceEvaluator(str(path)).run(None, {"signal": SIGNAL.half().numpy()})
    (name,) = graph.outputs
    np.testing.assert_allclose(evaluation.tensors[name].float().numpy(), expected.astype(np.float32), 2e-2, 2e-2)
    assert evaluation.first_nonfinite is None
    louder = {"signal": SIGNAL.half() * 3e4}
    assert str(graph.evaluate(louder).first_nonfinite)
