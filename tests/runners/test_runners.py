"""Runners refuse what their model does not take, and ONNX Runtime computes what PyTorch does."""

import onnx
import onnxruntime
import pytest
import torch

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import CorruptArtifactError, InputError, MissingRequirementError
from cnx_deploy.core.gates import GATES
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.data.input_spec import InputSpec, check_input
from cnx_deploy.runners.onnxruntime import OrtRunner
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.parity import differences

SPEC = DeploySpec("fp32", 32)


def images_for(spec: DeploySpec, count: int) -> torch.Tensor:
    return runner_input(torch.cat(list(image_like_batches(count, spec.image_size, batch_size=count))), spec.input_kind)


def with_fixed_batch(source, path, batch):
    """A copy of an ONNX file that takes this batch only."""
    model = onnx.load(source)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    onnx.save(model, path)
    return path


@pytest.fixture(params=["onnxruntime", "torch reference", "torch deploy form"])
def runner(request, tiny_model, tiny_onnx_fp32):
    """Each runner of the same network: FP32, float images of 32 px."""
    return {
        "onnxruntime": lambda: OrtRunner(tiny_onnx_fp32.path),
        "torch reference": lambda: reference_runner(tiny_model, SPEC),
        "torch deploy form": lambda: deployed_runner(tiny_model, SPEC),
    }[request.param]()


# What is refused


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8])
def test_wrong_dtype_input_is_refused_and_not_cast(runner, dtype):
    with pytest.raises(InputError, match=r"shape \(N, 3, 32, 32\) float32, not \(2, 3, 32, 32\)"):
        runner.run(torch.zeros(2, 3, 32, 32, dtype=dtype))


def test_wrong_layout_input_is_refused_with_a_hint(runner):
    with pytest.raises(InputError, match="channel axis may be in the wrong place"):
        runner.run(torch.zeros(2, 32, 32, 3))


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (2, 3, 32, 64), (2, 1, 32, 32), (3, 32, 32), (), (2, 3, 32, 32, 1)])
def test_dynamic_resolution_another_shape_is_refused(runner, shape):
    with pytest.raises(InputError, match="The model takes images of shape"):
        runner.run(torch.zeros(shape))


def test_another_size_gets_no_hint_about_channels(runner):
    with pytest.raises(InputError) as caught:
        runner.run(torch.zeros(2, 1, 64, 64))
    assert "permute" not in str(caught.value)


def test_dynamic_batch_bounds_of_an_empty_batch(runner):
    with pytest.raises(InputError, match="A batch of 0 is outside"):
        runner.run(torch.zeros(0, 3, 32, 32))


@pytest.mark.parametrize(("batch", "fits"), [(1, False), (2, True), (4, True), (5, False)])
def test_dynamic_batch_bounds_are_told(batch, fits):
    spec = InputSpec("float", 32, 2, 4)
    if fits:
        check_input(torch.zeros(batch, 3, 32, 32), spec)
    else:
        with pytest.raises(InputError, match=f"A batch of {batch} is outside the model's range of 2 to 4"):
            check_input(torch.zeros(batch, 3, 32, 32), spec)


def test_wrong_layout_input_of_raw_bytes():
    spec = InputSpec("uint8", 32)
    check_input(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), spec)
    with pytest.raises(InputError, match="permute the images"):
        check_input(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), spec)


def test_a_file_that_is_no_onnx_is_corrupt(tmp_path):
    (tmp_path / "garbage.onnx").write_bytes(b"garbage, not protobuf")
    with pytest.raises(CorruptArtifactError, match=r"ONNX Runtime cannot read .*garbage\.onnx"):
        OrtRunner(tmp_path / "garbage.onnx")


def test_ep_silent_fallback_is_an_error_and_not_a_cpu_number(tiny_onnx_fp32):
    if torch.cuda.is_available():
        pytest.skip("CUDA is usable here, so the provider is not missing")
    with pytest.raises(MissingRequirementError, match="CUDAExecutionProvider"):
        OrtRunner(tiny_onnx_fp32.path, device="cuda")


