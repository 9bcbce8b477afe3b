"""Kernels and bytes from the compiler's log, and what is refused instead of being counted wrongly."""

from dataclasses import replace

import pytest

from cnx_deploy.artifacts import Artifact
from cnx_deploy.errors import BuildError
from cnx_deploy.trt.backend import load_backend
from cnx_deploy.trt.compiled import kernels_in_log, measure_compiled
from cnx_deploy.trt.network import NetworkBuild

RTX = load_backend("tensorrt-rtx")


def line(dimensions: str, kind: str = "Half", name: str = "k_myl0_0", layer: str = "gemm") -> str:
    tensor = f"{{ Name: x, Dimensions: [{dimensions}], Strides: [1], Datatype: {kind}, Format: (Linear) }}"
    return (
        f"Name: {name}, LayerType: {layer}, Inputs: [ {tensor}], Constants: [], Outputs: [ {tensor}], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: head/Gemm]"
    )


def test_a_size_the_log_leaves_open_is_none_and_not_a_number() -> None:
    (kernel,) = kernels_in_log([line("-1,40")])
    assert (kernel.input_bytes, kernel.output_bytes, kernel.total_bytes) == (None, None, 0)


def test_a_type_of_unknown_size_is_an_error() -> None:
    with pytest.raises(BuildError, match="'FP5' whose size is not known"):
        list(kernels_in_log([line("2,2", kind="FP5")]))


def test_host_side_shape_computations_are_no_kernels() -> None:
    assert [kernel.kind for kernel in kernels_in_log([line("2"), line("2", layer="shape_call")])] == ["gemm"]


def test_a_kernels_profile_is_read_from_its_name() -> None:
    names = ("__myl_FcAddCast_myl0_103", "downsample_layers.0.0/Conv [profile 1]_myl1_2")
    assert [next(kernels_in_log([line("2", name=name)])).profile for name in names] == [0, 1]


def test_a_log_without_a_known_layer_is_an_error_and_not_zero_kernels(
    tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_layers(build: NetworkBuild, *given: object) -> bytes:
        build.log.messages.append(("VERBOSE", "Layers:\nKernel: gemm in a format of another release"))
        return b"plan"

    monkeypatch.setattr(NetworkBuild, "serialise", without_layers)
    with pytest.raises(BuildError, match="logs no layer in the format known here"):
        measure_compiled(tiny_onnx_fp16.path, batch=4, target="sm89", backend=RTX)


def test_each_profile_of_an_engine_is_counted_for_itself(tiny_engine: Artifact) -> None:
    counts = tiny_engine.manifest.facts["kernels_by_profile"]
    assert list(counts) == ["1:1:1", "1:4:8"]
    assert counts["1:4:8"] == tiny_engine.manifest.facts["compiled"]["kernels"], "dynamic and fixed batch agree here"


def test_traffic_is_the_sum_over_the_kernels_tensors(tiny_onnx_fp16: Artifact) -> None:
    found = measure_compiled(tiny_onnx_fp16.path, batch=8, target="sm89", backend=RTX)
    parts = ("input_bytes", "constant_bytes", "output_bytes")
    total = sum(getattr(kernel, part) for kernel in found.kernels for part in parts)
    assert found.megabytes_per_image == pytest.approx(total / 8 / 1e6, rel=1e-12)
    doubled = replace(found, kernels=found.kernels * 2)
    assert doubled.megabytes_per_image == pytest.approx(2 * found.megabytes_per_image)


def test_a_precision_of_half_the_size_moves_about_half_the_bytes(
    tiny_onnx_fp16: Artifact, tiny_onnx_fp32: Artifact
) -> None:
    half, full = (
        measure_compiled(onnx.path, batch=8, target="sm89", backend=RTX).megabytes_per_image
        for onnx in (tiny_onnx_fp16, tiny_onnx_fp32)
    )
    assert half < 0.7 * full
