"""`cnx-deploy package`: artifacts as other programs take them."""

from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.group()
def package() -> None:
    """Write what a server or another tool takes of artifacts."""


to = click.option("--to", type=options.FOLDER, required=True, help="Folder to write, whole or not at all.")


def write(kind: str, files: tuple[Path, ...], as_json: bool, **words: Any) -> None:
    """Write a package and print what it is; notes go to stderr."""
    from cnx_deploy.api import package as write_package

    made = write_package(files, kind, note=lambda text: options.note(f"Note: {text}"), **words)
    if as_json:
        options.echo_json(made.to_dict())
    else:
        options.echo(made)


@package.command()
@options.files
@to
@click.option("--name", help="Name of the models [default: the artifact's].")
@click.option("--version", type=click.IntRange(min=1), default=1, show_default=True, help="Number of the version.")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True,
    help="Where the server runs networks; auto is on GPUs where it has some.",
)  # fmt: skip
@click.option(
    "--instances", type=click.IntRange(min=1), default=1, show_default=True, help="Copies of a network, on each GPU."
)
@click.option(
    "--preprocessing-instances", type=click.IntRange(min=1), default=2, show_default=True,
    help="Processes that decode and resize pictures.",
)  # fmt: skip
@click.option(
    "--max-delay-ms", type=click.FloatRange(min=0), default=5.0, show_default=True,
    help="How long a request waits for others to fill a batch.",
)  # fmt: skip
@click.option(
    "--queue-limit", type=click.IntRange(min=1),
    help="Requests that may wait; more are refused [default: four of the largest batches].",
)  # fmt: skip
@click.option(
    "--queue-timeout-ms", type=click.FloatRange(min=0), default=10_000.0, show_default=True,
    help="How long a request may wait before it is refused; 0 is without limit.",
)  # fmt: skip
@click.option("--storage-uri", metavar="URI", help="Where KServe finds the repository: writes an InferenceService too.")
@options.force
@options.as_json
def triton(files: tuple[Path, ...], as_json: bool, **words: Any) -> None:
    """Write a model repository of NVIDIA Triton: networks, their preprocessing, and ensembles that take picture files.

    ONNX files run in Triton's ONNX Runtime, TensorRT plans in its TensorRT; plans of one network for several GPUs
    become one model.
    """
    write("triton", files, as_json, **words)


@package.command()
@click.argument("folder", type=options.FOLDER)
@options.as_json
def check(folder: Path, as_json: bool) -> None:
    """Say what is wrong with a model repository of Triton: configurations, files, hashes, labels, ensembles.

    Exit code 3 when something is. No server is needed; a server does not find all of it.
    """
    from cnx_deploy.api import check_package
    from cnx_deploy.core.errors import CheckFailedError

    report = check_package(folder)
    if as_json:
        options.echo_json(report.to_dict())
    else:
        options.echo(report)
    if not report.passed:
        raise click.exceptions.Exit(CheckFailedError.exit_code)


@package.command()
@options.files
@to
@click.option(
    "--mode", type=click.Choice(["primary", "secondary"]), default="primary", show_default=True,
    help="Look at whole frames, or at the objects that element 1 has found.",
)  # fmt: skip
@click.option(
    "--threshold", type=click.FloatRange(0.0, 1.0, max_open=True), default=0.0, show_default=True,
    help="A class is named from a probability above this.",
)  # fmt: skip
@options.force
@options.as_json
def deepstream(files: tuple[Path, ...], as_json: bool, **words: Any) -> None:
    """Write a configuration of DeepStream's nvinfer for one FP32 ONNX file or TensorRT engine.

    What nvinfer does not do as `predict` does is counted and printed. Not run with DeepStream.
    """
    write("deepstream", files, as_json, **words)


@package.command()
@options.files
@to
@click.option(
    "--runtime", type=options.PATH,
    help="onnxruntime-web as npm packs it, a folder or an archive [default: npm fetches it].",
)  # fmt: skip
@options.force
@options.as_json
def browser(files: tuple[Path, ...], as_json: bool, **words: Any) -> None:
    """Write a page that classifies pictures in a browser with one ONNX file, on onnxruntime-web.

    The folder needs a server of files and nothing else. No picture leaves the browser, and nothing comes from outside.
    """
    write("browser", files, as_json, **words)
