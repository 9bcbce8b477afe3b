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
from cnx_deploy.bench.record import BenchmarkRecord
from cnx_deploy.core.errors import InputError


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> cnx.Artifact:
    folder = tmp_path_factory.mktemp("api")
    return cnx.export("atto", precision="fp32", image_size=32, num_classes=10, output_dir=folder, batch=(1, 2, 4))


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
    assert (onnx.path.name, onnx.manifest.precision.name) == ("atto-32-fp32.onnx", "fp32")
    report = cnx.verify(onnx, samples=4)
    assert report.passed
    assert "atto-32-fp32.onnx" in str(report)
    assert "pass" in str(report)


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
        (np.zeros((8, 8, 3), dtype=np.float32), "float32 (8, 8, 3)"),
        (torch.zeros(1, 8, 8), r"(1, 8, 8)"),
        (torch.full((3, 8, 8), 2.0), "got 2 to 2"),
        (torch.full((3, 8, 8), float("nan")), "got nan to nan"),
        (42, "got int"),
    ],
)
def test_what_is_no_image_is_said_in_its_prediction(onnx: cnx.Artifact, image: object, said: str) -> None:
    found = cnx.predict(onnx, image)
    assert found.scores == ()
    assert said in found.error


def test_a_benchmark_times_the_file_beside_torch(onnx: cnx.Artifact) -> None:
    record = cnx.benchmark(onnx, batch=1, compare=["torch"], duration_seconds=0.05, threads=1)
    assert {row.backend for row in record.rows} == {"onnxruntime", "torch"}
    assert "x torch eager fp32 (95 %)" in str(record)
    assert BenchmarkRecord.from_document(json.loads(json.dumps(record.to_document()))) == record


def test_an_engine_is_built_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    onnx = cnx.export("atto", image_size=32, num_classes=10, output_dir=tmp_path, batch=(1, 2, 4))
    engine = cnx.build_engine(onnx, target="sm89", output_dir=tmp_path)
    assert (engine.manifest.target, engine.manifest.source_sha256) == ("sm89", onnx.sha256)
    assert engine.manifest.facts.compiled.kernels > 0


def test_several_precisions_come_from_one_call(tmp_path: Path) -> None:
    made = cnx.export("atto", precision=("fp32", "bf16"), image_size=32, num_classes=2, output_dir=tmp_path)
    assert [artifact.manifest.precision.name for artifact in made] == ["fp32", "bf16"]


def test_an_unknown_precision_is_one_error_that_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp32, fp16, bf16"):
        cnx.export("atto", precision="int3", output_dir=tmp_path)
