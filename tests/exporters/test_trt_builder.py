"""Real builds with TensorRT-RTX on this machine's processor: what goes in, what is refused, what is recorded."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import BuildError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.trt import backend as backend_module
from cnx_deploy.exporters.trt import network
from cnx_deploy.exporters.trt.backend import DEFAULT_TARGETS, default_targets, load_backend, require_gpu
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.exporters.trt.depthwise import with_depthwise_in_fp32, with_depthwise_in_groups
from cnx_deploy.exporters.trt.network import NetworkBuild, half_share, type_census
from cnx_deploy.runners.onnxruntime import OrtRunner

RTX = load_backend("tensorrt-rtx")


def copied(artifact: Artifact, folder: Path) -> Artifact:
    folder.mkdir(exist_ok=True)
    for file in artifact.path.parent.glob(f"{artifact.manifest.stem}.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return open_artifact(folder / artifact.path.name)


def with_a_norm_in_half(artifact: Artifact, path: Path) -> Path:
    """A copy without the casts around the first channels-first norm, as an exporter without islands would leave it."""
    model = onnx.load(artifact.path)
    nodes = [node for node in model.graph.node if node.name.startswith("downsample_layers.1.0/")]
    for node in nodes:
        if node.op_type == "Cast":
            node.attribute[0].i = onnx.TensorProto.FLOAT16
    small = {name for node in nodes for name in node.input}
    for tensor in list(model.graph.initializer):
        if tensor.name in small and tensor.data_type == onnx.TensorProto.FLOAT:
            value = onnx.numpy_helper.to_array(tensor).astype("float16")
            for node in nodes:
                node.input[:] = [f"{name}_half" if name == tensor.name else name for name in node.input]
            model.graph.initializer.append(onnx.numpy_helper.from_array(value, f"{tensor.name}_half"))
    del model.graph.value_info[:]
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("target", [pytest.param("sm86", marks=pytest.mark.slow), "sm120"])
def test_no_gpu_behaviour_builds_an_engine_for_each_target(
    tiny_onnx_fp16: Artifact, tmp_path: Path, target: str
) -> None:
    engine = build_engine(tiny_onnx_fp16, BuildSpec(target=target, batches=((1, 4, 8),), measure=False), tmp_path)
    assert engine.path.name == f"tiny-test-32-fp16-rtx-{target}.engine"
    assert open_artifact(engine.path).manifest.source_sha256 == tiny_onnx_fp16.sha256


def test_the_manifest_records_types_kernels_and_that_it_was_not_run(tiny_engine: Artifact) -> None:
    facts = tiny_engine.manifest.facts
    assert facts.half_share_of_products == 1.0
    assert facts.census.types["HALF"] > 0
    assert facts.census.float_layers["REDUCE"] > 0, "GRN's and LayerNorm's reductions are FP32"
    assert facts.compiled.kernels > 0
    assert facts.run.startswith("not run")
    assert facts.runtime_version == RTX.version


@pytest.mark.slow
def test_reproducible_export_two_builds_have_the_same_kernels_and_size(
    tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    """Not the same bytes: the compiler's own names in the plan differ from build to build."""
    spec = BuildSpec(target="sm89", batches=((1, 4, 8),))
    first, second = (build_engine(tiny_onnx_fp16, spec, tmp_path / name) for name in ("a", "b"))
    assert first.manifest.facts.compiled == second.manifest.facts.compiled
    assert first.manifest.files[0].size_bytes == second.manifest.files[0].size_bytes


def test_a_second_build_reuses_the_engine(tiny_engine: Artifact, tiny_onnx_fp16: Artifact) -> None:
    written = tiny_engine.path.stat().st_mtime_ns
    spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1), (1, 4, 8)))
    again = build_engine(tiny_onnx_fp16, spec, tiny_engine.path.parent)
    assert again.manifest == tiny_engine.manifest
    assert tiny_engine.path.stat().st_mtime_ns == written


def test_a_reused_engine_has_a_manifest_that_says_what_its_onnx_file_s_says_now(
    tiny_engine: Artifact, tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    source, engine = copied(tiny_onnx_fp16, tmp_path / "export"), copied(tiny_engine, tmp_path / "engines")
    manifest = source.path.with_suffix(".json")
    manifest.write_text(manifest.read_text().replace('"head_is_new": false', '"head_is_new": true'))
    spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1), (1, 4, 8)))
    again = build_engine(source, spec, engine.path.parent)
    found = open_artifact(engine.path).manifest
    assert (again.reused, again.manifest, found.model.head_is_new) == (True, found, True)
    assert replace(found, model=engine.manifest.model) == engine.manifest


