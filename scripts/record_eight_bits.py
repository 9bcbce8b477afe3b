"""Record what FP8 and INT8 are worth beside FP16: bytes and kernels of engines, and accuracy of trained networks.

usage: record_eight_bits.py traffic VARIANT ... [--precision fp8] [--target sm89] [--batch 64]
       record_eight_bits.py dense VARIANT ... --task segment|detect --image-size 512 [and as traffic]
       record_eight_bits.py modelopt VARIANT ... [--graph timm] [--precision int8] [--target sm89] [--batch 64]
       record_eight_bits.py accuracy NAME=CHECKPOINT:FOLDER ... [--precision int8] [--method max] [--noise 96]
       record_eight_bits.py features NAME=CHECKPOINT:FOLDER ... [--precision int8] [--method max]
       each with [--record FILE] [--resume]; options that take several values are repeated

`traffic` compiles our graphs with TensorRT-RTX, `dense` those of UPerNet (150 classes) and of Mask R-CNN (80). The
weights are random, and scales and gains are made up: neither changes which tensors an engine stores, and so no byte.
`modelopt` quantises timm's, transformers' and our own FP16 graph with NVIDIA's quantiser as it comes, on images made
from a seed, in an environment of its own (scripts/modelopt).
`accuracy` and `features` calibrate on FOLDER/train and judge by FOLDER/val, as it is and with noise: the network as it
was trained; with its hidden tensors 50 times as large ("hot"); and with two hidden channels a block 30 times as large
("outliers"). The deploy form runs in PyTorch, which rounds to FP16 after each operator; one case of each network and
precision is exported and run by ONNX Runtime and by the emulator too. The record is written anew after each row; with
--resume it keeps the rows that it has already, of every part, where the same versions made them.
"""

import argparse
import copy
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_traffic import own_file, timm_file, transformers_file
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS, METHODS, PLACEMENTS, WITHOUT_SCALED_PRODUCT
from cnx_deploy.core.image_size import ImageSize, parse_image_size
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.precision import find_precision
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import package_version, tool_versions
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.data import evenly, find_images, image_like_batches
from cnx_deploy.data.input_spec import InputSpec
from cnx_deploy.diagnosis.calibration import calibrate, made_up_scales
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import load_backend
from cnx_deploy.exporters.trt.compiled import measure_compiled
from cnx_deploy.exporters.trt.depthwise import written_for
from cnx_deploy.model.checkpoint import LoadedModel, load_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.model.recorded import model_record
from cnx_deploy.model.tasks.base import network_outputs
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.runners.registry import RunnerOptions, find_runner, open_runner
from cnx_deploy.verification.evaluation import class_positions
from cnx_deploy.verification.parity import OutputComparison, comparable
from cnx_deploy.verification.retrieval import RunningRetrieval

ROWS_DEPEND_ON = (
    "cnx-deploy", "tensorrt-rtx", "onnxruntime-gpu", "torch", "onnx", "onnxscript", "timm", "transformers",
)  # fmt: skip
KEYS = {
    "traffic": ("variant", "image_size", "target", "batch", "precision"),
    "dense": ("variant", "task", "image_size", "target", "batch", "precision"),
    "modelopt": ("variant", "image_size", "target", "batch", "precision", "graph"),
    "accuracy": ("network", "change", "images", "precision", "method", "gains", "judge"),
    "features": ("network", "change", "images", "precision", "method", "gains", "judge"),
}
"""What a row of each part is of."""
IMAGE_SIZE = 224
PEERS: Mapping[str, Callable[[str, int, Path], Path]] = {
    "timm": timm_file,
    "transformers": transformers_file,
    "cnx-deploy": own_file,
}
"""The FP16 graphs that ModelOpt is given."""
MODELOPT = Path(__file__).with_name("modelopt")
CALIBRATED_ON, JUDGED_BY = 200, 500
"""Images, at most."""
BATCH, SLOW_BATCHES = 8, 3
"""Images run at once, and how often a runner is asked that computes an operator at a time."""
TORCH = "torch-deploy"
"""What judges by the deploy form in PyTorch; others are runners of files."""
HOT, OUTLIER, OUTLIERS = 50.0, 30.0, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a row; with --record, write them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    for part in PARTS:
        command = parts.add_parser(part)
        command.add_argument("--record", type=Path)
        command.add_argument("--resume", action="store_true")
        command.add_argument("--precision", action="append", choices=("fp16", *PLACEMENTS))
        if part == "dense":
            command.add_argument("--task", choices=("segment", "detect"), required=True)
            command.add_argument("--image-size", type=parse_image_size, required=True)
        if part in ("traffic", "dense", "modelopt"):
            command.add_argument("variants", nargs="+", metavar="VARIANT", help=", ".join(VARIANTS))
            command.add_argument("--target", action="append")
            command.add_argument("--batch", type=int, action="append")
            command.add_argument("--graph", action="append", choices=tuple(PEERS))
        else:
            command.add_argument("networks", nargs="+", type=Network.parse, metavar="NAME=CHECKPOINT:FOLDER")
            command.add_argument("--method", action="append", choices=METHODS)
            command.add_argument("--noise", type=float, default=96.0, help="standard deviation, of 255")
    options = parser.parse_args(arguments)
    command_line = ["scripts/record_eight_bits.py", *(sys.argv[1:] if arguments is None else arguments)]
    record = Record(options.record, " ".join(command_line), resume=options.resume)
    for row in PARTS[options.part](options, record):
        figures = {name: value for name, value in row.items() if name != "part"}
        print("  ".join(f"{name} {value}" for name, value in figures.items() if value not in (None, "")), flush=True)
        record.add(row)
    return 0


