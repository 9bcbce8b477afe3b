"""Scales and gains of tensors in eight bits, measured on images while the deploy form runs in FP32.

The first two passes measure each channel, from which the gains follow; the next ones, with the gains, each tensor. The
same images in the same order give the same record.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import (
    GAIN_FOLDS,
    LARGEST,
    LARGEST_EXPONENT,
    METHODS,
    PARTS,
    PLACEMENTS,
    WITHOUT_SCALED_PRODUCT,
    BlockScales,
    EightBits,
    EightBitType,
    Method,
)
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize, stage_sides
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import DeployedConvNeXtV2, check_parts, deploy_form
from cnx_deploy.model.quantised import QuantisedBlock, Quantiser

__all__ = ["calibrate", "made_up_scales"]

PERCENTILE = 0.9999
"""The share of values that the scale of "percentile" does not saturate."""
FEWEST_POSITIONS = 16
"""Below, the compiler spells GRN's sums out and scales the hidden tensor in the same kernel; in eight bits it needs two
(3x3 and 2x2 positions; TensorRT-RTX 1.7.1)."""
MOST_EVENED = 2.0**13
"""The largest value that a gain may bring a channel to; FP16 ends at 2^16."""
SHARED, EVENED = {"x": "w1", "h": "g", "s": "w2"}, {"p": "w1", "o": "g"}
"""Letters with gains, each with the weight that is stored in eight bits beside it."""
SHARED_STEPS = 33
"""Quarters of a power of two by which the weight's scale may grow."""
TINY = 1e-30
BINS = 4096
SHARES = tuple(step / 40 for step in range(12, 41))
"""Of the largest value, where "mse" looks for the smallest error."""

Key = tuple[str, str]
"""Block and letter."""
Gains = Mapping[str, Mapping[str, tuple[int, ...]]]
"""Exponents by block and letter."""


def calibrate(
    model: ConvNeXtV2,
    spec: DeploySpec,
    batches: Callable[[], Iterable[Tensor]],
    *,
    method: Method = "max",
    kept: Sequence[str] = (),
    targets: Collection[str] = (),
    progress: Callable[[int], None] | None = None,
) -> EightBits:
    """Measure the scales of a network for `spec.precision`.

    Args:
        model: the training form, which is left as it was.
        spec: the deploy form that will be exported, still without scales; its folds say which gains there are.
        batches: gives the images anew each time it is called, as the file takes them; it is called three or four times.
        method: "max" maps the largest value to the largest number, "mse" takes the scale of the least squared error,
            "percentile" the one that saturates a value in 10,000.
        kept: parts of the network that stay in FP16, such as "stages.2.3" or "stages.2.3.pwconv2".
        targets: GPUs, such as "sm75", that the file is for: what one of them has no kernel for stays in FP16.
        progress: is told the images of each batch that was run.

    Raises InputError for a precision without eight bits, an unknown method or part, for no images, and for values that
    are not finite.
    """
    if spec.row.placement is None:
        raise InputError(f"{spec.precision} stores nothing in eight bits. Calibrate for fp8 or int8.")
    if method not in METHODS:
        raise InputError(f"No calibration method is called {method!r}. Choose one of: {', '.join(METHODS)}.")
    check_parts(tuple(kept), model.variant)
    run = _Run(model, spec, tuple(kept), batches, progress)
    run.scales_in_half = not set(targets).isdisjoint(WITHOUT_SCALED_PRODUCT)
    gains = run.gains()
    found: Mapping[Key, _Observer] = run.observe(gains, lambda _: _Largest())
    if method != "max":
        limits = {key: observer.limit() for key, observer in found.items()}
        found = run.observe(gains, lambda key: _Histogram(limits[key], run.types[key[1]], method))
    blocks = {
        name: BlockScales(
            scales={letter: _half(found[name, letter].limit() / LARGEST[run.types[letter]]) for letter in letters},
            gains={letter: " ".join(map(str, exponents)) for letter, exponents in gains.get(name, {}).items()},
        )
        for name, letters in run.letters.items()
    }
    return EightBits(
        placement=spec.row.placement,
        blocks=blocks,
        method=method,
        images=run.images,
        data_sha256=run.digest,
        kept=run.kept,
    )


