"""A fault planted in one module is named at that module, by every backend that has it; sound files agree everywhere."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.errors import CnxDeployError, CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.diagnosis import layer_outputs
from cnx_deploy.diagnosis.layer_outputs import (
    BACKENDS,
    LOGITS,
    ExportedNetwork,
    OutputTensors,
    compiled_plan,
    copy_with_outputs,
    engine_outputs,
    find_outputs,
    module_names,
    reference_form,
    torch_outputs,
)
from cnx_deploy.diagnosis.layer_record import BackendResult, LayerComparison, OutputDifferences, OutputResult
from cnx_deploy.diagnosis.layerwise import JUMP, compare_artifact, compare_output, find_jumps, report_lines
from cnx_deploy.diagnosis.plots import plot_layers
from cnx_deploy.exporters.trt.backend import Backend, load_backend
from cnx_deploy.exporters.trt.network import NetworkBuild
from cnx_deploy.model.checkpoint import hash_weights
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from cnx_deploy.runners import tensorrt
from cnx_deploy.runners.tensorrt import EngineSession
from tests.conftest import TINY_TEST, Command
from tests.support import trt_double
from tests.support.layer_faults import (
    IMAGES,
    Values,
    beginnings,
    compare,
    gamma_of,
    planted,
    shifted,
    spec_of,
    with_constant,
    with_epsilon,
    with_weights_of,
)

ON_CPU = ("torch", "onnxruntime", "emulator")


@pytest.fixture(scope="module")
def sound(tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact) -> dict[str, LayerComparison]:
    return {"fp32": compare(tiny_onnx_fp32), "fp16": compare(tiny_onnx_fp16)}


# Sound files


def test_every_module_of_both_files_is_compared_in_order_of_depth_and_agrees_on_every_backend(
    sound: dict[str, LayerComparison], tiny_onnx_fp16: Artifact
) -> None:
    ran = {name: [result.backend for result in found.ran] for name, found in sound.items()}
    assert ran == {"fp32": ["onnxruntime"], "fp16": list(ON_CPU)}
    for found in sound.values():
        assert (found.passed, dict(found.missing)) == (True, {})
        assert {output.verdict for result in found.ran for output in result.outputs} <= {"ok", "jumps"}
    form = reference_form(random_model(TINY_TEST, 10, seed=0), spec_of(tiny_onnx_fp16))
    modules = [output.module for output in sound["fp16"].backends[0].outputs]
    assert sorted(modules) == sorted(module_names(form))
    block = [module for module in modules if module.startswith("stages.2.1")]
    parts = [f"stages.2.1{part}" for part in (".dwconv", ".norm", ".pwconv1", ".act", ".grn", ".pwconv2", "")]
    assert (block, modules[-3:]) == (parts, ["norm", "head", LOGITS])


def test_onnx_runtimes_outputs_of_the_fp32_file_equal_the_hooks_to_1e_5(
    tiny_onnx_fp32: Artifact, tiny_model: ConvNeXtV2
) -> None:
    spec = spec_of(tiny_onnx_fp32)
    form = reference_form(tiny_model, spec)
    outputs = find_outputs(tiny_onnx_fp32.path, module_names(form))
    expected = torch_outputs(form, IMAGES)
    with BACKENDS[1].open(ExportedNetwork(tiny_onnx_fp32.path, tiny_model, spec, outputs, 2)) as read:
        found = read(IMAGES)
    assert found.keys() == {*module_names(form)}
    for module, tensor in found.items():
        close = torch.isclose(tensor, expected[module], rtol=5e-5, atol=5e-5)  # rounding: 9e-6; a wrong output: O(1)
        assert bool(close.all()), module


def test_one_canonical_view_lines_the_two_layouts_up(
    tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2
) -> None:
    channels_first, tokens = (
        torch_outputs(reference_form(tiny_model, spec_of(artifact)), IMAGES)
        for artifact in (tiny_onnx_fp32, tiny_onnx_fp16)
    )
    shared = [module for module in channels_first if module in tokens and module.startswith("stages.")]
    assert channels_first["stages.0.0.act"].shape != tokens["stages.0.0.act"].shape
    for module in shared:
        assert compare_output(module, [(tokens[module], channels_first[module])], GATES["fp32"]).verdict == "ok"


def test_the_deployed_file_is_what_it_was(
    sound: dict[str, LayerComparison], tiny_onnx_fp32: Artifact, tiny_onnx_fp16: Artifact
) -> None:
    for artifact in (tiny_onnx_fp32, tiny_onnx_fp16):
        assert sha256_of_file(artifact.path) == open_artifact(artifact.path).sha256
        assert sorted(path.suffix for path in artifact.path.parent.iterdir()) == [".json", ".onnx"]


# Planted faults

GRN = {"fp32": "stages.2.0.grn.affine", "fp16": "stages.2.0.grn"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("fault", ["pwconv1 bias", "grn gamma", "head bias"])
def test_a_changed_constant_is_named_at_its_module(
    request: pytest.FixtureRequest, tmp_path: Path, precision: str, fault: str
) -> None:
    artifact = request.getfixturevalue(f"tiny_onnx_{precision}")
    gamma = "stages.2.0.grn.affine.weight" if precision == "fp32" else gamma_of(artifact, "stages.2.0.grn")
    module, change = {
        "pwconv1 bias": ("stages.2.1.pwconv1", with_constant("stages.2.1.pwconv1.bias", shifted)),
        "grn gamma": (GRN[precision], with_constant(gamma, lambda values: values * 0)),
        "head bias": ("head", with_constant("head.bias", shifted)),
    }[fault]
    found = compare(artifact, planted(artifact, tmp_path, change))
    untouched = {"torch": None} if precision == "fp16" else {}
    faulty = ("onnxruntime", "emulator") if precision == "fp16" else ("onnxruntime",)
    assert beginnings(found) == {**untouched, **dict.fromkeys(faulty, module)}
    assert found.first is not None
    assert (found.passed, found.first[0].backend, found.first[1].module) == (False, "onnxruntime", module)
    block = module.removesuffix(".pwconv1").removesuffix(".affine").removesuffix(".grn")
    assert found.to_dict()["first_divergence"]["block"] == block


@pytest.mark.parametrize(("precision", "epsilon"), [("fp32", 0.1), ("fp16", 0.1), ("fp32", 1e-5)])
def test_another_epsilon_even_torchs_default_is_named_at_its_norm(
    request: pytest.FixtureRequest, tmp_path: Path, precision: str, epsilon: float
) -> None:
    artifact = request.getfixturevalue(f"tiny_onnx_{precision}")
    path = planted(artifact, tmp_path, with_epsilon("stages.2.0.norm/LayerNormalization", epsilon))
    assert set(beginnings(compare(artifact, path)).values()) - {None} == {"stages.2.0.norm"}


def test_a_fault_that_fails_only_further_on_is_named_where_the_error_jumps(
    tiny_onnx_fp32: Artifact, tiny_model: ConvNeXtV2, tmp_path: Path
) -> None:
    """A hidden channel that is always 0 becomes 1e-4: little beside the others, until a weight of 20 reads it."""
    block = tiny_model.stage_blocks()[2][0]
    with torch.no_grad():
        for silenced in (block.pwconv1.weight[0], block.pwconv1.bias[0], block.grn.beta[..., 0]):
            silenced.zero_()
        block.pwconv2.weight[:, 0] = 20.0
    with_the_models_weights = with_weights_of(reference_form(tiny_model, spec_of(tiny_onnx_fp32)))

    def with_the_fault(model: onnx.ModelProto) -> None:
        with_the_models_weights(model)
        with_constant("stages.2.0.pwconv1.bias", lambda bias: np.where(np.arange(len(bias)), bias, np.float32(2e-4)))(
            model
        )

    # A jump is only 2.5 times below the gate of FP32 files, 1e-5, so rounding would decide; an FP32 engine's is 1e-4.
    # Where it is planted the fault is 4.6 times a jump and 5.4 times below that gate, and further on 12 times above it.
    engines_gate = [replace(BACKENDS[1], is_engine=True)]
    sound = planted(tiny_onnx_fp32, tmp_path, with_the_models_weights)
    assert compare(tiny_onnx_fp32, sound, tiny_model, backends=engines_gate).passed
    path = planted(tiny_onnx_fp32, tmp_path, with_the_fault)
    found = compare(tiny_onnx_fp32, path, tiny_model, backends=engines_gate)
    assert found.first is not None
    assert (found.first[1].module, found.first[1].verdict, found.passed) == ("stages.2.0.pwconv1", "jumps", False)
    assert next(output.module for output in found.backends[0].outputs if output.fails) == "stages.2.0.pwconv2"


def marked(result: BackendResult, module: str, verdict: Any) -> BackendResult:
    """A backend's result with another verdict over one module."""
    outputs = (replace(each, verdict=verdict) if each.module == module else each for each in result.outputs)
    return replace(result, outputs=tuple(outputs))


