"""Energy and device memory of a GPU row, shown on a double of the driver's library."""

import inspect
import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cnx_deploy.bench.candidate import Candidate, create
from cnx_deploy.bench.energy import (
    BY_CUDA,
    BY_NVML,
    measure_energy,
    memory_before,
    memory_grown_since,
    process_memory_mib,
)
from cnx_deploy.parity import GATES
from tests.known_speed import IMAGES, Clock
from tests.nvml_double import CUDA, MIB, OWN, STRANGER, DoubleGpu, DoubleNvml, installed, runner_of, show_torch


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def nvml(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> DoubleNvml:
    return installed(clock, monkeypatch)


# Energy


def test_energy_is_the_difference_of_the_counter_over_the_images(nvml: DoubleNvml, clock: Clock) -> None:
    runner = runner_of(clock)
    energy, remarks = measure_energy(runner, IMAGES, 2.0)
    assert energy is not None
    assert energy.joules_per_image == pytest.approx(200.0 * 0.010 / 4)
    assert energy.watts == pytest.approx(200.0)
    assert energy.seconds == pytest.approx(2.05)
    assert energy.images == 205 * 4
    assert (remarks, nvml.opened) == ((), 0)
    assert len(runner.calls) * 4 > energy.images  # the calls before the counter's first movement do not count


@pytest.mark.parametrize("seconds", [0.01, 0.24, 0.26, 0.31])
def test_both_ends_lie_on_a_movement_of_the_counter(nvml: DoubleNvml, clock: Clock, seconds: float) -> None:
    nvml.gpus["a"].step = 0.1
    clock.nanoseconds = 33_000_000
    energy, _ = measure_energy(runner_of(clock, 1.0), IMAGES, seconds)
    assert energy is not None
    assert energy.joules_per_image == pytest.approx(200.0 * 0.001 / 4)
    assert energy.seconds >= seconds


def test_a_call_longer_than_a_step_of_the_counter_is_measured_too(nvml: DoubleNvml, clock: Clock) -> None:
    energy, _ = measure_energy(runner_of(clock, 2500.0), IMAGES, 5.0)
    assert energy is not None
    assert energy.joules_per_image == pytest.approx(200.0 * 2.5 / 4)


def test_a_counter_that_stands_still_gives_none_and_never_zero(nvml: DoubleNvml, clock: Clock) -> None:
    nvml.gpus["a"].watts = 0.0
    energy, remarks = measure_energy(runner_of(clock), IMAGES, 2.0)
    assert energy is None
    assert remarks == ("energy not measured: the GPU's energy counter stands still at 0 mJ",)
    assert clock.nanoseconds < 1.1e9  # it does not wait for ever


def test_a_counter_that_starts_again_gives_none(nvml: DoubleNvml, clock: Clock) -> None:
    def reload_driver(index: int) -> None:
        if index == 100:
            nvml.gpus["a"].lost_millijoules = 10_000_000

    energy, (remark,) = measure_energy(runner_of(clock, at_call=reload_driver), IMAGES, 2.0)
    assert energy is None
    assert "the counter went from" in remark


def without_package(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def without_driver(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.driver_is_loaded = False


def without_counter(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.gpus["a"].has_counter = False


def on_an_unknown_gpu(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    show_torch(monkeypatch, "elsewhere")


def in_mig_mode(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.gpus["a"].mig = 1


def beside_a_stranger(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.gpus["a"].memory = {OWN: 1, STRANGER: 1}


def beside_a_stranger_under_host_numbers(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.gpus["a"].memory = {STRANGER: 1, STRANGER + 1: 1}


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_package, 'nvidia-ml-py is not installed: pip install "cnx-deploy[nvml]"'),
        (without_driver, "NVML does not start (Driver Not Loaded)"),
        (without_counter, "nvmlDeviceGetTotalEnergyConsumption answers 'Not Supported'"),
        (on_an_unknown_gpu, "NVML has no GPU-elsewhere, which is torch's cuda:0"),
        (in_mig_mode, "the GPU is in MIG mode"),
        (beside_a_stranger, "other processes compute on this GPU (pid 4711): end them"),
        (beside_a_stranger_under_host_numbers, "(pid 4711, 4712, this one among them under its host's number)"),
    ],
)
def test_what_cannot_be_measured_is_none_and_says_why(
    nvml: DoubleNvml, clock: Clock, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., None], reason: str
) -> None:
    assert measure_energy(runner_of(clock), IMAGES, 0.5)[0] is not None
    spoil(nvml, monkeypatch)
    energy, (remark,) = measure_energy(runner_of(clock), IMAGES, 0.5)
    assert energy is None
    assert remark.startswith("energy not measured: ")
    assert reason in remark
    assert nvml.opened == 0


def test_a_process_that_comes_during_the_pass_spoils_it(nvml: DoubleNvml, clock: Clock) -> None:
    def arrive(index: int) -> None:
        nvml.gpus["a"].memory = {OWN: 1, STRANGER: 1} if index >= 50 else {OWN: 1}

    energy, (remark,) = measure_energy(runner_of(clock, at_call=arrive), IMAGES, 2.0)
    assert energy is None
    assert "pid 4711" in remark


@pytest.mark.parametrize(("memory", "is_doubtful"), [({STRANGER: 0}, False), ({}, True), (None, True)])
def test_a_sole_entry_is_this_process_and_no_entry_is_a_doubt(
    nvml: DoubleNvml, clock: Clock, memory: dict[int, int | None] | None, is_doubtful: bool
) -> None:
    nvml.gpus["a"].memory = memory
    energy, remarks = measure_energy(runner_of(clock), IMAGES, 0.5)
    assert energy is not None
    assert ["others cannot be ruled out" in remark for remark in remarks] == [True] * is_doubtful


def test_the_gpu_is_found_by_its_uuid_where_the_numbers_differ(
    nvml: DoubleNvml, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml.gpus = {"first": DoubleGpu(watts=50.0), "second": DoubleGpu(watts=300.0)}
    show_torch(monkeypatch, "second", "first")  # as CUDA_VISIBLE_DEVICES=1,0 does
    drawn = [measure_energy(runner_of(clock, device=torch.device("cuda", index)), IMAGES, 1.0)[0] for index in (0, 1)]
    assert [each and each.watts for each in drawn] == [pytest.approx(300.0), pytest.approx(50.0)]
    assert nvml.asked == ["GPU-second", "GPU-first"]


def test_the_double_has_what_nvml_has() -> None:
    real = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed: not compared")
    for name, function in inspect.getmembers(DoubleNvml, inspect.isfunction):
        if name.startswith("nvml"):
            arguments = len(inspect.signature(function).parameters) - 1  # without self
            assert len(inspect.signature(getattr(real, name)).parameters) == arguments, name
    assert issubclass(real.NVMLError, Exception)
    assert issubclass(real.NVMLLibraryMismatchError, Exception)
    assert not issubclass(real.NVMLLibraryMismatchError, real.NVMLError)  # hence both are caught


# Memory


@pytest.fixture
def cuda(nvml: DoubleNvml, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Torch with a GPU of 1000 MiB, of which `used` MiB are taken, `unused` of them by torch's empty blocks."""
    state = SimpleNamespace(used=300, unused=0)
    for name, answer in {
        "is_available": lambda: True,
        "init": lambda: None,
        "empty_cache": lambda: state.__dict__.update(used=state.used - state.unused, unused=0),
        "current_device": lambda: 0,
        "mem_get_info": lambda device: ((1000 - state.used) * MIB, 1000 * MIB),
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return state


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({OWN: 100 * MIB}, {OWN: 150 * MIB, STRANGER: 999 * MIB}, (50.0, BY_NVML)),
        ({STRANGER: 100 * MIB}, {STRANGER: 150 * MIB}, (70.0, BY_CUDA)),
        ({OWN: 0}, {OWN: 0}, (70.0, BY_CUDA)),
        ({OWN: None}, {OWN: None}, (70.0, BY_CUDA)),
        ({OWN: 100 * MIB}, {}, (70.0, BY_CUDA)),
        (None, None, (70.0, BY_CUDA)),
        ({OWN: 100 * MIB}, {OWN: 100 * MIB}, (None, "")),
        ({OWN: 100 * MIB}, {OWN: 90 * MIB}, (None, "")),
    ],
)
def test_device_memory_is_this_processs_where_nvml_tells_and_else_what_is_gone(
    nvml: DoubleNvml, cuda: SimpleNamespace, before: Any, after: Any, expected: tuple[float | None, str]
) -> None:
    nvml.gpus["a"].memory = before
    earlier = memory_before()
    nvml.gpus["a"].memory, cuda.used = after, 370
    assert memory_grown_since(earlier, CUDA) == expected
    assert memory_grown_since(earlier, torch.device("cuda")) == expected


def test_blocks_that_torch_kept_from_a_runner_before_do_not_hide_what_the_next_one_takes(
    nvml: DoubleNvml, cuda: SimpleNamespace
) -> None:
    nvml.gpus["a"].memory, cuda.used, cuda.unused = {}, 340, 40
    earlier = memory_before()
    cuda.used = 340
    assert memory_grown_since(earlier, CUDA) == (40.0, BY_CUDA)


def test_device_memory_of_the_cpu_of_another_gpu_and_of_nothing_is_none(
    nvml: DoubleNvml, cuda: SimpleNamespace
) -> None:
    earlier = memory_before()
    nvml.gpus["a"].memory = {OWN: 150 * MIB}
    assert memory_grown_since(earlier, CUDA) == (50.0, BY_NVML)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        assert memory_grown_since(earlier, device) == (None, "")
    assert memory_grown_since(None, CUDA) == (None, "")


def test_without_the_package_or_a_gpu_memory_is_not_known(
    nvml: DoubleNvml, cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert process_memory_mib(CUDA) == 100.0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert process_memory_mib(CUDA) is None
    assert memory_before() is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_before() is None


def test_a_gpu_that_takes_no_process_more_does_not_stop_a_row_on_the_cpu(
    cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr(torch.cuda, "init", refuse)
    assert memory_before() is None


def test_a_candidate_on_a_gpu_says_by_how_much_memory_grew_with_its_first_call(
    nvml: DoubleNvml, cuda: SimpleNamespace, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def created(at_call: Callable[[int], None]) -> Candidate:
        with ExitStack() as stack:
            return create("gpu", "atto", lambda: runner_of(clock, at_call=at_call), GATES["fp32"], stack)

    def use_memory(index: int) -> None:
        nvml.gpus["a"].memory = {OWN: 130 * MIB}

    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: IMAGES[:1])
    for at_call, expected in ((use_memory, (30.0, BY_NVML)), (lambda index: None, (None, ""))):
        candidate = created(at_call)
        assert (candidate.device_memory_mib, candidate.device_memory_source) == expected
