"""Was it memory that ran short? Told from what Python, the system's loader and native libraries raise.

Each has words of its own for it, found by running commands at falling limits of addresses (`ulimit -v`). What ends the
process at once cannot be told here: glibc's loader (code 127), OpenBLAS (1) and a C++ library's abort (SIGABRT) each
leave a line of their own.
"""

import errno
import re
import sys
from collections.abc import Iterator

from cnx_deploy.core.errors import ArtifactError, InputError, OutOfMemoryError

__all__ = ["memory_shortage", "native_errors"]

WORDS = re.compile(
    r"bad_alloc|bad allocation|(?:can(?:not|'t)|failed to|unable to) allocate|not enough memory|out of memory|"
    r"failed to map segment from shared object|could not create a primitive|can't start new thread|"
    r"Failed to serialize proto|Errno 12\b",
    re.IGNORECASE,
)
"""PyTorch, ONNX Runtime and C++; numpy; the loader; oneDNN; threads; protobuf, which has one text for all (ours stay
below 2 GiB, its other reason)."""

LOADED_LATER = {
    "google.protobuf.message": ("Error",),
    "onnxruntime.capi.onnxruntime_pybind11_state": ("Fail", "RuntimeException"),
}
"""Errors that derive from Exception alone, of packages that are not imported for their sake."""


def native_errors() -> tuple[type[BaseException], ...]:
    """The types among which `memory_shortage` finds one; most errors of these types are something else."""
    later = (
        getattr(sys.modules[module], name, None)
        for module, names in LOADED_LATER.items()
        if module in sys.modules
        for name in names
    )
    return (MemoryError, ImportError, OSError, RuntimeError, SystemError, *(each for each in later if each))


def memory_shortage(error: BaseException) -> OutOfMemoryError | None:
    """The error to tell a user where memory ran short, None where something else was wrong.

    What was blamed on a file or on the request stays: a file that claims more than there is runs short as well.
    """
    if isinstance(error, ArtifactError | InputError):
        return None
    first = next((each for each in _chain(error) if _is_shortage(each)), None)
    if first is None:
        return None
    lines = str(first).strip().splitlines()
    said = f"{type(first).__name__}: {lines[-1][:200]}" if lines else type(first).__name__
    return OutOfMemoryError(
        f"There is not enough memory ({said}){_limit()}: expected more. What was there before is kept; free some, "
        "raise the limit, or take a smaller batch, image size or variant."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, each once: a chain can be a ring."""
    seen: list[BaseException] = []
    now: BaseException | None = error
    while now is not None and now not in seen:
        seen.append(now)
        yield now
        now = now.__cause__ or now.__context__


def _is_shortage(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, native_errors()) and WORDS.search(str(error)) is not None


def _limit() -> str:
    """What this process may have, where that is limited."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return ""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return "" if soft == resource.RLIM_INFINITY else f", and this process may have {soft / 1e6:,.0f} MB (ulimit -v)"
