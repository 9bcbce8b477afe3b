"""A run's folder: the request it was started with, and the state that it is resumed from.

`run.json` holds the request. The state is `last.ckpt`, the one before it `previous.ckpt`; both are written whole, and a
broken `last.ckpt` gives way to `previous.ckpt`. A state is a pickle of torch, read as `model.weight_files` reads one:
nothing in it is run. What Lightning restores without looking is checked here for the types and shapes that the run has.
"""

import json
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from torch.optim import Optimizer

from cnx_deploy.core.errors import CorruptArtifactError, InputError, OutputExistsError
from cnx_deploy.core.files import make_folder, room_errors, write_text
from cnx_deploy.core.manifest import Count
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.strict_json import MAX_DEPTH, Finite, bounded_content, shortened, strict_json, typed
from cnx_deploy.model.weight_files import UNREADABLE, check_archive, read_pickle
from cnx_deploy.training.records import EpochRecord
from cnx_deploy.training.spec import RunSpec

__all__ = ["REQUEST", "STATE", "STATE_BEFORE", "check_optimizers", "check_state", "corrupt_state", "keep_state",
           "open_run", "usable_state"]  # fmt: skip

REQUEST = "run.json"
STATE = "last.ckpt"
STATE_BEFORE = "previous.ckpt"
MOST_NAMED = 8
"""Of fields that differ; more are of another run."""
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
"""What each optimiser keeps of a parameter that has been stepped."""

Plain = str | int | Finite | bool | None


@dataclass(frozen=True, slots=True)
class RunRequest:
    """What `run.json` holds. `spec`: what was asked for; `resolved`: the same with what None stands for, for people.

    `class_names` is a classifier's, `held_images_taken` a pre-training's.
    """

    spec: Mapping[str, Plain]
    train_images: Count
    preprocessing: Preprocessing
    resolved: Mapping[str, Plain] = field(default_factory=dict)
    val_images: Count | None = None
    class_names: tuple[str, ...] | None = None
    held_images_taken: Count | None = None


# --- the request ------------------------------------------------------------------------------------------------------


def open_run(spec: RunSpec, name: str, **data: Any) -> Path:
    """Make a fresh folder and write the request into it, or find the one to resume and check that it is of the same.

    Of several processes the first one makes the folder, and no other writes there.

    Args:
        spec: What is asked for; its learned fields are compared with those of the run that is resumed.
        name: Folders are called `<name>-NNN` where `spec.run_dir` does not name one.
        data: What is known of the images, as plain types; see `RunRequest`. It is compared too.

    Raises:
        InputError: There is nothing to resume, the request differs, or the folder cannot be written.
        CorruptArtifactError: The request of the run that is resumed cannot be read.
        OutputExistsError: `spec.run_dir` holds a run already.
    """
    request = {
        "spec": spec.to_dict(), "resolved": spec.resolved(), "preprocessing": spec.preprocessing.to_dict(), **data,
    }  # fmt: skip
    numbers = _run_numbers(spec.output_dir, name)
    if spec.resume:
        if spec.run_dir is None and not numbers:
            raise InputError(f"{spec.output_dir} has no run of {name} to resume. Start one without --resume.")
        run_dir = spec.run_dir or spec.output_dir / f"{name}-{numbers[-1]:03}"
        _check_same_request(run_dir, request)
        return run_dir
    if spec.launch.rank:
        return spec.run_dir or spec.output_dir
    run_dir = spec.run_dir or spec.output_dir / f"{name}-{max(numbers, default=0) + 1:03}"
    if (run_dir / REQUEST).exists():
        raise OutputExistsError(f"{run_dir} holds a run already. Resume it with --resume, or name another folder.")
    make_folder(run_dir, "Choose another --output-dir.")
    write_text(run_dir / REQUEST, json.dumps(request, indent=2, sort_keys=True) + "\n")
    return run_dir


def _run_numbers(output_dir: Path, name: str) -> list[int]:
    """The numbers of the runs of a name, rising."""
    names = [path.name.rpartition("-") for path in output_dir.glob(f"{name}-*")]
    return sorted(int(number) for before, _, number in names if before == name and number.isdigit())


def _check_same_request(run_dir: Path, request: Mapping[str, Any]) -> None:
    record = run_dir / REQUEST
    if not record.is_file():
        raise InputError(f"{run_dir} has no {REQUEST} to resume from. Start a run without --resume.")
    try:
        before = strict_json(bounded_content(record))
        typed(before, RunRequest)
    except ValueError as error:
        raise CorruptArtifactError(f"{record} cannot be read ({error}). Start a run without --resume.") from error
    # Through JSON, so that tuples are the lists that were read.
    then, now = ({**content, **content["spec"]} for content in (before, json.loads(json.dumps(request))))
    differing = [
        f"{name} {shortened(then.get(name))} then, {shortened(value)} now"
        for name, value in now.items()
        if name not in ("spec", "resolved") and not _are_equal(then.get(name), value)
    ]
    if differing:
        raise InputError(
            f"{run_dir} was started otherwise: {'; '.join(differing[:MOST_NAMED])}. Resume with the same request, or "
            "start anew."
        )


def _are_equal(then: Any, now: Any) -> bool:
    """As JSON has it: 1 is 1.0, and neither is true."""
    return bool(then == now) and isinstance(then, bool) == isinstance(now, bool)


