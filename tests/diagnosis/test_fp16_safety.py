"""FP16 files stay finite and right where the naive way of writing the network overflows, operator by operator.

ONNX Runtime on a CPU is no witness here, for it computes FP16 in FP32; the emulator rounds after every operator.
"""

from pathlib import Path

import pytest
import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.gates import GATES, Differences
from cnx_deploy.core.manifest import ModelRecord, WeightsRecord
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.core.variants import VARIANTS, Variant
from cnx_deploy.diagnosis.mixed_precision import MixedForm
from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.runners.emulated import EmulatedRunner
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import differences
from tests.support.hot_networks import (
    HALF_MAX,
    images_for,
    largest_response,
    naive_half_file,
    naive_limit,
    recorded,
    with_hot_responses,
    with_hot_stream,
)

SIZE = 64
FACTORS = (2.0, 5.0, 10.0, 50.0)
FORMS = {
    "gpu": DeploySpec("fp16", SIZE),
    "cpu": DeploySpec("fp16", SIZE, layout="cpu"),
    "uint8": DeploySpec("fp16", SIZE, input_kind="uint8"),
    "no-folds": DeploySpec("fp16", SIZE, leave_out=("grn-beta", "grn-gain", "norm-affine", "downsample-affine")),
}
WIDE = Variant("wide-test", (1, 1, 1, 1), (8, 16, 32, 1024), 0, 0.0)
"""The last stage of base: LayerNorm over 1024 channels."""


def exported(model: ConvNeXtV2, spec: DeploySpec, folder: Path) -> Path:
    weights = WeightsRecord("random", "0", "0" * 64, "none (random weights)")
    record = ModelRecord(model.variant.name, model.num_classes, spec.image_size, weights, Preprocessing())
    return export_onnx(model, record, ExportSpec(deploy=spec, batch=(2, 2, 2)), folder).path


def against_float64(runner: EmulatedRunner | OrtRunner, model: ConvNeXtV2, spec: DeploySpec) -> Differences:
    """Logits of a file against the training form in float64."""
    images = images_for(spec.image_size, kind=spec.input_kind)
    found = runner.run(images)["logits"]
    return differences(found, reference_runner(model.double(), spec).run(images)["logits"])


def assert_safe(model: ConvNeXtV2, spec: DeploySpec, folder: Path) -> None:
    runner = EmulatedRunner(exported(model, spec, folder))
    images = images_for(spec.image_size, kind=spec.input_kind)
    assert runner.evaluate(images).first_nonfinite is None
    found = against_float64(runner, model, spec)
    assert (GATES["fp16"].failures(found), found.centred_cosine_min >= 0.9995) == ((), True)


@pytest.mark.parametrize("factor", [pytest.param(FACTORS[0], marks=pytest.mark.slow), FACTORS[-1]])
def test_parity_fp16_stress_no_overflow_of_hot_responses(tiny_variant, tmp_path, factor):
    model = with_hot_responses(tiny_variant, SIZE, factor)
    for block in model.stage_blocks()[0]:
        assert largest_response(model, block, SIZE) == pytest.approx(factor * naive_limit(SIZE), rel=0.05)
    assert_safe(model, FORMS["gpu"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "uint8"])
def test_parity_fp16_stress_no_overflow_in_every_form(tiny_variant, tmp_path, form):
    assert_safe(with_hot_responses(tiny_variant, SIZE, FACTORS[-1]), FORMS[form], tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_parity_fp16_stress_no_overflow_in_every_form_before_it_is_exported(tiny_variant, form):
    """The deploy form itself, each operator's result rounded as in the file: an export takes seconds."""
    model, spec = with_hot_responses(tiny_variant, SIZE, FACTORS[-1]), FORMS[form]
    images = images_for(SIZE, kind=spec.input_kind)
    found = MixedForm(model, spec).outputs((images,))["logits"]
    expected = reference_runner(model.double(), spec).run(images)["logits"]
    assert GATES["fp16"].failures(differences(found, expected)) == ()


def test_parity_fp16_stress_no_overflow_but_in_the_naive_way_which_onnx_runtime_hides(tiny_variant, tmp_path):
    model = with_hot_responses(tiny_variant, SIZE, FACTORS[0])
    path = naive_half_file(model, SIZE, tmp_path / "naive.onnx")
    emulated = EmulatedRunner(path)
    assert not bool(torch.isfinite(emulated.run(images_for(SIZE))["logits"]).any())
    spec = DeploySpec("fp16", SIZE)
    assert GATES["fp16"].failures(against_float64(emulated, model, spec))
    assert GATES["fp16"].failures(against_float64(OrtRunner(path), model, spec)) == ()


@pytest.mark.slow
def test_the_naive_way_is_right_below_its_limit(tiny_variant, tmp_path):
    model = with_hot_responses(tiny_variant, SIZE, 0.5)
    emulated = EmulatedRunner(naive_half_file(model, SIZE, tmp_path / "naive.onnx"))
    assert GATES["fp16"].failures(against_float64(emulated, model, DeploySpec("fp16", SIZE))) == ()


@pytest.mark.slow
def test_parity_fp16_stress_no_overflow_of_layer_norm_over_1024_channels_but_in_the_naive_way(tmp_path):
    model = with_hot_stream(WIDE, SIZE, sigma=300.0)
    stage = model.stages[3]
    assert float(recorded(model, stage[0].dwconv, SIZE).std()) == pytest.approx(300.0, rel=0.05)
    naive = EmulatedRunner(naive_half_file(model, SIZE, tmp_path / "naive.onnx"))
    assert GATES["fp16"].failures(against_float64(naive, model, FORMS["gpu"]))
    assert_safe(model.float(), FORMS["gpu"], tmp_path)


@pytest.mark.slow
def test_parity_fp16_stress_no_overflow_of_a_channels_first_norm_but_in_the_naive_way(tiny_variant, tmp_path):
    model = with_hot_stream(tiny_variant, SIZE, sigma=300.0, stage=2)
    assert float(recorded(model, model.stages[2], SIZE).abs().max()) ** 2 > HALF_MAX
    naive = EmulatedRunner(naive_half_file(model.float(), SIZE, tmp_path / "naive.onnx"))
    assert GATES["fp16"].failures(against_float64(naive, model, DeploySpec("fp16", SIZE)))
    assert_safe(model.float(), FORMS["gpu"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("form", FORMS)
def test_parity_fp16_stress_no_overflow_of_atto_in_every_form_at_every_heat(tmp_path, form, factor):
    assert_safe(with_hot_responses(VARIANTS["atto"], SIZE, factor), FORMS[form], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [FACTORS[0], FACTORS[-1]])
@pytest.mark.parametrize("name", VARIANTS)
def test_parity_fp16_stress_no_overflow_of_any_variant(tmp_path, name, factor):
    assert_safe(with_hot_responses(VARIANTS[name], SIZE, factor), FORMS["gpu"], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 384])
def test_parity_fp16_stress_no_overflow_at_224_and_384_but_in_the_naive_way(tmp_path, size):
    model = with_hot_responses(VARIANTS["atto"], size, 2.0)
    naive = EmulatedRunner(naive_half_file(model, size, tmp_path / "naive.onnx"))
    assert GATES["fp16"].failures(against_float64(naive, model, DeploySpec("fp16", size)))
    assert_safe(model.float(), DeploySpec("fp16", size), tmp_path)
