"""The runner with own kernels, here in Triton's interpreter: what it runs, what it refuses, and that it is right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from triton.runtime.errors import OutOfResources

import cnx_deploy as cnx
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.kernels import tuning
from cnx_deploy.kernels.settings import candidate_settings
from cnx_deploy.kernels.tuning import StageShape, TileCache, choose, choose_by_rule
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.fused import fuse, fused_blocks
from cnx_deploy.model.tasks.base import find_task, named_outputs
from cnx_deploy.runners import fused as fused_runner
from cnx_deploy.runners.fused import FusedRunner
from cnx_deploy.runners.pytorch import reference_runner
from tests.support.trt_double import DoubleStream

pytestmark = pytest.mark.skipif(fused_runner._has_gpu(), reason="a GPU is here: tests/gpu has these")

SPEC = DeploySpec(precision="fp16", image_size=32)
LIMITS = {"fp16": 6e-3, "bf16": 5e-2}


def relative_l2(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def differences(model: ConvNeXtV2, spec: DeploySpec, **words: Any) -> dict[str, float]:
    """Relative L2 of every output to PyTorch's training form in float64."""
    height, width = spec.image_size if isinstance(spec.image_size, tuple) else (spec.image_size, spec.image_size)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    if spec.input_kind == "uint8":
        images = (images * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    found = FusedRunner(model, spec, **words).run(images)
    expected = reference_runner(model.double(), spec).run(images)
    model.float()
    return {name: relative_l2(output, expected[name]) for name, output in found.items()}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("hidden", ["stored", "recomputed"])
def test_it_agrees_with_pytorch_in_float64(tiny_model: ConvNeXtV2, precision: str, hidden: str) -> None:
    (error,) = differences(tiny_model, replace(SPEC, precision=precision), hidden=hidden).values()
    assert 0 < error < LIMITS[precision]


@pytest.mark.parametrize(
    "changed",
    [
        {"image_size": (64, 96)},
        {"input_kind": "uint8"},
        {"outputs": ("logits", "embedding", "maps")},
        {"tta": "flip"},
        {"size_range": (32, 96), "image_size": 64},
        {"keep_fp32": ("stages.2.0.grn",)},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_it_takes_what_an_export_takes(tiny_model: ConvNeXtV2, changed: dict[str, Any]) -> None:
    assert all(error < LIMITS["fp16"] for error in differences(tiny_model, replace(SPEC, **changed)).values())


def test_version_1_has_no_gain(tiny_v1_model: ConvNeXtV2) -> None:
    for hidden in ("stored", "recomputed"):
        (error,) = differences(tiny_v1_model, SPEC, hidden=hidden).values()
        assert error < LIMITS["fp16"]


@pytest.mark.parametrize("part", ["gamma", "weight2", "bias1"])
def test_a_wrong_constant_is_seen(tiny_model: ConvNeXtV2, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(deployed: Any, choose: Any) -> tuple[str, ...]:
        kept = fuse(deployed, choose)
        for block in fused_blocks(deployed):
            getattr(block, part).data.mul_(0.9)
        return kept

    monkeypatch.setattr(fused_runner, "fuse", damaged)
    (error,) = differences(tiny_model, SPEC).values()
    assert error > LIMITS["fp16"]


def test_a_block_with_a_part_in_fp32_stays_and_is_named(tiny_model: ConvNeXtV2) -> None:
    details = dict(FusedRunner(tiny_model, replace(SPEC, keep_fp32=("stages.2.0.grn",))).info.details)
    assert details["blocks in own kernels"] == "4 of 5"
    assert details["left as it is"].startswith("stages.2.0 (its parts are in float16 and float32)")


def test_what_cannot_be_fused_is_refused(tiny_model: ConvNeXtV2, tiny_onnx_fp32: cnx.Artifact) -> None:
    with pytest.raises(InputError, match="FP16 or BF16, not in fp32"):
        FusedRunner(tiny_model, DeploySpec(image_size=32))
    with pytest.raises(InputError, match="an affine or a scale is not folded"):
        FusedRunner(tiny_model, replace(SPEC, leave_out=("norm-affine",)))
    with pytest.raises(InputError, match=r"is FP32: own kernels compute in FP16 or BF16"):
        cnx.load(tiny_onnx_fp32, backend="fused")


def test_files_and_checkpoints_are_verified_and_used(
    tiny_model: ConvNeXtV2, tiny_onnx_fp16: cnx.Artifact, tmp_path: Path
) -> None:
    (result,) = cnx.verify(tiny_onnx_fp16, samples=2, backends=("fused",)).results
    assert (result.passed, [row.candidate for row in result.results]) == (True, ["fused fp16"])
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(checkpoint, tiny_model, preprocessing=Preprocessing(image_size=32))
    picture = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))
    best = [cnx.predict(path, picture, backend="fused").scores[0] for path in (checkpoint, tiny_onnx_fp16.path)]
    usual = cnx.predict(tiny_onnx_fp16, picture).scores[0]
    assert {score.index for score in best} == {usual.index}
    assert best[0].probability == pytest.approx(usual.probability, rel=0.02)


def test_the_interpreter_is_not_timed(tiny_onnx_fp16: cnx.Artifact, quick_timing: None) -> None:
    record = cnx.benchmark(tiny_onnx_fp16, batch=1, backends=("onnxruntime", "fused"), duration_seconds=0.05)
    assert [row.name for row in record.rows] == [f"{tiny_onnx_fp16.path.name} [onnxruntime]"]
    (left_out,) = record.not_run
    assert left_out.name.endswith("[fused]")
    assert "not timed" in left_out.reason


# --- the choice of tiles ----------------------------------------------------------------------------------------------

SHAPE = StageShape(2, 16, 32)


def test_the_fastest_tiles_are_measured_once_and_kept(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure(call: Any) -> float:
        call()
        calls.append(1)
        return 1.0 / len(calls)  # the later, the faster

    cpu, path = torch.device("cpu"), tmp_path / "tiles.json"
    made = choose(SHAPE, cpu, "stored", TileCache(path), measure)
    names = ("norm_linear_gelu", "gained_linear_residual")
    candidates = [candidate_settings(name, SHAPE.channels) for name in names]
    assert [made.first, made.second] == [rows[-1] for rows in candidates]
    assert len(calls) == sum(map(len, candidates))
    assert choose(SHAPE, cpu, "stored", TileCache(path), measure) == made, "read from the file"
    assert len(calls) == sum(map(len, candidates)), "and not measured again"
    choose(replace(SHAPE, batch=1), cpu, "stored", TileCache(path), measure)
    assert len(json.loads(path.read_text())) == 2, "another shape is another measurement"


@pytest.mark.parametrize(("stored_ms", "expected"), [(1.0, "stored"), (9.0, "recomputed")])
def test_the_hidden_tensor_is_recomputed_where_that_is_faster(
    stored_ms: float, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[str] = []
    made = tuning._call

    def named(*words: Any) -> Any:
        kernels.append(words[2])
        return made(*words)

    monkeypatch.setattr(tuning, "_call", named)
    measure = lambda call: stored_ms if kernels[-1] == "stored" else 2.0  # noqa: E731
    assert choose(SHAPE, torch.device("cpu"), None, TileCache(tmp_path / "tiles.json"), measure).hidden == expected


def test_a_tile_that_the_gpu_has_no_room_for_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tuning._call

    def short_of_memory(shape: Any, tensors: Any, way: Any, kernel: Any, settings: Any) -> Any:
        def refuse() -> None:
            raise OutOfResources(200_000, 100_000, "shared memory")

        return refuse if settings.num_warps == 8 else made(shape, tensors, way, kernel, settings)

    monkeypatch.setattr(tuning, "_call", short_of_memory)
    times = iter(range(9, 0, -1))  # the later, the faster
    choice = choose(SHAPE, torch.device("cpu"), None, TileCache(tmp_path / "tiles.json"), lambda call: next(times))
    assert {choice.first.num_warps, choice.second.num_warps} == {4}


def test_what_was_measured_for_one_way_is_not_measured_again_for_both(tmp_path: Path) -> None:
    cache, calls = TileCache(tmp_path / "tiles.json"), []
    measure = lambda call: float(len(calls)) if calls.append(call) is None else 0.0  # noqa: E731
    stored = choose(SHAPE, torch.device("cpu"), "stored", cache, measure)
    before = len(calls)
    assert choose(SHAPE, torch.device("cpu"), None, cache, measure) == stored, "the later, the slower"
    names = ("norm_linear_gelu", "gained_mlp_residual")
    assert len(calls) - before == sum(len(candidate_settings(name, SHAPE.channels)) for name in names)


def test_a_hidden_tensor_that_no_tile_holds_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_call", lambda *words: lambda: None)
    wide = StageShape(1, 1, 352)
    assert choose_by_rule(wide, "recomputed").hidden == "stored"
    cache = TileCache(tmp_path / "tiles.json")
    assert choose(wide, torch.device("cpu"), "recomputed", cache, lambda call: 1.0).hidden == "stored"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": {"hidden": "lost"}}'])
def test_a_cache_that_cannot_be_read_is_written_anew(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_bytes(content)
    cache = TileCache(path)
    assert cache.get("a") is None
    cache.keep("a", choose_by_rule(SHAPE))
    assert TileCache(path).get("a") == choose_by_rule(SHAPE)


# --- a program for other tools ----------------------------------------------------------------------------------------


def test_a_program_with_open_batch_has_one_operator_a_block(tiny_model: ConvNeXtV2, tiny_variant: Variant) -> None:
    deployed = deploy_form(tiny_model, replace(SPEC, layout="gpu"))
    fuse(deployed, choose_by_rule, for_all_shapes=True)
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(deployed, (torch.rand(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("cnx_deploy.mlp.default") == sum(tiny_variant.depths)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert relative_l2(program.module()(images), reference_runner(tiny_model, SPEC).run(images)["logits"]) < 3e-3


# --- the path on a GPU, its stream replaced ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "changed"),
    [
        ("classification", {"outputs": ("top5", "class-maps", "unit-embedding", "maps")}),
        ("classification", {"input_kind": "uint8", "tta": "flip"}),
        ("segment", {}),
        ("detect", {}),
    ],
)
def test_every_tensor_is_on_the_gpu_and_none_is_read_back(
    tiny_variant: Variant, task: str, changed: dict[str, Any]
) -> None:
    """On tensors without values: a capture allows neither a copy from the CPU nor a size that depends on a value."""
    model = random_model(tiny_variant, 10, seed=0, task=find_task(task))
    deployed = deploy_form(model, replace(SPEC, image_size=64, layout="gpu", **changed))
    fuse(deployed, choose_by_rule)
    tensors = (*deployed.named_parameters(), *deployed.named_buffers())
    with FakeTensorMode(), torch.no_grad():
        fakes = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda") for name, tensor in tensors}
        spec = InputSpec.of(deployed.spec)
        images = torch.empty(spec.shape(2), dtype=spec.dtype, device="cuda")
        outputs = named_outputs(functional_call(deployed, fakes, (images,)), deployed.output_specs)
    assert {output.device.type for output in outputs.values()} == {"cuda"}


def test_images_elsewhere_and_an_old_gpu_are_refused(
    tiny_model: ConvNeXtV2, tiny_onnx_fp16: cnx.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = FusedRunner(tiny_model, SPEC)
    runner.device = torch.device("cuda", 0)
    with pytest.raises(InputError, match="The images are on cpu, the model on cuda:0"):
        runner.run(torch.rand(1, 3, 32, 32))
    monkeypatch.setattr(fused_runner, "_has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(MissingRequirementError, match=r"from compute capability 8.0 on, and Tesla T4 has 7.5"):
        cnx.load(tiny_onnx_fp16, backend="fused")


def test_each_batch_size_is_captured_once_and_replayed(tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FusedRunner(tiny_model, SPEC)
    stream = DoubleStream(runner.device)
    captures: list[int] = []
    original = stream.capture
    monkeypatch.setattr(stream, "capture", lambda enqueue: captures.append(1) or original(enqueue))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = [runner.run(part)["logits"] for part in (images, images.flip(0), images[:1])]
    runner._stream = stream
    flags: list[tuple[bool, bool]] = []
    cudnn = torch.backends.cudnn
    runner.module.register_forward_hook(lambda *_: flags.append((bool(cudnn.enabled), bool(cudnn.benchmark))))
    found = [runner.run(part)["logits"].clone() for part in (images, images.flip(0), images[:1])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert len(captures) == 2, "a batch of two is captured once, a batch of one anew"
    assert (False, True) not in flags, "without cuDNN PyTorch's own convolutions run"
