"""Files of weights that lie: each is refused before it costs memory, and nothing in it runs."""

import json
import os
import pickle
import struct
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cnx_deploy.core.errors import CheckpointError, CnxDeployError, CorruptArtifactError, InputError
from cnx_deploy.core.errors import RefusedArtifactError as Refused
from cnx_deploy.model.checkpoint import load_checkpoint, save_checkpoint
from cnx_deploy.model.pickles import claims_too_much
from cnx_deploy.model.weight_files import METADATA_KEY, read_weight_file
from tests.support.lies import QUICK, VALUES, put, refused, result_or_error

BIAS = "downsample_layers.0.0.bias"


def assert_refused(path: Path, error: type[CnxDeployError], *parts: str) -> None:
    """Loading ends in the error, which names the file; soon, and with little memory."""
    refused(lambda: load_checkpoint(path), error, path.name, *parts)


# --- code -------------------------------------------------------------------------------------------------------------


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_runs_nothing(tiny_model, tmp_path, new_format):
    marker, path = tmp_path / "marker", tmp_path / "malicious.pt"
    content = {"model": tiny_model.state_dict(), "args": Malicious(marker)}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(Refused, match="could run foreign code") as caught:
        load_checkpoint(path)
    assert not marker.exists()
    assert "weights_only" not in str(caught.value)  # torch's advice to read it unsafely is not passed on
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file would have done it


@pytest.mark.parametrize(("name", "error"), [("bare.bin", Refused), ("bare.safetensors", CorruptArtifactError)])
def test_a_bare_pickle_with_code_runs_nothing_under_any_name(tmp_path, name, error):
    marker = tmp_path / "marker"
    (tmp_path / name).write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    assert_refused(tmp_path / name, error)
    assert not marker.exists()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")  # TorchScript itself is deprecated
def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    assert_refused(tmp_path / "program.pt", Refused, "TorchScript")


# --- archives that claim more than they hold --------------------------------------------------------------------------


def archive(path: Path, change: Callable[[str, bytes], bytes] = lambda name, content: content, **packed: bool) -> Path:
    """A state dict as torch.save writes it, with each entry changed and, if asked for, packed."""
    torch.save({"model": {BIAS: torch.ones(8)}}, path.with_suffix(".source"))
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path.with_suffix(".source")) as source, zipfile.ZipFile(path, "w", kind) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, change(entry.filename, source.read(entry)))
    return path


def overwritten(path: Path, offset: int, content: bytes) -> Path:
    """The archive with bytes of its first directory entry replaced."""
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + offset
    data[at : at + len(content)] = content
    return put(path, bytes(data))


def zip_bomb(path: Path) -> Path:
    """64 MB of zeros in 70 kB; torch.load would unpack it, as it would 64 GB."""
    return archive(path, lambda name, own: bytes(64 << 20) if name.endswith("data/0") else own, packed=True)


def overlapping(path: Path) -> Path:
    return overwritten(archive(path), 20, struct.pack("<I", 1 << 30) * 2)  # sizes packed and unpacked


def long_program(path: Path) -> Path:
    return archive(path, lambda name, own: own + bytes((64 << 20) * name.endswith("data.pkl")))


def petabyte(path: Path) -> Path:
    """For a record of 32 bytes; the allocator's words for it are those of a machine that is short of memory."""
    claim = b"\x8a\x08" + struct.pack("<q", 1 << 50) + b"t"
    return archive(path, lambda name, own: own.replace(b"K\x08t", claim))


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (zip_bomb, Refused, "is compressed, and unpacked it would take 67,1"),
        (overlapping, Refused, "its entries overlap, and unpacked it would take 1,073,7"),
        (long_program, Refused, "the pickle in it has 67,10"),
        (petabyte, CorruptArtifactError, "cannot be read as a PyTorch checkpoint"),
    ],
)
def test_an_archive_that_claims_more_than_it_holds_is_refused(tmp_path, make, error, says):
    assert_refused(make(tmp_path / "a.pt"), error, says)


