"""What a caller gives a runner: wrong images, files that take something else, no GPU, several threads at once."""

import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from cnx_deploy.cli import main, options
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import find_gpus
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.openvino import OpenVinoRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.parity import differences
from cnx_deploy.verification.predict import open_predictor
from tests.runners.test_tensorrt_runner import make_runner
from tests.support.hot_networks import images_for
from tests.support.trt_double import DoubleContext

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")
FP32 = DeploySpec("fp32", 32)
MADE: dict[str, Callable[[ConvNeXtV2, Artifact, Artifact, pytest.MonkeyPatch], Runner]] = {
    "torch": lambda model, onnx, engine, patch: reference_runner(model, FP32),
    "torch deployed": lambda model, onnx, engine, patch: deployed_runner(model, FP32),
    "onnxruntime": lambda model, onnx, engine, patch: OrtRunner(onnx.path),
    "onnxruntime-each": lambda model, onnx, engine, patch: OrtRunner(onnx.path, threads=2, thread_per_image=True),
    "openvino": lambda model, onnx, engine, patch: OpenVinoRunner(onnx.path),
    "openvino-each": lambda model, onnx, engine, patch: OpenVinoRunner(onnx.path, threads=2, thread_per_image=True),
    "emulator": lambda model, onnx, engine, patch: EmulatedRunner(onnx.path),
    "tensorrt": lambda model, onnx, engine, patch: make_runner(engine, onnx, patch)[0],
}


