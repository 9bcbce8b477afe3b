"""Hostile folders and files: nothing of them is run, nothing outside is touched, nothing waits for ever.

Each test is an attack that worked once. What a stranger can put beside an artifact: links, pipes and devices in place
of files, manifests that lie.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cnx_deploy.api import _outdated
from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import find_artifacts, open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.model.weight_files import read_weight_file
from cnx_deploy.verification.provenance import check_provenance
from tests.core.test_artifacts import make
from tests.support.hostile_onnx import foreign_classifier

# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_weights_that_are_no_file_are_wrong_input_at_once(
    put: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"weights{suffix}"
    put(path)
    with pytest.raises(InputError, match=rf"weights\{suffix} is no regular file"):
        read_weight_file(path)


def test_weights_whose_name_no_system_takes_are_wrong_input() -> None:
    with pytest.raises(InputError, match=r"cannot be opened \(embedded null byte\)"):
        read_weight_file(Path("a\0b.pt"))


# --- manifests that lie -----------------------------------------------------------------------------------------------


def changed(artifact: Artifact, change: Callable[[dict[str, dict[str, object]]], object]) -> None:
    path = artifact.path.with_suffix(".json")
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("reference", ["not a number", "9" * 5000, "", "1e3", "0x1"])
def test_a_seed_that_is_none_is_corrupt(reference: str, tmp_path: Path) -> None:
    artifact = make(tmp_path)
    changed(artifact, lambda document: document["model"]["weights"].update(reference=reference))  # type: ignore[attr-defined]
    with pytest.raises(CorruptArtifactError, match=r"model\.weights: reference is no seed"):
        open_artifact(artifact.path)


def test_a_batch_that_no_machine_holds_is_corrupt(tmp_path: Path) -> None:
    """verify drew two thousand million images for it."""
    artifact = make(tmp_path)
    changed(artifact, lambda document: document["request"].update(batch=[1 << 31] * 3))
    with pytest.raises(CorruptArtifactError, match=r"request\.batch\[0\]: Expected int <= 65536"):
        open_artifact(artifact.path)


@pytest.mark.parametrize("words", [["verify", "records"], ["verify", "records", "--json"]])
def test_what_a_manifest_says_forges_no_line_and_steers_no_terminal(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make(tmp_path / "export")
    forged = "MIT\nok     everything is well \x9b31m \u202e \x1b[2J"
    changed(artifact, lambda document: document["model"]["weights"].update(licence=forged))  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(words)
    shown = capsys.readouterr().out
    assert "everything is well" in shown
    assert [line for line in shown.splitlines() if line.startswith("ok     everything")] == []
    assert [character for character in shown if not character.isprintable() and character != "\n"] == []
    if "--json" in words:
        assert json.loads(shown)["findings"][-1]["text"].endswith(forged)


@pytest.mark.parametrize(
    "name", ["small.onnx", ".", "..", "../export/other.onnx", "a\0b.onnx", "", "a" * 300 + ".onnx"]
)
def test_an_engine_that_names_a_source_of_another_kind_or_place_is_verified_without_it(
    name: str, tmp_path: Path
) -> None:
    """Of a name of nothing, and of one that is recorded and no ONNX file, a traceback came."""
    make(tmp_path / "export", kind="engine")
    make(tmp_path / "export", "other")
    make(tmp_path / "engines", "e", kind="engine", source_name=name)
    (tmp_path / "export" / "other.onnx").unlink()
    folders = {"export_dir": tmp_path / "export", "engines_dir": tmp_path / "engines"}
    (engine,) = find_artifacts(tmp_path / "engines")
    assert _outdated(engine, folders["export_dir"]) is None
    texts = [each.text for each in check_provenance((), **folders).findings if each.artifact == "e.engine"]
    assert any("is not recorded here" in text for text in texts)


def test_a_reference_that_is_too_long_for_a_path_is_a_file_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make(tmp_path / "export", content=foreign_classifier().SerializeToString())
    lie = {"origin": "checkpoint", "reference": "a" * 300 + ".safetensors"}
    changed(artifact, lambda document: document["model"]["weights"].update(lie))  # type: ignore[attr-defined]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["verify", "records"])
    assert (stop.value.code, "is not here" in capsys.readouterr().out) == (0, True)
