"""What is added from outside, a precision or a runner, is taken by every stage without another edit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cnx_deploy as cnx
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.gates import Gate
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.precision import PRECISIONS, Precision, register_precision
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import Machine
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.runners import registry
from cnx_deploy.runners.base import HoldsNothing, RunnerInfo
from cnx_deploy.runners.pytorch import TorchRunner, reference_runner
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

pytestmark = pytest.mark.usefixtures("quick_timing")
PICTURE = torch.rand(3, 40, 48, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def half_opset_21(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cnx.Artifact]:
    """An FP16 precision of another name, opset and gate, and a file in it."""
    row = Precision(
        name="half21",
        dtype="float16",
        storage_bytes=2,
        has_islands=True,
        gate=Gate("half21", 2e-2, 0.99, 0.9, 1e-2),
        opset=21,
        proven_by=("emulate-fp16",),
    )
    register_precision(row)
    folder = tmp_path_factory.mktemp("precision")
    words = {"image_size": 32, "num_classes": 10, "batch": (1, 1, 1)}
    yield cnx.export("tiny-test", precision="half21", output_dir=folder, **words)
    del PRECISIONS["half21"]


def test_a_precision_from_outside_is_exported_verified_timed_and_used(half_opset_21: cnx.Artifact) -> None:
    manifest = half_opset_21.manifest
    assert (half_opset_21.path.name, manifest.request.opset) == ("tiny-test-32-half21.onnx", 21)
    (found,) = cnx.verify(half_opset_21, samples=2).results
    assert (found.passed, [result.gate.name for result in found.results]) == (True, ["half21"])
    report = cnx.benchmark(half_opset_21, batch=1, duration_seconds=0.05, threads=1)
    assert [row.precision for row in report.rows] == ["half21"]
    assert len(cnx.predict(half_opset_21, PICTURE).scores) == 5


def test_a_precision_from_outside_compiles(half_opset_21: cnx.Artifact, tmp_path: Path) -> None:
    engine = cnx.build_engine(half_opset_21, target="sm89", output_dir=tmp_path)
    assert (engine.manifest.precision.name, engine.manifest.facts.half_share_of_products) == ("half21", 1.0)


class Zeros(HoldsNothing):
    """Answers zero to everything."""

    def __init__(self, artifact: Artifact) -> None:
        self.classes = artifact.manifest.model.num_classes
        self.device = torch.device("cpu")
        self.input_spec = InputSpec(artifact.manifest.deploy.input_kind, artifact.manifest.model.image_size)
        self.info = RunnerInfo("zeros", "1", "cpu", artifact.manifest.precision.name, "none")

    def run(self, images: Tensor) -> dict[str, Tensor]:
        check_input(images, self.input_spec)
        return {"logits": torch.zeros(len(images), self.classes)}


def takes_fp32(artifact: Artifact, machine: Machine) -> CnxDeployError | None:
    return None if artifact.manifest.precision.name == "fp32" else InputError("zeros takes FP32 files only.")


def opened(artifact: Artifact, options: RunnerOptions) -> Zeros:
    return Zeros(artifact)


@pytest.fixture
def zeros_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner of zeros, registered as the only default one."""
    monkeypatch.setattr(registry, "BUILT_IN", {})
    monkeypatch.setattr(registry, "_ENTRIES", {})
    register_runner(RunnerEntry(name="zeros", kinds=("onnx",), can_run=takes_fp32, open=opened, is_default=True))


def test_a_runner_from_outside_is_verified_timed_and_used(
    tiny_onnx_fp32: cnx.Artifact, half_opset_21: cnx.Artifact, zeros_runner: None
) -> None:
    report = cnx.verify(tiny_onnx_fp32, samples=2, backends=("zeros",))
    assert not report.passed, "zeros are not the network's answers"
    assert report.results[0].results[0].candidate == "zeros fp32"
    timed = cnx.benchmark(tiny_onnx_fp32, batch=1, duration_seconds=0.05)
    assert [(row.backend, row.status) for row in timed.rows] == [("zeros", "INVALID")]
    assert {score.probability for score in cnx.predict(tiny_onnx_fp32, PICTURE).scores} == {0.1}
    with pytest.raises(InputError, match="zeros takes FP32 files only"):
        cnx.verify(half_opset_21, backends=("zeros",))


def test_a_runner_is_chosen_by_name_in_every_command(
    tiny_onnx_fp32: cnx.Artifact, half_opset_21: cnx.Artifact, zeros_runner: None
) -> None:
    register_runner(RunnerEntry(name="usual", kinds=("onnx",), can_run=takes_fp32, open=opened, is_default=True))
    assert {score.probability for score in cnx.predict(tiny_onnx_fp32, PICTURE, backend="zeros").scores} == {0.1}
    timed = cnx.benchmark(tiny_onnx_fp32, batch=1, backends=("zeros", "usual"), duration_seconds=0.05)
    name = tiny_onnx_fp32.path.name
    assert [row.name for row in timed.rows] == [f"{name} [zeros]", f"{name} [usual]"]
    (refused,) = cnx.benchmark(half_opset_21, batch=1, backends="zeros", duration_seconds=0.05).not_run
    assert (refused.name, refused.reason) == (f"{half_opset_21.path.name} [zeros]", "zeros takes FP32 files only.")
    with pytest.raises(InputError, match="No runner is called 'ones'"):
        cnx.load(tiny_onnx_fp32, backend="ones")


def test_a_runner_that_takes_networks_runs_a_checkpoint(
    tiny_model: ConvNeXtV2, tmp_path: Path, zeros_runner: None
) -> None:
    checkpoint = tmp_path / "tiny.safetensors"
    save_checkpoint(checkpoint, tiny_model, preprocessing=Preprocessing(image_size=32))
    with pytest.raises(InputError, match="zeros runs exported files, and this is a checkpoint"):
        cnx.load(checkpoint, backend="zeros")
    made: list[str] = []

    def open_network(model: object, spec: DeploySpec, options: RunnerOptions) -> TorchRunner:
        made.append(spec.size_text)
        return reference_runner(model, spec)  # type: ignore[arg-type]

    register_runner(RunnerEntry(name="own", kinds=(), can_run=takes_fp32, open=opened, open_network=open_network))
    assert len(cnx.load(checkpoint, backend="own").predict(PICTURE).scores) == 5
    assert made == ["32"]


def test_a_device_is_handed_to_the_runner_by_every_command(tiny_onnx_fp32: cnx.Artifact, zeros_runner: None) -> None:
    asked: list[str] = []

    def on_device(artifact: Artifact, options: RunnerOptions) -> Zeros:
        asked.append(options.device)
        return Zeros(artifact)

    register_runner(RunnerEntry(name="zeros", kinds=("onnx",), can_run=takes_fp32, open=on_device, is_default=True))
    cnx.predict(tiny_onnx_fp32, PICTURE, device="cuda")
    cnx.verify(tiny_onnx_fp32, samples=2, backends=("zeros",), device="cuda")
    cnx.benchmark(tiny_onnx_fp32, batch=1, duration_seconds=0.05, device="cuda")
    assert set(asked) == {"cuda"}
    assert len(asked) >= 3
