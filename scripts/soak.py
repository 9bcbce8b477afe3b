"""Does anything grow? Export → verify → delete of the smallest network, then predictions: memory and open files.

`soak.py` runs 1,000 cycles and 10,000 predictions, an hour or two; `--cycles 50 --predictions 1000` takes some
minutes. Slopes are least squares over the second half, when caches are warm. Exit code 3 where one is above its limit.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import ImageFiles, image_like_batches
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.verification.predict import open_predictor, predict_images
from cnx_deploy.verification.verify import verify_export

SMALLEST = Variant("soak", (1, 1, 1, 1), (8, 16, 32, 64), 0, None)
SIZE = 32
MAX_SLOPE_KB = {"cycles": 3000.0, "predictions": 1.0}
"""Growth of resident memory a turn. torch 2.14 keeps 1.4 MB of each trace until the process ends."""
MAX_SLOPE_FILES = 0.001
WEIGHTS = WeightsRecord("random", "0", "0" * 64, "none (random weights)")


@dataclass(frozen=True, slots=True)
class Growth:
    """Resident memory and open files after each turn."""

    name: str
    resident_kb: tuple[float, ...]
    files: tuple[int, ...]
    seconds: float

    def slopes(self) -> tuple[float, float]:
        """Kilobytes and files a turn, over the second half."""
        half = len(self.files) // 2
        at = np.arange(half, len(self.files))
        return float(np.polyfit(at, self.resident_kb[half:], 1)[0]), float(np.polyfit(at, self.files[half:], 1)[0])

    def to_dict(self) -> dict[str, object]:
        """Plain types."""
        memory, files = self.slopes()
        return {
            "turns": len(self.files),
            "seconds": round(self.seconds, 1),
            "resident_mb": [round(self.resident_kb[at] / 1e3, 1) for at in (0, len(self.files) // 2, -1)],
            "kilobytes_a_turn": round(memory, 3),
            "open_files": [self.files[0], self.files[-1]],
            "files_a_turn": round(files, 5),
        }

    def grows(self) -> bool:
        """Whether a slope is above its limit."""
        memory, files = self.slopes()
        return memory > MAX_SLOPE_KB[self.name] or files > MAX_SLOPE_FILES


def main() -> int:
    """Run both and print a document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--predictions", type=int, default=10_000)
    asked = parser.parse_args()
    if min(asked.cycles, asked.predictions) < 10:
        print("A slope takes at least 10 turns of each.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [
            measured("cycles", asked.cycles, lambda turn: cycle(folder / "cycle", turn)),
            measured("predictions", asked.predictions, predictions(folder / "kept")),
        ]
    print(json.dumps({growth.name: growth.to_dict() for growth in found}, indent=2))
    return 3 if any(growth.grows() for growth in found) else 0


def measured(name: str, turns: int, turn: Callable[[int], None]) -> Growth:
    """Run so many turns and look at the process after each."""
    resident, files, started = [], [], time.perf_counter()
    for at in range(turns):
        turn(at)
        if name == "cycles" or at % 100 == 0:
            gc.collect()
        resident.append(resident_kb())
        files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - names alone
        if sys.stderr.isatty() or at % max(1, turns // 10) == 0:
            print(f"{name} {at + 1} of {turns}: {resident[-1] / 1e3:.1f} MB, {files[-1]} files", file=sys.stderr)
    return Growth(name, tuple(resident), tuple(files), time.perf_counter() - started)


def cycle(folder: Path, turn: int) -> None:
    """Export with every check, by turns in FP32 and FP16, and delete."""
    exported(folder, "fp16" if turn % 2 else "fp32")
    shutil.rmtree(folder)


def predictions(folder: Path) -> Callable[[int], None]:
    """One opened file, one image a turn."""
    path, image = exported(folder, "fp32").path, folder / "image.png"
    Image.fromarray(next(image_like_batches(1, SIZE, batch_size=1))[0].numpy()).save(image)
    predictor = open_predictor(path)

    def predict(turn: int) -> None:
        (answer,) = predict_images(predictor, ImageFiles((image,)))
        if answer.error is not None:
            raise RuntimeError(answer.error)

    return predict


def exported(folder: Path, precision: str) -> Artifact:
    """What the command does: export, graph check, comparison with PyTorch."""
    model = random_model(SMALLEST, 10, seed=0)
    record = ModelRecord(SMALLEST.name, 10, SIZE, WEIGHTS, Preprocessing(image_size=SIZE))
    spec = ExportSpec(deploy=DeploySpec(precision, SIZE), batch=(1, 2, 4))  # type: ignore[arg-type]
    check = partial(verify_export, model=model)
    return export_onnx(model, record, spec, folder, verify=check)


def resident_kb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e3


if __name__ == "__main__":
    sys.exit(main())
