"""`cnx-deploy verify`, `verify records` and `verify saved`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.printable import one_line
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.runners.registry import runner_names

if TYPE_CHECKING:
    from cnx_deploy.api import VerifyReport


@click.command()
@options.files
@options.export_dir
@options.engines_dir
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path),
    help="Images to compare on: a folder, with a folder for each class to count accuracy and agreement, or a CSV file.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(min=1),
    help="Images, at least; with labels or an embedding at most [default: 64; with labels or an embedding all].",
)  # fmt: skip
@options.image_folder
@options.class_names
@options.white_level
@click.option(
    "--backend", "backends", multiple=True,
    type=click.Choice([name for name in runner_names() if name != "tensorrt"]),
    help="What runs ONNX files, on all images (repeat for several) [default: what proves most].",
)  # fmt: skip
@options.device
@options.allow_engine_code
@click.option(
    "--save-inputs", type=options.FOLDER,
    help="Folder for the images and PyTorch's logits in Polygraphy's formats.",
)  # fmt: skip
@click.option(
    "--save-outputs", type=options.FOLDER,
    help="New folder for both sides' logits, with hashes: `verify saved` judges them again.",
)  # fmt: skip
@options.as_json
def compare(as_json: bool, **arguments: Any) -> None:
    """Compare ONNX FILES and engines with PyTorch; by default everything recorded. Exit code 3 when a gate fails."""
    from cnx_deploy import verify

    files = arguments.pop("files")
    with options.reporter("Verifying") as progress:
        report = verify(files, note=options.note, progress=lambda text, images: progress(text, 0.0), **arguments)
    _show(report, as_json=as_json)


@click.command()
@options.files
@options.export_dir
@options.engines_dir
@options.as_json
def records(files: tuple[Path, ...], export_dir: Path, engines_dir: Path, as_json: bool) -> None:
    """Check the hashes of FILES from weights to engine and run nothing. Exit code 4 for a fault."""
    from cnx_deploy.verification.provenance import check_provenance, corrupt_error

    report = check_provenance(files, export_dir, engines_dir)
    if not report.findings:
        raise InputError(f"Nothing is recorded in {export_dir}. Run `cnx-deploy export` first.")
    if as_json:
        options.echo_json(report.to_dict())
    else:
        for finding in report.findings:
            options.echo(one_line(f"{finding.verdict:6} {finding.artifact:36} {finding.text}"))
    error = corrupt_error(report)
    if error is not None:
        options.fail(error, as_json=as_json)


@click.command()
@click.argument("folder", type=options.FOLDER)
@click.option("--gate", metavar="NAME", help="Gate to judge by in place of the saved one.")
@click.option("--relative-l2", type=float, help="Largest relative L2 of an image.")
@click.option("--cosine", type=float, help="Smallest centred cosine of an image.")
@click.option("--top1", type=float, help="Smallest share of images with the same class.")
@click.option("--kl", type=float, help="Largest mean KL divergence.")
@options.as_json
def saved(folder: Path, as_json: bool, **gate: Any) -> None:
    """Judge again what `verify --save-outputs` wrote to FOLDER and run nothing. Exit code 3 when a gate fails."""
    from cnx_deploy.api import VerifyReport
    from cnx_deploy.verification.saved_results import judge_saved

    _show(VerifyReport(tuple(judge_saved(folder, **gate))), as_json=as_json)


verify = options.DefaultGroup("verify", compare, (records, saved))


def _show(report: "VerifyReport", *, as_json: bool) -> None:
    """A row for each result; ends the command where one failed."""
    if as_json:
        options.echo_json(report.to_dict())
    else:
        options.echo(report)
    if failed := [entry.artifact for entry in report.results if not entry.passed]:
        by_gate = any(not result.passed for entry in report.results for result in entry.results)
        what = "differ from PyTorch by more than the gate allows" if by_gate else "make images as their source does not"
        message = f"{', '.join(failed)} {what}; see the rows above."
        options.fail(ParityError(message), as_json=as_json)
