"""Programs of torch.export beside exported files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cnx_deploy as cnx
from cnx_deploy.core.errors import InputError, OutputExistsError, ParityError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.verification import program
from cnx_deploy.verification.program import write_program
from tests.conftest import Command
from tests.support.artifacts import copy_artifact

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def written(tiny_onnx_fp16: cnx.Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[cnx.Artifact, Path]:
    artifact = copy_artifact(tiny_onnx_fp16, tmp_path_factory.mktemp("program"))
    return artifact, write_program(artifact).path


def test_a_program_answers_as_the_file_in_a_process_that_loads_torch_and_the_operator(
    written: tuple[cnx.Artifact, Path], tmp_path: Path
) -> None:
    artifact, path = written
    torch.save(IMAGES, tmp_path / "images.pt")
    lines = (
        "import sys, torch, cnx_deploy.kernels.operators",
        "module = torch.export.load(sys.argv[1]).module()",
        "torch.save(module(torch.load(sys.argv[2])), sys.argv[3])",
        "assert not any(name.startswith('cnx_deploy.model') for name in sys.modules)",
    )
    words = [str(each) for each in (path, tmp_path / "images.pt", tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", "\n".join(lines), *words], check=True)
    with cnx.load(artifact) as model:
        expected = model.runner.run(IMAGES)["logits"]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=2e-2, atol=2e-2)


def test_a_program_is_used_again_and_not_replaced_unasked(written: tuple[cnx.Artifact, Path]) -> None:
    artifact, path = written
    before = path.stat().st_mtime_ns
    assert write_program(artifact).reused
    content = path.read_bytes()
    path.write_bytes(b"something else")
    with pytest.raises(OutputExistsError, match="made from other inputs"):
        write_program(artifact)
    path.write_bytes(content)
    assert path.stat().st_mtime_ns != before


@pytest.mark.parametrize("command", ["inspect", "predict", "verify", "build-trt"])
def test_a_command_that_takes_no_program_says_what_it_is(
    written: tuple[Artifact, Path], cnx: Command, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = cnx(command, written[1], *(("photo.jpg",) if command == "predict" else ()))
    assert code in (2, 4)
    assert "torch.export.load takes" in err


def test_the_command_lists_the_program_beside_the_file(cnx: Command, tmp_path: Path) -> None:
    words = ("--variant", "tiny-test", "--image-size", 32, "--batch", 1, "--no-verify", "--output-dir", tmp_path)
    code, out, err = cnx("export", *words, "--format", "pt2", "--format", "onnx", "--json")
    assert code == 0, err
    listed = [Path(row["path"]).name for row in json.loads(out)["artifacts"]]
    assert listed == ["tiny-test-32-fp32.onnx", "tiny-test-32-fp16.onnx", "tiny-test-32-fp16.pt2"]


def test_a_program_that_differs_is_not_written(
    tiny_onnx_fp16: cnx.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, fuse = copy_artifact(tiny_onnx_fp16, tmp_path), program.fuse

    def damaged(deployed: torch.nn.Module, *words: object, **more: object) -> object:
        kept = fuse(deployed, *words, **more)
        deployed.get_buffer("stages.0.0.gamma").mul_(2)
        return kept

    monkeypatch.setattr(program, "fuse", damaged)
    with pytest.raises(ParityError, match=r"The program of tiny-test-32-fp16.onnx differs from PyTorch in logits"):
        write_program(artifact)
    assert not artifact.path.with_suffix(".pt2").exists()


def test_what_has_no_program_is_refused(tiny_onnx_fp32: cnx.Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="own kernels compute in FP16 or BF16"):
        write_program(tiny_onnx_fp32)
    with pytest.raises(InputError, match="Add --precision fp16 or bf16"):
        cnx.export("tiny-test", precision="fp32", formats=("pt2",), output_dir=tmp_path)
    with pytest.raises(InputError, match="No format is called 'pt3'"):
        cnx.export("tiny-test", formats=("pt3",), output_dir=tmp_path)
    assert not list(tmp_path.iterdir())
