"""A run's folder: its numbered name, the request it was started with, and the state it is resumed from.

`run.json` holds the request. The state is `last.ckpt`, the one before it `previous.ckpt`; both are written whole, and a
broken `last.ckpt` gives way to `previous.ckpt`.
"""

import csv
import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, room_errors, write_text
from cnx_deploy.core.manifest import Count
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import Finite, bounded_content, shortened, strict_json, typed
from cnx_deploy.model.weight_files import UNREADABLE, check_archive

__all__ = ["STATE", "keep_state", "open_run", "table_of", "usable_state"]

REQUEST = "run.json"
STATE = "last.ckpt"
STATE_BEFORE = "previous.ckpt"
MOST_NAMED = 8
"""Of fields that differ; more are of another run."""

Plain = str | int | Finite | bool | None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What `run.json` holds. `spec`: what was asked for; `resolved`: with what None stands for, for people.

    `class_names` is a classifier's, `held_images_taken` a pre-training's.
    """

    spec: Mapping[str, Plain]
    train_images: Count
    preprocessing: Preprocessing
    resolved: Mapping[str, Plain] = field(default_factory=dict)
    val_images: Count | None = None
    class_names: tuple[str, ...] | None = None
    held_images_taken: Count | None = None


def open_run(request: Mapping[str, Any], *, name: str, output_dir: Path, run_dir: Path | None, resume: bool) -> Path:
    """Make a fresh folder and write the request into it, or find the one to resume and check that it is of the same.

    `run_dir` None takes `<output_dir>/<name>-NNN`: the next number, or with `resume` the newest. `request` is plain
    types; its entry `spec`, a dictionary, is compared field by field, and `resolved` is not. Raises InputError when
    there is nothing to resume, the request differs or the folder cannot be written, OutputExistsError when `run_dir`
    holds a run.
    """
    if resume:
        found = run_dir or _newest_run(output_dir, name)
        _check_same_request(found, request)
        return found
    made = run_dir or output_dir / f"{name}-{max(_run_numbers(output_dir, name), default=0) + 1:03}"
    if (made / REQUEST).exists():
        raise OutputExistsError(f"{made} holds a run already. Resume it with --resume, or name another folder.")
    make_folder(made, "Choose another --output-dir.")
    write_text(made / REQUEST, json.dumps(request, indent=2, sort_keys=True) + "\n")
    return made


def keep_state(run_dir: Path, save: Callable[[Path], None], *, writes: bool = True) -> None:
    """Put what `save` writes to a temporary path into place as the newest state; the newest so far becomes the other.

    `writes` is whether this process is the one that writes: of several, `save` is called by all.
    """
    temporary = run_dir / f".{STATE}.tmp"
    try:
        with room_errors(run_dir / STATE):
            save(temporary)
    except BaseException:  # half of a state takes the room that the next try needs
        if writes:
            temporary.unlink(missing_ok=True)
        raise
    if not writes:
        return
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    if (run_dir / STATE).exists():
        (run_dir / STATE).replace(run_dir / STATE_BEFORE)
    temporary.replace(run_dir / STATE)


def usable_state(run_dir: Path) -> Path:
    """The newest state whose checksums hold. Raises InputError without one, CorruptArtifactError when none is whole."""
    present = [run_dir / name for name in (STATE, STATE_BEFORE) if (run_dir / name).is_file()]
    if not present:
        raise InputError(f"{run_dir} has no {STATE} to resume from. Start a run without --resume.")
    whole = next((path for path in present if _is_whole(path)), None)
    if whole is None:
        broken = " and ".join(path.name for path in present)
        raise CorruptArtifactError(f"{run_dir}: {broken} cannot be read whole. Start a run without --resume.")
    return whole


def table_of(rows: Sequence[Mapping[str, float | None]]) -> str:
    """A CSV table of rows of the same columns; None is an empty cell."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[-1]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if value is None else f"{value:.6g}" for name, value in row.items()})
    return table.getvalue()


def _is_whole(state: Path) -> bool:
    """Whether every entry of torch's archive has its checksum. RefusedArtifactError for one that unpacks to more."""
    check_archive(state)
    try:
        with zipfile.ZipFile(state) as archive:
            return archive.testzip() is None
    except UNREADABLE:
        return False


def _run_numbers(output_dir: Path, name: str) -> list[int]:
    names = [path.name.rpartition("-") for path in output_dir.glob(f"{name}-*")]
    return sorted(int(number) for before, _, number in names if before == name and number.isdigit())


def _newest_run(output_dir: Path, name: str) -> Path:
    numbers = _run_numbers(output_dir, name)
    if not numbers:
        raise InputError(f"{output_dir} has no run of {name} to resume. Start one without --resume.")
    return output_dir / f"{name}-{numbers[-1]:03}"


def _check_same_request(run_dir: Path, request: Mapping[str, Any]) -> None:
    record = run_dir / REQUEST
    if not record.is_file():
        raise InputError(f"{run_dir} has no {REQUEST} to resume from. Start a run without --resume.")
    try:
        before = strict_json(bounded_content(record))
        typed(before, RunRequest)
    except ValueError as error:
        raise CorruptArtifactError(f"{record} cannot be read ({error}). Start a run without --resume.") from error
    flat_before, flat_now = ({**found, **found["spec"]} for found in (before, json.loads(json.dumps(request))))
    differing = [
        f"{name} {shortened(flat_before.get(name))} then, {shortened(value)} now"
        for name, value in flat_now.items()
        if name not in ("spec", "resolved") and not _are_equal(flat_before.get(name), value)
    ]
    if differing:
        raise InputError(
            f"{run_dir} was started otherwise: {'; '.join(differing[:MOST_NAMED])}. Resume with the same request, or "
            "start anew."
        )


def _are_equal(before: Any, now: Any) -> bool:
    """As JSON has it: 1 is 1.0, and neither is true."""
    return bool(before == now) and isinstance(before, bool) == isinstance(now, bool)
