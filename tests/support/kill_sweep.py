"""Work that is killed at many points: `python -m tests.support.kill_sweep KIND FOLDER` prints one JSON line a point.

A process of its own, because it forks: everything is imported once and each point costs what the work costs. A point
is an event of the file system ("the 7th"), which covers every state between two of them, or a share of the time that
the work takes, which falls into the middle of native code as well.
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import open_artifact, sha256_of_file, stage_artifact
from cnx_deploy.core.errors import InputError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.manifest import OnnxManifest
from tests.core.test_artifacts import FACTS, MODEL, REQUEST

CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
TIMED_POINTS = 20


@dataclass(frozen=True)
class Case:
    """`prepare` puts the older state into a folder, `work` replaces it, `state` says what is there: "old" or "new"."""

    prepare: Callable[[Path], None]
    work: Callable[[Path], None]
    state: Callable[[Path], str]


def main(kind: str, root: Path) -> None:
    """Sweep, and at the end run to the end once more over what the last kill left."""
    case: Case = {"file": file_case, "artifact": artifact_case, "export": export_case, "build": build_case,
                  "train": training_case}[kind](root)  # fmt: skip
    took = finished_in(case, root / "whole")
    events = iter(range(10_000)) if kind in ("file", "artifact", "export") else iter(())
    for point in events:
        if not told(case, root / f"event-{point}", event=point):
            break
    if kind in ("export", "build", "train"):
        draw = random.Random(0)
        killed = 0
        for point in range(2 * TIMED_POINTS):  # on a machine that got faster since, some are done before their time
            killed += told(case, root / f"time-{point}", seconds=took * draw.uniform(0.02, 1.0))
            if killed == TIMED_POINTS:
                break


def told(case: Case, folder: Path, *, event: int | None = None, seconds: float | None = None) -> bool:
    """Run the work to a point, and print what it left and what the next run makes of that; whether it was killed."""
    folder.mkdir(parents=True)
    case.prepare(folder)
    killed = killed_at(lambda: case.work(folder), folder, event, seconds)
    left = hidden(folder)
    state = case.state(folder)
    case.work(folder)
    after = {"state": case.state(folder), "left": hidden(folder)}
    print(json.dumps({"killed": killed, "state": state, "left": left, "after": after}), flush=True)  # noqa: T201
    shutil.rmtree(folder)
    return killed


def finished_in(case: Case, folder: Path) -> float:
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
        counts = name in CHANGES and str(folder) in str(words) and (name != "open" or is_written(words))
        if counts and next(count) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def is_written(words: tuple[Any, ...]) -> bool:
    return bool(words[2] & (os.O_WRONLY | os.O_RDWR))


def hidden(folder: Path) -> list[str]:
    """What is there beyond the results, locks left out: they hold nothing."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.suffix != ".lock")


# --- cases ------------------------------------------------------------------------------------------------------------


def file_case(root: Path) -> Case:
    texts = {"old": "old\n" * 10, "new": "new\n" * 10_000}

    def state(folder: Path) -> str:
        return {text: name for name, text in texts.items()}[(folder / "a.csv").read_text(encoding="utf-8")]

    return Case(
        lambda folder: write_text(folder / "a.csv", texts["old"]),
        lambda folder: write_text(folder / "a.csv", texts["new"]),
        state,
    )


def artifact_case(root: Path) -> Case:
    """Two files become two others, one under another name: four changes that have to look like one."""

    def make(content: bytes, *names: str) -> Callable[[Path], None]:
        def work(folder: Path) -> None:
            with stage_artifact(folder, "small") as staging:
                for name in names:
                    (staging.folder / name).write_bytes(content)
                files = staging.record(*names)
                values = {"source_name": "random:0", "source_sha256": "a" * 64, "facts": FACTS}
                staging.commit(OnnxManifest(stem="small", files=files, model=MODEL, request=REQUEST, **values))

        return work

    def state(folder: Path) -> str:
        artifact = open_artifact(folder / "small.onnx")
        contents = {(folder / file.name).read_bytes() for file in artifact.manifest.files}
        expected = {file.name for file in artifact.manifest.files} | {"small.json"}
        if {path.name for path in folder.iterdir() if not path.name.startswith(".")} != expected:
            raise RuntimeError(f"files of nobody: {sorted(folder.iterdir())}")
        return {frozenset({b"old"}): "old", frozenset({b"newer"}): "new"}[frozenset(contents)]

    return Case(make(b"old", "small.onnx", "small.old.data"), make(b"newer", "small.onnx", "small.new.data"), state)


def export_case(root: Path) -> Case:
    from cnx_deploy.core.deploy_spec import DeploySpec
    from cnx_deploy.exporters.onnx import ExportSpec, export_onnx
    from cnx_deploy.model.convnextv2 import random_model
    from cnx_deploy.verification.verify import verify_export
    from tests.conftest import TINY_TEST

    model = random_model(TINY_TEST, 2, seed=0)
    hashes: dict[str, str] = {}

    def work(name: str, batch: tuple[int, int, int]) -> Callable[[Path], None]:
        def export(folder: Path) -> None:
            spec = ExportSpec(deploy=DeploySpec("fp16", 32), batch=batch)
            check = partial(verify_export, model=model)
            hashes[name] = export_onnx(model, MODEL, spec, folder, force=True, verify=check).sha256

        return export

    older = root / "older"
    work("old", (1, 2, 4))(older)

    def state(folder: Path) -> str:
        return {value: name for name, value in hashes.items()}[open_artifact(folder / "tiny-test-32-fp16.onnx").sha256]

    return Case(lambda folder: copied(older, folder), work("new", (1, 4, 8)), state)


def build_case(root: Path) -> Case:
    from cnx_deploy.exporters.trt.builder import BuildSpec, build_engine

    export = export_case(root)
    export.prepare(root / "onnx")

    def work(name: str, batch: tuple[int, int, int]) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            spec = BuildSpec(runtime="tensorrt-rtx", target="sm89", batches=(batch,), measure=False)
            build_engine(root / "onnx" / "tiny-test-32-fp16.onnx", spec, folder, force=True)

        return build

    older = root / "older-engine"
    work("old", (1, 2, 4))(older)

    def state(folder: Path) -> str:
        batches = open_artifact(folder / "tiny-test-32-fp16-rtx-sm89.engine").manifest.request.batches
        return {2: "old", 3: "new"}[batches[0][1]]

    return Case(lambda folder: copied(older, folder), work("new", (1, 3, 4)), state)


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

    run(root / "undisturbed", resume=False)
    expected = [sha256_of_file(root / "undisturbed" / "run" / name) for name in names]

    def state(folder: Path) -> str:
        paths = [folder / "run" / name for name in names]
        if not all(path.is_file() for path in paths):
            return "old"
        return "new" if [sha256_of_file(path) for path in paths] == expected else "old"

    return Case(lambda folder: None, work, state)


def copied(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock"))


def lines(text: str) -> Iterator[dict[str, Any]]:
    """What a sweep printed."""
    return (json.loads(line) for line in text.splitlines())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
