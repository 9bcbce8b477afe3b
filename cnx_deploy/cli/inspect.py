"""`cnx-deploy inspect`."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from cnx_deploy.cli import options


@click.command("inspect")
@click.argument("file", type=click.Path(path_type=Path))
@options.as_json
def inspect_command(file: Path, as_json: bool) -> None:
    """Say what FILE is: a checkpoint, an ONNX file or an engine, told by its content. Exit code 4 if it was altered."""
    from cnx_deploy.inspection import inspect_file

    found = inspect_file(file)
    if as_json:
        options.echo_json(found.to_dict())
        return
    click.echo(f"{found.path}: {found.description}, {found.size_bytes / 1e6:.1f} MB")
    click.echo(f"{'sha256':18} {found.sha256}")
    for name, value in found.facts.items():
        for line in _lines(name, value):
            click.echo(line)
    for note in found.notes:
        click.echo(f"Note: {note}")


def _lines(name: str, value: Any) -> Iterator[str]:
    """`name value`, one line; a dictionary of dictionaries takes a line an entry."""
    title = name.replace("_", " ")
    if value is None or value in ({}, [], ""):
        return
    if isinstance(value, Mapping) and any(isinstance(entry, Mapping) for entry in value.values()):
        for key, entry in value.items():
            yield from _lines(f"{title} {key}", entry)
        return
    yield f"{title:18} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(entry)}" for key, entry in value.items() if entry is not None)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
