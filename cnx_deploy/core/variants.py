"""The eight ConvNeXt V2 sizes and, to compare with, those of ConvNeXt V1: tables, and the counts that follow from them.

Sources: Woo et al., "ConvNeXt V2", arXiv:2301.00808, section 5 and appendix A.1; Liu et al., "A ConvNet for the 2020s",
arXiv:2201.03545, section 3. V1 has atto to nano from timm only (`timm.models.convnext`).
Published accuracy: ImageNet-1k top-1 at 224 px; of V2 after FCMAE pre-training and fine-tuning (V2 paper, table 4 and
table 14 for atto to tiny), of V1 supervised (the same table 14; V1 paper, table 1). It is a published figure, never a
result of this project.
"""

import math
from dataclasses import dataclass

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize, canonical_size, stage_sides

__all__ = ["ALL_VARIANTS", "V1_VARIANTS", "VARIANTS", "Variant", "find_variant", "register_variant"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One size of ConvNeXt. `depths` and `dims` are per stage, stage 1 first.

    `parameter_count` is the exact number of parameters with 1000 classes. `version` 2 has GRN in each block, 1 has
    LayerScale.
    """

    name: str
    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    parameter_count: int
    published_top1_percent: float | None
    version: int = 2

    @property
    def block_count(self) -> int:
        """Blocks in all four stages."""
        return sum(self.depths)

    def parameters_with(self, num_classes: int = 1000, in_chans: int = 3) -> int:
        """The exact number of parameters with so many classes and channels of an image."""
        return self.parameter_count + (num_classes - 1000) * (self.dims[-1] + 1) + 16 * (in_chans - 3) * self.dims[0]

    def mac_count(self, image_size: ImageSize = 224, num_classes: int = 1000, in_chans: int = 3) -> int:
        """Multiply-accumulates of one image of a size, biases not counted.

        Convolutions and linear layers only, as in the paper (which calls them FLOPs).
        """
        image_size, total = canonical_size(image_size), 0
        for stage, (depth, width) in enumerate(zip(self.depths, self.dims, strict=True)):
            positions = math.prod(stage_sides(image_size, stage))
            # Stem: 4 × 4 of every channel of the image an output; downsampling: 2 × 2 of every channel before.
            total += positions * width * (4 * self.dims[stage - 1] if stage else 16 * in_chans)
            total += positions * depth * (49 * width + 8 * width * width)
        return total + self.dims[-1] * num_classes


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("atto", (2, 2, 6, 2), (40, 80, 160, 320), 3_708_400, 76.7),
        Variant("femto", (2, 2, 6, 2), (48, 96, 192, 384), 5_233_240, 78.5),
        Variant("pico", (2, 2, 6, 2), (64, 128, 256, 512), 9_066_280, 80.3),
        Variant("nano", (2, 2, 8, 2), (80, 160, 320, 640), 15_623_800, 81.9),
        Variant("tiny", (3, 3, 9, 3), (96, 192, 384, 768), 28_635_496, 83.0),
        Variant("base", (3, 3, 27, 3), (128, 256, 512, 1024), 88_717_800, 84.9),
        Variant("large", (3, 3, 27, 3), (192, 384, 768, 1536), 197_956_840, 85.8),
        Variant("huge", (3, 3, 27, 3), (352, 704, 1408, 2816), 660_289_640, 86.3),
    )
}
V1_VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("v1-atto", (2, 2, 6, 2), (40, 80, 160, 320), 3_695_520, 75.7, version=1),
        Variant("v1-femto", (2, 2, 6, 2), (48, 96, 192, 384), 5_217_784, 77.5, version=1),
        Variant("v1-pico", (2, 2, 6, 2), (64, 128, 256, 512), 9_045_672, 79.5, version=1),
        Variant("v1-nano", (2, 2, 8, 2), (80, 160, 320, 640), 15_593_560, 80.8, version=1),
        Variant("v1-tiny", (3, 3, 9, 3), (96, 192, 384, 768), 28_589_128, 82.1, version=1),
        Variant("v1-small", (3, 3, 27, 3), (96, 192, 384, 768), 50_223_688, 83.1, version=1),
        Variant("v1-base", (3, 3, 27, 3), (128, 256, 512, 1024), 88_591_464, 83.8, version=1),
        Variant("v1-large", (3, 3, 27, 3), (192, 384, 768, 1536), 197_767_336, 84.3, version=1),
        # Published with pre-training on ImageNet-22k only.
        Variant("v1-xlarge", (3, 3, 27, 3), (256, 512, 1024, 2048), 350_196_968, None, version=1),
    )
}
"""ConvNeXt V1, for comparisons: trains, loads and exports like V2."""

ALL_VARIANTS: dict[str, Variant] = {**VARIANTS, **V1_VARIANTS}
"""Every name that `--variant` takes."""


def register_variant(variant: Variant) -> None:
    """Add a size of one's own, or replace the one of its name: from then on every stage takes it."""
    ALL_VARIANTS[variant.name] = variant


def find_variant(name: str) -> Variant:
    """Return the variant called `name`, V2 or V1; InputError lists the names otherwise."""
    found = ALL_VARIANTS.get(name)
    if found is None:
        raise InputError(f"No ConvNeXt variant is called {name!r}. Choose one of: {', '.join(ALL_VARIANTS)}.")
    return found
