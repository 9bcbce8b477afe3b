"""What an export of this network promises of the file it wrote, on top of the rules for every file (`onnx_rules`).

Opset, operator counts, epsilons, GELU's form, symbolic batch.
"""

import math
from collections.abc import Collection, Iterator
from pathlib import Path

from cnx_deploy.core.errors import GraphCheckError
from cnx_deploy.core.variants import Variant
from cnx_deploy.exporters.graph_rules import GraphFacts, check_graph
from cnx_deploy.model.layers import EPS

__all__ = ["check_export"]

CHECK_VERSIONS = "Use the versions that constraints.txt names; found were:"


def check_export(
    path: Path,
    *,
    variant: Variant,
    layout: str,
    batch: tuple[int, int, int],
    opset: int,
    leave_out: Collection[str] = (),
    norm_on_patches: bool = False,
) -> GraphFacts:
    """Check a file that `onnx_export` wrote, on top of `check_graph`.

    One Gelu a block and, but in V1, one GRN statistic (a pool in the "cpu" layout, else a sum); each of the network's
    norms one LayerNormalization, or, in the "gpu" layout, spelled out over the channel axis for the four channels-first
    ones; opset as written; batch axis named. `leave_out`: folds that the export was to leave out; `norm_on_patches`:
    the stem's norm is a sum over the patches' channels.
    """
    facts = check_graph(path)
    blocks = variant.block_count
    token_norms = blocks + 1
    statistic = "AveragePool" if layout == "cpu" and "blocked" not in leave_out else "ReduceSum"
    responses = blocks if variant.version == 2 else 0
    sums = responses + norm_on_patches
    expected = {"Gelu": blocks, statistic: sums, "LayerNormalization": token_norms + (0 if layout == "gpu" else 4)}
    problems = [
        f"{count} {operator} expected, {facts.operators.get(operator, 0)} found"
        for operator, count in expected.items()
        if facts.operators.get(operator, 0) != count
    ]
    problems.extend(_wrong_constants(facts, norms=responses + token_norms + 4))
    if facts.opset != opset:
        problems.append(f"opset {opset} expected, {facts.opset} written")
    dynamic = batch[0] != batch[2]
    for kind, tensors, name in (("input", facts.inputs, "images"), ("output", facts.outputs, "logits")):
        if list(tensors) != [name]:
            problems.append(f"one {kind} {name!r} expected, found {list(tensors)}")
        elif tensors[name][1][0] != ("batch" if dynamic else batch[0]):
            problems.append(
                f"first axis of {name} is {tensors[name][1][0]!r}, not {'batch' if dynamic else batch[0]!r}"
            )
    if problems:
        raise GraphCheckError(
            "\n  ".join([f"{path.name} is not the graph that was asked for. {CHECK_VERSIONS}", *problems])
        )
    return facts


def _wrong_constants(facts: GraphFacts, norms: int) -> Iterator[str]:
    """What no comparison of logits shows: GELU's form, and an epsilon where the statistics are of the order of one.

    An average pool takes the mean square where GRN takes the sum, so there eps is divided by the side of the map.
    """
    if facts.gelu_forms - {"none"}:
        yield f"Gelu by erf expected, {sorted(facts.gelu_forms)} found"
    side = max((size for _, shape in facts.inputs.values() for size in shape[1:] if isinstance(size, int)), default=0)
    right = [EPS, *(EPS / max(1, side // (4 << stage)) for stage in range(4))]
    wrong = [found for found in facts.epsilons if not any(math.isclose(found, each, rel_tol=1e-4) for each in right)]
    if wrong:
        yield f"every epsilon is {EPS:g}, found {', '.join(f'{value:g}' for value in sorted(set(wrong)))}"
    if len(facts.epsilons) != norms:
        yield f"{norms} epsilons expected, one a norm and a GRN, {len(facts.epsilons)} found"
