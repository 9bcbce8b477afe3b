"""Rows and records of a benchmark with chosen figures, for tests of what is made of them."""

from cnx_deploy.bench.record import (
    BenchmarkRecord,
    CompiledFacts,
    Conditions,
    FileFacts,
    NetworkFacts,
    NotRun,
    Ratio,
    Timing,
    WeightsFacts,
)
from cnx_deploy.bench.statistics import latency_of

NETWORK = "atto-32"
QUIET = Conditions(
    date="2026-01-01T00:00:00+00:00", commit=None, tools={"cnx-deploy": "1"}, system="Linux", cpu="Epyc", isa=("avx2",),
    processors=4, threads=4, load_average=0.5, gpus=(), gpu_processes=0, duration_seconds=3.0, seed=0,
)  # fmt: skip
"""A machine whose figures nobody doubts."""


def row(
    batch: int,
    images_per_second: float,
    *,
    name: str = "atto.onnx",
    milliseconds: list[float] | None = None,
    status: str = "OK",
    ratios: tuple[Ratio, ...] = (),
    arithmetic: str = "fp32",
    **values: object,
) -> Timing:
    """A row whose calls take `milliseconds`, or all the time that `images_per_second` says."""
    chosen = {
        "network": NETWORK, "backend": "double", "version": "1", "device": "some CPU", "precision": arithmetic,
        "details": {}, "gpu": None, "cold_call_ms": None, "first_call_ms": 1.0, "create_seconds": 0.1,
        "peak_memory_mib": None, "correctness": None, "remarks": (), **values,
    }  # fmt: skip
    latency = latency_of(milliseconds or [1000.0 * batch / images_per_second] * 500)
    common = {"name": name, "batch": batch, "images_per_second": images_per_second, "latency": latency}
    return Timing(**chosen, **common, status=status, ratios=ratios, arithmetic=arithmetic)


def network_of(*files: str, **values: object) -> NetworkFacts:
    """Atto with these files; an engine among them was inspected at batch 64."""
    facts = {
        name: FileFacts(
            "a" * 64, "fp32", compiled=CompiledFacts(64, 98, 31.23) if "engine" in name else CompiledFacts()
        )
        for name in files
    }
    chosen = {
        "variant": "atto", "image_size": 32, "num_classes": 1000, "input": "float32 NCHW", "parameters": 3_708_400,
        "weights": WeightsFacts("random", "a" * 64), "gmacs": 0.547, "macts": 3.81, "files": facts, **values,
    }  # fmt: skip
    return NetworkFacts(**chosen)


def record_of(
    *rows: Timing,
    files: tuple[str, ...] = ("atto.onnx", "atto.engine"),
    not_run: tuple[NotRun, ...] = (),
    environment: Conditions = QUIET,
    **values: object,
) -> BenchmarkRecord:
    """A record of one network with these files."""
    networks = {NETWORK: network_of(*files)}
    return BenchmarkRecord(environment=environment, networks=networks, rows=rows, not_run=not_run, **values)