class _Run:
    """Passes of the deploy form in FP32 over the images, each with observers of its own."""

    def __init__(
        self,
        model: ConvNeXtV2,
        spec: DeploySpec,
        kept: tuple[str, ...],
        batches: Callable[[], Iterable[Tensor]],
        progress: Callable[[int], None] | None,
    ) -> None:
        self._model, self._batches, self._progress = model, batches, progress
        self._spec = replace(spec, precision="fp32", layout="gpu", keep_fp32=())
        self.kept = (*kept, *spec.keep_fp32)
        self._placement = str(spec.row.placement)
        self.types: Mapping[str, EightBitType] = PLACEMENTS[self._placement].types
        self.images, self.digest = 0, ""
        self.letters: dict[str, tuple[str, ...]] = {}
        self.scales_in_half = False

    def observe(self, gains: Gains, make: Callable[[Key], "_Observer"]) -> dict[Key, "_Observer"]:
        """Run every image once; an observer for each tensor that is to be stored in eight bits."""
        blocks = self._blocks(gains)
        self.kept = tuple(sorted({*self.kept, *self._without_kernels(blocks)}))
        observers: dict[Key, _Observer] = {}
        for name, block in blocks.items():
            self.letters[name] = tuple(letter for letter in block.letters if self._is_stored(name, letter))
            for letter in self.letters[name]:
                observer = observers[name, letter] = make((name, letter))
                if (constant := block.constants.get(letter)) is None:
                    block.taps[letter] = observer
                elif constant.weight is not None:
                    observer(constant.weight.detach().flatten(1).t() if letter == "w2" else constant.weight.detach())
        self.letters = {name: letters for name, letters in self.letters.items() if letters}
        digest, self.images = hashlib.sha256(), 0
        with torch.inference_mode():
            for images in self._batches():
                self._form(images)
                self.images += len(images)
                digest.update(images.numpy().tobytes())
                if self._progress is not None:
                    self._progress(len(images))
        if not self.images:
            raise InputError("There is no image to calibrate on. Give a folder of images that the network will see.")
        self.digest = digest.hexdigest()
        return observers

    def gains(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The exponents of the gains: first of products, then, with those, of what goes into products."""
        gains: dict[str, dict[str, tuple[int, ...]]] = {}
        for letters in (EVENED, SHARED):
            found = self.observe(gains, lambda _: _Channels())
            for name, own in self.letters.items():
                of = {letter: cast("_Channels", found[name, letter]) for letter in own}
                for letter, weight in letters.items():
                    wanted = letter in PLACEMENTS[self._placement].gains and GAIN_FOLDS[letter] in self._spec.folds
                    if letter in of and wanted:
                        choose = _shared if letters is SHARED else _evened
                        exponents = choose(of[letter], of.get(weight))
                        gains.setdefault(name, {}).update({letter: exponents} if any(exponents) else {})
        return gains

    def _blocks(self, gains: Gains) -> dict[str, QuantisedBlock]:
        """Make the form with these gains, ready to be observed."""
        self._form, blocks = _without_scales(self._model, self._spec, self._placement, gains)
        return blocks

    def _without_kernels(self, blocks: Mapping[str, QuantisedBlock]) -> Iterator[str]:
        """Parts of blocks that scale the hidden tensor, where that takes a kernel more than in FP16."""
        for name, block in blocks.items():
            positions = math.prod(stage_sides(self._spec.image_size, int(name.split(".")[1])))
            if block.scales_hidden and positions < FEWEST_POSITIONS:
                yield from (f"{name}.grn", f"{name}.pwconv2")
            elif block.scales_hidden and self.scales_in_half:
                yield f"{name}.pwconv2"

    def _is_stored(self, name: str, letter: str) -> bool:
        part = f"{name}.{PARTS[letter]}."
        return letter in self.types and not any(part.startswith(f"{kept}.") for kept in self.kept)


def made_up_scales(
    model: ConvNeXtV2, placement: str, image_size: ImageSize, *, letters: Collection[str] | None = None,
    gains: bool = True, targets: Collection[str] = (),
) -> EightBits:  # fmt: skip
    """Scales that nobody measured, to count kernels and bytes by, which depend on no value; never to export with.

    Args:
        model: any weights; they are not looked at.
        placement: "fp8" or "int8".
        image_size: of the file, which decides where GRN's gain is applied.
        letters: the tensors that are stored in eight bits (`core.eight_bits.LETTERS`), None for all of the placement.
        gains: 2 and 1/2 in turn for the channels of each tensor that has gains, else none.
        targets: as of `calibrate`.
    """
    row = PLACEMENTS[placement]
    _, blocks = _without_scales(model, DeploySpec("fp32", image_size, layout="gpu"), placement, {})
    scales = {}
    for name, block in blocks.items():
        stored = [letter for letter in block.letters if letter in row.types and letter in (letters or row.types)]
        if not set(targets).isdisjoint(WITHOUT_SCALED_PRODUCT):
            stored = [letter for letter in stored if letter not in ("s", "w2")]
        width = block.dwconv.in_channels
        channels = {
            letter: width if letter in "xo" else 4 * width for letter in row.gains if gains and letter in stored
        }
        scales[name] = BlockScales(
            scales={letter: 2.0**-8 if letter in ("w1", "w2", "g") else 2.0**-5 for letter in stored},
            gains={letter: " ".join(["1", "-1"] * (count // 2)) for letter, count in channels.items()},
        )
    return EightBits(placement=placement, blocks=scales, method="max", images=0, data_sha256="")


def _without_scales(
    model: ConvNeXtV2, spec: DeploySpec, placement: str, gains: Gains
) -> tuple[DeployedConvNeXtV2, dict[str, QuantisedBlock]]:
    """The form with blocks of eight bits that round nothing yet, and those blocks by name."""
    depths = model.variant.depths
    names = [f"stages.{stage}.{index}" for stage, depth in enumerate(depths) for index in range(depth)]
    scales = {
        name: BlockScales(
            scales={},
            gains={letter: " ".join(map(str, exponents)) for letter, exponents in gains.get(name, {}).items()},
        )
        for name in names
    }
    record = EightBits(placement=placement, blocks=scales, method="max", images=0, data_sha256="")
    form = deploy_form(model, replace(spec, eight_bits=record))
    return form, {name: cast("QuantisedBlock", form.get_submodule(name)) for name in names}


class _Observer(nn.Module):
    """Sees a tensor and hands it on as it is."""

    def forward(self, tensor: Tensor) -> Tensor:
        """Look at any tensor, channels last."""
        self.see(tensor.detach())
        return tensor

    @abstractmethod
    def see(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def limit(self) -> float:
        """The value that is mapped to the largest number."""


class _Channels(_Observer):
    """The largest absolute value and the mean square of each column, and of each row of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self._largest = [torch.zeros(()), torch.zeros(())]
        self._squares = [torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)]
        self._seen = 0

    def see(self, tensor: Tensor) -> None:
        matrices = tensor.abs().reshape(-1, *tensor.shape[-2:])
        for axis in (0, 1):
            across = matrices if axis == 0 else matrices.transpose(1, 2)
            self._largest[axis] = torch.maximum(self._largest[axis], across.flatten(0, 1).amax(dim=0))
            self._squares[axis] = self._squares[axis] + across.double().square().mean(dim=1).sum(dim=0)
        self._seen += len(matrices)

    @property
    def columns(self) -> Tensor:
        """The largest value of each column, float64."""
        return self._largest[0].double()

    @property
    def column_squares(self) -> Tensor:
        """The mean square of each column."""
        return self._squares[0] / self._seen

    @property
    def rows(self) -> Tensor:
        """The largest value of each row, float64."""
        return self._largest[1].double()

    @property
    def row_squares(self) -> Tensor:
        """The mean square of each row."""
        return self._squares[1] / self._seen

    def limit(self) -> float:
        return float(self.columns.amax())


