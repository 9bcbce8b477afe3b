"""Blocks in eight bits: gains change nothing, tensors are rounded where it is said, and the file says the same."""

import random
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.eight_bits import GAIN_FOLDS, LETTERS, PARTS, PLACEMENTS, BlockScales, EightBits
from cnx_deploy.core.errors import InputError
from cnx_deploy.exporters.onnx import ExportSpec, _graph_from_module, _name_nodes
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.deploy import deploy_form
from cnx_deploy.model.quantised import EvenedResponseGain, Product, QuantisedBlock, Quantiser
from tests.model.test_deploy import EXACT, deployed_logits, images_for, relative_difference

SIDE = 64
"""At this size the smallest network has blocks of both kinds: gain in the weight, and hidden tensor scaled."""


def blocks_of(model: ConvNeXtV2, placement: str, spec: DeploySpec) -> dict[str, QuantisedBlock]:
    names = [f"stages.{stage}.{index}" for stage, depth in enumerate(model.variant.depths) for index in range(depth)]
    record = EightBits(
        placement=placement, blocks={name: BlockScales(scales={}) for name in names}, method="max", images=0,
        data_sha256="",
    )  # fmt: skip
    form = deploy_form(model, replace(spec, precision="fp32", eight_bits=record, layout="gpu"))
    return {name: form.get_submodule(name) for name in names}  # type: ignore[misc]


def record_for(
    model: ConvNeXtV2, placement: str, spec: DeploySpec, *, rounds: bool = True, gains: tuple[str, ...] = tuple("xphso")
) -> EightBits:
    """Made-up scales, and gains that differ from channel to channel."""
    chance, blocks = random.Random(0), {}
    for name, block in blocks_of(model, placement, spec).items():
        letters = [letter for letter in block.letters if letter in PLACEMENTS[placement].types]
        width = block.dwconv.in_channels
        exponents = {
            letter: " ".join(str(chance.randint(-4, 4)) for _ in range(width if letter in "xo" else 4 * width))
            for letter in gains
            if letter in letters
        }
        scales = {letter: 2.0**-7 if letter in ("w1", "w2", "g") else 2.0**-4 for letter in letters}
        blocks[name] = BlockScales(scales=scales if rounds else {}, gains=exponents)
    return EightBits(placement=placement, blocks=blocks, method="max", images=1, data_sha256="0" * 64)


@pytest.fixture(params=["V2", "V1"])
def model(request: pytest.FixtureRequest, tiny_model: ConvNeXtV2, tiny_v1_model: ConvNeXtV2) -> ConvNeXtV2:
    return tiny_model if request.param == "V2" else tiny_v1_model


# Gains


@pytest.mark.parametrize("size_range", [None, (32, 96)])
@pytest.mark.parametrize("letter", ["p", "h", "s", "o", "x", "xphso"])
def test_in_float64_gains_change_nothing(model, letter, size_range):
    spec = DeploySpec("fp64", SIDE, layout="gpu", size_range=size_range)
    record = record_for(model, "int8", spec, rounds=False, gains=tuple(letter))
    assert any(block.gains for block in record.blocks.values()) or (letter == "s" and model.variant.version == 1)
    assert relative_difference(model, replace(spec, eight_bits=record)) < EXACT


def test_both_kinds_of_block_are_tested(tiny_model):
    blocks = blocks_of(tiny_model, "int8", DeploySpec("fp32", SIDE, layout="gpu"))
    assert {block.scales_hidden for block in blocks.values()} == {True, False}


@pytest.mark.parametrize("fault", ["norm", "product", "square_factor", "factor", "second"])
def test_a_gain_that_is_not_taken_back_is_seen(tiny_model, fault):
    spec = DeploySpec("fp64", SIDE, layout="gpu")
    record = record_for(tiny_model, "int8", spec, rounds=False)
    form = deploy_form(tiny_model, replace(spec, eight_bits=record))
    for module in form.modules():
        if fault == "norm" and isinstance(module, QuantisedBlock):
            module.norm.gain.data.fill_(1.0)
        if fault == "product" and isinstance(module, Product):
            module.inverse = None
        if fault == "square_factor" and isinstance(module, EvenedResponseGain):
            module.square_factor.data.fill_(1.0)
        if fault == "factor" and isinstance(module, EvenedResponseGain):
            module.factor.data.fill_(1.0)
        if fault == "second" and isinstance(module, QuantisedBlock) and module.hidden_gain is not None:
            module.hidden_gain.data.fill_(1.0)
    assert relative_difference(tiny_model, spec, form) > 1e-6


def test_every_gain_has_a_fold_and_every_letter_a_part():
    assert GAIN_FOLDS.keys() == {letter for placement in PLACEMENTS.values() for letter in placement.gains}
    assert PARTS.keys() == LETTERS.keys() == {letter for row in PLACEMENTS.values() for letter in row.types}