# The same numbers


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_parity_all_variants_fp32_onnx_runtime_equals_torch(tiny_model, tiny_onnx_fp32, batch):
    images = images_for(SPEC, batch)
    found = OrtRunner(tiny_onnx_fp32.path).run(images)["logits"]
    expected = reference_runner(tiny_model, SPEC).run(images)["logits"]
    assert GATES["fp32"].failures(differences(found, expected)) == ()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_runtime_on_the_fp16_file_passes_the_fp16_gate(tiny_model, tiny_onnx_fp16, batch):
    images = images_for(SPEC, batch)
    found = OrtRunner(tiny_onnx_fp16.path).run(images)["logits"]
    expected = reference_runner(tiny_model, SPEC).run(images)["logits"]
    assert GATES["fp16"].failures(differences(found, expected)) == ()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_optimisations_do_not_change_the_answer(request, precision):
    path = request.getfixturevalue(f"tiny_onnx_{precision}").path
    images = images_for(SPEC, 2)
    found, expected = OrtRunner(path).run(images)["logits"], OrtRunner(path, optimise=False).run(images)["logits"]
    assert GATES[precision].failures(differences(found, expected)) == ()


def test_images_that_are_not_contiguous_are_read_right(tiny_onnx_fp32):
    images = images_for(SPEC, 2)
    strided = images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    runner = OrtRunner(tiny_onnx_fp32.path)
    assert not strided.is_contiguous()
    assert torch.equal(runner.run(strided)["logits"], runner.run(images)["logits"])


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_with_images_of_their_own_give_each_image_its_own_logits_to_the_bit(tiny_onnx_fp32, batch, threads):
    images = images_for(SPEC, batch)
    with OrtRunner(tiny_onnx_fp32.path, threads=threads, thread_per_image=True) as runner:
        found = runner.run(images)["logits"]
        assert torch.equal(runner.run(images)["logits"], found)
    alone = OrtRunner(tiny_onnx_fp32.path, threads=1)
    assert torch.equal(found, torch.cat([alone.run(image[None])["logits"].clone() for image in images]))
    expected = alone.run(images)["logits"]
    assert GATES["fp32"].failures(differences(found, expected)) == ()
    swapped = expected.roll(1, dims=0)
    assert batch == 1 or GATES["fp32"].failures(differences(found, swapped))


@pytest.mark.parametrize(("batch", "alone", "together"), [(1, 0, [1]), (2, 2, []), (3, 2, [1]), (8, 8, [])])
def test_images_left_over_are_run_by_all_threads(tiny_onnx_fp32, batch, alone, together, monkeypatch):
    runner = OrtRunner(tiny_onnx_fp32.path, threads=2, thread_per_image=True)
    calls = []
    monkeypatch.setattr(
        runner,
        "_bound_run",
        lambda session, images, outputs, rows: calls.append((session is runner._session, rows.stop - rows.start)),
    )
    runner.run(images_for(SPEC, batch))
    assert [size for by_all, size in calls if by_all] == together
    assert [size for by_all, size in calls if not by_all] == [1] * alone


def test_an_error_in_a_thread_with_its_own_images_reaches_the_caller(tiny_onnx_fp32, monkeypatch):
    runner = OrtRunner(tiny_onnx_fp32.path, threads=2, thread_per_image=True)

    def fail(*_):
        raise RuntimeError("planted")

    monkeypatch.setattr(runner, "_run_each", fail)
    with pytest.raises(RuntimeError, match="planted"):
        runner.run(images_for(SPEC, 2))


def test_a_file_of_a_fixed_batch_shares_operators(tiny_onnx_fp32, tmp_path):
    fixed = with_fixed_batch(tiny_onnx_fp32.path, tmp_path / "fixed.onnx", 4)
    runner = OrtRunner(fixed, threads=2, thread_per_image=True)
    assert dict(runner.info.details)["a thread has"] == "a share of each operator"
    assert runner.run(images_for(SPEC, 4))["logits"].shape[0] == 4


