"""Artifacts reach the disk whole or not at all, and what was altered since is never used."""

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.core import artifacts
from cnx_deploy.core.artifacts import (
    artifact_stem,
    check_file,
    find_artifacts,
    open_artifact,
    reusable_artifact,
    sha256_of_file,
    stage_artifact,
)
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.manifest import (
    SUFFIXES,
    Artifact,
    ArtifactKind,
    EngineFacts,
    EngineManifest,
    EngineRequest,
    FileRecord,
    ModelRecord,
    OnnxFacts,
    OnnxManifest,
    OnnxRequest,
    TypeCensus,
    WeightsRecord,
    relative_reference,
)
from cnx_deploy.core.preprocessing import Preprocessing

SOURCE = "a" * 64
MODEL = ModelRecord("tiny-test", 2, 32, WeightsRecord("random", "0", SOURCE, "none"), Preprocessing(32), ("cat", "Bär"))
REQUEST = OnnxRequest(deploy=DeploySpec("fp32", 32), batch=(1, 4, 8), opset=20, form=1)
FACTS = OnnxFacts(operators={"Gelu": 5}, types={}, half_share=0.0, inputs={}, outputs={})
ENGINE_REQUEST = EngineRequest(
    onnx=REQUEST, runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1),), allow_tf32=False
)
ENGINE_FACTS = EngineFacts(
    runtime_version="1", build_seconds=1.0, half_share_of_products=0.0, census=TypeCensus({}, {}), gpu="sm89"
)


def manifest_of(
    stem: str, files: tuple[FileRecord, ...], *, kind: ArtifactKind = "onnx", **changes: Any
) -> OnnxManifest | EngineManifest:
    values = {
        "stem": stem,
        "files": files,
        "model": MODEL,
        "source_name": "random:0",
        "source_sha256": SOURCE,
        **changes,
    }
    if kind == "engine":
        return EngineManifest(**{"request": ENGINE_REQUEST, "facts": ENGINE_FACTS, **values})
    return OnnxManifest(**{"request": REQUEST, "facts": FACTS, **values})


def make(
    folder: Path,
    stem: str = "small",
    content: bytes = b"weights",
    *,
    kind: ArtifactKind = "onnx",
    others: tuple[str, ...] = (),
    **changes: Any,
) -> Artifact[Any]:
    """Put an artifact of a few bytes into a folder; `others` are files beside its main one."""
    with stage_artifact(folder, stem) as staging:
        names = (f"{stem}{SUFFIXES[kind]}", *others)
        for name in names:
            (staging.folder / name).write_bytes(content)
        return staging.commit(manifest_of(stem, staging.record(*names), kind=kind, **changes))


def reusable(folder: Path, request: OnnxRequest = REQUEST, *, source: str = SOURCE, force: bool = False) -> Any:
    return reusable_artifact(folder, "small", request, source, force=force)


def rewritten(artifact: Artifact, **changes: object) -> Path:
    path = artifact.path.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return path


