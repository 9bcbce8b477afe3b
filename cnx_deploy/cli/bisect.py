"""`cnx-deploy bisect`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of images to judge on."
)
@click.option("--samples", type=click.IntRange(min=1), default=4, show_default=True, help="Images to judge on.")
@click.option(
    "--gate", type=click.Choice(["fp16", "bf16", "tf32-engine", "fp32-engine", "fp32"]),
    help="What has to hold [default: that of the file's precision].",
)  # fmt: skip
@options.as_json
def bisect(file: Path, as_json: bool, **arguments: Any) -> None:
    """Find the smallest set of modules to keep in FP32 with which a recorded FP16 or BF16 ONNX FILE passes its gate.

    Exit code 0 when there is one or none is needed, 3 when nothing helps.
    """
    from cnx_deploy.diagnosis.bisect.find import run_bisection
    from cnx_deploy.diagnosis.bisect.report import document_of, failure, lines_of

    found = run_bisection(file, options.note, **arguments)
    if as_json:
        options.echo_json(document_of(found))
    else:
        for line in lines_of(found):
            options.echo(line)
    if (error := failure(found)) is not None:
        options.fail(error, as_json=as_json)
