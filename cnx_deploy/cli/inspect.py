"""`cnx-deploy inspect`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.printable import one_line
from cnx_deploy.core.errors import CnxDeployError, InputError

if TYPE_CHECKING:
    from cnx_deploy.core.manifest import Compiled, Grouping
    from cnx_deploy.verification.inspect import Inspection

MOST_LISTED = 8
"""Entries of a list in text; --json has all, such as the names of a thousand classes."""
GROUPINGS: tuple["Grouping", ...] = ("stage", "operation", "kind")


@click.command("inspect")
@click.argument("files", nargs=-1, required=True, type=options.PATH)
@click.option("--compile", "compiles", is_flag=True, help="Compile ONNX files with TensorRT-RTX; needs no GPU.")
@click.option("--target", type=options.TARGET, help="GPU to compile for, such as 'RTX 4090' [default: sm89].")
@click.option("--batch", type=click.IntRange(min=1), help="Batch to compile for [default: 64].")
@click.option("--kernels", "lists_kernels", is_flag=True, help="List every kernel, the one that moves most first.")
@click.option("--trust", is_flag=True, help="Have an engine without a manifest read: what is in it may run.")
@options.as_json
def inspect_command(
    files: tuple[Path, ...], compiles: bool, target: str | None, batch: int | None, lists_kernels: bool, trust: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Say what each of FILES is: a checkpoint, an ONNX file or an engine, told by its content.

    A file that cannot be read or was altered does not keep the others from being shown. The exit code is the highest of
    all files: 2 for a file of another kind, 4 for one that was altered or is refused.

    Of an engine, and with --compile of an ONNX file, the kernels are shown and the bytes they move, by stage of the
    network, operation and kind of kernel. --json prints a list with one entry for each file.
    """
    if not compiles and (target or batch):
        raise click.UsageError("--target and --batch say what to compile for. Add --compile.")
    compile_for = (target or "sm89", batch or 64) if compiles else None
    documents: list[dict[str, Any]] = []
    shown, worst = 0, 0
    for file in files:
        try:
            inspection = _inspected(file, compile_for, lists_kernels=lists_kernels, trust=trust)
        except CnxDeployError as error:
            if click.get_current_context().obj:  # --debug: the traceback is wanted
                raise
            options.note(f"Error: {error}")
            told = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
            documents.append({"path": str(file), **told})
            worst = max(worst, error.exit_code)
            continue
        documents.append(inspection.to_dict())
        if not as_json:
            separator = "\n" if shown else ""
            options.echo(separator + "\n".join(_lines_of_inspection(inspection, lists_kernels)))
            shown += 1
    if as_json:
        options.echo_json(documents)
    if worst:
        raise click.exceptions.Exit(worst)


def _inspected(file: Path, compile_for: tuple[str, int] | None, *, lists_kernels: bool, trust: bool) -> "Inspection":
    """Inspect one file, and compile it for a target and a batch where both are given."""
    from cnx_deploy.verification.inspect import inspect_file, trusted_engine, with_compiled

    inspection = inspect_file(file)
    if trust:
        inspection = trusted_engine(inspection)
    if compile_for is not None:
        target, batch = compile_for
        with options.reporter("Compiling") as progress:
            inspection = with_compiled(inspection, target=target, batch=batch, progress=progress)
    if lists_kernels and inspection.compiled is None:
        raise InputError(
            f"No list of kernels is recorded for {file}. Add --compile for an ONNX file; build an engine again with "
            "cnx-deploy build-trt --force."
        )
    return inspection


def _lines_of_inspection(found: "Inspection", lists_kernels: bool) -> Iterator[str]:
    yield f"{found.path}: {found.description}, {found.size_bytes / 1e6:.1f} MB"
    yield f"{'sha256':18} {found.sha256}"
    facts = dict(found.facts)
    if "origins" in facts:
        facts["class_names"] = facts["class_names"] or "none recorded"
        places = dict.fromkeys(facts["origins"].values())
        facts["origins"] = {
            place: [name for name, origin in facts["origins"].items() if origin == place] for place in places
        }
    for name, value in facts.items():
        yield from _lines(name, value)
    if found.compiled is not None:
        yield from _lines_of_compiled(found.compiled)
        if lists_kernels:
            yield from _lines_of_kernels(found.compiled)
    for note in found.notes:
        yield f"Note: {note}"


def _lines_of_compiled(compiled: "Compiled") -> Iterator[str]:
    """A table for each grouping; the shares of each sum to 100 %."""
    yield (
        f"{'compiled':18} {compiled.kernels} kernels, {compiled.megabytes_per_image} MB an image; {compiled.target}, "
        f"batch {compiled.batch}; the same graph compiled for a fixed batch, each kernel's inputs, constants and "
        "outputs once"
    )
    for grouping in GROUPINGS:
        yield f"\n{grouping:40} {'kernels':>8} {'MB an image':>12} {'share':>8}"
        for total in compiled.totals(grouping):
            yield f"{total.name:40} {total.kernels:>8} {total.megabytes:>12.3f} {total.share:>8.1%}"


def _lines_of_kernels(compiled: "Compiled") -> Iterator[str]:
    """A line a kernel, the one that moves most first; the number is its place in the order they run in."""
    yield f"\n{'kernel':>6} {'MB an image':>12} {'share':>7}  {'block':20} {'operation':38} kind, name: tensors"
    numbered = sorted(enumerate(compiled.kernel_list), key=lambda row: row[1].total_bytes, reverse=True)
    for number, kernel in numbered:
        moved = kernel.total_bytes
        size = f"{number:>6} {moved / compiled.batch / 1e6:>12.3f} {moved / compiled.total_bytes:>7.1%}"
        place = f"{kernel.block:20} {kernel.operation:38}"
        yield one_line(f"{size}  {place} {kernel.kind}, {kernel.name}: {kernel.tensors}")


def _lines(name: str, value: Any) -> Iterator[str]:
    """`name value`, one line; a dictionary of dictionaries takes a line an entry."""
    title = name.replace("_", " ")
    if value is None or value in ({}, [], ""):
        return
    if isinstance(value, Mapping) and any(isinstance(entry, Mapping) for entry in value.values()):
        for key, entry in value.items():
            yield from _lines(f"{title} {key}", entry)
        return
    yield one_line(f"{title:18} {_text(value)}")


def _text(value: Any) -> str:
    from cnx_deploy.core.strict_json import shortened  # the help of a command takes click alone

    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        more = f", … {len(value):,} in all" if len(value) > MOST_LISTED else ""
        return f"[{', '.join(map(_text, value[: MOST_LISTED - bool(more)]))}{more}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else shortened(str(value))
