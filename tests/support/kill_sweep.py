"""Work that is killed at many points: `python -m tests.support.kill_sweep FOLDER KINDS` prints one JSON line a point.

A process of its own, because it forks: everything is imported once and each point costs what the work costs. A point is
a change of the file system ("the 7th"), which covers every state between two of them, or a share of the time that the
work takes, which falls into the middle of native code as well.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnx_deploy.core import artifacts
from cnx_deploy.core.artifacts import open_artifact, reusable_artifact, sha256_of_file, stage_artifact
from cnx_deploy.core.errors import CorruptArtifactError, InputError
from cnx_deploy.core.files import write_text
from tests.core.test_artifacts import REQUEST, SOURCE, manifest_of

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
TIMED_POINTS = 8


@dataclass(frozen=True)
class Case:
    """`prepare` puts the older state into a folder and `work` replaces it.

    `state` reads the folder: "old", "new", or "refused" where the reader says that there is nothing to be used.
    """

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], str]


def main(root: Path, *kinds: str) -> None:
    """Sweep over the points of each kind of work."""
    artifacts.RENAMES_SECONDS = 0.05  # the writer that a reader would wait for is dead
    for kind in kinds:
        if kind == "train":
            sweep_by_time(training_case(root), root)
            continue
        case = {"file": file_case, "artifact": artifact_case, "first": lambda: artifact_case(replaces=False)}[kind]()
        for point in itertools.count():
            if not is_killed(kind, case, root / f"{kind}-{point}", event=point):
                break


def sweep_by_time(case: Case, root: Path) -> None:
    """Kill at random shares of the time that the work takes; some may be done before, on a machine that got faster."""
    seconds = seconds_of(case, root / "whole")
    draw, killed = random.Random(0), 0
    for point in range(3 * TIMED_POINTS):
        killed += is_killed("train", case, root / f"time-{point}", seconds=seconds * draw.uniform(0.02, 1.0))
        if killed == TIMED_POINTS:
            return


def is_killed(kind: str, case: Case, folder: Path, *, event: int | None = None, seconds: float | None = None) -> bool:
    """Run the work to a point, and print what it left and what the same work makes of that; whether it was killed."""
    folder.mkdir(parents=True)
    case.prepare(folder)
    killed = killed_at(lambda: case.work(folder), folder, event, seconds)
    state = case.state(folder)
    case.work(folder)
    left = sorted(path.name for path in folder.rglob(".*"))
    point = {"kind": kind, "killed": killed, "state": state, "after": case.state(folder), "left": left}
    print(json.dumps(point), flush=True)  # noqa: T201
    shutil.rmtree(folder)
    return killed


def seconds_of(case: Case, folder: Path) -> float:
    """Seconds that the whole work takes once everything is warm."""
    for turn in ("cold", "warm"):
        (folder / turn).mkdir(parents=True)
        case.prepare(folder / turn)
        start = time.perf_counter()
        case.work(folder / turn)
    return time.perf_counter() - start


def killed_at(work: Callable[[], None], folder: Path, event: int | None, seconds: float | None) -> bool:
    """Whether a forked process that does the work was killed before it was done."""
    child = os.fork()
    if child == 0:
        if event is not None:
            sys.addaudithook(killer(folder, event))
        try:
            work()
        except BaseException:  # noqa: BLE001 - a fork must never go on as its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    if os.WEXITSTATUS(status):
        raise RuntimeError("the work failed by itself")
    return False


def killer(folder: Path, event: int) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that kills the process just before the nth change below a folder."""
    count = itertools.count()

    def hook(name: str, words: tuple[Any, ...]) -> None:
        counts = name in CHANGES and str(folder) in str(words)
        if counts and (name != "open" or words[2] & (os.O_WRONLY | os.O_RDWR)) and next(count) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


# --- cases ------------------------------------------------------------------------------------------------------------


def file_case() -> Case:
    texts = {"old": "old\n" * 10, "new": "new\n" * 10_000}

    def state(folder: Path) -> str:
        return {text: name for name, text in texts.items()}[(folder / "a.csv").read_text(encoding="utf-8")]

    return Case(
        lambda folder: write_text(folder / "a.csv", texts["old"]),
        lambda folder: write_text(folder / "a.csv", texts["new"]),
        state,
    )


def artifact_case(*, replaces: bool = True) -> Case:
    """Two files become two others, one under another name; or, as without --force, the place is free."""

    def make(content: bytes, *names: str) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            with stage_artifact(folder, "small") as staging:
                if reusable_artifact(folder, "small", REQUEST, SOURCE, force=replaces) is not None:
                    return
                for name in names:
                    (staging.folder / name).write_bytes(content)
                staging.commit(manifest_of("small", staging.record(*names)))

        return work

    def state(folder: Path) -> str:
        try:
            artifact = open_artifact(folder / "small.onnx")
        except (CorruptArtifactError, InputError) as error:
            if "Make it again" not in str(error):
                raise
            return "refused"
        expected = {*artifact.file_names, "small.json"}
        if {path.name for path in folder.iterdir() if not path.name.startswith(".")} != expected:
            raise RuntimeError(f"files of nobody: {sorted(folder.iterdir())}")
        (content,) = {(folder / name).read_bytes() for name in artifact.file_names}
        return {b"old": "old", b"newer": "new"}[content]

    prepare = make(b"old", "small.onnx", "small.old.data") if replaces else lambda folder: None
    return Case(prepare, make(b"newer", "small.onnx", "small.new.data"), state)


def training_case(root: Path) -> Case:
    """The older state is nothing, or a state to resume from; done is what an undisturbed run writes, to the bit."""
    import torch

    from cnx_deploy.training import TrainingSpec, train
    from tests.conftest import TINY_TEST
    from tests.support.training_data import write_colours

    torch.set_num_threads(1)
    data = write_colours(root / "data")
    names = ("best.safetensors", "last.safetensors")

    def run(folder: Path, resume: bool) -> None:
        train(TrainingSpec(data, TINY_TEST, folder, epochs=3, image_size=32, batch_size=8, run_dir=folder / "run",
                           resume=resume))  # fmt: skip

    def work(folder: Path) -> None:
        try:
            run(folder, resume=True)
        except InputError as error:  # killed before there was a state; the message says so
            if "to resume" not in str(error):
                raise
            shutil.rmtree(folder / "run", ignore_errors=True)
            run(folder, resume=False)

    def hashes(folder: Path) -> list[str]:
        return [sha256_of_file(folder / "run" / name) for name in names if (folder / "run" / name).is_file()]

    run(root / "undisturbed", resume=False)
    expected = hashes(root / "undisturbed")
    return Case(lambda folder: None, work, lambda folder: "new" if hashes(folder) == expected else "old")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
