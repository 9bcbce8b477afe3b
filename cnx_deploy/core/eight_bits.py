"""Eight bits: which tensors of a block are stored in FP8 or INT8, on which scales, and what was measured for that.

Every tensor has one scale, never one a channel: per-channel weights make the compiler write FP32 (docs/eight-bits.md).
Records without torch; `model.quantised` obeys them and `diagnosis.calibration` makes them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = [
    "GAIN_FOLDS",
    "LARGEST",
    "LARGEST_EXPONENT",
    "LETTERS",
    "METHODS",
    "PARTS",
    "PLACEMENTS",
    "WITHOUT_SCALED_PRODUCT",
    "BlockScales",
    "EightBitFacts",
    "EightBitType",
    "EightBits",
    "EngineCheck",
    "HeldOut",
    "Method",
    "Placement",
]  # fmt: skip

EightBitType = Literal["int8", "fp8"]
Method = Literal["max", "mse", "percentile"]
METHODS: tuple[Method, ...] = ("max", "mse", "percentile")

LETTERS: Mapping[str, str] = {
    "x": "the LayerNorm's output",
    "w1": "the first pointwise weight",
    "p": "the first product before its bias",
    "h": "GELU's output, the hidden tensor",
    "g": "the second weight with GRN's gain, one a sample; of V1 the second weight itself",
    "o": "the second product before its bias",
    "s": "the hidden tensor times GRN's gain, where the gain is not in the weight",
    "w2": "the second weight, where the hidden tensor is scaled",
}
"""The tensors of a block that can be stored in eight bits."""

PARTS: Mapping[str, str] = {
    "x": "pwconv1", "w1": "pwconv1", "p": "pwconv1", "h": "grn", "g": "pwconv2", "o": "pwconv2", "s": "pwconv2",
    "w2": "pwconv2",
}  # fmt: skip
"""The part of the block that a tensor belongs to: a part that is kept in FP16 has none in eight bits."""

LARGEST: Mapping[EightBitType, float] = {"int8": 127.0, "fp8": 448.0}
"""The value that a scale maps the largest one to; that of float8 e4m3fn is its largest finite number."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Which tensors are stored in eight bits, and in which type; `gains`: those whose channels are scaled first."""

    types: Mapping[str, EightBitType]
    gains: tuple[str, ...]


PLACEMENTS: Mapping[str, Placement] = {
    # A product whose inputs are FP16 takes bias, GELU and the cast to FP8 along in one kernel; the same with INT8's
    # rounding does not exist, so INT8 starts at the norm's output.
    "fp8": Placement({"h": "fp8", "g": "fp8", "o": "fp8", "s": "int8", "w2": "int8"}, ("s", "o")),
    "int8": Placement(dict.fromkeys(("x", "w1", "p", "h", "g", "o", "s", "w2"), "int8"), ("x", "p", "h", "s", "o")),
}
"""By precision. Measured with TensorRT-RTX 1.7.1: docs/eight-bits.md."""

WITHOUT_SCALED_PRODUCT = ("sm75",)
"""GPUs for which TensorRT-RTX has no INT8 kernel for the product of s and w2: it brings w2 to Half in a kernel more."""

GAIN_FOLDS: Mapping[str, str] = {
    "x": "norm-gain", "p": "product-gain", "h": "hidden-gain", "s": "scaled-gain", "o": "output-gain",
}  # fmt: skip
"""The fold (`core.deploy_spec.FOLDS`) that makes a letter's gains."""


LARGEST_EXPONENT = 7
"""Of a gain: its inverse square is a normal FP16 number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScales:
    """One block. A value is `scale` times an integer or a float8; a letter without a scale stays in FP16.

    `gains`: by letter a power of two for each channel, as exponents separated by spaces; none where all are zero.
    """

    scales: Mapping[str, float]
    gains: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted((self.scales.keys() | self.gains.keys()) - LETTERS.keys()):
            raise ValueError(f"no tensor of a block is called {unknown[0]!r}; expected some of {', '.join(LETTERS)}")
        if wrong := [scale for scale in self.scales.values() if not 0.0 < scale < math.inf]:
            raise ValueError(f"a scale is a positive number, not {wrong[0]}")
        if any(abs(exponent) > LARGEST_EXPONENT for letter in self.gains for exponent in self.exponents(letter)):
            raise ValueError(f"exponents of gains are from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}")

    def exponents(self, letter: str) -> tuple[int, ...]:
        """The exponents of a letter's gains; empty without gains."""
        return tuple(map(int, self.gains.get(letter, "").split()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBits:
    """The scales of a network by block ("stages.2.3"), and what they were measured on.

    `placement` is a key of `PLACEMENTS`. `images` of the calibration with `data_sha256` over their pixels in order;
    `kept`: parts that stay in FP16.
    """

    placement: str
    blocks: Mapping[str, BlockScales]
    method: Method
    images: int
    data_sha256: str
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"no placement is called {self.placement!r}; expected one of {', '.join(PLACEMENTS)}")

    def without_rounding(self) -> "EightBits":
        """The same gains without a tensor in eight bits: what the deploy form computes exactly."""
        blocks = {name: BlockScales(scales={}, gains=block.gains) for name, block in self.blocks.items()}
        return replace(self, blocks=blocks)

    def of(self, block: str) -> BlockScales | None:
        """The scales of a block; None where all of it stays in FP16."""
        return self.blocks.get(block)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Images that were held out from the calibration: how many, and top-1 in per cent where they have labels.

    `top1` is the file's in ONNX Runtime, `reference_top1` that of PyTorch in FP32. `metrics` has both, 0 to 1, of mean
    IoU where images have masks, and of average precision where they have objects.
    """

    images: int
    top1: float | None = None
    reference_top1: float | None = None
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCheck:
    """What TensorRT-RTX compiles of the file for a target and a batch, beside the same network in FP16.

    Bytes are those of each kernel's inputs, constants and outputs, an image; no latency.
    """

    target: str
    batch: int
    kernels: int
    half_kernels: int
    megabytes_per_image: float
    half_megabytes_per_image: float
    faults: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Bytes over those of FP16."""
        return self.megabytes_per_image / self.half_megabytes_per_image


@dataclass(frozen=True, slots=True, kw_only=True)
class EightBitFacts:
    """What a file was found to be worth. `engines_not_run`: why no engine was compiled; None where some were."""

    held_out: HeldOut
    engines: tuple[EngineCheck, ...] = ()
    engines_not_run: str | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The GPUs whose engines judged the file, by compute capability."""
        return tuple(dict.fromkeys(check.target for check in self.engines))
