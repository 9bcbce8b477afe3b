"""How a model is deployed: precision, layout, input and folds, as a record without torch; `model.deploy` obeys it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from cnx_deploy.core.eight_bits import EightBits
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize, SizeRange, canonical_size, check_size_range, size_text
from cnx_deploy.core.precision import Precision, find_precision
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, IMAGENET_STD, PerChannel

if TYPE_CHECKING:
    import torch

__all__ = ["ANSWER_DEFAULTS", "FOLDS", "TEMPERATURES", "DeploySpec", "InputKind", "Layout", "TestTimeAugmentation"]

Layout = Literal["gpu", "cpu", "openvino"]
InputKind = Literal["float", "uint8", "normalised"]
TestTimeAugmentation = Literal["flip"]

TEMPERATURES = (1e-2, 1e2)
"""The smallest and largest temperature: beyond, weights of the head above 655 would leave the FP16 range."""
ANSWER_DEFAULTS: Mapping[str, Any] = {"tta": None, "temperature": 1.0}
"""Fields that earlier files do not have, and what they stand at there: written only where they differ."""

FOLDS = {
    "input-normalisation": "mean and std of the preprocessing into the stem's convolution",
    "norm-affine": "gain and shift of a block's LayerNorm into its first pointwise layer",
    "downsample-affine": "gain and shift of a downsampling's LayerNorm into its convolution",
    "lateral-affine": "gain and shift of the norms on the stages' outputs into the pyramid's 1x1 convolutions",
    "gathered-resize": "bilinear resizing of segmentation as gathers that join what reads them (gpu)",
    "finest-level": "the 3x3 of detection's finest level into its lateral and its upsampling (gpu)",
    "head-affine": "gain and shift of the last LayerNorm into the head",
    "layer-scale": "LayerScale into the second pointwise layer (V1 alone)",
    "grn-beta": "GRN's beta into the second pointwise bias",
    "grn-gain": "GRN's gain into the second pointwise weight where that moves fewer bytes (gpu)",
    "residual": "the second pointwise layer as a 1x1 convolution that adds the residual, elsewhere (gpu)",
    "patches": "the stem as a 1x1 convolution over 4x4 patches (gpu)",
    "stem-norm": "the stem's LayerNorm onto the patches, before their convolution, where that moves fewer bytes (gpu)",
    "norm-gain": "powers of two that even out the LayerNorm's output into the first pointwise weight (int8)",
    "product-gain": "the same of the first product into the first pointwise weight (int8)",
    "hidden-gain": "the same of the hidden tensor into GRN's gain or the second weight (int8)",
    "scaled-gain": "the same of the scaled hidden tensor into GRN's gain and the second weight (fp8, int8)",
    "output-gain": "the same of the second product into the second pointwise weight (fp8, int8)",
    "blocked": "GRN's mean square by pooling, its gain and the stem's affine by convolutions (cpu)",
    "channels-last": "norms over tokens, GRN's norm as one reduction, the stem's affine as a convolution (openvino)",
}
"""What a deploy form folds or rewrites, by the name that leaves it out (`DeploySpec.leave_out`)."""

NEEDED_FOLDS = frozenset({"grn-beta", "grn-gain", "layer-scale", "residual"})
"""Those that blocks in eight bits are made of."""


@dataclass(frozen=True, slots=True)
class DeploySpec:
    """How a model is deployed.

    `image_size` is the side in pixels, or (height, width); it decides, per block, where GRN's gain is applied. `mean`
    and `std` are the statistics of the preprocessing in units of a [0, 1] image, as many as there are channels C. They
    are folded into the stem, so the deployed input is raw: "float" takes (N, C, H, W) float32 in [0, 1], "uint8"
    takes (N, H, W, C) uint8. A file that came from elsewhere takes "normalised" images, (N, C, H, W) float32 less the
    mean and divided by std.
    `size_range` (smallest, largest) leaves height and width open between them; `image_size` is then the typical size.
    `precision` names a row of `precision.PRECISIONS`. `layout` None means tokens ("gpu") for a precision with FP32
    islands and channels-first ("cpu") otherwise; "openvino" is channels-first as OpenVINO runs it best. `leave_out`
    names folds (`FOLDS`) that are not to be made; the function stays. `keep_fp32` names modules
    (`model.deploy.parts_of`) that stay in FP32 in half precision.
    `tta` "flip" answers the mean of the outputs for an image and its left-right mirror. The class scores are divided
    by `temperature`. A task may refuse either (`model.tasks`).
    `outputs` are words of the task for what the file gives, such as "embedding"; none is what the task gives by itself.
    `eight_bits` are the scales of the tensors that are stored in eight bits, which a precision such as "int8" needs.
    """

    precision: str = "fp32"
    image_size: ImageSize = 224
    input_kind: InputKind = "float"
    layout: Layout | None = None
    mean: PerChannel = IMAGENET_MEAN
    std: PerChannel = IMAGENET_STD
    leave_out: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    size_range: SizeRange | None = None
    tta: TestTimeAugmentation | None = None
    temperature: float = 1.0
    outputs: tuple[str, ...] = ()
    eight_bits: EightBits | None = None

    def __post_init__(self) -> None:
        words: Any = self.outputs
        object.__setattr__(self, "outputs", tuple(dict.fromkeys((words,) if isinstance(words, str) else words)))
        object.__setattr__(self, "image_size", canonical_size(self.image_size))
        if self.size_range is not None:
            smallest, largest = map(canonical_size, self.size_range)
            object.__setattr__(self, "size_range", (smallest, largest))
            check_size_range((smallest, largest), self.image_size)
        find_precision(self.precision)
        _check_choice("input kind", self.input_kind, get_args(InputKind))
        if self.layout is None:
            object.__setattr__(self, "layout", "gpu" if self.is_half else "cpu")
        _check_choice("layout", str(self.layout), get_args(Layout))
        for fold in self.leave_out:
            _check_choice("fold", fold, tuple(FOLDS))
        object.__setattr__(self, "leave_out", tuple(sorted(set(self.leave_out))))
        object.__setattr__(self, "keep_fp32", tuple(sorted(set(self.keep_fp32))))
        if self.keep_fp32 and not self.is_half:
            raise InputError(
                f"Parts are kept in FP32 in a file of half precision, not in {self.precision}. Leave keep_fp32 out, "
                "or ask for fp16."
            )
        if self.eight_bits is not None or self.row.placement is not None:
            self._check_eight_bits()
        if len(self.mean) != len(self.std):
            raise InputError(f"mean and std have a number for each channel; got {self.mean} and {self.std}.")
        if self.tta is not None:
            _check_choice("test-time augmentation", self.tta, get_args(TestTimeAugmentation))
        if not TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1]:  # NaN is refused too
            raise InputError(
                f"A temperature is a number from {TEMPERATURES[0]} to {TEMPERATURES[1]:g} that class scores are "
                f"divided by, not {self.temperature}. `cnx-deploy eval --fit-temperature` finds one."
            )
        if any(value <= 0.0 for value in self.std):
            raise InputError(f"Every std of the normalisation must be positive, got {self.std}.")

    def _check_eight_bits(self) -> None:
        if self.eight_bits is not None and self.row.placement not in (None, self.eight_bits.placement):
            raise InputError(
                f"The scales are of {self.eight_bits.placement}, not of {self.precision}. Calibrate for "
                f"{self.precision}."
            )
        if self.layout != "gpu":
            raise InputError(f"Eight bits are of the layout gpu, not {self.layout}. Leave --optimize-for out.")
        if missing := sorted(NEEDED_FOLDS & set(self.leave_out)):
            raise InputError(f"Eight bits need the fold {missing[0]}. Leave --without-fold {missing[0]} out.")

    @property
    def size_text(self) -> str:
        """`224`, or of open sizes `224:448:640`."""
        low, high = self.size_range or (None, None)
        return ":".join(size_text(size) for size in (low, self.image_size, high) if size is not None)

    @property
    def checked_sizes(self) -> tuple[ImageSize, ...]:
        """The sizes of images that a check takes: the typical one, and of open sizes the ends."""
        return tuple(dict.fromkeys((self.image_size, *(self.size_range or ()))))

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    @property
    def row(self) -> Precision:
        """What the precision means to every stage."""
        return find_precision(self.precision)

    @property
    def is_half(self) -> bool:
        """Whether tensors are stored in a half precision, with FP32 islands."""
        return self.row.has_islands

    def keeps(self, module: str) -> bool:
        """Whether a module of the deploy form stays in FP32: it or what it is part of is named."""
        return any(f"{module}.".startswith(f"{kept}.") for kept in self.keep_fp32)

    def dtype_of(self, module: str) -> "torch.dtype":
        """The type of a module's parameters, by its name in the deploy form."""
        import torch  # the commands that read manifests alone do not pay for it

        dtype = torch.float32 if self.keeps(module) else getattr(torch, self.row.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def scales_input(self) -> bool:
        """Whether a [0, 1] image is brought to [0, 255] before it is rounded to FP16 or BF16.

        There the levels of an 8-bit image are exact; in [0, 1] FP16 is off by up to 0.06 of a level, and the
        normalisation, which is folded and so comes later, would magnify it on images of low contrast.
        """
        return self.is_half and self.input_kind == "float"

    @property
    def answer(self) -> dict[str, Any]:
        """How the outputs differ from those of the network itself, by field; empty where they do not."""
        return {name: value for name, off in ANSWER_DEFAULTS.items() if (value := getattr(self, name)) != off}

    @property
    def passes(self) -> int:
        """How often an image goes through the network: its mirror does too where a flip is averaged."""
        return 1 if self.tta is None else 2

    @property
    def width_axis(self) -> int:
        """The axis of the images' width where they enter the network."""
        return 2 if self.input_kind == "uint8" else 3

    @property
    def folds(self) -> frozenset[str]:
        """The folds that are made."""
        return frozenset(FOLDS) - frozenset(self.leave_out)

    @property
    def reads_patches(self) -> bool:
        """Whether the stem takes the images as they come, in whichever layout."""
        return self.layout == "gpu" and "patches" in self.folds and self.size_range is None

    @property
    def flattens_norms(self) -> bool:
        """Whether norms of maps run over tokens of three axes; where sizes are open their number is not known."""
        return self.layout == "openvino" and "channels-last" in self.folds and self.size_range is None

    @property
    def full_scale(self) -> float:
        """What a white pixel is where the stem reads it."""
        return 255.0 if self.input_kind == "uint8" or self.scales_input else 1.0


def _check_choice(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"No {what} is called {value!r}. Choose one of: {', '.join(allowed)}.")
