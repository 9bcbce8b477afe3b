"""Nothing is lost while files are written.

Real faults: processes killed and terminated, file-size limits, folders without rights, several processes at once.
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact, stage_artifact
from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, InputError
from cnx_deploy.core.files import require_room, write_text
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.training.run_folder import keep_state
from tests.core.test_artifacts import make, visible
from tests.support.kill_sweep import lines

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
TINY = [
    "export",
    "--variant",
    "atto",
    "--image-size",
    "32",
    "--num-classes",
    "2",
    "--precision",
    "fp32",
    "--batch",
    "1",
]

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def cnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in a folder of its own -> exit code, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        return int(stop.value.code or 0), capsys.readouterr().err

    return run


def command(*words: str, cwd: Path) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cnx_deploy", *words], cwd=cwd, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


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


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(".*") if path.suffix != ".lock")


# --- killed -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "least"),
    [
        ("file", 8),
        ("artifact", 16),
        pytest.param("export", 20, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param("build", 20, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param("train", 20, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def test_build_atomic_a_killed_process_leaves_the_old_or_the_new_and_the_next_run_cleans_up(
    kind: str, least: int, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "tests.support.kill_sweep", kind, str(tmp_path / "sweep")]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    points = list(lines(done.stdout))
    killed = [point for point in points if point["killed"]]
    assert len(killed) >= least
    assert {point["state"] for point in killed} == {"old", "new"} or kind not in ("file", "artifact")
    assert all(point["state"] in ("old", "new") for point in points)
    assert all(name.endswith(".commit") or ".tmp-" in name for point in killed for name in point["left"])
    assert all(point["after"] == {"state": "new", "left": []} for point in points)


def test_build_atomic_files_replaced_one_by_one_are_caught_by_the_sweeps_own_check(tmp_path: Path) -> None:
    """The negative control: what an artifact looks like between two renames."""
    old = make(tmp_path)
    old.path.write_bytes(b"newer")
    with pytest.raises(CorruptArtifactError, match="has 5 bytes, its manifest says 7"):
        open_artifact(old.path)


def test_build_atomic_a_commit_that_is_no_manifest_is_named(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / ".small.commit").mkdir()
    (tmp_path / ".small.commit" / "small.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match=r"was to be put into place and is no manifest .* Remove"):
        open_artifact(tmp_path / "small.onnx")


# --- interrupted and terminated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["sigint", "sigterm"]
)
def test_build_sigint_sigterm_ends_with_130_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    process = command(*TINY, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("export/.*.tmp-*")) and time.monotonic() < deadline:  # it has begun to write
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "Interrupted.")
    assert visible(tmp_path / "export") == leftovers(tmp_path) == []
    with stage_artifact(tmp_path / "export", "atto-32-fp32"):  # the lock is free
        pass


# --- the disk is full -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_build_disk_full_export_keeps_the_old_artifact_and_says_what_is_free(cnx: Command, tmp_path: Path) -> None:
    old = make(tmp_path / "export", "atto-32-fp32")
    with files_of_at_most(1_000_000):
        code, err = cnx(*TINY, "--force", "--no-verify")
    assert code == 1
    assert "No room to write export/atto-32-fp32 (File too large)" in err
    assert " are free in export: what was there before is kept." in err
    assert open_artifact(old.path) == old
    assert leftovers(tmp_path) == []


def test_build_disk_full_build_keeps_the_old_artifact(cnx: Command, tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    stem = f"{tiny_onnx_fp16.manifest.stem}-rtx-sm89"
    old = make(tmp_path / "engines", stem, suffix=".safetensors", kind="checkpoint")
    with files_of_at_most(20_000):
        code, err = cnx("build-trt", str(tiny_onnx_fp16.path), "--target", "sm89", "--force")
    assert (code, f"No room to write engines/{stem} (File too large)" in err) == (1, True)
    assert open_artifact(old.path) == old
    assert leftovers(tmp_path) == []


def test_build_disk_full_checkpoint_keeps_the_old_file(tiny_model: ConvNeXtV2, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")
    with files_of_at_most(100_000), pytest.raises(DiskFullError, match="room"):
        save_checkpoint(path, tiny_model)
    assert (path.read_bytes(), leftovers(tmp_path)) == (b"old", [])


def test_build_disk_full_state_of_a_run_keeps_the_old_one_and_leaves_no_half(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    keep_state(tmp_path, lambda path: write_text(path, "old"))
    with pytest.raises(DiskFullError, match=r"last\.ckpt"):
        keep_state(tmp_path, half)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"last.ckpt": b"old"}


def test_build_disk_full_is_found_before_the_work_where_the_size_is_known(tmp_path: Path) -> None:
    with pytest.raises(DiskFullError, match=r"huge takes .* MB, and .* free in"):
        require_room(tmp_path, 1 << 62, "huge")
    begun = False
    with pytest.raises(DiskFullError), stage_artifact(tmp_path, "huge", needed_bytes=1 << 62):
        begun = True
    assert not begun
    with stage_artifact(tmp_path, "small", needed_bytes=1000):
        begun = True
    assert begun


# --- a folder that cannot be written ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [TINY, ["train", "data", "--variant", "atto"]], ids=["export", "train"])
def test_build_path_is_dir_a_file_in_the_way_is_told_before_the_work(
    words: list[str], cnx: Command, tmp_path: Path
) -> None:
    from tests.support.training_data import write_colours

    write_colours(tmp_path / "data", 2, 1)
    (tmp_path / "out").write_bytes(b"somebody's")
    start = time.monotonic()
    code, err = cnx(*words, "--output-dir", "out/deeper")
    assert (code, time.monotonic() - start < 20) == (2, True)
    assert "Cannot write in out/deeper" in err
    assert (tmp_path / "out").read_bytes() == b"somebody's"


def test_build_readonly_dir_is_told_before_the_work(tmp_path: Path) -> None:
    """As another user where this is root, who may write everywhere."""
    (tmp_path / "out").mkdir(mode=0o555)
    code = f"""
