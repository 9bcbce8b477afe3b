"""What only a GPU can show. Selected by `pytest -m gpu`; without a GPU each says that it was not run."""

from pathlib import Path

import pytest
import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.hidden_tensor import FusedMode, Hidden
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import default_targets, load_backend
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.kernels.settings import SHARED_BYTES
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.runners.fused import FusedRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.tensorrt import TensorRTRunner
from cnx_deploy.verification.parity import differences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not find_gpus(), reason="no NVIDIA GPU: not run")]

SPEC = DeploySpec(precision="fp16", image_size=64)
BATCHES = (1, 7, 64, 7)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    backend = load_backend()
    if default_targets(backend) != ("current",):
        pytest.skip(f"{backend.name} does not build for {find_gpus()[0].target}: not run")
    folder = tmp_path_factory.mktemp("gpu")
    record = ModelRecord("atto", 1000, 64, WeightsRecord("random", "0", "0" * 64, "none"), Preprocessing())
    onnx = export_onnx(random_model("atto"), record, ExportSpec(deploy=SPEC, batch=(1, 8, 64)), folder)
    return build_engine(onnx, BuildSpec(runtime="auto", target="current", batches=((1, 8, 64),)), folder)


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_an_engine_agrees_with_pytorch(engine: Artifact, batch: int) -> None:
    images = torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
    expected = reference_runner(random_model("atto"), SPEC).run(images)["logits"]
    with TensorRTRunner(engine) as runner:
        found = differences(runner.run(images.cuda())["logits"], expected)
    assert not GATES["fp16"].failures(found)


@pytest.mark.parametrize("mode", ["stored", "recomputed", "auto"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_engine_with_own_kernels_agrees_with_pytorch(engine: Artifact, mode: FusedMode, cuda_graph: bool) -> None:
    target = find_gpus()[0].target
    if target not in load_backend("tensorrt-rtx").targets or target not in SHARED_BYTES:
        pytest.skip(f"no engine with own kernels is built for {target}: not run")
    spec = BuildSpec(runtime="tensorrt-rtx", target="current", batches=((1, 8, 64),), fused=mode)
    onnx = engine.path.parent / engine.manifest.source_name
    built = build_engine(onnx, spec, engine.path.parent / mode)
    reference = reference_runner(random_model("atto"), SPEC)
    with TensorRTRunner(built, allow_engine_code=True, cuda_graph=cuda_graph) as runner:
        for batch in BATCHES:
            images = torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
            found = differences(runner.run(images.cuda())["logits"], reference.run(images)["logits"])
            assert not GATES["fp16"].failures(found), batch


@pytest.mark.parametrize("hidden", [None, "stored", "recomputed"])
def test_own_kernels_in_pytorch_agree_with_pytorch(hidden: Hidden | None) -> None:
    model = random_model("atto")
    reference, runner = reference_runner(model, SPEC), FusedRunner(model, SPEC, hidden=hidden)
    for batch in BATCHES:
        images = torch.rand(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        for given in (images.cuda(), images.cuda().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            found = differences(runner.run(given)["logits"], reference.run(images)["logits"])
            assert not GATES["fp16"].failures(found), batch


def test_torch_compile_sees_the_kernels_and_answers_the_same() -> None:
    runner = FusedRunner(random_model("atto"), SPEC)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
    expected = runner.run(images)["logits"].clone()
    with torch.inference_mode():
        found = torch.compile(runner.module, fullgraph=True)(images)
    assert not GATES["fp16"].failures(differences(found, expected))


def test_a_permuted_view_gives_the_logits_of_its_values(engine: Artifact) -> None:
    view = torch.rand(2, 64, 64, 3, device="cuda").permute(0, 3, 1, 2)
    with TensorRTRunner(engine) as runner:
        torch.testing.assert_close(runner.run(view)["logits"].clone(), runner.run(view.contiguous())["logits"])


def test_an_input_freed_while_it_is_read_does_not_change_the_logits(engine: Artifact) -> None:
    images = torch.rand(8, 3, 64, 64, device="cuda")
    with TensorRTRunner(engine) as runner:
        expected = runner.run(images.clone())["logits"].clone()
        logits = runner.enqueue(images.clone())
        torch.full((8, 3, 64, 64), float("nan"), device="cuda")  # may take the freed block at once
        torch.cuda.synchronize()
        torch.testing.assert_close(logits, expected)


def test_a_second_build_is_reused(engine: Artifact, tmp_path: Path) -> None:
    onnx = engine.path.parent / engine.manifest.source_name
    again = build_engine(onnx, BuildSpec(runtime="auto", target="current"), engine.path.parent)
    assert again.sha256 == engine.sha256
