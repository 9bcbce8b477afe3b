"""Roofline bounds: a network's work counted from the architecture, over a GPU's published peaks.

Nothing here is measured. `Work` needs no weights and no GPU; `Bound` divides a device's peaks by it. A bound is the
denominator of "measured ÷ bound" and a line of a plan; it is never printed as a speed. The peaks are those of
`core.devices`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from cnx_deploy.core.devices import Device
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize, sides, stage_sides
from cnx_deploy.core.manifest import Positive
from cnx_deploy.core.precision import find_precision
from cnx_deploy.core.strict_json import Finite
from cnx_deploy.core.variants import find_variant

__all__ = ["NOT_MEASURED", "Bound", "Work", "bound_of", "work_of"]

NOT_MEASURED = "bound from the data sheet, not measured"

FUSED_BLOCK_MAPS = {2: 11, 1: 3}
"""Maps of C × H × W that a block must move, by the network's version.

The residual stream is read and written (1 + 1), the hidden tensor of 4C is written and read (4 + 4), and the addition
reads the residual again (1). The hidden tensor must exist once, because GRN needs its norm over the whole image before
the second pointwise layer can start. V1 has no GRN, so one kernel of both pointwise layers could keep the hidden tensor
to itself.
"""
RECOMPUTED_BLOCK_MAPS = {2: 4, 1: 3}
"""The same where the hidden tensor is computed twice and never stored: the stream is read for the norm of the hidden
tensor and again for its product, read as the residual, and written.
"""
WORKING_MAPS = 6
"""Maps of C × H × W alive at a block's widest point: input, hidden tensor (4), output."""


@dataclass(frozen=True, slots=True)
class Work:
    """The cost of one image, counted from the architecture.

    `gemm_macs` and `depthwise_macs`: multiply-accumulates of everything but, and of, the 7 × 7 depthwise convolutions
    (49·C·H·W a block). Biases, norms and activations are not counted. `activations`: outputs of all convolutions and
    linear layers, which timm calls activations (atto at 224 px: 3.81 million). `parameters`: the training form's.
    `weight_bytes` = parameters × bytes an element, read once a call whatever the batch.
    `fused_bytes` = input (an element a pixel and channel) + each stem or downsampling's read and write + 11·C·H·W a
    block (V1: 3) + the head's read: activations only. `recomputed_bytes`: the same with 4·C·H·W a block.
    `working_set_bytes` = 6·C·H·W of stage 1, the largest.
    """

    variant: str
    image_size: ImageSize
    precision: str
    gemm_macs: int
    depthwise_macs: int
    activations: int
    parameters: int
    weight_bytes: int
    fused_bytes: int
    recomputed_bytes: int
    working_set_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates of one image."""
        return self.gemm_macs + self.depthwise_macs


def work_of(
    variant: str, image_size: ImageSize, precision: str, num_classes: int = 1000, in_chans: int = 3, passes: int = 1
) -> Work:
    """Count the work of one image of a size in pixels; `passes`: how often it goes through the network, mirrored too.

    Raises:
        InputError: The variant or precision is unknown, or the size is too small.
    """
    size = find_variant(variant)
    macs = size.mac_count(image_size, num_classes, in_chans) * passes
    element = find_precision(precision).storage_bytes
    # Elements of one C × H × W map in each stage, stage 1 first.
    maps = tuple(width * math.prod(stage_sides(image_size, stage)) for stage, width in enumerate(size.dims))
    blocks = sum(depth * elements for depth, elements in zip(size.depths, maps, strict=True))
    parameters = size.parameters_with(num_classes, in_chans)
    # Every stage's map is written by the convolution before it and read by the layer after it.
    ends = in_chans * math.prod(sides(image_size)) + 2 * sum(maps)
    return Work(
        variant=variant,
        image_size=image_size,
        precision=precision,
        gemm_macs=macs - 49 * blocks * passes,
        depthwise_macs=49 * blocks * passes,
        # The stem or downsampling of each stage, and in a block depthwise C, first pointwise layer 4·C, second C.
        activations=(num_classes + sum(maps) + 6 * blocks) * passes,
        parameters=parameters,
        weight_bytes=parameters * element,
        fused_bytes=(ends + FUSED_BLOCK_MAPS[size.version] * blocks) * element * passes,
        recomputed_bytes=(ends + RECOMPUTED_BLOCK_MAPS[size.version] * blocks) * element * passes,
        working_set_bytes=WORKING_MAPS * maps[0] * element * passes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The most images a second that a device's published peaks allow, under names that no measurement has.

    `compute_bound_images_per_second`: in FP16 and BF16 the matrix work over the tensor cores' peak, with the depthwise
    work beside it on the CUDA cores; in FP32 all work over the CUDA cores' peak.
    `bandwidth_bound_images_per_second`: bandwidth over `megabytes_per_image` (1e6 bytes), every byte from DRAM.
    `measured_over_bound`: a measured speed as a share of the smaller one; None in a plan.

    Launches, transfers from the host, tails, GELU, the norms and cache are ignored. The bandwidth side is therefore no
    strict bound where tensors or weights stay in L2: with `stage_1_fits_l2` (stage 1's working set of the whole batch
    is no larger than L2) a measurement may pass it. GeForce cards may pass the compute side with FP16 accumulation.
    """

    bound_images_per_second: Finite
    bound_by: Literal["compute", "bandwidth"]
    compute_bound_images_per_second: Finite
    bandwidth_bound_images_per_second: Finite
    megabytes_per_image: Finite
    traffic: Literal["fused", "as compiled"]
    stage_1_fits_l2: bool
    device: str = ""
    variant: str = ""
    precision: str = ""
    image_size: ImageSize | None = None
    batch: Positive | None = None
    measured_over_bound: Finite | None = None
    basis: str = NOT_MEASURED


