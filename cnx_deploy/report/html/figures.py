"""The page's charts, made from what was read: which rows, which axis, which words."""

import math
from collections.abc import Sequence

from cnx_deploy.report.html.benchmark import BenchNetwork, BenchRow
from cnx_deploy.report.html.charts import (
    Axis,
    Chart,
    ChartRow,
    Key,
    Mark,
    Rule,
    ShareChart,
    ShareRow,
    linear_axis,
    log_axis,
    segments,
)
from cnx_deploy.report.html.headroom import Headroom, Reach, Stretch
from cnx_deploy.report.html.layers import Layers, Side
from cnx_deploy.report.html.manifests import Compiled, Entry

__all__ = ["headroom_chart", "layers_chart", "parity_chart", "percent", "ratio_chart", "stage_chart", "stage_of"]

STAGES = ("stem", "stage 1", "stage 2", "stage 3", "stage 4", "head")
SIDES: dict[str, Key] = {
    "torch": Key("dot", "muted", True, "PyTorch in half"),
    "onnxruntime": Key("square", "muted", True, "ONNX Runtime"),
    "emulator": Key("triangle", "accent", False, "emulator"),
    "tensorrt": Key("diamond", "accent", False, "TensorRT"),
}
"""Each side with a shape of its own, so that the chart reads without colour."""
OURS, PEER = Key("dot", "accent", False, "our file, 95 % interval"), Key("square", "muted", False, "peer")
STORED = Key("dot", "accent", False, "largest value the FP16 file stores")
SUMS = Key("square", "muted", True, "naive: GRN’s sum of squares")
SQUARES = Key("triangle", "muted", True, "naive: LayerNorm’s squared deviation")


def percent(share: float) -> str:
    """Two digits below 10 %, whole numbers above."""
    value = 100.0 * share
    if 0.0 < value < 1e-3:
        return f"{value:.0e} %"
    return f"{value:,.0f} %" if value >= 10.0 else f"{value:#.2g} %"


def parity_chart(entries: Sequence[Entry]) -> Chart | None:
    """Relative L2 of every compared file, its gate beside it; None where none was compared."""
    found = [(entry, entry.parity) for entry in entries if entry.parity is not None]
    if not found:
        return None
    limits = [parity.limits[0].limit if parity.limits else math.nan for _, parity in found]
    axis = log_axis([*(parity.relative_l2 for _, parity in found), *limits], lambda value: f"{value:.0e}")
    rows = []
    for (entry, parity), limit in zip(found, limits, strict=True):
        marks = [] if math.isnan(limit) else [Mark("gate", "muted", axis.at(limit))]
        marks += [Mark("dot", "accent", axis.at(parity.relative_l2))] if math.isfinite(parity.relative_l2) else []
        gate = "no gate" if math.isnan(limit) else f"gate {limit:.2g}"
        words = f"{entry.stem}: relative L2 {parity.relative_l2:.2e}, {gate}"
        rows.append(ChartRow(entry.stem, tuple(marks), f"{parity.relative_l2:.2e}", words))
    keys = (Key("dot", "accent", False, "largest over the images"), Key("gate", "muted", False, "its gate"))
    title = "Relative L2 against PyTorch in FP32, less is better"
    return Chart(title, axis, tuple(rows), keys, label_head="file", figure_head="relative L2")


def stage_of(name: str) -> str:
    """Where a manifest's stage counts: stem, a stage with the downsampling that opens it, head; "other" else."""
    first, _, index = name.partition(".")
    if first in ("stages", "downsample_layers") and index.isdigit() and int(index) < 4:
        is_stem = first == "downsample_layers" and index == "0"
        return "stem" if is_stem else f"stage {int(index) + 1}"
    return {"stem": "stem", "head": "head", "norm": "head"}.get(name, "other")


def stage_chart(entries: Sequence[Entry]) -> ShareChart | None:
    """Where the bytes of an image are, by stage, a bar an engine; None without an engine whose kernels are known."""
    found = [(entry, entry.compiled) for entry in entries if entry.compiled is not None]
    if not found:
        return None
    totals = [_by_stage(compiled) for _, compiled in found]
    parts = tuple(part for part in (*STAGES, "other") if any(part in total for total in totals))
    rows = []
    for (entry, compiled), total in zip(found, totals, strict=True):
        bar = segments([(part, total.get(part, 0.0)) for part in parts])
        shares = ", ".join(f"{segment.name} {percent(segment.share)}" for segment in bar)
        words = f"{entry.stem}: {compiled.megabytes:.1f} MB an image; {shares}"
        rows.append(ShareRow(entry.stem, bar, f"{compiled.megabytes:.1f} MB", words))
    title = "Bytes an image moves, by stage, as shares of each engine’s whole"
    return ShareChart(title, parts, tuple(rows))


