"""What only an NVIDIA GPU can show: kernels, parity, hot weights, latency and energy, as one JSON file.

usage: scripts/gpu [--prepare] [--tiny] [--folder gpu] [--variants atto nano …] [--batch 1 8 64] [--budget 570]
                   [--record docs/data/gpu/CARD.json]

`--prepare` exports the files, which needs no GPU and takes minutes; without it what is missing is exported first,
within the budget. Then come, most valuable first and each saved as soon as it is done:

  kernels   each own kernel against float64, its time and GB/s as a share of what a copy reaches
  parity    every exported file on this GPU: ONNX Runtime, own kernels in PyTorch, a TensorRT engine where it builds one
  hot       weights that bring GRN's input to 2, 10 and 50 times the naive FP16 limit: ours and the peers' .half() files
  latency   images/s in turns: PyTorch and torch.compile in FP16, ONNX Runtime, TensorRT, own kernels; roofline; energy

Each part is a process with a time limit of its own, so that one that fails or hangs takes no other with it. After
`--budget` seconds nothing new begins; what was left out is named. `--tiny` takes the smallest network and runs on a
CPU too: own kernels are interpreted then, and no figure means anything. Exit code 3 where a kernel, parity, a file of
ours with hot weights or a gate fails.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cnx_deploy as cnx
from cnx_deploy.bench.conditions import conditions_now
from cnx_deploy.bench.peers import Half, timm_twin
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.hidden_tensor import MOST_RECOMPUTED_CHANNELS
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.strict_json import strict_json
from cnx_deploy.core.variants import Variant, find_variant, register_variant
from cnx_deploy.exporters.trt.backend import default_targets, load_backend
from cnx_deploy.kernels import launch
from cnx_deploy.kernels.settings import EPS
from cnx_deploy.kernels.tuning import StageShape, choose
from cnx_deploy.model.checkpoint import save_checkpoint
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.layouts import official_state
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.runners.registry import RunnerOptions, open_runner
from tests.support.hot_networks import images_for, with_hot_responses

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
TINY = Variant("tiny-walk", (1, 1, 1, 1), (8, 16, 32, 64), 0, None)
FACTORS = (1, 2, 10, 50)
"""How far GRN's input in stage 1 is above the RMS at which a sum of squares leaves FP16; 1: ordinary weights."""
KERNEL_LIMIT, CHAIN_LIMIT = 5e-4, 1e-3
"""Relative L2 of an own kernel to float64; of the one with both products, which rounds the hidden tensor between."""
COPY_SHARE = 0.6
"""What the first and the last kernel of a block should reach of a copy's GB/s in stages 1 and 2."""
LATENCY_GATES = {"atto": {64: 1.3}, "nano": {64: 1.3}}
"""How many times as fast as the best of PyTorch and torch.compile own kernels have to be; 1.0 where it is not named."""
FUSED, ONNXRUNTIME = "fused", "onnxruntime"
JUDGED = ("kernels", "parity", "gates")
"""The lists of the record whose rows pass or do not."""
SECONDS = {"prepare": 240.0, "parity": 150.0, "hot": 90.0, "kernels": 90.0, "latency": 240.0}
"""What one child process may take. The first that runs own kernels compiles and measures some 60 tiles of a network."""


class Left:
    """The time that is left."""

    def __init__(self, budget: float) -> None:
        self.start, self.budget = time.monotonic(), budget

    def __call__(self) -> float:
        """Seconds."""
        return self.budget - (time.monotonic() - self.start)


