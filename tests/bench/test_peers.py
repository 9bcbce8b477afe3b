"""The peers compute the same network: the same logits from their own code, or an honest refusal."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from cnx_deploy.bench.peers import PEERS, CompiledRunner, PeerSetup, place_of_peers, timm_twin
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions
from cnx_deploy.verification.parity import differences

SPEC = DeploySpec(image_size=32)
QUIET = RunnerOptions(threads=1, spin=False)
PIXELS = next(image_like_batches(3, 32, batch_size=3))


def made(word: str, model: ConvNeXtV2, folder: Path, spec: DeploySpec = SPEC) -> tuple[Runner, torch.Tensor]:
    """A peer on this machine's CPU, and its logits for `PIXELS`."""
    peer = PEERS[word]
    runner = peer.prepare(PeerSetup(model, spec, QUIET, folder))()
    take = peer.input_from_pixels(spec)
    images = take(PIXELS) if take is not None else runner_input(PIXELS, spec.input_kind)
    return runner, runner.run(images.to(runner.device))["logits"]


@pytest.mark.parametrize("kind", ["float", pytest.param("uint8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("answer", [{}, {"tta": "flip", "temperature": 2.5}], ids=["plain", "flip"])
@pytest.mark.parametrize(
    "word", ["torch", *(pytest.param(word, marks=pytest.mark.slow) for word in ("timm", "timm-18", "timm-openvino"))]
)
def test_a_peer_gives_the_logits_of_the_reference(
    tiny_model: ConvNeXtV2, tmp_path: Path, word: str, kind: str, answer: dict[str, Any]
) -> None:
    spec = DeploySpec(image_size=32, input_kind=kind, **answer)
    expected = reference_runner(tiny_model, spec).run(runner_input(PIXELS, kind))["logits"].clone()
    runner, logits = made(word, tiny_model, tmp_path, spec)
    assert not GATES["fp32"].failures(differences(logits, expected))
    assert runner.info.precision in ("fp32", "float32")


@pytest.mark.parametrize("word", ["torch-half", pytest.param("timm-half", marks=pytest.mark.slow)])
def test_a_peer_in_half_says_so_and_agrees(tiny_model: ConvNeXtV2, tmp_path: Path, word: str) -> None:
    expected = reference_runner(tiny_model, SPEC).run(runner_input(PIXELS, "float"))["logits"].clone()
    runner, logits = made(word, tiny_model, tmp_path)
    found = differences(logits, expected)
    assert not GATES["fp16"].failures(found)
    assert found.relative_l2_max > 1e-5, "it is not FP32"
    assert (runner.info.precision, PEERS[word].row_name("fp32").endswith(".half() fp16")) == ("fp16", True)


def test_pytorchs_peers_compute_in_fp32_on_a_cpu_and_as_our_files_do_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place_of_peers(["fp16", "fp32"]) == ("cpu", "fp32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place_of_peers(["fp16", "fp32"]) == ("cuda", "fp16")
    assert place_of_peers(["fp32"]) == ("cuda", "fp32")
    names = [PEERS[word].row_name("fp16") for word in ("torch", "compile", "timm")]
    assert names == ["torch eager fp16", "torch.compile fp16", "timm.onnx fp32"]


def test_a_peer_in_half_is_within_the_fp16_gate_and_outside_the_fp32_one(
    tiny_model: ConvNeXtV2, tmp_path: Path
) -> None:
    images = runner_input(PIXELS, "float")
    expected = reference_runner(tiny_model, SPEC).run(images)["logits"].clone()
    runner = PEERS["torch"].prepare(PeerSetup(tiny_model, SPEC, QUIET, tmp_path, "cpu", "fp16"))()
    found = differences(runner.run(images)["logits"], expected)
    assert (runner.info.precision, runner.info.details) == ("fp16", (("autocast", "fp16"),))
    assert not GATES["fp16"].failures(found)
    assert GATES["fp32"].failures(found)


def test_one_wrong_weight_of_the_twin_is_seen_by_the_gate(tiny_model: ConvNeXtV2) -> None:
    images = torch.rand(3, 3, 32, 32)
    twin = timm_twin(tiny_model)
    with torch.inference_mode():
        right = twin(images)
        assert not GATES["fp32"].failures(differences(right, tiny_model(images)))
        twin.stages[2].blocks[1].mlp.grn.bias[3] += 0.1
        assert GATES["fp32"].failures(differences(twin(images), tiny_model(images)))


@pytest.mark.slow
def test_timms_peer_takes_any_batch_and_says_its_version_and_provider(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    runner, _ = made("timm", tiny_model, tmp_path)
    assert runner.input_spec.max_batch is None
    assert {"timm", "provider", "threads"} <= dict(runner.info.details).keys()
    assert [len(runner.run(torch.rand(batch, 3, 32, 32))["logits"]) for batch in (1, 5)] == [1, 5]


@pytest.mark.parametrize(
    ("word", "share", "gelu"),
    [
        ("timm", "images of its own", "Gelu"),
        pytest.param("timm-whole", "a share of each operator", "Gelu", marks=pytest.mark.slow),
        pytest.param("timm-18", "a share of each operator", "Erf", marks=pytest.mark.slow),
        pytest.param("timm-openvino", "images of its own", "Gelu", marks=pytest.mark.slow),
        pytest.param("timm-openvino-whole", "a share of each operator", "Gelu", marks=pytest.mark.slow),
    ],
)
def test_timms_peer_runs_as_our_files_do_or_as_it_is_found_and_has_the_logits_of_the_reference(
    tiny_model: ConvNeXtV2, tmp_path: Path, word: str, share: str, gelu: str
) -> None:
    setup = PeerSetup(tiny_model, SPEC, RunnerOptions(threads=2, spin=False, thread_per_image=True), tmp_path)
    with PEERS[word].prepare(setup)() as runner:
        assert dict(runner.info.details)["a thread has"] == share
        logits = runner.run(PEERS[word].input_from_pixels(SPEC)(PIXELS))["logits"]
    expected = reference_runner(tiny_model, SPEC).run(runner_input(PIXELS, "float"))["logits"]
    assert not GATES["fp32"].failures(differences(logits, expected))
    operators = {node.op_type for node in onnx.load(tmp_path / "timm.onnx").graph.node}
    assert {"Gelu", "Erf"} & operators == {gelu}


def test_without_timm_its_peer_is_a_missing_requirement(
    tiny_model: ConvNeXtV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.models.convnext", None)
    with pytest.raises(MissingRequirementError, match="timm is not installed"):
        PEERS["timm"].prepare(PeerSetup(tiny_model, SPEC, QUIET, tmp_path))


def test_in_openvino_timms_graph_has_fixed_shapes_as_ours_or_open_ones_as_it_is_found(
    tiny_model: ConvNeXtV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = PeerSetup(tiny_model, SPEC, RunnerOptions(threads=2, thread_per_image=True), tmp_path)
    exported: list[Path] = []
    real = torch.onnx.export

    def once(model: torch.nn.Module, args: Any, path: Path, **words: Any) -> None:
        if not exported:
            real(model, args, path, **words)
            exported.append(path)

    monkeypatch.setattr(torch.onnx, "export", once)
    told = {}
    for word in ("timm-openvino", "timm-openvino-whole"):
        with PEERS[word].prepare(setup)() as runner:
            info = runner.info
            told[word] = (info.backend, info.precision, info.arithmetic, dict(info.details)["shapes"])
            logits = runner.run(PEERS[word].input_from_pixels(SPEC)(PIXELS))["logits"]
        expected = reference_runner(tiny_model, SPEC).run(runner_input(PIXELS, "float"))["logits"]
        assert not GATES["fp32"].failures(differences(logits, expected))
    assert told == {
        "timm-openvino": ("openvino", "fp32", "fp32", "fixed for each batch"),
        "timm-openvino-whole": ("openvino", "fp32", "fp32", "open"),
    }
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else True)
    missing = [PEERS[word].missing() for word in ("timm", "timm-openvino")]
    assert missing == [None, 'OpenVINO is not installed: pip install "cnx-deploy[openvino]".']


@pytest.mark.slow
def test_without_a_compiler_torch_compile_is_a_missing_requirement_and_not_eager(
    tiny_model: ConvNeXtV2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU torch.compile takes Triton and no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before
    torch.compiler.reset()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/no/compiler")}),  # monkeypatch would leave the entry hidden
        pytest.raises(MissingRequirementError, match=r"torch\.compile does not work here: .*C\+\+ compiler"),
    ):
        made("compile", tiny_model, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here: not run")
def test_compiled_pytorch_gives_the_logits_of_the_reference_at_each_batch(
    tiny_model: ConvNeXtV2, tmp_path: Path
) -> None:
    runner, logits = made("compile", tiny_model, tmp_path)
    assert isinstance(runner, CompiledRunner)
    reference = reference_runner(tiny_model, SPEC)
    images = runner_input(PIXELS, "float")
    assert not GATES["fp32"].failures(differences(logits, reference.run(images)["logits"]))
    assert not GATES["fp32"].failures(
        differences(runner.run(images[:1])["logits"], reference.run(images[:1])["logits"])
    )
