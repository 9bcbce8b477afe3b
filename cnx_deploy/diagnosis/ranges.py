"""Ranges of a network's tensors, statistics and parameters in FP16, recorded while the deploy form runs in FP32.

The form is the FP16 file's own: the layout of tokens, an input of 0 to 255, every fold. Hooks keep running maxima and
no activation, so the memory is that of one batch.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, deploy_form
from cnx_deploy.model.deploy_blocks import TokenBlock
from cnx_deploy.model.deploy_layers import (
    ChannelsFirstNorm,
    GainedLinear,
    NormedPatchConvolution,
    PatchConvolution,
    ResponseGain,
    TokenNorm,
)
from cnx_deploy.model.layers import EPS

__all__ = [
    "HALF_MAX", "NormRange", "ParameterRange", "Range", "Recorder", "ResponseRange", "TensorRange", "larger",
    "parameter_ranges", "rank", "recorded_form", "stage_of", "unit_of", "worst",
]  # fmt: skip

HALF_MAX = 65504.0
"""The largest finite FP16 number."""
SMALLEST_NORMAL = 2.0**-14
"""The smallest FP16 number with all of its eleven bits."""
STEM_NORM = "downsample_layers.0.1"

STORED = (
    nn.Conv2d, nn.Linear, nn.GELU, ChannelsFirstNorm, GainedLinear, PatchConvolution, ResponseGain, TokenBlock,
    TokenNorm,
)  # fmt: skip
"""Modules whose output an FP16 file stores."""


@dataclass(frozen=True, slots=True)
class Range(ABC):
    """A largest value that FP16 has to hold. A subclass says which of its values that is."""

    @property
    @abstractmethod
    def peak(self) -> float:
        """The value that is held against 65504."""

    @property
    def share(self) -> float:
        """`peak` as a share of 65504; above 1 it does not fit."""
        return self.peak / HALF_MAX

    def to_dict(self) -> dict[str, Any]:
        """Return the range for JSON."""
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class TensorRange(Range):
    """The largest absolute value of a tensor that an FP16 file stores.

    `module` is the torch module as the exported file names it. `what` is the module's "output", the "product" of
    a linear layer before its bias, GRN's "gained weight", the tensor "hidden × gain", or the stem's "normed patches".
    """

    module: str
    what: str
    largest: float

    @property
    def peak(self) -> float:
        """The largest absolute value."""
        return self.largest

    @property
    def name(self) -> str:
        """For people: the module, and what of it unless that is its output."""
        return self.module if self.what == "output" else f"{self.module} ({self.what})"


@dataclass(frozen=True, slots=True)
class ResponseRange(Range):
    """GRN's input. `rms` is that of a channel over the `positions` of an image, the largest over channels and images.

    `square_sum` is the sum of squares behind it, which the naive form keeps in FP16.
    """

    module: str
    positions: int
    rms: float
    square_sum: float

    @property
    def peak(self) -> float:
        """The sum of squares."""
        return self.square_sum


@dataclass(frozen=True, slots=True)
class NormRange(Range):
    """LayerNorm's input, by the training form's module. `deviation` is the largest |x - mean| over the channels.

    `rms` is the root of a position's mean squared deviation, the largest over positions and images.
    """

    module: str
    deviation: float
    rms: float

    @property
    def peak(self) -> float:
        """The squared deviation, which the naive form keeps in FP16."""
        return self.deviation * self.deviation


@dataclass(frozen=True, slots=True)
class ParameterRange(Range):
    """A parameter of the FP16 deploy form, counted in elements.

    `largest` is before the cast. After it: `subnormal` elements lie in (0, 2^-14), `flushed` ones are zero and were
    not, `nonfinite` ones are infinite or NaN.
    """

    name: str
    count: int
    largest: float
    subnormal: int
    flushed: int
    nonfinite: int

    @property
    def module(self) -> str:
        """The module that holds the parameter."""
        return self.name.rpartition(".")[0]

    @property
    def peak(self) -> float:
        """The largest absolute value before the cast."""
        return self.largest


AnyRange = TypeVar("AnyRange", bound=Range)


def larger(first: float, second: float) -> float:
    """Return the larger of two numbers; NaN when either is, so that a NaN once seen stays."""
    return first if rank(first) > rank(second) or first != first else second


def rank(value: float) -> tuple[bool, float]:
    """Return a key that orders numbers and puts NaN above infinity."""
    return (True, 0.0) if value != value else (False, value)


def worst(ranges: Iterable[AnyRange]) -> AnyRange | None:
    """Return the range with the largest share, NaN above all; the first of equals, None of none."""
    return max(ranges, key=lambda entry: rank(entry.share), default=None)


def stage_of(module: str) -> int:
    """Return the stage, from 0, that a module counts with.

    Stem and downsampling count with the stage that they open, pooling and head with the last.
    """
    first, _, rest = module.partition(".")
    return int(rest.partition(".")[0]) if first in ("stages", "downsample_layers") else 3


def unit_of(module: str) -> str:
    """Return the block, stem or downsampling that a module belongs to, or "head" for the last norm and the head."""
    words = module.split(".")
    depth = {"stages": 3, "downsample_layers": 2}.get(words[0])
    return "head" if depth is None else ".".join(words[:depth])


def recorded_form(model: ConvNeXtV2, preprocessing: Preprocessing, **answer: Any) -> DeployedConvNeXtV2:
    """Make the deploy form of an FP16 export in FP32; its input is (N, S, S, C) uint8. `answer`: tta, temperature.

    FP16 files bring their input to [0, 255], so their stem has the weights of the byte input.
    """
    spec = DeploySpec(
        precision="fp32",
        image_size=preprocessing.image_size,
        input_kind="uint8",
        layout="gpu",
        mean=preprocessing.mean,
        std=preprocessing.std,
        **answer,
    )
    return deploy_form(model, spec)


def parameter_ranges(form: nn.Module) -> tuple[ParameterRange, ...]:
    """Count, parameter by parameter of an FP32 form, what its cast to FP16 makes of it."""
    ranges = []
    for name, parameter in form.named_parameters():
        values = parameter.detach()
        halves = values.half()
        magnitudes = halves.abs()
        ranges.append(
            ParameterRange(
                name=name,
                count=values.numel(),
                largest=_largest(values),
                subnormal=int(((magnitudes > 0) & (magnitudes < SMALLEST_NORMAL)).sum()),
                flushed=int(((halves == 0) & (values != 0)).sum()),
                nonfinite=int((~torch.isfinite(halves)).sum()),
            )
        )
    return tuple(ranges)


class Recorder:
    """Runs a deploy form over batches and keeps the largest values; `model` is the training form behind it."""

    def __init__(self, form: DeployedConvNeXtV2, model: ConvNeXtV2, preprocessing: Preprocessing) -> None:
        self.form = form
        self.images = 0
        # Where the norm is on the patches, the stem's own output is computed nowhere in the deploy form.
        self._stem = model.stem_layers()[0] if form.norm_on_patches else None
        self._preprocessing = preprocessing
        self._tensors: dict[tuple[str, str], float] = {}
        self._responses: dict[str, tuple[int, float]] = {}
        self._norms: dict[str, tuple[float, float]] = {}

    @property
    def tensors(self) -> tuple[TensorRange, ...]:
        """Every tensor an FP16 file stores, in order of depth, but the images: those are at most 255 by their type."""
        return tuple(TensorRange(*key, largest) for key, largest in self._tensors.items())

    @property
    def responses(self) -> tuple[ResponseRange, ...]:
        """Every GRN's input, in order of depth."""
        return tuple(
            ResponseRange(module, positions, (square_sum / positions) ** 0.5, square_sum)
            for module, (positions, square_sum) in self._responses.items()
        )

    @property
    def norms(self) -> tuple[NormRange, ...]:
        """Every LayerNorm's input, in order of depth."""
        return tuple(NormRange(module, *values) for module, values in self._norms.items())

    def run(self, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> None:
        """Record (N, S, S, C) uint8 batches; `progress` is told the number of images of each."""
        with contextlib.ExitStack() as handles, torch.inference_mode():
            for name, module in self.form.named_modules():
                for handle in self._hooks(name, module):
                    handles.callback(handle.remove)
            for pixels in batches:
                if self._stem is not None:
                    self._norm(STEM_NORM, self._stem(normalise(pixels, self._preprocessing)), axis=1)
                self.form(pixels)
                self.images += len(pixels)
                if progress is not None:
                    progress(len(pixels))

    def _hooks(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """Register the hooks of one module; its input is seen before its output."""
        before: dict[type[nn.Module], Callable[[Any, Any], None]] = {
            # The largest |gain · weight| without the product, which is one a sample: (N, 4C, C).
            GainedLinear: lambda module, given: self._keep(
                name, "gained weight", float((given[1].abs()[:, 0] * module.weight.abs().amax(dim=1)).amax())
            ),
            ResponseGain: lambda module, given: self._response(name, module, *given),
            TokenNorm: lambda _, given: self._norm(name, given[0], axis=-1),
            ChannelsFirstNorm: lambda _, given: self._norm(name, given[0], axis=1),
        }
        if (hook := before.get(type(module))) is not None:
            yield module.register_forward_pre_hook(hook)
        if isinstance(module, TokenBlock) and module.grn is not None and not module.gain_in_weight:
            yield module.pwconv2.register_forward_pre_hook(
                lambda _, given: self._keep(name, "hidden × gain", _largest(given[0]))
            )
        if isinstance(module, NormedPatchConvolution):
            yield module.root.register_forward_hook(
                lambda _, given, rooted: self._normed_patches(name, module.full_scale, given[0], rooted)
            )
        # Of the head, which has modules of the task's own, whatever gives one tensor of fractions counts as stored.
        is_head = unit_of(name) == "head" and name not in ("", "normalise", "flip_mean", "answers")
        if isinstance(module, STORED) or is_head:
            # First of a module's hooks: the stem's patches, which hang on its root, come after that.
            yield module.register_forward_hook(lambda module, _, given: self._output(name, module, given), prepend=True)

    def _output(self, name: str, module: nn.Module, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.numel():
            return
        if isinstance(module, nn.Linear | GainedLinear) and output.ndim == 3:  # a product and a sum in the graph
            self._keep(name, "product", _largest(output - module.bias))
        self._keep(name, "output", _largest(output))

    def _normed_patches(self, name: str, full_scale: float, patches: Tensor, rooted: Tensor) -> None:
        """Keep the largest of the scaled patches and of r, which they carry; see `NormedPatchConvolution`."""
        inverse = torch.rsqrt((rooted * rooted).sum(dim=1) + EPS)
        scaled = patches.abs().amax(dim=1) * (inverse / full_scale)
        self._keep(name, "normed patches", larger(float(scaled.amax()), float(inverse.amax())))

    def _keep(self, name: str, what: str, largest: float) -> None:
        self._tensors[name, what] = larger(self._tensors.get((name, what), 0.0), largest)

    def _response(self, name: str, module: ResponseGain, hidden: Tensor) -> None:
        norm = float(torch.linalg.vector_norm(hidden, dim=module.position_axes).amax())
        _, known = self._responses.get(name, (0, 0.0))
        self._responses[name] = (
            math.prod(hidden.shape[axis] for axis in module.position_axes),
            larger(known, norm * norm),
        )

    def _norm(self, name: str, tensor: Tensor, *, axis: int) -> None:
        centred = tensor - tensor.mean(dim=axis, keepdim=True)
        root = torch.linalg.vector_norm(centred, dim=axis).amax() / centred.shape[axis] ** 0.5
        deviation, rms = self._norms.get(name, (0.0, 0.0))
        self._norms[name] = (larger(deviation, _largest(centred)), larger(rms, float(root)))


def _largest(tensor: Tensor) -> float:
    """Return the largest absolute value without a copy of the tensor; NaN stays NaN."""
    low, high = torch.aminmax(tensor)
    return larger(abs(float(low)), abs(float(high)))
