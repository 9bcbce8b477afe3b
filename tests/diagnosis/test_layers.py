"""A fault planted in one module is named at that module, by every side that has it; sound files line up everywhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.diagnosis.layerwise import sides as layers_sides
from cnx_deploy.diagnosis.layerwise.comparison import (
    JUMP,
    Figures,
    LayerComparison,
    SideResult,
    TapResult,
    compared,
    layers_of_artifact,
    with_jumps,
)
from cnx_deploy.diagnosis.layerwise.report import document, table
from cnx_deploy.diagnosis.layerwise.sides import SIDES, Subject, reference_form, torch_outputs
from cnx_deploy.diagnosis.layerwise.taps import LOGITS, canonical, module_names, tapped_copy, taps_in_file
from cnx_deploy.model.convnextv2 import ConvNeXtV2, random_model
from tests.conftest import TINY_TEST
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


def test_every_module_of_both_files_is_compared_and_agrees_on_every_side(sound: dict[str, LayerComparison]) -> None:
    assert {name: (found.passed, dict(found.missing)) for name, found in sound.items()} == {
        "fp32": (True, {}),
        "fp16": (True, {}),
    }
    verdicts = {tap.verdict for found in sound.values() for side in found.sides for tap in side.taps}
    assert verdicts == {"ok"}


def test_the_sides_that_ran_are_those_that_say_something_of_the_precision(sound: dict[str, LayerComparison]) -> None:
    assert {name: [side.side for side in found.sides if side.taps] for name, found in sound.items()} == {
        "fp32": ["onnxruntime"],
        "fp16": list(ON_CPU),
    }


def test_taps_stand_for_every_module_that_computes_in_order_of_depth(
    sound: dict[str, LayerComparison], tiny_onnx_fp16: Artifact
) -> None:
    form = reference_form(random_model(TINY_TEST, 10, seed=0), spec_of(tiny_onnx_fp16))
    modules = [tap.module for tap in sound["fp16"].sides[0].taps]
    assert sorted(modules) == sorted(module_names(form))
    block = [module for module in modules if module.startswith("stages.2.1")]
    parts = [f"stages.2.1{part}" for part in (".dwconv", ".norm", ".pwconv1", ".act", ".grn", ".pwconv2", "")]
    assert (block, modules[-3:]) == (parts, ["norm", "head", LOGITS])


def test_onnx_runtimes_taps_of_the_fp32_file_equal_the_hooks_to_1e_5(
    tiny_onnx_fp32: Artifact, tiny_model: ConvNeXtV2
) -> None:
    spec = spec_of(tiny_onnx_fp32)
    form = reference_form(tiny_model, spec)
    taps = taps_in_file(tiny_onnx_fp32.path, module_names(form))
    expected = torch_outputs(form, IMAGES)
    with SIDES[1].open(Subject(tiny_onnx_fp32.path, tiny_model, spec, taps, 2)) as read:
        found = read(IMAGES)
    assert found.keys() == {*module_names(form)}
    for module, tensor in found.items():
        close = torch.isclose(tensor, expected[module], rtol=1e-5, atol=1e-5)
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
        assert compared(module, [(tokens[module], channels_first[module])], GATES["fp32"]).verdict == "ok"


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
    sound_sides = {"torch": None} if precision == "fp16" else {}
    faulty = ("onnxruntime", "emulator") if precision == "fp16" else ("onnxruntime",)
    assert beginnings(found) == {**sound_sides, **dict.fromkeys(faulty, module)}
    assert found.first is not None
    assert (found.passed, found.first[0].side, found.first[1].module) == (False, "onnxruntime", module)
    block = module.removesuffix(".pwconv1").removesuffix(".affine").removesuffix(".grn")
    assert document(found)["first_divergence"]["block"] == block


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_another_epsilon_is_named_at_its_norm(request: pytest.FixtureRequest, tmp_path: Path, precision: str) -> None:
    artifact = request.getfixturevalue(f"tiny_onnx_{precision}")
    path = planted(artifact, tmp_path, with_epsilon("stages.1.0.norm/LayerNormalization", 0.1))
    assert set(beginnings(compare(artifact, path)).values()) - {None} == {"stages.1.0.norm"}


def test_torchs_default_epsilon_of_1e_5_is_named_at_its_norm(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    path = planted(tiny_onnx_fp32, tmp_path, with_epsilon("stages.2.0.norm/LayerNormalization", 1e-5))
    assert beginnings(compare(tiny_onnx_fp32, path)) == {"onnxruntime": "stages.2.0.norm"}


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
    engines_gate = [replace(SIDES[1], name="tensorrt")]
    sound = planted(tiny_onnx_fp32, tmp_path, with_the_models_weights)
    assert compare(tiny_onnx_fp32, sound, tiny_model, sides=engines_gate).passed
    path = planted(tiny_onnx_fp32, tmp_path, with_the_fault)
    found = compare(tiny_onnx_fp32, path, tiny_model, sides=engines_gate)
    assert found.first is not None
    assert (found.first[1].module, found.first[1].verdict, found.passed) == ("stages.2.0.pwconv1", "jumps", False)
    assert next(tap.module for tap in found.sides[0].taps if tap.fails) == "stages.2.0.pwconv2"


def test_of_two_sides_the_one_that_parts_at_the_least_depth_is_named(sound: dict[str, LayerComparison]) -> None:
    torch_side, ort, emulator, _ = sound["fp16"].sides

    def failing(side: SideResult, module: str) -> SideResult:
        taps = [tap if tap.module != module else replace(tap, verdict="fails") for tap in side.taps]
        return replace(side, taps=tuple(taps))

    sides = (torch_side, failing(ort, "norm"), failing(emulator, "stages.0.0"))
    first = replace(sound["fp16"], sides=sides).first
    assert first is not None
    assert (first[0].side, first[1].module) == ("emulator", "stages.0.0")


def test_a_jump_alone_is_said_and_is_no_failure(sound: dict[str, LayerComparison]) -> None:
    side = sound["fp32"].sides[1]
    taps = [tap if tap.module != "norm" else replace(tap, verdict="jumps") for tap in side.taps]
    found = replace(sound["fp32"], sides=(replace(side, taps=tuple(taps)),))
    assert (found.passed, found.first) == (True, None)
    assert "jumps at norm" in "\n".join(table(found))


def test_of_two_faults_the_first_is_named(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    def both(model: onnx.ModelProto) -> None:
        with_constant("head.bias", shifted)(model)
        with_constant("stages.0.0.pwconv1.bias", shifted)(model)

    assert beginnings(compare(tiny_onnx_fp32, planted(tiny_onnx_fp32, tmp_path, both))) == {
        "onnxruntime": "stages.0.0.pwconv1"
    }


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
    emulator = next(side for side in found.sides if side.side == "emulator")
    assert emulator.begins is not None
    assert emulator.begins.verdict == "not finite"
    assert any("FIRST DIVERGENCE: stages.2.0.pwconv2" in line for line in table(found))


def test_positions_in_another_order_are_told_from_other_values(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    def swap_rows_and_columns(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.name == "stages.0.0/Transpose")
        node.attribute[0].ints[:] = [0, 3, 2, 1]

    found = compare(tiny_onnx_fp16, planted(tiny_onnx_fp16, tmp_path, swap_rows_and_columns))
    assert found.first is not None
    assert (found.first[1].module, found.first[1].verdict) == ("stages.0.0.norm", "other order")


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


def test_a_fault_that_taps_hide_shows_in_the_logits_of_the_file_as_deployed(
    tiny_onnx_fp32: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tapped copy is made of the sound file: what then differs is the deployed one alone."""
    path = planted(tiny_onnx_fp32, tmp_path, with_constant("head.bias", shifted))
    monkeypatch.setattr(layers_sides, "tapped_copy", lambda _, tensors: tapped_copy(tiny_onnx_fp32.path, tensors))
    assert beginnings(compare(tiny_onnx_fp32, path)) == {"onnxruntime": LOGITS}


