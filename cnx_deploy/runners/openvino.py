"""OpenVINO runner: ONNX files on a CPU, in FP32 or, where the processor computes it, in BF16.

OpenVINO chooses the arithmetic by itself: on a processor with BF16 it computes FP32 files in BF16 unless it is told
otherwise. So each runner asks for its type and refuses a compilation that computes in another. Shapes are fixed before
a compilation, since fixed ones run up to 1.3 times as fast as an open batch.
"""

import importlib.util
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cnx_deploy.core.eight_bits import PLACEMENTS
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.out_of_memory import out_of_memory_error
from cnx_deploy.core.system import Machine, cpu_count, cpu_name, package_version
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.exporters.untrusted import check_recorded
from cnx_deploy.model.tasks.base import Outputs
from cnx_deploy.runners.base import HoldsNothing, RunnerInfo
from cnx_deploy.runners.openvino_library import MISSING, capabilities, load_openvino, openvino_core
from cnx_deploy.runners.registry import RunnerEntry, RunnerOptions, register_runner

__all__ = ["Arithmetic", "OpenVinoRunner"]

Arithmetic = Literal["fp32", "bf16"]

HINTS: dict[Arithmetic, str] = {"fp32": "f32", "bf16": "bf16"}
"""OpenVINO's names of the types that are asked for."""
NARROW = frozenset({"bf16", "f16"})
"""Types that no part of an FP32 compilation may compute in, as OpenVINO names them."""
RUNNERS: dict[str, Arithmetic] = {"openvino": "fp32", "openvino-bf16": "bf16"}
NO_LAYERS = frozenset({"Const", "Input", "Output"})
"""What OpenVINO's list of executed layers has besides."""
INPUT_KINDS = {"f32": "float", "u8": "uint8"}
OUTPUT_TYPES = {"f32": torch.float32, "i64": torch.int64}
"""Types of outputs that are taken: values, and indices of classes."""