def test_an_archive_of_a_zip_version_that_nobody_writes_is_no_other_exception(tmp_path):
    """zipfile raises NotImplementedError for it; torch's own reader does not mind."""
    path = overwritten(archive(tmp_path / "a.pt"), 6, b"\xff")
    result_or_error(lambda: read_weight_file(path), CorruptArtifactError, Refused)


@pytest.mark.parametrize(("asked", "lies"), [(14_000, False), (1 << 50, True)])
def test_a_pickle_lies_where_it_asks_for_more_than_the_file_has(asked, lies, tmp_path):
    path = put(tmp_path / "a.pt", bytes(20_000))
    error = RuntimeError(f"DefaultCPUAllocator: can't allocate memory: you tried to allocate {asked} bytes.")
    assert claims_too_much(error, path) is lies
    assert claims_too_much(MemoryError(), path)  # there is room for twice the file


@pytest.mark.parametrize(
    ("state", "error", "says"),
    [
        (lambda: {BIAS: torch.ones(1).expand(1 << 40)}, CorruptArtifactError, "claims 4,398,046,511,104 bytes"),
        (
            lambda: dict.fromkeys([BIAS, *(f"stages.{at}" for at in range(1000))], torch.ones(1 << 18)),
            CorruptArtifactError, "share storage",
        ),
        (
            lambda: {BIAS: torch.sparse_coo_tensor([[0]], [1.0], (1 << 40,), check_invariants=True)},
            CheckpointError, "is no ordinary tensor",
        ),
        (lambda: {BIAS: torch.empty(4, device="meta")}, CheckpointError, "is no ordinary tensor"),
        (lambda: {BIAS: torch.ones(4).long()}, CheckpointError, "expected float32"),
        (lambda: [1, 2], CheckpointError, "state dict"),
        (lambda: {"model": {"epoch": 3}}, CheckpointError, "state dict"),
    ],
    ids=["expanded view", "shared storage", "sparse", "meta", "integers", "list", "entry"],
)  # fmt: skip
def test_a_pickle_of_other_than_dense_finite_floats_is_an_error(tmp_path, state, error, says):
    torch.save(state(), tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt", error, says)


def test_a_tensor_that_is_named_twice_by_a_state_dict_still_loads(tiny_model, tiny_variant, tmp_path):
    """Sharing itself is no fault: two norms that hold the same values, as tied weights do."""
    state = tiny_model.state_dict()
    state["norm.bias"] = state["norm.weight"]
    torch.save(state, tmp_path / "tied.pt")
    loaded = load_checkpoint(tmp_path / "tied.pt", tiny_variant).model
    assert torch.equal(loaded.norm.bias, tiny_model.norm.weight)


# --- safetensors ------------------------------------------------------------------------------------------------------


def entry(kind: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def forged(path: Path, header: object, body: int = 0, *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return put(path, struct.pack("<Q", len(text) if length is None else length) + text + bytes(body))


@pytest.mark.parametrize(("length", "is_there"), [(1 << 63, False), (200_000_000, False), (200_000_000, True)])
def test_a_header_that_is_too_large_is_corrupt(tmp_path, length, is_there):
    path = forged(tmp_path / "h.safetensors", b"{", length=length)
    if is_there:
        with path.open("r+b") as stream:
            stream.truncate(8 + length)
    assert_refused(path, CorruptArtifactError, "header")


FORGERIES = {
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, "invalid offset for tensor `b`"),
    "hole": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 12, 20)}, 20, "invalid offset for tensor `b`"),
    "past the end": ({"a": entry("F32", [2], 0, 8)}, 4, "not fully covered"),
    "trailing bytes": ({"a": entry("F32", [2], 0, 8)}, 80, "not fully covered"),
    "shape and size": ({"a": entry("F32", [3], 0, 8)}, 8, "invalid shape, data type, or offset"),
    "overflow": ({"a": entry("F32", [1 << 62, 1 << 62], 0, 8)}, 8, "overflow"),
    "unknown type": ({"a": entry("F99", [2], 0, 8)}, 8, "unknown variant `F99`"),
    "no JSON": (b"{no", 0, "invalid JSON in header"),
    "named twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry("F32", [1], 0, 4)).encode(),) * 2), 4, "names a twice"),
    "nested deep": (b'{"a":' + b"[" * 100_000, 0, "nested too deep"),
    "metadata no object": ({"__metadata__": {METADATA_KEY: "[1]"}}, 0, "metadata that is not JSON"),
    "metadata twice": ({"__metadata__": {METADATA_KEY: '{"a": 1, "a": 2}'}}, 0, "metadata that is not JSON"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_corrupt(tmp_path, name):
    header, body, text = FORGERIES[name]
    assert_refused(forged(tmp_path / "forged.safetensors", header, body), CorruptArtifactError, text)


@QUICK
@given(own=st.one_of(VALUES.map(json.dumps), st.text(max_size=20)))
def test_fuzz_our_entry_of_a_header_is_read_or_corrupt(tmp_path: Path, own: str) -> None:
    header = {"__metadata__": {METADATA_KEY: own}, "a": entry("F32", [1], 0, 4)}
    path = forged(tmp_path / "a.safetensors", header, 4)
    # An entry with nothing in it says nothing: the file counts as one of somebody else, without a network in it.
    result_or_error(lambda: read_weight_file(path), CheckpointError if own == "{}" else CorruptArtifactError)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("class_names", [1] * 10),
        ("licence", None),
        ("preprocessing", "none"),
        ("training", []),
        ("training", {"loss": []}),
    ],
)
def test_an_entry_of_ours_with_another_type_is_corrupt(tiny_model, tmp_path, name, value):
    path = save_checkpoint(tmp_path / "ours.safetensors", tiny_model, class_names=[f"c{at}" for at in range(10)])
    own = json.dumps({**read_weight_file(path).metadata, name: value})
    save_file({key: tensor.clone() for key, tensor in tiny_model.state_dict().items()}, path, {METADATA_KEY: own})
    assert_refused(path, CorruptArtifactError, f"as {name} in its header")


