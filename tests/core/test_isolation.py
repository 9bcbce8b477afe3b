"""Crash isolation, and a build that is denied its memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cnx_deploy.core.child_process import Limits, run_isolated
from cnx_deploy.core.errors import BuildError, InputError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine

ROOT = Path(__file__).parents[2]
ROOMY = Limits(60.0, 4 << 30)
SPEC = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 4, 8),))


def run(name: str, limits: Limits = ROOMY, **arguments: object) -> object:
    return run_isolated(
        f"tests.support.native_faults:{name}", arguments, limits, what="Building a.onnx", failure=BuildError, tick=None
    )


def test_crash_isolation_an_answer_comes_back_whatever_is_printed() -> None:
    assert run("add", first=2, second=3) == 5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("segfault", "its process was ended by SIGSEGV, expected an answer"),
        ("abort", "its process was ended by SIGABRT"),
        ("leave", "ended with code 7 and said nothing"),
    ],
)
def test_crash_isolation_a_native_crash_is_one_message(name: str, reason: str) -> None:
    with pytest.raises(BuildError) as caught:
        run(name)
    assert f"Building a.onnx failed: {'its process ' if name == 'leave' else ''}{reason}" in str(caught.value)


def test_crash_isolation_the_librarys_last_words_are_in_the_message() -> None:
    with pytest.raises(BuildError, match=r"It printed last:\n  terminate called after throwing .*bad_alloc"):
        run("abort")


def test_crash_isolation_what_hangs_is_ended_in_time() -> None:
    start = time.monotonic()
    with pytest.raises(BuildError, match="took more than 1 s and was ended"):
        run("hang", Limits(1.0, 4 << 30))
    assert time.monotonic() - start < 10


def test_crash_isolation_what_eats_memory_is_ended() -> None:
    with pytest.raises(BuildError, match="took more than 300 MB of memory and was ended"):
        run("eat_memory", Limits(60.0, 300_000_000))


def test_crash_isolation_the_childs_own_error_is_raised_as_it_was() -> None:
    with pytest.raises(InputError, match=r"^The file is none, and one was expected\. Give another\.$"):
        run("refuse")


def test_crash_isolation_a_child_dies_with_its_parent(tmp_path: Path) -> None:
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
    child = int((tmp_path / "pid").read_text(encoding="ascii"))
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    while time.monotonic() < deadline:
        if not Path(f"/proc/{child}").exists() or " Z " in Path(f"/proc/{child}/stat").read_text(encoding="ascii"):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child lived on")


def test_an_engine_built_in_a_child_has_the_same_record(
    tiny_onnx_fp16: Artifact, tiny_engine: Artifact, tmp_path: Path
) -> None:
    """Two builds differ in bytes; what was found of them does not."""
    spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=((1, 1, 1), (1, 4, 8)))
    built = build_engine(tiny_onnx_fp16, spec, tmp_path, limits=ROOMY)
    ours, theirs = dict(built.manifest.facts), dict(tiny_engine.manifest.facts)
    ours.pop("build_seconds")
    theirs.pop("build_seconds")
    assert ours == theirs
    assert (built.manifest.request, built.sha256 != "") == (tiny_engine.manifest.request, True)


def test_build_oom_says_so_and_leaves_nothing(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"took more than 60 MB of memory and was ended.* free memory"):
        build_engine(tiny_onnx_fp16, SPEC, tmp_path, limits=Limits(60.0, 60_000_000))
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_build_oom_nor_time_a_build_that_takes_too_long_leaves_nothing(
    tiny_onnx_fp16: Artifact, tmp_path: Path
) -> None:
    with pytest.raises(BuildError, match=r"took more than 0\.2 s and was ended"):
        build_engine(tiny_onnx_fp16, SPEC, tmp_path, limits=Limits(0.2, 4 << 30))
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
