"""A benchmark over recorded artifacts: which runners take turns, on which images, and what could not run.

Timing itself is `benchmark`; this puts PyTorch beside the artifacts of one network and judges what was timed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.artifacts import Artifact
from cnx_deploy.benchmark import BenchSpec, Candidate, Timing, measure_together, peak_memory_mib, reset_peak_memory
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.environment import cpu_count, find_gpus
from cnx_deploy.errors import MissingRequirementError
from cnx_deploy.onnx_export import deploy_spec_from_request
from cnx_deploy.parity import GATES, logits_of
from cnx_deploy.runners.base import Runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.variants import find_variant
from cnx_deploy.verification import open_runner, recorded_model

__all__ = ["BenchRequest", "Benchmark", "NotRun", "bench_artifacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What `cnx-deploy bench` takes. Without `files`, everything recorded in both folders.

    `compare` may hold "torch" (eager training form, the baseline of the speed-ups). `threads` None means all.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    batches: tuple[int, ...] = (1, 8)
    duration: float = 3.0
    compare: tuple[str, ...] = ()
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class NotRun:
    """An artifact that was not timed and why, with what its compiler says of it."""

    name: str
    batch: int | None
    kernels: int | None
    megabytes_per_image: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Timed rows and rows that were not run; `models` gives each row's variant, image size and counts by its name."""

    rows: tuple[Timing, ...]
    not_run: tuple[NotRun, ...]
    models: dict[str, dict[str, Any]]


def bench_artifacts(
    artifacts: Sequence[Artifact], request: BenchRequest, progress: Callable[[str, float], None] | None = None
) -> Benchmark:
    """Time the artifacts network by network; those of one network take turns with each other and with PyTorch."""
    torch.set_num_threads(request.threads or cpu_count())
    rows: list[Timing] = []
    not_run: list[NotRun] = []
    for group in _networks(artifacts):
        with ExitStack() as stack:
            candidates = [*_torch_candidates(group[0], request, stack), *_candidates(group, request, stack, not_run)]
            for batch in request.batches if candidates else ():
                not_run.extend(_outside_range(candidates, batch))
                rows.extend(_measured(group[0], candidates, batch, request, progress))
    models = {artifact.path.name: _model_facts(artifact) for artifact in artifacts}
    return Benchmark(tuple(rows), tuple(not_run), models)


def _networks(artifacts: Sequence[Artifact]) -> Iterator[list[Artifact]]:
    """Artifacts that hold the same network for the same input, together."""
    groups: dict[tuple[Any, ...], list[Artifact]] = {}
    for artifact in artifacts:
        model, request = artifact.manifest.model, artifact.manifest.request
        key = (model.weights.sha256, model.image_size, request["input_kind"], str(request["mean"]), str(request["std"]))
        groups.setdefault(key, []).append(artifact)
    yield from groups.values()


def _torch_candidates(artifact: Artifact, request: BenchRequest, stack: ExitStack) -> Iterator[Candidate]:
    if "torch" not in request.compare:
        return
    spec = deploy_spec_from_request(artifact.manifest.request)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    yield _created(
        "torch eager fp32", lambda: reference_runner(recorded_model(artifact).model.to(device), spec), "fp32", stack
    )


def _candidates(
    group: Sequence[Artifact], request: BenchRequest, stack: ExitStack, not_run: list[NotRun]
) -> Iterator[Candidate]:
    for artifact in group:
        gate = artifact.manifest.request["precision"]
        if artifact.manifest.kind == "engine" and gate != "fp16":
            gate = "tf32-engine" if artifact.manifest.request["allow_tf32"] else "fp32-engine"
        try:
            yield _created(artifact.path.name, partial(open_runner, artifact, threads=request.threads), gate, stack)
        except MissingRequirementError as error:
            compiled = artifact.manifest.facts.get("compiled") or {}
            not_run.append(
                NotRun(
                    artifact.path.name,
                    compiled.get("batch"),
                    compiled.get("kernels"),
                    compiled.get("megabytes_per_image"),
                    str(error) if find_gpus() else "no GPU",
                )
            )


def _created(name: str, make: Callable[[], Runner], gate: str, stack: ExitStack) -> Candidate:
    """Make a runner and call it once on one image: what that takes in time and memory belongs to it."""
    before = reset_peak_memory()
    start = time.perf_counter()
    runner = stack.enter_context(make())
    create_seconds = time.perf_counter() - start
    spec = runner.input_spec
    runner.run(torch.zeros(spec.shape(spec.min_batch), dtype=spec.dtype, device=runner.device))
    peak = peak_memory_mib()
    return Candidate(name, runner, create_seconds, None if peak is None else max(0.0, peak - before), GATES[gate])


def _measured(
    artifact: Artifact,
    candidates: Sequence[Candidate],
    batch: int,
    request: BenchRequest,
    progress: Callable[[str, float], None] | None,
) -> list[Timing]:
    """Time those candidates that take a batch of this size."""
    fitting = [candidate for candidate in candidates if _takes(candidate, batch)]
    if not fitting:
        return []
    spec = deploy_spec_from_request(artifact.manifest.request)
    pixels = next(image_like_batches(batch, spec.image_size, batch_size=batch))
    images: Tensor = runner_input(pixels, spec.input_kind)
    with reference_runner(recorded_model(artifact).model, spec) as reference:
        expected = logits_of(reference, [images])
    return measure_together(
        fitting,
        [images] * len(fitting),
        BenchSpec(duration_seconds=request.duration),
        expected=expected,
        progress=progress,
    )


def _outside_range(candidates: Sequence[Candidate], batch: int) -> Iterator[NotRun]:
    for candidate in candidates:
        if not _takes(candidate, batch):
            spec = candidate.runner.input_spec
            reason = f"a batch of {batch} is outside its range of {spec.min_batch} to {spec.max_batch}"
            yield NotRun(candidate.name, batch, None, None, reason)


def _takes(candidate: Candidate, batch: int) -> bool:
    spec = candidate.runner.input_spec
    return spec.min_batch <= batch and (spec.max_batch is None or batch <= spec.max_batch)


def _model_facts(artifact: Artifact) -> dict[str, Any]:
    model = artifact.manifest.model
    variant = find_variant(model.variant)
    return {
        "variant": model.variant,
        "image_size": model.image_size,
        "weights": model.weights.origin,
        "gmacs": round(variant.mac_count(model.image_size, model.num_classes) / 1e9, 3),
        "parameters": variant.parameter_count + (model.num_classes - 1000) * (variant.dims[-1] + 1),
        "sha256": artifact.sha256,
    }
