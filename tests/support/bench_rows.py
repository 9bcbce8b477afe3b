"""Rows of a benchmark with chosen figures, for tests of what is made of rows."""

from cnx_deploy.bench.statistics import Ratio, latency_of
from cnx_deploy.bench.timing import Timing


def row(
    batch: int,
    images_per_second: float,
    *,
    name: str = "atto.onnx",
    milliseconds: list[float] | None = None,
    status: str = "OK",
    ratios: tuple[Ratio, ...] = (),
    device: str = "some CPU",
    arithmetic: str = "fp32",
) -> Timing:
    """A row whose calls take `milliseconds`, or all the time that `images_per_second` says."""
    return Timing(
        name=name,
        network="atto-32",
        backend="double",
        version="1",
        device=device,
        precision=arithmetic,
        arithmetic=arithmetic,
        details={},
        batch=batch,
        images_per_second=images_per_second,
        latency=latency_of(milliseconds or [1000.0 * batch / images_per_second] * 500),
        gpu=None,
        cold_call_ms=None,
        first_call_ms=1.0,
        create_seconds=0.1,
        peak_memory_mib=None,
        correctness=None,
        ratios=ratios,
        status=status,
        remarks=(),
    )
