"""Options and output that several commands share, so that they mean the same everywhere."""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from cnx_deploy.cli.printable import printable, printable_json
from cnx_deploy.core.errors import CnxDeployError
from cnx_deploy.core.image_size import CROP_MODES, INTERPOLATIONS, MAX_CHANNELS, parse_image_size, parse_image_sizes
from cnx_deploy.core.targets import find_target
from cnx_deploy.core.variants import ALL_VARIANTS
from cnx_deploy.runners.registry import runner_names

__all__ = [
    "BATCH_RANGE", "CHANNELS", "EXISTING", "FILE", "FOLDER", "IMAGE_SIZE", "IMAGE_SIZES", "PATH", "TARGET", "VARIANT",
    "Command", "Decorator", "DefaultGroup", "SectionedCommand", "allow_engine_code", "as_json", "backend", "checkpoint",
    "checkpoint_answer", "class_names", "device", "echo", "echo_artifacts", "echo_json", "ema", "engines_dir", "entry",
    "export_dir", "fail", "files", "force", "image_folder", "image_size", "image_sizes", "in_chans", "note",
    "num_classes", "opened_model", "other_size", "output_dir", "outputs", "pixels", "preprocessing", "pretrained",
    "reduce_zero_label", "reporter", "reset_head", "seed", "several", "soup", "task", "task_options", "temperature",
    "thresholds", "top", "tta", "variant", "white_level",
]  # fmt: skip

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


class _BatchRange(click.ParamType[Any]):
    """`8`, or `1:8:64` as smallest:typical:largest."""

    name = "min:opt:max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(":")
        if not all(part.isdigit() for part in parts) or len(parts) not in (1, 3):
            self.fail(f"{value!r} is not a batch: write 8, or smallest:typical:largest as in 1:8:64.", param, ctx)
        numbers = [int(part) for part in parts] * (3 if len(parts) == 1 else 1)
        if not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
            self.fail(f"{value!r} must rise: 1 <= smallest <= typical <= largest.", param, ctx)
        return numbers[0], numbers[1], numbers[2]


class _ImageSize(click.ParamType[Any]):
    """`224`, or `256x512` as height x width."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_image_size(value) if isinstance(value, str) else value


class _Target(click.ParamType[Any]):
    """The GPU to build for: `sm89`, `current` or a common GPU's name."""

    name = "gpu"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return find_target(value)


class _Channels(click.ParamType[Any]):
    """`0.5`, or a number for each channel as `0.485,0.456,0.406`."""

    name = "r,g,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers: write 0.5, or 0.485,0.456,0.406.", param, ctx)


BATCH_RANGE = _BatchRange()
CHANNELS = _Channels()
TARGET = _Target()


class _ImageSizes(click.ParamType[Any]):
    """One size, or `224:448:640` as smallest:typical:largest."""

    name = "pixels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse_image_sizes(value) if isinstance(value, str) else value


class _TaskOption(click.ParamType[Any]):
    """`channels=256`: a name and a value, which is JSON where it can be read as such, else a text."""

    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        name, sign, text = value.partition("=")
        if not sign or not name.isidentifier():
            self.fail(f"{value!r} is no option of a task: write NAME=VALUE, such as channels=256.", param, ctx)
        try:
            return name, json.loads(text)
        except json.JSONDecodeError:
            return name, text


IMAGE_SIZE = _ImageSize()
IMAGE_SIZES = _ImageSizes()
TASK_OPTION = _TaskOption()
PATH = click.Path(path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)
VARIANT: dict[str, Any] = {
    "type": click.Choice(list(ALL_VARIANTS)),
    "metavar": "VARIANT",
    "help": "atto to huge, or of ConvNeXt V1 v1-atto to v1-xlarge: see cnx-deploy variants.",
}

device = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True,
    help="Where a checkpoint or an ONNX file runs; an engine runs on its GPU.",
)  # fmt: skip
files = click.argument("files", nargs=-1, type=PATH)
allow_engine_code = click.option(
    "--allow-engine-code", is_flag=True,
    help="Let an engine with own kernels run them, and the launcher in it. Its hash has to be its manifest's.",
)  # fmt: skip
backend = click.option(
    "--backend", type=click.Choice(runner_names()),
    help="What runs it [default: PyTorch for a checkpoint, ONNX Runtime for an ONNX file, TensorRT for an engine].",
)  # fmt: skip
variant = click.option("--variant", required=True, **VARIANT)
checkpoint = click.option(
    "--checkpoint", type=click.Path(exists=True, path_type=Path),
    help="Weights to load in any known layout: a file, or a folder that timm or transformers wrote.",
)  # fmt: skip
pretrained = click.option("--pretrained", metavar="TAG", help="Published weights, e.g. convnextv2_atto.fcmae_ft_in1k.")
seed = click.option("--seed", type=int, default=0, show_default=True, help="Seed of random weights.")
num_classes = click.option(
    "--num-classes", type=click.IntRange(min=1), help="Classes of random weights [default: 1000]."
)
reset_head = click.option("--reset-head", is_flag=True, help="Re-initialise the head when the class count differs.")
ema = click.option(
    "--ema/--no-ema", default=None, help="Take a checkpoint's averaged or its plain weights [default: plain]."
)
entry = click.option("--entry", metavar="NAME", help="Which of several networks of a checkpoint, such as teacher.")
soup = click.option(
    "--soup", type=click.Path(exists=True, path_type=Path), multiple=True,
    help="Take the mean of the checkpoint's weights and this one's (repeat for more).",
)  # fmt: skip
task = click.option(
    "--task",
    metavar="TASK",
    help="classification, multi-label, segment, detect, or features without the head [default: as recorded].",
)
task_options = click.option(
    "--task-option", "task_options", type=TASK_OPTION, metavar="NAME=VALUE", multiple=True,
    callback=lambda context, parameter, given: dict(given),
    help="A size or constant of the task's own, such as channels=256 of segment (repeatable).",
)  # fmt: skip
outputs = click.option(
    "--output", "outputs", metavar="NAME", multiple=True,
    help="What to give, repeatable: logits, probabilities, top5, embedding, unit-embedding, maps, class-maps "
    "[default: logits; multi-label: probabilities; features: embedding].",
)  # fmt: skip
thresholds = click.option(
    "--thresholds", type=EXISTING,
    help="Probabilities from which labels are given, a JSON file that eval --fit-thresholds wrote.",
)  # fmt: skip
tta = click.option(
    "--tta", type=click.Choice(["flip"]), help="Answer the mean over an image and its left-right mirror."
)
top = click.option(
    "--top", type=click.IntRange(min=1),
    help="Classes named for each image [default: 5; of several labels all that reach their thresholds].",
)  # fmt: skip
temperature = click.option(
    "--temperature", type=float, default=1.0, show_default=True,
    help="Divide the logits by a number that eval --fit-temperature found.",
)  # fmt: skip
image_size = click.option(
    "--image-size", type=IMAGE_SIZE, metavar="SIDE|HxW", help="Side of a square in pixels, or height x width: 256x512."
)
in_chans = click.option(
    "--in-chans", type=click.IntRange(1, MAX_CHANNELS),
    help="Channels of an image; weights for 3 are adapted [default: those of the weights, else 3].",
)  # fmt: skip
image_sizes = click.option(
    "--image-size", type=IMAGE_SIZES, metavar="SIZE|MIN:OPT:MAX",
    help="Side of a square in pixels, or height x width: 256x512. 224:448:640 leaves both sides open between two.",
)  # fmt: skip
other_size = click.option(
    "--image-size", type=IMAGE_SIZE, metavar="SIDE|HxW",
    help="Size that images are made in [default: the recorded one]; of a checkpoint any, of a file one that it takes.",
)  # fmt: skip
white_level = click.option(
    "--white-level", type=click.FloatRange(min=0, min_open=True),
    help="Stored value that is white in images with more than 8 bits, such as 4095 [default: the recorded one, else "
    "65535; of floats 1].",
)  # fmt: skip
image_folder = click.option(
    "--image-folder",
    type=FOLDER,
    help="Where a table's relative paths and ids begin [default: the table's own folder].",
)
class_names = click.option(
    "--class-names", type=EXISTING,
    help="Names of the network's outputs: a file with one a line, or JSON (a list, id2label) [default: as recorded].",
)  # fmt: skip
reduce_zero_label = click.option(
    "--reduce-zero-label", is_flag=True, default=None,
    help="Of masks: 0 is not counted and each value is one class lower, as in ADE20K.",
)  # fmt: skip
pixels = (
    click.option("--mean", type=CHANNELS, help="Mean of the pixels, of a [0, 1] image: one number, or one a channel."),
    click.option("--std", type=CHANNELS, help="Standard deviation of the pixels, the same way: 0.229,0.224,0.225."),
    click.option("--crop-ratio", type=float, help="Share of the resized side that the centre crop keeps."),
    click.option("--crop-mode", type=click.Choice(CROP_MODES), help="How a picture is brought to the size [center]."),
    click.option("--interpolation", type=click.Choice(INTERPOLATIONS), help="Filter of the resize."),
    click.option(
        "--pad-value",
        type=CHANNELS,
        help="What border and corner fill with, 0 to 255: one number, or one a channel [the mean colour].",
    ),
)
"""How images are made, where a file does not say it."""


