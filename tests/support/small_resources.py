"""A file system and a process of a few megabytes each: what is met is the real error of the system."""

import contextlib
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cnx_deploy.cli import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
PROGRESS = re.compile(r"W\d{4} .*|.*\[E:onnxruntime.*|Note: .*|No checkpoint: .*|Building .*")
"""Lines on stderr that a command may print before its error: progress of ours, log lines of the libraries."""


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs in a mount namespace of its own: `place` is its root as its own processes see it, `seen` as everybody."""

    place: Path
    holder: int

    @property
    def seen(self) -> Path:
        return Path(f"/proc/{self.holder}/root{self.place}")

    def run(self, *words: str) -> tuple[int, str]:
        """The command line on it -> exit code, stderr."""
        inside = ["nsenter", "--target", str(self.holder), "--user", "--mount", "--preserve-credentials"]
        code = "import os, sys; os.chdir(sys.argv.pop(1)); from cnx_deploy.cli import main; main(sys.argv[1:])"
        command = [*inside, sys.executable, "-c", code, str(self.place), *words]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    def fill(self, *, leave: int) -> None:
        """Leave so many bytes."""
        (self.seen / "ballast").unlink(missing_ok=True)
        state = os.statvfs(self.seen)
        (self.seen / "ballast").write_bytes(bytes(state.f_bavail * state.f_frsize - leave))

    def empty(self) -> None:
        (self.seen / "ballast").unlink()

    def contents(self) -> dict[str, bytes]:
        """Every file but the ballast."""
        found = [path for path in self.seen.rglob("*") if path.is_file() and path.name != "ballast"]
        return {str(path.relative_to(self.seen)): path.read_bytes() for path in found}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mount one at `folder`, no privilege needed; where that is not allowed the test is skipped with the reason."""
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={megabytes}m tmpfs "$1" && echo mounted && exec sleep 900'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", str(folder)]
    try:
        holder = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no file system of its own can be mounted here: {error}")
    with holder:
        try:
            if holder.stdout is None or holder.stdout.readline() != "mounted\n":
                said = holder.stderr.read().strip() if holder.stderr is not None else ""
                pytest.skip(f"no file system of its own can be mounted here: {said}")
            yield SmallDisk(folder.resolve(), holder.pid)
        finally:
            holder.kill()


def ended(megabytes: int, words: list[str], cwd: Path) -> tuple[int, list[str]]:
    """How a command ends that may have so many MB more: exit code or minus the signal, and what is no progress.

    A process for each limit, as a fork of one with threads hangs.
    """
    command = [sys.executable, "-m", "tests.support.small_resources", str(megabytes << 20), *words]
    environment = {**ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    lines = done.stderr.splitlines()
    return done.returncode, [line for line in lines if line.strip() and not PROGRESS.fullmatch(line)]


def run_with(extra: int, words: list[str]) -> None:
    """Import everything, allow so many bytes of addresses more (RLIMIT_AS), and run the command.

    So what is found does not depend on how large the libraries of a release are.
    """
    import torch

    import cnx_deploy.api
    import cnx_deploy.verification.predict  # noqa: F401

    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    main(words)


if __name__ == "__main__":
    run_with(int(sys.argv[1]), sys.argv[2:])
