"""Engines with own kernels: what is built here, what is refused, what the driver would be told, who may run them."""

import functools
import gc
import importlib.util
import os
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import cnx_deploy as cnx
from cnx_deploy.cli.build_trt import build_trt
from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.child_process import run_isolated
from cnx_deploy.core.errors import (
    BuildError,
    CorruptArtifactError,
    InputError,
    MissingRequirementError,
    OutputExistsError,
    RefusedArtifactError,
)
from cnx_deploy.core.manifest import OwnKernel, OwnKernels, manifest_from_json
from cnx_deploy.core.system import package_version
from cnx_deploy.exporters.trt import fused_graph, plugins
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.builder import BuildSpec, _check_fused, build_engine
from cnx_deploy.exporters.trt.compiling import limits_for
from cnx_deploy.exporters.trt.fused_graph import with_own_kernels
from cnx_deploy.exporters.trt.kernel_node import (
    DOMAIN,
    FIELDS,
    OPERATOR,
    PLUGIN_VERSION,
    Argument,
    KernelNode,
    OutputTensor,
    Size,
    TensorLayout,
)
from cnx_deploy.exporters.trt.plugins import Driver, make_creator_known, parser_environment, register_creator
from cnx_deploy.runners.registry import RunnerOptions, find_runner
from cnx_deploy.runners.tensorrt import TensorRTRunner
from cnx_deploy.verification.inspect import inspect_file
from tests.support import kernel_nodes

RTX = load_backend("tensorrt-rtx")
SUPPORT = Path(__file__).parents[1] / "support"
LAUNCHER = Path(plugins.__file__).with_name("launcher") / "kernel_launcher.cpp"
NODE = KernelNode(
    image=b"\x7fELF and the rest", entry="kernel", threads=128, shared_bytes=64 << 10,
    inputs=(TensorLayout("HALF", True), TensorLayout("FLOAT")),
    outputs=(OutputTensor(TensorLayout("HALF"), (Size(0, (0,)), Size(0, (2, 3), 1, 64), Size(factor=160))),
             OutputTensor(TensorLayout("HALF", True), tuple(Size(0, (axis,)) for axis in range(4)))),
    grid=(Size(0, (2, 3), 1, 64), Size(0, (0,)), Size()),
    arguments=(Argument("input", 1), Argument("input", 0), Argument("output", 1),
               Argument("size", size=Size(0, (2, 3))), Argument("output", 0), Argument("null")),
)  # fmt: skip
SHAPES = ((3, 40, 56, 56), (3, 160))
ARGUMENT_BYTES = "8 8 8 4 8 8"


# --- the launch -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library in the place of CUDA's driver that writes down what it is called with."""
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler to make a driver that writes down its calls")
    library = tmp_path_factory.mktemp("fake") / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, SUPPORT / "fake_cuda.c"], check=True)
    return library


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    path = tmp_path / "calls"
    monkeypatch.setenv("CUDA_CALLS", str(path))
    monkeypatch.setenv("CUDA_ARGUMENTS", ARGUMENT_BYTES)
    return lambda: path.read_text(encoding="utf-8").splitlines()


LAUNCHED = "cuLaunchKernel 0xf0 grid 49 3 1 block 128 1 1 shared 65536 stream 0x5 arguments 0xb0 0xa0 0xe0 0xc40 0xd0 0"
"""56 · 56 = 3136 = 0xc40 positions in 49 tiles of 64, 3 samples."""
LOADED = [
    "cuModuleLoadData ELF",
    "cuModuleGetFunction kernel",
    "cuFuncSetAttribute 0xf0 8 65536",
]  # more than the 48 kB that need no permission


def test_a_launch_gives_the_driver_grid_threads_memory_and_arguments(
    fake_cuda: Path, calls: Callable[[], list[str]]
) -> None:
    driver = Driver(str(fake_cuda))
    function = driver.load(NODE)
    driver.launch(NODE, function, SHAPES, [0xA0, 0xB0], [0xD0, 0xE0], 5)
    assert [line.strip() for line in calls()] == ["cuCtxGetCurrent", *LOADED, LAUNCHED]


