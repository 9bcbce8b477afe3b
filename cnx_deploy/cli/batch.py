"""`cnx-deploy batch`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CheckFailedError

LINE_SECONDS = 30.0
"""Between two lines of progress where stderr is no terminal."""


@click.command()
@click.argument("artifact", type=options.PATH)
@click.argument("images", nargs=-1, required=True)
@click.option("--to", "out", required=True, type=options.PATH, metavar="OUT", help="Folder to write, or to go on with.")
@click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
    help="One process here, or Ray Data on this machine or a cluster (extra ray).",
)  # fmt: skip
@options.top
@click.option("--probabilities", is_flag=True, help="Add a column with the probabilities of all classes.")
@click.option(
    "--keep", metavar="NAME", multiple=True, help="Add an output as a column, such as embedding (repeatable)."
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images run at once.")
@click.option(
    "--part-size", type=click.IntRange(min=1),
    help="Images in a file of OUT [default: so many that there are 256 files, of 16 to 1,024 images each].",
)  # fmt: skip
@click.option("--column", help="Column of paths in a CSV table, or of image bytes in a Parquet file.")
@click.option("--id-column", help="Column of a CSV table or Parquet file that names its rows.")
@options.image_folder
@click.option("--address", help="With --engine ray: a running cluster, such as auto or 10.0.0.1:6379.")
@click.option("--actors", type=click.IntRange(min=1), help="With --engine ray: processes that hold the network.")
@click.option(
    "--cpus-per-actor", type=click.IntRange(min=1), default=1, show_default=True,
    help="With --engine ray: processors and threads of each.",
)  # fmt: skip
@click.option(
    "--gpus-per-actor", type=click.FloatRange(min=0),
    help="With --engine ray: GPUs of each [default: 1 for an engine and --device cuda].",
)  # fmt: skip
@options.opened_model
@options.checkpoint_answer
@options.outputs
@options.as_json
def batch(artifact: Path, images: tuple[str, ...], out: Path, as_json: bool, **words: Any) -> None:
    """Answer for all of IMAGES with ARTIFACT and write Parquet files; the same command goes on where it was stopped.

    IMAGES are folders, patterns such as 'shards/*.tar', image files, CSV tables of paths, Parquet files of image bytes
    or WebDataset tars. OUT/rows has a row an image: index, id, the best classes or why there is none, the model's hash.

    An image that cannot be read is a row with its reason, and then the exit code is 3 at the end.
    """
    from cnx_deploy.api import batch as run

    with _progress() as progress:
        try:
            result = run(artifact, images, out, note=options.note, progress=progress, **words)
        except KeyboardInterrupt:
            options.note(f"Stopped. What is done is in {out}, and the same command goes on with the rest.")
            raise
    if as_json:
        options.echo_json(result.to_dict())
    else:
        options.echo(result)
    if result.errors:
        named = [f"  {name}: {reason}" for name, reason in result.first_errors[:5]]
        text = "\n".join([f"{result.errors:,} of {result.rows:,} rows have an error.", *named])
        options.fail(CheckFailedError(text), as_json=as_json)


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A live line where stderr is a terminal, else a line now and then."""
    last = time.monotonic()

    with options.reporter("Batch") as live:

        def tell(text: str, share: float) -> None:
            nonlocal last
            live(text, share)
            if not sys.stderr.isatty() and time.monotonic() - last >= LINE_SECONDS:
                last = time.monotonic()
                options.note(text)

        yield tell
