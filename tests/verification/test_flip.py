"""Flip averaging: the mean over an image and its left-right mirror, in one graph, from the export to the engine."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor

from cnx_deploy import api
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, GraphCheckError, InputError
from cnx_deploy.core.manifest import Artifact, EngineManifest, OnnxManifest, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches
from cnx_deploy.data.preprocessing import to_pixels
from cnx_deploy.diagnosis.bisect import export_command
from cnx_deploy.diagnosis.headroom import Headroom, measure_headroom
from cnx_deploy.exporters.graph_checks import check_export
from cnx_deploy.model.checkpoint import LoadedModel, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.tasks.classification import Classification
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from tests.conftest import Command

ODD = (37, 45)
"""Neither side fills the last patches, so that the mirror loses other columns than the image."""
TEMPERATURE = 2.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact[OnnxManifest], Artifact[OnnxManifest]]:
    """Weights of seed 0 with a flip: FP16 of float images with a temperature, FP32 of odd bytes. Do not change them."""
    folder = tmp_path_factory.mktemp("flip")
    known: dict[str, Any] = {"num_classes": 10, "tta": "flip", "output_dir": folder, "no_verify": True}
    return (
        api.export("tiny-test", image_size=32, batch=(1, 4, 8), temperature=TEMPERATURE, **known),
        api.export("tiny-test", precision="fp32", image_size=ODD, batch=(1, 2, 4), input_kind="uint8", **known),
    )


def written_out(model: ConvNeXtV2, images: Tensor, spec: DeploySpec, *, mirrors: bool = True) -> Tensor:
    """Two passes over normalised images (N, 3, H, W), and their mean; or one pass."""
    if spec.input_kind == "uint8":
        images = images.permute(0, 3, 1, 2).to(spec.dtype_of("head")) / 255
    mean, std = (torch.tensor(values, dtype=images.dtype)[:, None, None] for values in (spec.mean, spec.std))
    with torch.inference_mode():
        given = model((images - mean) / std)
        mirrored = model(torch.stack([((image - mean) / std)[..., range(image.shape[-1])[::-1]] for image in images]))
    return ((given + mirrored) / 2 if mirrors else given) / spec.temperature


@pytest.mark.parametrize("size", [32, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize(
    ("layout", "leave_out"), [("gpu", ()), ("cpu", ()), ("gpu", ("patches", "input-normalisation", "head-affine"))]
)
def test_the_deploy_form_is_the_mean_of_two_passes_in_float64(
    tiny_variant: Variant, layout: Any, leave_out: tuple[str, ...], kind: Any, size: Any
) -> None:
    model = random_model(tiny_variant, 10).double()
    spec = DeploySpec("fp64", size, kind, layout, leave_out=leave_out, tta="flip", temperature=TEMPERATURE)
    pixels = next(image_like_batches(3, size, batch_size=3))
    images = pixels if kind == "uint8" else pixels.permute(0, 3, 1, 2).double() / 255
    with torch.inference_mode():
        found = deploy_form(model, spec)(images)
    torch.testing.assert_close(found, written_out(model, images, spec), rtol=1e-12, atol=1e-12)
    assert (found - written_out(model, images, spec, mirrors=False)).abs().max() > 1e-3


def test_pytorchs_reference_is_two_passes_and_one_where_nothing_is_asked(tiny_model: ConvNeXtV2) -> None:
    images = next(image_like_batches(2, ODD, batch_size=2)).permute(0, 3, 1, 2).float() / 255
    for spec in (DeploySpec(image_size=ODD, tta="flip", temperature=TEMPERATURE), DeploySpec(image_size=ODD)):
        found = reference_runner(tiny_model, spec).run(images)["logits"]
        expected = written_out(tiny_model, images, spec, mirrors=spec.tta is not None)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_written_file_answers_the_mean_for_bytes_of_odd_sides(
    files: tuple[Artifact, Artifact], tiny_model: ConvNeXtV2, batch: int
) -> None:
    images = next(image_like_batches(batch, ODD, batch_size=batch, seed=3))
    with OrtRunner(files[1].path) as runner:
        found = runner.run(images)["logits"]
    expected = written_out(tiny_model, images, files[1].manifest.deploy)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_graph_has_one_input_one_mirror_along_the_width_and_the_batch_twice_within(
    files: tuple[Artifact, Artifact], tiny_onnx_fp16: Artifact
) -> None:
    plain = onnx.load(tiny_onnx_fp16.path)
    for artifact, axis in zip(files, (3, 2), strict=True):
        graph = onnx.shape_inference.infer_shapes(onnx.load(artifact.path), data_prop=True).graph
        assert [value.name for value in graph.input] == ["images"]
        constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
        slices = [node.input[3:5] for node in graph.node if node.op_type == "Slice"]
        pairs = [[constants[name].tolist() for name in names] for names in slices]
        assert [pair for pair in pairs if pair[1][0] < 0] == [[[axis], [-1]]]
        assert artifact.manifest.facts.outputs["logits"].shape == ("batch", 10)
    # The mirrored images are no second pass: what computes is there as often as without them.
    graph = onnx.load(files[0].path).graph
    for kind in ("MatMul", "Gemm", "Conv", "Gelu"):
        counts = [sum(node.op_type == kind for node in each.node) for each in (plain.graph, graph)]
        assert counts[0] == counts[1], kind


def changed(artifact: Artifact, change: Callable[[onnx.ModelProto], None], path: Path) -> Path:
    model = onnx.load(artifact.path)
    change(model)
    onnx.save(model, path)
    return path


def forwards(model: onnx.ModelProto) -> None:
    """Read from the left again, so that the mirror is the image itself."""
    (node,) = (node for node in model.graph.node if node.op_type == "Slice")
    for at, value in ((1, 0), (2, 32), (4, 1)):  # start, end, step
        node.input[at] = f"forwards_{at}"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value]), node.input[at]))


def test_a_graph_that_mirrors_nothing_or_another_axis_breaks_the_promise(
    files: tuple[Artifact, Artifact], tiny_onnx_fp16: Artifact, tiny_variant: Variant, tmp_path: Path
) -> None:
    task = Classification()
    words: dict[str, Any] = {"variant": tiny_variant, "layout": "gpu", "batch": (1, 4, 8), "opset": 20}
    words |= {"outputs": task.outputs(10), "head_operators": task.operators}
    check_export(files[0].path, **words, mirrored_axes=(3,))
    for path, promised, message in (
        (files[0].path, (2,), r"mirrored axes \[2\] expected, \[3\] found"),
        (files[0].path, (), r"mirrored axes \[\] expected, \[3\] found"),
        (tiny_onnx_fp16.path, (3,), r"mirrored axes \[3\] expected, \[\] found"),
        (changed(files[0], forwards, tmp_path / "forwards.onnx"), (3,), r"mirrored axes \[3\] expected, \[\] found"),
    ):
        with pytest.raises(GraphCheckError, match=message):
            check_export(path, **words, mirrored_axes=promised)


def test_a_mirror_of_the_height_is_no_mirror_of_the_width(
    tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, images = DeploySpec("fp32", 32, tta="flip"), torch.rand(2, 3, 32, 32)
    expected = reference_runner(tiny_model, spec).run(images)["logits"]
    torch.testing.assert_close(deployed_runner(tiny_model, spec).run(images)["logits"], expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(DeploySpec, "width_axis", 2)
    assert (deployed_runner(tiny_model, spec).run(images)["logits"] - expected).abs().max() > 1e-3


def copied(artifact: Artifact, folder: Path) -> Path:
    for name in (*artifact.file_names, f"{artifact.manifest.stem}.json"):
        shutil.copy(artifact.path.parent / name, folder)
    return folder / artifact.path.name


def test_both_are_in_the_manifest_and_what_is_recorded_is_what_is_verified(
    files: tuple[Artifact, Artifact], tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    assert "tta" not in tiny_onnx_fp16.path.with_suffix(".json").read_text()
    assert "cnx_deploy.tta" not in {entry.key for entry in onnx.load(tiny_onnx_fp16.path).metadata_props}
    deploy = json.loads(files[0].path.with_suffix(".json").read_text())["request"]["deploy"]
    assert (deploy["tta"], deploy["temperature"]) == ("flip", TEMPERATURE)
    metadata = {entry.key: entry.value for entry in onnx.load(files[0].path).metadata_props}
    assert (metadata["cnx_deploy.tta"], metadata["cnx_deploy.temperature"]) == ("flip", "2.5")
    report = api.verify(files, samples=2)
    assert report.passed, str(report)
    rows = [(row.candidate, row.differences.relative_l2_max) for entry in report.results for row in entry.results]
    assert [name for name, _ in rows] == ["onnxruntime fp16", "emulator fp16", "onnxruntime fp32"]
    path = copied(files[0], tmp_path)
    manifest = path.with_suffix(".json")
    for told in ({"tta": None}, {"temperature": 2.0}):
        document = json.loads(files[0].path.with_suffix(".json").read_text())
        document["request"]["deploy"] |= told
        manifest.write_text(json.dumps(document))
        assert not api.verify(path, samples=2, backends=("onnxruntime",)).passed, told


def test_an_engine_has_the_kernels_of_the_plain_one_and_one_more(
    files: tuple[Artifact, Artifact], tiny_engine: Artifact[EngineManifest], tmp_path: Path
) -> None:
    words: dict[str, Any] = {"target": "sm89", "runtime": "tensorrt-rtx", "batches": ((1, 1, 1), (1, 4, 8))}
    engine = api.build_engine(files[0], output_dir=tmp_path, **words)
    assert (engine.manifest.deploy.tta, engine.manifest.deploy.temperature) == ("flip", TEMPERATURE)
    assert engine.manifest.facts.half_share_of_products == 1.0
    plain, found = tiny_engine.manifest.facts.compiled, engine.manifest.facts.compiled
    assert plain is not None
    assert found is not None
    assert plain.kernels < found.kernels <= plain.kernels + 2
    blocks, operations = ({getattr(kernel, name) for kernel in found.kernel_list} for name in ("block", "operation"))
    assert "other" not in blocks
    assert {part for operation in operations for part in operation.split("+")} >= {"flip", "flip mean"}
    assert plain.megabytes_per_image < found.megabytes_per_image < 2.1 * plain.megabytes_per_image


@pytest.mark.slow
def test_files_and_checkpoints_predict_the_mean(
    files: tuple[Artifact, Artifact], tiny_model: ConvNeXtV2, tmp_path: Path, cnx: Command
) -> None:
    picture = Image.fromarray(next(image_like_batches(1, 32, batch_size=1, seed=5))[0].numpy())
    picture.save(tmp_path / "picture.png")
    images = to_pixels(picture, Preprocessing(32)).permute(2, 0, 1)[None].float() / 255
    expected = written_out(tiny_model, images, files[0].manifest.deploy)[0].softmax(dim=0)
    plain = written_out(tiny_model, images, DeploySpec(), mirrors=False)[0].softmax(dim=0)
    checkpoint = save_checkpoint(tmp_path / "own.safetensors", tiny_model, preprocessing=Preprocessing(32))
    shutil.copy(files[0].path, tmp_path / "alone.onnx")  # its metadata are all that is known of it
    asked = ("--tta", "flip", "--temperature", TEMPERATURE)
    for words, wanted, close in (
        ((files[0].path,), expected, 0.02), ((tmp_path / "alone.onnx",), expected, 0.02),
        ((checkpoint, *asked), expected, 1e-5), ((checkpoint,), plain, 1e-5),
    ):  # fmt: skip
        code, out, told = cnx("predict", words[0], tmp_path / "picture.png", *words[1:], "--top", 10, "--json")
        assert code == 0, told
        scores = {score["index"]: score["probability"] for score in json.loads(out)["predictions"][0]["scores"]}
        found = torch.tensor([scores[index] for index in range(10)])
        torch.testing.assert_close(found, wanted, rtol=0, atol=close)
    assert (expected - plain).abs().max() > 0.05
    code, _, told = cnx("predict", files[0].path, tmp_path / "picture.png", *asked)
    assert (code, "is no checkpoint, so --tta (tta) and --temperature (temperature) has" in told) == (2, True)


@pytest.mark.usefixtures("quick_timing")
def test_a_benchmark_compares_with_peers_that_mirror_too(files: tuple[Artifact, Artifact]) -> None:
    found = api.benchmark(files[0], batch=2, compare=["torch"], duration_seconds=0.05, threads=1)
    assert {row.name: row.correctness.failures for row in found.rows if row.correctness} == {
        "torch eager fp32": (), files[0].path.name: (),
    }  # fmt: skip
    ((name, facts),) = found.networks.items()
    assert re.fullmatch(r"tiny-test-32-[0-9a-f]{8}-flip-2\.5", name)
    assert facts.passes == 2


def test_inspect_shows_both_and_layers_compare(files: tuple[Artifact, Artifact], cnx: Command) -> None:
    code, out, _ = cnx("inspect", files[0].path)
    assert (code, re.findall(r"^(tta|temperature) +(\S+)$", out, re.MULTILINE)) == (
        0, [("tta", "flip"), ("temperature", "2.5")],
    )  # fmt: skip
    code, out, _ = cnx("diagnose", "layers", files[0].path, "--samples", 1)
    assert (code, "no backend diverges" in out) == (0, True), out


@pytest.mark.slow
def test_the_chain_of_a_flip_passes(files: tuple[Artifact, Artifact], cnx: Command) -> None:
    code, out, _ = cnx("diagnose", "chain", files[0].path, "--samples", 2)
    assert (code, "FAIL" in out) == (0, False), out


def test_the_command_that_mends_a_file_repeats_both(files: tuple[Artifact, Artifact]) -> None:
    words = export_command(files[0], ("head",), replace_of(files[0]))
    assert "--tta flip --temperature 2.5" in words


def replace_of(artifact: Artifact) -> Any:
    from cnx_deploy.diagnosis.mixed_precision import ExportedProbe, Probe
    from cnx_deploy.verification.parity import differences

    probe = Probe((), differences(torch.ones(1, 2), torch.ones(1, 2)), (), exported=True)
    return ExportedProbe(probe, 0.0, 0.0, verifies=True)


def test_ranges_are_those_of_the_images_and_of_their_mirrors(tiny_model: ConvNeXtV2) -> None:
    pixels = next(image_like_batches(2, ODD, batch_size=2))
    loaded = LoadedModel(tiny_model, WeightsRecord("random", "0", "0" * 64, "none (random weights)"))

    def ranges(batches: list[Tensor], **words: Any) -> Headroom:
        return measure_headroom(loaded, Preprocessing(ODD), batches, source="test", **words)

    found, alone = ranges([pixels], tta="flip"), ranges([pixels])
    by_hand = ranges([pixels, pixels.flip(2)])
    for one, other in zip(found.tensors, by_hand.tensors, strict=True):
        assert (one.name, one.largest) == (other.name, pytest.approx(other.largest, rel=1e-5))
    assert [each.largest for each in alone.tensors] != [each.largest for each in by_hand.tensors]
    assert found.network["tta"] == "flip"
    assert "tta" not in alone.network


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tta": "rotate"}, "No test-time augmentation is called 'rotate'. Choose one of: flip"),
        *(({"temperature": value}, f"not {value}") for value in (0.0, -1.0, float("nan"), 0.0099, 101.0, float("inf"))),
    ],
)
def test_what_is_no_answer_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        DeploySpec(**words)


def test_a_manifest_with_another_word_or_temperature_is_refused(
    files: tuple[Artifact, Artifact], tmp_path: Path
) -> None:
    path = copied(files[0], tmp_path)
    for told in ({"tta": "rotate"}, {"temperature": 0}):
        document = json.loads(files[0].path.with_suffix(".json").read_text())
        document["request"]["deploy"] |= told
        path.with_suffix(".json").write_text(json.dumps(document))
        with pytest.raises(CorruptArtifactError, match=r"tta|temperature"):
            open_artifact(path)


def test_a_spec_without_either_is_what_it_was() -> None:
    spec = DeploySpec("fp16", 32, tta="flip", temperature=2.0)
    assert spec.answer == {"tta": "flip", "temperature": 2.0}
    assert replace(spec, tta=None, temperature=1.0) == DeploySpec("fp16", 32)
    assert DeploySpec().answer == {}
