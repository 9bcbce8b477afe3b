"""Batches of one process that are killed before each change of their folder: `python -m tests.support.batch_sweep …`.

It prints a JSON line a point: what was there after the kill, and whether the same work then gives every row once. All
work is done in forks, as threads of a library do not outlive one.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

import tests.conftest  # noqa: F401 - registers the smallest network
from cnx_deploy import api
from cnx_deploy.serving import batch  # noqa: F401 - both are loaded before the forks
from tests.support.batches import rows_of
from tests.support.kill_sweep import killed_at

PART_SIZE = 2


def main(model: Path, images: Path, root: Path) -> None:
    """Sweep over the points."""
    whole = root / "whole"
    forked(lambda: work(model, images, whole))
    for event in itertools.count():
        out = root / f"out-{event}"
        killed = killed_at(lambda to=out: work(model, images, to), out, event, None)
        manifest = (out / "manifest.json").exists()
        files = [file for file in out.glob("rows/*.parquet") if pq.read_metadata(file).num_rows == PART_SIZE]
        forked(lambda to=out: work(model, images, to))
        forked(lambda to=out: check(to, whole))
        left = sorted(path.name for path in out.rglob(".*"))
        point = {"event": event, "killed": killed, "manifest": manifest, "files": len(files), "left": left}
        print(json.dumps(point), flush=True)  # noqa: T201
        if not killed:
            break


def work(model: Path, images: Path, out: Path) -> None:
    api.batch(model, images, out, part_size=PART_SIZE)


def check(out: Path, whole: Path) -> None:
    assert rows_of(out) == rows_of(whole)


def forked(work: Callable[[], object]) -> None:
    """Do something in a fork; RuntimeError where it fails."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - a fork must never go on as its parent
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the work failed")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
