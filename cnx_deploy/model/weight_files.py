"""A file of weights as one network's FP32 tensors, read without running anything that is in it.

Files are told by their content: safetensors holds tensors only, everything else is a pickle of torch
(`model.pickles`). The network is looked for in nested dictionaries and under any prefix of names (`model.layouts`);
what lies beside it is named, and a file with several networks is refused unless one is chosen.

Source of the attacks on safetensors: huggingface/safetensors, attacks/.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cnx_deploy.core.errors import CheckpointError, CorruptArtifactError, InputError
from cnx_deploy.core.files import kind_of_weights, open_regular
from cnx_deploy.core.strict_json import kind_of, strict_json
from cnx_deploy.model.layouts import TOP, Network, find_networks, mixed_layouts, unknown_layout
from cnx_deploy.model.pickles import SHARED, read_pickle

__all__ = ["METADATA_KEY", "WeightFile", "read_weight_file"]

METADATA_KEY = "cnx_deploy"
"""The header's one entry, a JSON object: the format writes several entries in random order."""

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
"""Of files that are corrupt where they hold no pickle; under another name they are files of another kind."""
READABLE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

MAX_SAFETENSORS_HEADER = 100_000_000
"""The format's own limit."""

MAX_DEPTH, MAX_ENTRIES, MAX_TENSORS, MAX_NAME = 8, 200_000, 20_000, 500
"""Dictionaries within each other; entries in all of them; tensors; characters of a whole name. A training checkpoint of
huge with its optimiser and average has 2,000 tensors."""

MOST_NAMED = 6
"""Groups of tensors that a note names."""


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Tensors of one network, float32 and finite, under the file's own names without what stands before all of them.

    `metadata`: our own header, empty for foreign files. `entry`: where in the file the network lies, names of
    dictionaries and of modules joined by dots, None at the top. `beside`: what else the file says at its top level, by
    name: the entries of a pickle that hold no tensor (`args`, `meta`, `hyper_parameters`, `epoch`), the other texts of
    a safetensors header. It is foreign data of any type, which may contain itself. `notes`: what was chosen and set
    aside, for people. `heads` and `task`: whose heads of a dense network are among the tensors, and the task they tell.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None
    beside: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    heads: str | None = None
    task: str | None = None


def read_weight_file(
    path: Path,
    *,
    ema: bool | None = None,
    entry: str | None = None,
    modules: Sequence[str] = ("norm", "head"),
    task: str | None = None,
) -> WeightFile:
    """Read one network of a file of weights; other floats become float32.

    Args:
        path: the file; its content says how it is read, but no pickle is read under the name `.safetensors`.
        ema: True takes averaged weights, False plain ones. None takes plain ones where there are both; of files whose
            own program loads the average (mmengine, Lightning's WeightAveraging) it takes that.
        entry: which of several networks, by whole parts of its place: "teacher", "state_dict.student", "." for the top.
        modules: the modules of the task's head under the reference code's names; other tensors beside the network's
            own are set aside.
        task: what the network is read for. Of a dense network the heads of another task are set aside; None takes
            those that are there.

    Raises:
        InputError: there is no such file, or it is of another kind.
        CorruptArtifactError: the bytes are unreadable, or a value is NaN or infinite.
        RefusedArtifactError: a pickle holds more than data.
        CheckpointError: no network is in it, or not the one that was asked for, or several; or its element types are
            others.
        OutOfMemoryError: memory is short for a pickle that claims no more than it has.
    """
    file = _read_by_content(path)
    if not file.tensors:
        raise CheckpointError(f"{path} holds no tensor, where a state dict was expected. Save model.state_dict().")
    if file.metadata:  # a file of ours is one network with nothing beside it
        if ema or entry not in (None, TOP):
            raise CheckpointError(
                f"{path} holds one set of weights, at the top, and no EMA weights. Leave --ema and --entry out."
            )
        return replace(file, tensors=_floats(_checked_tensors(file.tensors, path), path))
    try:
        networks = find_networks(file.tensors, modules)
    except ValueError as error:
        raise mixed_layouts(error, str(path)) from error
    if not networks:
        raise unknown_layout(file.tensors, str(path))
    chosen, notes = _chosen(networks, file, path, ema=ema, entry=entry)
    network = chosen if task in (None, chosen.task) else chosen.without_heads()
    tensors = _checked_tensors({name: file.tensors[stored] for name, stored in network.names.items()}, path)
    if any(tensor.dtype == torch.float64 for tensor in tensors.values()):
        notes.append("float64 weights, rounded to float32")
    notes += _set_aside(file.tensors, [network if each is chosen else each for each in networks])
    return replace(
        file, tensors=_floats(tensors, path), entry=None if network.entry == TOP else network.entry,
        notes=tuple(notes), heads=network.heads, task=chosen.task,
    )  # fmt: skip