def main() -> int:
    """Prepare, run the parts, write the record after each; return the exit code."""
    options = arguments()
    if options.tiny:
        register_variant(TINY)
    if options.part:
        return run_part(options)
    if options.prepare:
        for name in options.variants:
            prepare(options, name)
        return 0
    left, record_path = Left(options.budget), options.record or options.folder / "record.json"
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["scripts/gpu", *sys.argv[1:]]),
        "environment": asdict(conditions_now(threads=None, duration_seconds=options.duration, seed=0)),
        "device": torch.cuda.get_device_name() if HAS_GPU else "none: a walk on a CPU, no figure means anything",
        "kernels": [], "parity": [], "hot": [], "latency": [], "energy": [], "not_run": [],
    }  # fmt: skip
    for part, name in plan(options):
        answer: dict[str, list[Any]] = {"not_run": [{"part": part, "name": name, "reason": "the time was over"}]}
        if left() > 20:
            print(f"[{options.budget - left():4.0f} s] {part} {name}", flush=True)
            limit = SECONDS[part] if HAS_GPU else 10 * SECONDS[part]  # the interpreter takes its time
            answer = in_a_process(options, part, name, min(limit, left()))
        for key, rows in answer.items():
            record[key].extend(rows)
        record |= {"seconds": round(options.budget - left(), 1), "gates": gates(record)}
        save(record_path, record)
    for line in summary(record):
        print(line)
    print(record_path)
    right = [row["right"] for row in record["hot"] if row["graph"] == "cnx-deploy"]
    return 0 if all((*right, *(row["passed"] for key in JUDGED for row in record[key]))) else 3


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepare", action="store_true", help="export the files and end")
    parser.add_argument("--tiny", action="store_true", help="the smallest network at 32 px, on a CPU too")
    parser.add_argument("--folder", type=Path, default=Path("gpu"))
    parser.add_argument(
        "--variants", nargs="+", default=["atto", "nano", "tiny", "base", "femto", "pico", "large", "huge"]
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1, 8])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for everything after the exports")
    parser.add_argument("--duration", type=float, default=1.0, help="seconds of measuring a row")
    parser.add_argument("--record", type=Path)
    for hidden in ("--part", "--name", "--answer"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.variants, options.batch, options.image_size, options.duration = [TINY.name], [2], 32, 0.05
        options.factors = (1, 50)
    else:
        options.factors = FACTORS
        for name in options.variants:
            find_variant(name)
    return options


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """The parts in the order of their worth, each variant's behind the export of what is missing of it."""
    for name in options.variants:
        if any(True for _ in missing(options, name)):
            yield "prepare", name
        if name != options.variants[0]:
            yield from (("latency", name), ("parity", name))
        else:
            yield from (("parity", name), ("hot", name), ("kernels", name), ("latency", name))
    for name in options.variants[1:4]:
        yield "kernels", name


# --- files ------------------------------------------------------------------------------------------------------------


def missing(options: argparse.Namespace, name: str) -> Iterator[str]:
    """What `prepare` would export for a variant; the first one's files are those with hot weights too."""
    if not (options.folder / "files" / f"{name}-{options.image_size}-fp16.onnx").is_file():
        yield name
    for factor in options.factors if name == options.variants[0] else ():
        for graph in GRAPHS:
            if not hot_path(options, factor, graph).is_file():
                yield f"hot-{factor}-{graph}"


def prepare(options: argparse.Namespace, name: str) -> None:
    """Export what is missing of a variant: our FP16 file, and for the hot weights the peers' too."""
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = set(missing(options, name))
    if name in wanted:
        print(f"exporting {name}", flush=True)
        batch = (min(options.batch), max(options.batch), max(options.batch))
        words = {"image_size": options.image_size, "batch": batch, "output_dir": options.folder / "files"}
        cnx.export(name, precision="fp16", no_verify=True, **words)
    hot = [(factor, graph) for graph in GRAPHS for factor in options.factors if f"hot-{factor}-{graph}" in wanted]
    models = {factor: hot_model(options, factor) for factor in dict(hot)}
    for factor, graph in hot:  # ours first: what a peer's export needs may not be here
        print(f"exporting {graph} at {factor} times the limit", flush=True)
        if graph == "cnx-deploy":
            checkpoint = options.folder / f"hot-{factor}.safetensors"
            save_checkpoint(checkpoint, models[factor])
            words = {"image_size": options.image_size, "batch": (2, 2, 2), "output_dir": options.folder / "files"}
            words |= {"checkpoint": checkpoint, "name": f"hot-{factor}", "no_verify": True, "force": True}
            cnx.export(models[factor].variant.name, precision="fp16", **words)
        else:
            export_peer(GRAPHS[graph](models[factor]), options.image_size, hot_path(options, factor, graph))


def hot_path(options: argparse.Namespace, factor: int, graph: str) -> Path:
    """Where a file with hot weights lies."""
    if graph == "cnx-deploy":
        return options.folder / "files" / f"hot-{factor}-{options.image_size}-fp16.onnx"
    return options.folder / f"hot-{factor}-{graph}.onnx"


def hot_model(options: argparse.Namespace, factor: int) -> ConvNeXtV2:
    """Weights whose function does not depend on the factor, of the first variant."""
    return with_hot_responses(find_variant(options.variants[0]), options.image_size, float(factor), classes=1000)


def transformers_twin(model: ConvNeXtV2) -> nn.Module:
    """The model of transformers with the weights of `model`, its logits alone."""
    from transformers import ConvNextV2Config, ConvNextV2ForImageClassification

    size = model.variant
    config = ConvNextV2Config(depths=list(size.depths), hidden_sizes=list(size.dims), num_labels=model.num_classes)
    twin = ConvNextV2ForImageClassification(config).eval()
    state, own = twin.state_dict(), model.state_dict()
    _, official = official_state(state, "transformers")
    pairs = zip(state.items(), official, strict=True)
    twin.load_state_dict({name: own[ours].reshape(tensor.shape) for (name, tensor), ours in pairs})

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = twin

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images).logits

    return Logits()


