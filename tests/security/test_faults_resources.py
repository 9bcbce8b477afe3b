"""Resources that run out (disk, memory), signals, damaged caches, and clocks that are wrong.

The disk is a small file system of its own, and memory is limited by the system; each command meets the real error.
"""

import datetime
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact, stage_artifact
from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.out_of_memory import out_of_memory_error
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.pretrained import fetch_pretrained
from cnx_deploy.model.weight_files import claims_too_much
from tests.core.test_artifacts import make, names_in
from tests.core.test_files import ENVIRONMENT
from tests.support.memory_sweep import ended
from tests.support.small_disk import SmallDisk, small_disk
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
    before = disk.contents()
    disk.fill(leave=100_000)
    with pytest.raises(DiskFullError, match=rf"takes {FREE}, and {FREE} are free in"):
        save_checkpoint(path, random_model(tiny_model.variant, 10, seed=1))
    assert disk.contents() == before
    disk.empty()
    save_checkpoint(path, random_model(tiny_model.variant, 10, seed=1))
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


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=["sigint", "sigterm"]
)
def test_a_command_that_is_interrupted_ends_with_130_and_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "cnx_deploy", *TINY]
    process = subprocess.Popen(words, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("export/.*.tmp")) and time.monotonic() < deadline:  # it has begun to write
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (130, "Interrupted.")
    assert names_in(tmp_path / "export") == []
    with stage_artifact(tmp_path / "export", "atto-32-fp32"):  # the lock is free
        pass


@pytest.mark.parametrize("words", [TINY, ["train", "data", "--variant", "atto"]], ids=["export", "train"])
def test_a_file_in_the_way_of_the_output_is_told_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_colours(tmp_path / "data", 2, 1)
    (tmp_path / "out").write_bytes(b"somebody's")
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    with pytest.raises(SystemExit) as stop:
        main([*words, "--output-dir", "out/deeper"])
    assert (stop.value.code, time.process_time() - start < 20) == (2, True)
    assert "Cannot write in out/deeper" in capsys.readouterr().err
    assert (tmp_path / "out").read_bytes() == b"somebody's"


# --- memory is short --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest checkpoint of 14 MB and an image beside it."""
    folder = tmp_path_factory.mktemp("memory")
    torch.save(random_model("atto", 2, seed=0).state_dict(), folder / "atto.pt")
    Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "a.png")
    return folder / "atto.pt"


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
@pytest.mark.parametrize("name", ["predict-pt", "export", "build-trt"])
def test_memory_that_is_short_at_any_limit_is_one_message_and_keeps_the_old_artifact(
    name: str, weights: Path, tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    """A native library may end the process itself (SIGABRT, the loader's 127): nothing is half written then either."""
    image, stem = str(weights.parent / "a.png"), f"{tiny_onnx_fp16.manifest.stem}-rtx-sm89"
    words = {
        "predict-pt": ["predict", str(weights), image],
        "export": TINY,
        "build-trt": ["build-trt", str(tiny_onnx_fp16.path), "--target", "sm89", "--force"],
    }[name]
    old = {
        "export": make(tmp_path / "export", "atto-32-fp32"),
        "build-trt": make(tmp_path / "engines", stem, kind="engine"),
    }.get(name)
    codes = []
    for megabytes in (1, 8, 24, 48, 96, 192):
        code, lines = ended(megabytes, words, tmp_path)
        codes.append(code)
        if code == 0:
            break
        assert code in (1, -6, 127) or (code, name) == (5, "build-trt"), (megabytes, lines)
        if code == 1:
            told = len(lines) == 1 and lines[0].startswith("Error: There is not enough memory")
            # Where the exporter swallows what it met, its own words are all there is.
            assert told or (name == "export" and "cannot export the model" in lines[0]), (megabytes, lines)
        assert code != 5 or "It is there; free memory" in lines[0]
        assert old is None or open_artifact(old.path) == old
        assert code in (-6, 127) or list(tmp_path.rglob(".*")) == []
    assert codes.count(1) >= 1 or name == "build-trt"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_that_is_short_is_told_from_what_python_the_loader_and_libraries_say(error: Exception) -> None:
    told = out_of_memory_error(error)
    assert told is not None
    assert (told.exit_code, type(error).__name__ in str(told)) == (1, True)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no memory of this"),
        OSError(28, "No space left on device"),
        ImportError("No module named a"),
        CorruptArtifactError("a.pt was refused: out of memory"),
    ],
)
def test_other_errors_are_not_told_as_short_memory(error: Exception) -> None:
    assert out_of_memory_error(error) is None


