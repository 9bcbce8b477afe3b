"""The record of a benchmark: what `bench --json` prints, and what `bench gate` and the HTML report read back.

Reading a record loads neither torch nor a runner. Every type here is one object of the document.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec

from cnx_deploy.bench.bounds import Bound
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.image_size import ImageSize
from cnx_deploy.core.manifest import Count, Positive
from cnx_deploy.core.strict_json import Finite, PositiveNumber, command_document, kind_of, typed

__all__ = [
    "COMMAND", "BenchmarkRecord", "CompiledFacts", "Conditions", "Correctness", "FileFacts", "GpuState",
    "GpuTimes", "Knee", "Latency", "NetworkFacts", "NotRun", "Plan", "PlannedRow", "Ratio", "Timing",
    "WeightsFacts", "read_benchmark",
]  # fmt: skip

COMMAND = "cnx-deploy bench"
Classes = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
SCHEMA_VERSION = 3
READABLE_VERSIONS = (2, SCHEMA_VERSION)
"""Version 2 has fields besides that nothing reads: energy, and where device memory was read."""
CLOCK = "time.perf_counter_ns around blocking calls, images on the runner's device"


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds a call over a sample. A percentile is None where the sample is too small to carry it.

    `cv_percent` is the standard deviation over the mean. `median_interval` is the median's 95 % bootstrap interval.
    """

    calls: Positive
    mean_ms: Finite
    median_ms: Finite
    median_interval: tuple[Finite, Finite]
    min_ms: Finite
    max_ms: Finite
    p90_ms: Finite | None
    p95_ms: Finite | None
    p99_ms: Finite | None
    cv_percent: Finite

    @property
    def tail(self) -> tuple[float, str]:
        """The highest percentile that the sample carries, with its name; the maximum where it carries none."""
        tails = ((self.p99_ms, "p99"), (self.p95_ms, "p95"), (self.p90_ms, "p90"), (self.max_ms, "maximum"))
        return next((value, name) for value, name in tails if value is not None)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as `peer`: the median over neighbouring calls of one run, with its 95 % interval."""

    peer: str
    ratio: PositiveNumber
    low: Finite
    high: Finite


@dataclass(frozen=True, slots=True)
class Correctness:
    """Timed outputs against the reference over `calls` calls of one batch, the worst sample where not said otherwise.

    `top1_agreement` is the share of images with the reference's class; flips within rounding noise count as agreement.
    The four figures are None where a logit is NaN or infinite. `failures` says which limits are broken.
    """

    calls: Count
    max_abs: Finite | None
    relative_l2: Finite | None
    centred_cosine: Finite | None
    top1_agreement: Finite | None
    nonfinite_count: Count
    failures: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GpuTimes:
    """What CUDA events say of calls that take the images from host memory: medians in ms, and compute in full."""

    compute: Latency
    h2d_ms: Finite
    d2h_ms: Finite
    enqueue_ms: Finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One row: a runner at one batch size.

    `latency` is of a whole batch on the host clock, with images already on the runner's device; `images_per_second`
    comes from its median. `cold_call_ms` is the runner's very first call, on its smallest batch; `first_call_ms` is
    the first call of this batch. `ratios` has every peer of the same run on the same kind of device.

    `status` is UNSTABLE where the last windows disagree or a GPU's compute time varies, and INVALID where the timed
    outputs fail their gate. `remarks` say why, and what was cut short. `device_memory_mib`: see `timing.Contender`.
    """

    name: str
    network: str
    backend: str
    version: str
    device: str
    precision: str
    arithmetic: str
    details: Mapping[str, str]
    batch: Positive
    images_per_second: PositiveNumber
    latency: Latency
    gpu: GpuTimes | None
    cold_call_ms: Finite | None
    first_call_ms: Finite
    create_seconds: Finite
    peak_memory_mib: Finite | None
    correctness: Correctness | None
    ratios: tuple[Ratio, ...]
    status: Literal["OK", "UNSTABLE", "INVALID"]
    remarks: tuple[str, ...]
    device_memory_mib: Finite | None = None
    roofline: Bound | None = None

    def ratio_to(self, peer: str) -> Ratio | None:
        """The ratio to the peer of this name; None for that peer itself and where it did not run."""
        return next((ratio for ratio in self.ratios if ratio.peer == peer), None)

    @property
    def is_widened(self) -> bool:
        """Whether the backend computed in FP32 what the file keeps in half precision."""
        return self.arithmetic not in (self.precision, "float32")


