"""What a caller gives a runner, files that take something else, pixels that are no numbers."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image, ImageFile

from cnx_deploy.cli import main, options
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.weight_files import read_weight_file
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import differences
from tests.runners.test_tensorrt_runner import make_runner
from tests.support.hot_networks import images_for

BACKENDS = ("torch", "onnxruntime", "onnxruntime-each", "emulator", "tensorrt")


@pytest.fixture(params=BACKENDS)
def runner(
    request: pytest.FixtureRequest,
    tiny_model: ConvNeXtV2,
    tiny_onnx_fp16: Artifact,
    tiny_engine: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    """The smallest network, 1 to 8 images of 32 px, by each runner; TensorRT by its double."""
    made: dict[str, Callable[[], Runner]] = {
        "torch": lambda: reference_runner(tiny_model, DeploySpec("fp32", 32)),
        "onnxruntime": lambda: OrtRunner(tiny_onnx_fp16.path),
        "onnxruntime-each": lambda: OrtRunner(tiny_onnx_fp16.path, threads=2, thread_per_image=True),
        "emulator": lambda: EmulatedRunner(tiny_onnx_fp16.path),
        "tensorrt": lambda: make_runner(tiny_engine, tiny_onnx_fp16, monkeypatch)[0],
    }
    return made[request.param]()


def refused(runner: Runner, images: torch.Tensor) -> str:
    """The message with which a runner refuses images; exit code 2."""
    with pytest.raises(InputError) as caught:
        runner.run(images)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- batch, size, type, layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_dynamic_batch_bounds_smallest_typical_and_largest_run(
    runner: Runner, tiny_model: ConvNeXtV2, batch: int
) -> None:
    images = images_for(32, batch)
    expected = reference_runner(tiny_model, DeploySpec("fp32", 32)).run(images)["logits"]
    assert GATES["fp16"].failures(differences(runner.run(images)["logits"], expected)) == ()


@pytest.mark.parametrize("batch", [0, 9])
def test_dynamic_batch_bounds_beyond_them_the_range_is_told(runner: Runner, batch: int) -> None:
    if runner.input_spec.max_batch is None and batch:
        pytest.skip("PyTorch has no largest batch")
    largest = runner.input_spec.max_batch or "any"
    told = f"A batch of {batch} is outside the model's range of 1 to {largest}. Give fewer or more."
    assert refused(runner, torch.zeros(batch, 3, 32, 32)) == told


@pytest.mark.parametrize(
    ("images", "told"),
    [
        (torch.zeros(1, 3, 64, 64), "images of shape (N, 3, 32, 32) float32, not (1, 3, 64, 64) float32"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float64), "not (1, 3, 32, 32) float64. Convert them; nothing is cast."),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "not (1, 3, 32, 32) uint8. Convert them; nothing is cast."),
        (torch.zeros(1, 3, 32, 32, dtype=torch.float16), "not (1, 3, 32, 32) float16. Convert them; nothing is cast."),
        (torch.zeros(1, 32, 32, 3), "channel axis may be in the wrong place: permute the images"),
    ],
    ids=["size", "float64", "uint8", "float16", "layout"],
)
def test_wrong_dtype_input_size_and_layout_are_refused_by_every_runner(
    runner: Runner, images: torch.Tensor, told: str
) -> None:
    assert told in refused(runner, images)


def test_dynamic_resolution_225_is_no_size_to_export(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["export", "--variant", "atto", "--image-size", "225"])
    assert (stop.value.code, "multiples of 32" in capsys.readouterr().err) == (2, True)


# --- a file that takes something else than one batch of images --------------------------------------------------------


def foreign(path: Path, kind: int = TensorProto.FLOAT, **ends: tuple[object, ...]) -> Path:
    """An ONNX file that flattens its inputs' sum; `ends` are its inputs by name."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in ends.items()]
    nodes = [helper.make_node("Sum", list(ends), ["sum"]), helper.make_node("Flatten", ["sum"], ["logits"])]
    logits = helper.make_tensor_value_info("logits", kind, ["batch", 3072])
    graph = helper.make_graph(nodes, "foreign", values, [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


IMAGES = ("batch", 3, 32, 32)


def test_wrong_input_name_is_no_matter_of_a_runner_which_takes_one_batch(tmp_path: Path) -> None:
    runner = OrtRunner(foreign(tmp_path / "renamed.onnx", pixels=IMAGES))
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(runner.run(images)["logits"], images.flatten(1))


@pytest.mark.parametrize(
    ("ends", "listed"),
    [
        ({"images": IMAGES, "extra": IMAGES}, r"images tensor\(float\) .*, extra tensor\(float\) "),
        ({"tokens": ("batch", 3072)}, r"tokens tensor\(float\) \['batch', 3072\]"),
        ({"images": ("batch", 1, 32, 96)}, r"images tensor\(float\) \['batch', 1, 32, 96\]"),
        ({"images": ("batch", 3, "height", 32)}, r"images tensor\(float\) \['batch', 3, 'height', 32\]"),
        ({"images": IMAGES, "kind": TensorProto.DOUBLE}, r"images tensor\(double\)"),
    ],
    ids=["extra", "missing", "channels", "open size", "doubles"],
)
def test_wrong_input_name_missing_or_extra_lists_what_the_file_takes(
    tmp_path: Path, ends: dict[str, Any], listed: str
) -> None:
    with pytest.raises(InputError, match=f"takes {listed}.*; expected one batch of images") as caught:
        OrtRunner(foreign(tmp_path / "foreign.onnx", **ends))
    assert caught.value.exit_code == 2


def test_wrong_input_name_a_range_of_batches_that_is_none_is_corrupt(tmp_path: Path) -> None:
    model = onnx.load(foreign(tmp_path / "range.onnx", images=IMAGES))
    model.metadata_props.add(key="cnx_deploy.batch", value="1:many")
    onnx.save(model, tmp_path / "range.onnx")
    with pytest.raises(CorruptArtifactError, match="says '1:many' of its batch, expected 1:8:64"):
        OrtRunner(tmp_path / "range.onnx")


def test_wrong_input_name_a_graph_that_fails_while_it_runs_is_one_message(tmp_path: Path) -> None:
    """It promises any batch and reshapes to one of four."""
    model = onnx.load(foreign(tmp_path / "four.onnx", images=IMAGES))
    shape = helper.make_tensor("four", TensorProto.INT64, [2], [4, 3072])
    model.graph.initializer.append(shape)
    model.graph.node[1].CopyFrom(helper.make_node("Reshape", ["sum", "four"], ["logits"]))
    onnx.save(model, tmp_path / "four.onnx")
    runner = OrtRunner(tmp_path / "four.onnx")
    with pytest.raises(CnxDeployError, match=r"cannot run .*four\.onnx on a batch of 2 .* Give a smaller") as caught:
        runner.run(torch.zeros(2, 3, 32, 32))
    assert caught.value.exit_code == 1


# --- pixels and logits that are no numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_inf_input_is_refused_with_the_images_index(runner: Runner, value: float) -> None:
    images = torch.rand(4, 3, 32, 32)
    images[2, 1, 31, 31] = value
    told = "Image 2 of a batch of 4 holds NaN or infinity (1 of them do); a pixel is a finite number."
    assert told in refused(runner, images)


def test_nan_inf_input_goes_through_where_the_caller_asks_for_it(runner: Runner) -> None:
    """Into the logits of its own image alone."""
    runner.input_spec = replace(runner.input_spec, takes_nonfinite=True)
    images = torch.rand(4, 3, 32, 32)
    images[2, 1, 0, 0] = math.nan
    finite = torch.isfinite(runner.run(images)["logits"]).all(dim=1).tolist()
    assert finite == [True, True, False, True]


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
def test_nan_inf_input_of_weights_that_overflow_gives_no_answer_and_no_bare_nan(
    tmp_path: Path, tiny_onnx_fp32: Artifact, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    """Every weight is finite; the logits are beyond FP32."""
    model = onnx.load(tiny_onnx_fp32.path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:2] = 3e38
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    said = next(entry for entry in model.metadata_props if entry.key == "cnx_deploy.preprocessing")
    said.value = json.dumps(Preprocessing(32).to_dict())
    onnx.save(model, tmp_path / "overflows.onnx")
    Image.new("RGB", (40, 40), "gray").save(tmp_path / "gray.png")
    with pytest.raises(SystemExit) as stop:
        main(["predict", str(tmp_path / "overflows.onnx"), str(tmp_path / "gray.png"), *words])
    printed = capsys.readouterr()
    told = f"logits that are not finite for {tmp_path / 'gray.png'}"
    assert (stop.value.code, told in printed.err) == (3, True)
    if words:
        document = json.loads(printed.out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
        assert (document["error"], document["exit_code"], told in document["message"]) == ("CheckFailedError", 3, True)
    else:
        assert printed.out == ""


def test_nan_inf_input_is_null_in_the_one_way_that_commands_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    options.echo_json({"row": [math.nan, {"limit": -math.inf}], "number": 1.5})
    assert json.loads(capsys.readouterr().out) == {"row": [None, {"limit": None}], "number": 1.5}


# --- what a library would do for a caller that does not ask -----------------------------------------------------------


def test_empty_and_truncated_image_leaves_pillows_truncated_load_off() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


class Unlisted:
    """A global that no list of torch's allows."""


def test_pickle_no_unsafe_fallback_one_try_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": {}, "more": Unlisted()}, tmp_path / "unlisted.pt")
    tries, real = [], torch.load

    def noting(*words: object, **options: object) -> object:
        tries.append(options["weights_only"])
        return real(*words, **options)

    monkeypatch.setattr(torch, "load", noting)
    with pytest.raises(RefusedArtifactError, match=r"could run foreign code.*Unlisted.*safetensors") as caught:
        read_weight_file(tmp_path / "unlisted.pt")
    assert (tries, caught.value.exit_code) == ([True], 4)
