"""The gates let two implementations of one network through and no broken one."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cnx_deploy.core.deploy_spec import DeploySpec
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Gate, OutputSpec
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.model.convnextv2 import ConvNeXtV2
from cnx_deploy.model.layers import GlobalResponseNorm
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification.parity import RunningDifferences, compare, differences, outputs_of

SPEC = DeploySpec("fp32", 64)
VALUES = OutputSpec("maps", (4, 5, 2), "feature")


@pytest.fixture(scope="module")
def batches() -> list[Tensor]:
    """Image-like batches of 7, 2 and 1 at 64 px."""
    pixels = torch.cat(list(image_like_batches(10, 64, batch_size=5)))
    return [runner_input(part, "float") for part in pixels.split([7, 2, 1])]


def verdict(model: ConvNeXtV2, mutate: Callable[[nn.Module], None], batches: list[Tensor], gate: str = "fp32"):
    """Compare a copy of `model`, each of whose modules went through `mutate`, with `model`."""
    changed = copy.deepcopy(model)
    for module in changed.modules():
        mutate(module)
    expected, specs = outputs_of(reference_runner(model, SPEC), batches), model.task.outputs(model.num_classes)
    (result,) = compare(
        reference_runner(changed, SPEC), expected, batches, specs, GATES[gate], reference_name="original"
    )
    return result


# Broken networks


def grn(summed: tuple[int, ...], averaged: int = -1) -> Callable[[nn.Module], None]:
    """Give every GRN other axes than (1, 2) for the norm and -1 for the mean."""

    class OtherAxes(GlobalResponseNorm):
        def forward(self, hidden: Tensor) -> Tensor:
            norm = torch.linalg.vector_norm(hidden, dim=summed, keepdim=True)
            return (
                self.gamma * (norm / (norm.mean(dim=averaged, keepdim=True) + self.eps)) * hidden + self.beta + hidden
            )

    def mutate(module: nn.Module) -> None:
        if isinstance(module, GlobalResponseNorm):
            module.__class__ = OtherAxes

    return mutate


def attribute(kind: type[nn.Module], name: str, value: object) -> Callable[[nn.Module], None]:
    def mutate(module: nn.Module) -> None:
        if isinstance(module, kind):
            setattr(module, name, value)

    return mutate


def zeroed(name: str) -> Callable[[nn.Module], None]:
    def mutate(module: nn.Module) -> None:
        if isinstance(module, GlobalResponseNorm):
            getattr(module, name).data.zero_()

    return mutate


def unchanged(module: nn.Module) -> None:
    return None


MUTANTS = {
    "GRN gamma dropped": zeroed("gamma"),
    "GRN beta dropped": zeroed("beta"),
    "GRN eps 1e-2": attribute(GlobalResponseNorm, "eps", 1e-2),
    "GRN norm over width and channels": grn((2, 3)),
    "GRN mean over positions": grn((1, 2), averaged=1),
    "GRN norm over the batch": grn((0, 1, 2)),
    "tanh GELU": attribute(nn.GELU, "approximate", "tanh"),
    "LayerNorm eps 1e-5": attribute(nn.LayerNorm, "eps", 1e-5),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_parity_detects_broken_grn_and_other_parts_by_the_fp32_gate(tiny_model, batches, mutant):
    assert not verdict(tiny_model, MUTANTS[mutant], batches).passed


@pytest.mark.parametrize("mutant", ["GRN gamma dropped", "GRN beta dropped", "GRN norm over the batch"])
def test_parity_detects_broken_grn_by_the_fp16_gate_too(tiny_model, batches, mutant):
    assert not verdict(tiny_model, MUTANTS[mutant], batches, "fp16").passed


def test_batch_invariance_is_only_seen_in_batches_above_one(tiny_model, batches):
    assert verdict(tiny_model, MUTANTS["GRN norm over the batch"], batches[2:]).passed


def test_the_same_network_passes_and_the_verdict_says_what_was_compared(tiny_model, batches):
    result = verdict(tiny_model, unchanged, batches)
    assert (result.passed, result.failures, result.differences.relative_l2_max) == (True, (), 0.0)
    assert (result.batches, result.differences.samples, result.reference) == ((7, 2, 1), 10, "original")
    broken = verdict(tiny_model, MUTANTS["GRN gamma dropped"], batches).to_dict()
    assert (broken["passed"], len(broken["failures"]) > 0) == (False, True)


def test_progress_is_told_the_images_of_each_batch_and_no_image_is_an_input_error(tiny_model, batches):
    told: list[int] = []
    outputs_of(reference_runner(tiny_model, SPEC), batches, told.append)
    assert told == [7, 2, 1]
    with pytest.raises(InputError, match="no image"):
        outputs_of(reference_runner(tiny_model, SPEC), [])


# Logits


def logits(count: int = 4, classes: int = 10) -> Tensor:
    return torch.randn(count, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def failures(candidate: Tensor, reference: Tensor, gate: str = "fp16") -> tuple[str, ...]:
    return GATES[gate].failures(differences(candidate, reference))


def limits_broken(candidate: Tensor, reference: Tensor, gate: str = "fp16") -> list[str]:
    """The first words of each failure: which limit."""
    return [" ".join(text.split()[:2]) for text in failures(candidate, reference, gate)]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parity_nan_never_passes_and_inf_is_not_equal_though_both_sides_have_it(gate, value):
    """There is no flag that lets it pass: finite weights and pixels give no infinite logit."""
    spoilt = logits()
    spoilt[1, 2] = value
    assert failures(spoilt, spoilt.clone(), gate) == ("2 values are NaN or infinite",)
    for pair in ((spoilt, logits()), (logits(), spoilt)):
        assert failures(*pair, gate) == ("1 values are NaN or infinite",)


@pytest.mark.parametrize("gate", GATES)
def test_equal_logits_pass_every_gate(gate):
    assert failures(logits(), logits(), gate) == ()


def test_a_shift_common_to_all_logits_is_caught_by_relative_l2():
    assert limits_broken(logits() + 0.1, logits()) == ["relative L2"]


def test_the_centred_cosine_does_not_see_a_common_shift():
    assert differences(logits() + 5.0, logits()).centred_cosine_min == pytest.approx(1.0, abs=1e-12)


def test_a_large_common_offset_does_not_hide_a_difference_from_the_cosine():
    assert "centred cosine" in limits_broken(logits().roll(1, dims=1) + 1000.0, logits() + 1000.0)


def test_one_bad_sample_among_many_good_ones_is_caught():
    candidate = logits(1000)
    candidate[17] *= 1.1
    assert "relative L2" in limits_broken(candidate, logits(1000))


def test_a_zero_reference_is_no_division_by_zero_and_hides_no_difference():
    assert differences(torch.zeros(1, 3), torch.zeros(1, 3)).relative_l2_max == 0.0
    assert "relative L2" in limits_broken(torch.ones(1, 3), torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("candidate", "reference"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4)),
        (torch.zeros(2, 3), torch.zeros(1, 3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.zeros(0, 3), torch.zeros(0, 3)),
    ],
)
def test_parity_shape_or_name_mismatch_of_logits_is_an_input_error(candidate, reference):
    with pytest.raises(InputError, match="Cannot compare outputs of shape"):
        differences(candidate, reference)


# Flips of top-1


def pair_with_noise(noise: float, margin: float, shift: float) -> tuple[Tensor, Tensor]:
    """64 samples of 1000 classes, the candidate `noise` off everywhere; in the first sample the second class is
    `margin` behind and the candidate adds `shift` to it."""
    reference = logits(64, 1000)
    reference[:, 0] = 6.0  # a clear decision in all samples but the first
    reference[0, :2] = torch.tensor([4.0, 4.0 - margin])
    candidate = reference + noise * logits(64, 1000).roll(1, dims=1)
    candidate[0, :2] = torch.tensor([4.0, 4.0 - margin + shift])
    return candidate, reference


@pytest.mark.parametrize(
    ("margin", "shift", "flips"),
    [(0.03, 0.035, (1, 1, 1.0)), (0.05, 0.055, (1, 0, 63 / 64)), (0.05, 0.04, (0, 0, 1.0))],
    ids=["within the noise", "beyond the noise", "no flip"],
)
def test_a_flip_is_excused_within_the_noise_of_the_run_alone(margin, shift, flips):
    found = differences(*pair_with_noise(noise=0.01, margin=margin, shift=shift))
    assert (found.flips, found.excused_flips, found.top1_agreement) == flips


def test_one_wrong_logit_in_64000_that_flips_a_decision_is_caught_by_top1_alone():
    assert limits_broken(*pair_with_noise(noise=1e-3, margin=0.1, shift=0.2)) == ["top-1 agreement"]


# Gates


FOUND = differences(logits(), logits())


@pytest.mark.parametrize(
    ("gate", "named"),
    [
        (Gate("g", -1.0, 0.0, 0.0, 1.0), "relative L2 0, gate -1"),
        (Gate("g", 1.0, 2.0, 0.0, 1.0), "centred cosine 1, gate 2"),
        (Gate("g", 1.0, 0.0, 2.0, 1.0), "top-1 agreement 1, gate 2"),
        (Gate("g", 1.0, 0.0, 0.0, -1.0), "mean KL 0, gate -1"),
        (Gate("g", 1.0, 0.0, 0.0, 1.0, relative_l2_median_max=-1.0), "median relative L2 0, gate -1"),
        (Gate("g", 1.0, 0.0, 0.0, 1.0, flip_share_max=-1.0), "share of flips 0, gate -1"),
    ],
)
def test_a_failure_names_the_limit_and_both_numbers(gate, named):
    assert gate.failures(FOUND) == (named,)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_eight_bits_may_flip_one_image_in_a_hundred_and_only_within_noise(name):
    """Two classes of nearly the same score change places; the others move by 1 %."""
    reference = torch.randn(200, 10, dtype=torch.float64, generator=torch.manual_seed(0))
    reference[:, :2] += torch.tensor([20.0, 10.0])
    reference[:4, 1] = reference[:4, 0] - 1e-3
    moved = reference + 0.1 * torch.randn(reference.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    few, many = moved.clone(), moved.clone()
    for side, count in ((few, 2), (many, 4)):
        side[:4, 0] = side[:4, 1] + 0.01
        side[:count, 0] = side[:count, 1] - 0.01
    assert GATES[name].failures(differences(few, reference)) == ()
    assert GATES[name].failures(differences(many, reference)) == ("share of flips 0.02, gate 0.01",)
    few[10, 0] = 0.0
    assert any("top-1 agreement" in failure for failure in GATES[name].failures(differences(few, reference)))


@pytest.mark.parametrize(("flipped", "failures"), [(1, ()), (2, ("share of flips 0.0139, gate 0.01",))])
def test_flips_of_maps_are_a_share_of_their_places(flipped: int, failures: tuple[str, ...]):
    """A map of 12 by 12 has 144 decisions: a flip of each map is 0.7 % of them."""
    reference = torch.randn(2, 5, 12, 12, dtype=torch.float64, generator=torch.manual_seed(0))
    reference[:, 0] += 20.0
    candidate = reference + 0.1 * torch.randn(reference.shape, dtype=torch.float64, generator=torch.manual_seed(1))
    for side, sign in ((reference, -1.0), (candidate, 1.0)):
        side[:, 1, 0, :flipped] = side[:, 0, 0, :flipped] + sign * 0.01
    assert GATES["int8"].failures(differences(candidate, reference)) == failures


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_can_be_compared(classes):
    assert failures(logits(3, classes), logits(3, classes), "fp32") == ()


def test_relative_l2_is_the_error_over_the_norm_of_each_sample():
    found = differences(torch.tensor([[3.0, 4.5], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    assert found.relative_l2_max == pytest.approx(1.0)


def test_kl_is_zero_only_for_the_same_distribution():
    reference = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)  # 1/4 and 3/4
    candidate = torch.zeros(1, 2, dtype=torch.float64)  # one half each
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert differences(candidate, reference).mean_kl == pytest.approx(expected, rel=1e-12)


def test_the_spread_is_exact_far_from_zero_whatever_the_batches():
    reference = logits(40) + 1e6
    running = RunningDifferences()
    for part in (slice(0, 1), slice(1, 8), slice(8, 40)):
        running.add(reference[part] + 0.5, reference[part])
    assert running.result().max_abs_in_std == pytest.approx(0.5 / float(reference.std(correction=0)), rel=1e-9)


# Outputs of other tasks


def test_scores_by_themselves_are_compared_as_torchs_bernoulli_and_by_their_signs():
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(50, 6, generator=generator)
    candidate = reference + 0.05 * torch.randn(50, 6, generator=generator)
    candidate[3, 2], reference[3, 2] = -2.0, 2.0
    found = differences(candidate, reference, OutputSpec("labels", (6,), "logit", "sigmoid"))
    pair = [torch.distributions.Bernoulli(logits=side.double()) for side in (reference, candidate)]
    assert found.mean_kl == pytest.approx(float(torch.distributions.kl_divergence(*pair).mean()), rel=1e-9)
    changed = ((candidate > 0) != (reference > 0)).any(dim=1)
    assert (found.flips, found.flips - found.excused_flips) == (int(changed.sum()), 1), "one change is no noise"
    assert found.top1_agreement == pytest.approx(1 - 1 / 50)


def test_values_without_decisions_are_of_any_shape_and_have_no_top1_and_no_kl():
    reference = torch.randn(3, 4, 5, 2, generator=torch.Generator().manual_seed(0))
    found = differences(reference * 1.01, reference, VALUES)
    assert (found.top1_agreement, found.mean_kl, found.flips) == (None, None, 0)
    assert found.relative_l2_max == pytest.approx(0.01, rel=1e-4)
    assert GATES["fp32"].failures(found) == ("relative L2 0.01, gate 1e-05",)
    spoilt = reference.clone()
    spoilt[0, 0, 0, 0] = math.nan
    assert GATES["fp16"].failures(differences(spoilt, reference, VALUES)) == ("1 values are NaN or infinite",)
