"""Files of weights that lie: each is refused before it costs memory, and nothing in it runs."""

import json
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, RefusedArtifactError
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.weight_files import METADATA_KEY
from tests.support.foreign_models import saved

BIAS = "downsample_layers.0.0.bias"
SECONDS = 2.0
MEGABYTES = 60.0
"""Bounds on what a refusal may take, far above what is seen: 0.05 s, 5 MB."""


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(path: Path, error: type[Exception], text: str) -> None:
    """Loading ends in the error, soon and with little memory."""
    before, started = peak_megabytes(), time.perf_counter()
    with pytest.raises(error, match=text) as caught:
        load_checkpoint(path)
    assert type(caught.value) is error
    assert path.name in str(caught.value)
    assert time.perf_counter() - started < SECONDS
    assert peak_megabytes() - before < MEGABYTES


def archive(path: Path, *, change: Callable[[str, bytes], bytes], compressed: bool = False) -> Path:
    """A state dict as torch.save writes it, with each entry changed and packed or not."""
    torch.save({"model": {BIAS: torch.ones(8)}}, path.with_suffix(".source"))
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path.with_suffix(".source")) as source, zipfile.ZipFile(path, "w", kind) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return path


def unchanged(name: str, content: bytes) -> bytes:
    return content


def test_what_the_forgeries_start_from_is_read(tmp_path):
    """It lacks a network, which is another error: the archive itself is whole."""
    path = archive(tmp_path / "whole.pt", change=unchanged)
    with pytest.raises(CheckpointError, match="no classification head"):
        load_checkpoint(path)


def test_pickle_zip_bomb_pt(tmp_path):
    """64 MB of zeros in 70 kB; torch.load would unpack it, as it would 64 GB."""

    def blown_up(name: str, content: bytes) -> bytes:
        return bytes(64 << 20) if name.endswith("data/0") else content

    path = archive(tmp_path / "bomb.pt", change=blown_up, compressed=True)
    assert path.stat().st_size < 100_000
    refused(path, RefusedArtifactError, r"is compressed, and unpacked it would take 67,1\d\d,\d\d\d bytes")


def test_pickle_zip_bomb_pt_of_entries_that_overlap(tmp_path):
    path = archive(tmp_path / "overlap.pt", change=unchanged)
    content = bytearray(path.read_bytes())
    claimed, at = struct.pack("<I", 1 << 30), content.index(b"PK\x01\x02")
    content[at + 20 : at + 28] = claimed * 2  # the first entry's sizes, packed and unpacked
    path.write_bytes(content)
    refused(path, RefusedArtifactError, r"its entries overlap, and unpacked it would take 1,073,7\d\d,\d\d\d bytes")


def test_pickle_program_larger_than_any_state_dicts_is_refused(tmp_path):
    path = archive(
        tmp_path / "long.pt", change=lambda name, content: content + bytes((64 << 20) * name.endswith("data.pkl"))
    )
    refused(path, RefusedArtifactError, r"the pickle in it has 67,10\d,\d\d\d bytes beside its tensors")


def test_pickle_that_claims_a_petabyte_for_a_record_of_32_bytes(tmp_path):
    def claims(name: str, content: bytes) -> bytes:
        return content.replace(b"K\x08t", b"\x8a\x08" + struct.pack("<q", 1 << 50) + b"t")

    path = archive(tmp_path / "petabyte.pt", change=claims)
    refused(path, CorruptArtifactError, "cannot be read as a PyTorch checkpoint")


def test_pickle_whose_view_repeats_a_value_a_trillion_times(tmp_path):
    path = saved({BIAS: torch.ones(1).expand(1 << 40)}, tmp_path / "view.pt")
    refused(path, CorruptArtifactError, rf"{BIAS} claims 4,398,046,511,104 bytes, the file holds 4 for it")


def test_pickle_whose_tensors_share_one_storage_a_thousand_times(tmp_path):
    shared = torch.ones(1 << 18)
    path = saved({f"stages.{at}": shared for at in range(1000)}, tmp_path / "shared.pt")
    refused(path, CorruptArtifactError, r"its 1000 tensors claim 1,048,576,000 bytes and share storage")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_pickle_of_tensors_without_dense_values_is_refused(tmp_path, kind):
    made = {
        "sparse": lambda: torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True),
        "meta": lambda: torch.empty(4, device="meta"),
    }
    path = saved({BIAS: made[kind]()}, tmp_path / "odd.pt")
    refused(path, CheckpointError, rf"{BIAS} is no ordinary tensor")


