"""`cnx-deploy diagnose`: why a network is not right, or may not be, in half precision."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options
from cnx_deploy.core.errors import CnxDeployError, ParityError

DATA = click.option(
    "--data", type=click.Path(exists=True, path_type=Path),
    help="Images: a folder or a CSV file [default: seeded images].",
)  # fmt: skip
PLOT = click.option("--plot", type=options.FILE, help="SVG file to draw (needs the extra report).")


@click.group()
def diagnose() -> None:
    """Find where and why a network goes wrong: by layer, by step of the chain, by module, by range."""


@diagnose.command()
@options.files
@options.export_dir
@DATA
@options.white_level
@click.option("--samples", type=click.IntRange(1, 8), default=2, show_default=True, help="Images, at least.")
@PLOT
@options.as_json
def layers(files: tuple[Path, ...], export_dir: Path, plot: Path | None, as_json: bool, **words: Any) -> None:
    """Compare every module's output in ONNX FILES with PyTorch; by default in all recorded files.

    Exit code 3 when a backend diverges.
    """
    from cnx_deploy.core.plotting import check_plot
    from cnx_deploy.diagnosis.layerwise import compare_artifact, recorded_files, report_lines
    from cnx_deploy.diagnosis.plots import plot_layers

    artifacts = recorded_files(files, export_dir)
    if plot is not None:
        check_plot(plot)
        if len(artifacts) != 1:
            raise click.UsageError(
                f"--plot draws one file and {len(artifacts)} are compared. Name one FILE on the command line."
            )
    comparisons = []
    with options.reporter("Comparing") as progress:
        for artifact in artifacts:
            options.note(f"Comparing {artifact.path.name} by layer")
            compared = compare_artifact(
                artifact, progress=lambda text, _: progress(text, 0.0), note=options.note, **words
            )
            comparisons.append(compared)
    if plot is not None:
        options.note(f"  {plot_layers(comparisons[0], plot)}")
    failed = [comparison.artifact for comparison in comparisons if not comparison.passed]
    error = ParityError(f"{', '.join(failed)} part from PyTorch by layer; see above where.") if failed else None
    document = {"layers": [comparison.to_dict() for comparison in comparisons]}
    _show(document, map(report_lines, comparisons), error, as_json=as_json)


@diagnose.command()
@options.files
@options.export_dir
@options.engines_dir
@DATA
@options.white_level
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Images, at least.")
@options.as_json
def chain(files: tuple[Path, ...], as_json: bool, **arguments: Any) -> None:
    """Follow half-precision ONNX FILES from PyTorch to the engines, each step against the one before.

    Without FILES, every recorded file is followed. Exit code 3 when a step fails; it is named with what is to blame.
    """
    from cnx_deploy.diagnosis.chain import report_lines, run_chains

    with options.reporter("Following") as progress:
        chains = run_chains(files, options.note, progress=lambda text, _: progress(text, 0.0), **arguments)
    failed = [chain for chain in chains if chain.failed is not None]
    error = ParityError(" ".join(f"{chain.artifact}: {chain.verdict()}" for chain in failed)) if failed else None
    document = {"chains": [chain.to_dict() for chain in chains]}
    _show(document, map(report_lines, chains), error, as_json=as_json)


@diagnose.command()
@click.argument("file", type=options.PATH)
@DATA
@options.white_level
@click.option(
    "--samples", type=click.IntRange(min=1), help="Images to judge on [default: 4, at most 500 for eight bits]."
)
@click.option(
    "--gate", type=click.Choice(["fp16", "bf16", "fp8", "int8", "tf32-engine", "fp32-engine", "fp32"]),
    help="What has to hold [default: that of the file's precision].",
)  # fmt: skip
@click.option("--no-engine-gates", is_flag=True, help="Compile no engine to judge an FP8 or INT8 file by.")
@options.as_json
def bisect(file: Path, as_json: bool, samples: int | None, no_engine_gates: bool, **words: Any) -> None:
    """Find the smallest set of modules to keep in a wider type with which a recorded ONNX FILE passes its gate.

    Of an FP16 or BF16 file they stay in FP32. Of an FP8 or INT8 file, which needs --data, they stay in FP16, and the
    error of each part alone is told. Exit code 0 when there is a set or none is needed, 3 when nothing helps.
    """
    from cnx_deploy.diagnosis import bisect, eight_bit_search

    if samples is not None:
        words["samples"] = samples
    if bisect.file_to_search(file).manifest.deploy.eight_bits is not None:
        search = eight_bit_search.run_bisection(file, options.note, no_engine_gates=no_engine_gates, **words)
        report, error = eight_bit_search.report_lines(search), eight_bit_search.failure(search)
        _show(search.to_dict(), [report], error, as_json=as_json)
        return
    if no_engine_gates:
        raise click.UsageError(f"--no-engine-gates is of files in FP8 and INT8, and {file} is none. Leave it out.")
    found = bisect.run_bisection(file, options.note, **words)
    _show(found.to_dict(), [bisect.report_lines(found)], bisect.failure(found), as_json=as_json)


@diagnose.command()
@click.argument("checkpoint", required=False, type=click.Path(exists=True, path_type=Path))
@click.option("--variant", **{**options.VARIANT, "help": "Size of the network [default: the checkpoint's]."})
@options.pretrained
@options.seed
@options.num_classes
@options.reset_head
@options.checkpoint_answer
@options.task
@options.task_options
@DATA
@options.image_size
@options.preprocessing
@options.white_level
@click.option("--samples", type=click.IntRange(min=1), default=16, show_default=True, help="Images, at most.")
@click.option("--margin", type=click.FloatRange(min=1.0), default=4.0, show_default=True, help="Factor to be kept.")
@click.option("--per-image", is_flag=True, help="Also name the images whose values exceed those of all others.")
@click.option("--all", "lists_all", is_flag=True, help="List every tensor and image, not the largest alone.")
@PLOT
@options.as_json
def headroom(lists_all: bool, plot: Path | None, as_json: bool, **arguments: Any) -> None:
    """Measure how far a network (CHECKPOINT, published or random weights) is from what FP16 can hold.

    Of a recorded ONNX file or engine in the place of CHECKPOINT, the weights are measured that its manifest names.
    Exit code 3 when a tensor that the FP16 file stores lacks the margin, or a weight is infinite in FP16.
    """
    from cnx_deploy.core.plotting import check_plot
    from cnx_deploy.diagnosis.headroom import HeadroomRequest, failure, report_lines, run_headroom
    from cnx_deploy.diagnosis.plots import plot_headroom

    if plot is not None:
        check_plot(plot)
    request, done = HeadroomRequest(**arguments), 0
    with options.reporter("Measuring") as progress:

        def measured(images: int) -> None:
            nonlocal done
            done += images
            progress(f"{done} images", done / request.samples)

        result = run_headroom(request, options.note, measured)
    if plot is not None:
        options.note(f"{plot_headroom(result, plot)}")
    _show(result.to_dict(), [report_lines(result, lists_all=lists_all)], failure(result), as_json=as_json)


def _show(document: Any, reports: Iterable[Iterable[str]], error: CnxDeployError | None, *, as_json: bool) -> None:
    """Print a result as JSON, or its reports with an empty line between two; end with the error where there is one."""
    if as_json:
        options.echo_json(document)
    else:
        options.echo("\n\n".join("\n".join(lines) for lines in reports))
    if error is not None:
        options.fail(error, as_json=as_json)
