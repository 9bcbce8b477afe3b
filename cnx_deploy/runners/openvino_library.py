"""OpenVINO without torch and without its telemetry: how it is imported, its one Core, what it computes in here."""

import functools
import importlib
import sys
from collections.abc import Collection
from typing import Any

from cnx_deploy.core.errors import MissingRequirementError

__all__ = ["MISSING", "capabilities", "load_openvino", "openvino_core"]

TELEMETRY = "openvino_telemetry"
MISSING = 'OpenVINO is not installed: pip install "cnx-deploy[openvino]".'


def load_openvino() -> Any:
    """Import OpenVINO without its telemetry; MissingRequirementError where it is not installed.

    `import openvino` alone writes an identity into ~/intel and sends an event to Google. Where its package for that
    cannot be imported it takes a stub of its own, so it is hidden meanwhile.
    """
    if sys.modules.get("openvino") is not None:
        return sys.modules["openvino"]
    known = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == TELEMETRY}
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise MissingRequirementError(MISSING) from error
    finally:
        del sys.modules[TELEMETRY]
        sys.modules.update(known)


@functools.cache
def openvino_core() -> Any:
    """Return the one Core of this process, which is never given up; MissingRequirementError without OpenVINO.

    A Core's CPU plugin replaces the thread's alternate signal stack by one of its own. With its end it puts back the
    one that it found and unmaps its own. Of two Cores that end in the order in which they began, the second so puts
    back the stack that the first has unmapped, and the next signal, such as Ctrl-C or a child's end, ends the process
    by SIGSEGV (seen with OpenVINO 2026.4.1 on a processor with AVX-512).
    """
    return load_openvino().Core()


def capabilities() -> Collection[str]:
    """Return the types that OpenVINO computes in on this processor, such as FP32 and BF16.

    Raises MissingRequirementError where it is not installed.
    """
    found: list[str] = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return found
