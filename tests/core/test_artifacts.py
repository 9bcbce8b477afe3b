"""Artifacts reach the disk whole or not at all, and what was altered since is never used."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cnx_deploy.core.artifacts import (
    artifact_stem,
    find_artifacts,
    open_artifact,
    reusable_artifact,
    sha256_of_file,
    stage_artifact,
)
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.manifest import (
    Artifact,
    ModelRecord,
    OnnxFacts,
    OnnxManifest,
    OnnxRequest,
    WeightsRecord,
    relative_reference,
)
from cnx_deploy.core.preprocessing import Preprocessing

SOURCE = "a" * 64
REQUEST = OnnxRequest(deploy=DeploySpec("fp32", 32), batch=(1, 4, 8), opset=20, form=1)
FACTS = OnnxFacts(operators={"Gelu": 5}, types={}, half_share=0.0, inputs={}, outputs={})
MODEL = ModelRecord(
    "tiny-test", 2, 32, WeightsRecord("random", "0", SOURCE, "none"), Preprocessing(image_size=32), ("cat", "Bär")
)


def make(
    folder: Path, stem: str = "small", content: bytes = b"weights", suffix: str = ".onnx", **changes: object
) -> Artifact:
    with stage_artifact(folder, stem) as staging:
        (staging.folder / f"{stem}{suffix}").write_bytes(content)
        values = {
            "stem": stem,
            "files": staging.record(f"{stem}{suffix}"),
            "model": MODEL,
            "request": REQUEST,
            "source_name": "random:0",
            "source_sha256": SOURCE,
            "facts": FACTS,
        }
        return staging.commit(OnnxManifest(**{**values, **changes}))


def reusable(
    folder: Path, *, stem: str = "small", source: str = SOURCE, force: bool = False, request: OnnxRequest = REQUEST
):
    return reusable_artifact(folder, stem, request, source, force=force)


def rewritten(artifact: Artifact, **changes: object) -> Path:
    path = artifact.path.with_suffix(".json")
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return path


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


# The manifest


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    made = make(tmp_path)
    assert open_artifact(made.path) == made


def test_an_artifact_opens_by_the_name_of_its_manifest_too(tmp_path):
    made = make(tmp_path)
    assert open_artifact(tmp_path / "small.json").path == made.path


def test_the_manifest_holds_size_and_hash_of_each_file(tmp_path):
    made = make(tmp_path)
    record = made.manifest.files[0]
    assert (record.name, record.size_bytes, record.sha256) == ("small.onnx", 7, sha256_of_file(made.path))


@pytest.mark.parametrize("name", ["../small.onnx", "/etc/passwd", "folder/small.onnx", "..", ".", "", "./small.onnx"])
def test_a_file_name_that_is_a_path_is_refused(tmp_path, name):
    path = rewritten(make(tmp_path), files=[{"name": name, "size_bytes": 7, "sha256": "0" * 64}])
    with pytest.raises(
        CorruptArtifactError, match=r"\(files\[0\]\.name: Expected str of another form\)|its first file"
    ):
        open_artifact(path)


@pytest.mark.parametrize(
    "changes",
    [{"schema_version": 2}, {"kind": "pickle"}, {"files": []}, {"files": None}, {"model": {}}, {"surprise": 1}],
    ids=str,
)
def test_a_manifest_of_another_form_is_corrupt(tmp_path, changes):
    path = rewritten(make(tmp_path), **changes)
    with pytest.raises(CorruptArtifactError, match=r"small\.json is not a manifest"):
        open_artifact(path)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"schema_version": 1}'])
def test_json_that_is_no_manifest_is_corrupt(tmp_path, content):
    (tmp_path / "small.json").write_text(content, encoding="utf-8")
    with pytest.raises(CorruptArtifactError, match="is not a manifest"):
        open_artifact(tmp_path / "small.json")


def test_a_checkpoints_path_follows_the_folder_of_the_manifest(tmp_path):
    weights = WeightsRecord("checkpoint", "../runs/best.safetensors", SOURCE, "none")
    manifest = replace(make(tmp_path / "export").manifest, model=replace(MODEL, weights=weights))
    moved = manifest.model_seen_from(tmp_path / "deep" / "engines", tmp_path / "export")
    assert moved.weights.reference == "../../runs/best.safetensors"


def test_a_reference_is_relative_to_the_manifests_folder(tmp_path):
    assert relative_reference(tmp_path / "runs" / "best.pt", tmp_path / "export") == "../runs/best.pt"


# Altered bytes


def test_a_changed_byte_is_corrupt(tmp_path):
    made = make(tmp_path)
    made.path.write_bytes(b"wEights")
    with pytest.raises(CorruptArtifactError, match="was altered"):
        open_artifact(made.path)


def test_another_size_is_corrupt(tmp_path):
    made = make(tmp_path)
    made.path.write_bytes(b"weight")
    with pytest.raises(CorruptArtifactError, match="has 6 bytes, its manifest says 7"):
        open_artifact(made.path)


def test_a_missing_file_is_an_input_error(tmp_path):
    made = make(tmp_path)
    made.path.unlink()
    with pytest.raises(InputError, match=r"small\.onnx is missing"):
        open_artifact(made.path)


def test_a_file_without_a_manifest_is_no_artifact(tmp_path):
    (tmp_path / "small.onnx").write_bytes(b"weights")
    with pytest.raises(InputError, match="has no manifest"):
        open_artifact(tmp_path / "small.onnx")


def test_a_path_that_is_not_there_says_so(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_artifact(tmp_path / "small.onnx")


# Finding


def test_artifacts_of_a_folder_are_found_by_name_and_kind(tmp_path):
    make(tmp_path, "b")
    make(tmp_path, "a")
    assert [artifact.manifest.stem for artifact in find_artifacts(tmp_path, "onnx")] == ["a", "b"]
    assert find_artifacts(tmp_path, "engine") == []


def test_a_folder_that_is_not_there_has_no_artifacts(tmp_path):
    assert find_artifacts(tmp_path / "nowhere") == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "/abs"])
def test_an_artifacts_name_is_a_plain_file_name(name):
    with pytest.raises(InputError, match="plain file name"):
        artifact_stem(name, 224, "fp32")


def test_a_stem_names_size_precision_runtime_and_target():
    assert artifact_stem("atto", 224, "fp16", "rtx", "sm89") == "atto-224-fp16-rtx-sm89"


# Reuse


def test_a_free_place_has_nothing_to_reuse(tmp_path):
    assert reusable(tmp_path) is None


def test_the_same_request_on_the_same_source_reuses(tmp_path):
    made = make(tmp_path)
    assert reusable(tmp_path) == made


def test_force_does_not_reuse(tmp_path):
    make(tmp_path)
    assert reusable(tmp_path, force=True) is None


def test_another_request_at_the_same_place_is_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(OutputExistsError, match="--force"):
        reusable(tmp_path, request=replace(REQUEST, deploy=DeploySpec("fp16", 32)))


def test_other_weights_at_the_same_place_are_refused(tmp_path):
    make(tmp_path)
    with pytest.raises(OutputExistsError):
        reusable(tmp_path, source="b" * 64)


def test_an_artifact_of_other_tool_versions_is_not_reused(tmp_path):
    make(tmp_path, tools={"torch": "1.0"})
    with pytest.raises(OutputExistsError, match="other versions"):
        reusable(tmp_path)


def test_a_file_of_unknown_origin_is_not_overwritten(tmp_path):
    (tmp_path / "small.onnx").write_bytes(b"somebody's")
    with pytest.raises(OutputExistsError):
        reusable(tmp_path)


def test_an_altered_artifact_is_not_reused(tmp_path):
    make(tmp_path).path.write_bytes(b"wEights")
    with pytest.raises(CorruptArtifactError):
        reusable(tmp_path)


def test_a_record_without_its_file_is_made_again(tmp_path):
    make(tmp_path).path.unlink()
    assert reusable(tmp_path) is None


# Whole or not at all


def test_an_error_while_staging_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with stage_artifact(tmp_path, "small") as staging:
            (staging.folder / "small.onnx").write_bytes(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_an_error_while_staging_keeps_the_older_artifact(tmp_path):
    made = make(tmp_path)

    def interrupted() -> None:
        with stage_artifact(tmp_path, "small") as staging:
            (staging.folder / "small.onnx").write_bytes(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert open_artifact(made.path) == made


def test_a_new_artifact_replaces_the_older_one(tmp_path):
    make(tmp_path)
    made = make(tmp_path, content=b"other weights")
    assert (open_artifact(made.path).path.read_bytes(), visible(tmp_path)) == (
        b"other weights",
        ["small.json", "small.onnx"],
    )


def test_a_file_where_the_folder_should_be_is_an_input_error(tmp_path):
    (tmp_path / "export").write_bytes(b"")
    with pytest.raises(InputError, match=r"Cannot write in .*export"):
        make(tmp_path / "export")


def test_a_file_in_the_way_of_a_parent_folder_is_an_input_error(tmp_path):
    (tmp_path / "export").write_bytes(b"")
    with pytest.raises(InputError, match="Choose another --output-dir"):
        make(tmp_path / "export" / "deeper")


# Other processes

STAGE_AND_WAIT = """
import pathlib, sys, time
from cnx_deploy.core.artifacts import stage_artifact
with stage_artifact(pathlib.Path(sys.argv[1]), "small") as staging:
    (staging.folder / "small.onnx").write_bytes(b"half of it")
    print("staged", flush=True)
    time.sleep(60)
"""


def started(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def killed_while_staging(tmp_path) -> Path:
    """A folder in which a process was killed with its files staged."""
    with started(STAGE_AND_WAIT, tmp_path) as process:
        assert process.stdout.readline() == "staged\n"
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    return tmp_path


def test_a_killed_process_leaves_no_artifact(killed_while_staging):
    assert (visible(killed_while_staging), find_artifacts(killed_while_staging)) == ([], [])


def test_what_a_killed_process_left_is_removed_by_the_next(killed_while_staging):
    left = list(killed_while_staging.glob(".small.tmp-*/small.onnx"))
    make(killed_while_staging)
    assert (len(left), list(killed_while_staging.glob(".small.tmp-*"))) == (1, [])


def test_another_artifacts_staging_folder_is_left_alone(tmp_path):
    with stage_artifact(tmp_path, "small") as staging, stage_artifact(tmp_path, "s*"):
        assert staging.folder.is_dir()