def test_an_altered_onnx_file_is_refused_before_it_is_parsed(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    copy = copied(tiny_onnx_fp16, tmp_path)
    data = bytearray(copy.path.read_bytes())
    data[-100] ^= 1
    copy.path.write_bytes(data)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        build_engine(copy, BuildSpec(), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.engine"))


def test_an_fp32_file_that_calls_itself_fp16_is_no_engine(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    request = replace(tiny_onnx_fp32.manifest.request, deploy=DeploySpec("fp16", 32))
    copy = copied(tiny_onnx_fp32, tmp_path)
    copy.path.with_suffix(".json").write_text(replace(copy.manifest, request=request).to_json())
    with pytest.raises(BuildError, match="calls itself FP16, but only 0%"):
        build_engine(copy.path, BuildSpec(batches=((1, 4, 8),)), tmp_path / "out")


def test_tensorrt_names_a_layernorm_computed_in_fp16_and_the_build_fails(
    tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    build = NetworkBuild(RTX, with_a_norm_in_half(tiny_onnx_fp16, tmp_path / "naive.onnx"))
    with pytest.raises(BuildError, match="LayerNorm computed in FP16"):
        build.serialise(build.config("sm89", allow_tf32=False, batches=((1, 4, 8),)))


def test_a_file_that_is_no_onnx_gives_an_error_with_the_parsers_reason(tmp_path: Path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x08\x07noise" * 40)
    with pytest.raises(BuildError, match="cannot read it"):
        NetworkBuild(RTX, path)


def test_a_dynamic_batch_without_a_profile_is_an_error_with_the_compilers_reason(tiny_onnx_fp16: Artifact) -> None:
    build = NetworkBuild(RTX, tiny_onnx_fp16.path)
    with pytest.raises(BuildError, match="made no engine"):
        build.serialise(build.config("sm89", allow_tf32=False, batches=()))


def test_a_profile_outside_the_exported_range_is_refused(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exported for batches 1 to 8; a profile of 1 to 64"):
        build_engine(tiny_onnx_fp16, BuildSpec(batches=((1, 8, 64),)), tmp_path)


@pytest.mark.parametrize("batches", [(), ((0, 1, 2),), ((2, 1, 4),)])
def test_batch_ranges_must_rise_from_one(batches: tuple[tuple[int, int, int], ...]) -> None:
    with pytest.raises(InputError, match="smallest:typical:largest"):
        BuildSpec(batches=batches)


@pytest.mark.parametrize(("target", "reason"), [("sm90", "data-centre"), ("sm70", "builds for sm75")])
def test_a_target_that_tensorrt_rtx_lacks_is_refused(target: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        RTX.check_target(target)


def test_tf32_is_set_and_not_left_to_the_default(tiny_onnx_fp16: Artifact) -> None:
    build = NetworkBuild(RTX, tiny_onnx_fp16.path)
    for allowed in (True, False):
        assert build.config("sm89", allow_tf32=allowed).get_flag(RTX.trt.BuilderFlag.TF32) is allowed


def test_the_fallback_computes_depthwise_convolutions_in_fp32_and_nothing_else(tiny_onnx_fp16: Artifact) -> None:
    images = torch.rand(3, 3, 32, 32)
    with with_depthwise_in_fp32(tiny_onnx_fp16.path) as path:
        census = NetworkBuild(RTX, path)
        types = {
            layer.name: layer.get_output(0).dtype.name
            for layer in (census.network.get_layer(index) for index in range(census.network.num_layers))
            if layer.type.name == "CONVOLUTION"
        }
        logits = OrtRunner(path).run(images)["logits"]
    assert {name: kind for name, kind in types.items() if "dwconv" in name} == {
        name: "FLOAT" for name in types if "dwconv" in name
    }
    assert all(kind == "HALF" for name, kind in types.items() if "dwconv" not in name)
    torch.testing.assert_close(logits, OrtRunner(tiny_onnx_fp16.path).run(images)["logits"], rtol=0, atol=5e-3)


def test_depthwise_convolutions_in_groups_compute_the_same(tiny_onnx_fp32: Artifact) -> None:
    images = torch.rand(3, 3, 32, 32)
    with with_depthwise_in_groups(tiny_onnx_fp32.path) as path:
        groups = {
            node.name: next(attribute.i for attribute in node.attribute if attribute.name == "group")
            for node in onnx.load(path).graph.node
            if node.op_type == "Conv" and "dwconv" in node.name
        }
        logits = OrtRunner(path).run(images)["logits"]
    assert sorted(groups.values()) == [1, 2, 4, 4, 8], "channels 8, 16, 32, 32 and 64 in groups of eight"
    torch.testing.assert_close(logits, OrtRunner(tiny_onnx_fp32.path).run(images)["logits"], rtol=0, atol=2e-6)


def test_a_weight_off_the_diagonal_computes_something_else(
    tiny_onnx_fp32: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnx_deploy.exporters.trt.depthwise.CHANNELS_PER_GROUP", 4)
    images = torch.rand(3, 3, 32, 32)
    with with_depthwise_in_groups(tiny_onnx_fp32.path) as path:
        model = onnx.load(path)
        weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("_diagonal"))
        values = onnx.numpy_helper.to_array(weight)
        weight.CopyFrom(onnx.numpy_helper.from_array(values[:, ::-1].copy(), weight.name))
        onnx.save(model, path)
        logits = OrtRunner(path).run(images)["logits"]
    assert float((logits - OrtRunner(tiny_onnx_fp32.path).run(images)["logits"]).abs().max()) > 1e-2


def test_on_turing_an_engine_moves_a_fraction_with_depthwise_in_groups(
    tiny_onnx_fp16: Artifact, tiny_engine: Artifact, tmp_path: Path
) -> None:
    engine = build_engine(tiny_onnx_fp16, BuildSpec(target="sm75", batches=((1, 4, 8),)), tmp_path)
    plain = measure_compiled(tiny_onnx_fp16.path, batch=8, target="sm75", backend=RTX)
    facts = engine.manifest.facts
    assert facts.depthwise_in_groups_of == 8
    assert facts.compiled.megabytes_per_image < 0.75 * plain.megabytes_per_image
    assert engine.manifest.source_sha256 == tiny_onnx_fp16.sha256
    assert tiny_engine.manifest.facts.depthwise_in_groups_of == 1, "elsewhere they are built as exported"


def refusing_half_depthwise(monkeypatch: pytest.MonkeyPatch, reason: str) -> list[Path]:
    """Let the first build of a test fail for `reason`; what is built after it is real. Returns the files built."""
    built: list[Path] = []
    serialise = NetworkBuild.serialise

    def first_fails(build: NetworkBuild, *given: Any) -> bytes:
        built.append(build.onnx_path)
        if len(built) == 1:
            raise BuildError(f"tensorrt made no engine. Its log:\n  {reason}")
        return serialise(build, *given)

    monkeypatch.setattr(NetworkBuild, "serialise", first_fails)
    return built


def test_without_a_half_depthwise_kernel_the_engine_is_built_with_the_fallback_and_says_so(
    tiny_onnx_fp16: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "No low-precision conv kernel available for this strongly-typed Conv"
    built = refusing_half_depthwise(monkeypatch, reason)
    engine = build_engine(tiny_onnx_fp16, BuildSpec(batches=((1, 4, 8),)), tmp_path)
    assert engine.manifest.facts.depthwise_fp32_fallback is True
    assert engine.manifest.facts.census.float_layers["CONVOLUTION"] == 5, "one a block"
    assert engine.manifest.source_sha256 == tiny_onnx_fp16.sha256
    assert [path.exists() for path in built] == [True, False], "the changed copy is gone"


def test_another_failure_is_not_retried(
    tiny_onnx_fp16: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = refusing_half_depthwise(monkeypatch, "out of memory")
    with pytest.raises(BuildError, match="out of memory"):
        build_engine(tiny_onnx_fp16, BuildSpec(batches=((1, 4, 8),)), tmp_path)
    assert len(built) == 1
    assert not list(tmp_path.glob("*.engine"))


def test_an_engine_is_not_built_from_an_engine(tiny_engine: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of kind engine; an engine is built from an ONNX file"):
        build_engine(tiny_engine, BuildSpec(batches=((1, 4, 8),)), tmp_path)


def test_progress_is_told_while_the_compiler_works(tiny_onnx_fp16: Artifact) -> None:
    told: list[str] = []
    with network._ticking(lambda text, share: told.append(text), "file.onnx"):
        time.sleep(0.6)
    count = len(told)
    assert count >= 1
    time.sleep(0.6)
    assert len(told) == count, "the ticker has stopped"


def test_the_census_of_an_fp32_file_has_no_half(tiny_onnx_fp32: Artifact) -> None:
    parsed = NetworkBuild(RTX, tiny_onnx_fp32.path).network
    assert "HALF" not in type_census(parsed).types
    assert half_share(parsed) == 0.0


def test_no_gpu_behaviour_builds_ahead_of_time_for_three_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "find_gpus", lambda: ())
    assert load_backend("auto").name == "tensorrt-rtx"
    assert default_targets(RTX) == DEFAULT_TARGETS
    with pytest.raises(MissingRequirementError, match="no NVIDIA driver is installed"):
        require_gpu(lambda name: None)
    with pytest.raises(MissingRequirementError, match="no GPU answers"):
        require_gpu(lambda name: "libcuda.so.1")


def test_a_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_import(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(backend_module.importlib, "import_module", no_import)
    with pytest.raises(MissingRequirementError, match=r'pip install "cnx-deploy\[tensorrt\]"'):
        load_backend("tensorrt")
