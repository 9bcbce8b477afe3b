"""Native steps in a process of their own: one that crashes, hangs or eats the memory becomes an error message here.

The child gets its task as JSON and answers with JSON in a file, so that nothing of what it says is ever executed. It
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core import errors
from cnx_deploy.core.errors import CnxDeployError
from cnx_deploy.core.out_of_memory import memory_shortage, native_errors

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


def run_isolated(
    task: str,
    arguments: Mapping[str, Any],
    limits: Limits,
    *,
    what: str,
    failure: type[CnxDeployError],
    tick: Callable[[float], None] | None = None,
) -> Any:
    """Run `task`, "module:function", in a child and return its answer; arguments and answer are what JSON can hold.

    `what` names the work in messages: "Building a.onnx". `tick` is told the seconds so far. Raises the child's own
    error as it was raised there, OSError where the system refused it something, and `failure` where it was ended by a
    signal or a limit, or gave no answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        order = json.dumps({"task": task, "arguments": dict(arguments), "answer": str(answer)})
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "cnx_deploy.core.child_process"],  # -P: nothing from the folder it runs in
                stdin=subprocess.PIPE, stdout=stream, stderr=stream,
                start_new_session=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        try:
            reason = _watched(child, order.encode(), limits, log, tick)
        finally:
            _end(child)
        found = _answer_in(answer) if reason is None else None
        if found is None:
            raise failure(
                f"{what} failed: its process {reason or _end_of(child.returncode)}, expected an answer. Nothing was "
                f"written; free memory or look at the file, and try again.{_tail(log)}"
            )
    if "result" in found:
        return found["result"]
    if "system" in found:
        raise OSError(*found["system"])
    raise _error_of(found)


def main() -> None:
    """The child: read the order, do it, write the answer whole."""
    order = json.loads(sys.stdin.buffer.read())
    module, _, function = order["task"].partition(":")
    try:
        found = {"result": getattr(importlib.import_module(module), function)(**order["arguments"])}
    except CnxDeployError as error:
        found = {"error": type(error).__name__, "message": str(error)}
    except native_errors() as error:
        found = _answer_for(error)
    answer = Path(order["answer"])
    staged = answer.with_suffix(".tmp")
    staged.write_text(json.dumps(found), encoding="utf-8")
    staged.replace(answer)


def _answer_for(error: BaseException) -> dict[str, Any]:
    """Too little memory, or what the system refused: the parent says of a full disk what every stage says."""
    short = memory_shortage(error)
    if short is not None:
        return {"error": type(short).__name__, "message": str(short)}
    if isinstance(error, OSError) and error.errno is not None:
        return {"system": [error.errno, error.strerror]}
    raise error


def _watched(
    child: "subprocess.Popen[bytes]", order: bytes, limits: Limits, log: Path, tick: Callable[[float], None] | None
) -> str | None:
    """Wait for the child; why it was ended, or None where it ended by itself."""
    started = time.monotonic()
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError), child.stdin:
            child.stdin.write(order)
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


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End it and what it started: its session is a group of its own."""
    kill_group = getattr(os, "killpg", None)  # Windows has none
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if kill_group is not None:
            kill_group(child.pid, signal.SIGKILL)
        child.kill()
    child.wait()


def _answer_in(path: Path) -> dict[str, Any] | None:
    """What `main` wrote. Whatever else is there counts as nothing: the library may have had hold of the child."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_ANSWER_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and _is_answer(found) else None


def _is_answer(found: Mapping[str, Any]) -> bool:
    """A result, an error of ours and its message, or the number and words of what the system refused."""
    if "result" in found:
        return True
    texts = [found.get(name) for name in ("error", "message")]
    match found.get("system"):
        case [int(), str()]:
            return True
    return all(isinstance(text, str) for text in texts)


def _end_of(code: int) -> str:
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"was ended by {names.get(-code, f'signal {-code}')}"
    return f"ended with code {code} and said nothing"


def _error_of(found: Mapping[str, Any]) -> CnxDeployError:
    kind = getattr(errors, str(found["error"]), CnxDeployError)
    known = isinstance(kind, type) and issubclass(kind, CnxDeployError)
    return (kind if known else CnxDeployError)(str(found.get("message")))


def _tail(log: Path) -> str:
    """The last lines that the child printed: where a native library says why it gave up."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - QUOTED_BYTES))
        lines = stream.read(QUOTED_BYTES).decode("utf-8", "replace").strip().splitlines()[-4:]
    return " It printed last:\n  " + "\n  ".join(lines) if lines else ""


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGKILL)


if __name__ == "__main__":
    _die_with_parent()
    main()
