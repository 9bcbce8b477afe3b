"""`cnx-deploy build-trt`."""

from typing import Any

import click

from cnx_deploy.cli import options

FORMS = ("auto", "stored", "recomputed")


class FusedAloneCommand(click.Command):
    """A command whose `--fused` may stand before a FILE: click alone would take the file as its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give `--fused` its value `auto` where the next word is none of its values."""
        followed = zip(args, [*args[1:], ""], strict=False)
        given = [f"{word}=auto" if word == "--fused" and after not in FORMS else word for word, after in followed]
        return super().parse_args(ctx, given)


@click.command("build-trt", cls=FusedAloneCommand)
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
@click.option(
    "--fused", type=click.Choice(FORMS), is_flag=False, flag_value="auto",
    help="Compute blocks by own kernels, the hidden tensor stored or recomputed; alone it means auto. Not run yet.",
)  # fmt: skip
@click.option(
    "--launcher",
    type=options.EXISTING,
    help="Library of kernel_launcher.cpp that launches them, to go into the engine.",
)
@options.export_dir
@options.output_dir("engines")
@options.force
@options.as_json
def build_trt(as_json: bool, **arguments: Any) -> None:
    """Build TensorRT engines from recorded ONNX FILES, by default all of --export-dir but FP32 ones."""
    from cnx_deploy.api import BuildRequest, run_builds

    with options.reporter("Building") as progress:
        engines = run_builds(BuildRequest(**arguments), options.note, progress)
    options.echo_artifacts(engines, as_json=as_json)
