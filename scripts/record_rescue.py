"""Rescue files of several libraries and record the proof, and kernels and bytes before and after.

usage: record_rescue.py [--only TEXT] [--record FILE]      (a quarter of an hour on two processors; needs TensorRT-RTX)

Weights are random, GRN's too. Files are exported here by both of torch's exporters, into a temporary folder.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

import cnx_deploy as cnx
from cnx_deploy.core.system import tool_versions
from cnx_deploy.core.variants import find_variant
from tests.support.foreign_files import Logits, TextEncoder, exported, heat, network, segmenter
from tests.support.foreign_models import randomise

TARGET = "sm89"
Case = tuple[str, nn.Module, dict[str, Any]]


def cases() -> list[Case]:
    """Graphs by name, the network, and how it is exported."""
    found: list[Case] = []
    for variant in ("atto", "femto", "pico"):
        size = find_variant(variant)
        found.append((f"timm {variant}", network("timm", size), {"opset": 17}))
        found.append((f"transformers {variant}", network("transformers", size), {"opset": 17}))
        found.append((f"transformers {variant} .half()", network("transformers", size), {"opset": 17, "half": True}))
        # timm's half by the older exporter is no valid ONNX: norms have gains of another type than their tensors.
        found.append((f"timm {variant} .half()", network("timm", size), {"opset": 20, "half": True, "dynamo": True}))
    atto = find_variant("atto")
    found += [
        ("transformers atto, newer exporter", network("transformers", atto), {"opset": 22, "dynamo": True}),
        (
            "transformers atto .half(), hot weights",
            heat(network("transformers", atto), 100.0),
            {"opset": 17, "half": True},
        ),
        ("timm atto, tagger", network("tagger", atto), {"opset": 17}),
        ("torchvision V1 of atto's size", network("torchvision", find_variant("v1-atto")), {"opset": 17}),
        (
            "transformers UPerNet on atto, 128 channels",
            randomise(Logits(segmenter(atto, 150, 128))).eval(),
            {"opset": 18, "shape": (2, 3, 192, 192)},
        ),
        (
            "1-D blocks of a text-to-speech model, 256 channels",
            randomise(TextEncoder(256)).eval(),
            {"opset": 17, "shape": (2, 20, 400)},
        ),
    ]
    return found


def rescued(case: Case, folder: Path) -> dict[str, Any]:
    """Export one network, rescue the file and say what came of it."""
    name, model, words = case
    words = {"shape": (2, 3, 224, 224), **words}
    path = exported(model, folder / "model.onnx", **words)
    told: list[str] = []
    found = cnx.rescue(path, output_dir=folder / "export", target=TARGET, force=True, note=told.append)
    document = found.to_dict()
    return {
        "graph": name,
        "exporter": "torch.export" if words.get("dynamo") else "TorchScript",
        "opset": found.opset,
        "source_precision": found.source_precision,
        "input": list(words["shape"]),
        "islands": document["islands"],
        "not_recognised": document["not_recognised"],
        "casts": found.casts,
        "fp32_relative_l2": max(result.differences.relative_l2_max for result in found.fp32),
        "fp16_relative_l2": max((result.differences.relative_l2_max for result in found.fp16), default=None),
        "fp16_not_run": found.not_run,
        "naive": found.naive,
        "compiled": document["compiled"],
        "notes": [text for text in told if "not compiled" in text],
    }


def main() -> int:
    """Print one line a graph; with --record, write them as JSON after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="graphs whose name has this text")
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    rows = []
    for case in cases():
        if options.only not in case[0]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            row = rescued(case, Path(folder))
        rows.append(row)
        kernels = {name: (made["kernels"], made["megabytes_per_image"]) for name, made in row["compiled"].items()}
        print(f"{row['graph']:50} FP16 {row['fp16_relative_l2']}, naive {row['naive']}; {kernels}", flush=True)
        if options.record:
            document = {
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["scripts/record-rescue", *sys.argv[1:]]),
                "target": TARGET,
                "tools": tool_versions(),
                "rows": rows,
            }
            options.record.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
