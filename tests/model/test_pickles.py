"""What training programs put beside weights is read as plain data; what could run is refused, and does not run."""

import argparse
import collections
import datetime
import functools
import operator
import os
import pathlib
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cnx_deploy.core.errors import CorruptArtifactError, RefusedArtifactError
from cnx_deploy.model.checkpoint import load_checkpoint
from cnx_deploy.model.pickles import Ignored, _stand_ins, read_pickle
from cnx_deploy.model.weight_files import read_weight_file
from tests.conftest import TINY_TEST
from tests.support.foreign_models import assert_same_weights, saved
from tests.support.lies import QUICK, result_or_error

PLAIN = {
    "path": (pathlib.Path("runs/a"), pathlib.PurePosixPath("runs/a")),
    "windows": (pathlib.PureWindowsPath("C:/runs"), pathlib.PureWindowsPath("C:/runs")),
    "float64": (np.float64(1e-3), 1e-3),
    "int32": (np.int32(-7), -7),
    "bool": (np.bool_(True), True),
    "text": (np.str_("cosine"), "cosine"),
    "big-endian": (np.array([1, 2], ">i4")[1], 2),
    "array": (np.arange(6.0).reshape(2, 3), [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]),
    "columns first": (np.asfortranarray([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
    "nothing": ((np.array([]), np.str_("")), ([], "")),
    "texts": (np.array(["cat", "dog"]), ["cat", "dog"]),
    "type": (np.float32, "numpy.float32"),
    "ordered": (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "default": (collections.defaultdict(list, {"a": [1]}), {"a": [1]}),
    "deque": (collections.deque([1, 2], maxlen=5), [1, 2]),
    "namespace": (argparse.Namespace(lr=0.1), argparse.Namespace(lr=0.1)),
    "simple namespace": (types.SimpleNamespace(lr=0.1), argparse.Namespace(lr=0.1)),
    "set": (frozenset({1, 2}), frozenset({1, 2})),
    "bytes": (b"abc", b"abc"),
    "version": (torch.torch_version.TorchVersion("2.1.0"), "2.1.0"),
    "date": (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2)),
    "time": (
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    ),
    "duration": (datetime.timedelta(days=1), datetime.timedelta(days=1)),
}  # fmt: skip
"""What is saved, and what it is read as."""


def with_program(path, change):
    """The archive with its pickle's bytes changed."""
    with zipfile.ZipFile(path) as source:
        entries = [(entry.filename, source.read(entry)) for entry in source.infolist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, content in entries:
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return path


@pytest.mark.parametrize("new_format", [True, False])
def test_hyper_parameters_of_harmless_types_load_as_plain_data(tiny_model, tmp_path, new_format):
    hyper = {name: given for name, (given, _) in PLAIN.items()} | {"dtype": np.dtype("f4")}
    path = tmp_path / "epoch=3.ckpt"
    content = {"state_dict": {f"model.{name}": each for name, each in tiny_model.state_dict().items()}}
    torch.save(content | {"hyper_parameters": hyper}, path, _use_new_zipfile_serialization=new_format)
    assert_same_weights(load_checkpoint(path, TINY_TEST).model, tiny_model)
    read = read_weight_file(path).beside["hyper_parameters"]
    assert repr(read.pop("dtype")) == "dtype('<f4')"
    assert read == {name: plain for name, (_, plain) in PLAIN.items()}


@pytest.mark.parametrize(
    ("value", "here", "elsewhere", "expected"),
    [
        (np.float64(2.5), "numpy._core.multiarray", "numpy.core.multiarray", 2.5),
        (np.arange(3), "numpy._core.multiarray", "numpy.core.multiarray", [0, 1, 2]),
        (pathlib.PurePosixPath("a"), "pathlib\nPurePosixPath", "pathlib\nPosixPath", pathlib.PurePosixPath("a")),
        (pathlib.PurePosixPath("a"), "pathlib\nPurePosixPath", "pathlib._local\nPosixPath", pathlib.PurePosixPath("a")),
        (pathlib.PureWindowsPath("a"), "pathlib\nPureW", "pathlib\nW", pathlib.PureWindowsPath("a")),
    ],
)
def test_names_of_other_systems_pythons_and_numpys_are_read_here(tmp_path, value, here, elsewhere, expected):
    path = saved({"value": value}, tmp_path / "a.pt")
    with_program(path, lambda content: content.replace(here.encode(), elsewhere.encode()))
    assert read_pickle(path) == {"value": expected}


def test_a_log_of_mmengine_is_left_out(tmp_path, monkeypatch):
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history = np.arange(3.0)
            self.method = HistoryBuffer.mean

        def mean(self) -> float:
            return 0.0

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    path = saved({"hub": HistoryBuffer(), "method": HistoryBuffer.mean, "epoch": 1}, tmp_path / "epoch_1.pth")
    read = read_pickle(path)
    assert (type(read["hub"]), type(read["method"]), read["epoch"]) == (Ignored, Ignored, 1)


# --- what could run ---------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def attacks(marker: pathlib.Path) -> dict[str, object]:
    """Calls that make the file `marker`, most of them through a type that is read."""
    touch = Call(pathlib.Path.touch, marker)
    return {
        "a method of a path": touch,
        "a method that is looked up": Call(getattr, pathlib.PosixPath, "touch"),
        "a function that is called with a path": Call(os.mkdir, str(marker)),
        "a factory": collections.defaultdict(functools.partial(os.mkdir, str(marker))),
        "a partial call": Call(functools.partial(os.mkdir, str(marker))),
        "an object in a NumPy scalar": Call(np.float64(0).__reduce__()[0], np.dtype("O"), pickle.dumps(touch)),
        "objects in a NumPy array": np.array([touch], dtype=object),
        "a text that is run": Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "a file that is opened": Call(open, str(marker), "w"),
        "a map": Call(list, Call(map, os.mkdir, [str(marker)])),
        "an attribute": Call(operator.attrgetter("touch")),
    }


@pytest.mark.parametrize("name", list(attacks(pathlib.Path("x"))))
@pytest.mark.parametrize("new_format", [True, False])
def test_what_runs_when_unpickled_is_refused_and_does_not_run(tiny_model, tmp_path, name, new_format):
    marker, path = tmp_path / "marker", tmp_path / "malicious.ckpt"
    content = {"state_dict": tiny_model.state_dict(), "hyper_parameters": {"x": attacks(marker)[name]}}
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    with pytest.raises(RefusedArtifactError, match="could run foreign code"):
        load_checkpoint(path, TINY_TEST)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["a method of a path", "a text that is run", "objects in a NumPy array", "a map"])
def test_the_attacks_are_real(tmp_path, name):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(attacks(marker)[name], 2))
    assert marker.exists()


def test_a_type_that_is_not_read_is_named_with_a_way_out(tiny_model, tmp_path):
    content = {"state_dict": tiny_model.state_dict(), "hyper_parameters": {"loss": torch.nn.CrossEntropyLoss()}}
    with pytest.raises(RefusedArtifactError) as caught:
        load_checkpoint(saved(content, tmp_path / "a.ckpt"), TINY_TEST)
    assert "torch.nn.modules.loss.CrossEntropyLoss" in str(caught.value)
    assert "torch.save(checkpoint['state_dict'], 'weights.pt')" in str(caught.value)


def test_a_whole_model_and_another_protocol_are_refused_with_the_reason(tiny_model, tmp_path):
    with pytest.raises(RefusedArtifactError, match=r"ConvNeXtV2.*model\.state_dict\(\) of a whole model"):
        read_pickle(saved(tiny_model, tmp_path / "whole.pt"))
    torch.save(tiny_model.state_dict(), tmp_path / "late.pt", pickle_protocol=4)
    with pytest.raises(RefusedArtifactError, match=r"another pickle protocol than torch\.save's own, 2"):
        read_pickle(tmp_path / "late.pt")


def test_training_states_are_read_without_stand_ins(tmp_path):
    """torch itself reads them afterwards, and takes none of these types."""
    path = saved({"path": pathlib.Path("a")}, tmp_path / "last.ckpt")
    with pytest.raises(RefusedArtifactError, match="pathlib"):
        read_pickle(path, stand_ins=False)


ARGUMENTS = st.recursive(
    st.sampled_from([0, -1, 3, 2**70, 0.5, None, True, "f8", "O", "U9999", "<", "a/b", "../..", b"", b"\0" * 8]),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(inner, max_size=8).map(tuple)),
    max_leaves=10,
)
STATES = st.one_of(
    ARGUMENTS,
    st.tuples(st.just(3), st.sampled_from("<>|O"), *[st.sampled_from([None, "a", ()])] * 3, st.just(-1), st.just(0)),
    st.tuples(st.just(1), ARGUMENTS, ARGUMENTS, ARGUMENTS, ARGUMENTS),
)
NAMES = sorted(name for _, name in _stand_ins())


def archive_of(path, name: str, arguments: tuple, state: object, *, makes: bool = False):
    """An archive whose pickle calls a name, or makes an object of it, and sets the result's state."""
    module, _, last = name.rpartition(".")
    given_arguments, given_state = (pickle.dumps(each, 2)[2:-1] for each in (arguments, state))
    start, call = f"c{module}\n{last}\n".encode(), b"\x81" if makes else b"R"
    program = b"\x80\x02" + start + given_arguments + call + given_state + b"b."
    return with_program(saved({}, path), lambda content: program)


@QUICK
@given(name=st.sampled_from(NAMES), arguments=st.lists(ARGUMENTS, max_size=4), state=STATES, makes=st.booleans())
def test_fuzz_a_stand_in_takes_anything_or_is_an_error_and_touches_no_file(tmp_path, name, arguments, state, makes):
    path = archive_of(tmp_path / "a.pt", name, tuple(arguments), state, makes=makes)
    result_or_error(lambda: read_pickle(path), CorruptArtifactError, RefusedArtifactError)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "fields", [("<", None, ("a",), None), ("<", ("f8", (2,)), None, None), ("?", None, None, None)]
)
def test_a_numpy_type_of_several_fields_is_refused(tmp_path, fields):
    whole = archive_of(tmp_path / "a.pt", "numpy.dtype", ("f8", False, True), (3, "<", None, None, None, -1, -1, 0))
    assert repr(read_pickle(whole)) == "dtype('<f8')"
    with pytest.raises(RefusedArtifactError, match="NumPy type of several fields"):
        read_pickle(archive_of(tmp_path / "b.pt", "numpy.dtype", ("f8", False, True), (3, *fields, -1, -1, 0)))


@pytest.mark.parametrize(
    ("shape", "content", "is_read"),
    [
        ((2, 1), b"\1\2", True),
        ((10**9, 0), b"", False),
        ((1 << 40,), b"\0", False),
        ((-2,), b"\0", False),
        ((3,), b"\0", False),
    ],
)
def test_an_array_that_claims_more_than_its_bytes_is_refused(tmp_path, shape, content, is_read):
    kind = np.dtype("u1")
    path = archive_of(tmp_path / "a.pt", "numpy.ndarray", (), (1, shape, kind, False, content))
    if is_read:
        assert read_pickle(path) == [[1], [2]]
        return
    with pytest.raises((RefusedArtifactError, CorruptArtifactError)):
        read_pickle(path)