def test_a_tensor_that_is_named_twice_by_a_state_dict_still_loads(tiny_model, tiny_variant, tmp_path):
    """Sharing itself is no fault: two norms that hold the same values, as tied weights do."""
    state = tiny_model.state_dict()
    state["norm.bias"] = state["norm.weight"]
    loaded = load_checkpoint(saved(state, tmp_path / "tied.pt"), tiny_variant).model
    assert torch.equal(loaded.norm.bias, tiny_model.norm.weight)


# safetensors


def entry(kind: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def forged(path: Path, header: object, body: int = 0, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))
    return path


@pytest.mark.parametrize("length", [1 << 63, (1 << 63) - 1, 200_000_000])
def test_safetensors_header_too_large(tmp_path, length):
    refused(forged(tmp_path / "h.safetensors", {}, length=length), CorruptArtifactError, "header")


def test_safetensors_header_of_200_megabytes_that_is_there(tmp_path):
    path = tmp_path / "long.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 200_000_000) + b"{")
        stream.truncate(200_000_008)
    refused(path, CorruptArtifactError, "header too large")


FORGERIES = {
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "invalid offset for tensor `b`"),
    "hole": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20, "invalid offset for tensor `b`"),
    "past the end": ({"a": entry("F32", [2], 0, 8)}, 4, "not fully covered"),
    "trailing bytes": ({"a": entry("F32", [2], 0, 8)}, 80, "not fully covered"),
    "shape and size": ({"a": entry("F32", [3], 0, 8)}, 8, "invalid shape, data type, or offset"),
    "overflow": ({"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8, "overflow"),
    "negative shape": ({"a": entry("F32", [-2], 0, 8)}, 8, "invalid JSON in header"),
    "unknown type": ({"a": entry("F99", [2], 0, 8)}, 8, "unknown variant `F99`"),
    "no JSON": (b"{no", 0, "invalid JSON in header"),
    "no UTF-8": (b'{"\xff": 1}', 0, "UTF-8"),
    "named twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry("F32", [1], 0, 4)).encode(),) * 2), 4, "names a twice"),
    "nested deep": (b'{"a":' + b"[" * 100_000, 0, "nested too deep"),
    "metadata nested deep": ({"__metadata__": {METADATA_KEY: "[" * 100_000}}, 0, "metadata that is not JSON"),
    "metadata no object": ({"__metadata__": {METADATA_KEY: "[1]"}}, 0, "metadata that is not JSON"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_safetensors_bad_offsets(tmp_path, name):
    header, body, text = FORGERIES[name]
    refused(forged(tmp_path / "forged.safetensors", header, body), CorruptArtifactError, text)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("class_names", 5, "a list of names"),
        ("class_names", [1] * 10, "a list of names"),
        ("licence", None, "a text"),
        ("licence", ["MIT"], "a text"),
        ("preprocessing", "none", "an object"),
    ],
)
def test_a_header_of_ours_with_another_type_is_corrupt(tiny_model, tmp_path, name, value, expected):
    path = save_checkpoint(tmp_path / "ours.safetensors", tiny_model, class_names=[f"c{at}" for at in range(10)])
    header_length = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + header_length])
    own = {**json.loads(header["__metadata__"][METADATA_KEY]), name: value}
    save_file(
        {key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}, path, {METADATA_KEY: json.dumps(own)}
    )
    refused(path, CorruptArtifactError, rf"as {name} in its header, expected {expected}")


@pytest.mark.slow
def test_checkpoint_truncated_ends_the_command_with_code_4_and_one_message(tiny_model, tmp_path):
    path = saved(tiny_model.state_dict(), tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    done = subprocess.run(
        [sys.executable, "-m", "cnx_deploy", "export", "--variant", "atto", "--checkpoint", str(path)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (4, "", 1)
    assert str(path) in done.stderr
    assert sorted(each.name for each in tmp_path.iterdir()) == ["cut.safetensors"]
