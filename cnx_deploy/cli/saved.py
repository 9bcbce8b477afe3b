"""What `cnx-deploy verify` saves to be judged again, and the judging: options and glue of that command."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from cnx_deploy.verification.verify import Verification

__all__ = ["judged", "saved_options"]

GATE_OPTIONS = {
    "relative_l2": "Largest relative L2 of an image.",
    "cosine": "Smallest centred cosine of an image.",
    "top1": "Smallest share of images with the same class.",
    "kl": "Largest mean KL divergence.",
}
GOES_WITH_JUDGE = {"judge", "gate", *GATE_OPTIONS}


def saved_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --save-outputs, --judge and the limits that --judge may take in place of the saved gate's."""
    for name, text in reversed(GATE_OPTIONS.items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, name, type=float, help=f"{text} With --judge.")(command)
    text = "Gate to judge by in place of the saved one. With --judge."
    command = click.option("--gate", metavar="NAME", help=text)(command)
    command = click.option(
        "--judge", type=click.Path(file_okay=False, path_type=Path),
        help="Folder that --save-outputs wrote: judge it again and run nothing.",
    )(command)  # fmt: skip
    return click.option(
        "--save-outputs", type=click.Path(file_okay=False, path_type=Path),
        help="New folder for both sides' logits in Polygraphy's formats, with hashes.",
    )(command)  # fmt: skip


def judged(arguments: dict[str, Any]) -> "list[Verification] | None":
    """The saved results, judged, where --judge asks for it; takes its options out of `arguments`.

    Raises click.UsageError for options that do not go together.
    """
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    folder, *limits = [arguments.pop(name) for name in ("judge", "gate", *GATE_OPTIONS)]
    if folder is None:
        if names := given & GOES_WITH_JUDGE:
            raise click.UsageError(f"{_options(context, names)}: a limit for --judge, which is not there. Add it.")
        return None
    if names := given - GOES_WITH_JUDGE - {"as_json"}:
        raise click.UsageError(f"--judge runs nothing and reads its folder only: leave {_options(context, names)} out.")
    from cnx_deploy.verification.judging import GateChange, judge_saved

    return judge_saved(folder, GateChange(**dict(zip(("gate", *GATE_OPTIONS), limits, strict=True))))


def _options(context: click.Context, names: set[str]) -> str:
    """As the user writes them."""
    given = [each for each in context.command.params if each.name in names]
    return ", ".join(each.opts[0] if isinstance(each, click.Option) else each.human_readable_name for each in given)