def _read_by_content(path: Path) -> WeightFile:
    """Every tensor of a file by its whole name, as it is stored, and what lies beside."""
    try:
        with open_regular(path) as stream:
            kind = kind_of_weights(stream.read(16), os.fstat(stream.fileno()).st_size)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be opened ({reason}): expected a checkpoint there. Check the path.") from error
    if kind == "safetensors" or path.suffix == ".safetensors":
        file = _read_safetensors(path)
        return replace(file, tensors=_tensors_in(file.tensors, path))
    if kind is None and path.suffix not in PICKLE_SUFFIXES:
        raise InputError(
            f"{path} is no checkpoint by its content: expected safetensors or a file that torch.save wrote. Check the "
            "path."
        )
    content = read_pickle(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict. Save model.state_dict().")
    beside = {key: value for key, value in content.items() if isinstance(key, str) and not _holds_tensors(value)}
    return WeightFile(_tensors_in(content, path), beside=beside)


def _read_safetensors(path: Path) -> WeightFile:
    _check_header(path)
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is not a mapping
            texts = dict(opened.metadata() or {})
            header = texts.pop(METADATA_KEY, "{}")
    except (SafetensorError, OSError) as error:
        raise CorruptArtifactError(
            f"{path} is not a whole safetensors file ({error}). Fetch or write it again."
        ) from error
    try:
        metadata = strict_json(header.encode("utf-8"))
        if not isinstance(metadata, dict):
            raise ValueError(f"it is {kind_of(metadata)}, expected an object")
    except ValueError as error:
        raise CorruptArtifactError(f"{path} has metadata that is not JSON ({error}). Write it again.") from error
    return WeightFile(tensors, metadata, beside=texts)


def _check_header(path: Path) -> None:
    """Raise CorruptArtifactError for a header that names a tensor twice or is too deep, which the library lets pass.

    Everything else that can be wrong with the format the library finds itself.
    """
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if length > min(MAX_SAFETENSORS_HEADER, path.stat().st_size):
            return
        header = stream.read(length)

    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twin = next(name for name in names if names.count(name) > 1)
            raise CorruptArtifactError(
                f"{path} names {twin} twice in its header: expected each tensor once. Fetch or write it again."
            )
        return dict(pairs)

    try:
        json.loads(header, object_pairs_hook=without_twins)
    except RecursionError as error:
        raise CorruptArtifactError(f"{path} has a header that is nested too deep. Fetch or write it again.") from error
    except ValueError:
        return  # no JSON: the library says where


def _tensors_in(content: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Every tensor in nested dictionaries by its whole name, parts joined by dots; bounded, whatever contains what."""
    tensors: dict[str, Tensor] = {}
    count = 0

    def walk(entries: Mapping[Any, Any], before: str, depth: int) -> None:
        nonlocal count
        for key, value in entries.items():
            name = before + (str(key) if isinstance(key, str | int) else type(key).__name__)
            count += 1
            if count > MAX_ENTRIES or len(tensors) > MAX_TENSORS or len(name) > MAX_NAME or not name.isprintable():
                raise CorruptArtifactError(
                    f"{path} has {name[:80]!r} as entry {count:,}: expected at most {MAX_ENTRIES:,} entries and "
                    f"{MAX_TENSORS:,} tensors, with names of at most {MAX_NAME} printable characters. Save the state "
                    "dict alone."
                )
            if isinstance(value, Tensor):
                if name in tensors:
                    raise CheckpointError(f"{path}: two tensors are called {name!r}. Save the state dict alone.")
                tensors[name] = value
            elif isinstance(value, dict) and depth < MAX_DEPTH:
                walk(value, f"{name}.", depth + 1)

    walk(content, "", 0)
    return tensors


def _holds_tensors(value: object) -> bool:
    """Whether a tensor is in nested containers. Each is looked into once: a pickle's may hold themselves."""
    seen: set[int] = set()
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, Tensor):
            return True
        if isinstance(part, dict | list | tuple | set) and id(part) not in seen:
            seen.add(id(part))
            rest.extend(part.values() if isinstance(part, dict) else part)
    return False


def _chosen(
    networks: Sequence[Network], file: WeightFile, path: Path, *, ema: bool | None, entry: str | None
) -> tuple[Network, list[str]]:
    """The network that was asked for, or the only one that fits; and what there is to say of the choice."""
    networks, loads_average = _with_averages_marked(networks, file.beside)
    left = list(networks)
    if entry is not None:
        called = [each for each in left if each.is_called(entry)]
        left = [each for each in called if each.entry == entry] or called
        if not left:
            raise CheckpointError(f"{path} has no network called {entry!r}, but {_listed(networks)}. Name one of them.")
    if ema is not None:
        kept = [each for each in left if each.is_average is ema]
        if not kept:
            kind, option = ("EMA", "--ema (ema)") if ema else ("plain", "--no-ema (ema)")
            raise CheckpointError(f"{path} has no {kind} weights, but {_listed(left)}. Leave {option} out.")
        left = kept
    left = [each for each in left if each.stages == max(each.stages for each in left)]
    notes: list[str] = []
    averages, plain = ([each for each in left if each.is_average is kind] for kind in (True, False))
    if averages and plain and entry is None:
        left, other = (averages, plain) if loads_average else (plain, averages)
        notes.append(
            f"averaged weights (EMA), as its own program loads; --no-ema (ema=False) takes the plain {_listed(other)}"
            if loads_average
            else f"plain weights; --ema (ema=True) takes the averaged {_listed(other)}"
        )
    elif averages and not plain:
        notes.append("averaged weights (EMA)")
    network = left[0]
    several = [each for each in left[1:] if not _are_equal(network, each, file.tensors, path)]
    if several:
        raise CheckpointError(
            f"{path} has several networks that fit equally well: {_listed([network, *several])}. Choose one with "
            "--entry NAME (entry), or write its state dict to a file of its own."
        )
    if network.entry != TOP:
        notes.insert(0, f"weights from the entry {network.entry!r}")
    if not averages or not plain or entry is not None:
        others = [each for each in networks if each is not network]
        notes += [f"not taken: {_listed(others)}"] if others else []
    return network, notes


def _with_averages_marked(networks: Sequence[Network], beside: Mapping[str, Any]) -> tuple[list[Network], bool]:
    """Mark the averages of programs that save them as `state_dict`; and whether this file is of such a program.

    mmengine's EMAHook swaps the two, so that `ema_state_dict` has the plain weights (hooks/ema_hook.py); Lightning's
    WeightAveraging keeps those in `current_model_state` (callbacks/weight_averaging.py).
    """
    meta = beside.get("meta")
    is_mmengine = isinstance(meta, dict) and "mmengine_version" in meta
    plain = "ema_state_dict." if is_mmengine else "current_model_state."
    if not any(each.prefix.startswith(plain) for each in networks):
        return list(networks), False
    swapped = [
        replace(each, is_average=each.prefix.startswith("state_dict."))
        if each.prefix.startswith((plain, "state_dict."))
        else each
        for each in networks
    ]
    return swapped, True


def _listed(networks: Iterable[Network]) -> str:
    return ", ".join(repr(each.entry) for each in networks)[:400]


def _are_equal(one: Network, other: Network, tensors: Mapping[str, Tensor], path: Path) -> bool:
    """Whether two networks hold the same values, as a module does that is reached by two names."""
    if one.layout != other.layout or one.names.keys() != other.names.keys():
        return False
    first, second = (
        _checked_tensors({name: tensors[stored] for name, stored in each.names.items()}, path) for each in (one, other)
    )
    return all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)