class OpenVinoRunner(HoldsNothing):
    """Run an ONNX file in OpenVINO on the CPU; see `runners.base.Runner`.

    Args:
        path: a file whose hash or graph has been checked.
        arithmetic: what it computes in, whatever type the file's tensors are stored in.
        threads: None for all processors this process may use, of which OpenVINO takes no more than there are.
        thread_per_image: give each thread images of its own, as `onnxruntime.OrtRunner` explains. It takes a second
            compilation, with its own copy of the weights.
        fixed_shapes: compile for each batch size when it first comes; the last one is kept. False leaves the batch
            open, as OpenVINO runs a file by itself. Files of open height and width are compiled once in any case, and
            so are those that look up rows by computed indices, as detection does: with a fixed batch of one OpenVINO
            2026.4 reads other rows.
    """

    def __init__(
        self,
        path: Path,
        *,
        arithmetic: Arithmetic = "fp32",
        threads: int | None = None,
        thread_per_image: bool = False,
        fixed_shapes: bool = True,
    ) -> None:
        self._path, self._arithmetic, self._threads = path, arithmetic, threads or cpu_count()
        self._core = openvino_core()
        self._model, described = _read(self._core, path)
        self.input_spec, self._outputs = _ends(self._model, described, path)
        self.device = torch.device("cpu")
        looks_up = _looks_up(self._model)
        if looks_up and self.input_spec.max_batch == 1:
            raise InputError(
                f"{path} has a fixed batch of one and looks up rows by indices that it computes: OpenVINO 2026.4 reads "
                "other rows then. Export it with an open batch, such as --batch 1:1:2, or choose onnxruntime."
            )
        self._is_fixed = fixed_shapes and self.input_spec.size_range is None and not looks_up
        self._one_call = threading.Lock()
        self._kept: tuple[int, Any] | None = None
        compiled = self._compiled(self.input_spec.min_batch)
        self._kept = self.input_spec.min_batch, compiled.create_infer_request()
        self._each: list[Any] = []
        if thread_per_image and self._threads > 1 and self._is_fixed and self.input_spec.min_batch <= 1:
            shared = self._compiled(1, streams=self._threads)
            self._each = [shared.create_infer_request() for _ in range(self._threads)]
        counts = Counter(_layer_types(compiled))
        self.info = RunnerInfo(
            backend="openvino",
            version=str(package_version("openvino")),
            device=cpu_name(),
            precision=described.get("cnx_deploy.precision", "unknown"),
            arithmetic="int8" if "i8" in counts else arithmetic,  # where the file has it
            details=(
                ("threads", str(compiled.get_property("INFERENCE_NUM_THREADS"))),
                ("layers", ", ".join(f"{count} in {name}" for name, count in counts.most_common())),
                ("shapes", "fixed for each batch" if self._is_fixed else "open"),
                ("a thread has", "images of its own" if self._each else "a share of each operator"),
            ),
        )

    def run(self, images: Tensor) -> Outputs:
        """Raw images -> the graph's outputs, (N, ...) float32 each, indices int64."""
        check_input(images, self.input_spec)
        images = images.contiguous()
        outputs = {
            name: torch.empty((len(images), *sizes), dtype=dtype) for name, (sizes, dtype) in self._outputs.items()
        }
        alone = len(images) // len(self._each) * len(self._each) if self._each else 0
        size = 1 if self._each else len(images)
        with self._one_call:
            try:
                self._run_alone(images[:alone], outputs)
                for first in range(alone, len(images), size):
                    request = self._request(size)
                    # The name keeps the bound memory alive.
                    bound = self._bound(request, images, outputs, slice(first, first + size))
                    request.infer()
                    del bound
            except RuntimeError as error:
                if (short := out_of_memory_error(error)) is not None:
                    raise short from error
                raise CnxDeployError(
                    f"OpenVINO cannot run {self._path} on a batch of {len(images)} ({_said(error)}). "
                    "A smaller batch may fit into memory."
                ) from error
        return outputs

    def _run_alone(self, images: Tensor, outputs: Outputs) -> None:
        """Run images one by one, each thread its own; as many as are a multiple of the threads."""
        bound: list[Any] = [None] * len(self._each)
        try:
            for index in range(len(images)):
                at = index % len(self._each)
                if bound[at] is not None:
                    self._each[at].wait()
                bound[at] = self._bound(self._each[at], images, outputs, slice(index, index + 1))
                self._each[at].start_async()
        finally:  # until then the requests write into `outputs`
            for request, tensors in zip(self._each, bound, strict=True):
                if tensors is not None:
                    request.wait()

    def _bound(self, request: Any, images: Tensor, outputs: Outputs, rows: slice) -> list[Any]:
        """Let a request read and write some rows in place; the tensors have to be kept until it is done."""
        tensor = load_openvino().Tensor
        tensors = [tensor(images[rows].numpy(), shared_memory=True)]
        request.set_input_tensor(0, tensors[0])
        for at, name in enumerate(self._outputs):
            tensors.append(tensor(outputs[name][rows].numpy(), shared_memory=True))
            request.set_output_tensor(at, tensors[-1])
        return tensors

    def _request(self, batch: int) -> Any:
        """A request of all threads, compiled anew where shapes are fixed and another batch came before."""
        if self._kept is None or (self._is_fixed and self._kept[0] != batch):
            self._kept = None  # its memory is needed
            self._kept = batch, self._compiled(batch).create_infer_request()
        return self._kept[1]

    def _compiled(self, batch: int, streams: int = 1) -> Any:
        """Compile for a batch; `streams`: so many requests at a time, each on its share of the threads.

        Raises MissingRequirementError where OpenVINO computes in another type than it was asked for.
        """
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[self._arithmetic],
            "INFERENCE_NUM_THREADS": self._threads,
            "NUM_STREAMS": streams,
            "ENABLE_CPU_PINNING": False,  # two processes would pin their threads to the same processors
        }
        try:
            if self._is_fixed:
                self._model.reshape({0: list(self.input_spec.shape(batch))})
            compiled = self._core.compile_model(self._model, "CPU", settings)
        except RuntimeError as error:
            if (short := out_of_memory_error(error)) is not None:
                raise short from error
            raise CorruptArtifactError(f"OpenVINO cannot compile {self._path} ({_said(error)}).") from error
        promised = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        narrow = sorted(NARROW & set(_layer_types(compiled))) if self._arithmetic == "fp32" else []
        if promised != HINTS[self._arithmetic] or narrow:
            raise MissingRequirementError(
                f"OpenVINO computes {self._path.name} in {', '.join(narrow) or promised} on this processor, where "
                f"{HINTS[self._arithmetic]} was asked for. Use another backend, such as onnxruntime."
            )
        return compiled


def _read(core: Any, path: Path) -> tuple[Any, dict[str, str]]:
    """The model of a file, and the file's metadata."""
    try:
        model = core.read_model(str(path))
    except RuntimeError as error:
        if (short := out_of_memory_error(error)) is not None:
            raise short from error
        raise CorruptArtifactError(f"OpenVINO cannot read {path} ({_said(error)}). Export it again.") from error
    keeps = model.has_rt_info(["framework"])
    return model, dict(model.get_rt_info(["framework"]).value) if keeps else {}


