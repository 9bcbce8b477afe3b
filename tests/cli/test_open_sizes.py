"""Files that take images of any size between two: one graph without computed shapes, checked at its ends."""

import json

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import cnx_deploy as cnx_api
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import parse_image_sizes
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data import GivenImages, InputSpec
from cnx_deploy.data.input_spec import check_input
from cnx_deploy.data.preprocessing import normalise
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.deploy import deploy_form

RANGE = (32, 40, (70, 65))


@pytest.fixture(scope="module")
def open_file(made_once):
    return cnx_api.export(
        "tiny-test",
        precision="fp16",
        image_size=RANGE,
        num_classes=10,
        batch=(1, 2, 4),
        no_verify=True,
        output_dir=made_once / "open",
    )


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("input_kind", ["float", "uint8"])
@pytest.mark.parametrize("layout", ["gpu", "cpu"])
@pytest.mark.parametrize("left_out", [(), ("grn-gain",), ("grn-beta", "residual"), ("norm-affine", "blocked")])
def test_the_form_is_exact_in_float64_at_every_size(tiny_v1_variant, version, input_kind, layout, left_out):
    model = random_model("tiny-test" if version == 2 else tiny_v1_variant, 10, seed=1)
    form = deploy_form(
        model, DeploySpec("fp64", 64, input_kind, layout, leave_out=left_out, size_range=(40, (96, 130)))
    )
    model = model.double()
    for size in ((64, 64), (40, 40), (96, 130), (75, 101)):
        pixels = torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        unit = pixels.permute(0, 3, 1, 2).double() / 255.0
        with torch.no_grad():
            expected = model(normalise(unit, Preprocessing(size)))
            given = form(pixels if input_kind == "uint8" else unit)
        torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-9)


def test_a_file_of_open_sizes_computes_no_shapes_and_says_its_range(open_file):
    model = onnx.load(open_file.path)
    assert open_file.path.name == "tiny-test-32-40-70x65-fp16.onnx"
    axes = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 3, "height", "width"]
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Shape", "Reshape", "Slice", "Range", "Gather"})
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["cnx_deploy.image_size"] == "32:40:70x65"
    manifest = json.loads(open_file.path.with_suffix(".json").read_text())
    assert manifest["request"]["deploy"]["size_range"] == [32, [70, 65]]
    assert manifest["model"]["image_size"] == 40


def test_verify_judges_the_ends_too(open_file):
    report = cnx_api.verify(open_file)
    assert report.passed
    for end in ("emulator fp16 at 32 px", "emulator fp16 at 70x65 px"):
        assert end in str(report)


def test_any_size_of_the_range_is_predicted_with_the_numbers_of_pytorch(open_file):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 120, 3), dtype=np.uint8))
    model = random_model("tiny-test", 10, seed=0)
    for size in (None, 32, (37, 51), (70, 65)):
        with cnx_api.load(open_file, image_size=size) as opened:
            (batch,) = opened_batches(opened, picture)
            found = opened.runner.run(batch)["logits"]
        with torch.no_grad():
            expected = model(normalise(batch, Preprocessing()))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
        assert list(batch.shape[2:]) == list((size, size) if isinstance(size, int) else size or (40, 40))
    for size in (71, (40, 66), 224):
        with pytest.raises(InputError, match="32 to 70x65"):
            cnx_api.load(open_file, image_size=size)


def opened_batches(opened, picture):
    source = GivenImages([picture])
    return [batch.images for batch in source.batches(opened.preprocessing, opened.runner.input_spec)]


def test_a_file_of_one_size_and_a_checkpoint_take_their_sizes(tiny_onnx_fp32, tmp_path):
    with pytest.raises(InputError, match=r"32 pixels, not 64.*--image-size"):
        cnx_api.load(tiny_onnx_fp32, image_size=64)
    path = save_checkpoint(tmp_path / "a.safetensors", random_model("tiny-test", 10))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 120, 3), dtype=np.uint8))
    with cnx_api.load(path, image_size=96) as opened:
        (batch,) = opened_batches(opened, picture)
        assert batch.shape == (1, 3, 96, 96)


