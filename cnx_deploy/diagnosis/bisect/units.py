"""The parts of a network in the order in which they run, and sets of them in words.

A unit is the stem, a downsampling, a block or the head; blocks have parts of their own (`deploy.block_parts`).
"""

from collections.abc import Collection, Sequence

from cnx_deploy.core.variants import Variant
from cnx_deploy.model.deploy import BLOCK_PARTS

__all__ = ["in_order", "islands_of", "parts_of_unit", "spelled", "units_of"]


def units_of(variant: Variant) -> tuple[str, ...]:
    """The units of a network. Together they are everything that `DeploySpec.keep_fp32` can name."""
    stages = (
        (f"downsample_layers.{stage}", *(f"stages.{stage}.{index}" for index in range(depth)))
        for stage, depth in enumerate(variant.depths)
    )
    return (*(unit for stage in stages for unit in stage), "head")


def parts_of_unit(unit: str, parts: Sequence[str] = BLOCK_PARTS) -> tuple[str, ...]:
    """The parts of a block that can be kept by themselves; other units have none. `parts`: those of the network's."""
    return tuple(f"{unit}.{part}" for part in parts) if unit.startswith("stages.") else ()


def in_order(names: Collection[str], units: Sequence[str]) -> tuple[str, ...]:
    """Units and parts in the order in which the network runs."""
    order = [name for unit in units for name in (unit, *parts_of_unit(unit))]
    return tuple(sorted(names, key=order.index))


def islands_of(kept: Collection[str], units: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The names in order, those together between which the network stays in FP32.

    Neighbouring units are one island, and so are the parts of one block.
    """
    islands: list[tuple[str, ...]] = []
    for name in in_order(kept, units):
        if islands and _joins(islands[-1][-1], name, units):
            islands[-1] = (*islands[-1], name)
        else:
            islands.append((name,))
    return tuple(islands)


def spelled(kept: Collection[str], units: Sequence[str]) -> str:
    """The names in words, a run of three units and more by its ends."""
    words = []
    for island in islands_of(kept, units):
        is_run = len(island) > 2 and island[0] in units
        words.append(f"{island[0]} to {island[-1]} ({len(island)} parts)" if is_run else ", ".join(island))
    return ", ".join(words) or "nothing"


def _joins(left: str, right: str, units: Sequence[str]) -> bool:
    if left in units and right in units:
        return units.index(right) == units.index(left) + 1
    return left not in units and right not in units and left.rpartition(".")[0] == right.rpartition(".")[0]
