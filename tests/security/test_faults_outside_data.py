"""Weights outside an ONNX file, each through the command."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from cnx_deploy.core.artifacts import sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.manifest import Artifact, FileRecord
from cnx_deploy.diagnosis.bisect.find import run_bisection
from cnx_deploy.diagnosis.layerwise.comparison import layers_of_artifact
from cnx_deploy.runners.registry import open_runner
from cnx_deploy.verification.provenance import check_custody
from tests.support.hostile_onnx import DATA, before_logits, changed_place, every, place_weights, written
from tests.support.refusals import inspected, refused

# Paths that lead out of the folder

OUTSIDE = {
    "parent": "../secret",
    "nested": "a/../../secret",
    "absolute": "/etc/passwd",
    "empty": "",
    "folder": ".",
    "dot first": f"./{DATA}",
    "double slash": "a//b",
    "backslash": "..\\secret",
    "drive": "C:secret",
    "NUL": f"{DATA}\0.txt",
}


@pytest.mark.parametrize("location", **every(OUTSIDE))
def test_onnx_extdata_traversal(location: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What lies outside is a pipe: whoever opened it would wait for ever."""
    os.mkfifo(tmp_path / "secret")
    path = written(tmp_path / "model", changed_place(location=location))
    refused(path, "expected a plain name within the file's own folder", capsys)


def test_onnx_extdata_traversal_by_a_tensor_deep_inside_a_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def hide(model: onnx.ModelProto) -> None:
        inner = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
        inner.external_data.add(key="location", value="../secret")
        constant = helper.make_node("Constant", [], ["hidden"], value=inner)
        before_logits(model, constant, added="hidden")

    refused(written(tmp_path, hide), "the outside data of tensor 'hidden' lies in '../secret'", capsys)


def test_onnx_extdata_traversal_by_bytes_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(location="weights_data"))
    path.write_bytes(path.read_bytes().replace(b"weights_data", b"weights\xffdata"))
    refused(path, "expected a plain name within", capsys)


# Links and pipes


def _link(folder: Path) -> None:
    (folder / DATA).rename(folder / "real")
    (folder / DATA).symlink_to("real")


def _link_out(folder: Path) -> None:
    (folder / DATA).unlink()
    (folder / DATA).symlink_to("/etc/passwd")


def _hard_link(folder: Path) -> None:
    (folder / "other").hardlink_to(folder / DATA)


def _pipe(folder: Path) -> None:
    (folder / DATA).unlink()
    os.mkfifo(folder / DATA)


LINKS = {
    "symlink": (_link, "lies behind the link"),
    "symlink out": (_link_out, "lies behind the link"),
    "hardlink": (_hard_link, "has 2 names (hard links)"),
    "pipe": (_pipe, "is no regular file"),
}


