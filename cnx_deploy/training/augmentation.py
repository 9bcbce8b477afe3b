"""What is done to training images: to each alone while it is read, and to a batch by mixing its images.

Every draw comes from torch's own generator, which the callers seed. torchvision's transforms do the work.
"""

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.training.spec import TrainingSpec

__all__ = ["BatchMix", "ImageAugmentation"]

MAGNITUDE_BINS = 11
"""torchvision's magnitude is an index: with 11, index 9 is nine tenths of the strongest, as 9 of 10 is in timm."""
MAGNITUDE_STD = 0.5
ERASED_AREA = (0.02, 1 / 3)
ERASED_RATIO = (0.3, 3.3)


class ImageAugmentation:
    """Crop, flip, RandAugment and random erasing of one image: (3, H, W) uint8 -> (3, S, S) uint8.

    `min_crop_area` in (0, 1]: least share of the image that a random crop keeps; 1 takes the evaluation crop.
    RandAugment (Cubuk et al., arXiv:1909.13719): two operations, of a magnitude drawn once an image from a normal
    distribution around the given one (std 0.5, as "rand-m9-mstd0.5" in timm draws it for each operation). Random
    erasing (Zhong et al., arXiv:1708.04896): a rectangle becomes normal noise of the data's mean and deviation.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        preprocessing = spec.preprocessing
        steps: list[Callable[[Tensor], Tensor]] = []
        if spec.min_crop_area < 1.0:
            bicubic = InterpolationMode.BICUBIC
            steps.append(
                v2.RandomResizedCrop(preprocessing.image_size, (spec.min_crop_area, 1.0), interpolation=bicubic)
            )
        else:
            steps.append(lambda image: to_pixels(_pillow(image), preprocessing).permute(2, 0, 1))
        if spec.flip:
            steps.append(v2.RandomHorizontalFlip())
        if spec.randaugment_magnitude > 0:
            steps.append(_RandAugment(spec.randaugment_magnitude, preprocessing))
        if spec.erasing_probability > 0:
            steps.append(_RandomErasing(spec.erasing_probability, preprocessing))
        self.steps = tuple(steps)

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Augment by the draws of `seed`; the caller's random numbers stay as they are."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step in self.steps:
                image = step(image)
        return image


class BatchMix:
    """Mixup or CutMix on a batch: (N, 3, S, S) floats and (N,) classes -> the same and (N, classes) target shares.

    `mixup_alpha`, `cutmix_alpha`: parameter of the Beta distribution that the share is drawn from, one draw a batch; 0
    leaves that one out, and with both each batch takes one of them (Zhang et al., arXiv:1710.09412; Yun et al.,
    arXiv:1905.04899). A batch of one image stays as it is.
    """

    def __init__(self, mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> None:
        self.num_classes = num_classes
        kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
        mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Apply; see the class for shapes. Without any mixing the labels stay classes."""
        if self.mix is None or len(images) < 2:
            return images, labels
        mixed, targets = self.mix(images, labels)
        return mixed, targets


class _RandAugment:
    def __init__(self, magnitude: float, preprocessing: Preprocessing) -> None:
        self.magnitude = magnitude
        fill = [round(255 * value) for value in preprocessing.mean]
        bilinear = InterpolationMode.BILINEAR
        self.strengths = [
            v2.RandAugment(magnitude=strength, num_magnitude_bins=MAGNITUDE_BINS, interpolation=bilinear, fill=fill)
            for strength in range(MAGNITUDE_BINS)
        ]

    def __call__(self, image: Tensor) -> Tensor:
        drawn = round(float(torch.randn(())) * MAGNITUDE_STD + self.magnitude)
        output: Tensor = self.strengths[min(max(drawn, 0), MAGNITUDE_BINS - 1)](image)
        return output


class _RandomErasing:
    def __init__(self, probability: float, preprocessing: Preprocessing) -> None:
        self.rectangle = v2.RandomErasing(probability, ERASED_AREA, ERASED_RATIO, value=0)
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))

    def __call__(self, image: Tensor) -> Tensor:
        kept = self.rectangle(torch.ones(1, *image.shape[1:]))
        if bool(kept.all()):
            return image
        noise = (255 * (self.mean + self.std * torch.randn(image.shape))).round().clamp(0, 255).to(torch.uint8)
        return torch.where(kept.bool(), image, noise)


def _pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())
