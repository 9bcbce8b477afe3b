"""An ONNX file as onnx_ir's model; every way in which it cannot be one is one error."""

from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx_ir.serde import SerdeError

from cnx_deploy.core.errors import CorruptArtifactError

__all__ = ["load_model"]


def load_model(path: Path) -> ir.Model:
    """Read a model; weights outside the file are read when they are asked for. CorruptArtifactError for no model."""
    try:
        return ir.load(path)
    except (DecodeError, SerdeError, ValueError) as error:
        raise CorruptArtifactError(f"{path} is not an ONNX model ({error}). Export it again.") from error