def test_batch_invariance_of_onnx_runtime(runner):
    images = images_for(SPEC, 4)
    alone = torch.cat([runner.run(image[None])["logits"].clone() for image in images])
    assert GATES["fp32"].failures(differences(runner.run(images)["logits"], alone)) == ()


def test_logits_are_float32(runner):
    assert runner.run(images_for(SPEC, 1))["logits"].dtype == torch.float32


def test_raw_bytes_and_floats_give_the_reference_the_same_logits(tiny_model):
    bytes_spec = DeploySpec("fp32", 32, "uint8")
    on_bytes = reference_runner(tiny_model, bytes_spec).run(images_for(bytes_spec, 3))["logits"]
    on_floats = reference_runner(tiny_model, SPEC).run(images_for(SPEC, 3))["logits"]
    assert GATES["fp32"].failures(differences(on_bytes, on_floats)) == ()


def test_the_reference_of_a_training_model_is_in_evaluation_mode(tiny_model):
    tiny_model.stage_blocks()[0][0].drop_path.p = 0.9
    images = images_for(SPEC, 4)
    expected = reference_runner(tiny_model.eval(), SPEC).run(images)["logits"]
    assert torch.equal(reference_runner(tiny_model.train(), SPEC).run(images)["logits"], expected)


def test_half_arithmetic_on_the_cpu_rounds(tiny_model):
    spec = DeploySpec("fp16", 32)
    images = images_for(spec, 2)
    found = differences(
        deployed_runner(tiny_model, spec).run(images)["logits"],
        reference_runner(tiny_model, spec).run(images)["logits"],
    )
    assert 1e-4 < found.relative_l2_max < GATES["fp16"].relative_l2_max


# What a runner says of itself


def test_onnx_runtime_on_a_cpu_says_that_it_computes_fp16_files_in_fp32(tiny_onnx_fp16):
    info = OrtRunner(tiny_onnx_fp16.path).info
    assert (info.precision, info.arithmetic) == ("fp16", "fp32")


def test_onnx_runtime_says_its_version_provider_and_threads(tiny_onnx_fp32):
    info = OrtRunner(tiny_onnx_fp32.path, threads=1).info
    details = dict(info.details)
    assert (info.version, details["provider"], details["threads"]) == (
        onnxruntime.__version__,
        "CPUExecutionProvider",
        "1",
    )


def test_a_file_of_ours_takes_the_batches_it_was_exported_for(tiny_onnx_fp32):
    runner = OrtRunner(tiny_onnx_fp32.path)
    assert runner.input_spec == InputSpec("float", 32, 1, 8)
    with pytest.raises(InputError, match="batch of 9 is outside the model's range of 1 to 8"):
        runner.run(torch.rand(9, 3, 32, 32))


def test_a_file_that_names_no_range_takes_any_batch(tmp_path, tiny_onnx_fp32):
    model = onnx.load(tiny_onnx_fp32.path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    assert OrtRunner(tmp_path / "plain.onnx").input_spec == InputSpec("float", 32, 1, None)


def test_a_file_of_a_fixed_batch_takes_that_batch_only(tmp_path, tiny_onnx_fp32):
    fixed = with_fixed_batch(tiny_onnx_fp32.path, tmp_path / "fixed.onnx", 4)
    assert OrtRunner(fixed).input_spec == InputSpec("float", 32, 4, 4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_torch_runner_says_its_precision(tiny_model, precision):
    assert deployed_runner(tiny_model, DeploySpec(precision, 32)).info.precision == precision


def test_a_runner_is_its_own_context(runner):
    with runner as entered:
        assert entered is runner


@pytest.mark.parametrize(("spin", "said"), [(True, "within a call"), (False, "off")])
def test_threads_that_spin_stop_after_the_call(tiny_onnx_fp32, spin, said, monkeypatch):
    given = {}

    class Recorded(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key, value):
            given[key] = value
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnxruntime, "SessionOptions", Recorded)
    info = OrtRunner(tiny_onnx_fp32.path, spin=spin).info
    assert dict(info.details)["spinning"] == said
    assert given["session.intra_op.allow_spinning"] == str(int(spin))
    assert given["session.force_spinning_stop"] == "1"
