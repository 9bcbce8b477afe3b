"""Compile our FP16 graph and the peers' with the same TensorRT-RTX and print kernels and MB an image of each.

usage: compare_traffic.py [VARIANT ...] [--task segment|detect] [--batch 64] [--target sm89] [--image-size 224]
       [--fused stored|recomputed|auto] [--only-ours] [--record FILE] [--resume]
       (default: atto; options that take several values are repeated)

The peers are timm's and transformers' models, `.half()`, exported by torch.onnx.export as they are. For Turing (sm75)
our graph is written as `build-trt` writes it, with depthwise convolutions in groups. With --task segment they are
UPerNet of 150 classes: ours with logits at a quarter of the canvas and with labels of the canvas; transformers' as it
is, which brings the logits to the canvas, with an argmax behind it, and without that resize. With --task detect they
are our Mask R-CNN of 80 classes, with masks and with boxes alone: no exporter takes a peer's to this compiler. Each
kernel's inputs, constants and outputs count once, also where a kernel reads a tensor in two places. With --fused our
graph is counted with own kernels too: the bytes of those are what they declare to the compiler. The record is written
anew after each graph; with --resume the rows that it has already are kept, where the same versions made them.
"""

import argparse
import datetime
import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.hidden_tensor import FUSED_MODES, FusedMode, hidden_by_stage
from cnx_deploy.core.image_size import ImageSize, parse_image_size, size_text
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import package_version, tool_versions
from cnx_deploy.core.variants import VARIANTS, find_variant
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.exporters.trt.compiling import measure_isolated
from cnx_deploy.exporters.trt.depthwise import written_for
from cnx_deploy.exporters.trt.plugins import parser_environment
from cnx_deploy.model.convnextv2 import random_model

ROWS_DEPEND_ON = ("cnx-deploy", "tensorrt-rtx", "torch", "onnx", "onnxscript", "timm", "transformers")


