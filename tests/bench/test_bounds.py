"""Work against an independent count and the network itself; bounds against worked figures; which GPU a name means."""

import pytest
import torch
from torch import Tensor, nn

from cnx_deploy.bench.bounds import NOT_MEASURED, Work, bound_of, work_of
from cnx_deploy.core.devices import DEVICES, Device, find_device
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.model.convnextv2 import create_model

# An own count made apart from this code, FP16 at 224 px: GMAC, GMAC, then megabytes (1e6).
COUNTED = {
    "atto": (0.518, 0.029, 7.4, 14.4), "femto": (0.745, 0.035, 10.5, 17.2), "pico": (1.320, 0.047, 18.1, 22.8),
    "nano": (2.381, 0.065, 31.2, 31.2), "tiny": (4.350, 0.105, 57.3, 49.8), "base": (15.13, 0.229, 177, 106),
    "large": (34.02, 0.343, 396, 159), "huge": (114.3, 0.629, 1321, 291),
}  # fmt: skip
# Images a second at large batch, FP16 at 224 px, counted apart from this code: compute, bandwidth.
BOUNDS = {
    ("RTX 4090", "atto"): (159e3, 70.2e3),
    ("RTX 4090", "huge"): (723, 3465),
    ("L4", "base"): (4000, 2831),
    ("A100-SXM4-80GB", "tiny"): (35.9e3, 41.0e3),
    ("H100 80GB HBM3", "base"): (32.7e3, 31.6e3),
}


def device_named(name: str) -> Device:
    device = find_device(name)
    assert device is not None
    return device


