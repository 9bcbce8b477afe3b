"""What `rescue` is asked for and refuses before it writes: files, sizes, arrays and tasks that do not fit."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.errors import CheckFailedError, CorruptArtifactError, InputError
from cnx_deploy.data import image_like_batches
from cnx_deploy.model.recorded import recorded_outputs

CLASSES = 6
BODY = (
    "c = Conv <strides = [4, 4]> (x, kernel) t = Transpose <perm = [0, 2, 3, 1]> (c) "
    "n = LayerNormalization <axis = -1> (t, gain) b = Transpose <perm = [0, 3, 1, 2]> (n) "
    "p = GlobalAveragePool(b) f = Flatten(p) g = Gemm(f, weight) "
)
ENDS = {
    "logits": "y = Identity(g)",
    "softmax": "y = Softmax(g)",
    "softmax, reshaped": "s = Softmax(g) i = Identity(s) y = Reshape(i, shape)",
    "softmax, spelled out": "e = Exp(g) z = ReduceSum <keepdims = 1> (e, axis) y = Div(e, z)",
    "sigmoid": "y = Sigmoid(g)",
}


def written(path: Path, *, shape: str = "N, 3, 64, 64", end: str = "logits", **constants: Any) -> Path:
    """A classifier of one convolution, one LayerNorm and one linear layer."""
    random = np.random.default_rng(0)
    values = {
        "kernel": random.standard_normal((8, 3, 4, 4)).astype(np.float32),
        "gain": random.uniform(0.5, 2, 8).astype(np.float32),
        "weight": random.standard_normal((8, CLASSES)).astype(np.float32),
        "shape": np.array([-1, CLASSES]), "axis": np.array([1]),
    } | constants  # fmt: skip
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> g (float[{shape}] x) => (float[{shape.split(",")[0]}, {CLASSES}] y) '
        f"{{ {BODY} {ENDS[end]} }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(values[name], name) for name in sorted(used & values.keys())
    )
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("a") / "a.onnx")


@pytest.fixture(scope="module")
def open_sides(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("open") / "a.onnx", shape="N, 3, height, width")


@pytest.fixture(scope="module")
def rescued(file, tmp_path_factory) -> Path:
    return cnx.rescue(file, output_dir=tmp_path_factory.mktemp("export")).path


def test_the_result_never_replaces_its_own_original(file, tmp_path: Path) -> None:
    original = tmp_path / "a-64-fp16.onnx"
    shutil.copy(file, original)
    outside = tmp_path / "b.onnx"
    onnx.save(onnx.load(file), outside, save_as_external_data=True, location="c-64-fp16.onnx.data", size_threshold=0)
    linked = tmp_path / "d-64-fp16.onnx"
    linked.symlink_to(original)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for source, name, force in (
        (original, "a", False),
        (original, "a", True),
        (outside, "c", True),
        (original, "d", True),
    ):
        with pytest.raises(InputError, match="replace its own original"):
            cnx.rescue(source, output_dir=tmp_path, name=name, force=force)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("task", ["features", "foreign"])
def test_a_task_without_classes_is_refused_by_name(task, file, tmp_path: Path, cnx) -> None:
    code, _, err = cnx("rescue", file, "--task", task, "--output-dir", tmp_path)
    assert code == 2
    assert "expected one of classification, multi-label" in err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sizes": {"heigth": 64, "width": 64}}, "no open axis heigth; open are N, height, width"),
        ({"sizes": {"height": 0}}, "whole numbers from 1"),
        ({"sizes": {"height": 64.0}}, "whole numbers from 1"),
        ({"sizes": {"height": True}}, "whole numbers from 1"),
        ({"sizes": [("height", 64)]}, "sizes by the axes' names"),
        ({"sizes": {"height": 64}, "inputs": Path("a.npz")}, "nothing to size"),
        ({"sizes": {"height": 3, "width": 64}}, "cannot run a.onnx on x"),  # below the convolution's 4
        ({"batch": (4, 2, 1)}, "rise from 1"),
        ({"batch": (0, 1, 2)}, "rise from 1"),
        ({"batch": 4}, "rise from 1"),
        ({"std": 0}, r"std must be finite and positive; got 0\.$"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean must be finite; got"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_what_was_given(options, told, open_sides, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        cnx.rescue(open_sides, output_dir=tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_batch_beside_a_fixed_one_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx", shape="2, 3, 64, 64")
    with pytest.raises(InputError, match="fixed batch of 2; got 1:8:64"):
        cnx.rescue(path, output_dir=tmp_path, batch=(1, 8, 64))
    assert cnx.rescue(path, output_dir=tmp_path, batch=(2, 2, 2)).artifact.manifest.request.batch == (2, 2, 2)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"x": np.zeros((2, 3, 64))}, r"x float64 \[2, 3, 64\]; the graph takes float32 \['N', 3, 64, 64\]"),
        ({"x": np.zeros((2, 1, 64, 64))}, "the graph takes"),
        ({"x": np.zeros((0, 3, 64, 64))}, "the graph takes"),
        ({"x": np.zeros((2, 3, 64, 64), np.uint8)}, "x uint8"),
        ({"x": np.full((2, 3, 64, 64), np.nan)}, "NaN or infinity in x"),
        ({"x": np.full((2, 3, 64, 64), np.inf, np.float32)}, "NaN or infinity in x"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(arrays, told, file, tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **arrays)
    with pytest.raises(InputError, match=told):
        cnx.rescue(file, output_dir=tmp_path, inputs=tmp_path / "inputs.npz")


def test_an_original_that_gives_nan_itself_is_told_apart_from_a_failed_proof(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx", weight=np.full((8, CLASSES), np.nan, np.float32))
    with pytest.raises(CheckFailedError, match="itself gives NaN or infinity in y"):
        cnx.rescue(path, output_dir=tmp_path / "out")
    assert not list(tmp_path.glob("out/*.onnx"))


def test_what_is_no_onnx_file_is_refused_with_exit_code_2(tmp_path: Path, cnx) -> None:
    from safetensors.torch import save_file

    import cnx_deploy

    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pt")
    save_file({"weight": torch.ones(2)}, tmp_path / "a.safetensors")
    for name, told in {
        "none.onnx": "does not exist",
        ".": "is a folder",
        "a.pt": "is a checkpoint: cnx-deploy export --checkpoint",
        "a.safetensors": "is a checkpoint: cnx-deploy export --checkpoint",
    }.items():
        code, _, err = cnx("rescue", tmp_path / name)
        assert (code, told in err) == (2, True), err
    for given in (3, None):
        with pytest.raises(InputError, match=f"takes the path of an ONNX file; got {given}"):
            cnx_deploy.rescue(given)


def test_files_of_our_own_are_refused_with_or_without_their_metadata(rescued, file, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rescued already"):
        cnx.rescue(rescued, output_dir=tmp_path)
    moved = tmp_path / rescued.name
    shutil.copy(rescued, moved)  # no manifest beside it
    with pytest.raises(InputError, match="rescued already"):
        cnx.rescue(moved, output_dir=tmp_path)
    model = onnx.load(file)
    onnx.helper.set_model_props(model, {"cnx_deploy.weights_origin": "random"})
    onnx.save(model, tmp_path / "export.onnx")
    with pytest.raises(InputError, match=r"written by cnx-deploy export.*--precision fp16"):
        cnx.rescue(tmp_path / "export.onnx", output_dir=tmp_path)


def test_a_rescued_file_without_a_manifest_says_that_it_is_one(open_sides, tmp_path: Path) -> None:
    made = cnx.rescue(open_sides, output_dir=tmp_path)
    assert made.artifact is None
    with pytest.raises(InputError, match="rescued already"):
        cnx.rescue(made.path, output_dir=tmp_path, name="b")


IMAGES = {"mean": 0.4, "std": 0.2, "crop_ratio": 1.0, "crop_mode": "center", "interpolation": "bicubic"}


@pytest.mark.parametrize(
    ("end", "task", "output"),
    [
        pytest.param("softmax, reshaped", "classification", "probabilities", marks=pytest.mark.slow),
        pytest.param("softmax, spelled out", "classification", "probabilities", marks=pytest.mark.slow),
        pytest.param("logits", "multi-label", "logits", marks=pytest.mark.slow),
        pytest.param("sigmoid", "multi-label", "probabilities", marks=pytest.mark.slow),
    ],
)
def test_an_output_that_is_activated_already_is_recorded_as_probabilities(end, task, output, tmp_path: Path) -> None:
    """So that `predict` tells the graph's own numbers, and not an activation of them."""
    path = written(tmp_path / "a.onnx", end=end)
    made = cnx.rescue(path, output_dir=tmp_path, task=task, **IMAGES)
    assert [(spec.name, spec.unit) for spec in recorded_outputs(made.artifact)] == [
        (output, {"logits": "logit", "probabilities": "probability"}[output])
    ]
    assert f"is taken for {output}" in str(made)
    pixels = next(image_like_batches(1, 64, batch_size=1))
    Image.fromarray(pixels[0].numpy()).save(tmp_path / "0.png")
    images = ((pixels.permute(0, 3, 1, 2).numpy() / 255 - 0.4) / 0.2).astype(np.float32)
    given = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"x": images})[0])[0]
    if output == "logits":
        given = given.softmax(0) if task == "classification" else given.sigmoid()
    (found,) = cnx.predict(made.artifact, [tmp_path / "0.png"], top=CLASSES)
    assert found.scores
    for score in found.scores:
        assert score.probability == pytest.approx(float(given[score.index]), abs=5e-3)
    (made.path.with_suffix(".json")).unlink()  # by its metadata alone
    (alone,) = cnx.predict(made.path, [tmp_path / "0.png"], top=CLASSES)
    assert alone.scores == found.scores