import os
from pathlib import Path
from cnx_deploy.core.artifacts import stage_artifact
from cnx_deploy.core.errors import InputError
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
try:
    with stage_artifact(Path({str(tmp_path / "out")!r}), "small"):
        print("begun")
except InputError as error:
    print(error)
"""
    above = Path(tempfile.gettempdir()).resolve()
    for folder in (tmp_path, *(each for each in tmp_path.parents if above in each.parents)):
        folder.chmod(folder.stat().st_mode | 0o011)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "Cannot write in" in done.stdout, done.stderr
    assert "Permission denied. Choose another" in done.stdout


def test_build_path_is_dir_where_a_file_should_go(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(InputError, match=r"a\.svg is a folder, where a file was expected"):
        write_text(tmp_path / "a.svg", "text")


# --- commands side by side and one after the other --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_build_concurrent_different_targets_of_one_folder_do_not_meet(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    targets = ("sm86", "sm89")
    processes = [command("build-trt", str(tiny_onnx_fp16.path), "--target", each, cwd=tmp_path) for each in targets]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    for target in targets:
        engine = open_artifact(tmp_path / "engines" / f"{tiny_onnx_fp16.manifest.stem}-rtx-{target}.engine")
        assert engine.manifest.request.target == target


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_reproducible_export_in_two_processes_is_the_same_bytes_and_the_same_manifest_but_for_the_time(
    tmp_path: Path,
) -> None:
    found = []
    for name in "ab":
        process = command(*TINY, "--output-dir", name, cwd=tmp_path)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 0, said
        manifest = json.loads((tmp_path / name / "atto-32-fp32.json").read_text(encoding="utf-8"))
        found.append({key: value for key, value in manifest.items() if key != "created"})
    assert (tmp_path / "a/atto-32-fp32.onnx").read_bytes() == (tmp_path / "b/atto-32-fp32.onnx").read_bytes()
    assert found[0] == found[1]
