"""The stages one after the other over folders of artifacts: what the commands do, as functions.

Each takes a frozen request and a callable that is told one line at a time; folders are named by the caller.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cnx_deploy.core.artifacts import find_artifacts, open_artifact, select_artifacts
from cnx_deploy.core.deploy_spec import DeploySpec, InputKind, Layout
from cnx_deploy.core.errors import InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact, EngineManifest, OnnxManifest
from cnx_deploy.core.precision import find_precision
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.system import this_machine
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.exporters.trt.backend import default_targets, load_backend, require_gpu
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine
from cnx_deploy.exporters.trt.compiling import limits_for
from cnx_deploy.model.checkpoint import LoadedModel, resolve_model
from cnx_deploy.model.deploy import check_parts
from cnx_deploy.runners.registry import find_runner
from cnx_deploy.verification.export_check import check_exported
from cnx_deploy.verification.labelled import reference_for
from cnx_deploy.verification.polygraphy_io import save_comparison
from cnx_deploy.verification.saved_results import SavedOutputs
from cnx_deploy.verification.verify import Progress, Reference, Verification, model_record, verify_artifact

__all__ = [
    "BuildRequest",
    "ExportRequest",
    "VerifyRequest",
    "run_builds",
    "run_exports",
    "run_verifications",
]

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What `cnx-deploy export` takes; see `onnx_export.ExportSpec` and `model.deploy.DeploySpec`.

    `image_size` None means the checkpoint's own, else 224. `keep_fp32` is of the half-precision files alone.
    """

    variant: str
    checkpoint: Path | None = None
    pretrained: str | None = None
    seed: int = 0
    num_classes: int | None = None
    reset_head: bool = False
    image_size: int | None = None
    precisions: tuple[str, ...] = ("fp32", "fp16")
    batch: tuple[int, int, int] = (1, 8, 64)
    input_kind: InputKind = "float"
    optimize_for: Layout | None = None
    leave_out: tuple[str, ...] = ()
    keep_fp32: tuple[str, ...] = ()
    output_dir: Path = Path("export")
    name: str | None = None
    no_verify: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """What `cnx-deploy build-trt` takes. Without `files`, every FP16 file recorded in `export_dir`.

    `batches` empty means the range that each file was exported for; `targets` empty means this machine's GPU, or
    without one `trt.backend.DEFAULT_TARGETS`.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    output_dir: Path = Path("engines")
    runtime: Literal["auto", "tensorrt", "tensorrt-rtx"] = "auto"
    targets: tuple[str, ...] = ()
    batches: tuple[tuple[int, int, int], ...] = ()
    allow_tf32: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """What `cnx-deploy verify` takes. Without `files`, everything recorded in both folders.

    `data`: images, or a folder of images for each class, all of which are used unless `samples` limits them; without
    labels, and without `data`, None is 64. `runners`: see `verification.verify_artifact`. `save_inputs`: folder for
    the images and the reference's logits in Polygraphy's formats, in one folder a network; of labelled images the
    first that 64, or `samples`, asks for. `save_outputs`: new folder for the logits of both sides, to be judged again.
    """

    files: tuple[Path, ...] = ()
    export_dir: Path = Path("export")
    engines_dir: Path = Path("engines")
    data: Path | None = None
    samples: int | None = None
    save_inputs: Path | None = None
    save_outputs: Path | None = None
    runners: tuple[str, ...] = ()


def run_exports(request: ExportRequest, note: Note) -> list[Artifact[OnnxManifest]]:
    """Export one model in each precision asked for; each file is compared with PyTorch before it is put into place."""
    loaded = resolve_model(
        request.variant,
        checkpoint=request.checkpoint,
        pretrained=request.pretrained,
        seed=request.seed,
        num_classes=request.num_classes,
        reset_head=request.reset_head,
    )
    check_parts(request.keep_fp32, loaded.model.variant)
    halves = [name for name in request.precisions if find_precision(name).has_islands]
    if request.keep_fp32 and not halves:
        raise InputError("--keep-fp32 is of half-precision files, and none is asked for. Add --precision fp16 or bf16.")
    if loaded.weights.origin == "random":
        kind = f"random (seed {request.seed}), {_included(loaded)} included"
        note(f"No checkpoint: weights are {kind}. Predictions mean nothing.")
    if loaded.head_is_new:
        note(f"The head for {loaded.model.num_classes} classes is new and random: train it before it is used.")
    preprocessing = loaded.preprocessing or Preprocessing()
    if request.image_size is not None:
        preprocessing = replace(preprocessing, image_size=request.image_size)
    return [_export(loaded, preprocessing, precision, request, note) for precision in request.precisions]


def run_builds(
    request: BuildRequest, note: Note, progress: Callable[[str, float], None] | None = None
) -> list[Artifact[EngineManifest]]:
    """Build an engine for each file and target.

    Raises InputError when there is nothing to build from, and whatever `trt.builder.build_engine` raises.
    """
    sources = [open_artifact(path) for path in request.files] or [
        artifact for artifact in find_artifacts(request.export_dir, "onnx") if artifact.manifest.precision.has_islands
    ]
    present = [artifact for artifact in sources if artifact.path.is_file()]
    if not present:
        raise InputError(
            f"No FP16 ONNX file is recorded and present in {request.export_dir}. "
            "Run `cnx-deploy export --variant atto` first, or name the files to build from."
        )
    backend = load_backend(request.runtime)
    targets = request.targets or default_targets(backend)
    engines = []
    for artifact in present:
        low, typical, high = artifact.manifest.batch
        for target in targets:
            spec = BuildSpec(
                runtime=backend.name,
                target=target,
                batches=request.batches or ((low, typical, high),),
                allow_tf32=request.allow_tf32,
            )
            note(f"Building {artifact.path.name} for {target} with {backend.name} {backend.version}")
            limits = limits_for(artifact.size_bytes)
            words = (artifact, spec, request.output_dir)
            engine = build_engine(*words, force=request.force, progress=progress, limits=limits)
            engines.append(engine)
            size = f"{engine.manifest.files[0].size_bytes / 1e6:.1f} MB"
            note(f"  {engine.path} ({'made from the same inputs: reused' if engine.reused else size})")
    return engines


def run_verifications(request: VerifyRequest, note: Note, progress: Progress | None = None) -> list[Verification]:
    """Verify each artifact; the PyTorch reference of a network is computed once.

    Raises MissingRequirementError when an engine that was named cannot run here.
    """
    found: list[Verification] = []
    told: set[str] = set()
    outputs = SavedOutputs(request.save_outputs) if request.save_outputs is not None else None
    reference: Reference | None = None
    for artifact in select_artifacts(request.files, request.export_dir, request.engines_dir, note):
        note(f"Verifying {artifact.path.name}")
        if request.files and artifact.manifest.kind == "engine":
            require_gpu()  # an engine that was named is asked for; before any weight is loaded
        if reference is None or not reference.matches(artifact):
            reference = reference_for(artifact, request.data, request.samples)
        runners, unfit = _fitting(request, artifact)
        if unfit and not runners:
            found.append(Verification(artifact.path.name, artifact.manifest.kind, (), not_run=unfit))
            continue
        verification = verify_artifact(artifact, reference, progress, runners=runners, outputs=outputs)
        if outdated := _outdated(artifact, request.export_dir):
            verification = replace(verification, notes=(*verification.notes, outdated))
        if request.files and verification.not_run:
            raise MissingRequirementError(f"{artifact.path.name}: {verification.not_run[0]}")
        found.append(verification)
        if outputs is not None:
            outputs.finish(artifact, verification.not_run, verification.notes)
        if request.save_inputs is not None and artifact.manifest.kind == "onnx":
            folder = request.save_inputs / artifact.manifest.stem
            batches = reference.batches_for(artifact)
            save_comparison(folder, batches, reference.logits(artifact, batches, progress))
            note(f"  images and PyTorch's logits for `polygraphy run`: {folder}")
        for path in [path for path in reference.left_out if path not in told]:
            told.add(path)
            note(f"  left out: {reference.left_out[path].reason}")
    return found


def _fitting(request: VerifyRequest, artifact: Artifact) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The runners asked for that fit a recorded file, and why others do not; a file that was named takes them all."""
    if request.files or artifact.manifest.kind != "onnx":
        return request.runners, ()
    machine = this_machine()
    reasons = {name: find_runner(name).reason_against(artifact, machine) for name in request.runners}
    fitting = tuple(name for name, reason in reasons.items() if reason is None)
    return fitting, tuple(str(reason) for reason in reasons.values() if reason is not None)