@pytest.fixture(params=MADE)
def runner(
    request: pytest.FixtureRequest,
    tiny_model: ConvNeXtV2,
    tiny_onnx_fp16: Artifact,
    tiny_engine: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> Runner:
    """The smallest network, 1 to 8 images of 32 px, by each runner; TensorRT by its double."""
    return MADE[request.param](tiny_model, tiny_onnx_fp16, tiny_engine, monkeypatch)


def refused(runner: Runner, images: torch.Tensor) -> str:
    """The message with which a runner refuses images; exit code 2."""
    with pytest.raises(InputError) as caught:
        runner.run(images)
    assert caught.value.exit_code == 2
    return str(caught.value)


# --- batch, size, type, layout ----------------------------------------------------------------------------------------


def test_dynamic_batch_bounds_smallest_typical_and_largest_run_and_beyond_them_the_range_is_told(
    runner: Runner, tiny_model: ConvNeXtV2
) -> None:
    for batch in (1, 4, 8):
        images = images_for(32, batch)
        expected = reference_runner(tiny_model, FP32).run(images)["logits"]
        assert GATES["fp16"].failures(differences(runner.run(images)["logits"], expected)) == ()
    largest = runner.input_spec.max_batch or "any"
    for batch in (0, 9) if largest == 8 else (0,):  # PyTorch has no largest batch
        told = f"A batch of {batch} is outside the model's range of 1 to {largest}"
        assert told in refused(runner, torch.zeros(batch, 3, 32, 32))


def test_wrong_dtype_input_size_and_layout_are_refused_by_every_runner(runner: Runner) -> None:
    for shape, kind, told in (
        ((1, 3, 64, 64), torch.float32, "images of shape (N, 3, 32, 32) float32, not (1, 3, 64, 64) float32"),
        ((1, 3, 32, 32), torch.float64, "not (1, 3, 32, 32) float64"),
        ((1, 3, 32, 32), torch.uint8, "not (1, 3, 32, 32) uint8"),
        ((1, 3, 32, 32), torch.float16, "not (1, 3, 32, 32) float16"),
        ((1, 32, 32, 3), torch.float32, "channel axis may be in the wrong place: permute the images"),
    ):
        assert told in refused(runner, torch.zeros(shape, dtype=kind))


# --- pixels and logits that are no numbers ----------------------------------------------------------------------------


def test_nan_inf_input_is_refused_with_the_images_index_and_where_it_is_let_through_stays_with_its_image(
    runner: Runner,
) -> None:
    for value in (math.nan, -math.inf):
        images = torch.rand(4, 3, 32, 32)
        images[2, 1, 31, 31] = value
        assert "Image 2 of a batch of 4 holds NaN or infinity (1 of them do)" in refused(runner, images)
    runner.input_spec = replace(runner.input_spec, takes_nonfinite=True)
    images[2, 1, 31, 31] = math.nan
    assert torch.isfinite(runner.run(images)["logits"]).all(dim=1).tolist() == [True, True, False, True]


def test_nan_inf_input_of_weights_that_overflow_gives_no_answer_and_no_bare_nan(
    tmp_path: Path, tiny_onnx_fp32: Artifact, capsys: pytest.CaptureFixture[str]
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
        main(["predict", str(tmp_path / "overflows.onnx"), str(tmp_path / "gray.png"), "--json"])
    printed = capsys.readouterr()
    told = f"logits that are not finite for {tmp_path / 'gray.png'}"
    assert (stop.value.code, told in printed.err) == (3, True)
    document = json.loads(printed.out, parse_constant=lambda name: pytest.fail(f"bare {name}"))
    assert (document["error"], document["exit_code"], told in document["message"]) == ("CheckFailedError", 3, True)


def test_nan_inf_input_is_null_in_the_one_way_that_commands_print_json(capsys: pytest.CaptureFixture[str]) -> None:
    options.echo_json({"row": [math.nan, {"limit": -math.inf}], "number": 1.5})
    assert json.loads(capsys.readouterr().out) == {"row": [None, {"limit": None}], "number": 1.5}


# --- a file that takes something else than one batch of images --------------------------------------------------------

IMAGES = ("batch", 3, 32, 32)


def foreign(path: Path, kind: int = TensorProto.FLOAT, **ends: tuple[object, ...]) -> Path:
    """An ONNX file that flattens its inputs' sum; `ends` are its inputs by name."""
    values = [helper.make_tensor_value_info(name, kind, shape) for name, shape in ends.items()]
    nodes = [helper.make_node("Sum", list(ends), ["sum"]), helper.make_node("Flatten", ["sum"], ["logits"])]
    logits = helper.make_tensor_value_info("logits", kind, ["batch", 3072])
    graph = helper.make_graph(nodes, "foreign", values, [logits])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_wrong_input_name_is_no_matter_of_a_runner_which_takes_one_batch(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(
        OrtRunner(foreign(tmp_path / "renamed.onnx", pixels=IMAGES)).run(images)["logits"], images.flatten(1)
    )


@pytest.mark.parametrize(
    ("ends", "listed"),
    [
        ({"images": IMAGES, "extra": IMAGES}, r"images tensor\(float\) .*, extra tensor\(float\) "),
        ({"tokens": ("batch", 3072)}, r"tokens tensor\(float\) \['batch', 3072\]"),
        ({"images": ("batch", 17, 32, 96)}, r"images tensor\(float\) \['batch', 17, 32, 96\]"),
        ({"images": ("batch", 3, "height", 32)}, r"images tensor\(float\) \['batch', 3, 'height', 32\]"),
        ({"images": IMAGES, "kind": TensorProto.DOUBLE}, r"images tensor\(double\)"),
    ],
    ids=["extra", "missing", "channels", "open size", "doubles"],
)
def test_wrong_input_name_missing_or_extra_lists_what_the_file_takes(
    tmp_path: Path, ends: dict[str, Any], listed: str
) -> None:
    with pytest.raises(InputError, match=f"takes {listed}.*; expected one batch of images"):
        OrtRunner(foreign(tmp_path / "foreign.onnx", **ends))


def test_a_range_of_batches_that_is_none_is_corrupt_and_a_graph_that_fails_while_it_runs_is_one_message(
    tmp_path: Path,
) -> None:
    """The second promises any batch and reshapes to one of four."""
    path = foreign(tmp_path / "four.onnx", images=IMAGES)
    model = onnx.load(path)
    model.graph.initializer.append(helper.make_tensor("four", TensorProto.INT64, [2], [4, 3072]))
    model.graph.node[1].CopyFrom(helper.make_node("Reshape", ["sum", "four"], ["logits"]))
    onnx.save(model, path)
    runner = OrtRunner(path)
    with pytest.raises(CnxDeployError, match=r"cannot run .*four\.onnx on a batch of 2 ") as caught:
        runner.run(torch.zeros(2, 3, 32, 32))
    assert caught.value.exit_code == 1
    model.metadata_props.add(key="cnx_deploy.batch", value="1:many")
    onnx.save(model, path)
    with pytest.raises(CorruptArtifactError, match="says '1:many' of its batch"):
        OrtRunner(path)


# --- what the machine lacks -------------------------------------------------------------------------------------------

COMMANDS = """
import sys
from cnx_deploy.cli import main
for command in ("verify FILE", "bench FILE", "predict FILE a.png", "eval FILE ."):
    try:
        main([word.replace("FILE", sys.argv[1]) for word in command.split()])
    except SystemExit as stop:
        print(stop.code)
"""


@NO_GPU
def test_every_command_refuses_an_engine_without_a_gpu(tiny_engine: Artifact, tmp_path: Path) -> None:
    command = [sys.executable, "-c", COMMANDS, str(tiny_engine.path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "5\n" * 4, done.stderr
    assert done.stderr.count("Error: Running an engine needs an NVIDIA GPU") == 4, done.stderr


def test_a_provider_that_does_not_load_is_refused(tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself makes a session on the CPU and goes on."""
    real = onnxruntime.InferenceSession

    def fallen_back(path: str, options: Any, providers: list[Any]) -> Any:
        assert providers[0][0] == "CUDAExecutionProvider"
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(MissingRequirementError, match=r"gave CPUExecutionProvider where CUDAExec.*asked for"):
        OrtRunner(tiny_onnx_fp16.path, device="cuda")


def test_onnx_runtime_waits_for_the_images(tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its provider computes on a stream of its own. On tensors of a GPU without values."""
    runner, calls = OrtRunner(tiny_onnx_fp16.path), []
    runner.device = torch.device("cuda", 0)
    stream = SimpleNamespace(synchronize=lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(runner, "_bound_run", lambda *words: calls.append("run"))
    with pytest.raises(InputError, match="The images are on cpu, the model on cuda:0"):
        runner.run(torch.rand(2, 3, 32, 32))
    with FakeTensorMode():
        runner.run(torch.rand(2, 3, 32, 32, device="cuda"))
    assert calls[:2] == ["wait", "run"]


@NO_GPU
def test_cuda_for_a_recorded_file_is_refused_where_there_is_none(tiny_onnx_fp32: Artifact) -> None:
    with pytest.raises(MissingRequirementError, match="CUDAExecutionProvider was asked for"):
        open_predictor(tiny_onnx_fp32.path, device="cuda")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_exports_and_predictions_do_not_leak() -> None:
    """A part of what `scripts/soak.py` does; `docs/data/soak.json` is the whole. It ends with 3 where memory grows."""
    command = [sys.executable, "scripts/soak.py", "--cycles", "40", "--predictions", "2000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=800)
    assert done.returncode == 0, done.stdout
    turns = {name: report["turns"] for name, report in json.loads(done.stdout).items()}
    assert turns == {"cycles": 40, "predictions": 2000}


# --- threads ----------------------------------------------------------------------------------------------------------


def by_its_owner(call: Callable[..., bool], *, begins: bool = False) -> Callable[..., bool]:
    """A call that takes 2 ms and fails in another thread than the one that set the shape."""

    def watched(self: Any, *words: Any) -> bool:
        if begins:
            self.owner = threading.get_ident()
        time.sleep(0.002)
        assert self.owner == threading.get_ident(), "another thread's call lies between"
        return call(self, *words)

    return watched


@pytest.fixture
def watched_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT's context takes its time between two calls."""
    monkeypatch.setattr(DoubleContext, "set_input_shape", by_its_owner(DoubleContext.set_input_shape, begins=True))
    for name in ("set_tensor_address", "execute_async_v3"):
        monkeypatch.setattr(DoubleContext, name, by_its_owner(getattr(DoubleContext, name)))


@pytest.mark.usefixtures("watched_context")
def test_each_of_four_threads_gets_the_logits_of_its_images_from_one_runner(runner: Runner) -> None:
    batches = list(images_for(32, 8).split([1, 2, 2, 3]))
    expected = [runner.run(batch)["logits"].clone() for batch in batches]
    barrier = threading.Barrier(4)

    def largest_difference(at: int) -> float:
        barrier.wait(10)
        found = [runner.run(batches[at])["logits"].clone() for _ in range(4)]
        return max(float((logits - expected[at]).abs().max()) for logits in found)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(largest_difference, range(4))) < 1e-3