def figures(work: Work) -> tuple[float, ...]:
    macs = (work.gemm_macs / 1e9, work.depthwise_macs / 1e9)
    return (*macs, work.weight_bytes / 1e6, work.fused_bytes / 1e6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_work_is_the_independent_count(variant: str) -> None:
    assert figures(work_of(variant, 224, "fp16")) == pytest.approx(COUNTED[variant], rel=0.01, abs=5e-4)


def test_macs_and_parameters_are_those_of_the_network() -> None:
    counts = {"depthwise": 0, "gemm": 0}

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kind = "depthwise" if module.groups > 1 else "gemm"
            counts[kind] += output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counts["gemm"] += output.numel() * module.in_features

    model = create_model("atto", num_classes=10)
    for module in model.modules():
        module.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    work = work_of("atto", 64, "fp32", num_classes=10)
    assert (work.gemm_macs, work.depthwise_macs) == (counts["gemm"], counts["depthwise"])
    assert work.macs == VARIANTS["atto"].mac_count(64, num_classes=10)
    assert work.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_bytes_follow_precision_and_size() -> None:
    half, full, large = work_of("tiny", 224, "fp16"), work_of("tiny", 224, "fp32"), work_of("tiny", 448, "fp16")
    assert (full.fused_bytes, full.weight_bytes) == (2 * half.fused_bytes, 2 * half.weight_bytes)
    # 7 maps of C × H × W a block less: the hidden tensor is not written and not read, the stream is read once more.
    assert half.fused_bytes - half.recomputed_bytes == 7 * half.depthwise_macs // 49 * 2
    assert (large.fused_bytes, large.weight_bytes) == (4 * half.fused_bytes, half.weight_bytes)


@pytest.mark.parametrize(
    ("variant", "size", "precision", "message"),
    [("mega", 224, "fp16", "mega"), ("atto", 16, "fp16", "16x16"), ("atto", 224, "fp4", "'fp4'")],
)
def test_work_that_does_not_exist_is_refused(variant: str, size: int, precision: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        work_of(variant, size, precision)


@pytest.mark.parametrize(("name", "variant"), BOUNDS)
def test_bounds_are_the_worked_figures(name: str, variant: str) -> None:
    compute, bandwidth = BOUNDS[name, variant]
    bound = bound_of(work_of(variant, 224, "fp16"), device_named(name), batch=100_000)
    assert bound.compute_bound_images_per_second == pytest.approx(compute, rel=0.01)
    assert bound.bandwidth_bound_images_per_second == pytest.approx(bandwidth, rel=0.01)
    assert bound.bound_images_per_second == pytest.approx(min(compute, bandwidth), rel=0.01)
    assert bound.bound_by == ("compute" if compute < bandwidth else "bandwidth")


def test_fp32_runs_on_the_cuda_cores() -> None:
    work, device = work_of("atto", 224, "fp32"), device_named("NVIDIA L4")
    assert bound_of(work, device, batch=1).compute_bound_images_per_second == pytest.approx(30.3e12 / (2 * work.macs))


@pytest.mark.parametrize("variant", VARIANTS)
def test_depthwise_work_beside_the_tensor_cores_never_binds(variant: str) -> None:
    work = work_of(variant, 224, "fp16")
    for device in DEVICES:
        assert work.depthwise_macs / device.fp32_tflops < work.gemm_macs / device.fp16_tflops, device.name


def test_weights_are_read_once_a_call() -> None:
    work, device = work_of("huge", 224, "fp16"), device_named("L4")
    one, eight = (bound_of(work, device, batch=batch) for batch in (1, 8))
    assert one.megabytes_per_image * 1e6 == pytest.approx(work.fused_bytes + work.weight_bytes)
    assert eight.megabytes_per_image * 1e6 == pytest.approx(work.fused_bytes + work.weight_bytes / 8)
    assert (one.traffic, one.bound_by) == ("fused", "bandwidth")
    assert (eight.bound_by, eight.stage_1_fits_l2) == ("compute", False)


def test_whether_stage_1_fits_in_the_cache_depends_on_the_batch() -> None:
    work, device = work_of("atto", 224, "fp16"), device_named("RTX 4090")
    assert work.working_set_bytes == 6 * 40 * 56 * 56 * 2
    assert [bound_of(work, device, batch=batch).stage_1_fits_l2 for batch in (1, 48, 51)] == [True, True, False]


def test_a_bound_says_that_it_was_not_measured_and_what_share_of_it_a_measurement_is() -> None:
    work, device = work_of("atto", 224, "fp16"), device_named("L4")
    bound = bound_of(work, device, batch=8)
    assert (bound.basis, bound.measured_over_bound) == (NOT_MEASURED, None)
    assert (bound.device, bound.variant, bound.precision, bound.batch) == ("NVIDIA L4", "atto", "fp16", 8)
    compiled = bound_of(work, device, batch=8, compiled_bytes=30_000_000, measured=2500.0)
    assert (compiled.traffic, compiled.megabytes_per_image) == ("as compiled", 30.0)
    assert compiled.bound_images_per_second == pytest.approx(300e9 / 30e6)
    assert compiled.measured_over_bound == pytest.approx(0.25)
    for values in ({"batch": 0}, {"batch": 1, "compiled_bytes": 0}):
        with pytest.raises(InputError, match="at least 1"):
            bound_of(work, device, **values)


def test_a_precision_is_refused_where_a_gpu_has_no_peak_in_it() -> None:
    work = work_of("atto", 224, "bf16")
    with pytest.raises(InputError, match=r"Tesla T4 \(sm75\) has no peak in BF16"):
        bound_of(work, device_named("T4"), batch=1)
    assert bound_of(work, device_named("A10"), batch=1).bound_by == "bandwidth"
    with pytest.raises(InputError, match="no peak in FP64"):
        bound_of(work_of("atto", 224, "fp64"), device_named("A10"), batch=1)


@pytest.mark.parametrize(("variant", "millions"), [("atto", 3.81), ("base", 28.75), ("huge", 79.07)])
def test_activations_are_counted_as_timm_publishes_them(variant: str, millions: float) -> None:
    """results/model_metadata-in1k.csv of timm, 224 px."""
    assert round(work_of(variant, 224, "fp32").activations / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA L4", "NVIDIA L4"),
        ("l4", "NVIDIA L4"),
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("T4", "Tesla T4"),
        *((name, None) for name in (
            "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA L40", "NVIDIA A10G",
            "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "Intel Xeon", "NVIDIA", "",
        )),
    ],
)  # fmt: skip
def test_a_gpu_is_found_by_the_drivers_name_and_no_other_is_taken_for_it(name: str, found: str | None) -> None:
    device = find_device(name)
    assert (device and device.name) == found
    assert all(find_device(device.name) is device for device in DEVICES)
