"""Whether two runners give the same answer, by measures that a broken model cannot pass.

All differences are computed in float64. No single number is enough: relative L2 misses a flip of the decision, plain
cosine a common shift of all logits, top-1 a slow drift; so a gate holds them all. Max abs is reported in units of the
reference's spread and not gated, for it grows with the number of classes.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.gates import Differences, Gate, ParityResult
from cnx_deploy.runners.base import Runner

__all__ = ["compare", "differences", "logits_of"]


NOISE_MARGIN = 4.0
"""A flip is noise where the reference's margin is below this many RMS errors (over all samples and logits): the
difference of two noisy logits has sqrt(2) of them, so 2.8 of its standard deviations. The sample's own largest error
would excuse every flip, for two logits cannot change places without moving by the margin together."""


def differences(candidate: Tensor, reference: Tensor) -> Differences:
    """Compare logits, (N, num_classes) each.

    Raises InputError when the shapes differ or there is no sample.
    """
    if candidate.shape != reference.shape or candidate.ndim != 2 or not candidate.numel():
        raise InputError(
            f"Cannot compare logits of shape {tuple(candidate.shape)} with {tuple(reference.shape)}: expected the "
            "same. Give both runs the same images and classes."
        )
    a, b = candidate.detach().double().cpu(), reference.detach().double().cpu()
    nonfinite = int((~torch.isfinite(a)).sum() + (~torch.isfinite(b)).sum())
    if nonfinite:
        nan = float("nan")
        return Differences(len(a), nonfinite, nan, nan, nan, nan, 0, 0, nan, nan)
    tiny = torch.finfo(torch.float64).tiny
    relative_l2 = (a - b).norm(dim=1) / b.norm(dim=1).clamp_min(tiny)
    flipped, excused = _flips(a, b)
    log_p, log_q = b.log_softmax(dim=1), a.log_softmax(dim=1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    return Differences(
        samples=len(a),
        nonfinite_count=0,
        relative_l2_median=float(relative_l2.median()),
        relative_l2_max=float(relative_l2.max()),
        centred_cosine_min=float(_centred_cosine(a, b).min()),
        top1_agreement=1.0 - float((flipped & ~excused).double().mean()),
        flips=int(flipped.sum()),
        excused_flips=int((flipped & excused).sum()),
        mean_kl=max(0.0, float(divergence.mean())),
        max_abs_in_std=float((a - b).abs().max() / b.std(correction=0).clamp_min(tiny)),
    )


def logits_of(runner: Runner, batches: Iterable[Tensor], progress: Callable[[int], None] | None = None) -> Tensor:
    """Run every batch and return all logits in float64 on the CPU; `progress` is told the images of each batch."""
    collected = []
    for images in batches:
        collected.append(runner.run(images.to(runner.device)).detach().double().cpu())
        if progress is not None:
            progress(len(images))
    if not collected:
        raise InputError(
            "There is no image to compare on: expected at least one. Give more samples, or a folder that holds some."
        )
    return torch.cat(collected)


def compare(
    candidate: Runner,
    reference_logits: Tensor,
    batches: Sequence[Tensor],
    gate: Gate,
    *,
    reference_name: str,
    progress: Callable[[int], None] | None = None,
) -> ParityResult:
    """Judge `candidate` on `batches` against the reference's logits for the same images, in the same order."""
    found = differences(logits_of(candidate, batches, progress), reference_logits)
    name = f"{candidate.info.backend} {candidate.info.precision}"
    sizes = tuple(dict.fromkeys(len(images) for images in batches))
    return ParityResult(name, reference_name, gate, sizes, found, gate.failures(found))


def _flips(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where top-1 differs, and where the reference's margin is within the run's noise."""
    flipped = a.argmax(dim=1) != b.argmax(dim=1)
    if b.shape[1] == 1:
        return flipped, flipped
    top2 = b.topk(2, dim=1).values
    excused = (top2[:, 0] - top2[:, 1]) <= NOISE_MARGIN * (a - b).square().mean().sqrt()
    return flipped, excused


def _centred_cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the logits less their mean: blind neither to a shift common to all classes nor to their spread."""
    if a.shape[1] == 1:
        return torch.ones(len(a), dtype=torch.float64)
    a, b = a - a.mean(dim=1, keepdim=True), b - b.mean(dim=1, keepdim=True)
    return torch.nn.functional.cosine_similarity(a, b, dim=1)
