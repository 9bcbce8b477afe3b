"""Native steps in a process of their own: one that crashes, hangs or eats the memory becomes an error message here.

The child finds its task in a file as JSON and writes its answer beside it, so that nothing it says is ever executed. It
leads a session of its own, so that Ctrl-C reaches it through us alone; on Linux it dies with us.
"""

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cnx_deploy.core import errors
from cnx_deploy.core.errors import CnxDeployError
from cnx_deploy.core.out_of_memory import out_of_memory_error
from cnx_deploy.core.strict_json import bounded_content, typed

__all__ = ["Limits", "run_isolated"]

LOOK_SECONDS = 0.05
MAX_LOG_BYTES = MAX_ANSWER_BYTES = 64 << 20
"""Of what a child prints, which goes to the disk, and of what it answers; the largest answer seen has 0.1 MB."""

QUOTED_BYTES = 2000
DIES_WITH_PARENT = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use: wall-clock seconds, and bytes of resident memory, looked at twenty times a second."""

    seconds: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class _Answer:
    """The result; or the name and message of an error of ours; or the number and words of what the system refused."""

    result: Any
    error: str
    message: str
    errno: int


def run_isolated(
    task: str,
    arguments: Mapping[str, Any],
    limits: Limits,
    *,
    what: str,
    failure: type[CnxDeployError],
    tick: Callable[[float], None] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run a function in a child process and return its result.

    Args:
        task: The function as "module:function".
        arguments: Its arguments by name. They and the result are what JSON can hold.
        limits: What the child may use.
        what: The work as messages name it, for example "Building a.onnx".
        failure: The error to raise where the child was ended by a signal or a limit, or gave no answer.
        tick: Called twenty times a second with the seconds so far.
        environment: Variables that the child has beside this process's own.

    Raises:
        CnxDeployError: The child's own error as it was raised there, or `failure`.
        OSError: The system refused the child something.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        Path(folder, "order.json").write_text(json.dumps({"task": task, "arguments": dict(arguments)}), "utf-8")
        with log.open("wb") as stream:
            child = subprocess.Popen(
                # -P: the child imports nothing from the folder it is run in.
                [sys.executable, "-P", "-m", "cnx_deploy.core.child_process", folder],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environment or {})},
            )  # fmt: skip
        try:
            reason = _watch(child, limits, log, tick)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # it and what it started: its session is a group of its own
            child.wait()
        answer = None if reason else _answer_in(Path(folder, "answer.json"))
        if answer is None:
            raise failure(
                f"{what} failed: its process {reason or _end_of(child.returncode)}, expected an answer. Nothing was "
                f"written; free memory or look at the file, and try again.{_tail(log)}"
            )
    if answer.errno:
        raise OSError(answer.errno, answer.message)
    if answer.error:
        kind = getattr(errors, answer.error, None)
        raise (kind if isinstance(kind, type) and issubclass(kind, CnxDeployError) else failure)(answer.message)
    return answer.result


def main(folder: Path) -> None:
    """Be the child: read the order, do it, write the answer whole."""
    order = json.loads((folder / "order.json").read_bytes())
    module, _, function = order["task"].partition(":")
    answer = _Answer(None, "", "", 0)
    try:
        answer = replace(answer, result=getattr(importlib.import_module(module), function)(**order["arguments"]))
    except Exception as error:
        told = out_of_memory_error(error) or error
        if isinstance(told, CnxDeployError):
            answer = replace(answer, error=type(told).__name__, message=str(told))
        elif isinstance(told, OSError) and told.errno:
            answer = replace(answer, message=told.strerror or "", errno=told.errno)
        else:
            raise
    (folder / "answer.tmp").write_text(json.dumps(asdict(answer)), encoding="utf-8")
    (folder / "answer.tmp").replace(folder / "answer.json")


def _watch(
    child: "subprocess.Popen[bytes]", limits: Limits, log: Path, tick: Callable[[float], None] | None
) -> str | None:
    """Wait for the child. Return why it has to be ended, or None where it ended by itself."""
    started = time.monotonic()
    while child.poll() is None:
        passed = time.monotonic() - started
        if passed > limits.seconds:
            return f"took more than {limits.seconds:g} s and was ended"
        if _resident_bytes(child.pid) > limits.memory_bytes:
            return f"took more than {limits.memory_bytes / 1e6:,.0f} MB of memory and was ended"
        if log.stat().st_size > MAX_LOG_BYTES:
            return f"printed more than {MAX_LOG_BYTES / 1e6:,.0f} MB and was ended"
        if tick is not None:
            tick(passed)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(LOOK_SECONDS)
    return None


def _resident_bytes(pid: int) -> int:
    """Resident memory; 0 where the system does not say, or the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _answer_in(path: Path) -> _Answer | None:
    """What `main` wrote; None for whatever else is there, as a hostile file may have had hold of the child."""
    try:
        return typed(json.loads(bounded_content(path, MAX_ANSWER_BYTES)), _Answer) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def _end_of(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    ended = f"was ended by {names.get(-code, f'signal {-code}')}"
    return ended if code < 0 else f"ended with code {code} and said nothing"


def _tail(log: Path) -> str:
    """The last lines that the child printed: where a native library says why it gave up."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - QUOTED_BYTES))
        lines = stream.read(QUOTED_BYTES).decode("utf-8", "replace").strip().splitlines()[-4:]
    return " It printed last:\n  " + "\n  ".join(lines) if lines else ""


if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)
    main(Path(sys.argv[1]))
