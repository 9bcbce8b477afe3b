"""A child process that a hostile or broken file has hold of: what it may do to its parent, which is next to nothing.

Each test is something that worked once.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError

ROOT = Path(__file__).parents[2]
ROOMY = Limits(60.0, 4 << 30)


def run(name: str, limits: Limits = ROOMY, **arguments: object) -> object:
    return run_isolated(
        f"tests.support.native_faults:{name}", arguments, limits, what="Building a.onnx", failure=BuildError
    )


def test_a_child_imports_nothing_from_the_folder_it_is_run_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A downloaded folder with a json.py in it ran that when a file of it was compiled."""
    for name in ("json", "msgspec", "importlib", "tests", "cnx_deploy"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("add", first=2, second=3) == 5
    assert not (tmp_path / "ran").exists()


def test_the_trap_of_that_test_works(tmp_path: Path) -> None:
    """The negative control: python -m looks in the folder first."""
    (tmp_path / "json.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "cnx_deploy.core.child_process"], cwd=tmp_path, env=environment, check=False
    )
    assert (done.returncode, (tmp_path / "ran").exists()) == (3, True)


@pytest.mark.parametrize(("task", "fails"), [("leave_a_grandchild", False), ("leave_a_grandchild_and_hang", True)])
def test_what_a_child_started_ends_with_it(task: str, fails: bool, tmp_path: Path) -> None:
    if fails:
        with pytest.raises(BuildError, match="took more than 2 s and was ended"):
            run(task, Limits(2.0, 4 << 30), path=str(tmp_path / "pid"))
    else:
        assert run(task, path=str(tmp_path / "pid")) is None
    grandchild = Path("/proc", (tmp_path / "pid").read_text(encoding="ascii"))
    deadline = time.monotonic() + 10
    while grandchild.exists() and " Z " not in (grandchild / "stat").read_text(encoding="ascii"):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.05)


def test_a_child_that_prints_without_end_is_ended_and_quoted_in_short(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"printed more than 67 MB and was ended") as caught:
        run("babble")
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "answer",
    ["{}", "[]", "[" * 100_000, '{"system": 5}', '{"system": [1, 2, 3, 4, 5, 6]}', '{"error": 7}', "\xff", '{"a": 1}'],
)
def test_an_answer_that_is_none_is_a_failure_of_the_child(answer: str) -> None:
    with pytest.raises(BuildError, match=r"Building a\.onnx failed: its process ended with code 0 and said nothing"):
        run("forge", text=answer)


def test_a_child_that_a_signal_without_a_name_ends_is_one_message() -> None:
    with pytest.raises(BuildError, match=r"its process was ended by signal 40, expected an answer"):
        run("signal_itself", number=40)