def names_in(folder: Path) -> list[str]:
    """Every file and folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


# The manifest


@pytest.mark.parametrize("kind", ["onnx", "engine"])
def test_a_manifest_comes_back_as_it_was_written_by_either_name(kind: ArtifactKind, tmp_path: Path) -> None:
    made = make(tmp_path, kind=kind)
    assert open_artifact(made.path) == open_artifact(tmp_path / "small.json") == made
    record = made.manifest.files[0]
    assert (record.name, record.size_bytes, record.sha256) == (made.path.name, 7, sha256_of_file(made.path))


def test_a_checkpoints_path_follows_the_folder_of_the_manifest(tmp_path: Path) -> None:
    assert relative_reference(tmp_path / "runs" / "best.pt", tmp_path / "export") == "../runs/best.pt"
    weights = WeightsRecord("checkpoint", "../runs/best.safetensors", SOURCE, "none")
    manifest = replace(make(tmp_path / "export").manifest, model=replace(MODEL, weights=weights))
    moved = manifest.model_seen_from(tmp_path / "deep" / "engines", tmp_path / "export")
    assert moved.weights.reference == "../../runs/best.safetensors"


# Altered bytes


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda path: path.write_bytes(b"wEights"), CorruptArtifactError, r"small\.onnx was altered: SHA-256"),
        (lambda path: path.write_bytes(b"weight"), CorruptArtifactError, "has 6 bytes, its manifest says 7"),
        (lambda path: path.unlink(), InputError, r"small\.onnx is missing; its manifest is here"),
        (lambda path: path.with_suffix(".json").unlink(), InputError, "has no manifest"),
        (lambda path: (path.unlink(), path.with_suffix(".json").unlink()), InputError, "does not exist"),
        (
            lambda path: (path.write_bytes(b"PK\x03\x04" + bytes(12)), path.with_suffix(".json").unlink()),
            InputError,
            r"is a checkpoint; .* export --variant NAME --checkpoint",
        ),
    ],
    ids=["byte", "size", "no file", "no manifest", "nothing", "checkpoint"],
)
def test_an_artifact_that_is_not_whole_is_not_opened(
    change: Callable[[Path], object], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    made = make(tmp_path)
    change(made.path)
    with pytest.raises(error, match=reason):
        open_artifact(made.path)


# Names and reuse


def test_artifacts_of_a_folder_are_found_by_name_and_kind(tmp_path: Path) -> None:
    assert find_artifacts(tmp_path / "nowhere") == []
    for stem, kind in (("b", "onnx"), ("a", "onnx"), ("c", "engine")):
        make(tmp_path, stem, kind=kind)
    assert [artifact.manifest.stem for artifact in find_artifacts(tmp_path, "onnx")] == ["a", "b"]
    assert len(find_artifacts(tmp_path)) == 3


def test_a_stem_names_size_precision_runtime_and_target_and_is_a_plain_file_name() -> None:
    assert artifact_stem("atto", 224, "fp16", "rtx", "sm89") == "atto-224-fp16-rtx-sm89"
    for name in ("", "..", "a/b", ".hidden", "/abs"):
        with pytest.raises(InputError, match="plain file name"):
            artifact_stem(name, 224, "fp32")


def test_what_the_same_inputs_made_is_reused_and_force_or_a_missing_file_makes_it_again(tmp_path: Path) -> None:
    assert reusable(tmp_path) is None
    made = make(tmp_path)
    assert reusable(tmp_path) == made
    assert reusable(tmp_path).reused
    assert reusable(tmp_path, force=True) is None
    made.path.unlink()  # a record without its file, as committed records are
    assert reusable(tmp_path) is None


@pytest.mark.parametrize(
    ("prepare", "asked", "error", "reason"),
    [
        (make, {"request": replace(REQUEST, batch=(1, 4, 9))}, OutputExistsError, "--force"),
        (make, {"source": "b" * 64}, OutputExistsError, "made from other inputs"),
        (lambda folder: make(folder, tools={"torch": "1.0"}), {}, OutputExistsError, "by other versions"),
        (lambda folder: (folder / "small.onnx").write_bytes(b"somebody's"), {}, OutputExistsError, "exists and"),
        (lambda folder: make(folder).path.write_bytes(b"wEights"), {}, CorruptArtifactError, "was altered"),
    ],
    ids=["request", "weights", "tools", "unknown", "altered"],
)
def test_what_other_inputs_made_is_neither_reused_nor_replaced(
    prepare: Callable[[Path], object], asked: dict[str, Any], error: type[Exception], reason: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(error, match=reason):
        reusable(tmp_path, **asked)


# Written together


@pytest.mark.parametrize("before", [False, True], ids=["nothing before", "one before"])
def test_an_error_while_staging_keeps_what_was_there_and_leaves_nothing(before: bool, tmp_path: Path) -> None:
    old = make(tmp_path) if before else None

    def interrupted() -> None:
        with stage_artifact(tmp_path, "small") as staging:
            (staging.folder / "small.onnx").write_bytes(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(tmp_path) == (["small.json", "small.onnx"] if before else [])
    assert old is None or open_artifact(old.path) == old


def test_a_new_artifact_replaces_the_older_one_and_its_files_and_a_reader_keeps_the_old_bytes(tmp_path: Path) -> None:
    old = make(tmp_path, content=b"old" * 10_000, others=("small.onnx.data",))
    with old.path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        made = make(tmp_path, content=b"new")
        assert mapped[:] == b"old" * 10_000
    assert (open_artifact(old.path), made.path.read_bytes()) == (made, b"new")
    assert names_in(tmp_path) == ["small.json", "small.onnx"]


def test_files_that_an_older_manifest_lists_and_are_not_its_own_survive_its_replacement(tmp_path: Path) -> None:
    """A manifest that came with a download may list a file of the user's."""
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    old = make(tmp_path)
    listed = [{"name": "thesis.tex", "size_bytes": 4, "sha256": "0" * 64}]
    rewritten(old, files=[*json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))["files"], *listed])
    make(tmp_path, content=b"new")
    assert (tmp_path / "thesis.tex").read_text(encoding="utf-8") == "mine"