def several(*options: Decorator) -> Decorator:
    """Add options, which --help lists in this order."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


preprocessing = several(in_chans, *pixels, class_names)
"""How images are made and what classes are called, where the files of the weights do not say it."""
opened_model = several(
    device, backend, allow_engine_code, class_names, white_level, other_size, thresholds, task
)  # fmt: skip
"""How a checkpoint, an ONNX file or an engine is opened to answer."""
checkpoint_answer = several(ema, entry, soup, tta, temperature)
"""Which weights of a checkpoint answer, and how; a file answers as it was exported."""


class SectionedCommand(click.Command):
    """A command of many options, which its help lists under headings: `sections` has the parameters of each."""

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sections = sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each section; those of none come last."""
        records = {
            str(option.name): record
            for option in self.get_params(ctx)
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx))
        }
        for title, names in self.sections.items():
            with formatter.section(title):
                formatter.write_dl([records.pop(name) for name in names])
        with formatter.section("Other"):
            formatter.write_dl(list(records.values()))


force = click.option("--force", is_flag=True, help="Replace what other inputs made.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
export_dir = click.option(
    "--export-dir", type=FOLDER, default=Path("export"), show_default=True, help="Folder of recorded ONNX files."
)
engines_dir = click.option(
    "--engines-dir", type=FOLDER, default=Path("engines"), show_default=True, help="Folder of recorded engines."
)


def output_dir(default: str, text: str = "Folder to write to.") -> Decorator:
    """Where a command writes."""
    return click.option("--output-dir", type=FOLDER, default=Path(default), show_default=True, help=text)


class DefaultGroup(click.Group):
    """A command with sub-commands that is also called bare: `bench --batch 8` beside `bench sweep`.

    `default` runs where the first word is no sub-command's name; a file of such a name is written `./sweep`.
    """

    def __init__(self, name: str, default: click.Command, commands: Sequence[click.Command]) -> None:
        super().__init__(name, commands=commands, help=default.help)
        width = max(len(str(command.name)) for command in commands)
        lines = [f"  {command.name:{width}}  {command.get_short_help_str(90)}" for command in commands]
        # The character \b before a paragraph keeps click from wrapping it.
        default.epilog = "\n".join(("\b", f"Sub-commands (cnx-deploy {name} NAME --help):", *lines))
        self.default = default

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the group where a sub-command is named, else that of the default command."""
        if args and args[0] in self.commands:
            return super().make_context(info_name, args, parent, **extra)
        return self.default.make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that the context was made for."""
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


def echo(text: object) -> None:
    """A result on stdout."""
    click.echo(printable(str(text)))


def note(text: str) -> None:
    """One line of progress on stderr."""
    click.echo(printable(text), err=True)


def fail(error: CnxDeployError, *, as_json: bool) -> NoReturn:
    """End a command whose result is printed already: with --json the message is no second document on stdout."""
    if not as_json:
        raise error
    note(f"Error: {error}")
    raise click.exceptions.Exit(error.exit_code)


def echo_json(document: Any) -> None:
    """Print a document on stdout; NaN and infinities, which JSON has not, become null."""
    click.echo(printable_json(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False)))


def echo_artifacts(artifacts: Iterable[Any], *, as_json: bool) -> None:
    """Print the paths of artifacts that were made, unless a note has shown them on the same terminal already."""
    made = [{"path": str(artifact.path), "sha256": artifact.sha256} for artifact in artifacts]
    if as_json:
        echo_json({"artifacts": made})
    elif not _is_one_terminal(sys.stdout, sys.stderr):
        for row in made:
            echo(row["path"])


@contextlib.contextmanager
def reporter(title: str) -> Iterator[Callable[[str, float], None]]:
    """A live line on stderr for work that tells a text and a share (0 to 1); silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda text, share: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=1.0)
        yield lambda text, share: progress.update(task, description=f"{title}: {text}", completed=share)


def _is_one_terminal(*streams: Any) -> bool:
    return all(stream.isatty() for stream in streams) and len({os.ttyname(stream.fileno()) for stream in streams}) == 1


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
