"""Resources that run out (disk, memory), damaged caches, and clocks that are wrong.

The disk is a small file system of its own, and memory is limited by the system; each command meets the real error.
"""

import datetime
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.errors import CorruptArtifactError, DiskFullError, MissingRequirementError, OutOfMemoryError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.out_of_memory import memory_shortage
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.pretrained import fetch_pretrained
from cnx_deploy.model.weight_files import claims_too_much
from tests.core.test_artifacts import make
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


def test_build_disk_full_of_a_real_disk_an_engine_is_old_or_new(disk: SmallDisk, tiny_onnx_fp16: Artifact) -> None:
    old = make(disk.seen, f"{tiny_onnx_fp16.manifest.stem}-rtx-sm89", suffix=".safetensors", kind="checkpoint")
    before = disk.contents()
    disk.fill(leave=300_000)  # the weights would fit, the plan does not
    with pytest.raises(DiskFullError, match=rf"No room to write .* \(No space left on device\), {FREE} are free in"):
        build_engine(tiny_onnx_fp16, SPEC, disk.seen, force=True)
    assert disk.contents() == before
    assert open_artifact(old.path) == old
    disk.fill(leave=100_000)
    with pytest.raises(DiskFullError, match=rf"takes {FREE}, and {FREE} are free in"):
        build_engine(tiny_onnx_fp16, SPEC, disk.seen, force=True)
    assert disk.contents() == before
    disk.empty()
    assert open_artifact(build_engine(tiny_onnx_fp16, SPEC, disk.seen, force=True).path).manifest.kind == "engine"


def test_build_disk_full_of_a_real_disk_a_checkpoint_is_old_or_new(disk: SmallDisk, tiny_model: ConvNeXtV2) -> None:
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
    [
        ("export", 8_000_000, ["export/atto-32-fp32.json", "export/atto-32-fp32.onnx"]),
        ("build-trt", 4_000_000, ["engines/atto-32-fp16-rtx-sm89.engine", "engines/atto-32-fp16-rtx-sm89.json"]),
        ("build-trt", 9_000_000, ["engines/atto-32-fp16-rtx-sm89.engine", "engines/atto-32-fp16-rtx-sm89.json"]),
        ("verify", 40_000, []),
        ("train", 20_000_000, []),
    ],
)
def test_build_disk_full_of_a_real_disk_ends_the_command_with_1_and_the_next_one_works(
    name: str, leave: int, old: list[str], tmp_path: Path
) -> None:
    """`leave` is too little at once, or in the midst of the work."""
    with small_disk(tmp_path / "disk", 160) as disk:
        words = prepared(name, disk)
        before = disk.contents()
        assert sorted(before) == old
        disk.fill(leave=leave)
        code, err = disk.run(*words)
        assert code == 1, err
        assert re.search(TOLD, err, re.MULTILINE), err
        assert "Traceback" not in err
        after = disk.contents()
        assert {path: after[path] for path in before} == before
        assert [path for path in after if "/." in path or path.startswith(".")] == []
        disk.empty()
        code, err = disk.run(*(f"{word}-again" if word == "saved" else word for word in words))
        assert code == 0, err
        assert len(disk.contents()) >= len(before)


def prepared(name: str, disk: SmallDisk) -> list[str]:
    """The command's words, with what it starts from beside the disk and, where it makes an artifact, an older one."""
    aside = disk.place.parent
    if name == "train":
        write_colours(aside / "data", 4, 1)
        return ["train", str(aside / "data"), "--variant", "atto", "--image-size", "32", "--epochs", "1"]
    precision = {"verify": "fp32", "build-trt": "fp16"}.get(name)
    if precision is not None:
        words = [*TINY[:5], "--precision", precision, "--batch", "1:1:2", "--num-classes", "1000"]
        code, err = disk.run(*words, "--output-dir", str(aside / "made"))
        assert code == 0, err
    onnx = aside / "made" / f"atto-32-{precision}.onnx"
    words = {
        "export": TINY,
        "build-trt": ["build-trt", str(onnx), "--target", "sm89", "--force"],
        "verify": ["verify", str(onnx), "--save-outputs", "saved"],
    }[name]
    if name != "verify":
        code, err = disk.run(*words)
        assert code == 0, err
    return words


# --- memory is short --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An honest checkpoint of 14 MB and an image beside it."""
    folder = tmp_path_factory.mktemp("memory")
    torch.save(random_model("atto", 2, seed=0).state_dict(), folder / "atto.pt")
    Image.new("RGB", (40, 40), (200, 30, 30)).save(folder / "a.png")
    return folder / "atto.pt"


