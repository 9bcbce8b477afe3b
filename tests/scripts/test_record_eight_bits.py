"""The record of eight bits, made of the smallest network: bytes of its engines, and the accuracy of one case."""

import importlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import random_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "record_eight_bits.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/record_eight_bits.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("record_eight_bits")


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_bytes())["rows"]


@pytest.mark.slow
def test_bytes_of_each_precision_are_recorded_a_line_a_row_and_kept(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    words = ["traffic", "tiny-test", "--batch", "1", "--record", str(path)]
    assert script.main([*words, "--precision", "fp16", "--precision", "int8"]) == 0
    half, int8 = rows_of(path)
    assert [(row["precision"], row["target"], row["batch"]) for row in (half, int8)] == [
        ("fp16", "sm89", 1),
        ("int8", "sm89", 1),
    ]
    assert int8["megabytes_per_image"] < 0.85 * half["megabytes_per_image"]
    assert int8["kernels"] <= half["kernels"]
    assert sum(line.startswith('{"part"') for line in path.read_text().splitlines()) == 2

    document = json.loads(path.read_bytes())
    document["rows"][0]["kernels"] = 7  # a row that is there is not made again
    path.write_text(json.dumps(document))
    assert script.main([*words, "--precision", "fp16", "--resume"]) == 0
    assert [row["kernels"] for row in rows_of(path)] == [7, int8["kernels"]]
    document["tools"]["torch"] = "1.0"
    path.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match="made with another torch: leave --resume out"):
        script.main([*words, "--resume"])


def test_fp8_has_no_row_for_a_target_without_it(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert script.main(["traffic", "tiny-test", "--target", "sm86", "--precision", "fp8", "--record", str(path)]) == 0
    assert not path.exists()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small pictures of two classes in train and val."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, name in itertools.product(("train", "val"), ("dark", "light")):
        (root / part / name).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 128, (32, 32, 3)) + (128 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{index}.png")
    return root


@pytest.fixture
def network(tiny_variant: Variant, digits: Path, tmp_path: Path) -> str:
    """A network of random weights for them, as the commands name it."""
    path = tmp_path / "weights.safetensors"
    model, names = random_model(tiny_variant, 10, seed=0), ["dark", "light", *"abcdefgh"]
    save_checkpoint(path, model, class_names=names, preprocessing=Preprocessing(image_size=32))
    return f"pictures={path}:{digits}"


@pytest.mark.slow
def test_accuracy_of_a_case_is_told_by_the_form_and_by_the_file(
    script: ModuleType, network: str, tmp_path: Path
) -> None:
    path = tmp_path / "record.json"
    words = ["accuracy", network, "--precision", "int8", "--method", "max", "--record", str(path)]
    assert script.main(words) == 0
    rows = rows_of(path)
    of = {(row["change"], row["images"], row["gains"], row["judge"]): row for row in rows}
    form = [(change, images, gains, "torch-deploy") for change in ("", "hot", "outliers")
            for images in ("held out", "noise 96") for gains in (True, False)]  # fmt: skip
    assert set(of) == {*form, *(("", "held out", True, judge) for judge in ("onnxruntime", "emulate-fp16"))}
    for row in rows:
        assert row["count"] == 8
        assert 1e-4 < row["relative_l2_median"] <= row["relative_l2_worst"] < 0.5
        assert row["reference_top1"] % 12.5 == 0
        assert abs(row["top1"] - row["reference_top1"]) <= 12.5 * row["flips"]
    without, gained = (of["outliers", "held out", gains, "torch-deploy"] for gains in (False, True))
    assert gained["relative_l2_median"] < without["relative_l2_median"] / 2


def test_neighbours_of_features_are_compared(script: ModuleType, network: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    words = ["features", network, "--precision", "fp16", "--record", str(path)]
    assert script.main(words) == 0
    for row in rows_of(path):
        assert row["relative_l2_worst"] < 5e-3
        assert row["recall_at_5"] == 1.0
        assert 0.5 <= row["reference_label_at_1"] <= 1.0


def test_a_network_is_named_with_its_weights_and_its_images(script: ModuleType, capsys) -> None:
    assert script.Network.parse("a=b:c.pt:d") == script.Network("a", Path("b:c.pt"), Path("d"))
    with pytest.raises(SystemExit):
        script.main(["accuracy", "weights.safetensors"])
    assert "is not NAME=CHECKPOINT:FOLDER" in capsys.readouterr().err
