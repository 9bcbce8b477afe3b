"""Own kernels inside TensorRT: a plugin for kernel nodes, its creator, and the launch by CUDA's driver.

The plugin is of the interface V3ONE, which TensorRT-RTX's ONNX parser imports. The creator is needed wherever an engine
with own kernels is built or run by Python; an engine that carries `launcher/kernel_launcher.cpp` brings its own.
The driver is called through ctypes, in the context that TensorRT runs in.

What happens on a GPU was not run by the machines this project was written on: the launch is tested with a library that
records what the driver would be given.
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnx_deploy.core.errors import BuildError, MissingRequirementError
from cnx_deploy.core.manifest import Launcher
from cnx_deploy.exporters.trt.backend import Backend
from cnx_deploy.exporters.trt.kernel_node import DOMAIN, FIELDS, OPERATOR, PLUGIN_VERSION, KernelNode

__all__ = ["Driver", "make_creator_known", "parser_environment", "prepare_runtime", "register_creator"]

PARSER_LOADS = "libtensorrt_rtx.so"
MOST_STATIC_SHARED_BYTES = 48 << 10
"""A block may use that much shared memory without being asked for; more has to be allowed for each function."""
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of cuda.h."""


class Driver:
    """The calls of CUDA's driver that a launch needs, each answer checked.

    Raises MissingRequirementError where there is no driver, BuildError where a call fails.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise MissingRequirementError(
                f"Launching own kernels needs NVIDIA's driver, and {library} cannot be loaded ({error})."
            ) from error
        self._functions: dict[tuple[int | None, bytes, str], ctypes.c_void_p] = {}

    def load(self, node: KernelNode) -> ctypes.c_void_p:
        """A kernel's function in the current context; blocks with the same kernel share one."""
        context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        key = (context.value, node.image, node.entry)
        if key not in self._functions:
            self._call("cuModuleLoadData", ctypes.byref(module), node.image)
            self._call("cuModuleGetFunction", ctypes.byref(function), module, node.entry.encode("ascii"))
            if node.shared_bytes > MOST_STATIC_SHARED_BYTES:
                self._call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, node.shared_bytes)
            self._functions[key] = function
        return self._functions[key]

    def launch(
        self,
        node: KernelNode,
        function: ctypes.c_void_p,
        shapes: Sequence[Sequence[int]],
        inputs: Sequence[int],
        outputs: Sequence[int],
        stream: int,
    ) -> None:
        """Enqueue the kernel on a stream; `shapes` of the inputs, addresses of inputs and outputs on the GPU."""
        values: list[ctypes.c_void_p | ctypes.c_int32] = []
        for argument in node.arguments:
            if argument.kind == "size":
                values.append(ctypes.c_int32(argument.size.of(shapes)))
            else:
                addresses = {"input": inputs, "output": outputs, "null": (None,)}[argument.kind]
                values.append(ctypes.c_void_p(addresses[argument.index]))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        grid = (size.of(shapes) for size in node.grid)
        # The driver copies the arguments before the call returns.
        self._call(
            "cuLaunchKernel", function, *grid, node.threads, 1, 1, node.shared_bytes, ctypes.c_void_p(stream), pointers,
            None,
        )  # fmt: skip

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            told = (text.value or b"an unknown error").decode()
            raise BuildError(f"CUDA's {name} failed with {told} ({code}). The kernels may be for another GPU.")


@functools.cache
def the_driver() -> Driver:
    """The driver of this machine."""
    return Driver()


