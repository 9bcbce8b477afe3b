"""Ranges of a network's tensors, statistics and parameters, recorded while the deploy form runs in FP32.

The form is the FP16 file's own: the layout of tokens, an input of 0 to 255, every fold. Hooks keep running maxima and
no activation, so the memory is that of one batch.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.diagnosis.headroom.ranges import NormRange, ParameterRange, ResponseRange, TensorRange, larger
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

__all__ = ["Recorder", "parameter_ranges", "recorded_form"]

SMALLEST_NORMAL = 2.0**-14
"""The smallest FP16 number with all of its eleven bits."""
STEM_NORM = "downsample_layers.0.1"

OBSERVED = (
    nn.Conv2d,
    nn.Linear,
    nn.GELU,
    ChannelsFirstNorm,
    GainedLinear,
    PatchConvolution,
    ResponseGain,
    TokenBlock,
    TokenNorm,
)
"""Modules whose output an FP16 file stores."""


def recorded_form(model: ConvNeXtV2, preprocessing: Preprocessing) -> DeployedConvNeXtV2:
    """The deploy form of a default FP16 export in FP32; its input is (N, S, S, 3) uint8.

    FP16 files bring their input to [0, 255], so their stem has the weights of the byte input.
    """
    spec = DeploySpec(
        precision="fp32",
        image_size=preprocessing.image_size,
        input_kind="uint8",
        layout="gpu",
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return deploy_form(model, spec)


def parameter_ranges(form: nn.Module) -> tuple[ParameterRange, ...]:
    """Count, parameter by parameter of an FP32 form, what its cast to FP16 makes of it."""
    return tuple(_parameter_range(name, parameter.detach()) for name, parameter in form.named_parameters())


class Recorder:
    """Runs a deploy form over batches and keeps what it saw; `model` is the training form that it was made from."""

    def __init__(self, form: DeployedConvNeXtV2, model: ConvNeXtV2, preprocessing: Preprocessing) -> None:
        self.form = form
        self.images = 0
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
        return tuple(NormRange(module, *found) for module, found in self._norms.items())

    def run(self, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> None:
        """Record (N, S, S, 3) uint8 batches; `progress` is told the images of each."""
        with self._hooked(), torch.inference_mode():
            for pixels in batches:
                if self._stem is not None:  # computed nowhere in this form, where the norm is on the patches
                    self._norm(STEM_NORM, self._stem(normalise(pixels, self._preprocessing)), axis=1)
                self.form(pixels)
                self.images += len(pixels)
                if progress is not None:
                    progress(len(pixels))

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        with contextlib.ExitStack() as handles:
            for name, module in self.form.named_modules():
                for handle in self._hooks(name, module):
                    handles.callback(handle.remove)
            yield

    def _hooks(self, name: str, module: nn.Module) -> Iterator[RemovableHandle]:
        """The hooks of one module; what it is given is seen before what it gives."""
        before: dict[type[nn.Module], Callable[[str, Any, Any], None]] = {
            GainedLinear: self._gained_weight,
            ResponseGain: self._response,
            TokenNorm: lambda name, _, given: self._norm(name, given[0], axis=-1),
            ChannelsFirstNorm: lambda name, _, given: self._norm(name, given[0], axis=1),
        }
        if (hook := before.get(type(module))) is not None:
            yield module.register_forward_pre_hook(lambda module, given: hook(name, module, given))
        if isinstance(module, TokenBlock) and module.grn is not None and not module.gain_in_weight:
            yield module.pwconv2.register_forward_pre_hook(
                lambda _, given: self._tensor(name, "hidden × gain", given[0])
            )
        if isinstance(module, NormedPatchConvolution):
            yield module.root.register_forward_hook(
                lambda _, given, rooted: self._normed_patches(name, module.full_scale, given[0], rooted)
            )
        if isinstance(module, OBSERVED):
            # First of a module's hooks: the stem's patches, which hang on its root, come after that.
            yield module.register_forward_hook(lambda module, _, given: self._output(name, module, given), prepend=True)

    def _output(self, name: str, module: nn.Module, output: Tensor) -> None:
        if isinstance(module, nn.Linear | GainedLinear) and output.ndim == 3:  # a product and a sum in the graph
            self._tensor(name, "product", output - module.bias)
        self._tensor(name, "output", output)

    def _tensor(self, name: str, what: str, tensor: Tensor) -> None:
        low, high = torch.aminmax(tensor)  # no copy, and NaN stays NaN
        self._keep(name, what, larger(abs(float(low)), abs(float(high))))

    def _gained_weight(self, name: str, module: GainedLinear, given: tuple[Tensor, Tensor]) -> None:
        """The largest |gain · weight|, without the product: one a sample, (N, 4C, C)."""
        gains = given[1].abs()[:, 0] * module.weight.abs().amax(dim=1)  # (N, 4C)
        self._keep(name, "gained weight", float(gains.amax()))

    def _normed_patches(self, name: str, full_scale: float, patches: Tensor, rooted: Tensor) -> None:
        """The largest of the scaled patches and of r, which they carry; see `NormedPatchConvolution`."""
        inverse = torch.rsqrt((rooted * rooted).sum(dim=1) + EPS)
        scaled = patches.abs().amax(dim=1) * (inverse / full_scale)
        self._keep(name, "normed patches", larger(float(scaled.amax()), float(inverse.amax())))

    def _keep(self, name: str, what: str, largest: float) -> None:
        self._tensors[name, what] = larger(self._tensors.get((name, what), 0.0), largest)

    def _response(self, name: str, module: ResponseGain, given: tuple[Tensor]) -> None:
        hidden = given[0]
        norm = float(torch.linalg.vector_norm(hidden, dim=module.position_axis).amax())
        _, known = self._responses.get(name, (0, 0.0))
        self._responses[name] = (hidden.shape[module.position_axis], larger(known, norm * norm))

    def _norm(self, name: str, tensor: Tensor, *, axis: int) -> None:
        centred = tensor - tensor.mean(dim=axis, keepdim=True)
        low, high = torch.aminmax(centred)
        root = torch.linalg.vector_norm(centred, dim=axis).amax() / centred.shape[axis] ** 0.5
        deviation, rms = self._norms.get(name, (0.0, 0.0))
        found = larger(abs(float(low)), abs(float(high)))
        self._norms[name] = (larger(deviation, found), larger(rms, float(root)))


def _parameter_range(name: str, values: Tensor) -> ParameterRange:
    halves = values.half()
    magnitudes = halves.abs()
    low, high = torch.aminmax(values)
    return ParameterRange(
        name=name,
        count=values.numel(),
        largest=larger(abs(float(low)), abs(float(high))),
        subnormal=int(((magnitudes > 0) & (magnitudes < SMALLEST_NORMAL)).sum()),
        flushed=int(((halves == 0) & (values != 0)).sum()),
        nonfinite=int((~torch.isfinite(halves)).sum()),
    )