@dataclass(frozen=True, slots=True)
class NotRun:
    """Something that was not timed and why, with what its compiler says of it.

    `batch` is the one that it does not take, or the one of the compiler's figures; None where no batch would do.
    """

    name: str
    network: str
    batch: Positive | None
    kernels: Count | None
    megabytes_per_image: Finite | None
    reason: str


@dataclass(frozen=True, slots=True)
class Knee:
    """A contender's best batch in a sweep, and the smallest batch within 5 % of the best images a second.

    `still_rising`: the best batch is the largest measured, so a larger one may be better. `slo_batch` is the largest
    batch whose `slo_percentile` is within `slo_ms`; None where no batch is, or no limit was given. INVALID rows do
    not count; UNSTABLE rows do, and `is_unstable` says so.
    """

    network: str
    name: str
    best_batch: Positive
    best_images_per_second: PositiveNumber
    knee_batch: Positive
    still_rising: bool
    is_unstable: bool
    slo_batch: Positive | None = None
    slo_percentile: str | None = None
    slo_ms: Finite | None = None


@dataclass(frozen=True, slots=True)
class CompiledFacts:
    """What an engine's compiler chose at `batch`: kernels, and megabytes (1e6 bytes) that one image moves."""

    batch: Positive | None = None
    kernels: Count | None = None
    megabytes_per_image: Finite | None = None


@dataclass(frozen=True, slots=True)
class FileFacts:
    """Hash and precision of a file. Its FP32 parts are layers by kind (engine) or tensors by type (ONNX)."""

    sha256: str
    precision: str
    fp32_layers: Mapping[str, Count] | None = None
    tensors_by_type: Mapping[str, Count] | None = None
    compiled: CompiledFacts = CompiledFacts()


