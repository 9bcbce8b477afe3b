"""Hostile folders and files: nothing of them is run, nothing outside is touched, nothing waits for ever.

Each test is an attack that worked once. What a stranger can put beside an artifact: links, pipes and devices in place
of files, half commits, manifests that lie.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cnx_deploy.api import _outdated
from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import find_artifacts, open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.model.weight_files import read_weight_file
from cnx_deploy.verification.provenance import check_custody
from tests.core.test_artifacts import REQUEST, make, rewritten, visible
from tests.support.hostile_onnx import foreign_classifier

# --- commits that somebody else prepared ------------------------------------------------------------------------------


def test_a_commit_that_is_a_link_moves_nothing_from_where_it_leads(tmp_path: Path) -> None:
    theirs = make(tmp_path / "theirs", "other")
    ours = make(tmp_path / "ours")
    before = visible(tmp_path / "theirs")
    (tmp_path / "ours" / ".other.commit").symlink_to(tmp_path / "theirs")
    with pytest.raises(RefusedArtifactError, match=r"\.other\.commit is a symbolic link, .* Remove it"):
        open_artifact(ours.path)
    assert visible(tmp_path / "theirs") == before
    assert open_artifact(theirs.path) == theirs
    (tmp_path / "ours" / ".other.commit").unlink()
    assert open_artifact(ours.path) == ours


@pytest.mark.parametrize(
    "put",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: path.mkdir(),
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 40),
    ],
    ids=["pipe", "device", "folder", "terabyte"],
)
@pytest.mark.timeout(20)
def test_a_commit_whose_manifest_is_no_file_ends_at_once(put: Callable[[Path], None], tmp_path: Path) -> None:
    ours = make(tmp_path)
    (tmp_path / ".small.commit").mkdir()
    put(tmp_path / ".small.commit" / "small.json")
    with pytest.raises(CorruptArtifactError, match=r"small\.json was to be put into place and is no manifest"):
        open_artifact(ours.path)


def test_a_commit_replaces_no_artifact_but_its_own(tmp_path: Path) -> None:
    ours = make(tmp_path)
    make(tmp_path / "evil", content=b"evil")
    (tmp_path / "evil").rename(tmp_path / ".other.commit")
    with pytest.raises(CorruptArtifactError, match=r"small\.json was to be put into place .* of another artifact"):
        open_artifact(ours.path)
    assert ours.path.read_bytes() == b"weights"


def test_files_that_a_manifest_lists_and_are_not_its_own_survive_its_replacement(tmp_path: Path) -> None:
    """A manifest that came with a download lists a file of the user's; making the artifact again removed it."""
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    old = make(tmp_path)
    listed = [{"name": "thesis.tex", "size_bytes": 4, "sha256": "0" * 64}]
    document = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    rewritten(old, files=[*document["files"], *listed])
    make(tmp_path, content=b"new")
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


@pytest.mark.timeout(20)
def test_a_manifest_in_place_that_is_a_pipe_is_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "small.json")
    assert open_artifact(make(tmp_path).path).path.read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["small.onnx", "small.json"])
def test_a_folder_where_a_file_goes_is_told_before_anything_is_moved(name: str, tmp_path: Path) -> None:
    """It left a commit that could never be finished: every later read of the folder failed."""
    (tmp_path / name / "deeper").mkdir(parents=True)
    make(tmp_path, "other")
    with pytest.raises(InputError, match=rf"{name} is a folder, where a file was expected"):
        make(tmp_path)
    assert [path.name for path in tmp_path.glob(".*") if path.suffix != ".lock"] == []
    (tmp_path / name / "deeper").rmdir()
    (tmp_path / name).rmdir()
    assert len(find_artifacts(tmp_path)) == 1


def test_an_abandoned_folder_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / ".a.csv.tmp-1").symlink_to(theirs)
    write_text(tmp_path / "a.csv", "ours")
    assert list(theirs.iterdir()) == []
    assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "ours"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_lock_that_is_no_file_is_told_or_serves(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / ".small.lock")
    try:
        made = make(tmp_path)
    except InputError as error:
        assert "Cannot write in" in str(error)  # noqa: PT017 - a pipe serves as a lock, other kinds do not
    else:
        assert open_artifact(made.path) == made


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
    with pytest.raises(CorruptArtifactError, match=r"model\.weights\.reference is no seed"):
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
    make(tmp_path / "export", suffix=".safetensors", kind="checkpoint")
    make(tmp_path / "export", "other")
    request = {**REQUEST, "runtime": "tensorrt-rtx", "target": "sm89", "batches": [[1, 1, 1]], "allow_tf32": False}
    words = {"kind": "engine", "suffix": ".engine", "request": request, "facts": {"runtime_version": "1"}}
    make(tmp_path / "engines", "e", source_name=name, **words)  # type: ignore[arg-type]
    (tmp_path / "export" / "other.onnx").unlink()
    folders = {"export_dir": tmp_path / "export", "engines_dir": tmp_path / "engines"}
    (engine,) = find_artifacts(tmp_path / "engines")
    assert _outdated(engine, folders["export_dir"]) is None
    texts = [each.text for each in check_custody((), **folders).findings if each.artifact == "e.engine"]
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