def test_of_two_backends_the_one_that_parts_at_the_least_depth_is_named_and_a_jump_alone_is_no_failure(
    sound: dict[str, LayerComparison],
) -> None:
    torch_side, ort, emulator, _ = sound["fp16"].backends
    backends = (torch_side, marked(ort, "norm", "fails"), marked(emulator, "stages.0.0", "fails"))
    first = replace(sound["fp16"], backends=backends).first
    assert first is not None
    assert (first[0].backend, first[1].module) == ("emulator", "stages.0.0")
    jumping = replace(sound["fp32"], backends=(marked(sound["fp32"].backends[1], "norm", "jumps"),))
    assert (jumping.passed, jumping.first) == (True, None)
    assert "jumps at norm" in "\n".join(report_lines(jumping))


def test_of_two_faults_the_first_is_named(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    def both(model: onnx.ModelProto) -> None:
        with_constant("head.bias", shifted)(model)
        with_constant("stages.0.0.pwconv1.bias", shifted)(model)

    path = planted(tiny_onnx_fp32, tmp_path, both)
    assert beginnings(compare(tiny_onnx_fp32, path)) == {"onnxruntime": "stages.0.0.pwconv1"}


def test_an_fp16_overflow_is_named_by_the_emulator_and_hidden_by_onnx_runtime(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, tmp_path: Path
) -> None:
    """Scaled by GRN's gain the hidden tensor passes 65504; before that and after the second weight it does not."""
    factor = 2.0**12  # a power of two: the weights that were folded into file and model stay equal
    block = tiny_model.stage_blocks()[2][0]
    with torch.no_grad():
        for parameter in (block.pwconv1.weight, block.pwconv1.bias):
            parameter.mul_(factor)

    def change(model: onnx.ModelProto) -> None:
        for name in ("stages.2.0.pwconv1/MatMul", "stages.2.0.pwconv1/Add"):
            with_constant(name, lambda values: values * np.float16(factor))(model)

    found = compare(tiny_onnx_fp16, planted(tiny_onnx_fp16, tmp_path, change), tiny_model)
    begun = beginnings(found)
    assert (begun["emulator"], begun["onnxruntime"]) == ("stages.2.0.pwconv2", None)
    emulator = next(result for result in found.backends if result.backend == "emulator")
    assert emulator.begins is not None
    assert emulator.begins.verdict == "not finite"
    assert any("FIRST DIVERGENCE: stages.2.0.pwconv2" in line for line in report_lines(found))


def test_parity_nan_never_passes_on_both_sides_of_a_layer(
    tiny_onnx_fp32: Artifact, tiny_model: ConvNeXtV2, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_model.head.bias[3] = float("nan")

    def change(values: Values) -> Values:
        return np.where(np.arange(len(values)) == 3, np.float32("nan"), values)

    path = planted(tiny_onnx_fp32, tmp_path, with_constant("head.bias", change))
    found = compare(tiny_onnx_fp32, path, tiny_model)
    assert found.first is not None
    assert (found.first[1].module, found.first[1].verdict) == ("head", "not finite")


def test_a_fault_that_stored_outputs_hide_shows_in_the_logits_of_the_file_as_deployed(
    tiny_onnx_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy with outputs is made of the sound file: what then differs is the deployed one alone."""
    path = planted(tiny_onnx_fp32, tmp_path, with_constant("head.bias", shifted))
    monkeypatch.setattr(
        layer_outputs, "copy_with_outputs", lambda _, names: copy_with_outputs(tiny_onnx_fp32.path, names)
    )
    assert beginnings(compare(tiny_onnx_fp32, path)) == {"onnxruntime": LOGITS}


# Files that cannot be lined up


def renamed(prefix: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for index, node in enumerate(model.graph.node):
            if node.name.startswith(prefix):
                node.name = f"node_{index}/{node.op_type}"

    return change


def test_a_file_without_module_names_is_refused_and_a_module_without_one_is_no_pass(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"names none of the network's 52 modules .* 'node_0/"):
        compare(tiny_onnx_fp32, planted(tiny_onnx_fp32, tmp_path, renamed("")))
    found = compare(tiny_onnx_fp32, planted(tiny_onnx_fp32, tmp_path, renamed("stages.2.1.pwconv1/")))
    assert found.missing["stages.2.1.pwconv1"] == "no node is named after it"
    assert [module for module in found.missing if module.startswith("node_")]
    assert (found.passed, found.first) == (False, None)
    assert "no backend diverges, but not every module was compared" in list(report_lines(found))


def test_a_node_that_nothing_outside_its_module_reads_is_not_its_output(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    tensor = find_outputs(tiny_onnx_fp32.path, ("stages.0.0.act",)).by_module["stages.0.0.act"]

    def add_a_dead_end(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node("Identity", [tensor], ["dead"], name="stages.0.0.act/Identity"))
        model.graph.node.append(onnx.helper.make_node("Identity", ["dead"], ["end"], name="stages.0.0.act/Identity_2"))

    path = planted(tiny_onnx_fp32, tmp_path, add_a_dead_end)
    assert find_outputs(path, ("stages.0.0.act",)).by_module == {"stages.0.0.act": tensor}


def test_another_shape_is_not_lined_up_and_fails() -> None:
    found = compare_output("norm", [(torch.zeros(2, 4, 8), torch.zeros(2, 8, 3, 3))], GATES["fp16"])
    assert (found.verdict, found.fails, found.figures) == ("not lined up", True, None)
    assert "(2, 4, 8), the reference's (2, 9, 8)" in found.reason


def test_what_cannot_be_compared_is_refused(tiny_onnx_fp32: Artifact, engine: Artifact, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"garbage, not protobuf")
    with pytest.raises(CorruptArtifactError, match="not an ONNX model"):
        find_outputs(tmp_path / "x.onnx", ("head",))
    with pytest.raises(InputError, match=r"Use the file it was built from, atto-224-fp16\.onnx"):
        compare_artifact(engine)
    with pytest.raises(InputError, match="1 to 8 images, not 9"):
        compare_artifact(tiny_onnx_fp32, samples=9)


# The rule


def output(error: float, verdict: str = "ok") -> OutputResult:
    return OutputResult("m", verdict, OutputDifferences(error, 1.0, 0, 1.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("errors", "verdicts"),
    [
        ([1e-6, 2e-6, 7.9e-6], ["ok", "ok", "ok"]),
        ([1e-6, 2e-6, 8.1e-6], ["ok", "ok", "jumps"]),
        ([1e-6, 8e-6, 1.6e-5], ["ok", "jumps", "ok"]),
        ([0.0, 0.9 * JUMP * 5e-7], ["ok", "ok"]),
        ([0.0, 1.1 * JUMP * 5e-7], ["ok", "jumps"]),
    ],
)
def test_a_jump_is_four_times_all_outputs_before_and_one_rounding(errors: list[float], verdicts: list[str]) -> None:
    assert [found.verdict for found in find_jumps(map(output, errors), 5e-7)] == verdicts
    assert [found.verdict for found in find_jumps([output(1e-6), output(1.0, "fails")], 5e-7)] == ["ok", "fails"]


@pytest.mark.parametrize(("factor", "verdict"), [(0.99, "ok"), (1.01, "fails")])
def test_the_gates_relative_l2_of_the_worst_sample_is_the_limit(factor: float, verdict: str) -> None:
    reference = torch.ones(2, 3, 4, dtype=torch.float64)
    candidate = reference.clone()
    candidate[1] += factor * GATES["fp16"].relative_l2_max
    assert compare_output("m", [(candidate, reference)], GATES["fp16"]).verdict == verdict


def test_the_worst_of_all_batches_counts() -> None:
    good, bad = torch.ones(1, 3), torch.tensor([[1.0, 1.0, 2.0]])
    pairs = [(good, good), (bad, good), (good, good)]
    found = compare_output("m", pairs, GATES["fp16"])
    assert found.figures == OutputDifferences(pytest.approx(3**-0.5), pytest.approx(4 / 18**0.5), 0, 2.0)  # type: ignore[arg-type]


def test_zero_on_both_sides_agrees_and_zero_on_one_does_not() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    verdicts = [compare_output("m", [pair], GATES["fp32"]).verdict for pair in ((zero, zero), (one, zero), (zero, one))]
    assert verdicts == ["ok", "fails", "fails"]


# TensorRT: the real compiler, and a double of the runtime


def outputs_of(artifact: Artifact, model: ConvNeXtV2) -> OutputTensors:
    return find_outputs(artifact.path, module_names(reference_form(model, spec_of(artifact))))


def test_the_copy_is_compiled_with_its_layers_as_outputs(tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2) -> None:
    backend, names = load_backend("tensorrt-rtx"), outputs_of(tiny_onnx_fp16, tiny_model).names
    with copy_with_outputs(tiny_onnx_fp16.path, names) as copy:
        network = NetworkBuild(backend, copy).network
        assert {network.get_output(index).name for index in range(network.num_outputs)} == set(names)
        assert len(compiled_plan(backend, copy, "sm89", 2)) > 10_000


class DoubleOfAll(trt_double.DoubleContext):
    """The double's context for a network with further outputs."""

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self._shape is not None
        shapes = {each.name: each.shape for each in self._session.get_outputs()}
        return self._shape if name == "images" else (self._shape[0], *shapes[name][1:])

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle != 0, "the default stream"
        outputs = self._session.get_outputs()
        assert set(self._addresses) == {"images", *(each.name for each in outputs)}, "an address is missing"
        assert self._shape is not None
        if not self._answer("execute_async_v3"):
            return False
        images = trt_double._memory(self._addresses["images"], self._shape, np.float32)
        for each, values in zip(outputs, self._session.run(None, {"images": images}), strict=True):
            trt_double._memory(self._addresses[each.name], values.shape, values.dtype)[...] = values
        return True


def double_session(
    path: Path, monkeypatch: pytest.MonkeyPatch, fail: str | None = None, kind: str = "HALF"
) -> EngineSession:
    """An engine whose runtime is the double: ONNX Runtime on `path`, which may have further outputs."""
    module, context = trt_double.double_of(load_backend("tensorrt-rtx").trt, path, [(2, 2, 2)], fail=fail)
    types = {"tensor(float)": "FLOAT", "tensor(float16)": kind}
    context.__class__ = DoubleOfAll
    if module.Runtime.engine is not None:
        outputs = {each.name: types[each.type] for each in context._session.get_outputs()}
        module.Runtime.engine._types = {"images": "FLOAT", **outputs}
        module.Runtime.engine.num_io_tensors = len(outputs) + 1
    monkeypatch.setattr(tensorrt, "CudaStream", trt_double.DoubleStream)
    return EngineSession(Backend("tensorrt-rtx", module), b"plan", path.name, torch.device("cpu"))


@pytest.mark.parametrize("fault", [False, True])
def test_an_engine_is_compared_by_layer_like_the_other_backends(
    tiny_onnx_fp16: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: bool
) -> None:
    @contextlib.contextmanager
    def opened(network: ExportedNetwork) -> Iterator[layer_outputs.ReadOutputs]:
        with copy_with_outputs(network.path, network.outputs.names) as copy:
            read = engine_outputs(double_session(copy, monkeypatch))
            yield lambda images: network.outputs.of_modules(read(images))

    path = tiny_onnx_fp16.path
    if fault:
        path = planted(tiny_onnx_fp16, tmp_path, with_constant("stages.1.0.dwconv.bias", shifted))
    found = compare(tiny_onnx_fp16, path, backends=[replace(BACKENDS[3], open=opened)])
    assert beginnings(found) == {"tensorrt": "stages.1.0.dwconv" if fault else None}


@pytest.mark.parametrize(
    "call",
    ["deserialize", "create_execution_context", "set_input_shape", "infer_shapes", "set_tensor_address(logits)",
     "execute_async_v3"],
)  # fmt: skip
def test_a_false_answer_of_the_runtime_is_an_error(
    tiny_onnx_fp16: Artifact, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with pytest.raises(CnxDeployError, match=r"tensorrt-rtx|TensorRT|engine wants"):
        engine_outputs(double_session(tiny_onnx_fp16.path, monkeypatch, fail=call))(IMAGES)


def test_an_output_of_a_type_that_no_layer_has_is_refused(
    tiny_onnx_fp16: Artifact, tiny_model: ConvNeXtV2, monkeypatch: pytest.MonkeyPatch
) -> None:
    with copy_with_outputs(tiny_onnx_fp16.path, outputs_of(tiny_onnx_fp16, tiny_model).names) as copy:
        session = double_session(copy, monkeypatch, kind="FP8")
        with pytest.raises(InputError, match="is FP8"):
            engine_outputs(session)


def test_without_a_gpu_tensorrt_is_not_run_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx_fp16: Artifact
) -> None:
    def no_gpu() -> None:
        raise MissingRequirementError("This needs an NVIDIA GPU.")

    monkeypatch.setattr(layer_outputs, "require_gpu", no_gpu)
    found = compare(tiny_onnx_fp16, backends=BACKENDS[3:])
    assert (found.ran, found.backends[0].not_run) == ((), "This needs an NVIDIA GPU.")
    assert "tensorrt: not run: This needs an NVIDIA GPU." in list(report_lines(found))


# The plot and the command


def test_the_plot_has_a_line_a_backend_and_marks_where_it_begins_and_what_is_not_finite(
    sound: dict[str, LayerComparison], tmp_path: Path
) -> None:
    first, second = (plot_layers(sound["fp16"], tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second
    assert [name for name in (*ON_CPU, "tensorrt") if f">{name}<" in first.decode()] == list(ON_CPU)
    result, nan = sound["fp16"].backends[2], float("nan")
    lost = replace(result.outputs[9], verdict="not finite", figures=OutputDifferences(nan, nan, 3, float("inf")))
    outputs = (*result.outputs[:9], lost, *result.outputs[10:])
    changed = replace(sound["fp16"], backends=(replace(result, outputs=outputs),))
    text = plot_layers(changed, tmp_path / "a.svg").read_text(encoding="utf-8")
    assert (lost.module in text, "emulator: not finite" in text) == (True, True)
    assert "not finite!" in "\n".join(report_lines(changed))


@pytest.fixture
def recorded(tiny_onnx_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A copy of the FP32 file in export/, whose manifest names the weights by their hash."""
    monkeypatch.setitem(VARIANTS, TINY_TEST.name, TINY_TEST)
    folder = shutil.copytree(tiny_onnx_fp32.path.parent, tmp_path / "export", ignore=shutil.ignore_patterns(".*"))

    def change(data: dict[str, Any]) -> None:
        data["model"]["weights"]["sha256"] = hash_weights(random_model(TINY_TEST, 10, seed=0))
        data["model"]["preprocessing"] = {"image_size": 32}

    change_manifest(folder / tiny_onnx_fp32.path.with_suffix(".json").name, change)
    monkeypatch.chdir(tmp_path)
    return open_artifact(folder / tiny_onnx_fp32.path.name)


def change_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_a_fault_is_exit_code_3_in_the_table_and_in_the_document(
    recorded: Artifact, cnx: Command, tmp_path: Path
) -> None:
    path = planted(recorded, tmp_path, with_constant("stages.2.1.pwconv1.bias", shifted))
    shutil.move(path, recorded.path)
    entry = {"size_bytes": recorded.path.stat().st_size, "sha256": sha256_of_file(recorded.path)}
    change_manifest(recorded.path.with_suffix(".json"), lambda data: data["files"][0].update(entry))
    words = ("layers", recorded.path, "--json", "--samples", 1, "--plot", "a.svg")
    code, printed, said = cnx("diagnose", *words)
    (found,) = json.loads(printed)["layers"]
    place = {"backend": "onnxruntime", "module": "stages.2.1.pwconv1", "block": "stages.2.1", "verdict": "fails"}
    assert (code, found["images"], found["first_divergence"]) == (3, 1, place)
    assert [len(result["outputs"]) for result in found["backends"]] == [0, 52, 0, 0]
    assert "part from PyTorch by layer" in said
    assert "stages.2.1.pwconv1" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "9"), "1<=x<=8"),
        (("--plot", "a.png"), "expected the suffix .svg"),
        (("--export-dir", "none"), "No ONNX file is recorded"),
    ],
)
def test_what_cannot_be_compared_is_wrong_usage(cnx: Command, words: tuple[str, ...], message: str) -> None:
    code, _, said = cnx("diagnose", "layers", *words)
    assert (code, message in " ".join(said.split())) == (2, True)


def test_the_command_prints_a_row_a_block_on_images_of_a_folder_and_ends_well(
    recorded: Artifact, cnx: Command, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 40), (80 * index, 90, 200)).save(tmp_path / "images" / f"{index}.png")
    code, printed, _ = cnx("diagnose", "layers", "--samples", 3, "--data", "images")
    lines = printed.splitlines()
    assert (code, lines[0], lines[-1]) == (0, f"{recorded.path.name}, images: 3", "no backend diverges")
    blocks = [line.split()[0] for line in lines[2:15]]
    assert [block for block in blocks if block.startswith("stages")] == [
        "stages.0.0", "stages.1.0", "stages.2.0", "stages.2.1", "stages.3.0",
    ]  # fmt: skip


def test_a_byte_that_was_altered_is_found_before_the_file_is_parsed(
    recorded: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(recorded.path.read_bytes())
    content[0] ^= 1
    recorded.path.write_bytes(content)
    monkeypatch.setattr("onnx_ir.load", lambda path: pytest.fail("parsed"))
    with pytest.raises(CorruptArtifactError, match="was altered"):
        compare_artifact(recorded)