class Record:
    """The rows that are there, and their file, written anew with each one: a line a row, for there are hundreds."""

    def __init__(self, path: Path | None, command: str, *, resume: bool) -> None:
        peers = {name: package_version(name) or "not installed" for name in ("timm", "transformers")}
        self.path, self.tools = path, {**tool_versions(), **peers}
        self.rows: dict[tuple[str, ...], dict[str, Any]] = {}
        self.commands = [command]
        if path is not None and path.exists() and resume:
            document = json.loads(path.read_bytes())
            if other := [name for name in ROWS_DEPEND_ON if document["tools"].get(name) != self.tools.get(name)]:
                raise SystemExit(f"{path} was made with another {', '.join(other)}: leave --resume out")
            self.rows = {key_of(row): row for row in document["rows"]}
            self.commands = list(dict.fromkeys([*document["commands"], command]))

    def add(self, row: dict[str, Any]) -> None:
        """Take a row, in the place of one of the same."""
        self.rows[key_of(row)] = row
        if self.path is None:
            return
        document = {
            "date": datetime.date.today().isoformat(),
            "command": "scripts/record_eight_bits.py",
            "commands": self.commands,
            "tools": self.tools,
            "note": "Traffic is of random weights with made-up scales and gains: bytes do not depend on the values.",
            "rows": [],
        }
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        text = json.dumps(document, indent=1).replace('"rows": []', f'"rows": [\n{lines}\n]')
        self.path.write_text(f"{text}\n", encoding="utf-8")


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What a row is of."""
    return (row["part"], *(str(row[name]) for name in KEYS[row["part"]]))


# --- bytes of engines -------------------------------------------------------------------------------------------------


def traffic(options: argparse.Namespace, record: Record) -> Iterator[dict[str, Any]]:
    """Our graphs: each is exported once and compiled for every target and batch."""
    task, size = getattr(options, "task", "classification"), getattr(options, "image_size", IMAGE_SIZE)
    recorded = list(size) if isinstance(size, tuple) else size
    own_words = {"task": task} if options.part == "dense" else {}
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            paths: dict[str, Path] = {}
            for target, batch in itertools.product(options.target or ["sm89"], options.batch or [64]):
                for precision in options.precision or ["fp16", *PLACEMENTS]:
                    if not find_precision(precision).runs_on(target):
                        continue
                    words = {"variant": name, "image_size": recorded, "target": target, "batch": batch, **own_words}
                    row = {"part": options.part, **words, "precision": precision}
                    if (known := record.rows.get(key_of(row))) is None:
                        own = precision + (target if target in WITHOUT_SCALED_PRODUCT else "")
                        if own not in paths:
                            (Path(folder) / own).mkdir()
                            paths[own] = made_up_file(name, precision, Path(folder) / own, target, task, size)
                        known = {**row, **compiled(paths[own], target, batch, ours=True)}
                    yield known


def compiled(path: Path, target: str, batch: int, *, ours: bool) -> dict[str, Any]:
    """Kernels, megabytes an image and megabytes of the plan."""
    with written_for(path, target if ours else "as exported") as written:
        engine = measure_compiled(written, batch=batch, target=target, backend=load_backend("tensorrt-rtx"))
    return {
        "kernels": engine.kernels,
        "megabytes_per_image": round(engine.megabytes_per_image, 3),
        "plan_megabytes": round((engine.plan_bytes or 0) / 1e6, 2),
    }


def made_up_file(
    name: str, precision: str, folder: Path, target: str, task: str = "classification", size: ImageSize = IMAGE_SIZE
) -> Path:
    """Our deploy form of random weights, in eight bits on made-up scales, as it is exported for a target."""
    classes = {"segment": 150, "detect": 80}.get(task, 1000)
    model = random_model(name, classes, task=task)
    scales = made_up_scales(model, precision, size, targets=(target,)) if precision in PLACEMENTS else None
    weights, made = WeightsRecord("random", "0", "0" * 64, "none"), Preprocessing(image_size=size)
    record = ModelRecord(name, classes, size, weights, made, task=task)
    spec = ExportSpec(deploy=DeploySpec(precision=precision, image_size=size, eight_bits=scales))
    return export_onnx(model, record, spec, folder).path


def modelopt(options: argparse.Namespace, record: Record) -> Iterator[dict[str, Any]]:
    """The graphs of others and ours in FP16, quantised by NVIDIA's ModelOpt where it puts eight bits by itself."""
    version = subprocess.run([MODELOPT, "--version"], check=True, capture_output=True, text=True).stdout.strip()
    for name, graph in itertools.product(options.variants, options.graph or PEERS):
        with tempfile.TemporaryDirectory() as text:
            folder, paths = Path(text), dict[str, Path]()
            for target, batch in itertools.product(options.target or ["sm89"], options.batch or [64]):
                for precision in options.precision or ["fp16", *PLACEMENTS]:
                    if not find_precision(precision).runs_on(target):
                        continue
                    words = {"variant": name, "image_size": IMAGE_SIZE, "target": target, "batch": batch}
                    row = {"part": "modelopt", **words, "precision": precision, "graph": graph}
                    if (known := record.rows.get(key_of(row))) is None:
                        if "fp16" not in paths:
                            paths["fp16"] = PEERS[graph](name, IMAGE_SIZE, folder)
                        if precision not in paths:
                            paths[precision] = quantised(paths["fp16"], precision, folder / f"{precision}.onnx")
                        found = compiled(paths[precision], target, batch, ours=False)
                        known = {**row, **found, "modelopt": version}
                    yield known


