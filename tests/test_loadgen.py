"""LoadGen's adapter: a failure is an error and no crash, the seed decides, and nothing is read or left behind."""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.bench.loadgen import SCENARIOS, Load, run_load
from cnx_deploy.errors import CnxDeployError, InputError, ParityError


def load(scenario: str, **values: Any) -> Load:
    server = {"target_qps": 500.0, "slo_ms": 500.0} if scenario == "server" else {}
    usual = {"samples": 64, "batch": 8, "duration_seconds": 0.2, "images_per_second": 1000.0}
    return Load(scenario=scenario, **{**usual, **server, **values})


# What fails under load


def fails_at(call: int, error: Exception) -> Callable[[Sequence[int]], None]:
    calls: list[int] = []

    def answer(samples: Sequence[int]) -> None:
        calls.append(len(samples))
        if len(calls) == call:
            raise error
        time.sleep(0.001)

    return answer


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_an_exception_under_load_is_an_error_and_the_next_run_works(scenario: str) -> None:
    with pytest.raises(CnxDeployError, match=r"after \d+ images under .* load \(ValueError: no memory\)") as raised:
        run_load(load(scenario), fails_at(3, ValueError("no memory")))
    assert isinstance(raised.value.__cause__, ValueError)
    assert raised.value.exit_code == 1
    assert run_load(load(scenario), lambda samples: time.sleep(0.001)).images > 0
    assert [thread for thread in threading.enumerate() if "ThreadPool" in thread.name] == []


def test_a_failed_server_ends_before_its_duration() -> None:
    start = time.monotonic()
    with pytest.raises(CnxDeployError, match="gone"):
        run_load(load("server", duration_seconds=20.0, slo_ms=10.0), fails_at(1, ValueError("gone")))
    assert time.monotonic() - start < 15.0


def test_an_error_of_our_own_stays_itself() -> None:
    with pytest.raises(ParityError, match="as it was"):
        run_load(load("offline"), fails_at(1, ParityError("as it was")))


# Seeds and files


def order(scenario: str, seed: int) -> list[int]:
    seen: list[int] = []
    run_load(load(scenario, seed=seed), seen.extend)
    return seen[:40]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_seed_decides_the_order_of_the_samples(scenario: str) -> None:
    first = order(scenario, 1)
    assert len(set(first)) > 10
    assert first == order(scenario, 1)
    assert first != order(scenario, 2)


def test_nothing_is_left_behind_and_the_working_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoadGen writes four files and takes settings from an `audit.config` in the working folder, unless told not to."""
    before = order("offline", 1)
    (tmp_path / "temporary").mkdir()
    (tmp_path / "audit.config").write_text("*.*.performance_issue_same = 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert order("offline", 1) == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["audit.config", "temporary"]


def test_only_the_three_scenarios_exist() -> None:
    with pytest.raises(InputError, match=r"'multi-stream'\. Choose from: single-stream, offline, server"):
        load("multi-stream")
