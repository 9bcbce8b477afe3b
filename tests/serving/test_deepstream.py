"""`package deepstream`: the configuration of nvinfer makes what the graph takes, and says where it does not."""

import configparser
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError, OutputExistsError
from cnx_deploy.core.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cnx_deploy.data.preprocessing import runner_input
from tests.conftest import Command
from tests.support.artifacts import altered_artifact

NAMES = [f"class {index}" for index in range(10)]


def settings_in(folder: Path) -> dict[str, str]:
    """The group [property] as GLib reads it: comments begin with a hash, a line is a key and a value."""
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=("#",), delimiters=("=",), strict=True)
    parser.read_string((folder / "config_infer.txt").read_text("utf-8"))
    assert parser.sections() == ["property"]
    return dict(parser["property"])


def made_by_nvinfer(settings: dict[str, str], pixels: torch.Tensor) -> torch.Tensor:
    """nvinfer's documented arithmetic, y = net-scale-factor * (x - offset), on (N, H, W, C) uint8, in its floats."""
    colours = {"0": [0, 1, 2], "1": [2, 1, 0], "2": [0]}[settings["model-color-format"]]
    planes = pixels.permute(0, 3, 1, 2)[:, colours].float()
    if "offsets" in settings:
        planes = planes - torch.tensor([float(value) for value in settings["offsets"].split(";")]).view(1, -1, 1, 1)
    made = planes * torch.tensor(float(settings["net-scale-factor"]))
    assert list(made.shape[1:]) == [int(size) for size in settings["infer-dims"].split(";")]
    assert settings["network-input-order"] == "0"
    return made


