"""A stand-in for Triton's ONNX Runtime backend, which no Python package carries: the same file and tensors, in Python.

Triton takes a folder `onnxruntime` with a model.py for the backend of that name, so that a repository is loaded as it
is. The requests of a batch are run together, as the backend in C++ does. Its speed says nothing of that one's.
"""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        file = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        tensors = [
            {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            for request in requests
        ]
        batch = {name: np.concatenate([row[name] for row in tensors]) for name in self.inputs}
        outputs = self.session.run(self.outputs, batch)
        ends = np.cumsum([len(row[self.inputs[0]]) for row in tensors])[:-1]
        shares = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [
            triton.InferenceResponse([triton.Tensor(*pair) for pair in zip(self.outputs, share, strict=True)])
            for share in shares
        ]
