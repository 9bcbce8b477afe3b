"""A recorded ONNX file to an engine: profiles, checks, and what was found on the way in the manifest."""

import contextlib
import math
from dataclasses import replace
from pathlib import Path

from cnx_deploy.core.artifacts import is_engine, is_onnx, open_artifact, reusable_artifact, stage_artifact
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.files import sha256_of_file
from cnx_deploy.core.image_size import stage_sides
from cnx_deploy.core.manifest import Artifact, EngineFacts, EngineManifest, EngineRequest, OnnxManifest
from cnx_deploy.core.strict_json import typed
from cnx_deploy.core.variants import find_variant
from cnx_deploy.exporters.graph_checks import check_graph
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.compiling import (
    LISTS_KERNELS,
    BuildSpec,
    FilePrecision,
    compiled_engine,
    limits_for,
    task_of,
)
from cnx_deploy.exporters.trt.network import Progress
from cnx_deploy.exporters.trt.plugins import parser_environment
from cnx_deploy.kernels.settings import SHARED_BYTES

__all__ = ["BuildSpec", "build_engine", "check_build"]


def build_engine(
    onnx: Artifact | Path,
    spec: BuildSpec,
    output_dir: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Artifact[EngineManifest]:
    """Build `<output_dir>/<onnx name>-<rtx|trt>-<target>[-fused].engine` with its manifest.

    The ONNX file's hash is checked before it is parsed. `progress` is told a text while the compiler works. With
    `limits` TensorRT works in a child process that may use no more; without, in this one, but for an engine with own
    kernels, whose parser needs an environment of its own.

    Raises BuildError when TensorRT makes no engine, or one that computes LayerNorm in FP16 or an FP16 file in another
    precision; InputError for a target or batch that does not fit; what `artifacts` raises for altered files.
    """
    source = open_artifact(onnx.path if isinstance(onnx, Artifact) else onnx)
    backend = load_backend(spec.runtime)
    check_build(backend, source, spec)
    assert is_onnx(source)
    request = EngineRequest(
        onnx=source.manifest.request,
        runtime=backend.name,
        target=spec.target,
        batches=spec.batches,
        allow_tf32=spec.allow_tf32,
        fused=spec.fused,
        launcher_sha256=None if spec.launcher is None else sha256_of_file(Path(spec.launcher)),
    )
    stem = f"{source.manifest.stem}-{backend.short_name}-{spec.target}{'-fused' if spec.fused is not None else ''}"
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


def check_build(backend: Backend, source: Artifact, spec: BuildSpec) -> None:
    """Raise InputError for a target, batch or kernels that do not fit the file.

    It takes no time, so that of several builds all are looked at before the first. Raises MissingRequirementError where
    the target is this machine's GPU and there is none.
    """
    if not is_onnx(source):
        raise InputError(
            f"{source.path} is of kind {source.manifest.kind}; an engine is built from an ONNX file (.onnx)."
        )
    backend.check_target(spec.target)
    _check_batches(source, spec)
    source.manifest.precision.check_runs_on(spec.gpu, source.path.name)
    if spec.fused is not None:
        _check_fused(backend, source, spec)


MOST_SAMPLES, MOST_HIDDEN = (1 << 16) - 1, (1 << 31) - 1
"""Samples are counted in a grid's third dimension, and the hidden tensor of one in int32."""


def _check_batches(source: Artifact[OnnxManifest], spec: BuildSpec) -> None:
    smallest, _, largest = source.manifest.batch
    for low, _, high in spec.batches:
        if low < smallest or high > largest:
            raise InputError(
                f"{source.path.name} was exported for batches {smallest} to {largest}; a profile of {low} to {high} "
                f"does not fit. Export it with --batch {min(low, smallest)}:{high}:{max(high, largest)}."
            )


def _check_fused(backend: Backend, source: Artifact[OnnxManifest], spec: BuildSpec) -> None:
    """Raise InputError for what own kernels cannot be built of; the graph itself is looked at when it is rewritten."""
    manifest, deploy = source.manifest, source.manifest.deploy
    eight = deploy.row.placement is not None
    kept = [name for name in deploy.keep_fp32 if name.startswith("stages.")]
    variant = None if manifest.model.graph is not None else find_variant(manifest.model.variant)
    positions = max(math.prod(stage_sides(size, 0)) for size in deploy.checked_sizes)
    hidden = 0 if variant is None else positions * 4 * variant.dims[0]
    samples = max(high for _, _, high in spec.batches) * (1 if deploy.tta is None else 2)
    reasons = {
        f"{backend.name} was not tried with them": backend.name != LISTS_KERNELS,
        "it was rescued from another exporter": manifest.model.graph is not None,
        f"they compute in FP16 or BF16, and it is {deploy.precision.upper()}": not deploy.is_half or eight,
        f"they take the layout gpu, and it has {deploy.layout}": deploy.layout != "gpu",
        "ConvNeXt V1 has no GRN": variant is not None and variant.version != 2,
        f"it keeps {', '.join(kept)} in FP32": bool(kept),
        f"they count {MOST_HIDDEN} hidden values of an image, and its largest has {hidden}": hidden > MOST_HIDDEN,
        f"they count {MOST_SAMPLES} samples, and its largest batch has {samples}": samples > MOST_SAMPLES,
        f"they are compiled for {', '.join(SHARED_BYTES)}, not {spec.gpu}": spec.gpu not in SHARED_BYTES,
    }
    if found := next((reason for reason, holds in reasons.items() if holds), None):
        raise InputError(f"{source.path.name} cannot be built with own kernels: {found}. Leave --fused (fused) out.")
    if spec.launcher is not None and not Path(spec.launcher).is_file():
        raise InputError(f"{spec.launcher} is no file; expected the library that docs/engines.md shows how to build.")


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
    if limits is None and spec.fused is not None:
        limits = limits_for(source.size_bytes)
    if limits is None:
        content, facts = compiled_engine(backend, source.path, precision, spec, progress)
        plan.write_bytes(content)
        return facts
    name = source.path.name
    with parser_environment() if spec.fused is not None else contextlib.nullcontext() as environment:
        answer = run_isolated(
            "cnx_deploy.exporters.trt.compiling:compile_task",
            task_of(source.path, precision, spec, plan),
            limits,
            what=f"Building {name}",
            failure=BuildError,
            tick=None if progress is None else lambda seconds: progress(f"{name} {seconds:.0f} s", 0.0),
            environment=environment,
        )
    return typed(answer, EngineFacts)
