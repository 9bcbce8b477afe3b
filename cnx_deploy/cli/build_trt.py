"""`cnx-deploy build-trt`."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options

TARGETS = ("current", "sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "sm121")


@click.command("build-trt")
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--runtime", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True,
    help="auto: TensorRT where it and a GPU are present, else TensorRT-RTX ahead of time.",
)  # fmt: skip
@click.option("--target", "targets", type=click.Choice(TARGETS), multiple=True, help="GPU to build for; repeatable.")
@click.option(
    "--batch", "batches", type=options.BATCH_RANGE, multiple=True,
    help="One optimisation profile each [default: the range of the file].",
)  # fmt: skip
@click.option("--tf32/--no-tf32", "allow_tf32", default=False, show_default=True, help="TF32 in FP32 layers.")
@options.export_dir
@click.option(
    "--output-dir", type=click.Path(file_okay=False, path_type=Path), default=Path("engines"), show_default=True
)
@options.force
@options.as_json
def build_trt(**arguments: Any) -> None:
    """Build TensorRT engines from recorded ONNX FILES, by default every FP16 file in --export-dir."""
    from cnx_deploy.api import BuildRequest, run_builds

    as_json = bool(arguments.pop("as_json"))
    with options.reporter("Building") as progress:
        engines = run_builds(BuildRequest(**arguments), options.note, progress)
    if as_json:
        options.echo_json({"artifacts": [{"path": str(e.path), "sha256": e.sha256} for e in engines]})
    else:
        for engine in engines:
            options.echo(engine.path)
