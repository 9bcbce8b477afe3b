"""The walk through an ONNX file's bytes counts what protobuf's own parser finds, or more, and never less."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnx_deploy.core.errors import ArtifactError, CorruptArtifactError, InputError, RefusedArtifactError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.onnx_wire import OnnxLimits, scan_onnx
from tests.support.hostile_onnx import field, varint, written

KINDS = {
    "ModelProto": "Model",
    "OperatorSetIdProto": "OperatorSet",
    "TrainingInfoProto": "TrainingInfo",
    "GraphProto": "Graph",
    "FunctionProto": "Function",
    "NodeProto": "Node",
    "AttributeProto": "Attribute",
    "SparseTensorProto": "SparseTensor",
    "TensorProto": "Tensor",
}
MANY = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def messages_in(message: Message) -> Iterator[Message]:
    """The message and every one within it, by protobuf's own reflection."""
    yield message
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_MESSAGE:
            for inner in value if descriptor.is_repeated else [value]:
                yield from messages_in(inner)


def _kinds(model: onnx.ModelProto) -> Iterator[str]:
    """The kind of each message that is walked; a function's own operator sets are not."""
    for each in messages_in(model):
        if type(each).__name__ in KINDS and not isinstance(each, onnx.OperatorSetIdProto):
            yield KINDS[type(each).__name__]
    yield from ("OperatorSet" for _ in model.opset_import)


def assert_same(path: Path) -> None:
    model = onnx.load(str(path), load_external_data=False)
    found = scan_onnx(path)
    assert found.messages == Counter(_kinds(model))
    assert set(found.domains) == {entry.domain for entry in model.opset_import} - {"", "ai.onnx"}
    tensors = [each for each in messages_in(model) if isinstance(each, onnx.TensorProto)]
    assert Counter((claim.name, claim.data_type, claim.dims, claim.external) for claim in found.tensors) == Counter(
        (
            tensor.name,
            tensor.data_type,
            tuple(tensor.dims),
            tuple((entry.key, entry.value) for entry in tensor.external_data),
        )
        for tensor in tensors
    )
    assert sum(claim.raw_bytes or 0 for claim in found.tensors) == sum(len(tensor.raw_data) for tensor in tensors)
    assert sum(claim.is_external for claim in found.tensors) == sum(
        tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in tensors
    )


def test_an_export_is_counted_as_protobuf_counts_it(tiny_onnx_fp16: Artifact) -> None:
    assert_same(tiny_onnx_fp16.path)


def test_a_file_with_outside_data_is_counted_as_protobuf_counts_it(tmp_path: Path) -> None:
    assert_same(written(tmp_path))


# Models of any shape: everything that can hold nodes or tensors, in everything that can hold it.

WORDS = st.text(max_size=6)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
TENSORS = st.builds(
    onnx.TensorProto,
    name=WORDS,
    dims=st.lists(NUMBERS, max_size=4),
    data_type=st.integers(0, 30),
    raw_data=st.binary(max_size=20),
    float_data=st.lists(st.floats(width=32), max_size=3),
    data_location=st.sampled_from([0, 1]),
    external_data=st.lists(st.builds(onnx.StringStringEntryProto, key=WORDS, value=WORDS), max_size=3),
)
SPARSE = st.builds(onnx.SparseTensorProto, values=TENSORS, indices=TENSORS, dims=st.lists(NUMBERS, max_size=2))


def _nodes(graphs: st.SearchStrategy[onnx.GraphProto]) -> st.SearchStrategy[onnx.NodeProto]:
    attributes = st.builds(
        onnx.AttributeProto,
        name=WORDS,
        ints=st.lists(NUMBERS, max_size=3),
        floats=st.lists(st.floats(width=32), max_size=3),
        t=st.none() | TENSORS,
        tensors=st.lists(TENSORS, max_size=2),
        g=st.none() | graphs,
        graphs=st.lists(graphs, max_size=1),
        sparse_tensor=st.none() | SPARSE,
        sparse_tensors=st.lists(SPARSE, max_size=1),
    )
    return st.builds(onnx.NodeProto, name=WORDS, op_type=WORDS, attribute=st.lists(attributes, max_size=2))