def test_reading_writes_nothing_and_finishes_nothing(tmp_path: Path) -> None:
    """Readers of a folder that a killed writer left need no right to write there."""
    old = make(tmp_path)
    (tmp_path / ".small.tmp").mkdir()
    (tmp_path / ".small.tmp" / "small.json").write_text("{}", encoding="utf-8")
    events: list[str] = []
    sys.addaudithook(lambda name, words: events.append(name) if str(tmp_path) in str(words) else None)
    assert (open_artifact(old.path), find_artifacts(tmp_path)) == (old, [old])
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "fcntl.flock"}
    assert "open" in events
    assert not changes & set(events)
    make(tmp_path)  # the next writer clears it
    assert names_in(tmp_path) == ["small.json", "small.onnx"]


def test_a_reader_between_two_versions_gets_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_readers_beside_a_writer_always_get_a_whole_artifact(tmp_path: Path) -> None:
    make(tmp_path, content=b"0" * 1000)
    done = threading.Event()

    def write() -> None:
        for number in range(1, 40):
            make(tmp_path, content=str(number).encode() * 1000)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    sizes = set()
    while not done.is_set():
        sizes.add(open_artifact(tmp_path / "small.onnx").manifest.files[0].size_bytes)
    writer.join()
    assert sizes <= {1000, 2000}


@pytest.mark.parametrize("name", ["Ärger mit 🦆", "ß" * 115, "-rf", "a'b\"c$(d)"], ids=ascii)
def test_names_that_a_system_takes_work(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "Ordner mit Ünïcode" / ("d" * 200)
    made = make(folder, name)
    assert open_artifact(folder / f"{name}.onnx") == made
    assert make(folder, name, content=b"again").path.read_bytes() == b"again"
    assert len(names_in(folder)) == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("tab\there", r"cannot be recorded: files\[0\]\.name"), ("a" * 300, "is a name of 310 bytes, where a name has")],
)
def test_names_that_no_manifest_or_system_takes_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        make(tmp_path, name)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["small.onnx", "small.json"])
def test_a_folder_where_a_file_goes_is_told_before_anything_is_moved(name: str, tmp_path: Path) -> None:
    (tmp_path / name / "deeper").mkdir(parents=True)
    with pytest.raises(
        InputError, match=rf"{name} is a folder, where a file was expected\. Choose another --output-dir"
    ):
        make(tmp_path)
    assert names_in(tmp_path) == [name]


def test_a_file_where_the_folder_should_be_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "export").write_bytes(b"")
    for folder in (tmp_path / "export", tmp_path / "export" / "deeper"):
        with pytest.raises(InputError, match=r"Cannot write in .*export.*Choose another --output-dir"):
            make(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize("name", ["small.json", "small.onnx"])
def test_a_pipe_or_device_in_a_files_place_is_refused_by_readers_and_replaced_by_writers(
    name: str, put: Callable[[Path], None], tmp_path: Path
) -> None:
    made = make(tmp_path)
    (tmp_path / name).unlink()
    put(tmp_path / name)
    with pytest.raises(InputError, match=r"has no manifest|is missing"):
        open_artifact(made.path)
    assert open_artifact(make(tmp_path).path).path.read_bytes() == b"weights"


# Other processes

MAKE_OR_REUSE = """
import os, signal, sys, time
from pathlib import Path
from tests.core.test_artifacts import manifest_of, reusable, stage_artifact
print("ready", flush=True)
sys.stdin.readline()
folder = Path(sys.argv[1])
with stage_artifact(folder, "small") as staging:
    if reusable(folder) is not None:
        print("reused")
    else:
        (staging.folder / "small.onnx").write_bytes(b"weights")
        time.sleep(0.1)
        if sys.argv[2:] == ["dies"]:
            os.kill(os.getpid(), signal.SIGKILL)
        staging.commit(manifest_of("small", staging.record("small.onnx")))
        print("made")
"""


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAKE_OR_REUSE, *map(str, arguments)], cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_of_processes_that_make_one_artifact_one_makes_it_and_the_others_reuse_it(tmp_path: Path) -> None:
    """The first one is killed with its files staged; its lock is free and what it left is removed."""
    with started(tmp_path, "dies") as dying:
        dying.communicate("go\n", timeout=60)
    assert dying.returncode == -signal.SIGKILL
    assert (names_in(tmp_path), find_artifacts(tmp_path)) == ([".small.lock", ".small.tmp"], [])
    processes = [started(tmp_path) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all before the first is waited for
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0] for process in processes)
    assert said == ["made\n", *["reused\n"] * 2]
    assert open_artifact(tmp_path / "small.onnx").path.read_bytes() == b"weights"
    assert names_in(tmp_path) == ["small.json", "small.onnx"]


def test_artifacts_of_two_names_in_one_folder_are_made_at_the_same_time(tmp_path: Path) -> None:
    with stage_artifact(tmp_path, "small") as staging, stage_artifact(tmp_path, "s*"):
        assert staging.folder.is_dir()
