"""Properties that hold for any network and request, on inputs that nobody chose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnx_deploy.core.deploy_spec import FOLDS, DeploySpec
from cnx_deploy.core.gates import GATES
from cnx_deploy.core.variants import Variant
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.convnextv2 import random_model
from cnx_deploy.model.deploy import parts_of
from cnx_deploy.runners.pytorch import deployed_runner, reference_runner
from cnx_deploy.verification.parity import differences

variants = st.builds(
    lambda depths, widths: Variant("drawn", tuple(depths), tuple(8 * width for width in widths), 0, 0.0),
    st.lists(st.integers(1, 2), min_size=4, max_size=4),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
)
specs = st.builds(
    DeploySpec,
    precision=st.just("fp64"),
    image_size=st.sampled_from([32, 64, 96]),
    input_kind=st.sampled_from(["float", "uint8"]),
    layout=st.sampled_from(["gpu", "cpu", "openvino"]),
    mean=st.tuples(*[st.floats(0.0, 1.0)] * 3),
    std=st.tuples(*[st.floats(0.05, 1.0)] * 3),
    leave_out=st.sets(st.sampled_from(sorted(FOLDS)), max_size=4).map(tuple),
)
bounded = settings(max_examples=10, deadline=None, derandomize=True, database=None)
"""The same examples on every run: a test that fails now and then is looked at by nobody.

Of a network, which takes longest, several requests are tried.
"""


@bounded
@given(variants, st.lists(specs, min_size=3, max_size=3), st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**31))
def test_the_deploy_form_is_the_training_form(variant, asked, batch, classes, seed) -> None:
    """In float64, for any depths, widths, image size, batch, class count, input, layout, statistics and folds."""
    model = random_model(variant, classes, seed=seed).double()
    for spec in asked:
        pixels = next(image_like_batches(batch, spec.image_size, batch_size=batch, seed=seed))
        images = runner_input(pixels, spec.input_kind)
        found = deployed_runner(model, spec).run(images)["logits"]
        expected = reference_runner(model, spec).run(images)["logits"]
        assert found.shape == (batch, classes)
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-11


@bounded
@given(variants, st.integers(2, 6), st.integers(0, 2**31))
def test_batch_invariance_of_the_deploy_form(variant, batch, seed) -> None:
    model = random_model(variant, 4, seed=seed).double()
    images = torch.rand(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    for layout in ("gpu", "cpu", "openvino"):
        runner = deployed_runner(model, DeploySpec("fp64", 32, layout=layout))
        alone = torch.cat([runner.run(image[None])["logits"] for image in images])
        torch.testing.assert_close(runner.run(images[order])["logits"], alone[order], rtol=1e-10, atol=1e-10)


@bounded
@given(variants, st.data())
def test_whatever_is_kept_in_fp32_the_file_passes_the_half_gate(variant, data) -> None:
    model = random_model(variant, 10, seed=0)
    images = runner_input(next(image_like_batches(2, 32, batch_size=2)), "float")
    expected = reference_runner(model, DeploySpec(image_size=32)).run(images)["logits"]
    for layout in ("gpu", "cpu", "openvino"):
        kept = tuple(data.draw(st.sets(st.sampled_from(parts_of(variant)), max_size=5)))
        spec = DeploySpec("fp16", 32, layout=layout, keep_fp32=kept)
        found = differences(deployed_runner(model, spec).run(images)["logits"], expected)
        assert found.relative_l2_max < GATES["fp16"].relative_l2_max


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 8), st.integers(1, 12), st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.data())
def test_parity_nan_never_passes_wherever_it_is(samples, classes, value, data) -> None:
    """On either side or on both, at the same place or not, whatever the other logits are."""
    logits = torch.rand(samples, classes, dtype=torch.float64)
    candidate, reference = logits.clone(), logits.clone()
    sides = data.draw(st.sampled_from([(candidate,), (reference,), (candidate, reference)]))
    place = data.draw(st.integers(0, logits.numel() - 1))
    for side in sides:
        side.view(-1)[place] = value
    found = differences(candidate, reference)
    for gate in GATES.values():
        assert gate.failures(found)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 8), st.integers(2, 12), st.floats(1e-3, 1e3))
def test_a_gate_is_as_strict_for_small_logits_as_for_large_ones(samples, classes, scale) -> None:
    reference = torch.randn(samples, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(samples))
    for gate in GATES.values():
        relative = [2.0 * gate.relative_l2_max, 0.1 * gate.relative_l2_max * gate.relative_l2_max]
        wrong, right = ((reference * scale) * (1.0 + error) for error in relative)
        assert any(text.startswith("relative L2") for text in gate.failures(differences(wrong, reference * scale)))
        assert not any(text.startswith("relative L2") for text in gate.failures(differences(right, reference * scale)))


def test_a_gate_that_passes_equal_logits_is_no_gate_for_others() -> None:
    logits = torch.randn(8, 10, dtype=torch.float64)
    for gate in GATES.values():
        assert gate.failures(differences(logits, logits)) == ()
        assert gate.failures(differences(logits.roll(1, dims=1), logits))