@dataclass(frozen=True, slots=True)
class WeightsFacts:
    """Where a network's weights come from, and the hash over their tensors."""

    origin: str
    sha256: str


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """One network: its size, its cost an image, its weights, its input and its channels, and its files by name.

    `gmacs` counts 1e9 multiply-accumulates an image, `macts` 1e6 outputs of convolutions and linear layers.
    `passes`: how often an image goes through the network, 2 where its mirror does too. The three counts are None for a
    network that came as an ONNX file.
    """

    variant: str
    image_size: ImageSize
    num_classes: Classes
    input: str
    weights: WeightsFacts
    parameters: Count | None
    gmacs: Finite | None
    macts: Finite | None
    files: Mapping[str, FileFacts]
    in_chans: Positive = 3
    passes: Positive = 1

    def file_of(self, row: str) -> FileFacts | None:
        """The file of a row, by the row's name with or without its backend: "x.onnx [fused]"; None of a peer."""
        return self.files.get(row.partition(" [")[0])


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU while nothing is timed, in the words of the driver's tool ("[N/A]" where it has none).

    `throttled_by` names the reasons for which its clock is lowered; clocks float unless an administrator locks them.
    """

    name: str
    driver: str
    sm_clock: str
    max_sm_clock: str
    power_draw: str
    power_limit: str
    ecc: str
    mig: str
    throttled_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conditions:
    """The machine and the settings of one run. `load_average` is of the last minute, None where the system has none.

    `commit` is that of the checkout this package runs from, with "+" where files were changed; None outside one.
    `gpus` is empty without an NVIDIA driver.
    """

    date: str
    commit: str | None
    tools: Mapping[str, str]
    system: str
    cpu: str
    isa: tuple[str, ...]
    processors: Positive
    threads: Positive
    load_average: Finite | None
    gpus: tuple[GpuState, ...]
    gpu_processes: Count
    duration_seconds: Finite
    seed: int

    @property
    def machine(self) -> str:
        """What has to be equal for absolute speeds to be comparable, in words."""
        processor = f"{self.cpu} with {self.threads} threads on {self.processors} processors"
        return ", ".join((processor, *(gpu.name for gpu in self.gpus)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRecord:
    """A whole benchmark. `networks` are by the name that rows have for them; `warnings` doubt the machine."""

    environment: Conditions
    networks: Mapping[str, NetworkFacts]
    rows: tuple[Timing, ...]
    not_run: tuple[NotRun, ...] = ()
    sweep: tuple[Knee, ...] = ()
    warnings: tuple[str, ...] = ()
    clock: str = CLOCK
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read the parsed JSON that `bench --json` printed, of this schema version or the one before.

        Raises:
            ValueError: The document is something else. The message names the field by its path.
        """
        if "planned" in document or "dry_run" in document:
            raise ValueError("it is a plan, which measured nothing")
        version = document.get("schema_version")
        if version not in READABLE_VERSIONS:
            raise ValueError(f"it has schema version {kind_of(version)}, expected {SCHEMA_VERSION}")
        record = typed(document, cls)
        for index, row in enumerate(record.rows):
            if row.network not in record.networks:
                raise ValueError(f"rows[{index}].network: {kind_of(row.network)} is none of its networks")
        return record

    def __str__(self) -> str:
        """The table for a terminal."""
        from cnx_deploy.bench.report import record_lines

        return "\n".join(record_lines(self))

    def to_document(self) -> dict[str, Any]:
        """The record as JSON has it."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document

    @property
    def baseline(self) -> str:
        """The peer whose ratios tables show: the first row that others have a ratio to; empty where there is none."""
        peers = {ratio.peer for row in self.rows for ratio in row.ratios}
        return next((row.name for row in self.rows if row.name in peers), "")

    @property
    def failures(self) -> tuple[str, ...]:
        """What makes the run a failed check, a sentence each; empty when nothing does."""
        wrong = [f"{row.name} batch {row.batch}" for row in self.rows if row.status == "INVALID"]
        if not wrong:
            return ()
        return (f"{', '.join(wrong)} gave wrong outputs while timed; `cnx-deploy verify` says how wrong.",)

    def is_file(self, row: Timing) -> bool:
        """Whether a row is of a recorded file, and not of a peer."""
        return row.name in self.networks[row.network].files

    def rows_of(self, network: str) -> Sequence[Timing]:
        """The rows of one network, in the order they were measured."""
        return [row for row in self.rows if row.network == network]


@dataclass(frozen=True, slots=True)
class PlannedRow:
    """A row of a benchmark that was not made; `missing` says what this machine lacks for it."""

    network: str
    name: str
    batch: int
    missing: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Rows that would be measured, and FP16 bounds of data-centre and desktop GPUs; no row has a figure."""

    environment: Conditions
    networks: Mapping[str, NetworkFacts]
    planned: tuple[PlannedRow, ...]
    roofline: tuple[Bound, ...]
    schema_version: int = SCHEMA_VERSION

    def to_document(self) -> dict[str, Any]:
        """The plan as JSON has it."""
        document: dict[str, Any] = msgspec.to_builtins(self)
        return document


def read_benchmark(path: Path) -> BenchmarkRecord:
    """Read a file that `cnx-deploy bench --json` wrote.

    Raises:
        InputError: The file cannot be read, or is no benchmark of a readable version.
    """
    document, _ = command_document(path, COMMAND)
    try:
        return BenchmarkRecord.from_document(document)
    except ValueError as error:
        raise InputError(f"{path} is no benchmark: {error}. Expected what `{COMMAND} --json` prints.") from error
