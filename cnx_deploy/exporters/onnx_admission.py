"""A foreign ONNX file, which no manifest names, is checked and run once in a process of its own before it is used here.

Whoever made it chose every byte that ONNX's checker and ONNX Runtime parse. What they do with it there, in bounded time
and memory, is what they would do here; a crash, a hang or a bomb is one message (docs/decisions/0019-foreign-onnx.md).
This module loads neither torch nor ONNX Runtime.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import CorruptArtifactError, OutOfMemoryError, RefusedArtifactError
from cnx_deploy.exporters.graph_rules import GraphFacts, check_graph
from cnx_deploy.exporters.onnx_external import check_tensors
from cnx_deploy.exporters.onnx_wire import OnnxLimits, scan_onnx

__all__ = ["Admission", "FirstRun", "admission_task", "admit_onnx"]

SECONDS, BYTES_A_SECOND = 120.0, 20e6
MEMORY_BYTES, MEMORY_PER_BYTE = 2 << 30, 4
CHECKED = (
    "limits and outside data, in its bytes",
    "ONNX's full check, in a process of its own",
    "standard operators; no reduction in half",
)
RAN = "one image through ONNX Runtime, in a process of its own"
NO_ORT = "BFLOAT16"


@dataclass(frozen=True, slots=True)
class FirstRun:
    """One image of zeros through ONNX Runtime on the CPU: shapes in and out, and whether the output was finite."""

    images: tuple[int, ...]
    logits: tuple[int, ...]
    is_finite: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """What is known of a file that was let in. `checks`: in words; `run` None: it was not run."""

    path: Path
    facts: GraphFacts
    checks: tuple[str, ...]
    run: FirstRun | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the child says."""

    facts: GraphFacts
    run: FirstRun | None


def admit_onnx(path: Path, *, runs: bool = False, limits: Limits | None = None) -> Admission:
    """Check a foreign file, and with `runs` send one image through it. `limits`: of the child; by the file's size.

    Raises RefusedArtifactError for what is beyond limits, outside its folder, no standard operator, or ends the
    child; CorruptArtifactError for what is not valid; GraphCheckError for a reduction in half; InputError for a file
    that is not there or, with `runs`, takes no images.
    """
    outside = check_tensors(path, scan_onnx(path))
    before = _identities(path, outside)
    found = run_isolated(
        "cnx_deploy.exporters.onnx_admission:admission_task",
        {"path": str(path.resolve().parent / path.name), "runs": runs},
        limits or _limits_for(before),
        what=f"Checking {path.name}",
        failure=RefusedArtifactError,
    )
    if _identities(path, outside) != before:
        raise CorruptArtifactError(
            f"{path} was changed while it was checked: expected the same file before and after. Try again."
        )
    try:
        answer = msgspec.convert(found, _Answer)
    except msgspec.ValidationError as error:  # the child has parsed what anybody wrote: its word is data from outside
        raise RefusedArtifactError(
            f"Checking {path.name} failed: its process gave another answer than was asked for ({error}). Export the "
            "model again, from a source you trust."
        ) from error
    return Admission(path, answer.facts, (*CHECKED, *([RAN] if answer.run else [])), answer.run)


def admission_task(path: str, runs: bool) -> dict[str, Any]:
    """`admit_onnx` for the child: the facts, and what the run gave."""
    facts = check_graph(Path(path))
    run = _first_run(Path(path)) if runs and NO_ORT not in facts.types else None
    return {"facts": msgspec.to_builtins(facts), "run": msgspec.to_builtins(run)}


def _first_run(path: Path) -> FirstRun:
    """The smallest batch that the file takes. Too little memory is the file's doing: the child holds nothing else."""
    import numpy as np

    from cnx_deploy.runners.ort_session import RUN_ERRORS, ends_of, open_session

    try:
        session = open_session(path)
        source, _ = ends_of(session, path)
        shape = (source.shape[0] if isinstance(source.shape[0], int) else 1, *source.shape[1:])
        kind = np.uint8 if source.type == "tensor(uint8)" else np.float32
        (logits,) = session.run(None, {source.name: np.zeros(shape, kind)})
    except OutOfMemoryError as error:
        raise RefusedArtifactError(f"{path} is refused: {error}") from error
    except RUN_ERRORS as error:
        raise CorruptArtifactError(f"ONNX Runtime cannot run {path} ({error}). Export it again.") from error
    return FirstRun(shape, tuple(logits.shape), bool(np.isfinite(logits).all()))


def _identities(path: Path, outside: tuple[Path, ...]) -> list[tuple[int, ...]]:
    """Which files they are and when they were last changed: what a look at their names again has to find."""
    found = (file.stat() for file in (path, *outside))
    return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns, each.st_ctime_ns) for each in found]


def _limits_for(identities: list[tuple[int, ...]]) -> Limits:
    """Several times what any export here took; at most half the machine's memory."""
    size = sum(min(identity[2], OnnxLimits().tensor_bytes) for identity in identities)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 16 << 30
    return Limits(SECONDS + size / BYTES_A_SECOND, min(MEMORY_BYTES + MEMORY_PER_BYTE * size, machine // 2))