def main() -> int:
    """Print one line a graph; with --record, write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("variants", nargs="*", default=["atto"], metavar="VARIANT", help=", ".join(VARIANTS))
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--target", action="append")
    parser.add_argument(
        "--image-size", type=parse_image_size, action="append", help="224, or height and width: 800x1344"
    )
    parser.add_argument("--task", choices=sorted(GRAPHS), default="classification")
    parser.add_argument("--fused", choices=FUSED_MODES, action="append", default=[])
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    options.known = known_rows(options.record) if options.resume and options.record else {}
    options.batch, options.target = options.batch or [64], options.target or ["sm89"]
    rows: list[dict[str, Any]] = []
    print(f"{'variant':8} {'px':>4} {'target':6} {'batch':>5} {'graph':22} {'kernels':>8} {'MB an image':>12} of peer")
    for name, size in itertools.product(options.variants, options.image_size or [224]):
        for row in measured(name, size, options):
            share = f"{row['of_best_peer']:.3f}" if row["of_best_peer"] else ""
            print(
                f"{name:8} {size_text(size):>4} {row['target']:6} {row['batch']:>5} {row['graph']:22} "
                f"{row['kernels']:>8} {row['megabytes_per_image']:>12.2f} {share}",
                flush=True,
            )
            rows.append(row)
            if options.record:
                done = {key_of(row) for row in rows}
                record(options.record, [*rows, *(row for key, row in options.known.items() if key not in done)])
    return 0


def record(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows with date, command and versions; one line a row, for there may be hundreds."""
    peers = {name: package_version(name) or "not installed" for name in ("timm", "transformers")}
    document = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["scripts/compare_traffic.py", *sys.argv[1:]]),
        "tools": {**tool_versions(), **peers},
    }
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps({**document, "rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n]')
    path.write_text(f"{text}\n", encoding="utf-8")


def measured(name: str, size: ImageSize, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of one variant at one size: each graph is exported once and compiled for every target and batch."""
    shown = size if isinstance(size, int) else list(size)
    graphs = [row for row in GRAPHS[options.task] if row.peers or not options.only_ours]
    with tempfile.TemporaryDirectory() as folder:
        paths: dict[str, Path] = {}
        for target, batch in itertools.product(options.target, options.batch):
            found = {"variant": name, "image_size": shown, "target": target, "batch": batch}
            bytes_of: dict[str, float] = {}
            compiled: dict[tuple[str, ...], dict[str, Any]] = {}  # two modes may choose alike in every stage
            for row in graphs:
                modes = options.fused if row.peers else []
                for mode in (None, *modes):
                    graph = row.graph if mode is None else f"{row.graph}, {mode}"
                    known = options.known.get(key_of({**found, "graph": graph}))
                    if known is None:
                        if row.graph not in paths:
                            paths[row.graph] = row.export(name, size, Path(folder))
                        best = min((bytes_of[peer] for peer in row.peers if peer in bytes_of), default=None)
                        key = (row.graph, *(hidden_by_stage(mode, find_variant(name).dims, target) if mode else ()))
                        if key not in compiled:
                            compiled[key] = figures(paths[row.graph], target, batch, row, mode, best)
                        known = {**found, "graph": graph, **compiled[key]}
                    bytes_of[graph] = known["megabytes_per_image"]
                    yield known


def known_rows(path: Path) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of an earlier record by variant, size, target, batch and graph."""
    document = json.loads(path.read_bytes())
    now = {**tool_versions(), **{name: package_version(name) for name in ("timm", "transformers")}}
    if other := [name for name in ROWS_DEPEND_ON if document["tools"].get(name) != now.get(name)]:
        raise SystemExit(f"{path} was made with another {', '.join(other)}: leave --resume out")
    return {key_of(row): row for row in document["rows"]}


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row is of."""
    return tuple(str(row[name]) for name in ("variant", "image_size", "target", "batch", "graph"))


def figures(
    path: Path, target: str, batch: int, row: "Row", mode: FusedMode | None, best: float | None
) -> dict[str, Any]:
    """Compile a graph, with own kernels in a `mode`. `best`: megabytes an image of the better peer."""
    if mode is None:
        with written_for(path, target if row.peers else "as exported") as written:
            compiled = measure_compiled(written, batch=batch, target=target, backend=load_backend("tensorrt-rtx"))
    else:
        with parser_environment() as environment:
            compiled = measure_isolated(path, target, batch, fused=mode, environment=environment)
    return {
        "kernels": compiled.kernels,
        "megabytes_per_image": round(compiled.megabytes_per_image, 3),
        "plan_megabytes": round((compiled.plan_bytes or 0) / 1e6, 2),
        "of_best_peer": round(compiled.megabytes_per_image / best, 4) if best else None,
    }


def own_file(
    name: str, size: ImageSize, folder: Path, task: str = "classification", outputs: tuple[str, ...] = ()
) -> Path:
    """Our deploy form."""
    classes = {"segment": 150, "detect": 80}.get(task, 1000)
    weights, made = WeightsRecord("random", "0", "0" * 64, "none"), Preprocessing(image_size=size)
    record = ModelRecord(name, classes, size, weights, made, task=task)
    spec = ExportSpec(
        deploy=DeploySpec(precision="fp16", image_size=size, outputs=outputs), name="-".join((name, task, *outputs))
    )
    return export_onnx(random_model(name, classes, task=task), record, spec, folder).path


def timm_file(name: str, size: int, folder: Path) -> Path:
    """The model of timm."""
    import timm

    return exported(timm.create_model(f"convnextv2_{name}"), size, folder / "timm.onnx")


def transformers_file(name: str, size: int, folder: Path) -> Path:
    """The model of transformers, its logits alone."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    variant = find_variant(name)
    config = ConvNextV2Config(depths=list(variant.depths), hidden_sizes=list(variant.dims), num_labels=1000)

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = ConvNextV2ForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images).logits

    return exported(Logits(), size, folder / "transformers.onnx")


def upernet_file(name: str, size: int, folder: Path, gives: str) -> Path:
    """Transformers' UPerNet: its logits at the size of the images, their best class, or the head's own logits."""
    from transformers import ConvNextV2Config, UperNetConfig, UperNetForSemanticSegmentation

    variant = find_variant(name)
    backbone = ConvNextV2Config(
        depths=list(variant.depths), hidden_sizes=list(variant.dims), out_features=[f"stage{at}" for at in range(1, 5)]
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=512, num_labels=150, use_auxiliary_head=False)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = UperNetForSemanticSegmentation(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if gives == "logits/4":
                return self.model.decode_head(self.model.backbone(images).feature_maps)
            logits = self.model(images).logits
            return logits.argmax(dim=1) if gives == "labels" else logits

    return exported(Network(), size, folder / f"upernet-{gives.replace('/', '-')}.onnx")


def exported(model: torch.nn.Module, size: int, path: Path) -> Path:
    """Half precision, dynamic batch, the exporter's own defaults otherwise."""
    images = torch.zeros(2, 3, size, size, dtype=torch.float16)
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval().half(), (images,), path, dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    return path


class Row(NamedTuple):
    """A graph that is compared: how it is exported and, of ours, the peers that give the same."""

    graph: str
    export: Callable[[str, int, Path], Path]
    peers: tuple[str, ...] = ()


GRAPHS: dict[str, tuple[Row, ...]] = {
    "classification": (
        Row("timm", timm_file),
        Row("transformers", transformers_file),
        Row("cnx-deploy", own_file, ("timm", "transformers")),
    ),
    "segment": (
        Row("transformers", partial(upernet_file, gives="logits")),
        Row("transformers, logits/4", partial(upernet_file, gives="logits/4")),
        Row("transformers, labels", partial(upernet_file, gives="labels")),
        Row("cnx-deploy", partial(own_file, task="segment"), ("transformers",)),
        Row("cnx-deploy, labels", partial(own_file, task="segment", outputs=("labels",)), ("transformers, labels",)),
    ),
    "detect": (
        Row("cnx-deploy", partial(own_file, task="detect")),
        Row("cnx-deploy, boxes", partial(own_file, task="detect", outputs=("boxes",))),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
