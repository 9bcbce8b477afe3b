"""`cnx-deploy export`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.precision import exportable_precisions


@click.command()
@options.variant
@options.checkpoint
@options.pretrained
@options.seed
@options.num_classes
@click.option("--reset-head", is_flag=True, help="Re-initialise the head when the class count differs.")
@options.image_size
@click.option(
    "--precision", "precisions", type=click.Choice(exportable_precisions()), multiple=True, default=("fp32", "fp16"),
    show_default=True, help="Precision of the file; repeat for several.",
)  # fmt: skip
@click.option("--batch", type=options.BATCH_RANGE, default=(1, 8, 64), help="Batch range [default: 1:8:64].")
@click.option(
    "--input", "input_kind", type=click.Choice(["float", "uint8"]), default="float", show_default=True,
    help="Raw images: float32 (N,3,S,S) in [0,1], or uint8 (N,S,S,3).",
)  # fmt: skip
@click.option(
    "--optimize-for",
    type=click.Choice(["gpu", "cpu"]),
    help="Layout of the graph [default: cpu for fp32, else gpu].",
)
@click.option(
    "--keep-fp32",
    metavar="MODULE",
    multiple=True,
    help="Keep a module of the half-precision files in FP32, such as stages.2.3 or stages.2.3.pwconv1 (repeatable).",
)
@click.option(
    "--without-fold",
    "leave_out",
    metavar="NAME",
    multiple=True,
    help="Leave out a fold of the deploy form (repeat for several); docs/decisions/0003 lists them.",
)
@click.option(
    "--output-dir", type=click.Path(file_okay=False, path_type=Path), default=Path("export"), show_default=True
)
@click.option("--name", help="First part of the file names [default: the variant].")
@click.option("--no-verify", is_flag=True, help="Skip the comparison of the written file with PyTorch.")
@options.force
@options.as_json
def export(**arguments: Any) -> None:
    """Export a variant to ONNX and write its manifest.

    Without --checkpoint or --pretrained the weights are random, GRN included, and the manifest says so.
    """
    from cnx_deploy.api import ExportRequest, run_exports  # torch is loaded only when asked for

    as_json = bool(arguments.pop("as_json"))
    results = run_exports(ExportRequest(**arguments), options.note)
    if as_json:
        options.echo_json({"artifacts": [{"path": str(r.path), "sha256": r.sha256} for r in results]})
    else:
        for artifact in results:
            options.echo(artifact.path)