class _Largest(_Observer):
    def __init__(self) -> None:
        super().__init__()
        self.largest = torch.zeros(())

    def see(self, tensor: Tensor) -> None:
        self.largest = torch.maximum(self.largest, tensor.abs().amax())

    def limit(self) -> float:
        return float(self.largest)


class _Histogram(_Observer):
    """Absolute values counted in bins up to the largest one."""

    def __init__(self, largest: float, kind: EightBitType, method: Method) -> None:
        super().__init__()
        self.most, self.kind, self.method = largest, kind, method
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def see(self, tensor: Tensor) -> None:
        if self.most:
            self.counts += torch.histc(tensor.abs().float(), BINS, 0.0, self.most).double()

    def limit(self) -> float:
        """Of the least squared error, or of the percentile."""
        if not self.most:
            return 0.0
        if self.method == "percentile":
            reached = torch.cumsum(self.counts, 0) / self.counts.sum()
            return self.most * (int(torch.searchsorted(reached, PERCENTILE)) + 1) / BINS
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.most / BINS)
        errors = {}
        for share in SHARES:
            rounded = Quantiser(share * self.most / LARGEST[self.kind], self.kind)(centres)
            errors[share * self.most] = float((self.counts * (rounded - centres) ** 2).sum())
        return min(errors, key=lambda limit: errors[limit])