def quantised(half: Path, precision: str, path: Path) -> Path:
    """Let ModelOpt put eight bits into an FP16 file, at its own choice of tensors and of scales."""
    import onnx

    (images,) = (each for each in onnx.load(half, load_external_data=False).graph.input)
    pixels = next(image_like_batches(8, IMAGE_SIZE, batch_size=8)).permute(0, 3, 1, 2).numpy() / 255.0
    kind = onnx.helper.tensor_dtype_to_np_dtype(images.type.tensor_type.elem_type)
    data = path.with_suffix(".npy")
    np.save(data, pixels.astype(kind))
    command = [MODELOPT, "--onnx_path", half, "--quantize_mode", precision, "--calibration_data_path", data]
    command += ["--calibration_eps", "cpu", "--output_path", path]
    if images.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
        # By default it takes a file of FP32 images to FP16, our FP32 islands too, where LayerNorm then overflows.
        command += ["--high_precision_dtype", "fp32"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ModelOpt refuses {half.name} in {precision}:\n{done.stderr[-2000:]}")
    return path


# --- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Network:
    """A trained network and the folder that it was trained on, with train and val."""

    name: str
    checkpoint: Path
    folder: Path

    @classmethod
    def parse(cls, text: str) -> "Network":
        """`digits=run/best.safetensors:digits`."""
        name, _, rest = text.partition("=")
        checkpoint, _, folder = rest.rpartition(":")
        if not (name and checkpoint and folder):
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=CHECKPOINT:FOLDER")
        return cls(name, Path(checkpoint), Path(folder))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """How a network is changed before, and how it is rounded; `method` is "" in FP16."""

    change: str
    precision: str
    method: str = ""
    gains: bool = False


def accuracy(options: argparse.Namespace, record: Record) -> Iterator[dict[str, Any]]:
    """Classes of held-out images, of the deploy form beside the training form in FP32."""
    return judged(options, record, "classification", CHANGES)


def features(options: argparse.Namespace, record: Record) -> Iterator[dict[str, Any]]:
    """Embeddings of held-out images, and their nearest neighbours."""
    return judged(options, record, "features", {"": CHANGES[""]})


def judged(
    options: argparse.Namespace, record: Record, task: str, changes: Mapping[str, Callable[[ConvNeXtV2], ConvNeXtV2]]
) -> Iterator[dict[str, Any]]:
    """Rows of every network, change and case; only the network as it was trained has each method."""
    for network, change in itertools.product(options.networks, changes):
        loaded = load_checkpoint(network.checkpoint, task=task)
        loaded = replace(loaded, model=changes[change](loaded.model))
        images = HeldOutImages(loaded, network.folder, options.noise)
        for precision in options.precision or ["fp16", *PLACEMENTS]:
            methods = (options.method or METHODS) if not change else METHODS[:1]
            cases = [
                Case(change=change, precision=precision, method=method, gains=gains)
                for method, gains in itertools.product(methods, (True, False))
            ]
            for case in cases if precision in PLACEMENTS else [Case(change=change, precision=precision)]:
                yield from images.rows(options.part, network.name, case, record)


def with_hot_responses(model: ConvNeXtV2) -> ConvNeXtV2:
    """Hidden tensors HOT times as large, divided again behind them; GELU makes another function of it."""
    return _scaled_hidden(model, lambda width: slice(0, width), HOT)


def with_outliers(model: ConvNeXtV2) -> ConvNeXtV2:
    """The same of OUTLIERS channels a block alone, OUTLIER times as large."""
    random = np.random.default_rng(0)
    return _scaled_hidden(model, lambda width: random.choice(width, OUTLIERS, replace=False).tolist(), OUTLIER)


def _scaled_hidden(model: ConvNeXtV2, chosen: Callable[[int], Any], factor: float) -> ConvNeXtV2:
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in itertools.chain.from_iterable(model.stage_blocks()):
            channels = chosen(len(block.pwconv1.bias))
            block.pwconv1.weight[channels] *= factor
            block.pwconv1.bias[channels] *= factor
            block.pwconv2.weight[:, channels] /= factor
            if model.variant.version == 2:
                block.grn.beta[..., channels] *= factor
    return model


CHANGES: Mapping[str, Callable[[ConvNeXtV2], ConvNeXtV2]] = {
    "": lambda model: model, "hot": with_hot_responses, "outliers": with_outliers,
}  # fmt: skip
"""What is done to a network's weights."""


class HeldOutImages:
    """The images of a folder's val, as they are and with noise, and what a network says of them in FP32."""

    def __init__(self, loaded: LoadedModel, folder: Path, noise: float) -> None:
        self.loaded = loaded
        made = loaded.preprocessing
        self.spec = DeploySpec(image_size=made.image_size, mean=made.mean, std=made.std)
        self.inputs = InputSpec.of(self.spec, 1, None)
        self.training, held_out = (find_images(folder / part) for part in ("train", "val"))
        indices = evenly(len(held_out), JUDGED_BY)
        batches = [batch.images for batch in held_out.batches(made, self.inputs, BATCH, indices)]
        self.names = [held_out.name(index) for index in indices]
        self.labels = [held_out.label(index) for index in indices]
        if loaded.model.task.has_classes:
            positions = class_positions(held_out, loaded.class_names, loaded.model.num_classes)
            self.labels = [positions[label] for label in self.labels]
        random = torch.Generator().manual_seed(0)
        noisy = [images + noise / 255 * torch.randn(images.shape, generator=random) for images in batches]
        self.batches = {
            "held out": batches,
            f"noise {noise:g}": [(images.clamp(0, 1) * 255).round() / 255 for images in noisy],
        }
        runner = reference_runner(loaded.model, self.spec)
        self.expected = {name: [runner.run(images) for images in some] for name, some in self.batches.items()}

    def rows(self, part: str, network: str, case: Case, record: Record) -> Iterator[dict[str, Any]]:
        """A row for each set of images and each runner."""
        facts = {
            "part": part, "network": network, "variant": self.loaded.model.variant.name, "change": case.change,
            "precision": case.precision, "method": case.method, "gains": case.gains,
        }  # fmt: skip
        judges = {TORCH: list(self.batches)}
        if part == "accuracy" and not case.change and case.method in ("", "max") and (case.gains or not case.method):
            judges |= {name: ["held out"] for name in find_precision(case.precision).proven_by}
        wanted = [{**facts, "images": images, "judge": judge} for judge, some in judges.items() for images in some]
        known = [record.rows.get(key_of(row)) for row in wanted]
        if all(known):
            yield from (row for row in known if row is not None)
            return
        spec = self.deploy_spec(case)
        for judge, some in judges.items():
            slow = judge != TORCH and find_runner(judge).is_slow
            with self._runner(judge, spec) as runner:
                for images in some:
                    yield {**facts, "images": images, "judge": judge, **self.figures(runner, spec, images, slow=slow)}

    def deploy_spec(self, case: Case) -> DeploySpec:
        """The form of a case, its scales measured on training images."""
        left_out = () if case.gains else tuple(GAIN_FOLDS.values())
        spec = replace(self.spec, precision=case.precision, layout="gpu", leave_out=left_out)
        if not case.method:
            return spec
        made, chosen = self.loaded.preprocessing, self.training.choice(CALIBRATED_ON)
        batches = [batch.images for batch in self.training.batches(made, self.inputs, BATCH, chosen)]
        scales = calibrate(self.loaded.model, spec, lambda: batches, method=case.method)
        return replace(spec, eight_bits=scales)

    @contextmanager
    def _runner(self, judge: str, spec: DeploySpec) -> Iterator[Runner]:
        if judge == TORCH:
            yield deployed_runner(self.loaded.model, spec)
            return
        with tempfile.TemporaryDirectory() as text:
            folder = Path(text)
            record = model_record(self.loaded, self.loaded.preprocessing, folder)
            artifact = export_onnx(self.loaded.model, record, ExportSpec(deploy=spec), folder)
            with open_runner(artifact, judge, RunnerOptions(hashes_hold=True)) as runner:
                yield runner

    def figures(self, runner: Runner, spec: DeploySpec, images: str, *, slow: bool) -> dict[str, Any]:
        """What a runner gives of images beside what FP32 gives."""
        task, variant, classes = self.loaded.model.task, self.loaded.model.variant, self.loaded.model.num_classes
        outputs = network_outputs(task, variant, classes, spec)
        (output,) = (each.name for each in outputs)
        batches, chosen = self.batches[images], list[int]()
        comparison, retrieval, sides = OutputComparison(outputs), RunningRetrieval(), (list[Tensor](), list[Tensor]())
        for at in evenly(len(batches), SLOW_BATCHES if slow else None):
            expected = self.expected[images][at]
            given = {name: value.float() for name, value in runner.run(batches[at]).items()}
            comparison.add(*comparable(given, expected, outputs))
            retrieval.add(given[output], expected[output])
            for side, values in zip(sides, (given, expected), strict=True):
                side.append(values[output].argmax(dim=1))
            chosen += range(BATCH * at, BATCH * at + len(batches[at]))
        labels, names = [self.labels[at] for at in chosen], [self.names[at] for at in chosen]
        measured = comparison.results()[output]
        found: dict[str, Any] = {
            "count": len(chosen),
            "relative_l2_median": rounded(measured.relative_l2_median),
            "relative_l2_worst": rounded(measured.relative_l2_max),
            "centred_cosine": round(measured.centred_cosine_min, 6),
        }
        if task.has_classes:
            right = torch.tensor(labels)
            top1, reference = (100.0 * float((torch.cat(side) == right).float().mean()) for side in sides)
            flips = {"flips": measured.flips, "excused_flips": measured.excused_flips}
            return {**found, "top1": round(top1, 2), "reference_top1": round(reference, 2), **flips}
        gate = task.gate(find_precision(spec.precision).gate)
        searched = retrieval.result(names, labels, gate.relative_l2_max)
        for at in searched.neighbours:
            found[f"overlap_at_{at.k}"], found[f"recall_at_{at.k}"] = round(at.overlap, 4), round(at.recall, 4)
            for side, hits in (("reference", at.reference_labels), ("candidate", at.candidate_labels)):
                found[f"{side}_label_at_{at.k}"] = None if hits is None else round(hits, 4)
        return {**found, "rank_changes": searched.changed, "unexcused": searched.unexcused}


def rounded(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


PARTS: Mapping[str, Callable[[argparse.Namespace, Record], Iterator[dict[str, Any]]]] = {
    "traffic": traffic, "dense": traffic, "modelopt": modelopt, "accuracy": accuracy, "features": features,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
