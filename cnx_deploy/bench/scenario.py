"""One file at a time under load as it arrives in use: `cnx-deploy bench --scenario`, with MLPerf's LoadGen.

Scenarios: `single-stream`, an image a query and the next when it is answered; `offline`, all images at once, answered
in batches; `server`, images that arrive at random (Poisson) at a rate, answered in batches of what has arrived.
The figures are LoadGen's, of its rules and its verdict, and no MLPerf result. Answers kept from the run are judged
against the reference, so a fast wrong answer is INVALID.

The JSON document is that of `bench.report.document` with no `rows`, and::

    "scenario": {
      "loadgen": "6.0.17", "note": "LoadGen, not an MLPerf submission: …",
      "scenario": "server", "duration_seconds": 3.0, "seed": 0, "library_images": 64,
      "target_qps": 100.0, "slo_ms": 50.0,                    null but for server
      "rows": [{
        "name", "network", "runner": {…},                     `runners.base.RunnerInfo`
        "batch": 8, "mean_batch": 2.4,                        the most images of a call, and their mean
        "images": 300, "images_per_second": 99.1,
        "latency_ms": {"p50", "p90", "p95", "p99"},           null where too few queries carry one; {} for offline
        "p90_estimate_ms",                                    LoadGen's bound on p90 of a single stream, else null
        "p99_within_slo": true,                               null but for server
        "correctness": {…},                                   `bench.correctness.Correctness`
        "status": "VALID" | "INVALID", "remarks": [why it is INVALID]
      }]
    }
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnx_deploy.artifacts import Artifact
from cnx_deploy.bench.candidate import create
from cnx_deploy.bench.comparison import REFERENCE_BATCH, Benchmark, NotRun, reason_not_run
from cnx_deploy.bench.conditions import Conditions, conditions_now, doubts, throttling
from cnx_deploy.bench.gpu import gpu_states
from cnx_deploy.bench.loadgen import import_loadgen, loadgen_version
from cnx_deploy.bench.networks import network_facts, network_name, networks_of
from cnx_deploy.bench.report import document, head_lines
from cnx_deploy.bench.statistics import PERCENTILES
from cnx_deploy.bench.under_load import Reference, ScenarioRequest, ScenarioRow, measure_under_load
from cnx_deploy.data import image_like_batches, runner_input
from cnx_deploy.environment import cpu_count
from cnx_deploy.errors import MissingRequirementError
from cnx_deploy.onnx_export import deploy_spec_from_request
from cnx_deploy.parity import logits_of
from cnx_deploy.runners.opening import open_runner
from cnx_deploy.runners.pytorch import reference_runner
from cnx_deploy.verification import gate_of, recorded_model

__all__ = ["ScenarioReport", "run_scenario"]

LIBRARY_IMAGES = 64
"""Distinct images; LoadGen draws from them."""

MLPERF_SECONDS = 600
"""What MLPerf's rules ask of a run."""

CLOCK = "LoadGen's, from the (scheduled) start of a query to its answer in host memory; images on the runner's device"

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioReport:
    """Files under one scenario, with the conditions. `warnings` are doubts about the machine."""

    request: ScenarioRequest
    loadgen: str
    rows: tuple[ScenarioRow, ...]
    not_run: tuple[NotRun, ...]
    networks: dict[str, dict[str, Any]]
    conditions: Conditions
    warnings: tuple[str, ...]

    @property
    def note(self) -> str:
        """What these figures are not."""
        asked = f"MLPerf itself asks for {MLPERF_SECONDS} s, this ran for {self.request.bench.duration:g} s"
        return f"LoadGen, not an MLPerf submission: {asked}, on {LIBRARY_IMAGES} made images"

    def to_dict(self) -> dict[str, Any]:
        """The document that `--json` prints."""
        found = document(Benchmark((), self.not_run, self.networks), self.conditions, warnings=self.warnings)
        request = self.request
        scenario = {
            "loadgen": self.loadgen,
            "note": self.note,
            "scenario": request.scenario,
            "duration_seconds": request.bench.duration,
            "seed": request.bench.seed,
            "library_images": LIBRARY_IMAGES,
            "target_qps": request.target_qps,
            "slo_ms": request.slo_ms,
            "rows": [_row_document(row) for row in self.rows],
        }
        return {**found, "clock": CLOCK, "scenario": scenario}

    def lines(self) -> Iterator[str]:
        """The report for a terminal: a line a file, its remarks below it."""
        yield from head_lines(self.conditions, self.networks)
        yield self.note
        if self.request.target_qps is not None:
            yield f"server: {self.request.target_qps:g} images/s arrive, 99 % are due within {self.request.slo_ms:g} ms"
        for row in self.rows:
            yield f"{row.name:30} {self.request.scenario}, {_figures(row)}  {row.status}"
            yield from (f"    {remark}" for remark in row.remarks)
        for missing in self.not_run:
            yield f"{missing.name:30} {self.request.scenario}: not run ({missing.reason})"

    @property
    def failures(self) -> tuple[str, ...]:
        """What makes the run a failed check, a sentence each; empty when nothing does."""
        wrong = [row.name for row in self.rows if row.correctness.failures]
        other = [row.name for row in self.rows if row.status == "INVALID" and not row.correctness.failures]
        found = []
        if wrong:
            found.append(f"{', '.join(wrong)} gave wrong logits under load; `cnx-deploy verify` says how wrong.")
        if other:
            found.append(
                f"{', '.join(other)}: LoadGen calls the run INVALID; see the remarks of the rows for the reason."
            )
        return tuple(found)