# Rounding


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_quantiser_is_onnx_quantize_and_dequantize(kind, dtype):
    scale = 0.0498046875  # an FP16 number
    values = torch.cat([torch.linspace(-30.0, 30.0, 4001), torch.arange(-300, 300) * scale / 2]).to(dtype)
    element = onnx.TensorProto.INT8 if kind == "int8" else onnx.TensorProto.FLOAT8E4M3FN
    given = onnx.helper.np_dtype_to_tensor_dtype(values.numpy().dtype)
    scales = onnx.numpy_helper.from_array(np.array(scale, values.numpy().dtype), "scale")
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], output_dtype=element),
            onnx.helper.make_node("DequantizeLinear", ["q", "scale"], ["y"]),
        ],
        "qdq",
        [onnx.helper.make_tensor_value_info("x", given, [None])],
        [onnx.helper.make_tensor_value_info("y", given, [None])],
        [scales],
    )
    import onnxruntime

    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": values.numpy()})
    found = Quantiser(scale, kind)(values)
    assert found.dtype == dtype
    assert torch.equal(found, torch.from_numpy(expected))
    assert not torch.equal(found, values)


@pytest.mark.parametrize("placement", ["fp8", "int8"])
def test_each_tensor_of_the_placement_takes_eight_bits_and_no_other(model, placement):
    spec = DeploySpec("fp32", SIDE, layout="gpu")
    spec = replace(spec, precision=placement, eight_bits=record_for(model, placement, spec))
    form = deploy_form(model, spec)
    for block in (module for module in form.modules() if isinstance(module, QuantisedBlock)):
        stored = {letter for letter in block.letters if letter in PLACEMENTS[placement].types}
        constants = {letter for letter, constant in block.constants.items() if constant.weight is None}
        assert constants == stored & block.constants.keys()
        assert set(block.taps) == stored - constants
        assert {block.taps[letter].kind for letter in block.taps} <= set(PLACEMENTS[placement].types.values())
    stem = form.downsample_layers[0]
    assert all(parameter.dtype == torch.float16 for parameter in stem.parameters())


def test_gelus_output_is_read_by_grn_after_it_is_rounded(tiny_model):
    spec = DeploySpec("fp32", SIDE, layout="gpu")
    form = deploy_form(tiny_model, replace(spec, precision="int8", eight_bits=record_for(tiny_model, "int8", spec)))
    seen: list[Tensor] = []
    block = form.stages[0][0]
    block.grn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block.float()
    block.stream_type = torch.float32
    block(torch.rand(1, 8, 16, 16))
    scale = block.taps["h"].scale
    assert torch.equal(seen[0], (seen[0] / scale).round() * scale)


# The file


@pytest.mark.parametrize("placement", ["fp8", "int8"])
def test_the_file_has_one_pair_for_each_tensor_with_one_scale(model, placement):
    spec = DeploySpec("fp32", SIDE, layout="gpu")
    record = record_for(model, placement, spec)
    spec = replace(spec, precision=placement, eight_bits=record)
    graph = _graph_from_module(deploy_form(model, spec), ExportSpec(deploy=spec))
    _name_nodes(graph)
    names = [node.name for node in graph.graph if node.op_type == "DequantizeLinear"]
    expected = [
        f"{name}.{'pwconv1' if letter == 'w1' else 'pwconv2'}.constant/DequantizeLinear"
        if letter in ("w1", "w2") or (letter == "g" and model.variant.version == 1)
        else f"{name}.taps.{letter}/DequantizeLinear"
        for name, block in record.blocks.items()
        for letter in block.scales
    ]
    assert sorted(names) == sorted(expected)
    for node in graph.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].shape.numpy() == ()
            assert len(node.inputs) == 2
    behind = {node.name: [user.op_type for user, _ in node.outputs[0].uses()] for node in graph.graph}
    products = [name for name in behind if name.endswith("/MatMul")]
    assert products
    quantised = {"int8": ("pwconv1", "pwconv2"), "fp8": ("pwconv2",)}[placement]
    for name in products:
        if name.split("/")[0].split(".")[-1] in quantised and name.startswith("stages"):
            assert behind[name] == ["QuantizeLinear"], name


# What is refused


def test_what_contradicts_scales_is_refused(tiny_model):
    spec = DeploySpec("fp32", SIDE, layout="gpu")
    record = record_for(tiny_model, "int8", spec)
    with pytest.raises(InputError, match="of int8, not of fp8"):
        replace(spec, precision="fp8", eight_bits=record)
    with pytest.raises(InputError, match="layout gpu, not cpu"):
        replace(spec, precision="int8", layout="cpu", eight_bits=record)
    with pytest.raises(InputError, match="need the fold grn-gain"):
        replace(spec, precision="int8", leave_out=("grn-gain",), eight_bits=record)
    with pytest.raises(InputError, match="--calibration DATA"):
        deploy_form(tiny_model, replace(spec, precision="int8"))
    assert deployed_logits(deploy_form(tiny_model, spec), images_for(spec)).shape == (4, 10)
