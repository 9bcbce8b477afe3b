"""Which smallest set of things makes a check pass: bisection for one cause or several, runs of neighbours included.

The check is taken to be monotone: what passes still passes with more kept. Then the set found is the only minimal one.
Where it is not, as when many small errors add up, the set found still passes, and fails without any one of its members.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import combinations

__all__ = ["Passes", "minimal_set", "smallest_subset"]

Passes = Callable[[Collection[str]], bool]
"""Whether the check passes with these kept. Called again with the same names, it should not work again."""


def minimal_set(units: Sequence[str], passes: Passes) -> tuple[str, ...]:
    """The units without any of which the check fails, in their order. All of them pass and none fail: known before.

    One needed unit among n takes ceil(log2 n) + 1 checks. Each further one is looked for from the last one down in
    growing strides: two checks for a neighbour, 2 · log2 d + 2 at most for one at distance d. With more than one, each
    is left out once, to be sure: one check a unit.
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
    """The smallest subset of `items` that is enough beside `others`, the first of several; None where all are not.

    Every subset of a size is tried before a larger one: 2^n checks at most.
    """
    if not passes([*others, *items]):
        return None
    subsets = (subset for size in range(len(items)) for subset in combinations(items, size))
    return next((subset for subset in subsets if passes([*others, *subset])), tuple(items))


def _shortest_prefix(units: Sequence[str], needed: Sequence[str], passes: Passes, *, from_the_end: bool) -> int:
    """The length of the shortest prefix that passes beside `needed`: none of it does not, all of it does."""
    low, high, stride = 0, len(units), 1
    while high - low > 1:
        middle = max(low + 1, high - stride) if from_the_end else (low + high) // 2
        if passes([*needed, *units[:middle]]):
            high, stride = middle, 2 * stride
        else:
            low, from_the_end = middle, False
    return high
