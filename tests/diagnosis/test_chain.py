"""The chain from PyTorch to the engine stops at the first step that fails and blames the right part."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from cnx_deploy.cli import cli
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.diagnosis import chain as chains
from cnx_deploy.diagnosis.chain import Chain, follow_chain
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.checkpoint import LoadedModel, hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.recorded import recorded_model
from cnx_deploy.verification.verify import Reference
from tests.support.hot_networks import with_hot_responses


def recorded(model: ConvNeXtV2, folder: Path) -> tuple[Artifact, LoadedModel]:
    weights = WeightsRecord("random", "0", hash_weights(model), "none (random weights)")
    record = ModelRecord("tiny-test", 10, 32, weights, Preprocessing(image_size=32))
    spec = ExportSpec(
        deploy=DeploySpec("fp16", 32), batch=(3, 3, 3)
    )  # six images in two batches; a range takes half as long again
    return export_onnx(model, record, spec, folder), LoadedModel(model, weights, None, record.preprocessing)


def chain(artifact: Artifact, loaded: LoadedModel, engines: tuple[Artifact, ...] = ()) -> Chain:
    """The chain on six images, with weights that no factory makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnx_deploy.verification.originals.recorded_model", lambda _: loaded)
        return follow_chain(artifact, engines, Reference(artifact, samples=6))


@pytest.fixture(scope="module")
def healthy(tiny_onnx_fp16) -> tuple[Artifact, LoadedModel]:
    return tiny_onnx_fp16, recorded_model(tiny_onnx_fp16)


def test_a_healthy_chain_passes_and_says_what_was_not_run(healthy, engine, tiny_onnx_fp32, monkeypatch) -> None:
    """The FP32 file is the shared one; the chain that overflows below exports its own."""
    monkeypatch.setattr(chains, "_export_fp32", lambda *_: tiny_onnx_fp32)
    verdict = chain(*healthy, engines=(engine,))
    assert [step.candidate for step in verdict.steps] == [
        "FP32 ONNX (no optimisations)",
        "FP32 ONNX (all optimisations)",
        "tiny-test-32-fp16.onnx (emulated)",
        engine.path.name,
    ]
    assert verdict.failed is None
    assert 1e-8 < verdict.floor < 1e-5
    half = verdict.steps[2].result
    assert half is not None
    assert half.differences.relative_l2_max > 100 * verdict.floor
    document = json.loads(json.dumps(verdict.to_dict()))
    assert (document["passed"], len(document["steps"])) == (True, 4)
    assert document["steps"][0]["result"]["gate"]["name"] == "fp32"
    if not torch.cuda.is_available():
        assert "GPU" in str(verdict.steps[-1].not_run)
        assert verdict.verdict() == "3 steps passed, 1 not run"


@pytest.mark.slow
def test_a_fault_of_the_export_stops_the_chain_at_the_first_step(healthy, monkeypatch) -> None:
    artifact, loaded = healthy
    export = chains._export_fp32

    def faulty(*arguments: object) -> Artifact:
        made = export(*arguments)
        model = onnx.load(made.path)
        bias = next(tensor for tensor in model.graph.initializer if tensor.name == "stages.1.0.pwconv1.bias")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.05, bias.name))
        onnx.save(model, made.path)
        return made

    monkeypatch.setattr(chains, "_export_fp32", faulty)
    verdict = chain(artifact, loaded)
    assert len(verdict.steps) == 1
    assert verdict.verdict().startswith("FP32 ONNX (no optimisations) differs from PyTorch FP32 (relative L2")
    assert verdict.verdict().endswith("To blame: the export.")


@pytest.mark.slow
def test_a_fault_of_the_optimisations_is_told_from_one_of_the_file(healthy, monkeypatch) -> None:
    artifact, loaded = healthy
    plain = chains._outputs

    def biased(runner, batches, what, progress):
        bias = 0.01 if "all optimisations" in what else 0.0
        return {name: output + bias for name, output in plain(runner, batches, what, progress).items()}

    monkeypatch.setattr(chains, "_outputs", biased)
    verdict = chain(artifact, loaded)
    assert [step.failed for step in verdict.steps] == [False, True]
    assert "ONNX Runtime's optimisations" in verdict.verdict()


def test_half_precision_that_overflows_is_blamed_and_not_the_export(tiny_variant, tmp_path) -> None:
    verdict = chain(*recorded(with_hot_responses(tiny_variant, 32, 2000.0), tmp_path))
    assert [step.failed for step in verdict.steps] == [False, False, True]
    assert "values are NaN or infinite" in verdict.verdict()
    assert "To blame: FP16: see `cnx-deploy diagnose headroom`" in verdict.verdict()


@pytest.mark.slow
def test_a_wrong_engine_is_blamed_on_tensorrt(healthy, tiny_engine, monkeypatch) -> None:
    artifact, loaded = healthy

    opened = chains.open_runner

    class Off:
        """Where an engine would run: the right logits and a little more."""

        def __init__(self, engine: Artifact) -> None:
            self._inner = opened(artifact, "onnxruntime")
            self.device, self.info, self.input_spec = self._inner.device, self._inner.info, self._inner.input_spec

        def __enter__(self) -> "Off":
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def run(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
            return {name: output + 0.2 for name, output in self._inner.run(images).items()}

    monkeypatch.setattr(chains, "open_runner", lambda of, *words: Off(of) if of is tiny_engine else opened(of, *words))
    verdict = chain(artifact, loaded, engines=(tiny_engine,))
    assert [step.failed for step in verdict.steps] == [False, False, False, True]
    assert verdict.verdict().endswith("To blame: TensorRT.")


@pytest.mark.slow
def test_the_command_follows_recorded_files_and_ends_in_3_where_a_step_fails(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(cli, ["export", "--variant", "tiny-test", "--image-size", "32", "--precision", "fp16"])
    assert made.exit_code == 0, made.output
    found = CliRunner().invoke(cli, ["diagnose", "chain", "--samples", "3"])
    assert found.exit_code == 0, found.output
    assert "tiny-test-32-fp16.onnx: 3 steps passed" in found.stdout
    assert found.stdout.count("pass\n") == 3
    plain = chains._outputs

    def biased(*given):
        return {name: output + (given[2] == "emulator") for name, output in plain(*given).items()}

    monkeypatch.setattr(chains, "_outputs", biased)
    failed = CliRunner().invoke(cli, ["diagnose", "chain", "--samples", "3"])
    assert isinstance(failed.exception, ParityError)  # exit code 3
    assert "To blame: FP16" in str(failed.exception)


def test_an_fp32_file_is_not_what_the_chain_leads_to(tiny_onnx_fp32) -> None:
    with pytest.raises(InputError, match="no half-precision ONNX file"):
        follow_chain(tiny_onnx_fp32, (), object.__new__(Reference))  # refused before that is looked at
