"""ONNX Runtime's sessions and exceptions, without torch: for the runner and for children that must start at once."""

from pathlib import Path
from typing import Any

import onnxruntime

from cnx_deploy.errors import CorruptArtifactError

__all__ = ["LOAD_ERRORS", "RUN_ERRORS", "cpu_session"]

STATE = onnxruntime.capi.onnxruntime_pybind11_state

LOAD_ERRORS = tuple(
    getattr(STATE, name)
    for name in (
        "EPFail",
        "Fail",
        "InvalidGraph",
        "InvalidProtobuf",
        "NoSuchFile",
        "NotImplemented",
        "RuntimeException",
    )
)
"""ONNX Runtime's exceptions have no common base of their own."""

RUN_ERRORS = (*LOAD_ERRORS, STATE.InvalidArgument)


def cpu_session(path: Path) -> Any:
    """A session of one thread on the CPU. Raises CorruptArtifactError where ONNX Runtime takes the file for none."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (*LOAD_ERRORS, ValueError) as error:
        raise CorruptArtifactError(f"ONNX Runtime cannot read {path} ({error}). Export it again.") from error