def _set_aside(tensors: Iterable[str], networks: Iterable[Network]) -> list[str]:
    """A note that names the tensors of no network, by the first part that no name of a network shares."""
    own = {stored for each in networks for stored in each.names.values()}
    shared = {head for name in own for head in _heads(name)}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        if name not in own:
            groups.setdefault(next((head for head in _heads(name) if head not in shared), name), []).append(name)
    shown = [names[0] if len(names) == 1 else f"{group} ({len(names)} tensors)" for group, names in groups.items()]
    more = f" and {len(shown) - MOST_NAMED} more" if len(shown) > MOST_NAMED else ""
    return [f"set aside: {', '.join(shown[:MOST_NAMED])}{more}"] if shown else []


def _heads(name: str) -> Iterator[str]:
    """`a`, `a.b`, … of `a.b.c`, at most as many as a network's names have parts."""
    parts = name.split(".", 12)
    return (".".join(parts[:at]) for at in range(1, len(parts)))


def _checked_tensors(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors, once none of them and no sum of them claims more than the file holds."""
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, path)
    total, size = sum(each.numel() * each.element_size() for each in tensors.values()), path.stat().st_size
    if total > SHARED * size:
        raise CorruptArtifactError(
            f"{path}: its {len(tensors)} tensors claim {total:,} bytes and share storage; the file has {size:,}. "
            "Save the state dict again where it was made."
        )
    return tensors


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Raise for a tensor that is sparse or without values, or that claims more than its storage holds."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested or tensor.is_quantized:
        raise CheckpointError(
            f"{path}: {name} is no ordinary tensor ({str(tensor.layout).removeprefix('torch.')}, {tensor.device}): "
            "expected dense values. Save it with .to_dense() where it was made."
        )
    # A view that repeats its storage claims any size for a few bytes.
    claimed, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > held:
        raise CorruptArtifactError(
            f"{path}: {name} claims {claimed:,} bytes, the file holds {held:,} for it. Fetch or write it again."
        )


def _floats(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Float32 tensors of finite values."""
    floats: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        counts_batches = name.endswith(".num_batches_tracked") and tensor.dtype == torch.int64
        if tensor.dtype not in READABLE_DTYPES and not counts_batches:
            raise CheckpointError(
                f"{path}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected float32, float16, bfloat16 or "
                "float64. Convert it where it was made."
            )
        floats[name] = tensor.float()
        if not torch.isfinite(floats[name]).all():
            raise CorruptArtifactError(
                f"{path}: {name} holds NaN or infinity, so every output would. Take an earlier checkpoint."
            )
    return floats