@pytest.mark.parametrize(("make", "text"), **every(LINKS))
def test_onnx_extdata_symlink_hardlink_and_pipe(
    make: Callable[[Path], None], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    make(tmp_path)
    refused(path, text, capsys)


def test_onnx_extdata_parent_symlink(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "model", changed_place(location=f"inside/{DATA}"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model" / DATA).rename(tmp_path / "elsewhere" / DATA)
    (tmp_path / "model" / "inside").symlink_to(tmp_path / "elsewhere")
    refused(path, "lies behind the link", capsys)


def test_onnx_extdata_in_a_folder_within_is_let_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(location=f"inside/{DATA}"))
    (tmp_path / "inside").mkdir()
    (tmp_path / DATA).rename(tmp_path / "inside" / DATA)
    assert inspected(path, capsys) == (0, "")


# Ranges

RANGES = {
    "negative offset": ({"offset": "-1"}, "offset '-1' and length '48', expected whole numbers"),
    "negative length": ({"length": "-48"}, "offset '0' and length '-48', expected whole numbers"),
    "words": ({"offset": "ten"}, "offset 'ten' and length '48', expected whole numbers"),
    "hexadecimal": ({"length": "0x30"}, "expected whole numbers"),
    "a float": ({"length": "48.0"}, "expected whole numbers"),
    "digits of other scripts": ({"length": "४८"}, "expected whole numbers"),
    "offset past the end": ({"offset": "4096"}, "has bytes 4096 to 4144, expected at most the 48 of weights.data"),
    "one byte past the end": ({"offset": "1"}, "has bytes 1 to 49, expected at most the 48"),
    "a petabyte": ({"length": str(10**15)}, "expected 48 for its shape"),
    "2 to the 64": ({"offset": str(2**64)}, "expected whole numbers"),
    "too short": ({"length": "44"}, "has 44 bytes of element type 1, expected 48 for its shape"),
}


@pytest.mark.parametrize(("entries", "text"), **every(RANGES))
def test_onnx_extdata_bad_ranges(
    entries: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(written(tmp_path, changed_place(**entries)), text, capsys)


def test_onnx_extdata_bad_ranges_of_a_shape_that_claims_petabytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sparse file is as large as it claims and costs nothing: what is claimed is limited, not what is there."""

    def claim(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = [1 << 20, 1 << 20]
        changed_place(length=str(4 << 40))(model)

    path = written(tmp_path, claim)
    with (tmp_path / DATA).open("r+b") as stream:
        stream.truncate(4 << 40)
    refused(path, "its tensors up to 'weights' claim 4,398,046,511,104 bytes, where at most 17,179,869,184", capsys)


def test_onnx_extdata_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path)
    (tmp_path / DATA).unlink()
    refused(path, "weights.data is missing: expected it beside foreign.onnx", capsys)


# Keys

KEYS = {"evil": "evil", "dunder": "__class__", "basepath": "basepath", "upper case": "Location"}


@pytest.mark.parametrize("key", **every(KEYS))
def test_onnx_extdata_unknown_keys(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, changed_place(**{key: "/etc"}))
    refused(path, f"has the keys {key!r}; expected only checksum, length, location, offset", capsys)


def test_onnx_extdata_unknown_keys_a_key_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twice = [("location", DATA), ("location", "../secret"), ("length", "48")]
    refused(written(tmp_path, lambda model: place_weights(model, twice)), "has a key twice", capsys)


# The file's own manifest is not to be widened


def recorded(onnx_file: Artifact, path: Path, *, lists_data: bool) -> Artifact:
    """The foreign file with a manifest whose hashes match."""
    names = [path.name, *([DATA] if lists_data else [])]
    records = tuple(FileRecord(name, size_of(path.parent / name), sha256_of_file(path.parent / name)) for name in names)
    manifest = replace(onnx_file.manifest, stem="foreign", files=records)
    path.with_suffix(".json").write_text(manifest.to_json(), encoding="utf-8")
    return Artifact(path, manifest)


def size_of(path: Path) -> int:
    return path.stat().st_size


def test_onnx_extdata_swapped_what_the_manifest_lists_is_read(
    tiny_onnx_fp32: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp32, path, lists_data=True)
    assert inspected(path, capsys) == (0, "")
    with open_runner(artifact) as runner:
        assert runner.info.backend == "onnxruntime"


def test_onnx_extdata_swapped_in_beside_what_the_manifest_lists(
    tiny_onnx_fp16: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hashes match: the graph reads a file that has none. Whoever parses, runs or checks the chain says so."""
    path = written(tmp_path)
    artifact = recorded(tiny_onnx_fp16, path, lists_data=False)
    text = "reads 'weights.data', which its manifest does not list, expected one of foreign.onnx"
    refused(path, text, capsys)
    for use in (open_runner, layers_of_artifact, lambda found: run_bisection(found.path, print)):
        with pytest.raises(CorruptArtifactError, match=text):
            use(artifact)
    faults = [each.text for each in check_custody([path], tmp_path, tmp_path).findings if each.verdict == "fault"]
    assert any(text in fault for fault in faults)
