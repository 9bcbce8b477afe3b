"""A run's folder: the request it was started with, and the state that it is resumed from.

`run.json` holds the request. The state is `last.ckpt`, the one before it `previous.ckpt`; both are written whole, and a
broken `last.ckpt` gives way to `previous.ckpt`. A state is a pickle of torch, read as `model.weight_files` reads one:
nothing in it is run.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, room_errors, write_text
from cnx_deploy.core.strict_json import bounded_content, shortened, strict_json, typed
from cnx_deploy.model.pickles import UNREADABLE, check_archive, read_pickle
from cnx_deploy.training.records import EpochRecord
from cnx_deploy.training.spec import LATER_FIELDS, RunSpec

__all__ = ["REQUEST", "STATE", "STATE_BEFORE", "check_new", "check_state", "corrupt_state", "keep_state",
           "open_run", "usable_state"]  # fmt: skip

REQUEST = "run.json"
STATE = "last.ckpt"
STATE_BEFORE = "previous.ckpt"
MOST_NAMED = 8
"""Of fields that differ; more are of another run."""


def open_run(spec: RunSpec, name: str, **data: Any) -> Path:
    """Make a fresh folder and write the request into it, or find the one to resume and check that it is of the same.

    Of several processes the first one makes the folder, and no other writes there.

    Args:
        spec: What is asked for; its learned fields are compared with those of the run that is resumed.
        name: Folders are called `<name>-NNN` where `spec.run_dir` does not name one.
        data: What is known of the images, as plain types. It is compared too.

    Raises:
        InputError: There is nothing to resume, the request differs, or the folder cannot be written.
        CorruptArtifactError: The request of the run that is resumed cannot be read.
        OutputExistsError: `spec.run_dir` holds a run already.
    """
    request = {
        "spec": spec.to_dict(), "resolved": spec.resolved(), "preprocessing": spec.preprocessing.to_dict(), **data,
    }  # fmt: skip
    names = [path.name.rpartition("-") for path in spec.output_dir.glob(f"{name}-*")]
    numbers = sorted(int(number) for before, _, number in names if before == name and number.isdigit())
    if spec.resume:
        if spec.run_dir is None and not numbers:
            raise InputError(f"{spec.output_dir} has no run of {name} to resume. Start one without --resume.")
        run_dir = spec.run_dir or spec.output_dir / f"{name}-{numbers[-1]:03}"
        _check_same_request(run_dir, request)
        return run_dir
    if spec.launch.rank:
        return spec.run_dir or spec.output_dir
    run_dir = spec.run_dir or spec.output_dir / f"{name}-{max(numbers, default=0) + 1:03}"
    check_new(spec)
    make_folder(run_dir, "Choose another --output-dir.")
    write_text(run_dir / REQUEST, json.dumps(request, indent=2, sort_keys=True) + "\n")
    return run_dir


def check_new(spec: RunSpec) -> None:
    """Raise OutputExistsError where a new run is asked for in the folder of another; before images are looked at."""
    if spec.run_dir is not None and not spec.resume and not spec.launch.rank and (spec.run_dir / REQUEST).exists():
        raise OutputExistsError(f"{spec.run_dir} holds a run already. Resume it with --resume, or name another folder.")


def _check_same_request(run_dir: Path, request: Mapping[str, Any]) -> None:
    record = run_dir / REQUEST
    if not record.is_file():
        raise InputError(f"{run_dir} has no {REQUEST} to resume from. Start a run without --resume.")
    try:
        before = typed(strict_json(bounded_content(record)), dict[str, Any])
        spec_before = typed(before.get("spec"), dict[str, Any], "spec")
    except ValueError as error:
        raise CorruptArtifactError(f"{record} cannot be read ({error}). Start a run without --resume.") from error
    # Through JSON, so that tuples are the lists that were read.
    now = {**LATER_FIELDS, **json.loads(json.dumps({**request, **request["spec"]}))}
    then = {**LATER_FIELDS, **before, **spec_before}
    differing = [
        f"{name} {shortened(then.get(name))} then, {shortened(value)} now"
        for name, value in now.items()
        # As JSON has it: 1 is 1.0, and neither is true.
        if name not in ("spec", "resolved")
        and (then.get(name) != value or isinstance(then.get(name), bool) != isinstance(value, bool))
    ]
    if differing:
        raise InputError(
            f"{run_dir} was started otherwise: {'; '.join(differing[:MOST_NAMED])}. Resume with the same request, or "
            "start anew."
        )


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
    """Find the newest state whose checksums hold.

    Raises:
        InputError: There is no state.
        CorruptArtifactError: No state is whole.
        RefusedArtifactError: A state would unpack to more than it has.
    """
    present = [run_dir / name for name in (STATE, STATE_BEFORE) if (run_dir / name).is_file()]
    if not present:
        raise InputError(f"{run_dir} has no {STATE} to resume from. Start a run without --resume.")
    for state in present:
        check_archive(state)
        try:
            with zipfile.ZipFile(state) as archive:
                if archive.testzip() is None:
                    return state
        except UNREADABLE:
            continue
    broken = " and ".join(path.name for path in present)
    raise CorruptArtifactError(f"{run_dir}: {broken} cannot be read whole. Start a run without --resume.")


def check_state(path: Path, writer: str, record_type: type[EpochRecord]) -> None:
    """Raise where a state lacks what Lightning would go on without: the records of its epochs, the optimiser's state.

    Names and shapes of weights are checked by torch when it loads them.

    Args:
        path: The state.
        writer: The callback that keeps the records of epochs.
        record_type: What those records are.

    Raises:
        CorruptArtifactError: It is no such state.
        RefusedArtifactError: It is a pickle that holds more than data.
    """
    content = read_pickle(path, stand_ins=False)  # torch itself reads it afterwards
    try:
        state = typed(content, dict[str, Any])
        kept = typed(state.get("callbacks"), dict[str, Any], "callbacks").get(writer)
        records: Any = typed(kept, dict[str, tuple[record_type, ...]], writer)["records"]  # type: ignore[valid-type]
        if not typed(state.get("optimizer_states"), list[Any], "optimizer_states"):
            raise ValueError("optimizer_states: there is none")
        numbers = [record.epoch for record in records]
        if numbers != list(range(1, len(numbers) + 1)) or state.get("epoch") != max(0, len(numbers) - 1):
            raise ValueError(f"it is of epoch {state.get('epoch')}, from 0, with records of the epochs {numbers}")
    except (LookupError, ValueError) as error:
        raise corrupt_state(path, error) from error


def corrupt_state(path: Path, reason: object) -> CorruptArtifactError:
    """Make the error for a state that cannot be gone on from."""
    return CorruptArtifactError(
        f"{path} is no state that this run can go on from ({shortened(reason)}). Start a run without --resume, or put "
        "a state of this run there."
    )
