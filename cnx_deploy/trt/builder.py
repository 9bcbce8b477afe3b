"""A recorded ONNX file to an engine: profiles, checks, and what was found on the way in the manifest."""

import contextlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.artifacts import Artifact, Manifest, open_artifact, reusable_artifact, stage_artifact
from cnx_deploy.environment import find_gpus
from cnx_deploy.errors import BuildError, InputError
from cnx_deploy.onnx_checks import check_graph
from cnx_deploy.trt.backend import Backend, load_backend
from cnx_deploy.trt.compiled import measure_compiled
from cnx_deploy.trt.depthwise import CHANNELS_PER_GROUP, with_depthwise_in_fp32, written_for
from cnx_deploy.trt.kernel_log import kernels_in_log
from cnx_deploy.trt.network import NetworkBuild, Progress, half_share, type_census

__all__ = ["BuildSpec", "build_engine"]

MIN_HALF_SHARE = 0.95
"""Least share of HALF among matrix products and convolutions of an FP16 file: ours have 1.0, an FP32 graph 0."""

FIRST_WITH_BF16 = 80
"""Compute capability 8.0, Ampere: the first with BF16 in its tensor cores (NVIDIA, CUDA programming guide)."""

LISTS_KERNELS = "tensorrt-rtx"
"""The runtime whose log `trt.kernel_log` reads; TensorRT proper has another format and builds for minutes."""

NO_HALF_DEPTHWISE = ("No low-precision conv kernel", "Could not find any implementation")


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """What to build. One optimisation profile a batch range (smallest, typical, largest).

    TF32 lets FP32 matrix products and convolutions keep ten bits of mantissa; it is off unless asked for.
    `measure` compiles the graph a second time for a fixed batch to record kernels and traffic.
    """

    runtime: str = "auto"
    target: str = "sm89"
    batches: tuple[tuple[int, int, int], ...] = ((1, 8, 64),)
    allow_tf32: bool = False
    measure: bool = True

    def __post_init__(self) -> None:
        if not self.batches or any(not 1 <= low <= typical <= high for low, typical, high in self.batches):
            raise InputError(
                f"Batch ranges are smallest:typical:largest, each at least 1, not {self.batches}. Give them so, as "
                "in 1:8:64."
            )


