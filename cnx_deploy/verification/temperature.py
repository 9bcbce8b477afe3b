"""Temperature scaling: one number that class scores are divided by, fitted on labelled images.

Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2. The order of the scores
stays, so that no answer changes; only probabilities do. Images that the network was trained on give too small a number.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cnx_deploy.core.deploy_spec import TEMPERATURES
from cnx_deploy.core.errors import InputError
from cnx_deploy.data import ImageSource
from cnx_deploy.model.tasks.classification_metrics import Evaluation, RunningMetrics
from cnx_deploy.model.tasks.multi_label_metrics import fit_thresholds
from cnx_deploy.verification.evaluation import evaluate
from cnx_deploy.verification.predict import Model

__all__ = ["TemperatureFit", "evaluate_model", "fit_temperature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TemperatureFit:
    """A temperature for `export --temperature`, and what it does to the images that it was fitted on.

    `temperature` is of the network's own scores: of a file that divides already, the product. Calibration errors are
    in [0, 1], negative log-likelihoods in nats an image.
    """

    temperature: float
    count: int
    calibration_error_before: float
    calibration_error: float
    nll_before: float
    nll: float

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)

    def __str__(self) -> str:
        errors = f"{100 * self.calibration_error_before:.2f} -> {100 * self.calibration_error:.2f} %"
        return (
            f"temperature {self.temperature:.6g}, fitted on these {self.count} images: calibration error {errors}, "
            f"negative log-likelihood {self.nll_before:.4f} -> {self.nll:.4f}; export with --temperature "
            f"{self.temperature:.6g}"
        )


def evaluate_model(
    model: Model,
    data: Path | str | ImageSource,
    *,
    fits_temperature: bool = False,
    fits_thresholds: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """Evaluate an opened model and, where asked, fit a temperature or thresholds on the same images.

    `options` and the first result are those of `evaluation.evaluate`, the second is a `TemperatureFit`, a
    `multi_label_metrics.ThresholdFit` or None. Raises InputError for a task without logits of
    classes or without thresholds, before any image is run, and what `fit_temperature` raises.
    """
    if fits_thresholds:
        if not model.task.takes_label_sets:
            raise InputError(f"The task {model.task.name} gives one answer an image, and has no thresholds to fit.")
        held: list[Any] = []
        found = evaluate(
            model.runner, data, model.preprocessing, task=model.task, class_names=model.class_names,
            counted=held.append, **options,
        )  # fmt: skip
        names = tuple(model.class_names or (row.name for row in found.per_label))
        return found, replace(fit_thresholds(held[0].table), names=names)
    if fits_temperature and not model.task.allows_temperature:
        raise InputError(f"The task {model.task.name} has no logits of classes, which a temperature would divide.")
    scores: list[Tensor] = []
    labels: list[Tensor] = []

    def keep(outputs: Tensor, targets: Tensor) -> None:
        scores.append(outputs)
        labels.append(targets)

    found = evaluate(
        model.runner, data, model.preprocessing, task=model.task, class_names=model.class_names,
        num_classes=model.num_classes, scores=keep if fits_temperature else None, **options,
    )  # fmt: skip
    if not fits_temperature:
        return found, None
    return found, fit_temperature(torch.cat(scores), torch.cat(labels), divided_by=model.temperature)


def fit_temperature(logits: Tensor, labels: Tensor, *, divided_by: float = 1.0) -> TemperatureFit:
    """Find the temperature of the largest likelihood by LBFGS in float64.

    Args:
        logits: class scores (N, classes).
        labels: index (N,) of the right class of each.
        divided_by: the temperature that the scores were divided by already.

    Raises:
        InputError: the likelihood has no maximum within `core.deploy_spec.TEMPERATURES`.
    """
    scores = logits.double() * divided_by
    # The likelihood is concave in 1 / T, so that its slope at both ends says whether the maximum lies between them.
    for limit, sign in zip(TEMPERATURES, (1.0, -1.0), strict=True):
        if not sign * _slope(scores / limit, labels) > 0.0:
            right = int((scores.argmax(dim=1) == labels).sum())
            raise InputError(
                f"No temperature from {TEMPERATURES[0]} to {TEMPERATURES[1]:g} fits best: the likelihood rises "
                f"{'below' if sign > 0 else 'beyond'} {limit:g}. {right} of {len(labels)} images are classified right. "
                "Fit on more images that were not trained on, and check the order of classes."
            )
    logarithm = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [logarithm], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        value = F.cross_entropy(scores / logarithm.exp(), labels)
        (logarithm.grad,) = torch.autograd.grad(value, logarithm)
        return value

    with torch.enable_grad():
        step: Callable[..., Any] = optimiser.step
        step(loss)
    temperature = float(logarithm.detach().exp())
    before, after = (_measured(scores / value, labels) for value in (divided_by, temperature))
    return TemperatureFit(
        temperature=temperature,
        count=len(labels),
        calibration_error_before=before.calibration.expected_error,
        calibration_error=after.calibration.expected_error,
        nll_before=before.mean_nll,
        nll=after.mean_nll,
    )


def _slope(scores: Tensor, labels: Tensor) -> float:
    """The derivative of the mean negative log-likelihood by 1 / T where the scores are divided by T, times 1 / T."""
    expected = (scores.softmax(dim=1) * scores).sum(dim=1)
    return float((expected - scores.gather(1, labels[:, None])[:, 0]).mean())


def _measured(scores: Tensor, labels: Tensor) -> Evaluation:
    metrics = RunningMetrics([str(index) for index in range(scores.shape[1])])
    metrics.add({"logits": scores}, labels, [""] * len(labels))
    return metrics.result(())
