"""The head of a report: what the machine is, and what makes its figures doubtful."""

from dataclasses import replace
from pathlib import Path

import pytest

from cnx_deploy.bench.conditions import conditions_now, doubts, isa_flags, states_from_csv
from cnx_deploy.core.system import cpu_count, find_gpus
from tests.support.bench_rows import QUIET

# Two lines as nvidia-smi prints them with --format=csv,noheader: an idle card, and one at its power cap and too hot.
NVIDIA_SMI = """\
NVIDIA L4, 580.65.06, 210 MHz, 2040 MHz, 16.20 W, 72.00 W, Enabled, [N/A], 0x0000000000000001
NVIDIA A100-SXM4-80GB, 580.65.06, 1095 MHz, 1410 MHz, 399.10 W, 400.00 W, Enabled, Disabled, 0x0000000000000024
"""


def test_a_quiet_machine_raises_no_doubt() -> None:
    assert doubts(QUIET) == doubts(QUIET, omp_threads="4") == doubts(replace(QUIET, load_average=None)) == ()


@pytest.mark.parametrize(
    ("change", "omp_threads", "doubt"),
    [
        ({"threads": 5}, None, "5 threads on 4 processors wait for each other: use --threads 4"),
        ({}, "1", "OMP_NUM_THREADS is 1, and 4 threads are measured"),
        ({"load_average": 4.1}, None, "the load average was 4.1 on 4 processors before the start"),
        ({"gpu_processes": 2}, None, "2 other processes were on the GPU"),
        ({"gpus": states_from_csv(NVIDIA_SMI)}, None, "A100-SXM4-80GB is throttled by power cap, thermal slowdown"),
    ],
)
def test_each_reason_to_doubt_is_said_once(change: dict[str, object], omp_threads: str | None, doubt: str) -> None:
    (found,) = doubts(replace(QUIET, **change), omp_threads)
    assert doubt in found


def test_this_machine_is_described() -> None:
    found = conditions_now(threads=None, duration_seconds=1.0, seed=3)
    assert (found.threads, found.processors, found.seed) == (cpu_count(), cpu_count(), 3)
    assert found.tools["torch"]
    assert len(found.gpus) == len(find_gpus())
    in_checkout = (Path(__file__).parents[2] / ".git").exists()
    assert (found.commit is not None and len(found.commit.rstrip("+")) >= 12) == in_checkout


def test_instruction_sets_are_those_that_the_processor_lists(tmp_path: Path) -> None:
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor\t: 0\nflags\t\t: fpu avx avx2 amx_bf16 avx512f_not\n", encoding="utf-8")
    assert isa_flags(listed) == ("avx2", "amx_bf16")
    assert isa_flags(tmp_path / "none") == ()


def test_the_drivers_lines_become_states() -> None:
    idle, hot = states_from_csv(NVIDIA_SMI)
    assert (idle.name, idle.sm_clock, idle.power_limit, idle.mig) == ("NVIDIA L4", "210 MHz", "72.00 W", "[N/A]")
    assert (idle.throttled_by, hot.throttled_by) == ((), ("power cap", "thermal slowdown (software)"))
    assert states_from_csv("") == states_from_csv("Failed to initialize NVML: Driver/library mismatch") == ()
