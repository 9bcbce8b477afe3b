"""Search for the smallest set of modules that makes a check pass: bisection for one cause, several, or a run of them.

The check is taken to be monotone: what passes still passes with more kept. Then the set found is the only minimal one.
Where it is not, as when many small errors add up, the set found still passes, and fails without any one of its members.

A unit is the stem, a downsampling, a block or the head; blocks have parts of their own (`deploy.block_parts`).
"""

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy import BLOCK_PARTS

__all__ = ["Passes", "find_kept", "in_order", "minimal_set", "parts_of_unit", "smallest_subset", "units_of"]

Passes = Callable[[Collection[str]], bool]
"""Whether the check passes with these kept. Called again with the same names, it should not work again."""


def find_kept(units: Sequence[str], passes: Passes, parts: Sequence[str] = BLOCK_PARTS) -> tuple[str, ...] | None:
    """Return the modules to keep: the minimal set of units, each block replaced by the fewest of its parts.

    `parts`: those that a block of the network has. None where keeping everything does not pass.
    """
    if not passes(units):
        return None
    if passes(()):
        return ()
    kept = list(minimal_set(units, passes))
    for unit in tuple(kept):
        others = [name for name in kept if name != unit]
        own = parts_of_unit(unit, parts)
        enough = smallest_subset(own, others, passes) if own else None
        if enough is not None:
            kept = [*others, *enough]
    return in_order(kept, units)


def minimal_set(units: Sequence[str], passes: Passes) -> tuple[str, ...]:
    """Return the units without any of which the check fails, in their order.

    It must be known before that all of them pass and none fail. One needed unit among n takes ceil(log2 n) + 1 checks.
    Each further one is looked for from the last one down in growing strides: two checks for a neighbour,
    2 · log2 d + 2 at most for one at distance d. With more than one, each is left out once, to be sure: one check a
    unit.
    """
    needed: list[str] = []
    room = len(units)  # with the first `room` units and those needed it passes
    while not needed or not passes(needed):
        room = _shortest_prefix(units[:room], needed, passes, from_the_end=bool(needed)) - 1
        needed.append(units[room])
    for unit in list(needed):
        rest = [other for other in needed if other != unit]
        if rest and passes(rest):
            needed = rest
    return tuple(sorted(needed, key=units.index))


def smallest_subset(items: Sequence[str], others: Collection[str], passes: Passes) -> tuple[str, ...] | None:
    """Return the smallest subset of `items` that is enough beside `others`, the first of several.

    Every subset of a size is tried before a larger one: 2^n checks at most. None where all of them are not enough.
    """
    if not passes([*others, *items]):
        return None
    subsets = (subset for size in range(len(items)) for subset in combinations(items, size))
    return next((subset for subset in subsets if passes([*others, *subset])), tuple(items))


def units_of(variant: Variant) -> tuple[str, ...]:
    """Return the units of a network in the order in which they run.

    Together they are everything that `DeploySpec.keep_fp32` can name.
    """
    stages = (
        (f"downsample_layers.{stage}", *(f"stages.{stage}.{index}" for index in range(depth)))
        for stage, depth in enumerate(variant.depths)
    )
    return (*(unit for stage in stages for unit in stage), "head")


def parts_of_unit(unit: str, parts: Sequence[str] = BLOCK_PARTS) -> tuple[str, ...]:
    """Return the parts of a block that can be kept by themselves; other units have none."""
    return tuple(f"{unit}.{part}" for part in parts) if unit.startswith("stages.") else ()


def in_order(names: Collection[str], units: Sequence[str]) -> tuple[str, ...]:
    """Sort units and parts in the order in which the network runs."""
    order = [name for unit in units for name in (unit, *parts_of_unit(unit))]
    return tuple(sorted(names, key=order.index))


def _shortest_prefix(units: Sequence[str], needed: Sequence[str], passes: Passes, *, from_the_end: bool) -> int:
    """Return the length of the shortest prefix that passes beside `needed`: none of it does not, all of it does."""
    low, high, stride = 0, len(units), 1
    while high - low > 1:
        middle = max(low + 1, high - stride) if from_the_end else (low + high) // 2
        if passes([*needed, *units[:middle]]):
            high, stride = middle, 2 * stride
        else:
            low, from_the_end = middle, False
    return high
