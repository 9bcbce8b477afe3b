"""A recorded ONNX file to an engine: profiles, checks, and what was found on the way in the manifest."""

from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import Artifact, Manifest, open_artifact, reusable_artifact, stage_artifact
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.graph_rules import check_graph
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.compiling import BuildSpec, compiled_engine, task_of
from cnx_deploy.exporters.trt.network import Progress

__all__ = ["BuildSpec", "build_engine"]

FIRST_WITH_BF16 = 80
"""Compute capability 8.0, Ampere: the first with BF16 in its tensor cores (NVIDIA, CUDA programming guide)."""


def build_engine(
    onnx: Artifact | Path,
    spec: BuildSpec,
    output_dir: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Artifact:
    """Build `<output_dir>/<onnx name>-<rtx|trt>-<target>.engine` with its manifest.

    The ONNX file's hash is checked before it is parsed. `progress` is told a text while the compiler works. With
    `limits` TensorRT works in a child process that may use no more; without, in this one.

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
    with stage_artifact(output_dir, stem, needed_bytes=_needed_bytes(source)) as staging:
        found = reusable_artifact(output_dir, stem, "engine", request, source.sha256, force=force)
        if found is not None:
            return found
        check_graph(source.path, source.file_names)
        facts = _compiled(backend, source, spec, staging.folder / f"{stem}.engine", progress, limits)
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


def _compiled(
    backend: Backend, source: Artifact, spec: BuildSpec, plan: Path, progress: Progress | None, limits: Limits | None
) -> dict[str, Any]:
    """Have the engine written to `plan`, here or in a child; what was found on the way."""
    request = source.manifest.request
    if limits is None:
        content, facts = compiled_engine(backend, source.path, request, spec, progress)
        plan.write_bytes(content)
        return facts
    name = source.path.name
    found: dict[str, Any] = run_isolated(
        "cnx_deploy.exporters.trt.compiling:compile_task",
        task_of(source.path, request, spec, plan),
        limits,
        what=f"Building {name}",
        failure=BuildError,
        tick=None if progress is None else lambda seconds: progress(f"{name} {seconds:.0f} s", 0.0),
    )
    return found


def _needed_bytes(source: Artifact) -> int:
    """What an engine takes at least: its weights."""
    return sum(file.size_bytes for file in source.manifest.files)
