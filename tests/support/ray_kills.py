"""Batches on a Ray cluster of two nodes on this machine, of which something is killed.

A kill happens when a given number of parts is done, so that each falls into the middle of the work.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cnx_deploy as cnx
from tests.support.batches import jpegs, rows_of, with_broken, write_folder

HOOK = Path(__file__).parent / "kill_hook"
HEAD_CPUS, NODE_CPUS = 4, 2
IMAGES, PART_SIZE, BROKEN = 123, 3, (7, 50, 100)
PARTS = IMAGES // PART_SIZE
WAIT_SECONDS = 240
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # read when ray is imported: nodes are at 127.0.0.1


@dataclass(frozen=True)
class Outcome:
    """What a run with kills left: rows that are missing or there twice, and whether all are as without a kill.

    `killed`: how many kills of each kind have met a process at work.
    """

    kills: tuple[tuple[str, int], ...]
    killed: dict[str, int]
    lost: int
    doubled: int
    errors: int
    equals_undisturbed: bool
    seconds: float


class KillCluster:
    """A head of four processors and a node of two; the work, and its rows without any kill."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = write_folder(folder / "photos", with_broken(jpegs(IMAGES, (500, 375)), *BROKEN))
        self.model = cnx.export("tiny-test", precision="fp32", image_size=32, num_classes=10, output_dir=folder).path
        cnx.batch(self.model, self.images, folder / "undisturbed", part_size=PART_SIZE)
        self.expected = rows_of(folder / "undisturbed")
        self.order = folder / "order"
        self._count = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[Any]:
        """Start the cluster and connect to it."""
        with tempfile.TemporaryDirectory(prefix="cnx-ray-", dir="/tmp", ignore_cleanup_errors=True) as short:
            os.environ |= {"RAY_TMPDIR": short, "CNX_TEST_KILL": str(self.order), "RAY_USAGE_STATS_ENABLED": "0"}
            root = str(Path(__file__).parents[2])
            os.environ["PYTHONPATH"] = os.pathsep.join([str(HOOK), root, os.environ.get("PYTHONPATH", "")])
            import ray
            from ray.cluster_utils import Cluster

            head = {"num_cpus": HEAD_CPUS, "include_dashboard": False}
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            self.node = self.cluster.add_node(num_cpus=NODE_CPUS)
            ray.init(address=self.cluster.address, log_to_driver=False)
            try:
                yield self
            finally:
                ray.shutdown()
                self.cluster.shutdown()

    def run(self, kills: Sequence[tuple[str, int]]) -> Outcome:
        """Do the work with kills, each a kind and how many parts are done before it, and say what is there at the end.

        Kills of the driver come in runs of their own, and that of a node once a run.
        """
        self._count += 1
        out, start = self.folder / f"out-{self._count}", time.monotonic()
        killed = self._driver(out, kills) if kills[0][0] == "driver" else self._others(out, kills)
        rows = rows_of(out)
        indices = [row["index"] for row in rows]
        return Outcome(
            kills=tuple(kills),
            killed=killed,
            lost=IMAGES - len(set(indices)),
            doubled=len(indices) - len(set(indices)),
            errors=sum(row["error"] is not None for row in rows),
            equals_undisturbed=rows == self.expected,
            seconds=round(time.monotonic() - start, 1),
        )

    def batch(self, out: Path, actors: int, progress: Callable[[str, float], None] | None = None) -> Any:
        """The work on the cluster."""
        options = {"part_size": PART_SIZE, "engine": "ray", "actors": actors, "address": self.cluster.address}
        return cnx.batch(self.model, self.images, out, progress=progress, **options)

    def _others(self, out: Path, kills: Sequence[tuple[str, int]]) -> dict[str, int]:
        """Kill while the command goes on; how many kills of each kind have met a process.

        worker: SIGKILL for an actor. before: one dies when the data of a part are written and the file has not got its
        name; after: when it has, and nobody has heard of it. node: one goes with all its processes, at least one of
        which is an actor; another takes its place at the end.
        """
        done, waiting, ordered, killed = 0, list(kills), list[str](), Counter[str]()

        def settle() -> None:
            if ordered and not self.order.exists():
                killed[ordered.pop()] += 1

        def progress(text: str, share: float) -> None:
            nonlocal done
            done += 1
            settle()
            if not waiting or waiting[0][1] > done or ordered:
                return
            kind = waiting[0][0]
            actors = actors_of(self.node if kind == "node" else None)
            if not actors:  # the last kill's is on its way
                return
            waiting.pop(0)
            if kind in ("before", "after"):
                write_whole(self.order, kind)
                ordered.append(kind)
                return
            killed[kind] += 1
            if kind == "worker":
                os.kill(actors[0], signal.SIGKILL)
            else:
                self.cluster.remove_node(self.node, allow_graceful=False)

        self.batch(out, HEAD_CPUS + NODE_CPUS - 2 if kills[0][0] == "node" else 2, progress)
        settle()
        if killed["node"]:
            self.node = self.cluster.add_node(num_cpus=NODE_CPUS)
        return dict(killed)

    def _driver(self, out: Path, kills: Sequence[tuple[str, int]]) -> dict[str, int]:
        """SIGKILL for the command, and the same command again, as often as is asked for."""
        words = ["batch", self.model, self.images, "--to", out, "--part-size", PART_SIZE, "--engine", "ray",
                 "--actors", 2, "--address", self.cluster.address]  # fmt: skip
        command, killed = [sys.executable, "-m", "tests.support.batch_command", *map(str, words)], 0
        for _, at_part in kills:
            # The process kills itself: a kill from outside may come when a fast run has ended.
            made = len(list(out.glob("rows/part-*.parquet")))
            environment = {**os.environ, "CNX_TEST_KILL_DRIVER": str(max(1, at_part - made))}
            first = subprocess.run(command, capture_output=True, timeout=WAIT_SECONDS, check=False, env=environment)
            killed += first.returncode == -signal.SIGKILL and not (out / "manifest.json").exists()
        again = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, check=False)
        if again.returncode != 3:  # of the broken images
            raise RuntimeError(again.stderr)
        return {"driver": killed}


def actors_of(node: Any = None) -> list[int]:
    """The processes of actors that answer for images, of one node or of all clusters of this process."""
    raylets = {process.pid for each in [node] if each for kind in each.all_processes.values()
               for process in [entry.process for entry in kind]}  # fmt: skip
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name = (entry / "cmdline").read_bytes()
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if name.startswith(b"ray::") and b"_Actor" in name and (not raylets or parent in raylets):
                found.append(int(entry.name))
    return found


def write_whole(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def ten_of_each() -> Iterator[list[tuple[str, int]]]:
    """Kills of the recorded sweep, a list a run: ten of each kind, at other points of the work."""
    points = [3 + 3 * turn for turn in range(10)]
    yield [("worker", point) for point in points]
    yield [(("before", "after")[turn % 2], point) for turn, point in enumerate(points)]
    yield [(("after", "before")[turn % 2], point) for turn, point in enumerate(points)]
    yield [("driver", point) for point in points]
    yield from ([("node", point)] for point in points)