# --- no file of weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_that_is_cut_off_is_corrupt(tiny_model, tiny_variant, tmp_path, suffix):
    path = tmp_path / f"whole{suffix}"
    (torch.save if suffix == ".pt" else save_file)(tiny_model.state_dict(), path)
    content = path.read_bytes()
    for share in (0.0, 0.01, 0.5, 0.9999):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(CorruptArtifactError):
            load_checkpoint(path, tiny_variant)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_another_kind_is_corrupt_not_refused(tmp_path, suffix):
    path = tmp_path / f"other{suffix}"
    for content in (b"<!DOCTYPE html><title>404</title>", bytes(range(256)), b"version https://git-lfs"):
        path.write_bytes(content)
        assert_refused(path, CorruptArtifactError)


def test_altered_pickles_are_errors_of_ours_whatever_the_alteration(tiny_variant, tmp_path):
    path = tmp_path / "altered.pt"
    torch.save({"model": {BIAS: torch.ones(8)}}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    outcomes = Counter()
    for _ in range(300):
        altered = bytearray(content)
        places, values = (torch.randint(most, (3,), generator=generator).tolist() for most in (len(content), 256))
        for place, value in zip(places, values, strict=True):
            altered[place] = value
        path.write_bytes(altered)
        with pytest.raises((CorruptArtifactError, Refused, CheckpointError)) as caught:
            load_checkpoint(path, tiny_variant)
        outcomes[caught.type] += 1
    assert outcomes[CorruptArtifactError] > 150


@pytest.mark.parametrize("name", ["absent.safetensors", "absent.pt", "folder.pt", "notes.txt", "no\0name.pt"])
def test_what_is_no_checkpoint_file_is_wrong_input(tmp_path, name):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    assert_refused(tmp_path / name, InputError)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_weights_in_a_pipe_or_device_are_wrong_input_and_not_waited_for(make, suffix, tmp_path):
    make(tmp_path / f"weights{suffix}")
    assert_refused(tmp_path / f"weights{suffix}", InputError, "is no regular file")
