"""A network for images of 64 by 90 pixels goes through every command."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("images") / "wide.png"
    Image.fromarray(pixels).save(path)
    return path


def test_a_file_for_images_that_are_not_square_agrees_with_pytorch_and_predicts(cnx, tmp_path, wide):
    words = ("--variant", "tiny-test", "--num-classes", "10", "--image-size", "45x70", "--precision", "fp32")
    code, out, told = cnx("export", *words, "--input", "uint8", "--batch", "2", "--output-dir", str(tmp_path))
    assert (code, out.strip()) == (0, str(tmp_path / "tiny-test-45x70-fp32.onnx")), told
    code, out, told = cnx("predict", out.strip(), str(wide))
    assert code == 0, told


@pytest.mark.slow
def test_a_network_for_images_that_are_not_square_goes_through_every_command(cnx, tmp_path, wide):
    folders = ("--export-dir", str(tmp_path / "export"), "--engines-dir", str(tmp_path / "engines"))
    code, _, told = cnx(
        "export", "--variant", "tiny-test", "--num-classes", "10", "--image-size", "64x90", "--batch", "1:2:4",
        "--output-dir", str(tmp_path / "export"),
    )  # fmt: skip
    assert code == 0, told
    half = tmp_path / "export" / "tiny-test-64x90-fp16.onnx"
    shape = onnx.load(half).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape][1:] == [3, 64, 90]
    code, _, told = cnx(
        "build-trt", "--export-dir", str(tmp_path / "export"), "--output-dir", str(tmp_path / "engines"),
        "--target", "sm89",
    )  # fmt: skip
    assert code == 0, told
    engine = json.loads((tmp_path / "engines" / "tiny-test-64x90-fp16-rtx-sm89.json").read_text())
    assert engine["model"]["image_size"] == [64, 90]
    for words in (
        ("verify", *folders),
        ("predict", str(half), str(wide)),
        ("bench", *folders, "--duration", "0.1", "--batch", "2", "--compare", "torch"),
        ("diagnose", "layers", str(half)),
        ("diagnose", "headroom", "--variant", "tiny-test", "--image-size", "64x90", "--samples", "2"),
        ("inspect", str(half)),
    ):
        code, out, told = cnx(*words)
        assert code == 0, (words, out, told)