def _evened(tensor: "_Channels", weight: "_Channels | None") -> tuple[int, ...]:
    """Exponents that bring each channel of a product near the largest one, where its weight does not grow by that."""
    room = [largest.amax() / largest for largest in (tensor.columns, *([] if weight is None else [weight.columns]))]
    return _whole(torch.log2(torch.stack(room).amin(dim=0)).floor().nan_to_num(0.0, 0.0, 0.0), tensor.columns)


def _shared(tensor: "_Channels", weight: "_Channels | None") -> tuple[int, ...]:
    """Exponents for the channels of a product's input, which its weight takes back: those of the least squared error.

    With scales a and b of tensor and weight the error of a product's outputs is, up to a factor, the sum over its input
    channels of a²·W²/m² + b²·X²·m², with X² and W² the mean squares of a channel and of the weight's row. For each b
    (in units of a) the best m is known, between what either scale can hold; the best b is looked for. Without a weight
    in eight bits the tensor is evened out.
    """
    if weight is None:
        return _evened(tensor, None)
    alive = (tensor.columns > 0) & (weight.rows > 0)
    largest, rows = (torch.where(alive, values, 1.0) for values in (tensor.columns, weight.rows))
    squares, row_squares = (torch.where(alive, values, 0.0) for values in (tensor.column_squares, weight.row_squares))
    if not bool(alive.any()):
        return (0,) * len(alive)
    best = (math.inf, torch.zeros_like(largest))
    for step in range(SHARED_STEPS):
        other = float((largest * rows)[alive].amax()) * 2.0 ** (step / 4)
        ideal = torch.sqrt(torch.sqrt(row_squares.clamp_min(TINY) / squares.clamp_min(TINY)) / other)
        gain = torch.minimum(torch.maximum(ideal, rows / other), 1.0 / largest)
        error = float((row_squares / gain**2 + other**2 * squares * gain**2)[alive].sum())
        if error < best[0]:
            best = (error, torch.log2(gain))
    wanted = torch.where(alive, best[1] - best[1][alive].median(), 0.0)
    return _whole(wanted.round(), tensor.columns)


def _whole(exponents: Tensor, largest: Tensor) -> tuple[int, ...]:
    """Exponents within their limits: of a gain, and of the value that it brings a channel to."""
    most = torch.floor(torch.log2(MOST_EVENED / largest.clamp_min(TINY))).clamp_min(0.0)
    within = torch.minimum(exponents.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT), most)
    return tuple(int(exponent) for exponent in torch.where(largest > 0, within, 0.0))


def _half(scale: float) -> float:
    """The scale as FP16 holds it, for the file does; one for a tensor of zeros."""
    if not math.isfinite(scale):
        raise InputError(
            "A tensor of the network is not finite on the calibration images. `diagnose headroom` says which."
        )
    return max(float(torch.tensor(scale).half()), 2.0**-24) if scale else 1.0
