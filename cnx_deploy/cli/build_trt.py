"""`cnx-deploy build-trt`."""

from typing import Any

import click

from cnx_deploy.cli import options


@click.command("build-trt")
@options.files
@click.option(
    "--runtime", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]), default="auto", show_default=True,
    help="auto: TensorRT where it and a GPU are present, else TensorRT-RTX ahead of time.",
)  # fmt: skip
@click.option(
    "--target", "targets", type=options.TARGET, multiple=True,
    help="GPU to build for, such as sm89 or 'RTX 4090'; repeatable [default: this machine's, else sm86, sm89, sm120].",
)  # fmt: skip
@click.option(
    "--batch", "batches", type=options.BATCH_RANGE, multiple=True,
    help="One optimisation profile each [default: the range of the file].",
)  # fmt: skip
@click.option("--tf32/--no-tf32", "allow_tf32", default=False, show_default=True, help="TF32 in FP32 layers.")
@options.export_dir
@options.output_dir("engines")
@options.force
@options.as_json
def build_trt(as_json: bool, **arguments: Any) -> None:
    """Build TensorRT engines from recorded ONNX FILES, by default every FP16 file in --export-dir."""
    from cnx_deploy.api import BuildRequest, run_builds

    with options.reporter("Building") as progress:
        engines = run_builds(BuildRequest(**arguments), options.note, progress)
    options.echo_artifacts(engines, as_json=as_json)
