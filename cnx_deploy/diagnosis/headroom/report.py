"""What a measured headroom says to people: tables, verdicts, and what to keep in FP32."""

import math
from collections.abc import Iterator

from cnx_deploy.core.errors import CheckFailedError
from cnx_deploy.diagnosis.headroom.analysis import Headroom
from cnx_deploy.diagnosis.headroom.ranges import HALF_MAX, ParameterRange, Summary, TensorRange, rank, worst

__all__ = ["failure", "lines_of"]

WORST = 8
"""Tensors that are listed unless all are asked for."""
MOST_PARTS = 6
"""That are named in a message. With more, a file of BF16 is the simpler way out."""


def lines_of(found: Headroom, *, lists_all: bool = False) -> Iterator[str]:
    """The report, line by line: stages, tensors (the worst, or all in order of depth), weights, both verdicts."""
    weights, margin = found.network["weights"], f"margin {found.margin:g}"
    images = f"{found.counted_images} of {found.image_size} px ({found.source})"
    yield f"{found.network['variant']}, weights {weights['origin']} {weights['reference']}, {images}"
    yield f"FP16 holds at most {HALF_MAX:.0f}; {margin}. Measured in FP32 on a CPU; on a GPU: not run."
    yield ""
    yield (
        f"{'':8} {'largest stored in FP16':>22} {'share':>9}   {'GRN RMS':>8} {'sum of squares':>15} {'share':>9}   "
        f"{'LayerNorm |x-mean|':>18} {'squared':>9}"
    )
    yield from (_line_of_stage(stage) for stage in found.stages)
    yield ""
    yield f"{'tensor' if lists_all else 'largest tensors':40} {'max |x|':>9} {'share':>9}"
    yield from (f"{each.name:40} {each.largest:>9.4g} {_percent(each.share):>9}" for each in _listed(found, lists_all))
    yield ""
    yield _line_of_weights(found.parameters)
    yield f"This project's FP16 file: {_own_verdict(found)}"
    yield f"Written the naive way:    {_naive_verdict(found)}"
    if found.responses:
        yield f"{'':26}GRN's sums keep the margin {_naive_size(found)}, by an RMS that no size changes to first order"


def failure(found: Headroom) -> CheckFailedError | None:
    """What is wrong with the exported file's own form, with the way out; None when nothing is."""
    broken = next((each for each in found.tensors if not math.isfinite(each.largest)), None)
    if broken is not None:
        return CheckFailedError(
            f"{broken.name} is {broken.largest} in FP32 already, over {found.counted_images}: expected finite numbers. "
            "FP16 is not the cause: check the weights, or train them again."
        )
    if (bad := worst(found.failing_parameters)) is not None:
        return CheckFailedError(
            f"{bad.name} has {bad.nonfinite:,} of {bad.count:,} elements that are no number in FP16: the largest is "
            f"{bad.largest:,.6g}, FP16 holds at most {HALF_MAX:.0f}. {_way_out(found)}"
        )
    if (largest := worst(found.failing_tensors)) is None:
        return None
    more = len(found.failing_tensors) - 1
    return CheckFailedError(
        f"{largest.name} reaches {largest.largest:,.6g} over {found.counted_images}, {_percent(largest.share)} of "
        f"FP16's {HALF_MAX:.0f}: with a margin of {found.margin:g} it may reach {HALF_MAX / found.margin:,.6g}"
        f"{f'; {more} more lack the margin' if more else ''}. {_way_out(found)}"
    )


def _line_of_stage(stage: Summary) -> str:
    stored, response, norm = stage.stored, stage.response, stage.norm
    words = f"{stage.name:8} "
    words += f"{stored.largest:>22.4g} {_percent(stored.share):>9}   " if stored else f"{'':32}   "
    sums = (f"{response.rms:.3g}", f"{response.square_sum:,.0f}", _percent(response.share)) if response else "–––"
    words += "{:>8} {:>15} {:>9}   ".format(*sums)
    return words + (f"{norm.deviation:>18.4g} {_percent(norm.share):>9}" if norm else "")


def _listed(found: Headroom, lists_all: bool) -> list[TensorRange]:
    if lists_all:
        return list(found.tensors)
    ordered = sorted(found.tensors, key=lambda each: rank(each.share))
    return ordered[: -WORST - 1 : -1]


def _line_of_weights(parameters: tuple[ParameterRange, ...]) -> str:
    count = sum(each.count for each in parameters)
    subnormal, flushed = (sum(getattr(each, kind) for each in parameters) for kind in ("subnormal", "flushed"))
    largest, nonfinite = worst(parameters), sum(each.nonfinite for each in parameters)
    words = (
        f"Weights in FP16: {_percent(subnormal / max(1, count))} of {count:,} subnormal, {flushed:,} flushed to zero, "
    )
    words += f"{nonfinite or 'none'} infinite or NaN"
    return words if largest is None else f"{words}; largest {largest.largest:.4g}"


def _own_verdict(found: Headroom) -> str:
    largest = worst(found.tensors)
    if largest is None or not found.passed:
        failing = len(found.failing_tensors) + len(found.failing_parameters)
        return f"FAIL at any image size: {failing} tensors or parameters lack the margin"
    reached = _percent(largest.share * found.margin)
    return f"pass at any image size: {reached} of the limit with the margin; sums over positions are in FP32"


def _naive_verdict(found: Headroom) -> str:
    """Of GRN's sums and LayerNorm's squares in FP16; information, never the exit code."""
    if (largest := worst(found.naive_failures)) is None:
        return f"pass at {found.image_size} px (information)"
    count = f"{len(found.naive_failures)} of {len(found.responses) + len(found.norms)} statistics"
    return (
        f"FAIL at {found.image_size} px (information): {count} without the margin, {largest.module} most "
        f"({_percent(largest.share)})"
    )


def _naive_size(found: Headroom) -> str:
    size = found.naive_image_size
    return "at any image size" if size is None else f"up to {size:,} px" if size else "at no image size"


def _way_out(found: Headroom) -> str:
    parts = found.keep_fp32
    if len(parts) > MOST_PARTS:
        return (
            f"Export with --precision bf16, or keep {len(parts)} parts in FP32, from {parts[0]} to {parts[-1]}: "
            "cnx-deploy export … --keep-fp32 MODULE, once for each of keep_fp32 in cnx-deploy headroom --json."
        )
    words = " ".join(f"--keep-fp32 {part}" for part in parts)
    return f"Keep it in FP32 with cnx-deploy export … {words}; or export with --precision bf16."


def _percent(share: float) -> str:
    """Two digits below 10 %, whole numbers above."""
    percent = 100.0 * share
    return f"{percent:,.0f} %" if 10.0 <= percent < 1e7 else f"{percent:.2g} %"