def run_scenario(
    artifacts: Sequence[Artifact],
    request: ScenarioRequest,
    *,
    omp_threads: str | None = None,
    progress: Progress | None = None,
) -> ScenarioReport:
    """Put each artifact under load, one after the other; see `bench.conditions.doubts` for `omp_threads`.

    Raises MissingRequirementError without LoadGen, CnxDeployError where a runner fails under load.
    """
    import_loadgen()
    bench = request.bench
    conditions = conditions_now(threads=bench.threads, duration_seconds=bench.duration, seed=bench.seed)
    warnings = doubts(conditions, omp_threads)
    torch.set_num_threads(bench.threads or cpu_count())
    groups = list(networks_of(artifacts))
    rows = [row for group in groups for row in _rows_of(group, request, progress)]
    return ScenarioReport(
        request=request,
        loadgen=loadgen_version(),
        rows=tuple(row for row in rows if isinstance(row, ScenarioRow)),
        not_run=tuple(row for row in rows if isinstance(row, NotRun)),
        networks={network_name(group[0]): network_facts(group) for group in groups},
        conditions=conditions,
        warnings=(*warnings, *throttling(gpu_states())),
    )


def _rows_of(
    group: Sequence[Artifact], request: ScenarioRequest, progress: Progress | None
) -> Iterator[ScenarioRow | NotRun]:
    """Rows of the artifacts of one network, which share library and reference."""
    deploy = deploy_spec_from_request(group[0].manifest.request)
    seed = request.bench.seed
    pixels = torch.cat([*image_like_batches(LIBRARY_IMAGES, deploy.image_size, batch_size=LIBRARY_IMAGES, seed=seed)])
    model = recorded_model(group[0]).model

    def reference(indices: Tensor) -> Tensor:
        with reference_runner(model, deploy) as runner:
            return logits_of(runner, torch.split(runner_input(pixels[indices], deploy.input_kind), REFERENCE_BATCH))

    for number, artifact in enumerate(group):
        if progress is not None:
            progress(artifact.path.name, number / len(group))
        yield _row_of(artifact, request, pixels, reference)


def _row_of(artifact: Artifact, request: ScenarioRequest, pixels: Tensor, reference: Reference) -> ScenarioRow | NotRun:
    name, network, bench = artifact.path.name, network_name(artifact), request.bench
    gives_images = bench.gives_images_to_threads and request.scenario != "single-stream"
    make = partial(
        open_runner, artifact, threads=bench.threads, spin=bench.spin, thread_per_image=gives_images,
        cuda_graph=bench.cuda_graph,
    )  # fmt: skip
    with ExitStack() as stack:
        try:
            candidate = create(name, network, make, gate_of(artifact), stack)
        except MissingRequirementError as error:
            return NotRun(name, network, None, None, None, reason_not_run(artifact, error))
        spec = candidate.runner.input_spec
        batch = request.batch_for(spec)
        if spec.min_batch > 1 or (spec.max_batch is not None and batch > spec.max_batch):
            reason = f"it takes {spec.min_batch} to {spec.max_batch} images a call, and the load comes in 1 to {batch}"
            return NotRun(name, network, batch, None, None, reason)
        return measure_under_load(candidate, pixels, reference, request)


def _row_document(row: ScenarioRow) -> dict[str, Any]:
    return {**asdict(row), "runner": {**asdict(row.runner), "details": dict(row.runner.details)}}


def _figures(row: ScenarioRow) -> str:
    shown = {name: value for name, value in row.latency_ms.items() if name != "p95"}
    tails = (
        f"{name} {f'n<{PERCENTILES[int(name[1:])]}' if value is None else f'{value:.2f} ms'}"
        for name, value in shown.items()
    )
    slo = {None: (), True: ("p99 within the limit",), False: ("p99 over the limit",)}[row.p99_within_slo]
    calls = (f"{row.mean_batch:.1f} of them a call",) if row.batch > 1 else ()
    return ", ".join((f"batch {row.batch}: {row.images_per_second:.1f} images/s", *calls, *tails, *slo))