def headroom_chart(found: Headroom) -> Chart:
    """The share of 65504 by block, in order of depth."""
    reaches = [reach for block in found.blocks for reach in (block.stored, block.sums, block.squares) if reach]
    shares = [reach.share for reach in reaches if reach.share is not None]
    axis = log_axis([*shares, 1.0], lambda share: f"{100.0 * share:g} %")
    keys = (
        STORED, SUMS, SQUARES, Key("dashed", "muted", False, f"limit ÷ margin of {found.margin:g}"),
        Key("rule", "muted", False, f"FP16’s limit, {found.limit:.0f}"),
    )  # fmt: skip
    rules = (Rule(axis.at(1.0 / found.margin), True), Rule(axis.at(1.0), False))
    rows = tuple(_block_row(block, axis) for block in found.blocks)
    title = "Share of FP16’s largest number by block, less is better"
    return Chart(title, axis, rows, keys, rules, "block", "stored")


def ratio_chart(network: BenchNetwork, baseline: str) -> Chart | None:
    """Times as fast as the baseline, with 95 % intervals; None where nothing was compared."""
    rows = [row for row in network.rows if row.ratio is not None or row.status == "INVALID"]
    ends = [end for row in rows if row.ratio for end in (row.ratio.low, row.ratio.high) if row.status != "INVALID"]
    if not baseline or not ends:
        return None
    axis = linear_axis([1.0, *ends])
    keys: tuple[Key, ...] = (OURS, PEER, Key("rule", "muted", False, f"1: as fast as {baseline}"))
    if any(row.status not in ("OK", "INVALID") for row in rows):
        keys += (Key("dot", "accent", True, "hollow: UNSTABLE"),)
    title = f"Times as fast as {baseline}, more is better"
    rules = (Rule(axis.at(1.0), False),)
    drawn = tuple(_ratio_row(row, axis) for row in rows)
    return Chart(title, axis, drawn, keys, rules, "candidate", "times as fast")


def layers_chart(found: Layers) -> Chart | None:
    """Relative L2 by block, a mark a side; None where no side ran."""
    if not found.ran:
        return None
    results = [(side, block) for side in found.ran for block in side.blocks]
    limits = sorted({side.limit for side in found.ran})
    errors = [block.relative_l2 for _, block in results if block.relative_l2 is not None]
    axis = log_axis([*errors, *limits], lambda value: f"{value:.0e}")
    keys = [SIDES.get(side.name, Key("dot", "muted", False, side.name)) for side in found.ran]
    keys.append(Key("rule", "muted", False, f"above it a module fails, {', '.join(f'{limit:g}' for limit in limits)}"))
    rules = tuple(Rule(axis.at(limit), False) for limit in limits)
    rows = tuple(_layer_row(found.ran, block, axis) for block in found.blocks)
    title = f"Relative L2 by block of {found.artifact}, less is better"
    return Chart(title, axis, rows, tuple(keys), rules, "block", "largest")


def _by_stage(compiled: Compiled) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in compiled.by_stage:
        name = stage_of(part.name)
        total[name] = total.get(name, 0.0) + part.megabytes
    return total


def _block_row(block: Stretch, axis: Axis) -> ChartRow:
    """Stored last, so that it lies on top."""
    kinds: tuple[tuple[Key, Reach | None], ...] = ((SQUARES, block.squares), (SUMS, block.sums), (STORED, block.stored))
    marks, words = [], []
    for key, reach in kinds:
        if reach is not None:
            words.append(f"{key.label} {_share(reach)}")
            if reach.share is not None:
                marks.append(Mark(key.shape, key.tone, axis.at(reach.share), key.is_hollow))
    stored = _share(block.stored) if block.stored else "–"
    return ChartRow(block.name, tuple(marks), stored, f"{block.name}: {', '.join(reversed(words))}")


def _share(reach: Reach) -> str:
    return "not finite" if reach.share is None else percent(reach.share)


def _ratio_row(row: BenchRow, axis: Axis) -> ChartRow:
    group, ratio = f"Batch {row.batch}", row.ratio
    words = f"{row.name}, batch {row.batch}"
    if row.status == "INVALID" or ratio is None:
        return ChartRow(row.name, (), row.status, f"{words}: {row.status}", row.is_file, group)
    low, high = axis.at(ratio.low), axis.at(ratio.high)
    is_hollow = row.status != "OK"
    key = OURS if row.is_file else PEER
    mark = Mark(key.shape, key.tone, axis.at(ratio.ratio), is_hollow, low, high)
    words += f": {ratio.ratio:.2f}, 95 % interval {ratio.low:.2f} to {ratio.high:.2f}"
    words += f", {row.status}" if is_hollow else ""
    return ChartRow(row.name, (mark,), f"{ratio.ratio:.2f}", words, row.is_file, group)


def _layer_row(sides: Sequence[Side], name: str, axis: Axis) -> ChartRow:
    marks, words, known = [], [], []
    for side in sides:
        block = side.of_block(name)
        if block is None:
            continue
        key = SIDES.get(side.name, Key("dot", "muted", False, side.name))
        if block.relative_l2 is None:
            words.append(f"{key.label}: {block.verdict}")
            continue
        known.append(block.relative_l2)
        words.append(f"{key.label} {block.relative_l2:.1e}")
        marks.append(Mark(key.shape, key.tone, axis.at(block.relative_l2), key.is_hollow))
    figure = f"{max(known):.1e}" if len(known) == len(words) and known else "not finite"
    return ChartRow(name, tuple(marks), figure, f"{name}: {', '.join(words)}")
