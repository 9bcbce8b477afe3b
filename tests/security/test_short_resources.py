"""Disk or memory that runs out, and commands that are told to end: one message, and what was there before stays.

The disk is a small file system of its own, and memory is limited by the system; each command meets the real error.
"""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cnx_deploy.core.artifacts import open_artifact, stage_artifact
from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.out_of_memory import out_of_memory_error
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from tests.core.test_artifacts import make, names_in
from tests.core.test_files import ENVIRONMENT
from tests.support.lies import run
from tests.support.small_resources import SmallDisk, ended, small_disk
from tests.support.training_data import write_colours

SPEC = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 2),), measure=False)
TINY = [
    *("export", "--variant", "atto", "--image-size", "32", "--num-classes", "2", "--precision", "fp32"),
    *("--batch", "1", "--no-verify", "--force"),
]
FREE = r"[\d.,]+ (?:bytes|MB)"
TOLD = rf"^Error: (?:.* takes {FREE}, and {FREE} are free in |No room to write .*, {FREE} are free in )"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 8) as mounted:
        yield mounted


# --- the disk is full -------------------------------------------------------------------------------------------------


def test_an_engine_is_old_or_new_on_a_disk_that_is_full(disk: SmallDisk, tiny_onnx_fp16: Artifact) -> None:
    old = make(disk.seen, f"{tiny_onnx_fp16.manifest.stem}-rtx-sm89", kind="engine")
    before = disk.contents()
    # The weights would fit into 300 kB, the plan does not; 100 kB are known to be too few before the work.
    for leave, reason in (
        (300_000, r"No room to write .* \(No space left on device\), "),
        (100_000, r"takes .*, and "),
    ):
        disk.fill(leave=leave)
        with pytest.raises(DiskFullError, match=f"{reason}{FREE} are free in"):
            build_engine(tiny_onnx_fp16, SPEC, disk.seen, force=True)
        assert disk.contents() == before
    assert open_artifact(old.path) == old
    disk.empty()
    made = build_engine(tiny_onnx_fp16, SPEC, disk.seen, force=True)
    assert open_artifact(made.path).manifest.kind == "engine"
    assert set(disk.contents()) == {made.path.name, f"{made.path.stem}.json"}


def test_a_checkpoint_is_old_or_new_on_a_disk_that_is_full(disk: SmallDisk, tiny_model: ConvNeXtV2) -> None:
    path = save_checkpoint(disk.seen / "weights.safetensors", tiny_model)
    before, other = disk.contents(), random_model(tiny_model.variant, 10, seed=1)
    disk.fill(leave=100_000)
    with pytest.raises(DiskFullError, match=rf"takes {FREE}, and {FREE} are free in"):
        save_checkpoint(path, other)
    assert disk.contents() == before
    disk.empty()
    save_checkpoint(path, other)
    assert disk.contents() != before


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "leave", "old"),
    [("export", 8_000_000, ["export/atto-32-fp32.json", "export/atto-32-fp32.onnx"]), ("train", 20_000_000, [])],
)
def test_a_command_that_finds_no_room_ends_with_1_and_the_next_one_works(
    name: str, leave: int, old: list[str], tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", 160) as disk:
        write_colours(tmp_path / "data", 4, 1)
        words = TINY
        if name == "train":
            words = ["train", str(tmp_path / "data"), "--variant", "atto", "--image-size", "32", "--epochs", "1"]
        else:
            assert disk.run(*words)[0] == 0
        before = disk.contents()
        assert sorted(before) == old
        disk.fill(leave=leave)
        code, err = disk.run(*words)
        assert (code, "Traceback" in err) == (1, False), err
        assert re.search(TOLD, err, re.MULTILINE), err
        after = disk.contents()
        assert {path: after[path] for path in before} == before
        assert [path for path in after if "/." in path or path.startswith(".")] == []
        disk.empty()
        code, err = disk.run(*words)
        assert code == 0, err


# --- a command is told to end, or a file is in its way ----------------------------------------------------------------

STAGING = """
import signal, time
from pathlib import Path
from cnx_deploy.cli import cli, main
from cnx_deploy.core.artifacts import stage_artifact
def stage():
    with stage_artifact(Path("export"), "atto-32-fp32") as staging:
        (staging.folder / "atto-32-fp32.onnx").write_bytes(b"half of it")
        time.sleep(60)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's job in the background ignores
cli.get_command(None, "doctor").callback = lambda **words: stage()
main(["doctor"])
"""


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (["-c", STAGING], signal.SIGINT),
        (["-c", STAGING], signal.SIGTERM),
        pytest.param(["-m", "cnx_deploy", *TINY], signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=["staging interrupted", "staging terminated", "export terminated"],
)
def test_a_command_that_is_told_to_end_ends_with_130_and_leaves_nothing(
    words: list[str], number: signal.Signals, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, *words], cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("export/.*.tmp")) and time.monotonic() < deadline:  # it has begun to write
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1:]) == (130, ["Interrupted."])
    assert names_in(tmp_path / "export") == []
    with stage_artifact(tmp_path / "export", "atto-32-fp32"):  # the lock is free
        pass


@pytest.mark.parametrize("words", [TINY, ["train", "data", "--variant", "atto"]], ids=["export", "train"])
def test_a_file_in_the_way_of_the_output_is_told_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_colours(tmp_path / "data", 2, 1)
    (tmp_path / "out").write_bytes(b"somebody's")
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    code, said = run(*words, "--output-dir", "out/deeper")
    assert (code, "Cannot write in out/deeper" in said, time.process_time() - start < 20) == (2, True, True)
    assert (tmp_path / "out").read_bytes() == b"somebody's"


# --- memory is short --------------------------------------------------------------------------------------------------


def test_memory_that_is_short_while_libraries_are_loaded_is_one_message(tmp_path: Path) -> None:
    """The whole process is limited, as `ulimit -v` does."""
    words = 'ulimit -v 400000; exec "$0" -m cnx_deploy export --variant atto'
    command = ["sh", "-c", words, sys.executable]
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert re.match(r"Error: There is not enough memory \(\w+Error: .*failed to map segment", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_that_is_short_at_any_limit_is_one_message_and_keeps_the_old_artifact(tmp_path: Path) -> None:
    """A native library may end the process itself (SIGABRT, the loader's 127): nothing is half written then either."""
    old, codes = make(tmp_path / "export", "atto-32-fp32"), []
    for megabytes in (1, 8, 24, 48, 96, 192):
        code, lines = ended(megabytes, TINY, tmp_path)
        codes.append(code)
        if code == 0:
            break
        assert code in (1, -signal.SIGABRT, 127), (megabytes, lines)
        assert open_artifact(old.path) == old
        if code == 1:
            told = len(lines) == 1 and lines[0].startswith("Error: There is not enough memory")
            # Where the exporter swallows what it met, its own words are all there is.
            assert told or "cannot export the model" in lines[0], (megabytes, lines)
            assert list(tmp_path.rglob(".*")) == []
    assert 1 in codes


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("no memory of this"), False),
        (OSError(28, "No space left on device"), False),
        (CorruptArtifactError("a.pt was refused: out of memory"), False),
    ],
)
def test_memory_that_is_short_is_told_from_what_python_the_loader_and_libraries_say(
    error: Exception, is_short: bool
) -> None:
    told = out_of_memory_error(error)
    assert (told is not None) is is_short
    assert told is None or (told.exit_code, type(error).__name__ in str(told)) == (1, True)
