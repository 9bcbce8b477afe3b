"""A real file system of a few megabytes: a tmpfs in a mount namespace of its own, so that no privilege is needed."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class SmallDisk:
    """`place` is its root as its own processes see it, `seen` as everybody does."""

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
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stderr

    def free(self) -> int:
        found = os.statvfs(self.seen)
        return found.f_bavail * found.f_frsize

    def fill(self, *, leave: int) -> None:
        """Leave so many bytes."""
        with (self.seen / "ballast").open("wb") as stream:
            stream.write(bytes(self.free() - leave))

    def empty(self) -> None:
        (self.seen / "ballast").unlink()

    def contents(self) -> dict[str, bytes]:
        """Every file but the ballast."""
        found = sorted(path for path in self.seen.rglob("*") if path.is_file())
        return {str(path.relative_to(self.seen)): path.read_bytes() for path in found if path.name != "ballast"}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """Mount one at `folder`; the test is skipped, with what the system said, where that is not allowed."""
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