# --- the state --------------------------------------------------------------------------------------------------------


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
    """
    present = [run_dir / name for name in (STATE, STATE_BEFORE) if (run_dir / name).is_file()]
    if not present:
        raise InputError(f"{run_dir} has no {STATE} to resume from. Start a run without --resume.")
    whole = next((path for path in present if _is_whole(path)), None)
    if whole is None:
        broken = " and ".join(path.name for path in present)
        raise CorruptArtifactError(f"{run_dir}: {broken} cannot be read whole. Start a run without --resume.")
    return whole


def _is_whole(state: Path) -> bool:
    """Whether every entry of torch's archive has its checksum. RefusedArtifactError for one that unpacks to more."""
    check_archive(state)
    try:
        with zipfile.ZipFile(state) as archive:
            return archive.testzip() is None
    except UNREADABLE:
        return False


class StoredTensor:
    """A tensor within a state. A bare one has the methods of mappings and lists, and is taken for either by msgspec."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Counts(msgspec.Struct):
    ready: Count
    completed: Count


class _LoopProgress(msgspec.Struct):
    total: _Counts
    current: _Counts


class _FitLoop(msgspec.Struct):
    epoch_progress: _LoopProgress
    batch_progress: _LoopProgress = msgspec.field(name="epoch_loop.batch_progress")


class _Loops(msgspec.Struct):
    fit_loop: _FitLoop


class _ParamGroup(msgspec.Struct):
    lr: Finite
    weight_decay: Finite
    params: tuple[Count, ...]


class _OptimizerState(msgspec.Struct):
    state: Mapping[int, Mapping[str, Any]]
    param_groups: tuple[_ParamGroup, ...]


class _Schedule(msgspec.Struct):
    base_lrs: tuple[Finite, ...]
    last_epoch: Count


class _State(msgspec.Struct):
    """What is restored; Lightning keeps more beside it."""

    epoch: Count
    global_step: Count
    version: str = msgspec.field(name="pytorch-lightning_version")
    state_dict: Mapping[str, StoredTensor]
    loops: _Loops
    callbacks: Mapping[str, Mapping[str, Any]]
    optimizer_states: Annotated[tuple[_OptimizerState, ...], msgspec.Meta(min_length=1, max_length=1)]
    lr_schedulers: Annotated[tuple[_Schedule, ...], msgspec.Meta(min_length=1, max_length=1)]


def check_state(path: Path, tensors: Mapping[str, Tensor], writer: str, record_type: type[EpochRecord]) -> None:
    """Raise where a run cannot go on from the state at `path`.

    Args:
        path: The state.
        tensors: Those of the run's module, by name.
        writer: The callback that keeps the records of epochs.
        record_type: What those records are.

    Raises:
        CorruptArtifactError: It is no such state.
        RefusedArtifactError: It is a pickle that holds more than data.
    """
    content = read_pickle(path)
    try:
        state = typed(_with_stored_tensors(content, {}), _State)
        _check_tensors({name: stored.tensor for name, stored in state.state_dict.items()}, tensors)
        if writer not in state.callbacks:
            raise ValueError(f"callbacks: there is no {writer}")
        where = f"callbacks.{writer}.records"
        kept = state.callbacks[writer].get("records")
        records: tuple[EpochRecord, ...] = typed(kept, tuple[record_type, ...], where)  # type: ignore[valid-type]
        numbers = [record.epoch for record in records]
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"{where}: the epochs are {numbers}, expected them to count from 1")
        if state.epoch != max(0, len(numbers) - 1):
            raise ValueError(f"epoch: it is {state.epoch} with records of {len(numbers)} epochs")
    except ValueError as error:
        raise corrupt_state(path, error) from error


def check_optimizers(optimizers: Iterable[Optimizer], path: Path) -> None:
    """Raise CorruptArtifactError where what was restored would fail at the first step: settings, moments, shapes."""
    try:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                _check_settings(group, optimizer.defaults)
            for parameter, moments in optimizer.state.items():
                _check_moments(moments, parameter, MOMENTS[type(optimizer).__name__])
    except ValueError as error:
        raise corrupt_state(path, error) from error


def corrupt_state(path: Path, reason: object) -> CorruptArtifactError:
    """Make the error for a state that cannot be gone on from."""
    return CorruptArtifactError(
        f"{path} is no state that this run can go on from ({shortened(reason)}). Start a run without --resume, or put "
        "a state of this run there."
    )


def _with_stored_tensors(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """Wrap every tensor. A pickle may hold one object at many places, and itself: each is walked once."""
    if id(value) in seen:
        return seen[id(value)]
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, Tensor):
        walked: Any = StoredTensor(value)
    elif isinstance(value, dict):
        walked = {key: _with_stored_tensors(entry, seen, depth + 1) for key, entry in value.items()}
    elif isinstance(value, list | tuple):
        walked = [_with_stored_tensors(entry, seen, depth + 1) for entry in value]
    else:
        return value
    seen[id(value)] = walked
    return walked


def _check_tensors(stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(stored.keys() ^ expected.keys()):
        raise ValueError(f"state_dict: {shortened(name)} is {'missing' if name in expected else 'none of the run'}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            here, there = (f"{tuple(one.shape)} {one.dtype}" for one in (tensor, expected[name]))
            raise ValueError(f"state_dict.{name}: it is {here}, in this run {there}")


def _check_settings(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, default in defaults.items():
        value = group.get(name)
        kind = type(default) if default is None or isinstance(default, bool | tuple) else int | float
        if not isinstance(value, kind) or isinstance(value, bool) != isinstance(default, bool):
            raise ValueError(f"optimizer_states: {name} is {value!r:.80}, expected one like {default!r}")


def _check_moments(moments: Mapping[str, Any], parameter: Tensor, names: tuple[str, ...]) -> None:
    for name in names if moments else ():
        value = moments.get(name)
        wanted = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != wanted:
            shown = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"optimizer_states: {name} is {shown}, expected a tensor of {tuple(wanted)}")
