"""Half-precision files through the commands: fixed batches, mixed folders, refused requests, engines' gates."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from cnx_deploy.bench.peers import place_of_peers
from cnx_deploy.cli import cli
from cnx_deploy.core.errors import BuildError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiling import FilePrecision, _check_half_share
from cnx_deploy.exporters.trt.network import NetworkBuild


def run(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Atto at 32 px: FP32 and BF16 for a batch of exactly four."""
    folder = tmp_path_factory.mktemp("mixed")
    asked = "--image-size 32 --batch 4 --precision fp32 --precision bf16"
    made = run("export", "--variant", "atto", *asked.split(), "--output-dir", str(folder / "export"))
    assert made.exit_code == 0, made.output
    return folder


@pytest.fixture
def inside(mixed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(mixed)
    return mixed


@pytest.mark.slow
def test_a_file_of_a_fixed_batch_is_verified_in_that_batch(inside) -> None:
    found = run("verify", "--samples", "6")
    assert found.exit_code == 0, found.output
    assert "emulator bf16" in found.output


@pytest.mark.slow
def test_a_runner_that_does_not_fit_a_recorded_file_leaves_that_file_out(inside) -> None:
    found = run("verify", "--backend", "emulate-bf16", "--samples", "4")
    assert found.exit_code == 0, found.output
    assert "atto-32-fp32.onnx" in found.output
    assert "has no BF16 to emulate" in found.output
    named = run("verify", "--backend", "emulate-bf16", "export/atto-32-fp32.onnx")
    assert isinstance(named.exception, InputError)


@pytest.mark.slow
def test_bench_measures_what_runs_beside_a_bf16_file(inside) -> None:
    found = run("bench", "--batch", "4", "--duration", "0.1", "--threads", "1")
    assert found.exit_code == 0, found.output
    assert "no BF16 convolution on a CPU" in found.output


@pytest.mark.slow
def test_a_bf16_file_is_not_called_corrupt_by_predict(inside) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40), (10, 90, 200)).save("p.png")
    found = run("predict", "export/atto-32-bf16.onnx", "p.png")
    assert isinstance(found.exception, MissingRequirementError)


@pytest.mark.slow
def test_a_fixed_batch_above_the_image_side_is_no_wrong_epsilon(tmp_path) -> None:
    words = "export --variant atto --image-size 32 --precision fp32 --batch 128 --no-verify --output-dir"
    assert run(*words.split(), str(tmp_path)).exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--precision fp32 --keep-fp32 stages.0.0", "of half-precision files, and none is asked for"),
        ("--precision fp32 --precision fp16 --keep-fp32 stages.0.9", "No part of atto is called 'stages.0.9'"),
    ],
)
def test_parts_to_keep_are_checked_before_anything_is_written(tmp_path, words, says) -> None:
    found = run("export", "--variant", "atto", *words.split(), "--output-dir", str(tmp_path / "export"))
    assert isinstance(found.exception, InputError)
    assert says in str(found.exception)
    assert not list(tmp_path.glob("**/*.onnx"))


@pytest.mark.parametrize(
    ("precision", "tf32", "gate"),
    [("bf16", False, "bf16"), ("fp16", False, "fp16"), ("fp32", False, "fp32-engine"), ("fp32", True, "tf32-engine")],
)
def test_an_engine_is_judged_by_the_gate_of_its_precision(engine: Artifact, precision, tf32, gate) -> None:
    onnx = engine.manifest.onnx
    request = replace(
        engine.manifest.request,
        onnx=replace(onnx, deploy=replace(onnx.deploy, precision=precision)),
        allow_tf32=tf32,
    )
    assert replace(engine.manifest, request=request).gate.name == gate


def test_bf16_engines_are_compared_with_pytorch_in_bf16(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place_of_peers(["bf16", "fp32"]) == ("cuda", "bf16")
    assert place_of_peers(["bf16", "fp16"]) == ("cuda", "fp16")


@pytest.mark.slow
def test_an_fp16_file_that_hides_its_float_parts_is_not_built(tmp_path, tiny_variant) -> None:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.model.convnextv2 import random_model
    from tests.model.test_half_precision import exported

    kept = exported(random_model(tiny_variant, 10), DeploySpec("fp16", 32, keep_fp32=("stages.2.0",)), tmp_path)
    build = NetworkBuild(load_backend("tensorrt-rtx"), kept.path)
    _check_half_share(build, FilePrecision.of(kept.manifest.deploy))
    with pytest.raises(BuildError, match="calls itself FP16, but only"):
        _check_half_share(build, replace(FilePrecision.of(kept.manifest.deploy), keep_fp32=()))
