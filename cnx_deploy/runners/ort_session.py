"""ONNX Runtime's sessions without torch: how one is made, what it takes and gives, what it raises.

For the runner, and for children that must start at once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import (
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    OutOfMemoryError,
    RefusedArtifactError,
)
from cnx_deploy.core.out_of_memory import out_of_memory_error

if TYPE_CHECKING:
    from cnx_deploy.data.input_spec import InputSpec

__all__ = ["LOAD_ERRORS", "OUTPUT_TYPES", "ends_of", "open_session", "trial_run", "trial_run_task"]

PROVIDERS = {
    "cpu": ("CPUExecutionProvider", {}),
    # HEURISTIC: the default search can land in fallback kernels, 48 times slower (PaddlePaddle/PaddleOCR issue 17970).
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}),
}

OUTPUT_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
"""Types of outputs that are taken: values, and indices of classes."""

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


def open_session(
    path: Path, *, device: str = "cpu", threads: int = 1, spin: bool = False, optimise: bool = True
) -> Any:
    """A session; `runners.onnxruntime.OrtRunner` explains the options.

    Raises CorruptArtifactError where ONNX Runtime takes the file for none, OutOfMemoryError where memory ran short,
    MissingRequirementError for another provider than the device's.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Fused with what is around them, Q and DQ are computed otherwise than the file says, and FP8 not at all.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    provider, provider_options = PROVIDERS[device]
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[(provider, provider_options)])
    except (*LOAD_ERRORS, ValueError) as error:
        if (short := out_of_memory_error(error)) is not None:
            raise short from error
        raise CorruptArtifactError(f"ONNX Runtime cannot read {path} ({error}). Export it again.") from error
    if session.get_providers()[0] != provider:
        raise MissingRequirementError(
            f"ONNX Runtime gave {session.get_providers()[0]} where {provider} was asked for. "
            "Install onnxruntime-gpu alone and a matching CUDA, or use --device cpu; `cnx-deploy doctor` says more."
        )
    return session


def ends_of(session: Any, path: Path) -> tuple[Any, "InputSpec", list[Any]]:
    """The one input, what it takes, and the outputs; InputError unless those are images and float tensors of them."""
    from cnx_deploy.data.input_spec import InputSpec  # with it torch, which a child that is given its inputs spares

    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) == 1 and outputs:
        (source,) = inputs
        kind = {"tensor(float)": "float", "tensor(uint8)": "uint8"}.get(source.type)
        gives = [
            target.type in OUTPUT_TYPES and target.shape and all(isinstance(side, int) for side in target.shape[1:])
            for target in outputs
        ]
        described = session.get_modelmeta().custom_metadata_map
        sizes = described.get("cnx_deploy.image_size")
        if kind == "float" and described.get("cnx_deploy.input") == "normalised":
            kind = "normalised"
        if (
            all(gives)
            and kind is not None
            and (spec := InputSpec.in_graph(kind, source.shape, sizes=sizes)) is not None
        ):
            return source, spec, outputs
    declared = [", ".join(f"{each.name} {each.type} {each.shape}" for each in ends) for ends in (inputs, outputs)]
    raise InputError(
        f"{path} takes {declared[0] or 'nothing'} and gives {declared[1]}; expected one batch of images, float "
        "(N, C, H, W) or uint8 (N, H, W, C) of at most 16 channels, and float outputs (N, …) of fixed sizes, such as "
        "the logits of a classifier. Export a network with cnx-deploy export."
    )


def trial_run(path: Path, limits: Limits, inputs: Mapping[str, tuple[str, Sequence[int]]] | None = None) -> None:
    """Send one image of zeros through a foreign file in a child process, on the CPU.

    `inputs`: zeros of these element types (as numpy calls them) and shapes instead, for a file of any inputs.

    A size that is computed on the way stands in no shape, so only a run sets off such a bomb. The file has passed
    `graph_checks.admit_onnx`, and is not BF16, which ONNX Runtime's CPU provider lacks.

    Raises:
        RefusedArtifactError: the child was ended by a limit or a signal, or ran out of memory.
        CorruptArtifactError: ONNX Runtime cannot load or run the file.
        InputError: the file does not take images or gives no float outputs.
    """
    run_isolated(
        "cnx_deploy.runners.ort_session:trial_run_task",
        {"path": str(path.parent.resolve() / path.name), "inputs": inputs and dict(inputs)},
        limits,
        what=f"A trial run of {path.name}",
        failure=RefusedArtifactError,
    )


def trial_run_task(path: str, inputs: Mapping[str, tuple[str, Sequence[int]]] | None = None) -> None:
    """`trial_run` for the child. Too little memory is the file's doing: the child holds nothing else."""
    try:
        session = open_session(Path(path))
        if inputs is None:
            source, spec, _ = ends_of(session, Path(path))
            shape = spec.shape(source.shape[0] if isinstance(source.shape[0], int) else 1)
            inputs = {source.name: ("uint8" if source.type == "tensor(uint8)" else "float32", shape)}
        session.run(None, {name: np.zeros(shape, kind) for name, (kind, shape) in inputs.items()})
    except OutOfMemoryError as error:
        raise RefusedArtifactError(f"{path} is refused: {error}") from error
    except (*LOAD_ERRORS, STATE.InvalidArgument) as error:
        if out_of_memory_error(error) is not None:
            raise RefusedArtifactError(f"{path} is refused: one image takes too much memory ({error}).") from error
        raise CorruptArtifactError(f"ONNX Runtime cannot run {path} ({error}). Export it again.") from error
