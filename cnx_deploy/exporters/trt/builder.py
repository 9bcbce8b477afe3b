"""A recorded ONNX file to an engine: profiles, checks, and what was found on the way in the manifest."""

from dataclasses import replace
from pathlib import Path

from cnx_deploy.core.artifacts import is_engine, is_onnx, open_artifact, reusable_artifact, stage_artifact
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.manifest import Artifact, EngineFacts, EngineManifest, EngineRequest, OnnxManifest
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.system import find_gpus
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.compiling import BuildSpec, FilePrecision, compiled_engine, task_of
from cnx_deploy.exporters.trt.network import Progress

__all__ = ["BuildSpec", "build_engine"]


def build_engine(
    onnx: Artifact | Path,
    spec: BuildSpec,
    output_dir: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Artifact[EngineManifest]:
    """Build `<output_dir>/<onnx name>-<rtx|trt>-<target>.engine` with its manifest.

    The ONNX file's hash is checked before it is parsed. `progress` is told a text while the compiler works. With
    `limits` TensorRT works in a child process that may use no more; without, in this one.

    Raises BuildError when TensorRT makes no engine, or one that computes LayerNorm in FP16 or an FP16 file in another
    precision; InputError for a target or batch that does not fit; what `artifacts` raises for altered files.
    """
    source = open_artifact(onnx.path if isinstance(onnx, Artifact) else onnx)
    if not is_onnx(source):
        raise InputError(
            f"{source.path} is of kind {source.manifest.kind}; an engine is built from an ONNX file (.onnx)."
        )
    backend = load_backend(spec.runtime)
    backend.check_target(spec.target)
    _check_batches(source, spec)
    _check_precision(source, spec.target)
    request = EngineRequest(
        onnx=source.manifest.request,
        runtime=backend.name,
        target=spec.target,
        batches=spec.batches,
        allow_tf32=spec.allow_tf32,
    )
    stem = f"{source.manifest.stem}-{backend.short_name}-{spec.target}"
    with stage_artifact(output_dir, stem, needed_bytes=source.size_bytes) as staging:
        made = reusable_artifact(output_dir, stem, request, source.sha256, force=force)
        model = source.manifest.model_seen_from(output_dir, source.path.parent)
        if made is not None and is_engine(made):
            return staging.restate(made, replace(made.manifest, model=model))
        check_graph(source.path, source.file_names)
        facts = _compiled(backend, source, spec, staging.folder / f"{stem}.engine", progress, limits)
        manifest = EngineManifest(
            stem=stem,
            files=staging.record(f"{stem}.engine"),
            model=model,
            request=request,
            source_name=source.path.name,
            source_sha256=source.sha256,
            facts=facts,
        )
        return staging.commit(manifest)


def _check_batches(source: Artifact[OnnxManifest], spec: BuildSpec) -> None:
    smallest, _, largest = source.manifest.batch
    for low, _, high in spec.batches:
        if low < smallest or high > largest:
            raise InputError(
                f"{source.path.name} was exported for batches {smallest} to {largest}; a profile of {low} to {high} "
                f"does not fit. Export it with --batch {min(low, smallest)}:{high}:{max(high, largest)}."
            )


def _check_precision(source: Artifact[OnnxManifest], target: str) -> None:
    gpu = find_gpus()[0].target if target == "current" else target
    precision = source.manifest.precision
    if not precision.runs_on(gpu):
        name = precision.name.upper()
        raise InputError(
            f"{source.path.name} is {name}, and {gpu} has no {name} arithmetic; sm{precision.smallest_capability} is "
            "the first that has. Export it with --precision fp16 for this GPU."
        )


def _compiled(
    backend: Backend,
    source: Artifact[OnnxManifest],
    spec: BuildSpec,
    plan: Path,
    progress: Progress | None,
    limits: Limits | None,
) -> EngineFacts:
    """Have the engine written to `plan`, here or in a child; what was found on the way."""
    precision = FilePrecision.of(source.manifest.deploy)
    if limits is None:
        content, facts = compiled_engine(backend, source.path, precision, spec, progress)
        plan.write_bytes(content)
        return facts
    name = source.path.name
    answer = run_isolated(
        "cnx_deploy.exporters.trt.compiling:compile_task",
        task_of(source.path, precision, spec, plan),
        limits,
        what=f"Building {name}",
        failure=BuildError,
        tick=None if progress is None else lambda seconds: progress(f"{name} {seconds:.0f} s", 0.0),
    )
    return typed(answer, EngineFacts)
