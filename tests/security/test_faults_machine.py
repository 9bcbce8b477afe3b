"""What the machine lacks, and what several threads do to one runner."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.system import find_gpus
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.predict import open_predictor
from tests.runners.test_tensorrt_runner import make_runner
from tests.support.hot_networks import images_for
from tests.support.trt_double import DoubleContext

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(bool(find_gpus()), reason="a GPU is here: engines run")


# --- no GPU -----------------------------------------------------------------------------------------------------------


@NO_GPU
@pytest.mark.parametrize("words", ["verify FILE", "bench FILE", "predict FILE a.png", "eval FILE ."])
def test_every_command_refuses_an_engine_without_a_gpu_within_two_seconds(
    words: str, tiny_engine: Artifact, tmp_path: Path
) -> None:
    """The two seconds are of the command's own processor time: the machine may have other work."""
    measured = (
        "import sys, time\nfrom cnx_deploy.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n"
        "    print('torch' in sys.modules, time.process_time() < 2.0, file=sys.stderr)"
    )
    command = [sys.executable, "-c", measured, *words.replace("FILE", str(tiny_engine.path)).split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    *message, seen = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(message)) == (5, "", 1), done.stderr
    assert "needs an NVIDIA GPU" in message[0]
    assert seen == "False True"


@pytest.mark.slow
def test_onnx_runtime_works_where_cuda_is_hidden(tiny_onnx_fp32: Artifact) -> None:
    code = (
        "import sys, torch\nfrom pathlib import Path\nfrom cnx_deploy.runners.onnxruntime import OrtRunner\n"
        "runner = OrtRunner(Path(sys.argv[1]))\n"
        "print(runner.run(torch.zeros(1, 3, 32, 32))['logits'].shape[1], dict(runner.info.details)['provider'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_onnx_fp32.path)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "10 CPUExecutionProvider\n"), done.stderr


# --- another provider than the one that was asked for -----------------------------------------------------------------


def test_a_provider_that_does_not_load_is_refused(tiny_onnx_fp32: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime itself makes a session on the CPU and goes on."""
    real = onnxruntime.InferenceSession

    def fallen_back(path: str, options: Any, providers: list[Any]) -> Any:
        assert providers[0][0] == "CUDAExecutionProvider"
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", fallen_back)
    with pytest.raises(MissingRequirementError, match=r"gave CPUExecutionProvider where CUDAExec.*asked for") as caught:
        OrtRunner(tiny_onnx_fp32.path, device="cuda")
    assert caught.value.exit_code == 5


@NO_GPU
def test_cuda_for_a_recorded_file_is_refused_where_there_is_none(tiny_onnx_fp32: Artifact) -> None:
    with pytest.raises(MissingRequirementError, match="CUDAExecutionProvider was asked for"):
        open_predictor(tiny_onnx_fp32.path, device="cuda")


# --- memory that grows ------------------------------------------------------------------------------------------------


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

MADE: dict[str, Callable[..., Runner]] = {
    "torch": lambda model, onnx, engine, patch: reference_runner(model, DeploySpec("fp32", 32)),
    "torch deployed": lambda model, onnx, engine, patch: deployed_runner(model, DeploySpec("fp32", 32)),
    "onnxruntime": lambda model, onnx, engine, patch: OrtRunner(onnx.path),
    "onnxruntime-each": lambda model, onnx, engine, patch: OrtRunner(onnx.path, threads=2, thread_per_image=True),
    "emulator": lambda model, onnx, engine, patch: EmulatedRunner(onnx.path),
    "tensorrt": lambda model, onnx, engine, patch: make_runner(engine, onnx, patch)[0],
}


def by_its_owner(call: Callable[..., bool], *, begins: bool = False) -> Callable[..., bool]:
    """A call that takes 2 ms and fails in another thread than the one that set the shape."""

    def watched(self: Any, *words: Any) -> bool:
        if begins:
            self.owner = threading.get_ident()
        time.sleep(0.002)
        assert self.owner == threading.get_ident(), "another thread's call lies between"
        return call(self, *words)

    return watched


@pytest.mark.parametrize("shared", [True, False], ids=["one runner", "a runner each"])
@pytest.mark.parametrize("backend", MADE)
def test_each_thread_gets_the_logits_of_its_images(
    backend: str,
    shared: bool,
    tiny_model: ConvNeXtV2,
    tiny_onnx_fp16: Artifact,
    tiny_engine: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four threads with batches of their own; of TensorRT a context that takes its time between two calls."""
    monkeypatch.setattr(DoubleContext, "set_input_shape", by_its_owner(DoubleContext.set_input_shape, begins=True))
    for name in ("set_tensor_address", "execute_async_v3"):
        monkeypatch.setattr(DoubleContext, name, by_its_owner(getattr(DoubleContext, name)))
    made = [MADE[backend](tiny_model, tiny_onnx_fp16, tiny_engine, monkeypatch) for _ in range(1 if shared else 4)]
    batches = list(images_for(32, 8).split([1, 2, 2, 3]))
    expected = [made[0].run(batch)["logits"].clone() for batch in batches]
    barrier = threading.Barrier(4)

    def work(at: int) -> list[float]:
        barrier.wait(10)
        runner = made[at % len(made)]
        found = [runner.run(batches[at])["logits"].clone() for _ in range(4)]
        return [float((logits - expected[at]).abs().max()) for logits in found]

    with ThreadPoolExecutor(4) as pool:
        assert max(max(differences) for differences in pool.map(work, range(4))) < 1e-3
