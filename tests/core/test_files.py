"""Files are written whole or not at all, whatever is in their place, however many write them and whoever is killed.

The faults are real: processes that are killed, limits on a file's size, folders without rights, links and pipes.
"""

import contextlib
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnx_deploy.core.errors import DiskFullError, InputError, OutputExistsError
from cnx_deploy.core.files import check_file, make_folder, whole_file, whole_folder, write_text
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.run_folder import keep_state

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process grows beyond `size` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_while_a_file_is_written_keeps_the_old_one_and_leaves_nothing(
    error: type[BaseException], tmp_path: Path
) -> None:
    write_text(tmp_path / "deep" / "a.csv", "old \udcff\n")  # a file name that is no UTF-8 in the text

    def fail() -> None:
        with whole_file(tmp_path / "deep" / "a.csv") as path:
            path.write_text("half", encoding="utf-8")
            raise error

    with pytest.raises(error):
        fail()
    assert contents(tmp_path) == {"deep/a.csv": b"old \\udcff\n"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.csv"]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_link_is_replaced_and_what_it_leads_to_stays(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    (tmp_path / "theirs.csv").write_text("theirs", encoding="utf-8")
    link(tmp_path / "theirs.csv", tmp_path / "ours.csv")
    write_text(tmp_path / "ours.csv", "ours")
    assert contents(tmp_path) == {"theirs.csv": b"theirs", "ours.csv": b"ours"}
    assert not (tmp_path / "ours.csv").is_symlink()


@pytest.mark.parametrize(
    "states",
    [
        {"file": {"old", "new"}, "artifact": {"old", "refused", "new"}, "first": {"refused", "new"}},
        pytest.param({"train": {"old"}}, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids=["files", "train"],
)
def test_what_a_killed_process_leaves_is_old_new_or_refused_and_the_same_work_repairs_it(
    states: dict[str, set[str]], tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "tests.support.kill_sweep", str(tmp_path / "sweep"), *states]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    points = [json.loads(line) for line in done.stdout.splitlines()]
    assert all((point["after"], point["left"]) == ("new", []) for point in points)
    for kind, expected in states.items():
        assert sum(point["killed"] for point in points if point["kind"] == kind) >= 8
        assert expected <= {point["state"] for point in points if point["kind"] == kind} <= expected | {"new"}


# --- several processes ------------------------------------------------------------------------------------------------


def test_processes_that_write_one_file_take_turns_and_leave_no_lock(tmp_path: Path) -> None:
    """Each adds one to a number, ten times: two that held the lock at once would lose a count."""
    code = """
import sys
from pathlib import Path
from cnx_deploy.core.files import whole_file
path = Path(sys.argv[1])
for _ in range(10):
    with whole_file(path) as temporary:
        temporary.write_text(str(int(path.read_text()) + 1))
"""
    path = tmp_path / "number.txt"
    path.write_text("0", encoding="ascii")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)], env=ENVIRONMENT) for _ in range(4)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 4
    assert contents(tmp_path) == {"number.txt": b"40"}


# --- the disk is full -------------------------------------------------------------------------------------------------


def test_a_file_that_is_larger_than_the_room_is_refused_before_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"huge takes [\d,.]+ MB, and [\d,.]+ MB are free in"):
        whole_file(tmp_path / "huge", needed_bytes=1 << 62).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "write",
    [lambda path: path.write_bytes(bytes(200_000)), lambda path: np.zeros(200_000, np.uint8).tofile(path)],
    ids=["python", "numpy"],
)
def test_a_disk_that_becomes_full_keeps_the_old_file(write: Callable[[Path], object], tmp_path: Path) -> None:
    write_text(tmp_path / "a.bin", "old")

    def replace() -> None:
        with whole_file(tmp_path / "a.bin") as path:
            write(path)

    with files_of_at_most(100_000), pytest.raises(DiskFullError, match=r"No room to write .*a\.bin .* are free in"):
        replace()
    assert contents(tmp_path) == {"a.bin": b"old"}