@pytest.mark.slow
def test_build_oom_is_not_blamed_on_an_honest_checkpoint(weights: Path) -> None:
    code, lines = ended(1, ["predict", str(weights), str(weights.parent / "a.png")], weights.parent)
    assert (code, len(lines)) == (1, 1), lines
    assert re.match(r"Error: There is not enough memory \(.*this process may have [\d,]+ MB \(ulimit -v\)", lines[0])


def test_build_oom_while_libraries_are_loaded_is_one_message(tmp_path: Path) -> None:
    """The whole process is limited, as `ulimit -v` does."""
    words = 'ulimit -v 400000; exec "$0" -m cnx_deploy export --variant atto'
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = ["sh", "-c", words, sys.executable]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert re.match(r"Error: There is not enough memory \(\w+Error: .*failed to map segment", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["predict-pt", "export", "build-trt"])
def test_build_oom_at_any_limit_is_one_message_and_keeps_the_old_artifact(
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
        "build-trt": make(tmp_path / "engines", stem, suffix=".safetensors", kind="checkpoint"),
    }.get(name)
    limits = (1, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
    found = {}
    for megabytes in limits:
        code, lines = found[megabytes] = ended(megabytes, words, tmp_path)
        if code == 0:
            break
        assert code in (1, -6, 127) or (code, name) == (5, "build-trt"), (megabytes, lines)
        if code == 1:
            assert "Traceback" not in "\n".join(lines)
            told = len(lines) == 1 and lines[0].startswith("Error: There is not enough memory")
            # Where the exporter swallows what it met, its own words are all there is.
            assert told or (name == "export" and "cannot export the model" in lines[0]), (megabytes, lines)
        assert code != 5 or "It is there; free memory" in lines[0]
        assert old is None or open_artifact(old.path) == old
        assert [path.name for path in tmp_path.rglob(".*") if path.suffix != ".lock"] == []
    assert [code for code, _ in found.values()].count(1) >= 1 or name == "build-trt"


def test_build_oom_a_file_that_claims_more_than_it_has_is_still_corrupt(tmp_path: Path) -> None:
    """The negative control: the allocator's words for it are the same."""
    path = tmp_path / "lies.pt"
    torch.save({"a": torch.zeros(8)}, path)
    path.write_bytes(path.read_bytes().replace(b"K\x08t", b"\x8a\x08" + (1 << 50).to_bytes(8, "little") + b"t"))
    with pytest.raises(CorruptArtifactError, match="cannot be read as a PyTorch checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("can't start new thread"),
    ],
)
def test_build_oom_is_told_by_what_python_the_loader_and_libraries_say(error: BaseException) -> None:
    found = memory_shortage(error)
    assert isinstance(found, OutOfMemoryError)
    assert (found.exit_code, type(error).__name__ in str(found)) == (1, True)
    outer = RuntimeError("step 2/3 failed")
    outer.__cause__ = error
    assert isinstance(memory_shortage(outer), OutOfMemoryError)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no memory of this"), OSError(28, "No space left on device"), ImportError("No module named a")],
)
def test_build_oom_is_not_told_of_other_errors(error: BaseException) -> None:
    assert memory_shortage(error) is None


@pytest.mark.parametrize(("asked", "lies"), [(14_000, False), (1 << 50, True)])
def test_build_oom_of_a_pickle_is_told_by_what_was_asked_for(asked: int, lies: bool, tmp_path: Path) -> None:
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


def test_a_clock_that_was_in_the_future_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks, temporary folders and manifests of next century are as good or as stale as any."""
    later = datetime.datetime(2120, 1, 1, tzinfo=datetime.UTC)
    with monkeypatch.context() as patched:
        patched.setattr("cnx_deploy.core.manifest._now", lambda: later.isoformat())
        old = make(tmp_path)
    (tmp_path / ".small.tmp-4194305").mkdir()
    for path in (*tmp_path.iterdir(), tmp_path):
        os.utime(path, (later.timestamp(), later.timestamp()))
    assert open_artifact(old.path).manifest.created.startswith("2120")
    new = make(tmp_path, content=b"made before the old one")
    assert open_artifact(new.path).manifest.created < old.manifest.created
    assert (new.path.read_bytes(), (tmp_path / ".small.tmp-4194305").exists()) == (b"made before the old one", False)
