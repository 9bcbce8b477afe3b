"""Temperature scaling on handwritten digits: an over-confident network, the number that mends it, the file of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from torch import Tensor

from cnx_deploy import api
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.verification.temperature import fit_temperature
from tests.conftest import Command

OVERCONFIDENCE = 40.0
"""The head's scores are so many times as large as the regression's, which lie between 0 and 1."""
CLASSES = tuple(map(str, range(10)))
IMAGES = 200
"""To fit on, and as many more to judge the fit on."""


def pooled(model: ConvNeXtV2, images: Tensor) -> Tensor:
    """What the head is given: (N, 64)."""
    given: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    with torch.inference_mode():
        model(images)
    hook.remove()
    return given[0]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint, a random backbone with a head fitted to digits, and two folders of digits that it has not seen."""
    folder = tmp_path_factory.mktemp("digits")
    data, preprocessing = load_digits(), Preprocessing(32, crop_ratio=1.0, interpolation="bilinear")
    # 8 x 8 pixels of 0 to 16, each as a square of 4 x 4.
    pixels = (data.images * 15).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    normalised = np.stack([pixels / 255.0] * 3, axis=1)
    mean, std = (np.array(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    images = torch.from_numpy((normalised - mean) / std).float()
    model, held_out = random_model("tiny-test", 10), 2 * IMAGES
    features = torch.cat([pooled(model, images[held_out:]).double(), torch.ones(len(images) - held_out, 1)], dim=1)
    targets = torch.eye(10, dtype=torch.float64)[data.target[held_out:]]
    ridge = torch.linalg.solve(features.T @ features + 0.01 * torch.eye(65), features.T @ targets)  # (65, 10)
    with torch.no_grad():
        model.head.weight.copy_(ridge[:-1].T * OVERCONFIDENCE)
        model.head.bias.copy_(ridge[-1] * OVERCONFIDENCE)
    checkpoint = save_checkpoint(folder / "digits.safetensors", model, class_names=CLASSES, preprocessing=preprocessing)
    for index in range(held_out):
        part = folder / ("fit" if index < IMAGES else "test") / CLASSES[data.target[index]]
        part.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[index]).save(part / f"{index:04d}.png")
    return checkpoint, folder / "fit", folder / "test"


def logits_of(checkpoint: Path, folder: Path) -> tuple[Tensor, Tensor]:
    """Plain passes of PyTorch over the pixels of the files, and their labels."""
    loaded, paths = load_checkpoint(checkpoint), sorted(folder.glob("*/*.png"))
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (loaded.preprocessing.mean, loaded.preprocessing.std)
    )
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path).convert("RGB"))) for path in paths])
    with torch.inference_mode():
        logits = loaded.model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
    return logits, torch.tensor([int(path.parent.name) for path in paths])


def best_temperature(logits: Tensor, labels: Tensor) -> float:
    """The minimum of the negative log-likelihood by Brent's method, in NumPy."""
    scores, targets = logits.double().numpy(), labels.numpy()

    def nll(logarithm: float) -> float:
        scaled = scores / np.exp(logarithm)
        shifted = scaled - scaled.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]))

    return float(np.exp(minimize_scalar(nll, bounds=(-4.6, 4.6), method="bounded", options={"xatol": 1e-10}).x))


def test_the_number_is_that_of_another_minimiser_and_the_calibration_error_of_other_images_falls(
    digits: tuple[Path, Path, Path], cnx: Command
) -> None:
    checkpoint, data, others = digits
    fit = api.fit_temperature(checkpoint, data)
    assert fit.temperature == pytest.approx(best_temperature(*logits_of(checkpoint, data)), rel=1e-5)
    assert (fit.count, fit.nll < fit.nll_before) == (IMAGES, True)
    before, after = (api.evaluate(checkpoint, others, temperature=value) for value in (1.0, fit.temperature))
    assert before.calibration.mean_confidence > before.top1_percent / 100 + 0.03, "it is over-confident"
    assert after.calibration.expected_error < 0.6 * before.calibration.expected_error
    assert after.mean_nll < before.mean_nll
    assert after.confusion == before.confusion, "no answer changes"
    hotter = api.evaluate(checkpoint, others, temperature=1 / fit.temperature)
    assert hotter.calibration.expected_error > before.calibration.expected_error, "the other way it rises"
    fitted_on = api.evaluate(checkpoint, data, temperature=fit.temperature)
    assert fit.calibration_error == pytest.approx(fitted_on.calibration.expected_error)
    assert fit.nll == pytest.approx(fitted_on.mean_nll, rel=1e-5)
    code, out, _ = cnx("eval", checkpoint, data, "--fit-temperature")
    assert (code, f"export with --temperature {fit.temperature:.6g}" in out) == (0, True)


