"""Measured diversity as a table: a row a block, the checkpoints side by side."""

import math
from collections.abc import Iterator, Sequence

from cnx_deploy.diversity.measure import PARTS, TensorDiversity
from cnx_deploy.diversity.run import NetworkDiversity

__all__ = ["lines_of"]

WIDTH = 8
HEADS = {"act": "GELU", "grn": "GRN", "output": "output"}


def lines_of(found: Sequence[NetworkDiversity], source: str) -> Iterator[str]:
    """The report, line by line. `source` says where the images are from."""
    yield "mean pair-wise cosine distance of channels: 0 all alike, about 0.5 unrelated (arXiv:2301.00808, section 4)"
    for index, each in enumerate(found, start=1):
        yield f"{index}: {each.name} ({each.variant}), {each.images} images of {each.image_size} px ({source})"
    yield ""
    numbers = (f"{index:<{WIDTH * len(_parts(each))}}" for index, each in enumerate(found, start=1))
    yield f"{'':12}   {'   '.join(numbers)}".rstrip()
    yield _row("block", ([HEADS[part] for part in _parts(each)] for each in found))
    for block in dict.fromkeys(block for each in found for block in each.blocks):
        yield _row(block, ([_distance(each.part(part).get(block)) for part in _parts(each)] for each in found))
    yield _row("mean", ([_mean(each, part) for part in _parts(each)] for each in found))
    for each in found:
        yield from _dead(each)


def _parts(network: NetworkDiversity) -> list[str]:
    return [part for part in PARTS if network.part(part)]


def _row(name: str, cells: Iterator[list[str]]) -> str:
    groups = ("".join(f"{cell:>{WIDTH}}" for cell in group) for group in cells)
    return f"{name:12}   {'   '.join(groups)}".rstrip()


def _distance(tensor: TensorDiversity | None) -> str:
    if tensor is None:
        return ""
    return "dead" if math.isnan(tensor.distance) else f"{tensor.distance:.4f}"


def _mean(network: NetworkDiversity, part: str) -> str:
    known = [each.distance for each in network.part(part).values() if not math.isnan(each.distance)]
    return f"{math.fsum(known) / len(known):.4f}" if known else "dead"


def _dead(network: NetworkDiversity) -> Iterator[str]:
    """Where channels are zero everywhere, which the distance leaves out."""
    dead = [each for each in network.tensors if each.dead_share > 0]
    if dead:
        worst = max(dead, key=lambda each: each.dead_share)
        most = f"most in {worst.module} ({100 * worst.dead_share:.2f} %)"
        yield f"{network.name}: channels that are zero everywhere in {len(dead)} tensors, {most}"
