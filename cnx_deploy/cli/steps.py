"""`cnx-deploy verify --steps`: the chain from PyTorch to the engines, in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cnx_deploy.cli import options
from cnx_deploy.core.errors import ParityError

if TYPE_CHECKING:
    from cnx_deploy.diagnosis.chain import Step, StepVerdict

__all__ = ["verify_steps"]

GOES_WITH_STEPS = {"steps", "files", "export_dir", "engines_dir", "data", "samples", "as_json"}


def verify_steps(files: tuple[Path, ...], arguments: dict[str, Any], *, as_json: bool) -> None:
    """Follow each half-precision file, print what was found, exit 3 where a step fails.

    Raises click.UsageError for options that belong to other ways to verify.
    """
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    if given - GOES_WITH_STEPS:
        wrong = given - GOES_WITH_STEPS
        names = ", ".join(sorted(each.opts[0] for each in context.command.params if each.name in wrong))
        raise click.UsageError(f"--steps has runners and results of its own: leave {names} out.")
    from cnx_deploy.api import VerifyRequest
    from cnx_deploy.diagnosis.chain import run_steps

    words = {name: arguments[name] for name in ("export_dir", "engines_dir", "data", "samples")}
    with options.reporter("Following") as progress:
        request = VerifyRequest(files=files, **words)
        verdicts = run_steps(request, options.note, lambda text, images: progress(text, 0.0))
    if as_json:
        options.echo_json({"steps": [verdict.to_dict() for verdict in verdicts]})
    else:
        options.echo("\n\n".join("\n".join(_lines(verdict)) for verdict in verdicts))
    failed = [verdict for verdict in verdicts if verdict.failed is not None]
    if failed:
        options.fail(ParityError(" ".join(f"{each.artifact}: {each.sentence()}" for each in failed)), as_json=as_json)


def _lines(verdict: "StepVerdict") -> Iterator[str]:
    yield f"{verdict.artifact}: {verdict.sentence()}"
    yield f"  FP32's own error against float64: relative L2 {verdict.floor:.1e} ({verdict.floor_images} images)"
    for step in verdict.steps:
        yield f"  {_line(step)}"


def _line(step: "Step") -> str:
    pair = f"{step.reference} -> {step.candidate}"
    if step.result is None:
        return f"{pair:68} not run: {step.not_run}"
    found = step.result.differences
    verdict = "pass" if step.result.passed else "FAIL: " + "; ".join(step.result.failures)
    return f"{pair:68} relative L2 {found.relative_l2_max:.1e}, gate {step.result.gate.name}: {verdict}"
