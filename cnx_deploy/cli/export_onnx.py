"""`cnx-deploy export`."""

from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.eight_bits import METHODS
from cnx_deploy.core.precision import exportable_precisions

SECTIONS = {
    "Weights": (
        "variant", "checkpoint", "pretrained", "task", "task_options", "seed", "num_classes", "reset_head", "ema",
        "entry", "soup",
    ),
    "Images": (
        "image_size", "in_chans", "mean", "std", "crop_ratio", "crop_mode", "pad_value", "interpolation", "class_names",
        "input_kind",
    ),
    "Answer": ("outputs", "thresholds", "tta", "temperature"),
    "Eight bits": ("calibration", "samples", "calibration_method", "keep_fp16", "gate_targets", "no_engine_gates"),
    "Graph": ("precisions", "batch", "optimize_for", "keep_fp32", "leave_out"),
    "Files": ("formats", "output_dir", "name", "no_verify", "force"),
}  # fmt: skip


@click.command(cls=options.SectionedCommand, sections=SECTIONS)
@options.variant
@options.checkpoint
@options.pretrained
@options.task
@options.task_options
@options.seed
@options.num_classes
@options.reset_head
@options.ema
@options.entry
@options.soup
@options.image_sizes
@options.preprocessing
@click.option(
    "--precision", "precisions", type=click.Choice(exportable_precisions()), multiple=True, default=("fp32", "fp16"),
    show_default=True, help="Precision of the file; repeat for several.",
)  # fmt: skip
@options.outputs
@options.thresholds
@options.tta
@options.temperature
@click.option("--batch", type=options.BATCH_RANGE, help="Batch range [default: 1:8:64, on canvases 1:2:8].")
@click.option(
    "--input", "input_kind", type=click.Choice(["float", "uint8"]), default="float", show_default=True,
    help="Raw images: float32 (N,C,S,S) in [0,1], or uint8 (N,S,S,C).",
)  # fmt: skip
@click.option(
    "--optimize-for", type=click.Choice(["gpu", "cpu", "openvino"]),
    help="Layout of the graph: for TensorRT, ONNX Runtime on a CPU or OpenVINO [default: cpu for fp32, else gpu].",
)  # fmt: skip
@click.option(
    "--keep-fp32", metavar="MODULE", multiple=True,
    help="Keep a module of the half-precision files in FP32, such as stages.2.3 or stages.2.3.pwconv1 (repeatable).",
)  # fmt: skip
@click.option(
    "--calibration", type=options.PATH, metavar="DATA",
    help="Images that fp8 and int8 are calibrated on and judged by: a folder or a CSV file.",
)  # fmt: skip
@click.option("--samples", type=click.IntRange(1), default=200, show_default=True, help="Images to calibrate on.")
@click.option(
    "--calibration-method", type=click.Choice(METHODS), default="max", show_default=True,
    help="Scale of a tensor: by its largest value, the least squared error, or 99.99 % of its values.",
)  # fmt: skip
@click.option(
    "--keep-fp16", metavar="MODULE", multiple=True,
    help="Keep a module of fp8 and int8 files in FP16, such as stages.3.1 or stages.3.1.pwconv2 (repeatable).",
)  # fmt: skip
@click.option(
    "--gate-target", "gate_targets", type=options.TARGET, multiple=True,
    help="GPU whose engines judge fp8 and int8 files, such as T4 or sm120 (repeatable) [default: sm89].",
)  # fmt: skip
@click.option("--no-engine-gates", is_flag=True, help="Compile no engine to judge an fp8 or int8 file by.")
@click.option(
    "--without-fold", "leave_out", metavar="NAME", multiple=True,
    help="Leave out a fold of the deploy form (repeat for several); docs/decisions/0003 lists them.",
)  # fmt: skip
@click.option(
    "--format", "formats", type=click.Choice(["onnx", "pt2"]), multiple=True, default=("onnx",), show_default=True,
    help="pt2: beside each half-precision ONNX file a program of torch.export with own kernels.",
)  # fmt: skip
@options.output_dir("export")
@click.option("--name", help="First part of the file names [default: the variant].")
@click.option("--no-verify", is_flag=True, help="Skip the comparison of the written file with PyTorch.")
@options.force
@options.as_json
def export(as_json: bool, **arguments: Any) -> None:
    """Export a variant to ONNX and write its manifest.

    Without --checkpoint or --pretrained the weights are random, GRN included, and the manifest says so.
    """
    from cnx_deploy.api import ExportRequest, run_exports  # torch is loaded only when asked for

    with options.reporter("Exporting") as progress:
        made: list[Any] = list(run_exports(ExportRequest(**arguments), options.note, progress))
    if "pt2" in arguments["formats"]:
        from cnx_deploy.verification.program import program_of

        made += [program_of(artifact) for artifact in made if artifact.manifest.precision.has_islands]
    options.echo_artifacts(made, as_json=as_json)
