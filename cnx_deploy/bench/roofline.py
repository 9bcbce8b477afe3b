"""How fast a network could run at best: its work counted from the architecture, over a GPU's published peaks.

Nothing here is measured. `Work` needs no weights and no GPU; `Bound` divides a device's figures by it. A bound is for
the denominator of "measured ÷ bound" and for plans; it is never printed as a speed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cnx_deploy.bench.devices import Device
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import Variant, find_variant

__all__ = ["NOT_MEASURED", "Bound", "Work", "bound_of", "table", "work_of"]

Precision = Literal["fp32", "fp16", "bf16"]
Limit = Literal["compute", "bandwidth"]
Traffic = Literal["fused", "as compiled"]

NOT_MEASURED = "bound from the data sheet, not measured"
BYTES_PER_ELEMENT = {"fp32": 4, "fp16": 2, "bf16": 2}
FUSED_BLOCK_MAPS = {2: 11, 1: 3}
"""Maps of C × H × W a block must move, by the network's version: the residual stream read and written (1 + 1), the
hidden tensor of 4C written and read (4 + 4), and 1 for the residual read again by the addition. The hidden tensor must
exist once, because GRN needs its norm over the whole image before the second pointwise layer can start; computing it
twice is not considered. V1 has no GRN, so there one kernel of both pointwise layers could keep it to itself.
"""
PER_OP_BLOCK_MAPS = {2: 27, 1: 15}
"""The same with one kernel an operation: depthwise 1 + 1, LayerNorm 1 + 1, pointwise and GELU 1 + 4, GRN's norm 4,
GRN's scaling 4 + 4, pointwise 4 + 1 with the residual's 1. V1 has no GRN."""
WORKING_MAPS = 6
"""Maps of C × H × W alive at a block's widest point: input, hidden tensor (4), output."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one image costs, counted from the architecture.

    `gemm_macs` and `depthwise_macs`: multiply-accumulates of everything but, and of, the 7 × 7 depthwise convolutions
    (49·C·H·W a block); biases, norms and activations not counted. `parameters`: the training form's.
    `weight_bytes` = parameters × bytes an element, read once a call whatever the batch.
    `input_bytes` = 3 · size² elements of the precision; an engine that takes FP32 images reads twice that in FP16.
    `fused_bytes` = input + each stem or downsampling's read and write + 11·C·H·W a block (V1: 3) + the head's read.
    `per_op_bytes` = the same with 27·C·H·W a block (V1: 15) and a separate LayerNorm at the stem and before each
    downsampling. Both are activations only. `working_set_bytes` = 6·C·H·W of stage 1, the largest.
    """

    variant: str
    image_size: int
    precision: Precision
    gemm_macs: int
    depthwise_macs: int
    parameters: int
    weight_bytes: int
    input_bytes: int
    fused_bytes: int
    per_op_bytes: int
    working_set_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates of one image."""
        return self.gemm_macs + self.depthwise_macs


@dataclass(frozen=True, slots=True)
class Bound:
    """The most images a second that a device's published peaks allow, and which of them binds.

    `compute_images_per_second`: in FP16 and BF16 the matrix work over the tensor cores' peak, the depthwise work
    running beside it on the CUDA cores; in FP32 all work over the CUDA cores' peak.
    `bandwidth_images_per_second`: the device's bandwidth over `bytes_per_image`, every byte from DRAM.

    Ignored: launches, transfers from the host, tails, GELU and the norms, and cache. The bandwidth side is therefore no
    strict bound where tensors or weights stay in L2: if `fits_l2` (stage 1's working set of the whole batch is no
    larger than L2), a measurement may pass it. GeForce cards may pass the compute side too, with FP16 accumulation.
    """

    compute_images_per_second: float
    bandwidth_images_per_second: float
    bytes_per_image: float
    traffic: Traffic
    fits_l2: bool

    @property
    def images_per_second(self) -> float:
        """The smaller of the two."""
        return min(self.compute_images_per_second, self.bandwidth_images_per_second)

    @property
    def limit(self) -> Limit:
        """Which of the two is smaller."""
        return "compute" if self.compute_images_per_second < self.bandwidth_images_per_second else "bandwidth"

    def share_of(self, measured_images_per_second: float) -> float:
        """Measured ÷ bound, 1 at the bound."""
        return measured_images_per_second / self.images_per_second

    def to_dict(self) -> dict[str, Any]:
        """The figures as a report keeps them, under names that no measurement has."""
        return {
            "basis": NOT_MEASURED,
            "bound_images_per_second": round(self.images_per_second, 1),
            "bound_by": self.limit,
            "compute_bound_images_per_second": round(self.compute_images_per_second, 1),
            "bandwidth_bound_images_per_second": round(self.bandwidth_images_per_second, 1),
            "megabytes_per_image": round(self.bytes_per_image / 1e6, 3),
            "traffic": self.traffic,
            "stage_1_fits_l2": self.fits_l2,
        }


