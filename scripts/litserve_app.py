"""The server that `scripts/compare_servers.py` starts of LitServe: the same file, the same pixels, batches of eight.

`python litserve_app.py MODEL.onnx PREPROCESSING.json PORT`, in .venv-ray.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np
import onnxruntime

from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.pixels import pixels_of_file


class Logits(litserve.LitAPI):  # type: ignore[misc]
    """A picture as base64 -> its logits."""

    def __init__(self, model: Path, preprocessing: dict[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.model, self.preprocessing = model, Preprocessing.from_dict(preprocessing)

    def setup(self, device: str) -> None:
        """Open the file."""
        self.session = onnxruntime.InferenceSession(self.model, providers=["CPUExecutionProvider"])

    def decode_request(self, request: dict[str, str]) -> np.ndarray:
        """Make the pixels, (H, W, C) uint8."""
        return pixels_of_file(base64.b64decode(request["image"]), self.preprocessing)

    def predict(self, images: Any) -> Any:
        """Run a batch."""
        return self.session.run(["logits"], {"images": np.stack(images)})[0]

    def encode_response(self, output: np.ndarray) -> dict[str, list[float]]:
        """The logits as JSON."""
        return {"logits": output.tolist()}


if __name__ == "__main__":
    model, preprocessing, port = sys.argv[1:]
    api = Logits(Path(model), json.loads(preprocessing), max_batch_size=8, batch_timeout=0.005)
    litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=60).run(
        host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning"
    )