@pytest.mark.slow
def test_verify_compares_probabilities_that_a_graph_gives_by_itself(tmp_path: Path) -> None:
    made = cnx.rescue(written(tmp_path / "a.onnx", end="softmax"), output_dir=tmp_path, task="classification")
    report = cnx.verify(made.path, samples=2)
    assert report.passed
    assert {row.output for result in report.results for row in result.results} == {"probabilities"}


@pytest.mark.parametrize(("end", "task"), [("sigmoid", "classification"), ("softmax", "multi-label")])
def test_the_activation_of_another_task_is_refused(end, task, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the {end.title()} of its classes"):
        cnx.rescue(written(tmp_path / "a.onnx", end=end), output_dir=tmp_path, task=task)


def test_a_word_that_the_graph_contradicts_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx", end="softmax")
    for word in ("logits", "embedding"):
        with pytest.raises(InputError, match=word):
            cnx.rescue(path, output_dir=tmp_path, task="classification", output=word)


def test_mean_and_std_that_nobody_gave_are_neutral_and_marked_as_assumed(file, tmp_path: Path) -> None:
    record = cnx.rescue(file, output_dir=tmp_path, std=0.5).artifact.manifest.model
    assert (record.preprocessing.mean, record.preprocessing.std) == ((0.0,) * 3, (0.5,) * 3)
    assert (record.origins["mean"], record.origins["std"]) == ("assumed", "option")


def test_a_norm_of_two_types_is_refused_with_how_to_export_it(tmp_path: Path) -> None:
    """As the older exporter writes timm's norms after `.half()`."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 18]> g (float[N, 5, 8] x) => (float[N, 5, 8] y) <float16[8] gain> '
        "{ y = LayerNormalization(x, gain) }"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float16), "gain"))
    onnx.save(model, tmp_path / "a.onnx")
    with pytest.raises(CorruptArtifactError, match=r"dynamo=True.*or in FP32"):
        cnx.rescue(tmp_path / "a.onnx", output_dir=tmp_path)