def test_a_checkpoint_that_finds_no_room_keeps_the_old_one(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with files_of_at_most(100_000), pytest.raises(DiskFullError, match="room"):
        save_checkpoint(path, tiny_model)
    assert contents(tmp_path) == {"weights.safetensors": b"old"}


def test_a_state_of_a_run_that_finds_no_room_keeps_the_old_one(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    keep_state(tmp_path, lambda path: write_text(path, "old"))
    with pytest.raises(DiskFullError, match=r"last\.ckpt"):
        keep_state(tmp_path, half)
    assert contents(tmp_path) == {"last.ckpt": b"old"}


# --- places that cannot be written ------------------------------------------------------------------------------------


def test_what_is_in_the_way_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"somebody's")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    reasons = {
        "folder": "folder is a folder, where a file was expected",
        "file/a.svg": "Cannot write in .*file: Not a directory",
        "file/deeper/a.svg": "Cannot write in .*deeper",
        "link/a.svg": "link is a symbolic link to nothing",
        "a" * 300: "is a name of 300 bytes, where a name has at most 255",
        "new/" + "ß" * 150 + "/a.svg": "is a name of 300 bytes",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            check_file(tmp_path / name)
        with pytest.raises(InputError, match=reason):
            write_text(tmp_path / name, "text")
    with pytest.raises(InputError, match=r"Cannot write in .*file"):
        make_folder(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_a_folder_without_rights_is_told_before_the_work(tmp_path: Path) -> None:
    """As another user where this is root, who may write everywhere."""
    (tmp_path / "out").mkdir(mode=0o555)
    code = f"""
import os
from pathlib import Path
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import check_file, make_folder
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
for check in (lambda path: check_file(path / "a.svg"), make_folder):
    try:
        check(Path({str(tmp_path / "out")!r}))
    except InputError as error:
        print(error)
"""
    above = Path(tempfile.gettempdir()).resolve()
    for folder in (tmp_path, *(parent for parent in tmp_path.parents if above in parent.parents)):
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stdout.count("out: Permission denied. Choose another place.") == 2, done.stderr


# --- what a stranger put beside the file ------------------------------------------------------------------------------


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [".a.csv.tmp", ".a.csv.lock"])
@pytest.mark.parametrize(
    "put",
    [lambda path: path.symlink_to(path.parent / "theirs"), os.mkfifo, lambda path: (path / "deep").mkdir(parents=True)],
    ids=["link", "pipe", "folder"],
)
def test_a_link_pipe_or_folder_in_place_of_lock_or_temporary_folder_is_told_or_serves_and_is_not_entered(
    put: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("theirs", encoding="utf-8")
    put(tmp_path / name)
    try:
        write_text(tmp_path / "a.csv", "ours")
    except InputError as error:
        assert "Cannot write in" in str(error)  # noqa: PT017 - a pipe serves as a lock, other kinds do not
    else:
        assert (tmp_path / "a.csv").read_text(encoding="utf-8") == "ours"
    assert contents(tmp_path / "theirs") == {"thesis.tex": b"theirs"}


def test_a_folder_is_made_whole_replaced_whole_or_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("made")

    def write(text: str, *, fails: bool = False, **words: Any) -> None:
        with whole_folder(place, **words) as folder:
            (folder / "below").mkdir()
            (folder / "below" / text).write_text(text)
            if fails:
                raise ValueError("stopped")

    place.mkdir()  # an empty one is taken
    write("first")
    with pytest.raises(OutputExistsError, match="--force"):
        write("second")
    with pytest.raises(OutputExistsError, match="something else"):
        write("second", force=True)
    with pytest.raises(ValueError, match="stopped"):
        write("second", force=True, is_own=lambda path: True, fails=True)
    assert [path.name for path in (place / "below").iterdir()] == ["first"]
    write("second", force=True, is_own=lambda path: (path / "below").is_dir())
    assert [path.name for path in (place / "below").iterdir()] == ["second"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("what", ["file", "link"])
def test_a_file_or_link_in_the_place_of_a_folder_stays(what: str, tmp_path: Path) -> None:
    place = tmp_path / "made"
    if what == "file":
        place.write_text("mine")
    else:
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "mine").touch()
        place.symlink_to(tmp_path / "other")
    with (
        pytest.raises(OutputExistsError, match="something else"),
        whole_folder(place, force=True, is_own=lambda path: True),
    ):
        pass
    assert place.read_text() == "mine" if what == "file" else (tmp_path / "other" / "mine").exists()