def _ends(
    model: Any, described: Mapping[str, str], path: Path
) -> tuple[InputSpec, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """What the one input takes; each output's sizes after the batch and its type. InputError for any other model."""
    inputs, outputs = model.inputs, {_name_of(output): output for output in model.outputs}
    given = {
        name: (_sizes(output)[1:], OUTPUT_TYPES.get(output.get_element_type().to_string()))
        for name, output in outputs.items()
    }
    if len(inputs) == 1 and outputs:
        kind = INPUT_KINDS.get(inputs[0].get_element_type().to_string())
        if kind == "float" and described.get("cnx_deploy.input") == "normalised":
            kind = "normalised"
        fitting = {
            name: (tuple(size for size in sizes if size is not None), dtype)
            for name, (sizes, dtype) in given.items()
            if dtype is not None and None not in sizes
        }
        shape = _sizes(inputs[0])
        spec = kind and InputSpec.in_graph(kind, shape, sizes=described.get("cnx_deploy.image_size"))
        if spec and len(fitting) == len(model.outputs):
            return spec.limited_to(shape[0], described.get("cnx_deploy.batch"), path), fitting
    declared = [
        ", ".join(f"{_name_of(end)} {end.get_element_type().to_string()} {end.partial_shape}" for end in ends)
        for ends in (inputs, model.outputs)
    ]
    raise InputError(
        f"{path} takes {declared[0] or 'nothing'} and gives {declared[1]}; expected one batch of images, float "
        "(N, C, H, W) or uint8 (N, H, W, C) of at most 16 channels, and float outputs (N, …) of fixed sizes. Export a "
        "network with cnx-deploy export."
    )


def _name_of(end: Any) -> str:
    """The name of an input or output in the file; a tensor that several nodes pass on has all their names."""
    called = str(end.node.get_friendly_name()).removesuffix("/sink_port_0")
    names = end.get_names()
    return called if called in names or not names else min(names)


def _looks_up(model: Any) -> bool:
    """Whether the graph reads rows of a tensor by indices that it computes from the images, not from shapes alone."""
    waiting = [node.input_value(1).get_node() for node in model.get_ops() if node.get_type_name().startswith("Gather")]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return True
        if node.get_type_name() != "ShapeOf" and node.get_name() not in seen:
            seen.add(node.get_name())
            waiting.extend(value.get_node() for value in node.input_values())
    return False


def _sizes(end: Any) -> list[int | None]:
    """The sizes of an input or output, None for open ones."""
    return [size.get_length() if size.is_static else None for size in end.partial_shape]


def _layer_types(compiled: Any) -> Iterator[str]:
    """The type in which each layer of a compilation computes, as OpenVINO names it; constants are none."""
    for layer in compiled.get_runtime_model().get_ops():
        told = layer.get_rt_info()
        if told["layerType"].value not in NO_LAYERS:
            yield str(told["runtimePrecision"].value)


def _said(error: RuntimeError) -> str:
    """The last line of what OpenVINO says: before it are places in its sources."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:300]


def _reason(arithmetic: Arithmetic, artifact: Artifact, machine: Machine) -> CnxDeployError | None:
    name, row = artifact.path.name, artifact.manifest.precision
    if arithmetic == "bf16" and row.dtype != "bfloat16":
        return InputError(
            f"{name} is {row.name.upper()}: openvino-bf16 computes BF16 files, which are judged as such. Export it "
            "with --precision bf16 --optimize-for openvino, or choose openvino."
        )
    if row.placement is not None and "fp8" in PLACEMENTS[row.placement].types.values():
        return InputError(
            f"{name} is {row.name.upper()}: OpenVINO 2026.4 runs no float8 on a CPU. Choose onnxruntime, or export it "
            "with --precision int8."
        )
    if machine.device != "cpu":
        return InputError(f"OpenVINO runs files on the CPU here, not on {machine.device}. Leave --device out.")
    if importlib.util.find_spec("openvino") is None:
        return MissingRequirementError(MISSING)
    if arithmetic == "fp32" and row.dtype == "bfloat16" and "BF16" in capabilities():
        return InputError(
            f"{name} is BF16, and OpenVINO computes such files in BF16 on this processor ({cpu_name()}), whatever it "
            "is asked for. Choose openvino-bf16, or onnxruntime, which computes in FP32."
        )
    if arithmetic == "bf16" and "BF16" not in capabilities():
        return MissingRequirementError(
            f"OpenVINO computes no BF16 on this processor ({cpu_name()}), which lacks AMX and AVX512-BF16. The backend "
            f"openvino runs {name} in FP32; emulate-bf16 shows what BF16 does to it."
        )
    return None


def _opened(arithmetic: Arithmetic, artifact: Artifact, options: RunnerOptions) -> OpenVinoRunner:
    check_recorded(artifact)
    return OpenVinoRunner(
        artifact.path, arithmetic=arithmetic, threads=options.threads, thread_per_image=options.thread_per_image
    )


for _name, _arithmetic in RUNNERS.items():
    register_runner(
        RunnerEntry(
            name=_name,
            kinds=("onnx",),
            can_run=partial(_reason, _arithmetic),
            open=partial(_opened, _arithmetic),
            widens_half=_arithmetic == "fp32",
        )
    )
