"""Classes of uneven size: what an image of each class weighs in the loss, and what is said of weights and sampling.

`TrainingSpec.class_weights` asks for weights, `TrainingSpec.sampling` has `distributed.EpochBatches` draw each class
equally often.
"""

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import bounded_content, shortened, strict_json, typed

if TYPE_CHECKING:
    from cnx_deploy.data import Dataset, ImageSource
    from cnx_deploy.training.spec import TrainingSpec

__all__ = ["WEIGHTINGS", "ClassWeights", "balance_lines", "class_weights", "named_weights", "positive_weights"]

ClassWeights = str | Path | Mapping[str, float]
"""One of `WEIGHTINGS`, weights by the names of classes, or a file of them."""
WEIGHTINGS = ("none", "balanced")
LARGEST_POSITIVE_WEIGHT = 100.0
"""Of "balanced" weights of several labels: one image of a million would have the gradient of a whole epoch."""
EXPECTED = "lines NAME=WEIGHT, in a .csv file rows NAME,WEIGHT, or a JSON object {NAME: WEIGHT}"


def named_weights(given: ClassWeights) -> str | dict[str, float]:
    """Read and check what was given: a word of `WEIGHTINGS`, or the weights by the names of classes.

    Raises:
        InputError: The file cannot be read, or a weight is no finite number of at least 0.
    """
    if isinstance(given, str) and given in WEIGHTINGS:
        return given
    weights = dict(given) if isinstance(given, Mapping) else _read(Path(given))
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise InputError(f"class_weights must be finite numbers of at least 0, got {weight!r} for {name!r}.")
    return {name: float(weight) for name, weight in weights.items()}


def class_weights(spec: "TrainingSpec", names: Sequence[str], labels: Sequence[int]) -> tuple[float, ...] | None:
    """Give the factor on the loss of each class's images, with a mean of one over the images drawn; None without any.

    "balanced" is n / (k n_c) for n images in the k classes that have any, as in scikit-learn: each class has the same
    share of the loss. A class without images has 0.

    Raises:
        InputError: Weights by name are not those of the classes, or are all 0.
    """
    counts = Counter(labels)
    if isinstance(spec.class_weights, str):
        if spec.class_weights == "none":
            return None
        return tuple(len(labels) / (len(counts) * counts[at]) if at in counts else 0.0 for at in range(len(names)))
    given = _complete(spec, names)
    drawn = dict.fromkeys(counts, 1) if spec.sampling == "balanced" else counts
    mean = sum(share * given[names[at]] for at, share in drawn.items()) / sum(drawn.values())
    if not mean:
        raise InputError("class_weights are 0 for every class that has images, so nothing would be learned. Raise one.")
    return tuple(given[name] / mean for name in names)


def positive_weights(spec: "TrainingSpec", images: "ImageSource") -> tuple[float, ...] | None:
    """Give the factor on the loss of each label's positives, where an image has several labels; None without any.

    "balanced" is the images without a label to those with it, at most `LARGEST_POSITIVE_WEIGHT`; 1 for a label that no
    image has. Weights by name are taken as they are. Raises InputError where they are not those of the labels.
    """
    if spec.class_weights == "none":
        return None
    if isinstance(spec.class_weights, str):
        count, counts = len(images), images.class_counts()
        held = (counts[at] for at in range(len(images.class_names)))
        ratios = ((count - some) / some if some else 1.0 for some in held)
        return tuple(min(ratio, LARGEST_POSITIVE_WEIGHT) for ratio in ratios)
    given = _complete(spec, images.class_names)
    return tuple(given[name] for name in images.class_names)


def _complete(spec: "TrainingSpec", names: Sequence[str]) -> Mapping[str, float]:
    """The weights by name; InputError where they are not those of the names."""
    given: Mapping[str, float] = spec.class_weights  # type: ignore[assignment]  # a file was read by the spec
    lists = {"lack": [name for name in names if name not in given], "also have": sorted(given.keys() - set(names))}
    if told := [f"{what} {shortened(', '.join(some))}" for what, some in lists.items() if some]:
        raise InputError(
            f"class_weights must name every class of the data, {shortened(', '.join(names))}; they "
            f"{' and '.join(told)}. Correct the names."
        )
    return given


def balance_lines(spec: "TrainingSpec", dataset: "Dataset") -> Iterator[str]:
    """Say what weights and sampling come to for a dataset; nothing where classes are taken as they are."""
    if dataset.train.label_sets is not None:
        weights = positive_weights(spec, dataset.train)
        if weights is not None:
            capped = sum(weight == LARGEST_POSITIVE_WEIGHT for weight in weights)
            limit = f", the limit, for {capped} of {len(weights)} labels" if capped else ""
            yield f"Weights of the positives of each label: from {min(weights):.3g} to {max(weights):.3g}{limit}."
        return
    names, counts = dataset.class_names, Counter(dataset.train.labels)
    weights = class_weights(spec, names, dataset.train.labels)
    if weights is not None:
        learned = sorted(counts, key=lambda at: weights[at])
        low, high = (f"{weights[at]:.3g} ({names[at]})" for at in (learned[0], learned[-1]))
        yield f"Class weights: from {low} to {high}, with a mean of 1 over the images."
        if ignored := [name for name, weight in zip(names, weights, strict=True) if not weight]:
            yield f"Class weights: 0, so that nothing is learned of them, for {shortened(', '.join(ignored))}."
    if spec.sampling == "balanced":
        draws = sum(counts.values()) / len(counts)
        small, large = (choose(counts, key=counts.__getitem__) for choose in (min, max))
        rarely, often = (f"{draws / counts[at]:.2g} times ({names[at]})" for at in (large, small))
        yield (
            f"Balanced sampling: {draws:.4g} images of each of {len(counts)} classes an epoch; an image is drawn from "
            f"{rarely} to {often}."
        )
    if spec.is_balanced:
        yield "The best weights are those with the highest mean recall of the classes."


def _read(path: Path) -> dict[str, float]:
    try:
        content = bounded_content(path).removeprefix(b"\xef\xbb\xbf")
        if content.lstrip().startswith(b"{"):
            return typed(strict_json(content), dict[str, float])
        lines = [line for line in content.decode("utf-8").splitlines() if line.strip()]
        rows = (
            list(csv.reader(lines)) if path.suffix.lower() == ".csv" else [line.rpartition("=")[::2] for line in lines]
        )
        if rows and rows[0][-1].strip().lower() == "weight":  # a header
            del rows[0]
        weights = {name.strip(): float(weight) for name, weight in rows}
        if len(weights) < len(rows):
            raise ValueError("a class is there twice")
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{str(path)!r} cannot be read as class weights ({error}). Expected is one of {', '.join(WEIGHTINGS)}, or "
            f"a file: {EXPECTED}."
        ) from error
    return weights
