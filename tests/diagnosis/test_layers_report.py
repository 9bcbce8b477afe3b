"""`cnx-deploy verify --layers`: exit codes, the table, the document and the plot."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.plotting import check_plot
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.diagnosis.layerwise.comparison import (
    Figures,
    LayerComparison,
    layers_of_artifact,
)
from cnx_deploy.diagnosis.layerwise.report import table, write_plot
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import random_model
from tests.conftest import TINY_TEST
from tests.support.layer_faults import compare, planted, shifted, with_constant

ON_CPU = ("torch", "onnxruntime", "emulator")


@pytest.fixture(scope="module")
def sound(tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact) -> dict[str, LayerComparison]:
    return {"fp32": compare(tiny_onnx_fp32), "fp16": compare(tiny_onnx_fp16)}


@pytest.fixture
def recorded(tiny_onnx_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A copy of the FP32 file in export/, whose manifest names the weights by their hash."""
    monkeypatch.setitem(VARIANTS, TINY_TEST.name, TINY_TEST)
    folder = shutil.copytree(tiny_onnx_fp32.path.parent, tmp_path / "export", ignore=shutil.ignore_patterns(".*"))
    manifest = folder / tiny_onnx_fp32.path.with_suffix(".json").name

    def change(data: dict[str, Any]) -> None:
        data["model"]["weights"]["sha256"] = hash_weights(random_model(TINY_TEST, 10, seed=0))
        data["model"]["preprocessing"] = {"image_size": 32}

    _change_manifest(manifest, change)
    monkeypatch.chdir(tmp_path)
    return open_artifact(folder / tiny_onnx_fp32.path.name)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["verify", *words])
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_the_command_prints_a_row_a_block_and_ends_well(recorded: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--layers")
    lines = printed.splitlines()
    assert (code, lines[0], lines[-1]) == (0, "tiny-test-32-fp32.onnx, images: 2", "no side diverges")
    blocks = [line.split()[0] for line in lines[2:15]]
    assert [block for block in blocks if block.startswith("stages")] == [
        "stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0",
    ]  # fmt: skip


def test_a_fault_is_exit_code_3_in_the_table_and_in_the_document(
    recorded: Artifact, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = planted(recorded, tmp_path, with_constant("stages.2.1.pwconv1.bias", shifted))
    shutil.move(path, recorded.path)
    entry = {"size_bytes": recorded.path.stat().st_size, "sha256": sha256_of_file(recorded.path)}
    _change_manifest(recorded.path.with_suffix(".json"), lambda data: data["files"][0].update(entry))
    code, printed, said = run(capsys, str(recorded.path), "--layers", "--json", "--samples", "1", "--plot", "a.svg")
    (found,) = json.loads(printed)["layers"]
    place = {"side": "onnxruntime", "module": "stages.2.1.pwconv1", "block": "stages.2.1", "verdict": "fails"}
    assert (code, found["images"], found["first_divergence"]) == (3, 1, place)
    assert [len(side["taps"]) for side in found["sides"]] == [0, 52, 0, 0]
    assert "part from PyTorch by layer" in said
    assert "stages.2.1.pwconv1" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--plot", "a.svg"), "add --layers"),
        (("--layers", "--samples", "9"), "1 to 8 images"),
        (("--layers", "--plot", "a.png"), "expected the suffix .svg"),
        (("--layers", "--save-inputs", "folder"), "--layers has sides of its own"),
        (("--layers", "--export-dir", "none"), "Nothing is recorded"),
    ],
)
def test_what_does_not_go_together_is_wrong_usage(
    recorded: Artifact, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, _, said = run(capsys, *words)
    assert (code, message in " ".join(said.split())) == (2, True)


def test_images_of_a_folder_are_compared_on(recorded: Artifact, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (80 * index, 90, 200)).save(tmp_path / "images" / f"{index}.png")
    found = layers_of_artifact(recorded, samples=3, images=tmp_path / "images")
    assert (found.images, found.passed) == (3, True)


def test_a_byte_that_was_altered_is_found_before_the_file_is_parsed(
    recorded: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(recorded.path.read_bytes())
    content[0] ^= 1
    recorded.path.write_bytes(content)
    monkeypatch.setattr("onnx_ir.load", lambda path: pytest.fail("parsed"))
    with pytest.raises(CorruptArtifactError, match="was altered"):
        layers_of_artifact(recorded)


def test_the_plot_has_a_line_a_side_and_the_same_bytes_each_time(
    sound: dict[str, LayerComparison], tmp_path: Path
) -> None:
    first, second = (write_plot(sound["fp16"], tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    text = first.decode()
    assert [side for side in ON_CPU if f">{side}<" in text] == list(ON_CPU)
    assert ">tensorrt<" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.svg"]


def test_the_plot_marks_where_it_begins_and_what_is_not_finite(
    sound: dict[str, LayerComparison], tmp_path: Path
) -> None:
    side = sound["fp16"].sides[2]
    lost = replace(side.taps[9], verdict="not finite", figures=Figures(float("nan"), float("nan"), 3, float("inf")))
    changed = replace(sound["fp16"], sides=(replace(side, taps=(*side.taps[:9], lost, *side.taps[10:])),))
    text = write_plot(changed, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert (lost.module in text, "emulator: not finite" in text) == (True, True)
    assert "not finite!" in "\n".join(table(changed))


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingRequirementError, match=r"cnx-deploy\[report\]"):
        check_plot(tmp_path / "a.svg")


def _change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