# Files that cannot be lined up


def renamed(prefix: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        for index, node in enumerate(model.graph.node):
            if node.name.startswith(prefix):
                node.name = f"node_{index}/{node.op_type}"

    return change


def test_a_file_with_other_node_names_is_refused(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"names none of the network's 52 modules .* 'node_0/"):
        compare(tiny_onnx_fp32, planted(tiny_onnx_fp32, tmp_path, renamed("")))


def test_one_module_without_a_name_is_listed_and_is_no_pass(tiny_onnx_fp32: Artifact, tmp_path: Path) -> None:
    found = compare(tiny_onnx_fp32, planted(tiny_onnx_fp32, tmp_path, renamed("stages.2.1.pwconv1/")))
    assert found.missing["stages.2.1.pwconv1"] == "no node is named after it"
    assert [module for module in found.missing if module.startswith("node_")]
    assert (found.passed, found.first) == (False, None)
    assert "no side diverges, but not every module was compared" in list(table(found))


def test_a_node_that_nothing_outside_its_module_reads_is_not_its_output(
    tiny_onnx_fp32: Artifact, tmp_path: Path
) -> None:
    tapped = {tap.module: tap for tap in taps_in_file(tiny_onnx_fp32.path, ("stages.0.0.act",)).found}

    def add_a_dead_end(model: onnx.ModelProto) -> None:
        tensor = tapped["stages.0.0.act"].tensor
        model.graph.node.append(onnx.helper.make_node("Identity", [tensor], ["dead"], name="stages.0.0.act/Identity"))
        model.graph.node.append(onnx.helper.make_node("Identity", ["dead"], ["end"], name="stages.0.0.act/Identity_2"))

    path = planted(tiny_onnx_fp32, tmp_path, add_a_dead_end)
    assert tapped["stages.0.0.act"] in taps_in_file(path, ("stages.0.0.act",)).found


def test_another_shape_is_not_lined_up_and_fails() -> None:
    found = compared("norm", [(torch.zeros(2, 4, 8), torch.zeros(2, 8, 3, 3))], GATES["fp16"])
    assert (found.verdict, found.fails, found.figures) == ("not lined up", True, None)
    assert "(2, 4, 8), the reference's (2, 9, 8)" in found.reason


def test_a_file_that_is_no_onnx_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"garbage, not protobuf")
    with pytest.raises(CorruptArtifactError, match="not an ONNX model"):
        taps_in_file(tmp_path / "x.onnx", ("head",))


