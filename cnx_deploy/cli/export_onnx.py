"""`cnx-deploy export`."""

from typing import Any

import click

from cnx_deploy.cli import options
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
    "Graph": ("precisions", "batch", "optimize_for", "keep_fp32", "leave_out"),
    "Files": ("output_dir", "name", "no_verify", "force"),
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
    "--optimize-for", type=click.Choice(["gpu", "cpu"]), help="Layout of the graph [default: cpu for fp32, else gpu]."
)
@click.option(
    "--keep-fp32", metavar="MODULE", multiple=True,
    help="Keep a module of the half-precision files in FP32, such as stages.2.3 or stages.2.3.pwconv1 (repeatable).",
)  # fmt: skip
@click.option(
    "--without-fold", "leave_out", metavar="NAME", multiple=True,
    help="Leave out a fold of the deploy form (repeat for several); docs/decisions/0003 lists them.",
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

    options.echo_artifacts(run_exports(ExportRequest(**arguments), options.note), as_json=as_json)