def test_scores_that_are_divided_already_give_the_same_number(digits: tuple[Path, Path, Path], cnx: Command) -> None:
    checkpoint, data, _ = digits
    fit = api.fit_temperature(checkpoint, data)
    code, out, _ = cnx("eval", checkpoint, data, "--temperature", 3, "--fit-temperature", "--json")
    assert code == 0
    again = json.loads(out)["temperature"]
    assert again["temperature"] == pytest.approx(fit.temperature, rel=1e-6)
    assert again["nll_before"] != pytest.approx(fit.nll_before)


def test_it_is_found_whatever_the_scale_of_the_scores(digits: tuple[Path, Path, Path]) -> None:
    logits, labels = logits_of(digits[0], digits[1])
    calibrated = logits.double() / fit_temperature(logits, labels).temperature
    for temperature in (0.0101, 0.5, 1.0, 99.0):
        found = fit_temperature(calibrated * temperature, labels).temperature
        assert found == pytest.approx(temperature, rel=1e-6)
    for temperature, said in ((0.0099, r"rises below 0\.01"), (101.0, "rises beyond 100")):
        with pytest.raises(InputError, match=said):
            fit_temperature(calibrated * temperature, labels)


def test_images_that_decide_no_number_are_refused() -> None:
    scores, labels = torch.eye(3).repeat(4, 1) * 5, torch.arange(3).repeat(4)
    with pytest.raises(InputError, match=r"rises below 0\.01\. 12 of 12 images are classified right"):
        fit_temperature(scores, labels)
    with pytest.raises(InputError, match=r"rises beyond 100\. 0 of 12 images are classified right"):
        fit_temperature(scores, (labels + 1) % 3)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("leave_out", [(), ("head-affine",)])
def test_the_head_alone_changes_and_is_divided_in_float64(
    tiny_model: ConvNeXtV2, precision: str, leave_out: tuple[str, ...]
) -> None:
    words: dict[str, Any] = {"precision": precision, "image_size": 32, "leave_out": leave_out}
    plain, scaled = (deploy_form(tiny_model, DeploySpec(**words, temperature=value)) for value in (1.0, 1.7))
    exact = deploy_form(tiny_model, DeploySpec("fp64", 32, layout=scaled.spec.layout, leave_out=leave_out))
    theirs = dict(plain.named_parameters())
    for name, parameter in scaled.named_parameters():
        if name.startswith("head."):
            expected = (exact.get_parameter(name) / 1.7).to(parameter.dtype)
            assert torch.equal(parameter, expected), name
        else:
            assert torch.equal(parameter, theirs[name]), name
    assert str(plain) == str(scaled), "the same modules, so the same kernels"


@pytest.mark.slow
def test_an_exported_file_gives_the_divided_scores_and_the_same_answers(
    digits: tuple[Path, Path, Path], tmp_path: Path, cnx: Command
) -> None:
    checkpoint, data, _ = digits
    temperature = api.fit_temperature(checkpoint, data).temperature
    artifact = api.export(
        "tiny-test", precision="fp32", checkpoint=checkpoint, temperature=temperature, output_dir=tmp_path
    )
    assert artifact.manifest.deploy.temperature == temperature
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values)[:, None, None] for values in (DeploySpec().mean, DeploySpec().std))
    with OrtRunner(artifact.path) as runner, torch.inference_mode():
        found, own = runner.run(images)["logits"], load_checkpoint(checkpoint).model((images - mean) / std)
    torch.testing.assert_close(found * temperature, own, rtol=1e-4, atol=1e-3)
    # What the file's own scores ask for is no further division: it is calibrated.
    fit = api.fit_temperature(artifact, data)
    assert fit.temperature == pytest.approx(temperature, rel=1e-4)
    assert fit.calibration_error == pytest.approx(fit.calibration_error_before, abs=1e-3)
    plain = api.evaluate(checkpoint, data)
    assert api.evaluate(artifact, data).confusion == plain.confusion
    code, out, _ = cnx("eval", artifact.path, data, "--fit-temperature")
    assert (code, f"--temperature {temperature:.4g}"[:16] in out) == (0, True)