def build_engine(
    onnx: Artifact | Path,
    spec: BuildSpec,
    output_dir: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """Build `<output_dir>/<onnx name>-<rtx|trt>-<target>.engine` with its manifest.

    The ONNX file's hash is checked before it is parsed. `progress` is told a text while the compiler works.

    Raises BuildError when TensorRT makes no engine, or one that computes LayerNorm in FP16 or an FP16 file in another
    precision; InputError for a target or batch that does not fit; what `artifacts` raises for altered files.
    """
    source = open_artifact(onnx.path if isinstance(onnx, Artifact) else onnx)
    if source.manifest.kind != "onnx":
        raise InputError(
            f"{source.path} is of kind {source.manifest.kind}; an engine is built from an ONNX file. Name one."
        )
    backend = load_backend(spec.runtime)
    backend.check_target(spec.target)
    _check_batches(source, spec)
    _check_has_bf16(source, spec.target)
    request = {
        **source.manifest.request,
        "runtime": backend.name,
        "target": spec.target,
        "batches": [list(sizes) for sizes in spec.batches],
        "allow_tf32": spec.allow_tf32,
    }
    stem = f"{source.manifest.stem}-{backend.short_name}-{spec.target}"
    with stage_artifact(output_dir, stem) as staging:
        found = reusable_artifact(output_dir, stem, "engine", request, source.sha256, force=force)
        if found is not None:
            return found
        check_graph(source.path)
        plan, facts = _built(backend, source, spec, progress)
        (staging.folder / f"{stem}.engine").write_bytes(plan)
        manifest = Manifest(
            kind="engine",
            stem=stem,
            files=staging.record(f"{stem}.engine"),
            model=source.manifest.model_seen_from(output_dir, source.path.parent),
            request=request,
            source_name=source.path.name,
            source_sha256=source.sha256,
            facts=facts,
        )
        return staging.commit(manifest)


def _check_batches(source: Artifact, spec: BuildSpec) -> None:
    smallest, _, largest = source.manifest.request["batch"]
    for low, _, high in spec.batches:
        if low < smallest or high > largest:
            raise InputError(
                f"{source.path.name} was exported for batches {smallest} to {largest}; a profile of {low} to {high} "
                f"does not fit. Export it with --batch {min(low, smallest)}:{high}:{max(high, largest)}."
            )


def _check_has_bf16(source: Artifact, target: str) -> None:
    gpu = find_gpus()[0].target if target == "current" else target
    if source.manifest.request["precision"] == "bf16" and int(gpu.removeprefix("sm")) < FIRST_WITH_BF16:
        raise InputError(
            f"{source.path.name} is BF16, and {gpu} has no BF16 arithmetic; sm{FIRST_WITH_BF16} is the first that has. "
            "Export it with --precision fp16 for this GPU."
        )


def _built(
    backend: Backend, source: Artifact, spec: BuildSpec, progress: Progress | None
) -> tuple[bytes, dict[str, Any]]:
    gpu = find_gpus()[0].target if spec.target == "current" else spec.target
    rewrites = backend.name == LISTS_KERNELS  # how the other one compiles depthwise convolutions is not known here
    with written_for(source.path, gpu) if rewrites else contextlib.nullcontext(source.path) as path:
        start = time.monotonic()
        build, plan, fallback = _serialised(backend, path, source.manifest.request, spec, progress)
        facts: dict[str, Any] = {
            "runtime_version": backend.version,
            "build_seconds": round(time.monotonic() - start, 2),
            "census": type_census(build.network),
            "half_share_of_products": round(half_share(build.network), 4),
            "depthwise_fp32_fallback": fallback,
            "depthwise_in_groups_of": 1 if path == source.path else CHANNELS_PER_GROUP,
            "range_warnings": list(build.range_warnings()),
            "kernels_by_profile": _kernels_by_profile(build, spec),
            "run": "not run: built ahead of time" if spec.target != "current" else "not run yet: see verify",
        }
        if spec.target == "current":
            facts["gpu"] = gpu
        if spec.measure and backend.name == LISTS_KERNELS and not fallback:
            batch = spec.batches[-1][2]
            compiled = measure_compiled(path, batch=batch, target=spec.target, backend=backend, progress=progress)
            facts["compiled"] = compiled.to_dict()
    return plan, facts


def _kernels_by_profile(build: NetworkBuild, spec: BuildSpec) -> dict[str, int]:
    """Kernels the engine itself launches, by batch range: each profile is compiled for itself."""
    if build.backend.name != LISTS_KERNELS:
        return {}
    counts = Counter(kernel.profile for kernel in kernels_in_log(text for _, text in build.log.messages))
    return {":".join(map(str, sizes)): counts[index] for index, sizes in enumerate(spec.batches) if counts[index]}


def _serialised(
    backend: Backend, path: Path, request: Mapping[str, Any], spec: BuildSpec, progress: Progress | None
) -> tuple[NetworkBuild, bytes, bool]:
    """Build as the file says; where TensorRT has no FP16 depthwise kernel, once more with those layers in FP32.

    TensorRT 11.2 has none on some GPUs (NVIDIA/TensorRT issue 4838).
    """
    try:
        build = NetworkBuild(backend, path)
        _check_half_share(build, request)
        return build, build.serialise(_config(build, spec), progress), False
    except BuildError as error:
        if request["precision"] != "fp16" or not any(text in str(error) for text in NO_HALF_DEPTHWISE):
            raise
    with with_depthwise_in_fp32(path) as widened:
        build = NetworkBuild(backend, widened)
        return build, build.serialise(_config(build, spec), progress), True


def _config(build: NetworkBuild, spec: BuildSpec) -> Any:
    return build.config(spec.target, allow_tf32=spec.allow_tf32, batches=spec.batches)


def _check_half_share(build: NetworkBuild, request: Mapping[str, Any]) -> None:
    """Raise BuildError for a file that computes in FP32 what it says it computes in half, parts it keeps left out."""
    precision = request["precision"]
    share = half_share(build.network, request.get("keep_fp32", ()))
    if precision != "fp32" and share < MIN_HALF_SHARE:
        raise BuildError(
            f"{build.onnx_path.name} calls itself {precision.upper()}, but only {share:.0%} of its matrix products and "
            f"convolutions are (at least {MIN_HALF_SHARE:.0%} expected). Export it again with --precision {precision} "
            "--force."
        )
