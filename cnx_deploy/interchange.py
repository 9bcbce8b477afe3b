"""What was compared, in Polygraphy's own files, so that `polygraphy run` continues an investigation where we stop.

`polygraphy run FILE.onnx --onnxrt --load-inputs inputs.json --load-outputs reference.json` runs the file on the same
images and compares with the same PyTorch logits. Pickle is not involved: the arrays are base64 in JSON.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cnx_deploy.errors import InputError

__all__ = ["INPUTS_NAME", "REFERENCE_NAME", "save_comparison"]

INPUTS_NAME, REFERENCE_NAME = "inputs.json", "reference.json"


def save_comparison(folder: Path, batches: Sequence[Tensor], logits: Tensor) -> tuple[Path, Path]:
    """Write the batches, images as the model takes them, and the reference's logits for them, cut the same way.

    Shapes: batches (n, …) each, logits (sum of n, num_classes); logits are saved in float32.
    Raises InputError when the numbers of images differ.
    """
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json
    from polygraphy.logger import G_LOGGER

    sizes = [len(batch) for batch in batches]
    if sum(sizes) != len(logits):
        raise InputError(f"{sum(sizes)} images and logits of {len(logits)} cannot be saved as one comparison.")
    folder.mkdir(parents=True, exist_ok=True)
    inputs, reference = folder / INPUTS_NAME, folder / REFERENCE_NAME
    results = RunResults()
    parts = torch.split(logits.float().cpu(), sizes)
    results.add([{"logits": part.numpy()} for part in parts], runner_name="torch-fp32")
    with G_LOGGER.verbosity(G_LOGGER.WARNING):  # it tells of each file on stdout, which is the result's
        save_json([{"images": batch.cpu().numpy()} for batch in batches], str(inputs), "inputs")
        results.save(str(reference))
    return inputs, reference
