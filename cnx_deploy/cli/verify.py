"""`cnx-deploy verify`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.errors import ParityError

if TYPE_CHECKING:
    from cnx_deploy.verification import Verification


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@options.export_dir
@options.engines_dir
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of images to compare on."
)
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Images, at least.")
@click.option(
    "--save-inputs", type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the images and PyTorch's logits in Polygraphy's formats.",
)  # fmt: skip
@options.as_json
def verify(as_json: bool, **arguments: Any) -> None:
    """Compare ONNX FILES and engines with PyTorch; by default everything recorded. Exit code 3 when a gate fails."""
    options.refuse_engines_without_gpu(arguments["files"])
    from cnx_deploy.pipeline import VerifyRequest, run_verifications

    with options.reporter("Verifying") as progress:
        request = VerifyRequest(**arguments)
        found = run_verifications(request, options.note, lambda text, images: progress(text, 0.0))
    if as_json:
        options.echo_json({"verifications": [entry.to_dict() for entry in found]})
    else:
        _show(found)
    failed = [entry.artifact for entry in found if not entry.passed]
    if failed:
        message = f"{', '.join(failed)} differ from PyTorch by more than the gate allows; see the rows above."
        options.fail(ParityError(message), as_json=as_json)


def _show(found: "list[Verification]") -> None:
    click.echo(
        f"{'artifact':34} {'run by':22} {'images':>6} {'rel. L2':>9} {'cosine':>10} {'top-1':>7} {'KL':>9}  verdict"
    )
    for entry in found:
        for result in entry.results:
            numbers = result.found
            click.echo(
                f"{entry.artifact:34} {result.candidate:22} {numbers.samples:>6} {numbers.relative_l2_max:>9.1e} "
                f"{numbers.centred_cosine_min:>10.7f} {numbers.top1_agreement:>7.2%} {numbers.mean_kl:>9.1e}  "
                f"{'pass' if result.passed else 'FAIL: ' + '; '.join(result.failures)}"
            )
        for reason in entry.not_run:
            click.echo(f"{entry.artifact:34} not run: {reason}")
    for line in dict.fromkeys(line for entry in found for line in entry.notes):
        click.echo(f"Note: {line}")