def of_a_rescued_file(mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """What makes a manifest that of a file which takes normalised images."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["request"]["deploy"]["input_kind"] = "normalised"
        manifest["model"]["preprocessing"] |= {"mean": list(mean), "std": list(std)}

    return change


def test_nvinfers_arithmetic_makes_the_input_of_the_graph(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    cnx.package(tiny_onnx_fp32, "deepstream", to=tmp_path / "ds")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    settings = settings_in(tmp_path / "ds")
    expected = runner_input(pixels, "float")
    assert float((made_by_nvinfer(settings, pixels) - expected).abs().max()) < 1e-7  # the last bit of a float
    settings["model-color-format"] = "1"
    assert float((made_by_nvinfer(settings, pixels) - expected).abs().max()) > 0.5


def test_one_deviation_for_all_channels_becomes_scale_and_offsets(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.25, 0.25, 0.25)
    path = altered_artifact(tiny_onnx_fp32, tmp_path / "same", of_a_rescued_file(mean, std))
    cnx.package(path, "deepstream", to=tmp_path / "ds")
    pixels = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    expected = runner_input(pixels, "normalised", Preprocessing(mean=mean, std=std))
    assert float((made_by_nvinfer(settings_in(tmp_path / "ds"), pixels) - expected).abs().max()) < 1e-6
    other = altered_artifact(tiny_onnx_fp32, tmp_path / "others", of_a_rescued_file(IMAGENET_MEAN, IMAGENET_STD))
    with pytest.raises(InputError, match="nvinfer has one factor for all channels"):
        cnx.package(other, "deepstream", to=tmp_path / "other")


def test_a_classifier_gets_its_labels_on_one_line(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, cnx: Command) -> None:
    def probabilities(manifest: dict[str, Any]) -> None:
        manifest["request"]["deploy"]["outputs"] = ["probabilities"]
        manifest["facts"]["outputs"] = {"probabilities": manifest["facts"]["outputs"]["logits"]}
        manifest["model"]["class_names"] = NAMES

    path = altered_artifact(tiny_onnx_fp32, tmp_path / "classifier", probabilities)
    words = ("--mode", "secondary", "--threshold", "0.3")
    code, _, err = cnx("package", "deepstream", path, "--to", tmp_path / "ds", *words)
    assert code == 0, err
    settings = settings_in(tmp_path / "ds")
    assert (tmp_path / "ds" / "labels.txt").read_text("utf-8") == ";".join(NAMES) + "\n"
    assert (settings["network-type"], settings["num-detected-classes"], settings["labelfile-path"]) == (
        "1", "10", "labels.txt"
    )  # fmt: skip
    assert (settings["process-mode"], settings["classifier-threshold"]) == ("2", "0.3")
    assert settings["output-blob-names"] == "probabilities"
    assert (tmp_path / "ds" / settings["onnx-file"]).read_bytes() == path.read_bytes()
    assert settings["batch-size"] == "8"

    def divided(manifest: dict[str, Any]) -> None:
        probabilities(manifest)
        manifest["model"]["class_names"] = ["a;b", *NAMES[1:]]

    path = altered_artifact(tiny_onnx_fp32, tmp_path / "divided", divided)
    code, _, err = cnx("package", "deepstream", path, "--to", tmp_path / "other")
    assert (code, "'a;b' cannot stand" in err, (tmp_path / "other").exists()) == (2, True, False)


def test_logits_are_handed_on_as_tensors_and_that_is_said(
    tiny_onnx_fp32: cnx.Artifact, tmp_path: Path, cnx: Command
) -> None:
    code, out, err = cnx("package", "deepstream", tiny_onnx_fp32.path, "--to", tmp_path / "ds", "--json")
    settings = settings_in(tmp_path / "ds")
    assert (code, settings["network-type"], settings["output-tensor-meta"]) == (0, "100", "1")
    assert "For labels export with --output probabilities" in err
    assert json.loads(out)["files"] == ["config_infer.txt", tiny_onnx_fp32.path.name]


@pytest.mark.parametrize(
    ("made", "keys", "count"),
    [
        ({}, ("0", "0", "2"), 2),
        ({"crop_mode": "squash", "crop_ratio": 1.0, "interpolation": "bilinear"}, ("0", "0", "1"), 1),
        ({"crop_mode": "squash", "crop_ratio": 0.9, "interpolation": "nearest"}, ("0", "0", "0"), 1),
        ({"crop_mode": "corner", "crop_ratio": 1.0}, ("1", "0", "2"), 2),
        ({"crop_mode": "border", "crop_ratio": 1.0, "pad_value": [0, 0, 0]}, ("1", "1", "2"), 1),
        ({"crop_mode": "border", "crop_ratio": 0.9}, ("1", "1", "2"), 3),
    ],
)
def test_what_nvinfer_makes_otherwise_is_counted_in_the_file_and_printed(
    made: dict[str, Any], keys: tuple[str, ...], count: int, tiny_onnx_fp32: cnx.Artifact, tmp_path: Path
) -> None:
    path = altered_artifact(
        tiny_onnx_fp32, tmp_path / "a", lambda manifest: manifest["model"]["preprocessing"].update(made)
    )
    told: list[str] = []
    package = cnx.package(path, "deepstream", to=tmp_path / "ds", note=told.append)
    settings = settings_in(tmp_path / "ds")
    assert tuple(settings[f"{key}"] for key in ("maintain-aspect-ratio", "symmetric-padding", "scaling-filter")) == keys
    lines = (tmp_path / "ds" / "config_infer.txt").read_text("utf-8").splitlines()
    assert f"in {count} way" in lines[2]
    assert [line for line in lines if line[2:3].isdigit()] == [
        f"# {number}. {text}." for number, text in enumerate(package.differences, start=1)
    ]
    assert len(package.differences) == count
    assert set(package.differences) < set(told)
    assert lines[1] == "# Not run with DeepStream."


def test_engines_of_tensorrt_are_taken_and_those_of_tensorrt_rtx_and_half_precision_files_are_refused(
    tiny_engine: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="an engine of TensorRT-RTX, and DeepStream runs TensorRT"):
        cnx.package(tiny_engine, "deepstream", to=tmp_path / "ds")
    with pytest.raises(InputError, match="computes in FP16, and nvinfer builds ONNX files without strong typing"):
        cnx.package(tiny_onnx_fp16, "deepstream", to=tmp_path / "ds")
    path = altered_artifact(
        tiny_engine, tmp_path / "plan", lambda manifest: manifest["request"].update(runtime="tensorrt")
    )
    package = cnx.package(path, "deepstream", to=tmp_path / "ds")
    settings = settings_in(tmp_path / "ds")
    assert (settings["model-engine-file"], "onnx-file" in settings) == (tiny_engine.path.name, False)
    assert (settings["network-mode"], settings["batch-size"]) == ("2", "1")  # the largest batch of its first profile
    assert any("the first of the engine's profiles alone" in note for note in package.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_kind": "uint8"}, "takes bytes, and nvinfer gives 32-bit floats"),
        ({"size_range": [32, 96]}, "leaves height and width open"),
    ],
)
def test_what_nvinfer_cannot_feed_is_refused(
    change: dict[str, Any], said: str, tiny_onnx_fp32: cnx.Artifact, tmp_path: Path
) -> None:
    path = altered_artifact(
        tiny_onnx_fp32, tmp_path / "a", lambda manifest: manifest["request"]["deploy"].update(change)
    )
    with pytest.raises(InputError, match=said):
        cnx.package(path, "deepstream", to=tmp_path / "ds")


def test_only_a_folder_of_its_own_is_replaced(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    for force in (False, True):
        cnx.package(tiny_onnx_fp32, "deepstream", to=tmp_path / "ds", force=force)
    with pytest.raises(OutputExistsError, match="--force"):
        cnx.package(tiny_onnx_fp32, "deepstream", to=tmp_path / "ds")
    (tmp_path / "ds" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="something else"):
        cnx.package(tiny_onnx_fp32, "deepstream", to=tmp_path / "ds", force=True)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/config_infer.txt").write_text("[property]\nonnx-file=mine.onnx\n", encoding="utf-8")
    (tmp_path / "own/mine.onnx").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="something else"):
        cnx.package(tiny_onnx_fp32, "deepstream", to=tmp_path / "own", force=True)
    assert (tmp_path / "own/mine.onnx").read_bytes() == b"mine"