def work_of(variant: str, image_size: int, precision: Precision, num_classes: int = 1000) -> Work:
    """Count the work of one image of `image_size` × `image_size` pixels.

    Raises InputError for an unknown variant or precision and for a size that the network's stride does not divide.
    """
    if precision not in BYTES_PER_ELEMENT:
        raise InputError(f"No count for precision {precision!r}. Choose one of: {', '.join(BYTES_PER_ELEMENT)}.")
    size = find_variant(variant)
    macs = size.mac_count(image_size, num_classes)
    element = BYTES_PER_ELEMENT[precision]
    maps = tuple(_stage_maps(size, image_size))
    blocks = sum(depth * elements for depth, elements in zip(size.depths, maps, strict=True))
    parameters = size.parameter_count + (num_classes - 1000) * (size.dims[-1] + 1)
    pixels = 3 * image_size * image_size
    # Every stage's map is written by the convolution before it and read by the layer after it.
    ends = pixels + 2 * sum(maps)
    # One read and one write each: the stem's LayerNorm after stage 1's map is made, the others before it is left.
    separate_norms = 2 * (maps[0] + sum(maps[:-1]))
    return Work(
        variant=variant,
        image_size=image_size,
        precision=precision,
        gemm_macs=macs - 49 * blocks,
        depthwise_macs=49 * blocks,
        parameters=parameters,
        weight_bytes=parameters * element,
        input_bytes=pixels * element,
        fused_bytes=(ends + FUSED_BLOCK_MAPS[size.version] * blocks) * element,
        per_op_bytes=(ends + separate_norms + PER_OP_BLOCK_MAPS[size.version] * blocks) * element,
        working_set_bytes=WORKING_MAPS * maps[0] * element,
    )


def bound_of(work: Work, device: Device, *, batch: int, compiled_bytes: int | None = None) -> Bound:
    """The bound of `work` on `device` at `batch` images a call.

    Bytes an image: `fused_bytes` + `weight_bytes` / batch; or `compiled_bytes`, what one image moves in a compiled
    engine at this batch, constants included (`trt.compiled`). Raises InputError for a batch or bytes below one and
    for BF16 on a GPU whose tensor cores do not take it.
    """
    if batch < 1 or (compiled_bytes is not None and compiled_bytes < 1):
        raise InputError(
            f"A bound needs a batch and bytes of at least 1, not {batch} and {compiled_bytes}. Give larger ones."
        )
    if work.precision == "bf16" and not device.has_bf16:
        raise InputError(f"{device.name} ({device.compute_capability}) has no BF16 tensor cores. Use FP16.")
    moved = compiled_bytes if compiled_bytes is not None else work.fused_bytes + work.weight_bytes / batch
    macs, tflops = (work.macs, device.fp32_tflops) if work.precision == "fp32" else (work.gemm_macs, device.fp16_tflops)
    return Bound(
        compute_images_per_second=tflops * 1e12 / (2 * macs),
        bandwidth_images_per_second=device.bandwidth_gb_s * 1e9 / moved,
        bytes_per_image=moved,
        traffic="fused" if compiled_bytes is None else "as compiled",
        fits_l2=batch * work.working_set_bytes <= device.l2_mb * 2**20,
    )


def table(
    variants: Iterable[str], devices: Iterable[Device], *, precision: Precision, image_size: int, batch: int
) -> list[dict[str, Any]]:
    """One row a device and variant, for a plan without a GPU; each row says that it was not measured.

    For BF16, devices without it are left out.
    """
    works = [work_of(variant, image_size, precision) for variant in variants]
    able = [device for device in devices if precision != "bf16" or device.has_bf16]
    condition = {"precision": precision, "image_size": image_size, "batch": batch}
    return [
        {"device": device.name, "variant": work.variant, **condition, **bound_of(work, device, batch=batch).to_dict()}
        for device in able
        for work in works
    ]


def _stage_maps(variant: Variant, image_size: int) -> Iterator[int]:
    """Elements of one C × H × W map in each stage, stage 1 first."""
    for stage, width in enumerate(variant.dims):
        side = image_size // (4 * 2**stage)
        yield width * side * side
