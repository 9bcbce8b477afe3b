"""`cnx-deploy inspect`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cnx_deploy.cli import options
from cnx_deploy.cli.printable import one_line

if TYPE_CHECKING:
    from cnx_deploy.inspection import Inspection

GROUPINGS = ("stage", "operation", "kind")


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--compile", "compiles", is_flag=True, help="Compile an ONNX file with TensorRT-RTX; needs no GPU.")
@click.option("--target", help="GPU to compile for [default: sm89].")
@click.option("--batch", type=click.IntRange(min=1), help="Batch to compile for [default: 64].")
@click.option("--kernels", "lists_kernels", is_flag=True, help="List every kernel, the one that moves most first.")
@click.option("--trust", is_flag=True, help="Have an engine without a manifest read: what is in it may run.")
@options.as_json
def inspect_command(
    file: Path, compiles: bool, target: str | None, batch: int | None, lists_kernels: bool, trust: bool, as_json: bool
) -> None:
    """Say what FILE is: a checkpoint, an ONNX file or an engine, told by its content. Exit code 4 if it was altered.

    Of a folder, every file below it: whether reading it can run code that is in it. Nothing is loaded for that.

    Of an engine, and with --compile of an ONNX file, the kernels are shown and the bytes they move, by stage of the
    network, operation and kind of kernel.
    """
    from cnx_deploy.inspection import inspect_file, trusted_engine, with_compiled

    if file.is_dir():
        _show_risks(file, compiles or lists_kernels or trust or bool(target or batch), as_json=as_json)
        return
    if not compiles and (target or batch):
        raise click.UsageError("--target and --batch say what to compile for: give --compile too.")
    found = inspect_file(file)
    if trust:
        found = trusted_engine(found)
    if compiles:
        with options.reporter("Compiling") as progress:
            found = with_compiled(found, target=target or "sm89", batch=batch or 64, progress=progress)
    compiled = found.facts.get("compiled") or {}
    if lists_kernels and "kernel_list" not in compiled:
        raise click.UsageError(
            f"No list of kernels is recorded for {file}. Give --compile for an ONNX file; build an engine again with "
            "cnx-deploy build-trt --force."
        )
    if as_json:
        options.echo_json(found.to_dict())
        return
    for line in _lines_of_inspection(found, lists_kernels):
        options.echo(line)


def _show_risks(folder: Path, of_one_file: bool, *, as_json: bool) -> None:
    """A line a file, or a document: what it is and whether it can run code."""
    from cnx_deploy.risk import risks_in

    if of_one_file:
        raise click.UsageError(
            f"{folder} is a folder: give a file with --compile, --target, --batch, --kernels and --trust."
        )
    found = risks_in(folder)
    counts = {risk: sum(each.risk == risk for each in found) for risk in ("data-only", "code-capable", "unknown")}
    if as_json:
        options.echo_json({"path": str(folder), **counts, "files": [each.to_dict() for each in found]})
        return
    for each in found:
        options.echo(f"{each.risk:12}  {each.kind:22}  {each.path}: {each.reason}")
    options.echo(", ".join(f"{count} {risk}" for risk, count in counts.items()))


def _lines_of_inspection(found: "Inspection", lists_kernels: bool) -> Iterator[str]:
    yield f"{found.path}: {found.description}, {found.size_bytes / 1e6:.1f} MB"
    yield f"{'sha256':18} {found.sha256}"
    for name, value in found.facts.items():
        if name == "compiled" and value and "kernel_list" in value:
            continue  # it is a table below
        yield from _lines(name, value)
    compiled = found.facts.get("compiled") or {}
    if "kernel_list" in compiled:
        yield from _lines_of_compiled(compiled)
        if lists_kernels:
            yield from _lines_of_kernels(compiled)
    for note in found.notes:
        yield f"Note: {note}"


def _lines_of_compiled(compiled: Mapping[str, Any]) -> Iterator[str]:
    """A table for each grouping; the shares of each sum to 100 %."""
    yield (
        f"{'compiled':18} {compiled['kernels']} kernels, {compiled['megabytes_per_image']} MB an image; "
        f"{compiled['target']}, batch {compiled['batch']}; {compiled['how']}"
    )
    for grouping in GROUPINGS:
        yield f"\n{grouping:40} {'kernels':>8} {'MB an image':>12} {'share':>8}"
        for row in compiled[f"by_{grouping}"]:
            yield f"{row['name']:40} {row['kernels']:>8} {row['megabytes']:>12.3f} {row['share']:>8.1%}"


def _lines_of_kernels(compiled: Mapping[str, Any]) -> Iterator[str]:
    """A line a kernel, the one that moves most first; the number is its place in the order they run in."""
    columns, rows = compiled["kernel_list"]["columns"], compiled["kernel_list"]["rows"]
    kernels = [dict(zip(columns, row, strict=True)) for row in rows]
    moved = [sum(kernel[f"{role}_bytes"] for role in ("input", "constant", "output")) for kernel in kernels]
    yield f"\n{'kernel':>6} {'MB an image':>12} {'share':>7}  {'block':20} {'operation':38} kind, name: tensors"
    for number in sorted(range(len(kernels)), key=moved.__getitem__, reverse=True):
        kernel = kernels[number]
        size = f"{number:>6} {moved[number] / compiled['batch'] / 1e6:>12.3f} {moved[number] / sum(moved):>7.1%}"
        place = f"{kernel['block']:20} {kernel['operation']:38}"
        yield one_line(f"{size}  {place} {kernel['kind']}, {kernel['name']}: {kernel['tensors']}")


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
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
