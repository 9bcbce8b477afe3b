"""Work against an independent count and the network itself; bounds against worked figures; which GPU a name means."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cnx_deploy.bench.devices import DEVICES, Device, find_device
from cnx_deploy.bench.roofline import NOT_MEASURED, Work, bound_of, table, work_of
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.model.convnextv2 import create_model

# An own count made apart from this code, FP16 at 224 px: GMAC, GMAC, then megabytes (1e6).
COUNTED = {
    "atto": (0.518, 0.029, 7.4, 14.4, 34.8),
    "femto": (0.745, 0.035, 10.5, 17.2, 41.7),
    "pico": (1.320, 0.047, 18.1, 22.8, 55.5),
    "nano": (2.381, 0.065, 31.2, 31.2, 76.1),
    "tiny": (4.350, 0.105, 57.3, 49.8, 121.7),
    "base": (15.13, 0.229, 177, 106, 260),
    "large": (34.02, 0.343, 396, 159, 389),
    "huge": (114.3, 0.629, 1321, 291, 714),
}
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
    return (*macs, work.weight_bytes / 1e6, work.fused_bytes / 1e6, work.per_op_bytes / 1e6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_work_is_the_independent_count(variant: str) -> None:
    assert figures(work_of(variant, 224, "fp16")) == pytest.approx(COUNTED[variant], rel=0.01, abs=5e-4)


def test_the_count_notices_a_block_more(monkeypatch: pytest.MonkeyPatch) -> None:
    deeper = replace(VARIANTS["atto"], depths=(2, 2, 7, 2))
    monkeypatch.setitem(VARIANTS, "atto", deeper)
    assert figures(work_of("atto", 224, "fp16")) != pytest.approx(COUNTED["atto"], rel=0.01, abs=5e-4)


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
    assert (large.fused_bytes, large.input_bytes) == (4 * half.fused_bytes, 4 * half.input_bytes)
    assert large.weight_bytes == half.weight_bytes
    assert half.input_bytes == 3 * 224 * 224 * 2


@pytest.mark.parametrize(("variant", "size", "precision"), [("mega", 224, "fp16"), ("atto", 225, "fp16")])
def test_work_that_does_not_exist_is_refused(variant: str, size: int, precision: str) -> None:
    with pytest.raises(InputError):
        work_of(variant, size, precision)  # type: ignore[arg-type]


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="'fp8'"):
        work_of("atto", 224, "fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "variant"), BOUNDS)
def test_bounds_are_the_worked_figures(name: str, variant: str) -> None:
    compute, bandwidth = BOUNDS[name, variant]
    bound = bound_of(work_of(variant, 224, "fp16"), device_named(name), batch=100_000)
    assert bound.compute_images_per_second == pytest.approx(compute, rel=0.01)
    assert bound.bandwidth_images_per_second == pytest.approx(bandwidth, rel=0.01)
    assert bound.images_per_second == pytest.approx(min(compute, bandwidth), rel=0.01)
    assert bound.limit == ("compute" if compute < bandwidth else "bandwidth")


def test_sparse_peaks_would_not_be_the_worked_figures() -> None:
    device = device_named("RTX 4090")
    sparse = replace(device, fp16_tflops=2 * device.fp16_tflops)
    bound = bound_of(work_of("huge", 224, "fp16"), sparse, batch=100_000)
    assert bound.compute_images_per_second != pytest.approx(BOUNDS["RTX 4090", "huge"][0], rel=0.01)


def test_fp32_runs_on_the_cuda_cores() -> None:
    work, device = work_of("atto", 224, "fp32"), device_named("NVIDIA L4")
    assert bound_of(work, device, batch=1).compute_images_per_second == pytest.approx(30.3e12 / (2 * work.macs))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_depthwise_work_beside_the_tensor_cores_never_binds(variant: str, device: Device) -> None:
    work = work_of(variant, 224, "fp16")
    assert work.depthwise_macs / device.fp32_tflops < work.gemm_macs / device.fp16_tflops


def test_weights_are_read_once_a_call() -> None:
    work, device = work_of("huge", 224, "fp16"), device_named("L4")
    one, eight = (bound_of(work, device, batch=batch) for batch in (1, 8))
    assert one.bytes_per_image == work.fused_bytes + work.weight_bytes
    assert eight.bytes_per_image == work.fused_bytes + work.weight_bytes / 8
    assert (one.traffic, one.limit) == ("fused", "bandwidth")
    assert (eight.limit, eight.fits_l2) == ("compute", False)


def test_compiled_bytes_replace_the_count() -> None:
    bound = bound_of(work_of("atto", 224, "fp16"), device_named("L4"), batch=8, compiled_bytes=30_000_000)
    assert (bound.traffic, bound.bytes_per_image) == ("as compiled", 30_000_000)
    assert bound.images_per_second == pytest.approx(300e9 / 30e6)


def test_whether_stage_1_fits_in_the_cache_depends_on_the_batch() -> None:
    work, device = work_of("atto", 224, "fp16"), device_named("RTX 4090")
    assert work.working_set_bytes == 6 * 40 * 56 * 56 * 2
    assert [bound_of(work, device, batch=batch).fits_l2 for batch in (1, 48, 51)] == [True, True, False]


def test_measured_over_bound() -> None:
    bound = bound_of(work_of("atto", 224, "fp16"), device_named("L4"), batch=8)
    assert bound.share_of(bound.images_per_second / 4) == pytest.approx(0.25)


@pytest.mark.parametrize(("batch", "compiled_bytes"), [(0, None), (1, 0)])
def test_an_empty_batch_and_no_bytes_are_refused(batch: int, compiled_bytes: int | None) -> None:
    with pytest.raises(InputError, match="at least 1"):
        bound_of(work_of("atto", 224, "fp16"), DEVICES[0], batch=batch, compiled_bytes=compiled_bytes)


def test_bf16_is_refused_where_the_tensor_cores_lack_it() -> None:
    work = work_of("atto", 224, "bf16")
    with pytest.raises(InputError, match=r"Tesla T4 \(sm75\) has no BF16"):
        bound_of(work, device_named("T4"), batch=1)
    assert bound_of(work, device_named("A10"), batch=1).limit == "bandwidth"


def test_every_row_of_the_table_says_that_it_was_not_measured() -> None:
    rows = table(VARIANTS, DEVICES, precision="fp16", image_size=224, batch=8)
    assert len(rows) == len(VARIANTS) * len(DEVICES)
    assert {row["basis"] for row in rows} == {NOT_MEASURED}
    assert not {"images_per_second", "latency_ms"} & set(rows[0]), "names a measurement has"


def test_the_bf16_table_leaves_out_gpus_without_it() -> None:
    named = {row["device"] for row in table(["atto"], DEVICES, precision="bf16", image_size=224, batch=1)}
    assert named == {device.name for device in DEVICES} - {"Tesla T4"}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("NVIDIA L4", "NVIDIA L4"),
        ("l4", "NVIDIA L4"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("Tesla T4", "Tesla T4"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_a_gpu_is_found_by_the_drivers_name(name: str, found: str) -> None:
    assert device_named(name).name == found


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA H100 NVL",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "Intel Xeon",
        "NVIDIA",
        "",
    ],
)
def test_another_gpu_is_not_taken_for_one_in_the_table(name: str) -> None:
    assert find_device(name) is None


def test_names_in_the_table_are_distinct_and_sourced() -> None:
    assert all(find_device(device.name) is device and device.source for device in DEVICES)