def test_an_engine_is_refused_with_the_name_of_its_source(tiny_engine: Artifact) -> None:
    with pytest.raises(InputError, match=r"Name the file it was built from, tiny-test-32-fp16\.onnx"):
        layers_of_artifact(tiny_engine)


def test_more_images_than_fit_are_refused(tiny_onnx_fp32: Artifact) -> None:
    with pytest.raises(InputError, match="1 to 8 images, not 9"):
        layers_of_artifact(tiny_onnx_fp32, samples=9)


# The rule


def tap(error: float, verdict: str = "ok") -> TapResult:
    return TapResult("m", verdict, Figures(error, 1.0, 0, 1.0))  # type: ignore[arg-type]


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
def test_a_jump_is_four_times_all_taps_before_and_one_rounding(errors: list[float], verdicts: list[str]) -> None:
    assert [found.verdict for found in with_jumps(map(tap, errors), 5e-7)] == verdicts


def test_a_tap_that_fails_is_no_jump_as_well() -> None:
    assert [found.verdict for found in with_jumps([tap(1e-6), tap(1.0, "fails")], 5e-7)] == ["ok", "fails"]


@pytest.mark.parametrize(("factor", "verdict"), [(0.99, "ok"), (1.01, "fails")])
def test_the_gates_relative_l2_of_the_worst_sample_is_the_limit(factor: float, verdict: str) -> None:
    reference = torch.ones(2, 3, 4, dtype=torch.float64)
    candidate = reference.clone()
    candidate[1] += factor * GATES["fp16"].relative_l2_max
    assert compared("m", [(candidate, reference)], GATES["fp16"]).verdict == verdict


def test_the_worst_of_all_batches_counts() -> None:
    good, bad = torch.ones(1, 3), torch.tensor([[1.0, 1.0, 2.0]])
    pairs = [(good, good), (bad, good), (good, good)]
    found = compared("m", pairs, GATES["fp16"])
    assert found.figures == Figures(pytest.approx(3**-0.5), pytest.approx(4 / 18**0.5), 0, 2.0)  # type: ignore[arg-type]


def test_zero_on_both_sides_agrees_and_zero_on_one_does_not() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert [compared("m", [pair], GATES["fp32"]).verdict for pair in ((zero, zero), (one, zero), (zero, one))] == [
        "ok",
        "fails",
        "fails",
    ]


@pytest.mark.parametrize(
    ("shape", "expected"), [((2, 8, 3, 5), (2, 15, 8)), ((2, 15, 8), (2, 15, 8)), ((2, 8), (2, 1, 8))]
)
def test_the_canonical_view_is_samples_positions_channels(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert canonical(torch.zeros(shape)).shape == expected
