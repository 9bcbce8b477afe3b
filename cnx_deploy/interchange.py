"""What was compared, in Polygraphy's own files, so that its tools continue an investigation where we stop.

`polygraphy run FILE.onnx --onnxrt --load-inputs inputs.json --load-outputs reference.json` runs the file on the same
images and compares with the same PyTorch logits; `polygraphy run --load-outputs outputs-0000.json` compares two runners
whose logits were saved. Pickle is not involved: the arrays are base64 in JSON.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.errors import CorruptArtifactError, InputError
from cnx_deploy.whole_files import whole_file

__all__ = ["INPUTS_NAME", "REFERENCE_NAME", "load_outputs", "save_comparison", "save_outputs"]

INPUTS_NAME, REFERENCE_NAME = "inputs.json", "reference.json"
OUTPUT = "logits"


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
        iterations = [{OUTPUT: batch.detach().float().cpu().numpy()} for batch in batches]
        results.add(iterations, runner_name=runner)
    with G_LOGGER.verbosity(G_LOGGER.WARNING), whole_file(path) as temporary:
        results.save(str(temporary))


def load_outputs(path: Path) -> dict[str, list[Tensor]]:
    """Read what `save_outputs` wrote, to the bit.

    Check the file's hash first. Raises CorruptArtifactError when it is no RunResults file with logits.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.WARNING):
            results = RunResults.load(str(path))
        return {name: [torch.from_numpy(each[OUTPUT].copy()) for each in batches] for name, batches in results.items()}
    except (PolygraphyException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifactError(
            f"{path} holds no outputs of this project ({error}): expected Polygraphy's RunResults with {OUTPUT!r}. "
            "Save them again with cnx-deploy verify --save-outputs."
        ) from error
