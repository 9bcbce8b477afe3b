"""What was compared, in Polygraphy's own files, so that its tools continue an investigation where we stop.

`polygraphy run FILE.onnx --onnxrt --load-inputs inputs.json --load-outputs reference.json` runs the file on the same
images and compares with the same PyTorch logits; `polygraphy run --load-outputs outputs-0000.json` compares two runners
whose logits were saved. Pickle is not involved: the arrays are base64 in JSON.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.strict_json import bounded_content, said_of, shortened

__all__ = ["INPUTS_NAME", "REFERENCE_NAME", "load_outputs", "outputs_from_json", "save_comparison", "save_outputs"]

INPUTS_NAME, REFERENCE_NAME = "inputs.json", "reference.json"
OUTPUT = "logits"
MAX_OUTPUTS_BYTES = 1 << 30
"""`saved_results` begins another file at 43 MB; a batch of 1024 images with 21,841 classes is 240 MB in one."""
NUMPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, 'shape': "
    rb"\((?P<rows>[0-9]{1,9}), (?P<columns>[0-9]{1,9})\), \} *\n",
    re.DOTALL,
)


class _Array(msgspec.Struct):
    array: bytes
    polygraphy_class: Literal["ndarray"]


class _Values(msgspec.Struct):
    values: _Array
    polygraphy_class: Literal["LazyArray"]


class _Outputs(msgspec.Struct):
    logits: _Values


class _Iteration(msgspec.Struct):
    outputs: _Outputs
    polygraphy_class: Literal["IterationResult"]


class _Results(msgspec.Struct):
    """What Polygraphy's RunResults file holds of a runner's logits: base64 of NumPy files."""

    lst: list[tuple[str, list[_Iteration]]]
    polygraphy_class: Literal["RunResults"]


def save_comparison(folder: Path, batches: Sequence[Tensor], logits: Tensor) -> tuple[Path, Path]:
    """Write the batches, images as the model takes them, and the reference's logits for them, cut the same way.

    Shapes: batches (n, …) each, logits (sum of n, num_classes); logits are saved in float32.
    Raises InputError when the numbers of images differ.
    """
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    sizes = [len(batch) for batch in batches]
    if sum(sizes) != len(logits):
        raise InputError(
            f"{sum(sizes)} images and logits of {len(logits)} cannot be saved as one comparison: expected as many. "
            "Give the logits of these images."
        )
    inputs, reference = folder / INPUTS_NAME, folder / REFERENCE_NAME
    with G_LOGGER.verbosity(G_LOGGER.WARNING), whole_file(inputs) as path:  # it tells of each file on stdout
        save_json([{"images": batch.cpu().numpy()} for batch in batches], str(path), "inputs")
    save_outputs(reference, {"torch-fp32": torch.split(logits, sizes)})
    return inputs, reference


def save_outputs(path: Path, logits: Mapping[str, Sequence[Tensor]]) -> None:
    """Write a Polygraphy RunResults file: the batches of logits, (n, num_classes) each, of every runner by name.

    Logits are saved in float32: exact for what a `Runner` gives, which is float32.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.logger import G_LOGGER

    results = RunResults()
    for runner, batches in logits.items():
        iterations = [{OUTPUT: batch.detach().float().cpu().contiguous().numpy()} for batch in batches]
        results.add(iterations, runner_name=runner)
    with G_LOGGER.verbosity(G_LOGGER.WARNING), whole_file(path) as temporary:
        results.save(str(temporary))


def load_outputs(path: Path) -> dict[str, list[Tensor]]:
    """Read what `save_outputs` wrote, to the bit: (n, num_classes) float32 each.

    Raises CorruptArtifactError when it is no RunResults file with logits, OSError where it cannot be read.
    """
    try:
        return outputs_from_json(bounded_content(path, MAX_OUTPUTS_BYTES))
    except ValueError as error:
        raise CorruptArtifactError(
            f"{path} holds no outputs of this project ({error}): expected Polygraphy's RunResults with {OUTPUT!r}. "
            "Save them again with cnx-deploy verify --save-outputs."
        ) from error


def outputs_from_json(content: bytes) -> dict[str, list[Tensor]]:
    """The same of a file's bytes; ValueError where they are something else. Takes no more memory than they justify."""
    try:
        results = msgspec.json.decode(content, type=_Results)
    except msgspec.ValidationError as error:
        raise ValueError(said_of(error)) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    found: dict[str, list[Tensor]] = {}
    for at, (runner, iterations) in enumerate(results.lst):
        if runner in found:
            raise ValueError(f"lst[{at}][0]: the runner {shortened(repr(runner))} is there twice")
        arrays = [each.outputs.logits.values.array for each in iterations]
        found[runner] = [_logits(array, f"lst[{at}][1][{number}]") for number, array in enumerate(arrays)]
    return found


def _logits(array: bytes, where: str) -> Tensor:
    """A NumPy file of version 1 in C order, as `numpy.save` writes logits; no other form is read."""
    header = NUMPY_HEADER.match(array)
    if header is None:
        raise ValueError(f"{where}: Expected a NumPy array of float32 with two dimensions")
    shape, size = (int(header["rows"]), int(header["columns"])), len(array) - header.end()
    if not all(shape) or size != 4 * shape[0] * shape[1] or header.end() != 10 + int.from_bytes(array[8:10], "little"):
        raise ValueError(f"{where}: an array of {shape[0]} x {shape[1]} float32 does not have {size:,} bytes")
    return torch.from_numpy(np.frombuffer(array, "<f4", offset=header.end()).reshape(shape).copy())
