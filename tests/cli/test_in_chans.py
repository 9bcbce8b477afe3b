"""Images of other channels than three go through every command."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image


def bands(root: Path, count: int = 8) -> Path:
    """Two classes of five bands, told apart by the last, in train/ and val/."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dry", 40), ("wet", 180)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = random.integers(0, 60, (36, 40, 5), dtype=np.uint8)
                image[..., 4] += level
                np.save(root / split / name / f"{index}.npy", image)
    return root


def test_four_channels_are_exported_and_predict_takes_pictures_with_alpha_and_arrays(cnx, tmp_path):
    words = ("--variant", "tiny-test", "--num-classes", "10", "--image-size", "40", "--precision", "fp32")
    code, out, told = cnx("export", *words, "--in-chans", "4", "--mean", "0.5", "--input", "uint8", "--batch", "2",
                          "--output-dir", tmp_path)  # fmt: skip
    assert code == 0, told
    file = out.strip()
    assert [dim.dim_value for dim in onnx.load(file).graph.input[0].type.tensor_type.shape.dim] == [2, 40, 40, 4]
    manifest = json.loads((tmp_path / "tiny-test-40-fp32.json").read_text())["model"]["preprocessing"]
    assert (manifest["mean"], len(manifest["std"])) == ([0.5] * 4, 4)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    pixels[..., 3] = 255  # Pillow weighs colours by their alpha when it resizes; bands are resized one by one
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", pixels)
    code, out, told = cnx("predict", file, tmp_path / "a.png", tmp_path / "a.npy", "--json")
    assert code == 0, told
    first, second = ({**row, "path": ""} for row in json.loads(out)["predictions"])
    assert first == second
    code, out, told = cnx("predict", file, bands(tmp_path / "five", 1) / "val" / "dry" / "0.npy")
    assert code == 2
    assert "takes 4 channels" in out + told


def test_a_network_is_trained_on_five_bands_and_evaluated(cnx, tmp_path):
    data = bands(tmp_path / "data")
    words = ("--variant", "tiny-test", "--image-size", "32", "--in-chans", "5", "--batch-size", "4", "--epochs", "4",
             "--learning-rate", "0.003", "--min-crop-area", "0.5")  # fmt: skip
    code, out, told = cnx("train", data, *words, "--json", "--output-dir", tmp_path / "runs")
    assert code == 0, told
    best = json.loads(out)["best"]
    code, out, told = cnx("eval", best, data)
    assert code == 0, told
    assert "16 of 16" in out or "100.0" in out, out
    code, _, told = cnx("train", data, *words, "--randaugment-magnitude", "9", "--output-dir", tmp_path / "runs")
    assert code == 2
    assert "randaugment_magnitude must be 0 for images of 5 channels" in told


@pytest.mark.slow
def test_a_network_of_five_channels_goes_through_every_command(cnx, tmp_path):
    folders = ("--export-dir", tmp_path / "export", "--engines-dir", tmp_path / "engines")
    data = bands(tmp_path / "data")
    code, out, told = cnx(
        "pretrain", data, "--variant", "tiny-test", "--image-size", "64", "--in-chans", "5", "--batch-size", "8",
        "--epochs", "1", "--json", "--output-dir", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0, told
    encoder = json.loads(out)["best"]
    assert list((tmp_path / "runs").rglob("epoch-0001.png"))
    code, out, told = cnx(
        "train", data, "--variant", "tiny-test", "--image-size", "64", "--in-chans", "5", "--batch-size", "4",
        "--epochs", "1", "--checkpoint", encoder, "--reset-head", "--json",
        "--output-dir", tmp_path / "runs",
    )  # fmt: skip
    assert code == 0, told
    code, _, told = cnx("eval", json.loads(out)["best"], data)
    assert code == 0, told
    code, _, told = cnx(
        "export", "--variant", "tiny-test", "--num-classes", "2", "--image-size", "64", "--in-chans", "5",
        "--batch", "1:2:4", "--output-dir", tmp_path / "export",
    )  # fmt: skip
    assert code == 0, told
    half = tmp_path / "export" / "tiny-test-64-fp16.onnx"
    code, _, told = cnx(
        "build-trt", "--export-dir", tmp_path / "export", "--output-dir", tmp_path / "engines", "--target", "sm89",
    )  # fmt: skip
    assert code == 0, told
    for words in (
        ("verify", *folders),
        ("verify", "records", *folders),
        ("verify", half, "--data", data),
        ("eval", half, data),
        ("bench", *folders, "--duration", "0.1", "--batch", "2", "--compare", "torch,timm"),
        ("bench", "plan", *folders),
        ("diagnose", "layers", half),
        ("diagnose", "chain", *folders),
        ("diagnose", "headroom", "--variant", "tiny-test", "--image-size", "64", "--in-chans", "5", "--samples", "2"),
        ("inspect", half),
    ):
        code, out, told = cnx(*words)
        assert code == 0, (words, out, told)