def test_a_batch_is_checked_against_the_range():
    spec = InputSpec("float", 64, 1, 4, size_range=(40, (96, 130)))
    for size in ((64, 64), (40, 40), (96, 130), (41, 129)):
        check_input(torch.zeros(2, 3, *size), spec)
    for size in ((39, 64), (64, 131), (97, 64)):
        with pytest.raises(InputError, match="height and width from 40 to 96x130"):
            check_input(torch.zeros(2, 3, *size), spec)
    with pytest.raises(InputError, match="range of 1 to 4"):
        check_input(torch.zeros(5, 3, 64, 64), spec)


def test_one_side_alone_can_be_open():
    sizes = "64x40:64x80:64x130"
    for kind, shape in (("float", ("batch", 3, 64, "width")), ("uint8", ("batch", 64, "width", 3))):
        spec = InputSpec.in_graph(kind, shape, 1, 4, sizes)
        assert (spec.image_size, spec.size_range) == ((64, 80), ((64, 40), (64, 130)))
        assert InputSpec.in_graph(kind, shape, 1, 4) is None
    with pytest.raises(InputError, match="height and width"):
        check_input(torch.zeros(1, 65, 80, 3, dtype=torch.uint8), spec)


@pytest.mark.slow
def test_a_file_with_one_open_side_is_exported_and_verified(tmp_path):
    made = cnx_api.export(
        "tiny-test", precision="fp16", image_size=((64, 40), (64, 80), (64, 130)), num_classes=10, batch=(1, 2, 4),
        output_dir=tmp_path,
    )  # fmt: skip
    axes = onnx.load(made.path).graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 3, 64, "width"]
    assert cnx_api.verify(made).passed


@pytest.mark.parametrize(
    "text", ["64:40:96", "64:64:64", "32:40:48", "64:96", "1:2:3", "64:96:x", "40x90:64:96", "a:b:c"]
)
def test_what_is_no_range_is_refused(text):
    with pytest.raises(InputError):
        parse_image_sizes(text)


def test_a_range_is_read():
    assert parse_image_sizes("224") == 224
    assert parse_image_sizes("224:448:640") == (224, 448, 640)
    assert parse_image_sizes("256x256:512x1024:512x2048") == (256, (512, 1024), (512, 2048))
    assert DeploySpec(image_size=(512, 1024), size_range=(256, (512, 2048))).size_text == "256:512x1024:512x2048"


def test_profiles_span_batches_and_sizes_and_a_file_without_a_range_is_refused(open_file, tmp_path):
    backend = load_backend("tensorrt-rtx")
    build = NetworkBuild(backend, open_file.path)
    config = build.config("sm89", allow_tf32=False, batches=((1, 2, 4),))
    assert config.num_optimization_profiles == 1
    assert build._shapes((-1, 3, -1, -1), (1, 2, 4)) == [(1, 3, 32, 32), (2, 3, 40, 40), (4, 3, 70, 65)]
    build.fix_batch(2)
    assert tuple(build.network.get_input(0).shape) == (2, 3, 40, 40)
    model = onnx.load(open_file.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    with pytest.raises(InputError, match="does not say from where"):
        NetworkBuild(backend, tmp_path / "bare.onnx").config("sm89", allow_tf32=False, batches=((1, 2, 4),))


@pytest.mark.slow
def test_a_file_of_open_sizes_goes_through_every_command(cnx, tmp_path):
    folders = ("--export-dir", tmp_path / "export", "--engines-dir", tmp_path / "engines")
    words = ("--variant", "tiny-test", "--num-classes", "10", "--batch", "1:2:4", "--output-dir", tmp_path / "export")
    code, _, told = cnx("export", *words, "--image-size", "40:64:96x130", "--input", "uint8")
    assert code == 0, told
    assert cnx("export", *words, "--image-size", "40:64:96x130", "--input", "uint8")[2].count("reused") == 2
    half = tmp_path / "export" / "tiny-test-40-64-96x130-fp16.onnx"
    picture = tmp_path / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)).save(picture)
    for command in (
        ("build-trt", "--export-dir", tmp_path / "export", "--output-dir", tmp_path / "engines", "--target", "sm89"),
        ("verify", *folders),
        ("verify", "records", *folders),
        ("predict", half, picture, "--image-size", "90x120"),
        ("bench", *folders, "--duration", "0.1", "--batch", "2", "--compare", "torch"),
        ("diagnose", "layers", half),
        ("diagnose", "chain", *folders),
        ("inspect", half),
        ("inspect", half, "--compile", "--batch", "2"),
    ):
        code, out, told = cnx(*command)
        assert code == 0, (command, out, told)