def bound_of(
    work: Work, device: Device, *, batch: int, compiled_bytes: float | None = None, measured: float | None = None
) -> Bound:
    """Divide the peaks of a device by the work of an image.

    Args:
        work: The cost of one image.
        device: A GPU of the table.
        batch: Images a call.
        compiled_bytes: Bytes that one image moves in a compiled engine at this batch, constants included. Without it
            an image moves `fused_bytes` + `weight_bytes` / batch, the fewest that are possible.
        measured: Images a second that `measured_over_bound` is for.

    Raises:
        InputError: The batch or the bytes are below one, or the GPU has no peak in the precision.
    """
    if batch < 1 or (compiled_bytes is not None and compiled_bytes < 1):
        raise InputError(f"A bound needs a batch and bytes of at least 1, not {batch} and {compiled_bytes}.")
    tflops = device.peak_tflops(work.precision)
    if tflops is None:
        raise InputError(f"{device.name} ({device.compute_capability}) has no peak in {work.precision.upper()}.")
    moved = compiled_bytes if compiled_bytes is not None else work.fused_bytes + work.weight_bytes / batch
    # Tensor cores take the halves' matrix products, the CUDA cores everything in FP32.
    macs = work.gemm_macs if find_precision(work.precision).storage_bytes < 4 else work.macs
    compute, bandwidth = tflops * 1e12 / (2 * macs), device.bandwidth_gb_s * 1e9 / moved
    return Bound(
        bound_images_per_second=min(compute, bandwidth),
        bound_by="compute" if compute < bandwidth else "bandwidth",
        compute_bound_images_per_second=compute,
        bandwidth_bound_images_per_second=bandwidth,
        megabytes_per_image=moved / 1e6,
        traffic="fused" if compiled_bytes is None else "as compiled",
        stage_1_fits_l2=batch * work.working_set_bytes <= device.l2_mb * 2**20,
        device=device.name,
        variant=work.variant,
        precision=work.precision,
        image_size=work.image_size,
        batch=batch,
        measured_over_bound=None if measured is None else measured / min(compute, bandwidth),
    )
