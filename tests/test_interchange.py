"""The files that Polygraphy reads, read by the real `polygraphy run`."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cnx_deploy.artifacts import Artifact
from cnx_deploy.errors import InputError
from cnx_deploy.interchange import save_comparison
from cnx_deploy.runners.ort import OrtRunner


def polygraphy_run(model: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    files = ["--load-inputs", str(folder / "inputs.json"), "--load-outputs", str(folder / "reference.json")]
    polygraphy = str(Path(sys.executable).parent / "polygraphy")
    command = [polygraphy, "run", str(model), "--onnxrt", *files, "--rtol", "1e-3", "--atol", "1e-4"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_polygraphy_agrees_on_the_saved_images_and_not_on_other_logits(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    batches = [torch.rand(size, 3, 32, 32) for size in (1, 2, 7)]
    runner = OrtRunner(tiny_onnx_fp32.path)
    logits = torch.cat([runner.run(batch).clone() for batch in batches])
    save_comparison(tmp_path / "right", batches, logits)
    done = polygraphy_run(tiny_onnx_fp32.path, tmp_path / "right")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = logits.clone()
    wrong[5, 3] += 0.1
    save_comparison(tmp_path / "wrong", batches, wrong)
    assert polygraphy_run(tiny_onnx_fp32.path, tmp_path / "wrong").returncode != 0


def test_saving_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_comparison(tmp_path, [torch.zeros(2, 3, 32, 32)], torch.zeros(2, 10))
    assert capfd.readouterr().out == ""


def test_images_and_logits_must_be_as_many(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 images and logits of 2"):
        save_comparison(tmp_path, [torch.zeros(3, 3, 32, 32)], torch.zeros(2, 10))
