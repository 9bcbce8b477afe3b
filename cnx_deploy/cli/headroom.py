"""`cnx-deploy headroom`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--variant", **{**options.VARIANT, "help": "Size of the network [default: the checkpoint's]."})
@options.pretrained
@options.seed
@options.num_classes
@click.option("--reset-head", is_flag=True, help="Re-initialise the head when the class count differs.")
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of images to measure on."
)
@options.image_size
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Images, at most.")
@click.option("--margin", type=click.FloatRange(min=1.0), default=4.0, show_default=True, help="Factor to be kept.")
@click.option("--all", "lists_all", is_flag=True, help="List every tensor, not the largest alone.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the shares into an SVG file.")
@options.as_json
def headroom(lists_all: bool, plot: Path | None, as_json: bool, **arguments: Any) -> None:
    """Measure how far a network (CHECKPOINT, published or random weights) is from what FP16 can hold.

    Exit code 3 when a tensor that the FP16 file stores lacks the margin, or a weight is infinite in FP16.
    """
    from cnx_deploy.core.plotting import check_plot
    from cnx_deploy.diagnosis.headroom.analysis import HeadroomRequest, run_headroom
    from cnx_deploy.diagnosis.headroom.plot import write_plot
    from cnx_deploy.diagnosis.headroom.report import failure, lines_of

    if plot is not None:
        check_plot(plot)
    request, done = HeadroomRequest(**arguments), 0
    with options.reporter("Measuring") as progress:

        def told(images: int) -> None:
            nonlocal done
            done += images
            progress(f"{done} images", done / request.samples)

        found = run_headroom(request, options.note, told)
    if plot is not None:
        options.note(f"{write_plot(found, plot)}")
    if as_json:
        options.echo_json(found.to_dict())
    else:
        for line in lines_of(found, lists_all=lists_all):
            options.echo(line)
    if (error := failure(found)) is not None:
        options.fail(error, as_json=as_json)
