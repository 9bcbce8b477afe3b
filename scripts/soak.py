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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.manifest import Artifact, ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.verification.predict import open_predictor
from cnx_deploy.verification.verify import verify_export

SMALLEST = Variant("soak", (1, 1, 1, 1), (8, 16, 32, 64), 0, None)
SIZE = 32
MAX_SLOPE_KB = {"cycles": 3000.0, "predictions": 1.0}
"""Growth of resident memory a turn. torch 2.14 keeps 1.4 MB of each trace until the process ends."""
MAX_SLOPE_FILES = 0.001


def main() -> int:
    """Run both and print a document."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--predictions", type=int, default=10_000)
    asked = parser.parse_args()
    if min(asked.cycles, asked.predictions) < 10:
        parser.error("a slope takes at least 10 turns of each")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = {
            "cycles": measured("cycles", asked.cycles, lambda turn: cycle(folder / "cycle", turn)),
            "predictions": measured("predictions", asked.predictions, predictions(folder / "kept")),
        }
    print(json.dumps(found, indent=2))
    grows = [
        row["kilobytes_a_turn"] > MAX_SLOPE_KB[name] or row["files_a_turn"] > MAX_SLOPE_FILES
        for name, row in found.items()
    ]
    return 3 if any(grows) else 0


def measured(name: str, turns: int, turn: Callable[[int], None]) -> dict[str, Any]:
    """Run so many turns, look at the process after each, and say how resident memory and open files grow."""
    resident, files, started = list[float](), list[int](), time.perf_counter()
    for at in range(turns):
        turn(at)
        if name == "cycles" or at % 100 == 0:
            gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        resident.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e3)
        files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - names alone
        if sys.stderr.isatty() or at % max(1, turns // 10) == 0:
            print(f"{name} {at + 1} of {turns}: {resident[-1] / 1e3:.1f} MB, {files[-1]} files", file=sys.stderr)
    half = turns // 2
    memory_slope, file_slope = (float(np.polyfit(range(half, turns), row[half:], 1)[0]) for row in (resident, files))
    return {
        "turns": turns,
        "seconds": round(time.perf_counter() - started, 1),
        "resident_mb": [round(resident[at] / 1e3, 1) for at in (0, half, -1)],
        "kilobytes_a_turn": round(memory_slope, 3),
        "open_files": [files[0], files[-1]],
        "files_a_turn": round(file_slope, 5),
    }


def cycle(folder: Path, turn: int) -> None:
    """Export with every check, by turns in FP32 and FP16, and delete."""
    exported(folder, "fp16" if turn % 2 else "fp32")
    shutil.rmtree(folder)


def predictions(folder: Path) -> Callable[[int], None]:
    """One opened file, one image a turn."""
    path, image = exported(folder, "fp32").path, folder / "image.png"
    Image.fromarray(next(image_like_batches(1, SIZE, batch_size=1))[0].numpy()).save(image)
    model = open_predictor(path)

    def predict(turn: int) -> None:
        answer = model.predict(image)
        if answer.error is not None:
            raise RuntimeError(answer.error)

    return predict


def exported(folder: Path, precision: str) -> Artifact:
    """What the command does: export, graph check, comparison with PyTorch."""
    model = random_model(SMALLEST, 10, seed=0)
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord(SMALLEST.name, 10, SIZE, weights, Preprocessing(image_size=SIZE))
    spec = ExportSpec(deploy=DeploySpec(precision, SIZE), batch=(1, 2, 4))  # type: ignore[arg-type]
    return export_onnx(model, record, spec, folder, verify=partial(verify_export, model=model))


if __name__ == "__main__":
    sys.exit(main())
