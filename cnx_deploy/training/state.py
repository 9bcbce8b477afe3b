"""Whether the state of a run is one that this run can go on from, found before Lightning takes it.

A state is a pickle of torch, read as `model.weight_files` reads one: nothing in it is run. What Lightning restores
without looking has to be of the types and shapes that the run has.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor
from torch.optim import Optimizer

from cnx_deploy.core.errors import CorruptArtifactError
from cnx_deploy.core.manifest import Count
from cnx_deploy.core.strict_json import MAX_DEPTH, Finite, shortened, typed
from cnx_deploy.model.weight_files import read_pickle

__all__ = ["Expected", "check_optimizers", "check_state", "corrupt_state"]


MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
"""What each optimiser keeps of a parameter that has been stepped."""


class StoredTensor:
    """A tensor within a state. A bare one has the methods of mappings and lists, and is taken for either by msgspec."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Counts(msgspec.Struct):
    ready: Count
    completed: Count


class _Progress(msgspec.Struct):
    total: _Counts
    current: _Counts


class _FitLoop(msgspec.Struct):
    epoch_progress: _Progress
    batch_progress: _Progress = msgspec.field(name="epoch_loop.batch_progress")


class _Loops(msgspec.Struct):
    fit_loop: _FitLoop


class _ParamGroup(msgspec.Struct):
    lr: Finite
    weight_decay: Finite
    params: tuple[Count, ...]


class _OptimizerState(msgspec.Struct):
    state: Mapping[Count, Mapping[str, Any]]
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


@dataclass(frozen=True, slots=True)
class Expected:
    """What a run has: the tensors of its module, and under which name which records of epochs are kept."""

    tensors: Mapping[str, Tensor]
    writer: str
    record_type: type[Any]


def check_state(path: Path, expected: Expected) -> None:
    """Raise where a run that has `expected` cannot go on from the state at `path`.

    CorruptArtifactError for what is no such state, RefusedArtifactError for a pickle that holds more than data.
    """
    content = read_pickle(path)
    try:
        state = typed(_held(content, {}), _State)
        _check_tensors({name: each.tensor for name, each in state.state_dict.items()}, expected.tensors)
        if expected.writer not in state.callbacks:
            raise ValueError(f"callbacks: there is no {expected.writer}")
        where = f"callbacks.{expected.writer}.records"
        records = typed(state.callbacks[expected.writer].get("records"), tuple[expected.record_type, ...], where)  # type: ignore[name-defined]
        _check_epochs(records, state.epoch, where)
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
    """What is said of a state that cannot be gone on from."""
    return CorruptArtifactError(
        f"{path} is no state that this run can go on from ({shortened(reason)}). Start a run without --resume, or put "
        "a state of this run there."
    )


def _held(value: Any, seen: dict[int, Any], depth: int = 0) -> Any:
    """The same with tensors stored. A pickle may hold one object at many places, and itself: each is walked once."""
    if id(value) in seen:
        return seen[id(value)]
    if depth > MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(value, Tensor):
        found: Any = StoredTensor(value)
    elif isinstance(value, dict):
        found = {key: _held(each, seen, depth + 1) for key, each in value.items()}
    elif isinstance(value, list | tuple):
        found = [_held(each, seen, depth + 1) for each in value]
    else:
        return value
    seen[id(value)] = found
    return found


def _check_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name in sorted(found.keys() ^ expected.keys()):
        raise ValueError(f"state_dict: {shortened(name)} is {'missing' if name in expected else 'none of the run'}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            here, there = (f"{tuple(each.shape)} {each.dtype}" for each in (tensor, expected[name]))
            raise ValueError(f"state_dict.{name}: it is {here}, in this run {there}")


def _check_settings(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    for name, default in defaults.items():
        found = group.get(name)
        kind = type(default) if default is None or isinstance(default, bool | tuple) else int | float
        if not isinstance(found, kind) or isinstance(found, bool) != isinstance(default, bool):
            raise ValueError(f"optimizer_states: {name} is {found!r:.80}, expected one like {default!r}")


def _check_moments(moments: Mapping[str, Any], parameter: Tensor, names: tuple[str, ...]) -> None:
    for name in names if moments else ():
        value = moments.get(name)
        wanted = torch.Size() if name == "step" else parameter.shape
        if not isinstance(value, Tensor) or value.shape != wanted:
            found = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"optimizer_states: {name} is {found}, expected a tensor of {tuple(wanted)}")


def _check_epochs(records: tuple[Any, ...], epoch: int, where: str) -> None:
    numbers = [record.epoch for record in records]
    if numbers != list(range(1, len(numbers) + 1)):
        raise ValueError(f"{where}: the epochs are {numbers}, expected them to count from 1")
    if epoch != max(0, len(numbers) - 1):
        raise ValueError(f"epoch: it is {epoch} with records of {len(numbers)} epochs")