def _graphs(inner: st.SearchStrategy[onnx.GraphProto]) -> st.SearchStrategy[onnx.GraphProto]:
    return st.builds(
        onnx.GraphProto,
        name=WORDS,
        node=st.lists(_nodes(inner), max_size=2),
        initializer=st.lists(TENSORS, max_size=2),
        sparse_initializer=st.lists(SPARSE, max_size=1),
    )


GRAPHS = st.recursive(st.builds(onnx.GraphProto, name=WORDS), _graphs, max_leaves=3)
MODELS = st.builds(
    onnx.ModelProto,
    ir_version=st.integers(0, 20),
    opset_import=st.lists(st.builds(onnx.OperatorSetIdProto, domain=WORDS, version=NUMBERS), max_size=2),
    graph=st.none() | GRAPHS,
    functions=st.lists(st.builds(onnx.FunctionProto, node=st.lists(_nodes(GRAPHS), max_size=1)), max_size=1),
    training_info=st.lists(
        st.builds(onnx.TrainingInfoProto, algorithm=GRAPHS, initialization=st.none() | GRAPHS), max_size=1
    ),
)


@MANY
@given(model=MODELS)
def test_models_of_any_shape_are_counted_as_protobuf_counts_them(model: onnx.ModelProto, tmp_path: Path) -> None:
    path = tmp_path / "any.onnx"
    path.write_bytes(model.SerializeToString())
    assert_same(path)


@MANY
@given(model=MODELS, data=st.data())
def test_damaged_bytes_end_in_a_refusal_or_in_no_fewer_messages_than_protobuf_finds(
    model: onnx.ModelProto, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1)) : data.draw(st.integers(0, len(content)))] = data.draw(
            st.binary(max_size=4)
        )
        if not content:
            break
    path = tmp_path / "any.onnx"
    path.write_bytes(content)
    try:
        found = scan_onnx(path)
    except ArtifactError:
        return
    try:
        parsed = onnx.ModelProto.FromString(bytes(content))
    except DecodeError:
        return
    assert all(found.messages[kind] >= count for kind, count in Counter(_kinds(parsed)).items())


def test_a_size_in_a_field_of_another_type_is_none(tmp_path: Path) -> None:
    """As a fixed64 it would make any shape one of no bytes; a parser keeps it as a field that it does not know."""
    tensor = b"\x08\x05" + b"\x09" + bytes(8) + b"\x10\x01"
    path = tmp_path / "any.onnx"
    path.write_bytes(field(7, field(5, tensor)))
    assert list(onnx.load(str(path)).graph.initializer[0].dims) == [5]
    assert scan_onnx(path).tensors[0].dims == (5,)


def test_a_number_keeps_the_bits_that_a_parser_keeps(tmp_path: Path) -> None:
    tensor = b"\x70" + varint(1 << 32 | 1) + b"\x10" + varint(1 << 32 | 10)
    path = tmp_path / "any.onnx"
    path.write_bytes(field(7, field(5, tensor)))
    parsed, claimed = onnx.load(str(path), load_external_data=False).graph.initializer[0], scan_onnx(path).tensors[0]
    assert (claimed.is_external, claimed.data_type) == (parsed.data_location == 1, parsed.data_type) == (True, 10)


def test_a_field_whose_number_no_parser_reads_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "any.onnx"
    path.write_bytes(varint(1 << 35 | 7 << 3 | 2) + b"\x00")
    with pytest.raises(CorruptArtifactError, match="it is cut off or damaged at byte 0"):
        scan_onnx(path)


# Limits, each where it begins


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (OnnxLimits(file_bytes=100), "bytes, where at most 100 are expected"),
        (OnnxLimits(nodes=3), "4 or more nodes, where at most 3 are expected"),
        (OnnxLimits(fields=20), "21 or more fields, where at most 20 are expected"),
        (OnnxLimits(depth=1), "2 levels of messages, where at most 1 are expected"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(limits: OnnxLimits, text: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedArtifactError, match=text):
        scan_onnx(written(tmp_path), limits)


def test_what_is_at_a_limit_is_taken(tmp_path: Path) -> None:
    path = written(tmp_path)
    size = path.stat().st_size
    assert scan_onnx(path, OnnxLimits(file_bytes=size, nodes=4, depth=3)).messages["Node"] == 4


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "."])
def test_what_is_no_regular_file_is_not_read(path: str) -> None:
    with pytest.raises(InputError, match="it is no regular file, expected one"):
        scan_onnx(Path(path))