def test_a_file_that_claims_more_than_it_has_is_corrupt_and_not_short_of_memory(tmp_path: Path) -> None:
    """The allocator's words for it are the same."""
    path = tmp_path / "lies.pt"
    torch.save({"a": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes().replace(b"K\x08t", b"\x8a\x08" + (1 << 50).to_bytes(8, "little") + b"t"))
    with pytest.raises(CorruptArtifactError, match="cannot be read as a PyTorch checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(("asked", "lies"), [(14_000, False), (1 << 50, True)])
def test_a_pickle_lies_where_it_asks_for_more_than_the_file_has(asked: int, lies: bool, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(bytes(20_000))
    error = RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {asked} bytes.")
    assert claims_too_much(error, tmp_path / "a.pt") is lies
    assert claims_too_much(MemoryError(), tmp_path / "a.pt")  # there is room for twice the file


# --- caches -----------------------------------------------------------------------------------------------------------

TAG = "convnextv2_atto.fcmae"


def cached(folder: Path, weights: bytes, config: str) -> Path:
    """An entry of the model hub's cache, whose name of the weights is that of other bytes; their path."""
    repository = folder / f"models--timm--{TAG}"
    snapshot, blob = (
        repository / "snapshots" / ("0" * 40),
        repository / "blobs" / hashlib.sha256(b"weights").hexdigest(),
    )
    for each in (snapshot, blob.parent, repository / "refs"):
        each.mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name, encoding="ascii")
    (snapshot / "config.json").write_text(config, encoding="utf-8")
    blob.write_bytes(weights)
    (snapshot / "model.safetensors").symlink_to(blob)
    return blob


@pytest.mark.parametrize("content", [b"", b"weight", b"\0" * 7, b"weights of another release"])
def test_cache_corrupt_weights_are_refused_by_hash_and_fetched_once_they_are_gone(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    blob = cached(tmp_path, content, "{}")
    with pytest.raises(CorruptArtifactError, match=r"was altered: SHA-256 .* Delete it and fetch it again"):
        fetch_pretrained(TAG, tmp_path)
    blob.unlink()
    with pytest.raises(MissingRequirementError, match=rf"model\.safetensors .* run `hf download timm/{TAG}"):
        fetch_pretrained(TAG, tmp_path)
    blob.write_bytes(b"weights")
    with pytest.raises(CorruptArtifactError, match=r"config\.json is not a timm model's config .* fetch again"):
        fetch_pretrained(TAG, tmp_path)  # it has the right hash now, so its config is read


@pytest.mark.parametrize(
    "config", ["", '{"num_classes": 1e999}', "[]", "[" * 100_000, '{"num_classes": 1}', "\ufeff{}"]
)
def test_cache_corrupt_config_is_refused_by_name(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached(tmp_path, b"weights", config)
    with pytest.raises(CorruptArtifactError, match=r"config\.json is not a timm model's config .* Delete it"):
        fetch_pretrained(TAG, tmp_path)


# --- clocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", [1970, 2120])
def test_a_wrong_clock_changes_nothing_but_the_date(year: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks, temporary folders and manifests of another century are as good or as stale as any."""
    wrong = datetime.datetime(year, 1, 2, tzinfo=datetime.UTC)
    old = make(tmp_path, created=wrong.isoformat())
    (tmp_path / ".small.tmp").mkdir()
    for path in (*tmp_path.iterdir(), tmp_path):
        os.utime(path, (wrong.timestamp(), wrong.timestamp()))
    assert open_artifact(old.path).manifest.created.startswith(str(year))
    new = make(tmp_path, content=b"made at another time")
    assert (open_artifact(new.path), new.path.read_bytes()) == (new, b"made at another time")
    assert names_in(tmp_path) == ["small.json", "small.onnx"]
