"""`cnx-deploy rescue`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


def _sizes(ctx: click.Context, param: click.Parameter, given: Sequence[str]) -> dict[str, int]:
    """`height=512`, repeated: sizes of open axes by name."""
    pairs = [text.rpartition("=") for text in given]
    if wrong := [text for text, (name, _, size) in zip(given, pairs, strict=True) if not name or not size.isdecimal()]:
        raise click.BadParameter(f"{wrong[0]!r} is no AXIS=SIZE, such as height=512.")
    return {name: int(size) for name, _, size in pairs}


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--inputs", type=options.EXISTING, help="Inputs for the proof, an .npz file [default: seeded images].")
@click.option(
    "--size", "sizes", metavar="AXIS=SIZE", multiple=True, callback=_sizes,
    help="Size of an open axis in the proof, by its name in the graph (repeatable) [default: batch 2, sides 224].",
)  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the proof's images or noise.")
@click.option("--compile", "compiles", is_flag=True, help="Count kernels and bytes before and after (TensorRT-RTX).")
@click.option("--target", type=options.TARGET, default="sm89", show_default=True, help="GPU to compile for.")
@click.option("--batch", type=options.BATCH_RANGE, help="Batch range of an open batch [default: 1:8:64].")
@click.option("--task", metavar="NAME", help="What the one output is, such as classification [default: values].")
@click.option("--output", metavar="WORD", help="Which of the task's outputs it is: logits, probabilities.")
@options.class_names
@options.several(*options.pixels)
@options.output_dir("export")
@click.option("--name", help="First part of the file name [default: that of FILE].")
@options.force
@options.as_json
def rescue(file: Path, compiles: bool, target: str, as_json: bool, **words: Any) -> None:
    """Write the ONNX file FILE in FP16 with every GRN and LayerNorm in FP32, and prove the result.

    FILE may come from timm, transformers or any exporter, in FP32 or in half. Exit code 3 where it holds no GRN and no
    LayerNorm, or where the result differs from the original; nothing is written then.
    """
    from cnx_deploy import rescue as rescue_any

    result = rescue_any(file, target=target if compiles else None, note=options.note, **words)
    if as_json:
        options.echo_json(result.to_dict())
    else:
        options.echo(result)
