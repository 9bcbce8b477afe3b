"""The model of a Triton server that makes a network's images of encoded pictures: JPEG, PNG, WebP and others.

`serving.triton` writes this file into a model repository as model.py, beside pixels.py, a copy of `data.pixels`, and
preprocessing.json. It runs in Triton's python backend on NumPy (1 or 2, as the server has it) and Pillow.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL

__all__ = ["TritonPythonModel", "network_input"]


class TritonPythonModel:
    """Triton's name for a model in Python. Input: encoded pictures, one a row. Output: the network's input.

    A picture that cannot be taken fails its own request, with a sentence, and no other of the same batch.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Read how images are made, once when the model is loaded."""
        import pixels
        import triton_python_backend_utils

        self.pixels, self.triton = pixels, triton_python_backend_utils
        record = json.loads(Path(__file__).with_name("preprocessing.json").read_text(encoding="utf-8"))
        self.kind, self.input, self.output = record["input_kind"], record["input"], record["output"]
        self.preprocessing = SimpleNamespace(**record["preprocessing"])
        if PIL.__version__ != record["pillow"]:
            triton_python_backend_utils.Logger.log_warn(
                f"Pillow {PIL.__version__} makes the images here, and {record['pillow']} was there when the "
                "repository was written: pixels can differ by a level."
            )

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request by itself."""
        return [self.response(request) for request in requests]

    def response(self, request: Any) -> Any:
        """The images of a request's pictures, or why one of them is none."""
        files = self.triton.get_input_tensor_by_name(request, self.input).as_numpy().reshape(-1)
        images = []
        for number, file in enumerate(files, start=1):
            try:
                made = self.pixels.pixels_of_file(bytes(file), self.preprocessing)
            except self.pixels.InputError as error:
                place = f"Image {number} of {len(files)}: " if len(files) > 1 else ""
                reason = self.triton.TritonError(f"{place}{error}", self.triton.TritonError.INVALID_ARG)
                return self.triton.InferenceResponse(error=reason)
            images.append(network_input(made, self.kind, self.preprocessing))
        return self.triton.InferenceResponse([self.triton.Tensor(self.output, np.stack(images))])


def network_input(pixels: np.ndarray, kind: str, preprocessing: Any) -> np.ndarray:
    """Pixels (H, W, C) uint8 -> what a network of input `kind` takes of one image, as `data.preprocessing` does.

    "uint8": the pixels; "float": (C, H, W) float32 in [0, 1]; "normalised": the same less the mean, divided by std.
    """
    if kind == "uint8":
        return pixels
    unit = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32) / np.float32(255.0)
    if kind == "float":
        return unit
    mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (unit - mean) / std
