"""A child process that crashes, hangs, eats memory or is in a hostile file's hands ends in one message."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cnx_deploy.core.artifacts import Artifact
from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, CnxDeployError, InputError, OutOfMemoryError
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine

ROOT = Path(__file__).parents[2]
ROOMY = Limits(60.0, 4 << 30)
SPEC = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1), (1, 4, 8)))


def run(name: str, limits: Limits = ROOMY, **arguments: object) -> object:
    return run_isolated(
        f"tests.support.native_faults:{name}", arguments, limits, what="Building a.onnx", failure=BuildError
    )


def wait_for_end(process: Path) -> None:
    """Wait until a process, by its folder in /proc, is gone or a zombie."""
    deadline = time.monotonic() + 10
    while process.exists() and " Z " not in (process / "stat").read_text(encoding="ascii"):
        if time.monotonic() > deadline:
            os.kill(int(process.name), signal.SIGKILL)
            raise AssertionError("it lives on")
        time.sleep(0.05)


def test_an_answer_comes_back_whatever_is_printed() -> None:
    seconds: list[float] = []
    words = {"first": 2, "second": 3}
    task = "tests.support.native_faults:add"
    assert run_isolated(task, words, ROOMY, what="", failure=BuildError, tick=seconds.append) == 5
    assert seconds == sorted(seconds) != []


def test_a_child_has_the_variables_it_was_given_beside_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    words = {"what": "", "failure": BuildError, "environment": {"GIVEN": "2"}}
    assert [run_isolated("os:getenv", {"key": name}, ROOMY, **words) for name in ("OURS", "GIVEN")] == ["1", "2"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "limits", "reason"),
    [
        ("segfault", ROOMY, "was ended by SIGSEGV, expected an answer"),
        ("abort", ROOMY, r"was ended by SIGABRT, .* It printed last:\n  terminate called after .*bad_alloc"),
        ("signal_itself", ROOMY, "was ended by signal 40, expected an answer"),
        ("leave", ROOMY, "ended with code 7 and said nothing"),
        ("stumble", ROOMY, r"ended with code 1 and said nothing.*\n  ZeroDivisionError: division by zero"),
        ("hang", Limits(1.0, 4 << 30), "took more than 1 s and was ended"),
        ("eat_memory", Limits(60.0, 300_000_000), "took more than 300 MB of memory and was ended"),
        ("babble", ROOMY, "printed more than 67 MB and was ended"),
    ],
)
def test_a_child_that_gives_no_answer_is_one_short_message(name: str, limits: Limits, reason: str) -> None:
    start = time.monotonic()
    with pytest.raises(BuildError) as caught:
        run(name, limits)
    assert re.search(f"^Building a.onnx failed: its process {reason}", str(caught.value), re.DOTALL)
    assert len(str(caught.value)) < 3000
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("refuse", InputError, r"^The file is no image; a picture was expected\.$"),
        ("find_no_room", OSError, r"^\[Errno 28\] No space left on device$"),
        ("find_no_memory", OutOfMemoryError, r"^There is not enough memory \(MemoryError\)"),
    ],
)
def test_what_the_child_raised_is_raised_here(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(name)


@pytest.mark.parametrize(
    "answer",
    [
        "", "{}", "[]", "[" * 100_000, '{"errno": 5}', '{"result": 1, "error": "InputError"}', "\xff",
        '{"result": 1, "error": 7, "message": "", "errno": 0}',
    ],
)  # fmt: skip
def test_an_answer_of_another_form_is_none(answer: str) -> None:
    with pytest.raises(BuildError, match=r"Building a\.onnx failed: its process ended with code 0 and said nothing"):
        run("forge", text=answer)


@pytest.mark.parametrize("name", ["CnxDeployError", "SystemExit", "annotations", "__doc__"])
def test_an_error_that_a_child_names_is_one_of_ours(name: str) -> None:
    with pytest.raises(CnxDeployError, match=r"^said$"):
        run("forge", text=f'{{"result": 1, "error": "{name}", "message": "said", "errno": 0}}')


@pytest.mark.parametrize("is_safe", [True, False])
def test_a_child_imports_nothing_from_the_folder_it_is_run_in(
    is_safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A downloaded folder may hold a json.py. The control: without -P Python looks there first."""
    for name in ("json", "msgspec", "importlib", "tests", "cnx_deploy") if is_safe else ("json",):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').close()\nraise SystemExit(3)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    if is_safe:
        assert run("add", first=2, second=3) == 5
    else:
        words = [sys.executable, "-m", "cnx_deploy.core.child_process"]
        assert subprocess.run(words, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 3
    assert (tmp_path / "ran").exists() is not is_safe


@pytest.mark.parametrize("hangs", [False, True])
def test_what_a_child_started_ends_with_it(hangs: bool, tmp_path: Path) -> None:
    if hangs:
        with pytest.raises(BuildError, match="took more than 2 s and was ended"):
            run("leave_a_grandchild_and_hang", Limits(2.0, 4 << 30), path=str(tmp_path / "pid"))
    else:
        assert run("leave_a_grandchild", path=str(tmp_path / "pid")) is None
    wait_for_end(Path("/proc", (tmp_path / "pid").read_text(encoding="ascii")))


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = f"""
from cnx_deploy.core.errors import BuildError
from cnx_deploy.core.child_process import Limits, run_isolated
words = {{"path": {str(tmp_path / "pid")!r}}}
run_isolated("tests.support.native_faults:tell_pid", words, Limits(60.0, 1 << 32), what="a", failure=BuildError)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="ascii"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    wait_for_end(Path("/proc", (tmp_path / "pid").read_text(encoding="ascii")))


def test_an_engine_built_in_a_child_has_the_same_record(
    tiny_onnx_fp16: Artifact, tiny_engine: Artifact, tmp_path: Path
) -> None:
    """Two builds differ in bytes; what was found of them does not."""
    built = build_engine(tiny_onnx_fp16, SPEC, tmp_path, limits=ROOMY)
    ours, theirs = (replace(engine.manifest.facts, build_seconds=0.0) for engine in (built, tiny_engine))
    assert (ours, built.manifest.request) == (theirs, tiny_engine.manifest.request)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (Limits(60.0, 60_000_000), r"took more than 60 MB of memory and was ended.* free memory"),
        (Limits(0.2, 4 << 30), r"took more than 0\.2 s and was ended"),
    ],
    ids=["memory", "time"],
)
def test_a_build_that_meets_its_limits_leaves_nothing(
    limits: Limits, reason: str, tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=reason):
        build_engine(tiny_onnx_fp16, SPEC, tmp_path, limits=limits)
    assert list(tmp_path.iterdir()) == []
