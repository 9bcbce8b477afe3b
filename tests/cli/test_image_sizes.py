"""A network for images of 64 by 90 pixels goes through every command."""

import json

import numpy as np
import onnx
from PIL import Image


def test_a_network_for_images_that_are_not_square_goes_through_every_command(cnx, tmp_path):
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
    pixels = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for words in (
        ("verify", *folders),
        ("predict", str(half), str(tmp_path / "wide.png")),
        ("bench", *folders, "--duration", "0.1", "--batch", "2", "--compare", "torch"),
        ("diagnose", "layers", str(half)),
        ("diagnose", "headroom", "--variant", "tiny-test", "--image-size", "64x90", "--samples", "2"),
        ("inspect", str(half)),
    ):
        code, out, told = cnx(*words)
        assert code == 0, (words, out, told)