@contextlib.contextmanager
def parser_environment() -> Iterator[dict[str, str]]:
    """Environment for a process in which TensorRT-RTX's parser meets kernel nodes.

    It then loads libtensorrt_rtx.so, and ends the process where there is none; the Python package has
    libtensorrt_rtx.so.1 alone. So a link of that name goes on the loader's path, which is read when a process starts.
    """
    package = importlib.util.find_spec("tensorrt_rtx_libs")
    folders = package.submodule_search_locations if package is not None else None
    with tempfile.TemporaryDirectory() as folder:
        for library in (library for place in folders or () for library in Path(place).glob(f"{PARSER_LOADS}.*")):
            (Path(folder) / PARSER_LOADS).symlink_to(library)
        paths = (folder, os.environ.get("LD_LIBRARY_PATH"))
        yield {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def make_creator_known(backend: Backend, launcher: Path | None = None) -> None:
    """Before a file with kernel nodes is parsed: the creator of a launcher's library, or that in Python.

    Raises BuildError where the process has not the environment of `parser_environment`, or the library has no creator.
    """
    try:
        ctypes.CDLL(PARSER_LOADS)
    except OSError as error:
        raise BuildError(
            f"{backend.name}'s parser needs {PARSER_LOADS} for kernel nodes, and it is not on the loader's path "
            f"({error}). Build in a child process, as cnx-deploy build-trt does."
        ) from error
    if launcher is None:
        register_creator(backend)
        return
    registry = backend.trt.get_plugin_registry()
    if registry.load_library(str(launcher)) is None or registry.get_creator(OPERATOR, PLUGIN_VERSION, DOMAIN) is None:
        raise BuildError(
            f"{launcher} has no creator {DOMAIN}::{OPERATOR} of version {PLUGIN_VERSION}: expected a library built "
            "from kernel_launcher.cpp of this version of cnx-deploy, with the headers of this TensorRT-RTX."
        )


def prepare_runtime(backend: Backend, runtime: Any, launcher: Launcher | None) -> None:
    """Before an engine is read: host code is off unless its launcher travels in it, and Python's creator registered.

    `launcher`: that of its own kernels; None for an engine without, or one that was not allowed to bring them.
    """
    runtime.engine_host_code_allowed = launcher == "engine"
    if launcher == "python":
        register_creator(backend)


@functools.cache
def register_creator(backend: Backend) -> Any:
    """Make the creator of kernel nodes known to a TensorRT, which holds no reference to it: the cache keeps it."""
    trt, plugin = backend.trt, _plugin_class(backend)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_version, self.plugin_namespace = OPERATOR, PLUGIN_VERSION, DOMAIN
            empty = np.array([])
            self.field_names = trt.PluginFieldCollection(
                [trt.PluginField(name, empty, _field_type(trt, name)) for name in FIELDS]
            )

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            return plugin(KernelNode.from_fields({field.name: np.array(field.data) for field in fields}))

    creator = Creator()
    if not trt.get_plugin_registry().register_creator(creator, DOMAIN):
        raise BuildError(
            f"{backend.name} {backend.version} refused the creator {DOMAIN}::{OPERATOR}: expected that none of that "
            "name is there. Run one version of cnx-deploy in a process."
        )
    return creator


def _plugin_class(backend: Backend) -> Any:
    """The plugin as a class over a TensorRT's own classes."""
    trt = backend.trt

    class KernelPlugin(
        trt.IPluginV3,  # type: ignore[misc, name-defined]
        trt.IPluginV3OneCore,  # type: ignore[misc, name-defined]
        trt.IPluginV3OneBuild,  # type: ignore[misc, name-defined]
        trt.IPluginV3OneRuntime,  # type: ignore[misc, name-defined]
    ):
        def __init__(self, node: KernelNode) -> None:
            for base in KernelPlugin.__bases__:
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace = OPERATOR, PLUGIN_VERSION, DOMAIN
            self.num_outputs = len(node.outputs)
            self.node, self.fields = node, node.fields()
            self.function: ctypes.c_void_p | None = None
            # TensorRT deletes the C++ object, and a Python object that ends then deletes it again (TensorRT-RTX 1.7.1).
            # A call of get_capability_interface leaves a reference behind that hides this; a clone may be dropped
            # without one, where a build fails. So every plugin lives as long as the process.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Any:
            return KernelPlugin(self.node)

        # --- building ---

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            return None

        def get_output_data_types(self, input_types: Any) -> list[Any]:
            return [getattr(trt.DataType, output.layout.type) for output in self.node.outputs]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, builder: Any) -> list[Any]:
            return [
                trt.DimsExprs([_size_expression(trt, builder, size, inputs) for size in output.shape])
                for output in self.node.outputs
            ]

        def supports_format_combination(self, position: int, tensors: Any, num_inputs: int) -> bool:
            layout, described = self.node.layout_at(position), tensors[position].desc
            # A stream offered as LINEAR is copied before and behind every block: 25.1 MB an image of atto, not 19.5.
            order = trt.TensorFormat.HWC if layout.channels_last else trt.TensorFormat.LINEAR
            return bool(described.format == order and described.type == getattr(trt.DataType, layout.type))

        def get_valid_tactics(self) -> list[int]:
            return []

        def get_workspace_size(self, inputs: Any, outputs: Any) -> int:
            return 0

        # --- running ---

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection(
                [trt.PluginField(name, values, _field_type(trt, name)) for name, values in self.fields.items()]
            )

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def set_tactic(self, tactic: int) -> None:
            return None

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            # Here and not at the first launch, which may be captured into a graph, where nothing can be loaded.
            if self.function is None:
                self.function = the_driver().load(self.node)

        def enqueue(
            self, input_descs: Any, output_descs: Any, inputs: Any, outputs: Any, workspace: int, stream: int
        ) -> None:
            if self.function is None:
                self.function = the_driver().load(self.node)
            shapes = [tuple(described.dims) for described in input_descs]
            the_driver().launch(self.node, self.function, shapes, inputs, outputs, stream)

    return KernelPlugin


def _field_type(trt: Any, name: str) -> Any:
    types = trt.PluginFieldType
    return {"image": types.INT8, "entry": types.CHAR}.get(name, types.INT32)


def _size_expression(trt: Any, builder: Any, size: Any, inputs: Any) -> Any:
    """A size as TensorRT computes it from open shapes."""
    expression = builder.constant(size.factor)
    for axis in size.axes:
        expression = builder.operation(trt.DimensionOperation.PROD, expression, inputs[size.input][axis])
    if size.divisor == 1:
        return expression
    return builder.operation(trt.DimensionOperation.CEIL_DIV, expression, builder.constant(size.divisor))
