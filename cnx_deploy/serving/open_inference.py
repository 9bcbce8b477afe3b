"""The Open Inference Protocol, version 2, over HTTP: from a request's bytes to tensors, and from tensors to an answer.

Source: kserve/open-inference-protocol, `specification/protocol/inference_rest.md`, and Triton's extension for binary
tensors, triton-inference-server/server, `docs/protocol/extension_binary_data.md`.
"""

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from cnx_deploy.core.errors import InputError

__all__ = ["DATATYPES", "HEADER_LENGTH", "Declared", "Wanted", "answer_of", "read_request"]

HEADER_LENGTH = "Inference-Header-Content-Length"
"""How many bytes of a body are JSON; binary tensors follow. 0: the body is one image file and nothing else."""
DATATYPES: dict[str, str] = {
    "bool": "BOOL", "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32",
    "float64": "FP64",
}  # fmt: skip
"""NumPy's name of an element type -> the protocol's."""
LARGEST = float(np.finfo(np.float32).max)
UNDERSTOOD = {
    "request": {"binary_data_output"},
    "input": {"binary_data_size", "content_type"},
    "output": {"binary_data"},
}


@dataclass(frozen=True, slots=True)
class Declared:
    """An input or output of a model; -1 in its shape is any number. "BYTES" are files of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the metadata of a model list it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Request(msgspec.Struct):
    inputs: list[_Tensor]
    id: str = ""
    outputs: list[_Output] = []
    parameters: dict[str, Any] = {}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for.

    `images`: the files of images, or an array (n, ...) of the network's own input. `outputs`: which to give, and
    whether as binary; None is all, as `is_binary` says.
    """

    images: Sequence[bytes] | np.ndarray
    id: str = ""
    outputs: tuple[tuple[str, bool], ...] | None = None
    is_binary: bool = False


