"""Thresholds as a file: the probability from which each label of a network is given, as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import InputError
from cnx_deploy.core.strict_json import bounded_content, shortened, strict_json

__all__ = ["ASSUMED_THRESHOLD", "Thresholds", "thresholds_of"]

Thresholds = float | Sequence[float] | Mapping[str, float] | Path | str
"""One for all labels, one for each in order, by the names of labels, or a JSON file of the last two."""

ASSUMED_THRESHOLD = (
    "Assumed: the threshold of each label is 0.5, for nothing says otherwise. cnx-deploy eval --fit-thresholds finds "
    "better ones."
)


def thresholds_of(given: Thresholds, names: Sequence[str] | None, count: int) -> tuple[float, ...]:
    """Give the thresholds of `count` labels in their order.

    In a file they stand by name or in order, by themselves or as "thresholds" of an object. Labels without names go by
    their index. Raises InputError where they are not one probability between 0 and 1 for each label.
    """
    where = "thresholds"
    if isinstance(given, str | Path):
        where, given = str(given), _read(Path(given))
    if isinstance(given, int | float):
        given = [given] * count
    if isinstance(given, Mapping):
        keys = list(names or map(str, range(count)))
        lists = {"lack": [key for key in keys if key not in given], "also have": sorted(given.keys() - set(keys))}
        if told := [f"{what} {len(some)} ({shortened(', '.join(some))})" for what, some in lists.items() if some]:
            raise InputError(
                f"{where} must have one threshold for each of the {count} labels; they {' and '.join(told)}. Fit them "
                "on data of these labels with cnx-deploy eval --fit-thresholds."
            )
        given = [given[key] for key in keys]
    values: list[Any] = list(given)  # type: ignore[arg-type]  # what remains is a sequence
    if len(values) != count:
        raise InputError(f"{where} has {len(values)} thresholds for {count} labels. Give one for each, in their order.")
    if wrong := [value for value in values if not isinstance(value, int | float) or not 0.0 < value < 1.0]:
        raise InputError(f"{where} must be probabilities between 0 and 1, got {shortened(repr(wrong[0]))}.")
    return tuple(map(float, values))


def _read(path: Path) -> Any:
    try:
        document = strict_json(bounded_content(path))
        if isinstance(document, dict) and isinstance(document.get("thresholds"), dict | list):
            document = document["thresholds"]
        if not isinstance(document, dict | list):
            raise ValueError("it is neither an object nor a list")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read as thresholds ({error}): expected JSON, {{name: probability}} or a list. "
            "cnx-deploy eval --fit-thresholds writes one."
        ) from error
    return document
