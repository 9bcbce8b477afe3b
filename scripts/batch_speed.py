"""How fast a batch is beside a bare loop of ONNX Runtime on the same images, in turns.

    .venv/bin/python scripts/batch_speed.py --make photos               # 1,000 JPEG files of 500x375
    .venv-ray/bin/python scripts/batch_speed.py FILE.onnx photos --record docs/data/batch.json

The loops decode each file to the pixels of `predict` and call `session.run` on batches of 8, with all processors for
ONNX Runtime. One decodes image after image before each call, the other decodes a batch on all processors at once. The
rate of a batch is without its start, which stands beside it. Ratios are of one turn, in which everything ran once.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cnx_deploy as cnx
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.system import cpu_count, cpu_name, package_version
from cnx_deploy.data.pixels import pixels_of_file

BATCH = 8
SIZE = (500, 375)
LOOPS = ("loop", "loop, decoding on all processors")


def main() -> int:
    """Make the images, or measure and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="Crop sample photographs into 1,000 files.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--actors", type=int, default=cpu_count())
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    if asked.make:
        make_images(asked.make)
        return 0
    turns = measured(asked.model, asked.images, asked.turns, asked.actors)
    document = record(turns, asked.model, asked.actors)
    print(json.dumps(document, indent=2))
    if asked.record:
        asked.record.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def make_images(folder: Path, count: int = 1000) -> None:
    """Crops of scikit-learn's sample photographs at other places, some mirrored."""
    from sklearn.datasets import load_sample_images

    photographs, random = load_sample_images().images, np.random.default_rng(0)
    folder.mkdir(parents=True)
    for at in range(count):
        photograph = Image.fromarray(photographs[at % len(photographs)])
        left = random.integers(0, photograph.width - SIZE[0] + 1)
        top = random.integers(0, photograph.height - SIZE[1] + 1)
        crop = photograph.crop((left, top, left + SIZE[0], top + SIZE[1]))
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if at % 3 == 0 else crop
        crop.save(folder / f"{at:05}.jpg", quality=90)


def loop(model: Path, paths: list[Path], *, on_all: bool) -> tuple[float, dict[str, Any]]:
    """Images a second of the bare loop."""
    import onnxruntime

    artifact = open_artifact(model)
    preprocessing, deploy = artifact.manifest.model.preprocessing, artifact.manifest.deploy
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cpu_count()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    decode = partial(pixels_of_file, preprocessing=preprocessing)
    with ThreadPoolExecutor(cpu_count()) as pool:
        start = time.perf_counter()
        for first in range(0, len(paths), BATCH):
            some = paths[first : first + BATCH]
            pixels = np.stack(list(pool.map(decode, some) if on_all else map(decode, some)))
            if deploy.input_kind != "uint8":
                pixels = pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
            session.run(None, {name: np.ascontiguousarray(pixels)})
        return len(paths) / (time.perf_counter() - start), {}


def batch(model: Path, images: Path, **options: Any) -> tuple[float, dict[str, Any]]:
    """Images a second of a batch without its start."""
    with tempfile.TemporaryDirectory() as folder:
        result = cnx.batch(model, images, Path(folder) / "out", **options)
    assert result.errors == 0
    return float(result.images_per_second or 0.0), {"startup_seconds": round(result.startup_seconds, 1)}


def measured(model: Path, images: Path, turns: int, actors: int) -> list[dict[str, Any]]:
    """The rates of each turn."""
    paths = sorted(images.iterdir())
    ways = {
        LOOPS[0]: partial(loop, model, paths, on_all=False),
        LOOPS[1]: partial(loop, model, paths, on_all=True),
        "batch, local": partial(batch, model, images),
        "batch, ray": partial(batch, model, images, engine="ray", actors=actors),
    }
    for name in LOOPS:  # files into memory
        ways[name]()
    rows = []
    for _ in range(turns):
        load = os.getloadavg()[0]
        row: dict[str, Any] = {"load_average_before": round(load, 1)}
        for name, way in ways.items():
            rate, more = way()
            row[name] = {"images_per_second": round(rate, 2), **more}
            print(name, row[name], file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def record(turns: list[dict[str, Any]], model: Path, actors: int) -> dict[str, Any]:
    """Rates, and ratios to each loop in the median of the turns."""

    def ratio(way: str, to: str) -> float:
        rates = [(row[way]["images_per_second"], row[to]["images_per_second"]) for row in turns]
        return round(statistics.median(first / second for first, second in rates), 3)

    ways = [way for way in turns[0] if way.startswith("batch")]
    packages = ("ray", "onnxruntime-gpu", "onnxruntime", "pillow", "torch")
    conditions = {
        "model": model.name,
        "images": 1000,
        "size": list(SIZE),
        "batch": BATCH,
        "actors": actors,
        "cpu": cpu_name(),
        "processors": cpu_count(),
        "versions": {name: version for name in packages if (version := package_version(name))},
    }
    return {
        "command": "scripts/batch_speed.py",
        "conditions": conditions,
        "ratio_of_rates": {way: {to: ratio(way, to) for to in LOOPS} for way in ways},
        "turns": turns,
    }


if __name__ == "__main__":
    sys.exit(main())
