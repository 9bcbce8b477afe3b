"""`cnx-deploy push`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.command()
@click.argument("source", type=options.PATH)
@click.argument("artifacts", nargs=-1, type=options.PATH)
@click.option("--to", type=options.FOLDER, required=True, help="Folder to write.")
@click.option(
    "--library", type=click.Choice(["timm", "transformers"]),
    help="The one library that the folder is for [default: both, with the weights twice].",
)  # fmt: skip
@options.task
@options.ema
@options.entry
@options.soup
@options.other_size
@options.preprocessing
@click.option("--repo-id", metavar="USER/MODEL", help="Upload the folder to this repository of a model hub.")
@click.option("--public", is_flag=True, help="Make a new repository public [default: private].")
@options.force
@options.as_json
def push(source: Path, as_json: bool, **arguments: Any) -> None:
    """Write the weights of SOURCE as a folder that timm and transformers load, with a model card.

    SOURCE is a checkpoint, or a recorded ONNX file or engine whose weights are meant. ARTIFACTS are recorded files of
    the same weights; the card lists their parity. Nothing is sent without --repo-id.
    """
    from cnx_deploy.api import PushRequest, run_push

    made = run_push(PushRequest(source=source, **arguments), options.note)
    if as_json:
        words = {"path": str(made.path), "files": made.files, "libraries": made.libraries}
        options.echo_json({**words, "notes": made.notes, "url": made.url})
    else:
        options.echo(made)
