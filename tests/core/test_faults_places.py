"""Several processes, odd names, links and readers."""

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cnx_deploy.core import artifacts
from cnx_deploy.core.artifacts import check_file, open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.files import whole_file, write_text
from cnx_deploy.core.manifest import FileRecord
from tests.core.test_artifacts import make, visible
from tests.core.test_faults_writing import ENVIRONMENT, ROOT, leftovers

# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 8])
def test_build_concurrent_same_target_one_makes_it_and_the_others_reuse_it(count: int, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from tests.core.test_artifacts import FACTS, SOURCE, MODEL, REQUEST, OnnxManifest, reusable, stage_artifact
print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[1])
with stage_artifact(folder, "small") as staging:
    if reusable(folder) is not None:
        print("reused")
    else:
        time.sleep(0.3)
        (staging.folder / "small.onnx").write_bytes(b"weights")
        files = staging.record("small.onnx")
        values = {"model": MODEL, "request": REQUEST, "facts": FACTS, "source_sha256": SOURCE}
        staging.commit(OnnxManifest(stem="small", files=files, source_name="random:0", **values))
        print("made")
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=ENVIRONMENT, text=True,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(count)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all before the first is waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["made\n", *["reused\n"] * (count - 1)]
    assert open_artifact(tmp_path / "small.onnx").path.read_bytes() == b"weights"
    assert (visible(tmp_path), leftovers(tmp_path)) == (["small.json", "small.onnx"], [])


def test_build_concurrent_same_target_a_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from cnx_deploy.core.artifacts import stage_artifact
with stage_artifact(Path(sys.argv[1]), "small"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60).returncode == -9
    assert leftovers(tmp_path)
    start = time.monotonic()
    make(tmp_path)
    assert (time.monotonic() - start < 5, leftovers(tmp_path)) == (True, [])


def test_build_concurrent_same_target_a_reader_between_two_versions_gets_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest is read, then both files are replaced, then the hash is taken."""
    make(tmp_path, content=b"old")
    replaced = False

    def replacing(path: Path, record: FileRecord) -> None:
        nonlocal replaced
        if not replaced:
            replaced = True
            make(tmp_path, content=b"newer")
        check_file(path, record)

    monkeypatch.setattr(artifacts, "check_file", replacing)
    assert open_artifact(tmp_path / "small.onnx").manifest.files[0].size_bytes == 5
    (tmp_path / "small.onnx").write_bytes(b"NEWER")
    with pytest.raises(CorruptArtifactError, match="was altered"):  # nobody replaced it: looked at once
        open_artifact(tmp_path / "small.onnx")


# --- names ------------------------------------------------------------------------------------------------------------


NAMES = ("Ärger mit Köpfen", "模型 🦆", "a" * 230, "ß" * 115, "-rf", "a'b\"c$(d)", "tab\there")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_build_unicode_space_long_path_works(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "Ordner mit Ünïcode" / ("d" * 200)
    made = make(folder, name) if "\t" not in name else None
    if made is None:
        with pytest.raises(InputError, match=r"cannot be recorded: files\[0\]\.name"):
            make(folder, name)
        assert visible(folder) == []
        return
    assert open_artifact(folder / f"{name}.onnx") == made
    assert make(folder, name, content=b"again").path.read_bytes() == b"again"
    assert leftovers(tmp_path) == []


def test_build_unicode_space_long_path_a_name_that_is_too_long_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a name of 310 bytes, where .* at most 255"):
        make(tmp_path, "a" * 300)


# --- readers and links ------------------------------------------------------------------------------------------------


def test_overwrite_mmapped_file_the_reader_keeps_the_old_bytes(tmp_path: Path) -> None:
    old = make(tmp_path, content=b"old" * 10_000)
    with old.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        make(tmp_path, content=b"n")
        assert mapped[:] == b"old" * 10_000
    assert open_artifact(old.path).path.read_bytes() == b"n"


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_overwrite_mmapped_file_or_a_link_to_one(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text("theirs", encoding="utf-8")
    link(tmp_path / "theirs.csv", tmp_path / "ours.csv")
    write_text(tmp_path / "ours.csv", "ours")
    assert (tmp_path / "theirs.csv").read_text(encoding="utf-8") == "theirs"
    assert (tmp_path / "ours.csv").read_text(encoding="utf-8") == "ours"
    assert not (tmp_path / "ours.csv").is_symlink()


def test_an_error_while_a_file_is_written_keeps_the_old_one(tmp_path: Path) -> None:
    write_text(tmp_path / "a.csv", "old")

    def interrupted() -> None:
        with whole_file(tmp_path / "a.csv") as path:
            path.write_text("half", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ((tmp_path / "a.csv").read_text(encoding="utf-8"), leftovers(tmp_path)) == ("old", [])


def test_a_clock_that_goes_backwards_changes_nothing_but_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path)
    monkeypatch.setattr("cnx_deploy.core.manifest._now", lambda: "1970-01-01T00:00:00+00:00")
    made = make(tmp_path, content=b"later")
    os.utime(made.path, (0, 0))
    assert open_artifact(made.path).manifest.created.startswith("1970")