def read_request(body: bytes, header_length: str | None, inputs: Sequence[Declared], outputs: Sequence[str]) -> Wanted:
    """Read the body of an inference request; `header_length` is the value of its header `HEADER_LENGTH`.

    Raises InputError for what is no request of the protocol, and for one that does not fit the model.
    """
    if header_length is not None and not (header_length.isascii() and header_length.isdigit()):
        raise InputError(f"The header {HEADER_LENGTH} is {header_length!r:.40}: expected a number of bytes.")
    length = len(body) if header_length is None else int(header_length[:20])
    if length > len(body):
        raise InputError(f"The header {HEADER_LENGTH} is {length}, and the body has {len(body)} bytes.")
    if length == 0 and header_length is not None:
        return Wanted([body])
    try:
        request = msgspec.json.decode(body[:length], type=_Request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(
            f"The body is no request of the Open Inference Protocol: {error}. Expected JSON such as "
            f'{{"inputs": [{{"name": "{inputs[0].name}", "datatype": "{inputs[0].datatype}", "shape": [1], …}}]}}.'
        ) from error
    _check_parameters("request", request.parameters)
    if len(request.inputs) != 1:
        names = " or ".join(repr(each.name) for each in inputs)
        raise InputError(f"The request has {len(request.inputs)} inputs: expected one, {names}.")
    tensor = request.inputs[0]
    images = _images(tensor, body[length:], inputs)
    is_binary = _switch("binary_data_output", request.parameters, default=False)
    return Wanted(images, request.id, _outputs(request, outputs, is_binary=is_binary), is_binary)


def answer_of(
    wanted: Wanted, outputs: Mapping[str, np.ndarray], *, model: str, version: str
) -> tuple[bytes, dict[str, str]]:
    """The body and the headers that answer a request with arrays (n, ...) of finite numbers."""
    listed, tail = list[dict[str, Any]](), list[bytes]()
    for name, is_binary in wanted.outputs or tuple((name, wanted.is_binary) for name in outputs):
        array = np.ascontiguousarray(outputs[name])
        row: dict[str, Any] = {"name": name, "datatype": DATATYPES[array.dtype.name], "shape": list(array.shape)}
        if is_binary:
            tail.append(array.tobytes())
            row["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            row["data"] = array.ravel().tolist()
        listed.append(row)
    named = {"id": wanted.id} if wanted.id else {}
    head = msgspec.json.encode({"model_name": model, "model_version": version, **named, "outputs": listed})
    if not tail:
        return head, {"content-type": "application/json"}
    return b"".join([head, *tail]), {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def _images(tensor: _Tensor, tail: bytes, inputs: Sequence[Declared]) -> Sequence[bytes] | np.ndarray:
    declared = next((each for each in inputs if each.name == tensor.name), None)
    if declared is None:
        known = " or ".join(f"{each.name!r} ({each.datatype})" for each in inputs)
        raise InputError(f"The model has no input {tensor.name!r:.80}: expected {known}.")
    if tensor.datatype != declared.datatype:
        raise InputError(
            f"The input {tensor.name!r} is {declared.datatype}, not {tensor.datatype!r:.40}. Nothing is cast."
        )
    _check_parameters("input", tensor.parameters)
    shape = _checked_shape(tensor, declared)
    size = tensor.parameters.get("binary_data_size")
    if size is None:
        if tail:
            raise InputError(f"{len(tail)} bytes follow the JSON, and no input has the parameter binary_data_size.")
        if tensor.data is None:
            raise InputError(f"The input {tensor.name!r} has neither data nor the parameter binary_data_size.")
        return _files_in_json(tensor, shape) if declared.datatype == "BYTES" else _numbers_in_json(tensor, shape)
    if tensor.data is not None:
        raise InputError(f"The input {tensor.name!r} has both data and the parameter binary_data_size. Give one.")
    if isinstance(size, bool) or not isinstance(size, int) or size != len(tail):
        raise InputError(f"binary_data_size is {size!r:.40}, and {len(tail)} bytes follow the JSON.")
    if declared.datatype == "BYTES":
        return _files_in_binary(tail, shape[0])
    dtype = np.dtype({"UINT8": "u1", "FP32": "<f4"}[declared.datatype])
    expected = math.prod(shape) * dtype.itemsize
    if expected != len(tail):
        raise InputError(f"Shape {tensor.shape} of {declared.datatype} has {expected} bytes, and {len(tail)} came.")
    return np.frombuffer(tail, dtype).reshape(shape)


def _checked_shape(tensor: _Tensor, declared: Declared) -> tuple[int, ...]:
    """The shape of a tensor that fits, as far as this can be said before its data are looked at."""
    shape = tuple(tensor.shape)
    if declared.datatype == "BYTES" and shape[1:] == (1,):  # as Triton's models of files have it
        shape = shape[:1]
    fits = len(shape) == len(declared.shape) and all(
        given > 0 and limit in (-1, given) for given, limit in zip(shape, declared.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"The input {tensor.name!r} has shape {list(declared.shape)} with -1 for any number, not "
            f"{str(list(shape))[:80]}."
        )
    return shape


def _files_in_json(tensor: _Tensor, shape: tuple[int, ...]) -> list[bytes]:
    """Files as base64, the way JSON can hold them; the parameter content_type has to say so."""
    if tensor.parameters.get("content_type") != "base64":
        raise InputError(
            'A text in JSON holds no image file. Send it as base64 with the parameter "content_type": "base64", or '
            "behind the JSON with binary_data_size, or as the whole body: see docs/endpoint.md."
        )
    texts = tensor.data if isinstance(tensor.data, list) else []
    if len(texts) != shape[0] or not all(isinstance(text, str) for text in texts):
        raise InputError(f"The input {tensor.name!r} of shape {list(shape)} needs a list of {shape[0]} texts.")
    try:
        return [base64.b64decode(text, validate=True) for text in texts]
    except (binascii.Error, ValueError) as error:
        raise InputError(f"The input {tensor.name!r} is no base64: {error}.") from error


def _files_in_binary(tail: bytes, count: int) -> list[bytes]:
    """Each file behind its length, four bytes with the lowest first."""
    files, at = list[bytes](), 0
    while at + 4 <= len(tail) and len(files) < count:
        (length,) = struct.unpack_from("<I", tail, at)
        if at + 4 + length > len(tail):
            break
        files.append(tail[at + 4 : at + 4 + length])
        at += 4 + length
    if len(files) != count or at != len(tail):
        raise InputError(
            f"The {len(tail)} bytes of the tensor are not {count} files, each behind its length in four bytes: "
            f"{len(files)} and {len(tail) - at} bytes more were read."
        )
    return files


def _numbers_in_json(tensor: _Tensor, shape: tuple[int, ...]) -> np.ndarray:
    expected, is_float = math.prod(shape), tensor.datatype == "FP32"
    # As objects: of texts NumPy would make each as long as the longest, gigabytes of a small body.
    array = np.array(tensor.data, dtype=object)
    kinds = {int, float} if is_float else {int}
    if array.shape not in (shape, (expected,)) or not set(map(type, array.flat)) <= kinds:
        raise InputError(
            f"The data of {tensor.name!r} have shape {list(array.shape)}: expected {expected} "
            f"{'numbers' if is_float else 'integers from 0 to 255'}, flat or as {list(shape)}."
        )
    least, most = (-LARGEST, LARGEST) if is_float else (0, 255)
    if array.min() < least or array.max() > most:
        raise InputError(
            f"The data of {tensor.name!r} reach beyond {tensor.datatype}: expected {least:.6g} to {most:.6g}."
        )
    return array.reshape(shape).astype(np.float32 if is_float else np.uint8)


def _outputs(request: _Request, known: Sequence[str], *, is_binary: bool) -> tuple[tuple[str, bool], ...] | None:
    chosen = list[tuple[str, bool]]()
    for output in request.outputs:
        if output.name not in known:
            raise InputError(f"The model has no output {output.name!r:.80}: expected {', '.join(known)}.")
        _check_parameters("output", output.parameters)
        chosen.append((output.name, _switch("binary_data", output.parameters, default=is_binary)))
    if len({name for name, _ in chosen}) != len(chosen):
        raise InputError("The request names an output twice.")
    return tuple(chosen) or None


def _check_parameters(what: str, given: Mapping[str, Any]) -> None:
    if unknown := sorted(given.keys() - UNDERSTOOD[what]):
        hint = " Classes with their names are given by /v1/classify." if unknown[0] == "classification" else ""
        raise InputError(
            f"The parameter {unknown[0]!r:.80} of the {what} is not supported: expected "
            f"{', '.join(sorted(UNDERSTOOD[what]))}.{hint}"
        )


def _switch(name: str, given: Mapping[str, Any], *, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise InputError(f"The parameter {name} is true or false, not {value!r:.40}.")
    return value
