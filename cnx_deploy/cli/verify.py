"""`cnx-deploy verify`, `verify records` and `verify saved`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from cnx_deploy.cli import options
from cnx_deploy.cli.printable import one_line
from cnx_deploy.cli.steps import verify_steps
from cnx_deploy.core.errors import InputError, ParityError
from cnx_deploy.runners.registry import runner_names

FILES = click.argument("files", nargs=-1, type=click.Path(path_type=Path))


@click.command()
@FILES
@options.export_dir
@options.engines_dir
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path),
    help="Images to compare on: a folder, with a folder for each class to count accuracy and agreement, or a CSV file.",
)  # fmt: skip
@click.option(
    "--samples", type=click.IntRange(min=1),
    help="Images, at least; of labelled images at most [default: 64; all labelled images].",
)  # fmt: skip
@click.option(
    "--runner", "runners", multiple=True,
    type=click.Choice([name for name in runner_names() if name != "tensorrt"]),
    help="What runs ONNX files, on all images (repeat for several) [default: what proves most].",
)  # fmt: skip
@click.option(
    "--save-inputs", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the images and PyTorch's logits in Polygraphy's formats.",
)  # fmt: skip
@click.option(
    "--save-outputs", type=click.Path(file_okay=False, path_type=Path),
    help="New folder for both sides' logits, with hashes: `verify saved` judges them again.",
)  # fmt: skip
@click.option("--layers", is_flag=True, help="Compare every module's output, to find where two runs part; 2 images.")
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="SVG file for --layers (needs the extra report)."
)
@click.option("--steps", is_flag=True, help="Follow the chain PyTorch, FP32, half precision, engine; name what fails.")
@options.as_json
def compare(as_json: bool, layers: bool, steps: bool, plot: Path | None, **arguments: Any) -> None:
    """Compare ONNX FILES and engines with PyTorch; by default everything recorded. Exit code 3 when a gate fails."""
    if steps:
        verify_steps(arguments.pop("files"), arguments, as_json=as_json)
        return
    if layers:
        _verify_layers(plot, as_json=as_json, **arguments)
        return
    if plot is not None:
        raise click.UsageError("--plot draws what --layers finds: add --layers.")
    options.refuse_engines_without_gpu(arguments["files"])
    from cnx_deploy.api import VerifyRequest, run_verifications

    with options.reporter("Verifying") as progress:
        request = VerifyRequest(**arguments)
        verifications = run_verifications(request, options.note, lambda text, images: progress(text, 0.0))
    _show(verifications, as_json=as_json)


@click.command()
@FILES
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
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--gate", metavar="NAME", help="Gate to judge by in place of the saved one.")
@click.option("--relative-l2", type=float, help="Largest relative L2 of an image.")
@click.option("--cosine", type=float, help="Smallest centred cosine of an image.")
@click.option("--top1", type=float, help="Smallest share of images with the same class.")
@click.option("--kl", type=float, help="Largest mean KL divergence.")
@options.as_json
def saved(folder: Path, as_json: bool, **gate: Any) -> None:
    """Judge again what `verify --save-outputs` wrote to FOLDER and run nothing. Exit code 3 when a gate fails."""
    from cnx_deploy.verification.saved_results import judge_saved

    _show(judge_saved(folder, **gate), as_json=as_json)


verify = options.DefaultGroup("verify", compare, (records, saved))


def _verify_layers(plot: Path | None, *, as_json: bool, files: tuple[Path, ...], **arguments: Any) -> None:
    """Compare ONNX files by layer, on two images where no number is given."""
    context = click.get_current_context()
    given = {name for name in arguments if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given & {"runners", "save_inputs", "save_outputs"}:
        text = "leave --runner and --save-inputs out, and --save-outputs."
        raise click.UsageError(f"--layers has sides of its own and saves nothing: {text}")
    from cnx_deploy.core.artifacts import select_artifacts
    from cnx_deploy.core.plotting import check_plot
    from cnx_deploy.diagnosis.layerwise.comparison import layers_of_artifact
    from cnx_deploy.diagnosis.layerwise.report import document, table, write_plot

    samples = arguments["samples"] if "samples" in given else 2
    recorded = select_artifacts(files, arguments["export_dir"], arguments["engines_dir"], options.note)
    artifacts = [artifact for artifact in recorded if files or artifact.manifest.kind == "onnx"]
    if not artifacts:
        raise InputError(f"No ONNX file is recorded in {arguments['export_dir']}. Run `cnx-deploy export` first.")
    if plot is not None:
        check_plot(plot)
        if len(artifacts) != 1:
            raise click.UsageError(f"--plot draws one file and {len(artifacts)} are compared: name one.")
    found = []
    with options.reporter("Comparing") as progress:
        words = {"samples": samples, "images": arguments["data"], "progress": lambda text, _: progress(text, 0.0)}
        for artifact in artifacts:
            options.note(f"Comparing {artifact.path.name} by layer")
            found.append(layers_of_artifact(artifact, **words))
    if plot is not None:
        options.note(f"  {write_plot(found[0], plot)}")
    if as_json:
        options.echo_json({"layers": [document(entry) for entry in found]})
    else:
        options.echo("\n\n".join("\n".join(table(entry)) for entry in found))
    failed = [entry.artifact for entry in found if not entry.passed]
    if failed:
        options.fail(ParityError(f"{', '.join(failed)} part from PyTorch by layer; see above where."), as_json=as_json)


def _show(verifications: Sequence[Any], *, as_json: bool) -> None:
    """A row for each result; ends the command where one failed."""
    from cnx_deploy.verification.metrics import table_of

    if as_json:
        options.echo_json({"verifications": [entry.to_dict() for entry in verifications]})
    else:
        options.echo("\n".join(table_of(verifications)))
    failed = [entry.artifact for entry in verifications if not entry.passed]
    if failed:
        message = f"{', '.join(failed)} differ from PyTorch by more than the gate allows; see the rows above."
        options.fail(ParityError(message), as_json=as_json)