def test_blocks_with_the_same_kernel_load_it_once_and_little_memory_is_not_asked_for(
    fake_cuda: Path, calls: Callable[[], list[str]]
) -> None:
    driver, small = Driver(str(fake_cuda)), replace(NODE, shared_bytes=48 << 10)
    assert driver.load(small) is driver.load(replace(small, threads=64))
    driver.load(replace(small, image=b"\x7fELF of another kernel"))
    assert [line.split()[0] for line in calls()].count("cuModuleLoadData") == 2
    assert not any(line.startswith("cuFuncSetAttribute") for line in calls())


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_a_call_that_the_driver_refuses_is_an_error_with_its_name(
    fake_cuda: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setenv("CUDA_FAILS", call)
    driver = Driver(str(fake_cuda))
    with pytest.raises(BuildError, match=rf"{call} failed with CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)"):
        driver.launch(NODE, driver.load(NODE), SHAPES, [0, 0], [0, 0], 0)


def test_without_a_driver_the_launch_says_so() -> None:
    with pytest.raises(MissingRequirementError, match=r"needs NVIDIA's driver, and libnone\.so cannot be loaded"):
        Driver("libnone.so")


def test_the_plugin_launches_with_the_shapes_and_addresses_of_its_call(
    fake_cuda: Path, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(str(fake_cuda))
    monkeypatch.setattr(plugins, "the_driver", lambda: driver)
    plugin = created(NODE).attach_to_context(None)
    descriptions = [described(shape) for shape in SHAPES]
    plugin.on_shape_change(descriptions, [])
    before = len(calls())
    plugin.enqueue(descriptions, [], [0xA0, 0xB0], [0xD0, 0xE0], 0, 5)
    assert calls()[before:] == [LAUNCHED], "nothing is loaded while a graph may be captured"


# --- the plugin -------------------------------------------------------------------------------------------------------


def created(node: KernelNode) -> Any:
    """The plugin that TensorRT's own registry makes of a node's fields."""
    register_creator(RTX)
    trt = RTX.trt
    kinds = {"image": trt.PluginFieldType.INT8, "entry": trt.PluginFieldType.CHAR}
    values = node.fields()  # TensorRT's fields only point at them
    fields = [trt.PluginField(name, values[name], kinds.get(name, trt.PluginFieldType.INT32)) for name in values]
    creator = trt.get_plugin_registry().get_creator(OPERATOR, PLUGIN_VERSION, DOMAIN)
    return creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)


def described(shape: tuple[int, ...], kind: str = "HALF", order: str = "LINEAR") -> Any:
    description = RTX.trt.PluginTensorDesc()
    description.dims = shape
    description.type, description.format = getattr(RTX.trt.DataType, kind), getattr(RTX.trt.TensorFormat, order)
    return description


def test_a_plugin_keeps_every_field_for_the_engine() -> None:
    plugin = created(NODE).clone()
    kept = plugin.get_fields_to_serialize()
    assert [field.name for field in kept] == list(FIELDS)
    assert KernelNode.from_fields({field.name: np.array(field.data) for field in kept}) == NODE


def test_a_plugin_outlives_its_last_reference_because_tensorrt_deletes_it_too() -> None:
    plugin = created(NODE)
    clone = weakref.ref(plugin.clone())
    gc.collect()
    assert clone() is not None


def test_a_stream_is_taken_channels_last_alone_and_other_tensors_row_by_row() -> None:
    plugin = created(NODE)

    def fits(position: int, kind: str, order: str) -> bool:
        tensors = [RTX.trt.DynamicPluginTensorDesc() for _ in range(4)]
        tensors[position].desc = described((1, 1, 1, 1), kind, order)
        return bool(plugin.supports_format_combination(position, tensors, 2))

    taken = {
        (position, kind, order)
        for position in range(4)
        for kind in ("HALF", "FLOAT")
        for order in ("LINEAR", "HWC")
        if fits(position, kind, order)
    }
    assert taken == {(0, "HALF", "HWC"), (1, "FLOAT", "LINEAR"), (2, "HALF", "LINEAR"), (3, "HALF", "HWC")}


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fused_engine(tiny_onnx_fp16: cnx.Artifact, made_once: Path) -> cnx.Artifact:
    """An engine with own kernels for sm89, built ahead of time. Shared: do not change it."""
    return build_engine(tiny_onnx_fp16, BuildSpec(target="sm89", fused="auto", batches=((1, 4, 8),)), made_once / "own")


@pytest.mark.slow
def test_the_engine_is_named_and_recorded_with_its_kernels(fused_engine: cnx.Artifact) -> None:
    manifest = open_artifact(fused_engine.path).manifest
    assert fused_engine.path.name == "tiny-test-32-fp16-rtx-sm89-fused.engine"
    assert (manifest.request.fused, manifest.request.launcher_sha256) == ("auto", None)
    own = manifest.facts.own_kernels
    told = inspect_file(fused_engine.path)
    assert len(told.facts["own_kernels"]["kernels"]) == 12
    assert "It carries 12 own kernels. To run it needs cnx-deploy" in told.notes[1]
    assert own.hidden == ("recomputed",) * 4
    assert len(own.kernels) == len({kernel.sha256 for kernel in own.kernels}) == 12
    assert {kernel.target for kernel in own.kernels} == {"sm89"}
    assert own.compiler == f"triton {package_version('triton')}"
    assert (own.launcher, "--allow-engine-code" in own.needs) == ("python", True)
    assert manifest.facts.run.startswith("not run")


@pytest.mark.slow
def test_a_bf16_file_makes_an_engine_with_own_kernels(tmp_path: Path) -> None:
    onnx = cnx.export(
        "tiny-test", precision="bf16", image_size=32, num_classes=10, batch=(1, 4, 8), output_dir=tmp_path
    )
    engine = build_engine(onnx, BuildSpec(target="sm86", fused="stored", batches=((1, 4, 8),)), tmp_path)
    operations = [kernel.operation for kernel in engine.manifest.facts.compiled.kernel_list]
    assert operations.count("gain") == 5
    assert operations.count("cast/layout") <= 2 * 5 + 4


@pytest.mark.slow
def test_every_block_compiles_to_its_convolution_and_three_own_kernels(fused_engine: cnx.Artifact) -> None:
    compiled = fused_engine.manifest.facts.compiled
    blocks = [kernel for kernel in compiled.kernel_list if kernel.block.startswith("stages.")]
    assert [kernel.operation for kernel in blocks] == [
        "dwconv", "norm+pwconv1+gelu+grn statistic", "gain", "norm+pwconv1+gelu+gain+pwconv2+residual"
    ] * 5  # fmt: skip
    first = next(kernel for kernel in blocks if kernel.operation.startswith("norm"))
    assert first.tensors == "input 8x8x8x8 Half, constant 8x32 Half, constant 32 Half, output 8x1x32 Float"


@pytest.mark.slow
def test_the_manifest_of_an_engine_without_own_kernels_does_not_speak_of_them(
    fused_engine: cnx.Artifact, tiny_engine: cnx.Artifact
) -> None:
    words = ("fused", "launcher_sha256", "own_kernels")
    assert [word in tiny_engine.manifest.to_json() for word in words] == [False] * 3
    assert [word in fused_engine.manifest.to_json() for word in words] == [True, False, True]
    again = manifest_from_json(fused_engine.manifest.to_json().encode())
    assert again == fused_engine.manifest


@pytest.mark.slow
def test_a_second_build_reuses_the_engine_and_another_choice_is_another_engine(
    fused_engine: cnx.Artifact, tiny_onnx_fp16: cnx.Artifact
) -> None:
    spec = BuildSpec(target="sm89", fused="auto", batches=((1, 4, 8),))
    assert build_engine(tiny_onnx_fp16, spec, fused_engine.path.parent).reused
    with pytest.raises(OutputExistsError, match="was made from other inputs"):
        build_engine(tiny_onnx_fp16, replace(spec, fused="stored"), fused_engine.path.parent)


def measured(path: Path, environment: dict[str, str] | None) -> Any:
    """Have a child without creators compile a file."""
    return run_isolated(
        "cnx_deploy.exporters.trt.compiling:measure_task", {"onnx": str(path), "target": "sm89", "batch": 1},
        limits_for(1 << 20), what="Compiling", failure=BuildError, environment=environment,
    )  # fmt: skip


@pytest.fixture
def rewritten(tiny_onnx_fp16: cnx.Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(fused_graph, "compile_kernel", kernel_nodes.uncompiled)
    with with_own_kernels(tiny_onnx_fp16.path, "stored", "sm89") as (path, _):
        yield path


def test_without_the_creator_the_parser_names_the_plugin_that_it_misses(rewritten: Path) -> None:
    with parser_environment() as environment, pytest.raises(BuildError, match=f"cannot read it: .*{OPERATOR}"):
        measured(rewritten, environment)


def test_without_the_environment_the_parser_ends_its_process_and_here_that_is_said_before(rewritten: Path) -> None:
    if importlib.util.find_spec("tensorrt_rtx_libs") is None or "LD_LIBRARY_PATH" in os.environ:
        pytest.skip("TensorRT-RTX is installed so that its parser finds its library")
    with pytest.raises(BuildError, match="its process was ended by SIGABRT"):
        run_isolated(
            "tests.support.kernel_nodes:parse_with_creator", {"path": str(rewritten)}, limits_for(1 << 20),
            what="Parsing", failure=BuildError,
        )  # fmt: skip
    with pytest.raises(BuildError, match=r"parser needs libtensorrt_rtx\.so .* Build in a child process"):
        make_creator_known(RTX)


@pytest.mark.parametrize(
    ("words", "fused"),
    [
        ([], None),
        (["--fused", "--target", "sm89"], "auto"),
        (["--fused", "stored"], "stored"),
        (["--fused=auto"], "auto"),
    ],
)
def test_the_option_alone_means_auto(words: list[str], fused: str | None) -> None:
    assert build_trt.make_context("build-trt", words).params["fused"] == fused


def test_a_file_behind_the_option_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.onnx"
    file.touch()
    taken = build_trt.make_context("build-trt", ["--fused", str(file), "--target", "sm89"]).params
    assert (taken["fused"], taken["files"]) == ("auto", (file,))


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "FP32": ({"precision": "fp32"}, {}, "they compute in FP16 or BF16, and it is FP32"),
    "layout": ({"layout": "cpu"}, {}, "they take the layout gpu, and it has cpu"),
    "kept": ({"keep_fp32": ("head", "stages.2.1.grn")}, {}, r"it keeps stages\.2\.1\.grn in FP32"),
    "Turing": ({}, {"target": "sm75"}, "compiled for sm80, sm86, sm89, sm90, sm120, not sm75"),
    "batch": ({"tta": "flip"}, {"batches": ((1, 8, 1 << 15),)}, "count 65535 samples, and its largest batch has 65536"),
    "size": (
        {"image_size": 4 * 8192 + 32},
        {},
        "count 2147483647 hidden values of an image, and its largest has 21516",
    ),
    "launcher": ({}, {"launcher": "/nowhere/lib.so"}, "/nowhere/lib.so is no file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_own_kernels_cannot_do_is_refused_before_anything_is_compiled(
    tiny_onnx_fp16: cnx.Artifact, what: str
) -> None:
    deploy, spec, message = REFUSED[what]
    manifest = tiny_onnx_fp16.manifest
    request = replace(manifest.request, deploy=replace(manifest.deploy, **deploy))
    artifact = replace(tiny_onnx_fp16, manifest=replace(manifest, request=request))
    with pytest.raises(InputError, match=message):
        _check_fused(RTX, artifact, BuildSpec(**{"target": "sm89", "fused": "auto", **spec}))


def test_a_range_of_sizes_is_taken_up_to_its_largest(tiny_onnx_fp16: cnx.Artifact) -> None:
    def check(largest: int) -> None:
        manifest = tiny_onnx_fp16.manifest
        deploy = replace(manifest.deploy, image_size=64, size_range=(32, largest))
        artifact = replace(tiny_onnx_fp16, manifest=replace(manifest, request=replace(manifest.request, deploy=deploy)))
        _check_fused(RTX, artifact, BuildSpec(target="sm89", fused="auto"))

    check(96)
    with pytest.raises(InputError, match="its largest has 2151680000"):
        check(4 * 8192 + 32)


def test_other_networks_and_runtimes_are_refused(tiny_onnx_fp16: cnx.Artifact) -> None:
    manifest, spec = tiny_onnx_fp16.manifest, BuildSpec(target="sm89", fused="auto")
    older = replace(manifest, model=replace(manifest.model, variant="v1-atto"))
    with pytest.raises(InputError, match="ConvNeXt V1 has no GRN"):
        _check_fused(RTX, replace(tiny_onnx_fp16, manifest=older), spec)
    with pytest.raises(InputError, match="tensorrt was not tried with them"):
        _check_fused(Backend("tensorrt", RTX.trt), tiny_onnx_fp16, spec)
    with pytest.raises(InputError, match=r"launches own kernels, and the engine has none\. Add --fused"):
        BuildSpec(launcher="lib.so")


@pytest.mark.slow
def test_a_file_whose_graph_is_not_the_exported_one_makes_no_engine(
    tiny_onnx_fp16: cnx.Artifact, tmp_path: Path
) -> None:
    """Its manifest is right, its hash too, and only the pattern tells."""
    from cnx_deploy.core.files import sha256_of_file
    from tests.support.artifacts import copy_artifact

    copy = copy_artifact(tiny_onnx_fp16, tmp_path)
    model = onnx.load(copy.path)
    next(node for node in model.graph.node if node.name == "stages.1.0.act/Gelu").op_type = "Relu"
    del next(node for node in model.graph.node if node.name == "stages.1.0.act/Gelu").attribute[:]
    onnx.save(model, copy.path)
    record = replace(copy.manifest.files[0], sha256=sha256_of_file(copy.path), size_bytes=copy.path.stat().st_size)
    copy.path.with_suffix(".json").write_text(replace(copy.manifest, files=(record,)).to_json())
    spec = BuildSpec(target="sm89", fused="auto", batches=((1, 4, 8),))
    with pytest.raises(BuildError, match=r"stages\.1\.0 is no block .* expected Gelu, found Relu"):
        build_engine(copy.path, spec, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.engine"))


# --- permission -------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_kernels(tiny_engine: cnx.Artifact) -> cnx.Artifact:
    """An engine whose manifest says that it carries own kernels."""
    kernel = OwnKernel(
        kernel="response_gain", channels=8, target="sm89", tile=(8, 32, 0), warps=4, stages=1, sha256="0" * 64
    )
    own = OwnKernels(
        hidden=("stored",) * 4, kernels=(kernel,), compiler="triton 3.8", launcher="python", needs="this package"
    )
    return replace(
        tiny_engine, manifest=replace(tiny_engine.manifest, facts=replace(tiny_engine.manifest.facts, own_kernels=own))
    )


def test_an_engine_with_own_kernels_is_refused_without_permission(with_kernels: cnx.Artifact) -> None:
    entry = find_runner("tensorrt")
    with pytest.raises(RefusedArtifactError, match=r"carries 1 own kernels .* --allow-engine-code"):
        entry.open(with_kernels, RunnerOptions())
    with pytest.raises(RefusedArtifactError, match="own kernels"):
        TensorRTRunner(with_kernels)


def test_permission_alone_does_not_open_an_engine_whose_hash_is_another(
    tiny_engine: cnx.Artifact, tmp_path: Path
) -> None:
    from cnx_deploy.runners.registry import open_runner
    from tests.support.artifacts import copy_artifact

    copy = copy_artifact(tiny_engine, tmp_path)
    content = bytearray(copy.path.read_bytes())
    content[len(content) // 2] ^= 1
    copy.path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match="was altered"):
        open_runner(copy, options=RunnerOptions(allow_engine_code=True))
    copy.path.with_suffix(".json").unlink()
    with pytest.raises(RefusedArtifactError, match="no manifest"):
        open_runner(copy, options=RunnerOptions(allow_engine_code=True))


@pytest.mark.parametrize(
    ("launcher", "host_code", "creators"), [(None, False, 0), ("python", False, 1), ("engine", True, 0)]
)
def test_a_runtime_gets_host_code_or_the_creator_as_the_manifest_says(
    monkeypatch: pytest.MonkeyPatch, launcher: Any, host_code: bool, creators: int
) -> None:
    class Runtime:
        engine_host_code_allowed = not host_code

    registered: list[Backend] = []
    monkeypatch.setattr(plugins, "register_creator", registered.append)
    runtime = Runtime()
    plugins.prepare_runtime(RTX, runtime, launcher)
    assert (runtime.engine_host_code_allowed, len(registered)) == (host_code, creators)


def test_verify_says_that_an_engine_with_own_kernels_was_not_run(
    with_kernels: cnx.Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cnx_deploy.runners import tensorrt
    from cnx_deploy.verification import verify

    monkeypatch.setattr(tensorrt, "require_gpu", lambda: None)
    monkeypatch.setattr(verify, "open_artifact", lambda path: with_kernels)
    found = verify.verify_artifact(with_kernels, None)  # type: ignore[arg-type]
    assert len(found.not_run) == 1
    assert "--allow-engine-code" in found.not_run[0]


# --- the launcher in C++ ----------------------------------------------------------------------------------------------


@functools.cache
def header_folders() -> tuple[Path, ...]:
    """Headers of TensorRT-RTX (TENSORRT_RTX_SDK) and of the CUDA toolkit."""
    sdk = Path(os.environ.get("TENSORRT_RTX_SDK", "/usr/local/tensorrt-rtx")) / "include"
    package = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in (package.submodule_search_locations or ()) if package is not None]
    cuda = [
        Path("/usr/local/cuda/include"),
        *(found.parent for place in places for found in place.glob("*/include/cuda_runtime_api.h")),
    ]
    folders = [folder for folder in cuda if (folder / "cuda_runtime_api.h").is_file()]
    return (sdk, folders[0]) if (sdk / "NvInferRuntime.h").is_file() and folders else ()


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or not header_folders():
        pytest.skip("no g++, or no headers of TensorRT-RTX and CUDA: set TENSORRT_RTX_SDK to the unpacked SDK")
    library = tmp_path_factory.mktemp("launcher") / "libkernel_launcher.so"
    compile_cpp(library, LAUNCHER, "-shared", "-fPIC")
    return library


def compile_cpp(target: Path, source: Path, *options: str) -> None:
    includes = [word for folder in header_folders() for word in ("-isystem", str(folder))]
    command = ["g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", *options, *includes]
    subprocess.run([*command, "-o", str(target), str(source), "-ldl"], check=True)


@pytest.mark.slow
def test_the_launcher_travels_in_the_engine(launcher: Path, tiny_onnx_fp16: cnx.Artifact, tmp_path: Path) -> None:
    from cnx_deploy.core.files import sha256_of_file

    spec = BuildSpec(target="sm89", fused="auto", batches=((1, 4, 8),), launcher=str(launcher), measure=False)
    engine = build_engine(tiny_onnx_fp16, spec, tmp_path)
    assert launcher.read_bytes() in engine.path.read_bytes()
    assert engine.manifest.request.launcher_sha256 == sha256_of_file(launcher)
    own = engine.manifest.facts.own_kernels
    assert (own.launcher, "host code" in own.needs) == ("engine", True)
    with pytest.raises(RefusedArtifactError, match="host code that launches them"):
        TensorRTRunner(engine)


def test_the_launcher_gives_the_driver_what_python_gives_it(
    launcher: Path, fake_cuda: Path, calls: Callable[[], list[str]], tmp_path: Path
) -> None:
    harness = tmp_path / "harness"
    compile_cpp(harness, SUPPORT / "launch_once.cpp")
    fields = {name: values.tobytes().hex() for name, values in NODE.fields().items()}
    environment = {**os.environ, "LD_LIBRARY_PATH": str(fake_cuda.parent)}
    arguments = [f"{name}={text}" for name, text in fields.items()]
    answer = subprocess.run(
        [harness, launcher, *arguments], env=environment, check=True, capture_output=True, text=True
    )
    assert [line.strip() for line in calls()] == [*LOADED, LAUNCHED, "cuModuleUnload ours"]
    kept = dict(line.split("=") for line in answer.stdout.split())
    assert kept == {**fields, "formats": "0HWC 1LINEAR 2LINEAR 3HWC".replace(" ", "")}
    assert subprocess.run([harness, launcher, *arguments[1:]], env=environment).returncode == 3, "a field is missing"


@pytest.mark.slow
def test_a_library_without_the_creator_is_refused(
    fake_cuda: Path, tiny_onnx_fp16: cnx.Artifact, tmp_path: Path
) -> None:
    library = tmp_path / "other.so"
    library.write_bytes(fake_cuda.read_bytes())
    spec = BuildSpec(target="sm89", fused="auto", batches=((1, 4, 8),), launcher=str(library))
    with pytest.raises(BuildError, match=rf"other\.so has no creator {DOMAIN}::{OPERATOR}"):
        build_engine(tiny_onnx_fp16, spec, tmp_path / "out")
