"""What can go wrong, and the exit code each kind of failure has.

::

    CnxDeployError                   1  the pipeline could not do it
    ├── ExportError                  1  PyTorch could not be turned into ONNX
    ├── BuildError                   1  TensorRT made no engine
    ├── TrainingError                1  training cannot go on
    ├── DiskFullError                1  there is no room for a file
    ├── OutOfMemoryError             1  there is not enough memory
    ├── InputError                   2  wrong usage or input
    │   ├── CheckpointError          2  weights do not fit the model
    │   └── OutputExistsError        2  something else is already at the output path
    ├── CheckFailedError             3  it ran, and a check failed
    │   ├── GraphCheckError          3  a written graph breaks a rule
    │   ├── ParityError              3  outputs differ from the reference
    │   └── RecordsError             3  records are out of date
    ├── ArtifactError                4  an artifact cannot be used
    │   ├── CorruptArtifactError     4  its bytes are not what its manifest says
    │   └── RefusedArtifactError     4  it is refused for safety
    └── MissingRequirementError      5  this machine lacks a GPU, driver, package or version

A message says what was found, what was expected and what to do.
"""

__all__ = [
    "ArtifactError",
    "BuildError",
    "CheckFailedError",
    "CheckpointError",
    "CnxDeployError",
    "CorruptArtifactError",
    "DiskFullError",
    "ExportError",
    "GraphCheckError",
    "InputError",
    "MissingRequirementError",
    "OutOfMemoryError",
    "OutputExistsError",
    "ParityError",
    "RecordsError",
    "RefusedArtifactError",
    "TrainingError",
]


class CnxDeployError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 1


class ExportError(CnxDeployError):
    """PyTorch could not be turned into ONNX."""


class BuildError(CnxDeployError):
    """TensorRT made no engine, or one that must not be used."""


class TrainingError(CnxDeployError):
    """Training cannot start or go on."""


class DiskFullError(CnxDeployError):
    """There is, or will be, no room for a file that is to be written."""


class OutOfMemoryError(CnxDeployError):
    """There is not enough memory for what was asked for."""


class InputError(CnxDeployError):
    """The caller asked for something that does not exist or does not fit."""

    exit_code = 2


class CheckpointError(InputError):
    """The weights in a checkpoint do not fit the model."""


class OutputExistsError(InputError):
    """The output path holds something that other inputs made."""


class CheckFailedError(CnxDeployError):
    """The work was done and a check of its result failed."""

    exit_code = 3


class GraphCheckError(CheckFailedError):
    """A written ONNX graph breaks one of the project's rules."""


class ParityError(CheckFailedError):
    """Outputs differ from the reference by more than the gate allows."""


class RecordsError(CheckFailedError):
    """Generated records or tables are not what the manifests say."""


class ArtifactError(CnxDeployError):
    """An artifact cannot be used."""

    exit_code = 4


class CorruptArtifactError(ArtifactError):
    """A file's bytes are not what they should be."""


class RefusedArtifactError(ArtifactError):
    """A file is refused because loading it could run foreign code."""


class MissingRequirementError(CnxDeployError):
    """This machine lacks what the request takes."""

    exit_code = 5
