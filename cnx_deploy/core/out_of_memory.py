"""Too little memory, whoever noticed it, as one error.

What ends the process at once cannot be told here: the loader (code 127), OpenBLAS (1) and a C++ library's abort
(SIGABRT) each leave a line of their own.
"""

import re

from cnx_deploy.core.errors import CnxDeployError, OutOfMemoryError

__all__ = ["out_of_memory_error"]

# PyTorch, ONNX Runtime and C++; numpy; the system; its loader; oneDNN; threads; protobuf, which has one text for all;
# Python, where there was no memory left to say so.
WORDS = re.compile(
    r"bad_alloc|(?:can(?:not|'t)|failed to|unable to) allocate|not enough memory|out of memory|failed to map segment|"
    r"could not create a primitive|can't start new thread|Failed to serialize proto|NULL without setting an exception",
    re.IGNORECASE,
)


def out_of_memory_error(error: BaseException) -> OutOfMemoryError | None:
    """Return the error to tell a user where memory ran short, None where something else was wrong."""
    if isinstance(error, CnxDeployError) or not (isinstance(error, MemoryError) or WORDS.search(str(error))):
        return None
    said = (str(error).strip().splitlines() or [""])[-1][:200]
    return OutOfMemoryError(
        f"There is not enough memory ({type(error).__name__}{said and ': '}{said}): what was there before is kept. "
        "Free some, or take a smaller batch, image size or variant."
    )
