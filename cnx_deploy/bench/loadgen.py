"""MLPerf's LoadGen as a source of load: it sends queries, times the answers and judges the run; we answer.

LoadGen is C++ that calls back. What is raised here must not cross its frames, where it would end the process, so a
failure is kept, what still comes is answered empty, and the failure is raised when LoadGen has ended. It
runs on a thread of its own, so that Ctrl-C reaches Python. Its logs go to a temporary folder that is read and removed.
"""

import importlib
import importlib.metadata
import json
import math
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.errors import CnxDeployError, InputError, MissingRequirementError

__all__ = ["PERCENTILE", "SCENARIOS", "Load", "LoadResult", "import_loadgen", "loadgen_version", "run_load"]

SCENARIOS = {"single-stream": "SingleStream", "offline": "Offline", "server": "Server"}
"""Our words and LoadGen's."""

PERCENTILE = 0.99
"""The share of a server's queries that has to be answered in time, MLPerf's for image classification."""

HEADROOM = {"single-stream": 2.0, "offline": 1.2, "server": 1.0}
"""LoadGen makes its queries before it starts, from the expected speed: too few, and the run is too short to count."""

Answer = Callable[[Sequence[int]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What LoadGen is asked for.

    `images_per_second` is what to expect of the one who answers. `target_qps` (queries a second, one image each) and
    `slo_ms` are a server's. `seed` decides the order of the samples and the times of arrival.
    """

    scenario: str
    samples: int
    batch: int
    duration_seconds: float
    images_per_second: float
    seed: int = 0
    target_qps: float | None = None
    slo_ms: float | None = None

    def __post_init__(self) -> None:
        if self.scenario not in SCENARIOS:
            raise InputError(f"No scenario is called {self.scenario!r}. Choose from: {', '.join(SCENARIOS)}.")

    @property
    def most_outstanding(self) -> int:
        """Unanswered queries of a server at which the run is lost, and ends: 0 for none.

        Queries are answered in turn, so this many mean that a twentieth of all is late already; 1 % may be.
        """
        if self.target_qps is None or self.slo_ms is None:
            return 0
        return math.ceil(self.target_qps * (self.slo_ms / 1000.0 + self.duration_seconds / 20)) + self.batch + 50


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What LoadGen found. `reasons`: why it is not valid, a sentence each.

    `percentiles_ms`: by rank, of the time from a query's (scheduled) start to its answer; empty for offline, whose one
    query has no latency of interest. `p90_estimate_ms`: LoadGen's bound on it from a sample this small, single-stream.
    `slo_held`: whether 99 % of a server's answers were in time, else None.
    """

    is_valid: bool
    reasons: tuple[str, ...]
    images: int
    images_per_second: float
    percentiles_ms: dict[int, float]
    p90_estimate_ms: float | None
    slo_held: bool | None


def import_loadgen() -> Any:
    """The module `mlperf_loadgen`; raises MissingRequirementError where it is not installed."""
    try:
        return importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise MissingRequirementError(
            "--scenario needs MLPerf's LoadGen, which is not installed: pip install 'cnx-deploy[loadgen]'."
        ) from error


def loadgen_version() -> str:
    """The version of the installed package."""
    return importlib.metadata.version("mlcommons-loadgen")


def run_load(load: Load, answer: Answer) -> LoadResult:
    """Let LoadGen send queries until the duration is over, and call `answer` with the samples of at most one batch.

    `answer` takes indices from 0 to `load.samples` and returns when their logits are in host memory. A CnxDeployError
    it raises is raised from here, any other exception as the cause of one, once LoadGen has ended.
    """
    loadgen = import_loadgen()
    system = _System(loadgen, answer, load)
    with tempfile.TemporaryDirectory(prefix="cnx-loadgen-") as folder:
        _start_test(loadgen, system, load, Path(folder))
        found = _read_log(Path(folder) / "mlperf_log_detail.txt")
    if isinstance(system.failure, CnxDeployError):
        raise system.failure
    if system.failure is not None:
        what = f"{type(system.failure).__name__}: {system.failure}"
        raise CnxDeployError(
            f"The runner failed after {system.answered} images under {load.scenario} load ({what}). "
            "`cnx-deploy verify` shows whether it runs without load."
        ) from system.failure
    return _result(load, found)


class _System:
    """LoadGen's system under test: queries wait in a line, and one worker answers as many as fit a batch.

    A single stream is answered within the call that brings its query, for only one is ever there and handing it to
    another thread would be part of its latency.
    """

    def __init__(self, loadgen: Any, answer: Answer, load: Load) -> None:
        self._loadgen, self._answer, self._batch = loadgen, answer, load.batch
        self._answers_at_once = load.scenario == "single-stream"
        self._waiting: deque[tuple[int, int]] = deque()
        self._changed = threading.Condition()
        self._is_closed = self._has_all = False
        self.failure: BaseException | None = None
        self.answered = 0

    def issue(self, queries: Iterable[Any]) -> None:
        """LoadGen's callback; returns at once but for a single stream."""
        arrived = [(query.id, query.index) for query in queries]
        if self._answers_at_once:
            self._complete(arrived)
            return
        with self._changed:
            self._waiting.extend(arrived)
            self._changed.notify()

    def flush(self) -> None:
        """LoadGen's callback after its last query."""
        with self._changed:
            self._has_all = True
            self._changed.notify()

    def work(self) -> None:
        """Answer until closed, on a thread of its own."""
        while taken := self._take():
            self._complete(taken)

    def close(self) -> None:
        """End `work`, once LoadGen waits for nothing more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()

    def _take(self) -> list[tuple[int, int]]:
        """What has arrived, at most a batch and at least one; empty when closed."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            count = 0 if self._is_closed else min(self._batch, len(self._waiting))
            return [self._waiting.popleft() for _ in range(count)]

    def _has_work(self) -> bool:
        """After a failure nothing more is answered before the last query: LoadGen soon has too many and ends."""
        return self._is_closed or (bool(self._waiting) and (self.failure is None or self._has_all))

    def _complete(self, taken: Sequence[tuple[int, int]]) -> None:
        if self.failure is None:
            try:
                self._answer([index for _, index in taken])
                self.answered += len(taken)
            except BaseException as error:  # noqa: BLE001 - kept and raised by run_load: C++ would end the process
                self.failure = error
        response = self._loadgen.QuerySampleResponse
        self._loadgen.QuerySamplesComplete([response(query, 0, 0) for query, _ in taken])


def _start_test(loadgen: Any, system: _System, load: Load, folder: Path) -> None:
    """Run LoadGen to its end, with its logs in `folder`."""
    log = loadgen.LogSettings()
    log.log_output.outdir = str(folder)
    log.enable_trace = False
    test = loadgen.ConstructSUT(system.issue, system.flush)
    library = loadgen.ConstructQSL(load.samples, load.samples, lambda indices: None, lambda indices: None)
    with ThreadPoolExecutor(2) as threads:
        threads.submit(system.work)
        # LoadGen looks for a file that changes its settings: one that is not there, never one of the working folder.
        arguments = (test, library, _settings(loadgen, load), log, str(folder / "no-audit.config"))
        run = threads.submit(loadgen.StartTestWithLogSettings, *arguments)
        try:
            run.result()
        except BaseException as error:
            system.failure = error  # Ctrl-C: what still comes is answered empty
            raise
        finally:
            wait([run])
            system.close()
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(test)


def _settings(loadgen: Any, load: Load) -> Any:
    settings = loadgen.TestSettings()
    settings.scenario = getattr(loadgen.TestScenario, SCENARIOS[load.scenario])
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.min_duration_ms = math.ceil(1000.0 * load.duration_seconds)
    settings.min_query_count = 1
    expected = load.images_per_second * HEADROOM[load.scenario]
    settings.offline_expected_qps = expected
    settings.single_stream_expected_latency_ns = max(1, round(1e9 / expected))
    if load.target_qps is not None and load.slo_ms is not None:
        settings.server_target_qps = load.target_qps
        settings.server_target_latency_ns = round(1e6 * load.slo_ms)
        settings.server_target_latency_percentile = PERCENTILE
        settings.server_max_async_queries = load.most_outstanding
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = load.seed % 2**64
    return settings


def _read_log(path: Path) -> dict[str, Any]:
    """LoadGen's detailed log as its last value by key: lines of `:::MLLOG {"key": …, "value": …}`."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    entries = [json.loads(line.removeprefix(":::MLLOG ")) for line in lines if line.startswith(":::MLLOG ")]
    found = {entry["key"]: entry["value"] for entry in entries}
    if "result_validity" not in found:
        raise CnxDeployError(
            f"LoadGen ended without a result ({found.get('error_runtime', 'no reason given')}): expected a summary. "
            "Run it again with a longer --duration."
        )
    return found


def _result(load: Load, found: dict[str, Any]) -> LoadResult:
    names = {
        "single-stream": "result_qps_with_loadgen_overhead",
        "offline": "result_samples_per_second",
        "server": "result_completed_samples_per_sec",
    }
    ranks = () if load.scenario == "offline" else (50, 90, 95, 99)
    is_valid = found["result_validity"] == "VALID"
    estimate = found.get("early_stopping_latency_ss") or 0
    return LoadResult(
        is_valid=is_valid,
        reasons=() if is_valid else tuple(_reasons(load, found)),
        images=found["result_query_count"] * found["generated_samples_per_query"],
        images_per_second=float(found[names[load.scenario]]),
        percentiles_ms={rank: found[f"result_{rank}.00_percentile_latency_ns"] / 1e6 for rank in ranks},
        p90_estimate_ms=estimate / 1e6 if estimate else None,
        slo_held=found.get("result_perf_constraints_met"),
    )


def _reasons(load: Load, found: dict[str, Any]) -> Iterable[str]:
    """LoadGen's verdicts in words; its own advice contradicts itself where several fail."""
    queries = found["result_query_count"]
    if not found.get("result_perf_constraints_met", True):
        late = found["result_overlatency_query_count"]
        yield f"{late} of {queries} queries took over {load.slo_ms:g} ms, more than {100 - 100 * PERCENTILE:.0f} %"
    error = str(found.get("error_runtime", ""))
    if "outstanding" in error:
        yield f"ended early with over {load.most_outstanding} queries unanswered: fewer are answered than arrive"
    elif error:
        yield f"LoadGen: {error}"
    elif not found["result_min_duration_met"]:
        yield f"it was over in less than {load.duration_seconds:g} s: faster than expected, so measure again"
    if not found["early_stopping_met"]:
        yield f"LoadGen: {' '.join(str(found['early_stopping_result']).replace('*', '').split())}"
    if not found["result_min_queries_met"]:
        yield f"{queries} queries are too few"