GRAPHS: dict[str, Callable[[ConvNeXtV2], nn.Module]] = {
    "cnx-deploy": lambda model: model, "timm": timm_twin, "transformers": transformers_twin,
}  # fmt: skip


def export_peer(model: nn.Module, size: int, path: Path) -> None:
    """A peer's model as its users export it in FP16; it takes normalised float32 images."""
    with warnings.catch_warnings(), whole_file(path) as temporary:
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Half(model).eval(), (torch.zeros(2, 3, size, size),), temporary, dynamo=True, opset_version=20,
            input_names=["images"], output_names=["logits"], external_data=False, verbose=False,
        )  # fmt: skip


# --- parts, each in a process of its own ------------------------------------------------------------------------------


def in_a_process(options: argparse.Namespace, part: str, name: str, seconds: float) -> dict[str, list[Any]]:
    """The rows of a part by their key in the record; a row in `not_run` where it failed or was ended."""
    answer = options.folder / f"answer-{part}-{name}.json"
    answer.unlink(missing_ok=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part, "--name", name, "--answer", str(answer)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    try:
        reason = f"it ended with {process.wait(seconds)}; its last lines are above"
    except subprocess.TimeoutExpired:
        reason = f"it was ended after {seconds:.0f} s; what it had is kept"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it and what it started, which would share the GPU
        process.wait()
    rows: dict[str, list[Any]] = strict_json(answer.read_bytes()) if answer.is_file() else {}
    answer.unlink(missing_ok=True)
    if rows.pop("done", None) is None:
        rows.setdefault("not_run", []).append({"part": part, "name": name, "reason": reason})
    return rows


def run_part(options: argparse.Namespace) -> int:
    """Run a part, saving what there is after each row."""
    rows: dict[str, list[Any]] = {}
    answer = Path(options.answer)

    def add(key: str, row: dict[str, Any]) -> None:
        rows.setdefault(key, []).append(row)
        save(answer, rows)
        print("   ", " ".join(f"{name} {shown(value)}" for name, value in row.items()), flush=True)

    try:
        PARTS[options.part](options, add)
    except Exception as error:  # noqa: BLE001 - the record says that the part failed, and the next one runs
        traceback.print_exc()
        add("not_run", {"part": options.part, "name": options.name, "reason": one_line(error)})
    save(answer, {**rows, "done": [True]})
    return 0


Add = Callable[[str, dict[str, Any]], None]


def kernels(options: argparse.Namespace, add: Add) -> None:
    """Each own kernel at each stage of a variant, at the first batch: right, and how fast."""
    variant, batch, copied = find_variant(options.name), options.batch[0], copy_rate()
    for stage, channels in enumerate(variant.dims):
        positions = (options.image_size // (4 << stage)) ** 2
        tensors = stage_tensors(batch, positions, channels)
        for hidden in ("stored", "recomputed") if channels <= MOST_RECOMPUTED_CHANNELS else ("stored",):
            choice = choose(StageShape(batch, positions, channels), torch.device(DEVICE), hidden)
            for name, (call, wanted, moved, flops) in kernel_calls(tensors, choice).items():
                error, limit = relative_l2(call(), wanted), CHAIN_LIMIT if "mlp" in name else KERNEL_LIMIT
                row = {"variant": variant.name, "stage": stage + 1, "channels": channels, "batch": batch}
                row |= {"kernel": name, "hidden": hidden, "relative_l2": error, "passed": error <= limit}
                if HAS_GPU:
                    milliseconds = timed(call)
                    rate = moved / milliseconds / 1e6
                    row |= {"microseconds": 1e3 * milliseconds, "gb_s": rate, "of_copy": rate / copied}
                    row |= {"tflops": flops / milliseconds / 1e9, "copy_gb_s": copied}
                add("kernels", row)


def parity(options: argparse.Namespace, add: Add) -> None:
    """A variant's file on this device, by every runner that is here, and its engine."""
    artifact = own_file(options)
    for backend in (ONNXRUNTIME, FUSED):
        add_verdict(artifact, add, backends=(backend,))
    engine = engine_of(artifact, options)
    if isinstance(engine, str):
        add("not_run", {"part": "parity", "name": f"{options.name} engine", "reason": engine})
    else:
        add_verdict(engine, add)


def add_verdict(artifact: Artifact, add: Add, **words: Any) -> None:
    """Verify and add a row, or say why not."""
    try:
        (found,) = cnx.verify(artifact, samples=2 if DEVICE == "cpu" else 64, device=DEVICE, **words).results
    except Exception as error:  # noqa: BLE001 - a runner that fails here is a finding
        add("not_run", {"part": "parity", "name": f"{artifact.path.name} {words}", "reason": one_line(error)})
        return
    for result in found.results:
        worst = result.differences
        row = {"file": artifact.path.name, "candidate": result.candidate, "output": result.output}
        row |= {"images": worst.samples, "relative_l2": worst.relative_l2_max, "cosine": worst.centred_cosine_min}
        add("parity", {**row, "passed": result.passed})
    for reason in found.not_run:
        add("not_run", {"part": "parity", "name": artifact.path.name, "reason": reason})


def hot(options: argparse.Namespace, add: Add) -> None:
    """Hot weights on this device against float64, ours and the peers'."""
    images = images_for(options.image_size)
    for factor in options.factors:
        model = hot_model(options, factor)
        expected = reference_runner(model.double(), DeploySpec(image_size=options.image_size)).run(images)["logits"]
        for graph in GRAPHS:
            for backend in (ONNXRUNTIME, FUSED) if graph == "cnx-deploy" else (ONNXRUNTIME,):
                row = {"variant": options.name, "times_limit": factor, "graph": graph, "backend": backend}
                try:
                    logits = hot_logits(options, factor, graph, backend, images)
                except Exception as error:  # noqa: BLE001 - a file that does not run here is a finding
                    add("not_run", {"part": "hot", "name": f"{factor} {graph} {backend}", "reason": one_line(error)})
                    continue
                finite = bool(logits.isfinite().all())
                error = relative_l2(logits, expected) if finite else None
                right = error is not None and error <= GATES["fp16"].relative_l2_max
                add("hot", {**row, "finite": finite, "relative_l2": error, "right": right})


def hot_logits(options: argparse.Namespace, factor: int, graph: str, backend: str, images: Tensor) -> Tensor:
    """What a file with hot weights gives for raw images."""
    path = hot_path(options, factor, graph)
    if graph == "cnx-deploy":
        runner = open_runner(open_artifact(path), backend, RunnerOptions(device=DEVICE))
    else:
        spec = DeploySpec()
        mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (spec.mean, spec.std))
        runner, images = OrtRunner(path, device=DEVICE), (images - mean) / std
    with runner:
        return runner.run(images.to(runner.device))["logits"].cpu().double()


def latency(options: argparse.Namespace, add: Add) -> None:
    """A variant in turns with its peers, and the energy of an image at the first batch."""
    artifact = own_file(options)
    engine = engine_of(artifact, options)
    files = [artifact] if isinstance(engine, str) else [artifact, engine]
    words = {"backends": (ONNXRUNTIME, FUSED), "device": DEVICE, "duration_seconds": options.duration}
    words |= {"compare": ("torch-half", "compile-half") if HAS_GPU else ("torch-half",), "cuda_graph": HAS_GPU}
    for batch in options.batch:
        try:
            record = cnx.benchmark(files, batch=batch, note=print, **words)
        except Exception as error:  # noqa: BLE001 - a runner that fails here is a finding
            add("not_run", {"part": "latency", "name": f"{options.name} batch {batch}", "reason": one_line(error)})
            continue
        for row in record.rows:
            ratios = {ratio.peer: ratio.ratio for ratio in row.ratios}
            found = {"variant": options.name, "batch": batch, "row": row.name, "images_s": row.images_per_second}
            found |= {"median_ms": row.latency.median_ms, "p95_ms": row.latency.p95_ms, "status": row.status}
            found |= {"arithmetic": row.arithmetic, "ratios": ratios}
            found["of_roofline"] = row.roofline.measured_over_bound if row.roofline else None
            add("latency", {**found, "relative_l2": row.correctness.relative_l2 if row.correctness else None})
        for left_out in record.not_run:
            add("not_run", {"part": "latency", "name": f"{options.name} {left_out.name}", "reason": left_out.reason})
    if HAS_GPU:
        energy(options, artifact, add)


def energy(options: argparse.Namespace, artifact: Artifact, add: Add) -> None:
    """Joules an image at the first batch, from the power that the driver reports while nothing else runs."""
    batch = options.batch[0]
    images = images_for(options.image_size, batch).to(DEVICE)
    for backend in (FUSED, ONNXRUNTIME):
        with open_runner(artifact, backend, RunnerOptions(device=DEVICE)) as runner:
            runner.run(images)
            sampler = subprocess.Popen(
                ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "--loop-ms=50"],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            calls, start = 0, time.monotonic()
            while time.monotonic() - start < 2.0:
                runner.run(images)
                calls += 1
            seconds = time.monotonic() - start
            sampler.terminate()
            lines = (sampler.communicate()[0] or "").splitlines()[5:]
        watts = [float(line) for line in lines if line.replace(".", "", 1).strip().isdigit()]
        if watts:
            row = {"variant": options.name, "batch": batch, "row": backend, "watts": statistics.mean(watts)}
            add("energy", {**row, "joules_an_image": statistics.mean(watts) * seconds / (calls * batch)})


PARTS: dict[str, Callable[[argparse.Namespace, Add], None]] = {
    "prepare": lambda options, add: prepare(options, options.name), "kernels": kernels, "parity": parity, "hot": hot,
    "latency": latency,
}  # fmt: skip


def own_file(options: argparse.Namespace) -> Artifact:
    """The variant's exported file."""
    return open_artifact(options.folder / "files" / f"{options.name}-{options.image_size}-fp16.onnx")


def engine_of(artifact: Artifact, options: argparse.Namespace) -> Artifact | str:
    """An engine for this GPU, or why there is none."""
    try:
        backend = load_backend()
        if not HAS_GPU or default_targets(backend) != ("current",):
            return f"{backend.name} {backend.version} builds no engine for this machine"
        return cnx.build_engine(artifact, target="current", output_dir=options.folder / "engines")
    except cnx.CnxDeployError as error:
        return one_line(error)


# --- kernels ----------------------------------------------------------------------------------------------------------


def stage_tensors(batch: int, positions: int, channels: int) -> dict[str, Tensor]:
    """Random operands of a block's kernels, GRN's gamma of the order of one."""
    generator = torch.Generator().manual_seed(channels)
    shapes = {
        "tokens": (batch, positions, channels), "residual": (batch, positions, channels),
        "weight1": (channels, 4 * channels), "bias1": (4 * channels,),
        "weight2": (4 * channels, channels), "bias2": (channels,), "gamma": (4 * channels,),
    }  # fmt: skip
    made = {name: torch.randn(sizes, generator=generator) for name, sizes in shapes.items()}
    made["weight1"] /= channels**0.5
    made["weight2"] /= (4 * channels) ** 0.5
    gamma = made.pop("gamma").to(DEVICE)
    return {name: tensor.half().to(DEVICE) for name, tensor in made.items()} | {"gamma": gamma}


def float64_outputs(tensors: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """What each kernel should give, in float64, an image at a time so that it fits.

    "hidden", "gain" and "out" from the tokens; "residual" from the `hidden` tensor that the last kernel reads.
    """
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    found: dict[str, list[Tensor]] = {"hidden": [], "gain": [], "out": [], "residual": []}
    for tokens, residual, given in zip(wide["tokens"], wide["residual"], hidden, strict=True):
        normed = nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=EPS)
        own = nn.functional.gelu(normed @ wide["weight1"] + wide["bias1"])
        norm = own.square().sum(0).sqrt()
        gain = 1 + wide["gamma"] * norm / (norm.mean() + EPS)
        for name, value in (("hidden", own), ("gain", gain)):
            found[name].append(value.cpu())
        for name, value in (("out", own), ("residual", given.double())):
            found[name].append((residual + (value * gain) @ wide["weight2"] + wide["bias2"]).cpu())
    return {name: torch.stack(values) for name, values in found.items()}


def kernel_calls(tensors: dict[str, Tensor], choice: Any) -> dict[str, tuple[Callable[[], Tensor], Tensor, int, int]]:
    """Kernel -> how it is called, what it should give, the bytes of its tensors and its operations."""
    opening = tensors["tokens"], tensors["weight1"], tensors["bias1"]
    closing = tensors["weight2"], tensors["bias2"], tensors["residual"]
    stored = choice.hidden == "stored"
    hidden, sums = launch.norm_linear_gelu(*opening, settings=choice.first, store_hidden=True)
    assert hidden is not None
    assert sums is not None
    gain, wanted = launch.response_gain(sums, tensors["gamma"]), float64_outputs(tensors, hidden)
    stream, weights = size_bytes(tensors["tokens"]), size_bytes(tensors["weight1"])
    product = 2 * tensors["tokens"].numel() * 4 * tensors["tokens"].shape[-1]
    first = stream + weights + size_bytes(sums)

    def statistics_alone() -> Tensor:
        _, own = launch.norm_linear_gelu(*opening, settings=choice.first, store_hidden=False)
        assert own is not None
        return launch.response_gain(own, tensors["gamma"])

    if stored:
        return {
            "norm_linear_gelu": (
                lambda: launch.norm_linear_gelu(*opening, settings=choice.first)[0], wanted["hidden"],
                first + size_bytes(hidden), product,
            ),
            "response_gain": (
                lambda: launch.response_gain(sums, tensors["gamma"]), wanted["gain"], size_bytes(sums), 0,
            ),
            "gained_linear_residual": (
                lambda: launch.gained_linear_residual(hidden, gain, *closing, settings=choice.second),
                wanted["residual"], size_bytes(hidden) + weights + 2 * stream, product,
            ),
        }  # fmt: skip
    return {
        "norm_linear_gelu and response_gain": (statistics_alone, wanted["gain"], first, product),
        "gained_mlp_residual": (
            lambda: launch.gained_mlp_residual(*opening, gain, *closing, settings=choice.second), wanted["out"],
            3 * stream + 2 * weights, 2 * product,
        ),
    }  # fmt: skip


def timed(call: Callable[[], Any]) -> float:
    """Milliseconds of a call inside a CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call, rep=20))


def copy_rate() -> float:
    """GB/s of a copy of 1 GiB on the device, bytes read and written; 0 without a GPU."""
    if not HAS_GPU:
        return 0.0
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source)) / 1e6


def size_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """Relative L2 in float64."""
    wide = expected.double().cpu()
    return float((found.double().cpu() - wide).norm() / wide.norm())


# --- what it comes to -------------------------------------------------------------------------------------------------


def gates(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The gates of speed, each with what was measured; none without a GPU."""
    found = []
    for row in record["latency"] if HAS_GPU else ():
        peers = [ratio for name, ratio in row["ratios"].items() if name.startswith("torch")]
        if row["row"].endswith(f"[{FUSED}]") and peers:
            limit = LATENCY_GATES.get(row["variant"], {}).get(row["batch"], 1.0)
            name = f"{row['variant']} batch {row['batch']}: own kernels over the best of PyTorch and torch.compile"
            found.append({"gate": name, "limit": limit, "measured": min(peers), "passed": min(peers) >= limit})
    for row in record["kernels"] if HAS_GPU else ():
        if row["stage"] <= 2 and row["kernel"] in ("norm_linear_gelu", "gained_linear_residual"):
            name = f"{row['variant']} stage {row['stage']} {row['kernel']}: share of a copy's GB/s"
            passed = row["of_copy"] >= COPY_SHARE
            found.append({"gate": name, "limit": COPY_SHARE, "measured": row["of_copy"], "passed": passed})
    return found


def summary(record: dict[str, Any]) -> Iterator[str]:
    """A line for each gate, and what did not run."""
    for gate in record.get("gates", ()):
        verdict = "ok    " if gate["passed"] else "MISSED"
        yield f"{verdict} {gate['gate']} {gate['measured']:.2f}, at least {gate['limit']}"
    for row in record["not_run"]:
        yield f"not run: {row['part']} {row['name']}: {row['reason']}"


def save(path: Path, record: dict[str, Any]) -> None:
    """Write a document whole."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(finite(record), indent=1, default=str) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities, which no strict reader of JSON takes."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """A value on a line of progress."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def one_line(error: BaseException) -> str:
    """An error without line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


if __name__ == "__main__":
    sys.exit(main())
