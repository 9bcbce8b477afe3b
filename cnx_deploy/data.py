"""What a model is given: how a file becomes pixels, which files a folder holds, and batches made from a seed.

`Preprocessing` is the one definition that training's validation, parity, evaluation and prediction share. It equals
timm's evaluation transform (`timm.data.create_transform`, crop mode "center") to within 1/255.
"""

import math
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cnx_deploy.errors import InputError
from cnx_deploy.variants import check_image_size

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Dataset",
    "Preprocessing",
    "Split",
    "batches_from_folder",
    "find_dataset",
    "find_images",
    "image_like_batches",
    "load_image",
    "runner_input",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
MAX_PIXELS = 89_000_000
"""Largest image that is decoded, 267 MB as RGB; just below the size at which Pillow itself begins to warn."""
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """Resize, crop and normalisation of an evaluation image.

    `image_size` S: side in pixels. `crop_ratio` in (0, 1]: share of the resized short side that is kept; the short
    side becomes floor(S / crop_ratio), as in timm. `mean` and `std` are in units of a [0, 1] image, per RGB channel.
    """

    image_size: int = 224
    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        check_image_size(self.image_size, self.image_size)
        if not 0.0 < self.crop_ratio <= 1.0:
            raise InputError(f"A crop ratio lies in (0, 1], not at {self.crop_ratio}. The usual one is 0.875.")
        if self.interpolation not in RESAMPLING:
            raise InputError(f"No interpolation {self.interpolation!r}. Choose one of: {', '.join(RESAMPLING)}.")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise InputError(f"mean must be finite and std positive, not {self.mean} and {self.std}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a manifest; `from_dict` reads it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote; absent fields have their defaults. InputError on anything else."""
        known = {field.name for field in fields(cls)}
        if not known.issuperset(values):
            raise InputError(f"Preprocessing has the fields {', '.join(sorted(known))}, not {', '.join(values)}.")
        read = dict(values)
        try:
            for name in ("mean", "std"):
                if name in read:
                    red, green, blue = map(float, read[name])
                    read[name] = (red, green, blue)
            read["image_size"] = int(read.get("image_size", cls().image_size))
            read["crop_ratio"] = float(read.get("crop_ratio", cls().crop_ratio))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"Preprocessing {dict(values)} cannot be read ({error}): expected numbers, three for mean and std."
            ) from error
        return cls(**read)

    def pixels(self, image: Image.Image) -> Tensor:
        """Decoded image of any mode -> (S, S, 3) uint8 RGB, upright, resized and centre-cropped.

        InputError when the image is so long and thin that it cannot be resized within the memory limit.
        """
        rgb = upright_rgb(image)
        short = math.floor(self.image_size / self.crop_ratio)
        width, height = (short * side // min(rgb.size) for side in rgb.size)
        if width * height > MAX_PIXELS:
            raise InputError(
                f"An image of {rgb.width}x{rgb.height} is too long and thin: before its centre is cropped it would be "
                f"resized to {width}x{height}, over {MAX_PIXELS // 1_000_000} million pixels. Crop it first."
            )
        resized = rgb.resize((width, height), RESAMPLING[self.interpolation])
        left, top = round((width - self.image_size) / 2), round((height - self.image_size) / 2)
        cropped = resized.crop((left, top, left + self.image_size, top + self.image_size))
        return torch.from_numpy(np.array(cropped))

    def normalise(self, images: Tensor) -> Tensor:
        """(N, S, S, 3) uint8, or (N, 3, S, S) float in [0, 1] -> (N, 3, S, S) floats the training form takes."""
        unit = images.permute(0, 3, 1, 2).float() / 255.0 if images.dtype == torch.uint8 else images
        mean, std = (unit.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (unit - mean) / std


@dataclass(frozen=True, slots=True)
class Split:
    """Image files and the class index of each; -1 where a folder has no classes."""

    paths: tuple[Path, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Dataset:
    """Training and validation images over the same classes, whose names are sorted."""

    class_names: tuple[str, ...]
    train: Split
    val: Split


def load_image(path: Path) -> Image.Image:
    """Decode a JPEG, PNG, WebP or BMP file, told by its content.

    InputError names the file when it is another format, animated, empty, truncated or above MAX_PIXELS; the size is
    read from the header, before anything is decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is the stricter one
            image = Image.open(path, formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels, limit {MAX_PIXELS}")
            if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is an animation")
            image.load()
            image.getexif()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image ({error}): expected a whole JPEG, PNG, WebP or BMP file of at most "
            f"{MAX_PIXELS // 1_000_000} million pixels. Replace or remove it."
        ) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, turned as its EXIF orientation says; alpha is dropped, as torchvision and timm do."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        # Pillow clips 16-bit grey at 255; the upper byte is what it keeps of 16-bit colour.
        return Image.fromarray((np.asarray(upright).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode == "P" and "transparency" in upright.info:
        upright = upright.convert("RGBA")
    return upright.convert("RGB")


def find_images(root: Path) -> tuple[tuple[str, ...], Split]:
    """Class names and images of one folder: class folders, or images without labels (no names, labels -1).

    InputError when there is no such folder, nothing in it, or a class without images.
    """
    if not root.is_dir():
        raise InputError(f"{root} is not a folder: expected one that holds a folder of images for each class.")
    names = tuple(sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    if not names:
        loose = _images_in(root)
        if not loose:
            raise InputError(f"{root} holds no images: expected a folder of them for each class.")
        return (), Split(loose, (-1,) * len(loose))
    files = {name: _images_in(root / name) for name in names}
    empty = [name for name in names if not files[name]]
    if empty:
        raise InputError(f"{root} has no images for the class {', '.join(empty)}. Add some, or remove the folder.")
    paths = tuple(path for name in names for path in files[name])
    labels = tuple(label for label, name in enumerate(names) for _ in files[name])
    return names, Split(paths, labels)


def find_dataset(root: Path, *, seed: int = 0, val_share: float = 0.2) -> Dataset:
    """Read `train/` and `val/` (or `test/`) of `root`, or split its class folders, each class by the same share.

    InputError when there are no classes, one is empty or too small to split, or the two sides' classes differ.
    """
    if not (root / "train").is_dir():
        names, images = _labelled(root)
        return Dataset(names, *_stratified(names, images, seed, val_share))
    val_root = validation_folder(root)
    if val_root == root:
        raise InputError(f"{root} has train/ but no val/ or test/. Add one, or give {root / 'train'} to have it split.")
    (names, train), (val_names, val) = _labelled(root / "train"), _labelled(val_root)
    if names != val_names:
        difference = ", ".join(sorted(set(names) ^ set(val_names)))
        raise InputError(f"{root}: train/ and {val_root.name}/ must hold the same classes; only one has {difference}.")
    return Dataset(names, train, val)


def validation_folder(root: Path) -> Path:
    """`root/val`, else `root/test`, else `root` itself."""
    return next((root / name for name in ("val", "test") if (root / name).is_dir()), root)


def batches_from_folder(
    root: Path, preprocessing: Preprocessing, batch_size: int, limit: int | None = None
) -> Iterator[tuple[Tensor, Tensor, tuple[Path, ...]]]:
    """Yield (N, S, S, 3) uint8 pixels, (N,) int64 labels and paths of `root`'s validation images, sorted by path.

    `limit` images are taken evenly over the sorted list, so that every class is met.
    """
    _, images = find_images(validation_folder(root))
    count = len(images.paths) if limit is None else min(limit, len(images.paths))
    chosen = [index * len(images.paths) // count for index in range(count)]
    for start in range(0, count, batch_size):
        batch = chosen[start : start + batch_size]
        paths = tuple(images.paths[index] for index in batch)
        pixels = torch.stack([preprocessing.pixels(load_image(path)) for path in paths])
        yield pixels, torch.tensor([images.labels[index] for index in batch]), paths


def runner_input(pixels: Tensor, kind: str) -> Tensor:
    """(N, S, S, 3) uint8 pixels -> what a runner of input `kind` takes: see `runners.base.InputSpec`."""
    if kind not in ("uint8", "float"):
        raise InputError(f"No runner input is called {kind!r}. Choose one of: float, uint8.")
    return pixels if kind == "uint8" else (pixels.permute(0, 3, 1, 2).float() / 255.0).contiguous()


def image_like_batches(count: int, image_size: int, *, batch_size: int, seed: int = 0) -> Iterator[Tensor]:
    """Yield (N, S, S, 3) uint8 batches, `count` images in all, drawn from `seed` and alike for every `batch_size`.

    Each image is coloured noise with the 1/f spectrum of photographs, of its own brightness and contrast, under
    shapes with sharp edges; each reaches both 0 and 255.
    """
    for start in range(0, count, batch_size):
        indices = range(start, min(start + batch_size, count))
        yield torch.stack([_image_like(image_size, np.random.default_rng((seed, index))) for index in indices])


def _image_like(side: int, random: np.random.Generator) -> Tensor:
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = np.inf  # no constant part: the brightness below is the mean
    spectrum = np.fft.rfft2(random.standard_normal((3, side, side))) / frequency
    field = np.einsum("oc,chw->hwo", random.standard_normal((3, 3)) + 1.0, np.fft.irfft2(spectrum, s=(side, side)))
    canvas = random.uniform(0.3, 0.7) + random.uniform(0.05, 0.3) * field / field.std()
    rows, columns = np.mgrid[:side, :side] / side
    colours: Sequence[Any] = [*random.uniform(0.0, 1.0, (4, 3)), 0.0, 1.0]  # black and white last, so both are seen
    for colour in colours:
        (top, left), (height, width) = random.uniform(0.0, 0.9, 2), random.uniform(0.04, 0.3, 2)
        down, along = np.abs(rows - top) / height, np.abs(columns - left) / width
        inside = down**2 + along**2 < 1 if random.random() < 0.5 else np.maximum(down, along) < 1
        canvas[inside] = colour
    return torch.from_numpy((canvas.clip(0.0, 1.0) * 255.0).round().astype(np.uint8))


def _images_in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()))


def _labelled(root: Path) -> tuple[tuple[str, ...], Split]:
    names, images = find_images(root)
    if len(names) < 2:
        raise InputError(f"{root} has {len(names)} class folders; a classifier needs at least two, one folder each.")
    return names, images


def _stratified(names: Sequence[str], images: Split, seed: int, val_share: float) -> tuple[Split, Split]:
    if not 0.0 < val_share < 1.0:
        raise InputError(f"The validation share lies between 0 and 1, not at {val_share}.")
    generator = torch.Generator().manual_seed(seed)
    val: set[int] = set()
    for label, name in enumerate(names):
        members = [index for index, found in enumerate(images.labels) if found == label]
        if len(members) < 2:
            raise InputError(f"The class {name} has one image; splitting off validation images takes at least two.")
        order = torch.randperm(len(members), generator=generator).tolist()
        wanted = min(max(1, round(val_share * len(members))), len(members) - 1)
        val.update(members[at] for at in order[:wanted])
    train = [index for index in range(len(images.paths)) if index not in val]
    return _subset(images, train), _subset(images, sorted(val))


def _subset(images: Split, indices: Sequence[int]) -> Split:
    return Split(tuple(images.paths[at] for at in indices), tuple(images.labels[at] for at in indices))