def _outdated(engine: Artifact, export_dir: Path) -> str | None:
    """What to say of an engine whose ONNX file was exported again since."""
    name = engine.manifest.source_name
    if engine.manifest.kind != "engine" or Path(name).name != name or not Path(name).suffix:
        return None  # a manifest that lies: `verify --records` says what of
    if not os.path.isfile(export_dir / Path(name).with_suffix(".json")):  # noqa: PTH113 - Path's own raises for some names
        return None
    recorded = next((made for made in find_artifacts(export_dir, "onnx") if made.path.name == name), None)
    if recorded is None or recorded.sha256 == engine.manifest.source_sha256:
        return None
    return f"{engine.path.name} was built from an earlier {engine.manifest.source_name}: build it again with --force."


def _included(loaded: LoadedModel) -> str:
    """What fresh weights leave without effect and random ones do not."""
    return "GRN" if loaded.model.variant.version == 2 else "LayerScale"


def _export(
    loaded: LoadedModel, preprocessing: Preprocessing, precision: str, request: ExportRequest, note: Note
) -> Artifact[OnnxManifest]:
    deploy = DeploySpec(
        precision=precision,
        image_size=preprocessing.image_size,
        input_kind=request.input_kind,
        layout=request.optimize_for,
        leave_out=request.leave_out,
        keep_fp32=request.keep_fp32 if find_precision(precision).has_islands else (),
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    spec = ExportSpec(deploy=deploy, batch=request.batch, name=request.name)
    record = model_record(loaded, preprocessing, request.output_dir, request.checkpoint)
    check = None if request.no_verify else check_exported(loaded, spec)
    artifact = export_onnx(loaded.model, record, spec, request.output_dir, force=request.force, verify=check)
    gc.collect()  # the exporter's graphs are cycles that hold the weights: huge in two precisions needs them gone
    if artifact.reused:
        note(f"{artifact.path} is there and was made from the same inputs: reused")
    else:
        parity = artifact.manifest.facts.parity
        verdict = f"relative L2 {parity.differences.relative_l2_max:.1e} against PyTorch" if parity else "not verified"
        note(f"{artifact.path} ({artifact.size_bytes / 1e6:.1f} MB), {verdict}")
    return artifact
