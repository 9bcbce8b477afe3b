"""`cnx-deploy diversity`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", type=FILE)
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="Folder or CSV file of images to measure on."
)
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Images, at most.")
@options.image_size
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the distances into an SVG file.")
@options.as_json
def diversity(plot: Path | None, as_json: bool, **arguments: Any) -> None:
    """Measure how different the channels of each block are: where the features of a CHECKPOINT have collapsed.

    The cosine distance analysis of the ConvNeXt V2 paper, section 4, for one checkpoint or several side by side, V1 and
    V2. Without --data the images are seeded and image-like, which tells networks apart but is no photograph.
    """
    from cnx_deploy.diversity.plot import write_plot
    from cnx_deploy.diversity.report import lines_of
    from cnx_deploy.diversity.run import DiversityRequest, run_diversity
    from cnx_deploy.plot_files import check_plot

    if plot is not None:
        check_plot(plot)
    request, done = DiversityRequest(**arguments), 0
    with options.reporter("Measuring") as progress:

        def told(name: str, images: int) -> None:
            nonlocal done
            done += images
            progress(name, done / (request.samples * len(request.checkpoints)))

        found = run_diversity(request, options.note, told)
    source = "seeded image-like" if request.data is None else request.data.as_posix()
    if plot is not None:
        options.note(f"{write_plot(found, plot, source)}")
    if as_json:
        options.echo_json({"schema_version": 1, "source": source, "networks": [each.to_dict() for each in found]})
        return
    for line in lines_of(found, source):
        options.echo(line)
