"""The size of a network's images, square or not, and the ways in which pictures are brought to it.

A record has the side of a square as one number, so that it reads 224, and [height, width] of everything else.
"""

import re

from cnx_deploy.core.errors import InputError

__all__ = [
    "CROP_MODES", "INTERPOLATIONS", "MAX_CHANNELS", "STRIDE", "ImageSize", "ImageSizes", "SizeRange", "canonical_size",
    "check_image_size", "check_size_range", "in_range", "parse_image_size", "parse_image_sizes", "sides", "size_text",
    "stage_sides",
]  # fmt: skip

ImageSize = int | tuple[int, int]
"""Side of a square image in pixels, or (height, width).

Without bounds in the type: msgspec 0.22 ends the process when it reads a union of a bounded number and a pair of them.
"""
SizeRange = tuple[ImageSize, ImageSize]
"""The smallest and the largest size of images that need not have one size; each side has its own range."""
ImageSizes = tuple[ImageSize, ImageSize, ImageSize]
"""The smallest, the typical and the largest size."""
MAX_SIDE = 1 << 16
MAX_CHANNELS = 16
"""The most channels of an image; Sentinel-2 has 13."""
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")
CROP_MODES = ("center", "center-floor", "squash", "border", "corner")
"""See `core.preprocessing.Preprocessing`."""
STRIDE = 32
"""Input pixels per position of the last stage: 4 (stem) times 2 for each of three downsamplings."""


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels."""
    return (size, size) if isinstance(size, int) else size


def canonical_size(size: ImageSize) -> ImageSize:
    """One number for a square. Raises InputError for sides that the network cannot take."""
    both = (size, size) if isinstance(size, int) else size
    if not isinstance(both, tuple | list) or len(both) != 2 or not all(isinstance(side, int) for side in both):
        raise InputError(f"{size!r} is no image size: expected a side such as 224, or (height, width) in pixels.")
    height, width = both
    check_image_size(height, width)
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """`224`, or `256x512` as height x width."""
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def parse_image_size(text: str) -> ImageSize:
    """Read what `size_text` writes. Raises InputError for anything else."""
    match = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip())
    if match is None:
        raise InputError(f"{text!r} is no image size: expected a side such as 224, or height x width such as 256x512.")
    return canonical_size((int(match[1]), int(match[2] or match[1])))


def parse_image_sizes(text: str) -> ImageSize | ImageSizes:
    """Read one size, or smallest:typical:largest as in 224:448:640 and 256x256:512x1024:512x2048."""
    parts = text.split(":")
    if len(parts) == 1:
        return parse_image_size(text)
    if len(parts) != 3:
        raise InputError(f"{text!r} is no range of sizes: expected smallest:typical:largest, such as 224:448:640.")
    smallest, typical, largest = map(parse_image_size, parts)
    check_size_range((smallest, largest), typical)
    return smallest, typical, largest


def check_size_range(limits: SizeRange, typical: ImageSize) -> None:
    """Raise InputError unless both sides of `typical` lie between those of the smallest and the largest size."""
    pairs = zip(*map(sides, limits), strict=True)
    if any(low != high <= 2 * STRIDE for low, high in pairs):
        raise InputError(
            f"The largest image size is {size_text(limits[1])}: an open side needs more than {2 * STRIDE} there. "
            "Leave more open, or export for one size."
        )
    if not in_range(typical, limits) or sides(limits[0]) == sides(limits[1]):
        raise InputError(
            f"The image sizes {size_text(limits[0])}, {size_text(typical)} and {size_text(limits[1])} do not rise: "
            "expected smallest, typical and largest, such as 224:448:640. For one size give one."
        )


def in_range(size: ImageSize, limits: SizeRange) -> bool:
    """Whether both sides of `size` lie between those of the smallest and the largest size."""
    return all(low <= side <= high for low, side, high in zip(*map(sides, (limits[0], size, limits[1])), strict=True))


def stage_sides(size: ImageSize, stage: int) -> tuple[int, int]:
    """Height and width of the feature maps of a stage, 0 to 3: strided convolutions leave out what does not fit."""
    height, width = sides(size)
    return height // (4 << stage), width // (4 << stage)


def check_image_size(height: int, width: int) -> None:
    """Raise InputError unless both sides have at least 32 pixels, so that the last stage has a position."""
    if not STRIDE <= min(height, width) <= max(height, width) <= MAX_SIDE:
        raise InputError(
            f"The image size {height}x{width} does not fit: both sides need {STRIDE} to {MAX_SIDE} pixels, for the "
            f"network divides each by {STRIDE}."
        )
