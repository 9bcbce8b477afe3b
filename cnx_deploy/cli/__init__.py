"""The command line: one file a command, each loaded when it is called.

Results go to stdout, progress and errors to stderr. Exit codes are those of `cnx_deploy.core.errors`.
"""

import importlib
import io
import json
import os
import signal
import sys
import threading
from types import FrameType

import click

from cnx_deploy import __version__
from cnx_deploy.cli.printable import printable
from cnx_deploy.core.errors import CnxDeployError, MissingRequirementError
from cnx_deploy.core.out_of_memory import out_of_memory_error

__all__ = ["cli", "main"]

COMMANDS = {
    "variants": ("variants", "The eight sizes: parameters, MACs, published top-1."),
    "doctor": ("doctor", "What this machine can and cannot do, and why."),
    "train": ("train", "Train a variant on an image folder."),
    "pretrain": ("pretrain", "Pre-train a variant on images without labels (FCMAE)."),
    "eval": ("evaluate", "Accuracy and calibration of a checkpoint, ONNX file or engine."),
    "export": ("export_onnx", "Export a variant to ONNX and write its manifest."),
    "build-trt": ("build_trt", "Build TensorRT engines from recorded ONNX files."),
    "verify": ("verify", "Compare ONNX files and engines with PyTorch."),
    "diagnose": ("diagnose", "Where a network goes wrong: layers, chain, bisect, headroom."),
    "bench": ("bench", "Time ONNX files and engines, PyTorch beside them."),
    "rescue": ("rescue", "Make a proven FP16 file of anybody's ONNX file."),
    "inspect": ("inspect", "Say what a file is: checkpoint, ONNX file or engine."),
    "predict": ("predict", "Classify image files."),
    "package": ("package", "Package artifacts for a server or another tool."),
    "batch": ("batch", "Answer for many images, as Parquet files; resumes, runs on Ray."),
    "push": ("push", "Write a folder that timm and transformers load."),
    "serve": ("serve", "Serve a checkpoint, ONNX file or engine over HTTP."),
    "report": ("report", "Write the index and tables from the manifests, or one HTML page."),
}
"""Command -> its module in this package, and its line of help."""


class _LazyGroup(click.Group):
    """Knows its commands' names and help; imports a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cnx_deploy.cli.{COMMANDS[cmd_name][0]}")
        commands = (value for value in vars(module).values() if isinstance(value, click.Command))
        return next(command for command in commands if command.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


# The character \b before a paragraph keeps click from wrapping it.
HELP = """Bring ConvNeXt V2 from PyTorch to verified ONNX files and FP16 TensorRT engines.

\b
cnx-deploy export --variant atto    writes export/atto-224-fp32.onnx and export/atto-224-fp16.onnx
cnx-deploy build-trt                builds engines/ from the FP16 files in export/
cnx-deploy verify                   compares everything in both folders with PyTorch
cnx-deploy bench                    times it
"""


@click.group(
    cls=_LazyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="cnx-deploy")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """The group; its help is HELP."""
    ctx.obj = debug


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with the right exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    if next((word for word in words if not word.startswith("-")), None) != "bench":
        # OpenMP's idle threads spin by default, and take the processors from whoever shares them: beside five busy
        # processes on two processors a training step took 7 to 15 times as long. Read when torch is loaded, which is
        # later. The benchmark keeps what it is given.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    _interrupt_when_terminated()
    try:
        code = cli.main(args=words, prog_name="cnx-deploy", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        shown = io.StringIO()
        error.show(file=shown)
        code = error.exit_code
        _show(shown.getvalue(), type(error), error.format_message(), code, as_json="--json" in words)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = 130
    except Exception as error:
        told = _explained(error)
        if told is None or "--debug" in words:
            raise
        kind, code = type(error if isinstance(error, OSError) else told), told.exit_code
        _show(f"Error: {told}\n", kind, str(told), code, as_json="--json" in words)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt_when_terminated() -> None:
    """Have SIGTERM, and SIGHUP where it is, end a command as Ctrl-C does: locks freed, temporary files removed."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP: so it stays
            signal.signal(number, interrupt)


def _explained(error: BaseException) -> CnxDeployError | None:
    """The error as a user is told it; None for what is a fault of this program, whose traceback is wanted."""
    if (short := out_of_memory_error(error)) is not None:
        return short
    if isinstance(error, OSError):  # a full disk, a folder that may not be read: the system's own words say which
        return CnxDeployError(
            f"The system refused: {error}. Check room and permissions there; cnx-deploy --debug shows where."
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("cnx_deploy"):
        return MissingRequirementError(
            f"The module {error.name} is not installed. `cnx-deploy doctor` lists what is missing and the remedy."
        )
    return error if isinstance(error, CnxDeployError) else None


def _show(text: str, kind: type[BaseException], message: str, exit_code: int, *, as_json: bool) -> None:
    """One message on stderr, and with --json the same as the document on stdout."""
    if as_json:
        click.echo(json.dumps({"error": kind.__name__, "message": message, "exit_code": exit_code}, indent=2))
    click.echo(printable(text), nl=False, err=True)
