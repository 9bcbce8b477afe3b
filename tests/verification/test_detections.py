"""Detections are matched by overlap and label, and each way of being wrong fails the gate."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import GATES, Differences, ParityResult
from cnx_deploy.core.strict_json import typed
from cnx_deploy.model.tasks.base import find_task
from cnx_deploy.verification.metrics import RunningComparison
from cnx_deploy.verification.parity import OutputComparison, verdicts

COUNT, IMAGES, THRESHOLD = 12, 5, 0.05
SPECS = find_task("detect").configured({"detections": COUNT, "score_threshold": THRESHOLD}).outputs(4)
Sides = dict[str, Tensor]


def drawn(present: int = 9) -> Sides:
    """Detections far from each other, of which the last are absent."""
    generator = torch.Generator().manual_seed(0)
    corners = 100.0 * torch.arange(COUNT)[:, None] + torch.rand(IMAGES, COUNT, 2, generator=generator) * 20
    sizes = 30 + torch.rand(IMAGES, COUNT, 2, generator=generator) * 40
    here = torch.arange(COUNT) < present
    return {
        "boxes": torch.cat([corners, corners + sizes], dim=-1) * here[:, None],
        "scores": torch.linspace(0.95, 0.3, COUNT).repeat(IMAGES, 1) * here,
        "labels": torch.where(here, torch.randint(0, 4, (IMAGES, COUNT), generator=generator), -1),
        "masks": torch.rand(IMAGES, COUNT, 28, 28, generator=generator) * here[:, None, None],
        "exact": torch.ones(IMAGES, 1),
    }


def compared(candidate: Sides, reference: Sides) -> Differences:
    comparison = OutputComparison(SPECS)
    comparison.add(candidate, reference)
    (measured,) = comparison.results().values()
    return measured


def test_order_does_not_matter() -> None:
    reference, order = drawn(), torch.randperm(COUNT, generator=torch.Generator().manual_seed(1))
    candidate = {name: tensor if name == "exact" else tensor[:, order] for name, tensor in reference.items()}
    assert not torch.equal(candidate["boxes"], reference["boxes"])
    measured = compared(candidate, reference)
    assert measured.detections is not None
    assert (measured.detections.matched, measured.detections.unmatched) == (9 * IMAGES, 0)
    assert (measured.detections.box_max, measured.detections.score_max, measured.relative_l2_max) == (0.0, 0.0, 0.0)
    assert all(not gate.failures(measured) for gate in GATES.values())


def test_a_comparison_of_no_detections_says_that_nothing_was_compared() -> None:
    measured = compared(drawn(0), drawn(0)).detections
    assert "none on either side" in str(measured)
    assert "0 matched" not in str(measured)


def edited(change: Callable[[Sides], Any], present: int = 9) -> Differences:
    reference = drawn(present)
    candidate = {name: tensor.clone() for name, tensor in reference.items()}
    change(candidate)
    return compared(candidate, reference)


def remove(side: Sides, at: int) -> None:
    """Take one detection out, as a runner that has not found it would give the rest."""
    for name in ("boxes", "scores", "labels", "masks"):
        tensor = side[name][0]
        tensor[at:-1] = tensor[at + 1 :].clone()
        tensor[-1] = -1 if name == "labels" else 0


@pytest.mark.parametrize(
    ("change", "fails", "word"),
    [
        (lambda side: side["labels"][0, 3].copy_((side["labels"][0, 3] + 1) % 4), {"fp32", "fp16"}, "unmatched"),
        (lambda side: side["boxes"][1, 2].add_(0.1), {"fp32"}, "box"),
        (lambda side: side["boxes"][1, 2].add_(0.6), {"fp32", "fp16"}, "box"),
        (lambda side: side["boxes"][1, 2].add_(30.0), {"fp32", "fp16"}, "unmatched"),
        (lambda side: side["scores"][2, 0].sub_(0.005), {"fp32"}, "score"),
        (lambda side: side["scores"][2, 0].sub_(0.02), {"fp32", "fp16"}, "score"),
        (lambda side: side["masks"][:, 0].neg_().add_(1.0), {"fp32", "fp16"}, "mask"),
        (lambda side: side["exact"][4].zero_(), {"fp32", "fp16"}, "exact"),
        (lambda side: remove(side, 4), {"fp32", "fp16"}, "unmatched"),
        (lambda side: remove(side, 8), {"fp32", "fp16"}, "unmatched"),  # the last one, but far above the threshold
    ],
)
def test_one_wrong_detection_fails(change: Callable[[Sides], Any], fails: set[str], word: str) -> None:
    measured = edited(change)
    for name in ("fp32", "fp16"):
        failures = GATES[name].failures(measured)
        assert bool(failures) == (name in fails), (name, failures)
        assert not failures or any(failure.startswith(word) for failure in failures)


def test_an_invented_detection_fails() -> None:
    def invent(side: Sides) -> None:
        side["boxes"][0, 9], side["scores"][0, 9], side["labels"][0, 9] = torch.tensor([5.0, 5.0, 90.0, 90.0]), 0.5, 1

    assert GATES["fp16"].failures(edited(invent))


def test_what_falls_out_at_the_cut_is_excused_within_the_noise() -> None:
    def swap_last(side: Sides, distance: float) -> None:
        side["scores"] += 1e-4 * torch.randn(IMAGES, COUNT, generator=torch.Generator().manual_seed(3))
        side["boxes"][0, -1] = torch.tensor([5.0, 5.0, 90.0, 90.0])
        side["scores"][0, -1] = 0.3 + distance

    near, far = (edited(lambda side, gap=gap: swap_last(side, gap), COUNT) for gap in (1e-4, 0.02))
    assert near.detections is not None
    assert (near.flips, near.excused_flips) == (2, 2)
    assert not GATES["fp16"].failures(near)
    assert (far.flips, far.excused_flips) == (2, 1)

    def invent(side: Sides, score: float) -> None:
        swap_last(side, score - 0.3)
        side["labels"][0, -1] = 1

    near, far = (edited(lambda side, score=score: invent(side, score)) for score in (THRESHOLD + 1e-4, 0.1))
    assert [(one.flips, one.excused_flips) for one in (near, far)] == [(1, 1), (1, 0)]


def test_images_without_detections_and_values_that_are_no_numbers() -> None:
    nothing = edited(lambda side: side, 0)
    assert not GATES["fp32"].failures(nothing)
    assert GATES["fp32"].failures(edited(lambda side: side["boxes"][0, 0, 0].fill_(torch.nan))) == (
        "1 values are NaN or infinite",
    )
    with pytest.raises(InputError, match="outputs"):
        compared({name: tensor for name, tensor in drawn().items() if name != "masks"}, drawn())
    with pytest.raises(InputError, match="shape"):
        compared({name: tensor[:2] for name, tensor in drawn().items()}, drawn())


def test_verify_judges_detections_as_one_output_and_tells_their_figures() -> None:
    sides = (drawn(), drawn())
    (verdict,) = verdicts(*sides, SPECS, GATES["fp32"], ("candidate", "reference"), [IMAGES])
    assert (verdict.output, verdict.passed) == ("detections", True)
    assert typed(msgspec.to_builtins(verdict), ParityResult) == verdict  # as a manifest keeps it
    running = RunningComparison(SPECS)
    running.add(*sides, [str(at) for at in range(IMAGES)])
    (verdict,) = running.results(("candidate", "reference"), GATES["fp32"])
    assert f"{9 * IMAGES} matched, 0 unmatched" in verdict.lines()[0]
    assert verdict.to_dict()["differences"]["detections"]["matched"] == 9 * IMAGES
