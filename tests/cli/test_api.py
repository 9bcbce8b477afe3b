"""The Python API: what the README shows, on real files, and nothing heavy until it is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.api import ExportRequest
from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.recorded import model_record
from tests.support.artifacts import copy_artifact


@pytest.fixture
def onnx(tiny_onnx_fp32: cnx.Artifact) -> cnx.Artifact:
    return tiny_onnx_fp32  # made by `cnx.export`


def picture(size: tuple[int, int] = (48, 40)) -> Image.Image:
    drawn = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import cnx_deploy, sys; print(sorted({'torch', 'numpy', 'onnx', 'click', 'msgspec'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    for name in cnx.__all__:
        assert getattr(cnx, name).__doc__, name
    with pytest.raises(AttributeError, match="it has Artifact, Model"):
        _ = cnx.exports


def test_an_export_verifies_and_its_report_prints(onnx: cnx.Artifact) -> None:
    assert (onnx.path.name, onnx.manifest.precision.name) == ("tiny-test-32-fp32.onnx", "fp32")
    report = cnx.verify(onnx, samples=4)
    assert report.passed
    assert "tiny-test-32-fp32.onnx" in str(report)
    assert "pass" in str(report)


def test_an_export_takes_names_for_its_classes_from_a_list_or_a_file(tiny_model, tmp_path: Path) -> None:
    """What is recorded of an export, which itself takes seconds."""
    weights = save_checkpoint(tmp_path / "tiny.safetensors", tiny_model, preprocessing=Preprocessing(32))
    names = tuple(f"class {index}" for index in range(10))
    (tmp_path / "names.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    for given in (names, str(tmp_path / "names.json")):
        loaded, preprocessing = ExportRequest(variant="tiny-test", checkpoint=weights, class_names=given).load(print)
        assert model_record(loaded, preprocessing, tmp_path).class_names == names
    with cnx.load(weights, class_names=names) as checkpoint:
        assert checkpoint.class_names == names
    with pytest.raises(InputError, match=r"9 class names were given and .*tiny.safetensors has 10 classes"):
        cnx.export("tiny-test", output_dir=tmp_path / "few", class_names=names[:9], checkpoint=weights)


def test_arrays_of_twelve_bits_are_warned_of_and_read_by_a_white_level(onnx: cnx.Artifact) -> None:
    eight = np.asarray(picture())
    twelve = np.round(eight * (4095 / 255)).astype(np.uint16)
    with pytest.warns(UserWarning, match="--white-level 4095"):
        dark = cnx.predict(onnx, twelve, top=10)
    bright, expected = cnx.predict(onnx, twelve, top=10, white_level=4095), cnx.predict(onnx, eight, top=10)
    assert bright.scores == expected.scores != dark.scores
    assert cnx.predict(onnx, (eight / 255).astype(np.float32), top=10).scores == expected.scores


def test_what_a_file_is_prints_in_one_line(onnx: cnx.Artifact) -> None:
    assert str(cnx.inspect(onnx)).startswith(f"{onnx.path}: an ONNX file, ")


def test_a_model_gives_the_same_classes_for_a_path_an_image_an_array_and_a_tensor(
    onnx: cnx.Artifact, tmp_path: Path
) -> None:
    image = picture()
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    with cnx.load(onnx) as model:
        assert any("random" in note for note in model.notes)
        one = model.predict(tmp_path / "a.png", top=3)
        several = model.predict([str(tmp_path / "a.png"), image, array, tensor, tensor / 255.0], top=3)
    assert len(one.scores) == 3
    assert all(found.scores == one.scores for found in several)
    other = cnx.predict(onnx.path, picture((64, 64)).rotate(90), top=3)
    assert other.scores != one.scores


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((8, 8, 3), dtype=np.int64), "int64 (8, 8, 3)"),
        (torch.zeros(1, 8, 8), r"(1, 8, 8)"),
        (torch.full((3, 8, 8), 2.0), "from 2 to 2: expected at most 1"),
        (torch.full((3, 8, 8), float("nan")), "from nan to nan: expected finite"),
        (42, "got int"),
    ],
)
def test_what_is_no_image_is_said_in_its_prediction(onnx: cnx.Artifact, image: object, said: str) -> None:
    found = cnx.predict(onnx, image)
    assert found.scores == ()
    assert said in found.error


@pytest.mark.usefixtures("quick_timing")
def test_a_benchmark_times_the_file_beside_torch(onnx: cnx.Artifact) -> None:
    record = cnx.benchmark(onnx, batch=1, compare=["torch"], duration_seconds=0.05, threads=1)
    assert {row.backend for row in record.rows} == {"onnxruntime", "torch"}
    assert "x torch eager fp32 (95 %)" in str(record)
    assert BenchmarkRecord.from_document(json.loads(json.dumps(record.to_document()))) == record


def test_an_engine_is_built_for_a_gpu_that_is_not_here(tiny_engine: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact) -> None:
    manifest = tiny_engine.manifest  # made by `cnx.build_engine`
    assert (manifest.target, manifest.source_sha256) == ("sm89", tiny_onnx_fp16.sha256)
    assert manifest.facts.compiled.kernels > 0


def test_several_precisions_come_from_one_call_and_what_is_there_is_reused(
    onnx: cnx.Artifact, tiny_onnx_bf16: cnx.Artifact, tmp_path: Path
) -> None:
    for artifact in (onnx, tiny_onnx_bf16):
        copy_artifact(artifact, tmp_path)
    words = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "output_dir": tmp_path}
    made = cnx.export("tiny-test", precision=("fp32", "bf16"), **words)
    assert [(artifact.manifest.precision.name, artifact.reused) for artifact in made] == [
        ("fp32", True),
        ("bf16", True),
    ]
    assert [artifact.sha256 for artifact in made] == [onnx.sha256, tiny_onnx_bf16.sha256]


def test_an_unknown_precision_is_one_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp32, fp16, bf16"):
        cnx.export("atto", precision="int3", output_dir=tmp_path)
