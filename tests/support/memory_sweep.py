"""A command under a limit of memory: `python -m tests.support.memory_sweep BYTES WORDS…`.

Everything is imported first, then the process may have so many bytes of addresses more (RLIMIT_AS): what is found does
not depend on how large the libraries of a release are. A process for each limit, as a fork of one with threads hangs.
"""

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

from cnx_deploy.cli import main

FIXED = re.compile(r"W\d{4} .*|.*\[E:onnxruntime.*|Note: .*|No checkpoint: .*|Building .*")
"""Lines on stderr that a command may print before its error: progress of ours, log lines of the libraries."""


def run(extra: int, words: list[str]) -> None:
    """The command in this process, once everything is imported, with so many bytes more than it has."""
    import torch

    import cnx_deploy.api
    import cnx_deploy.verification.predict  # noqa: F401

    torch.set_num_threads(1)
    limit = pages_of_addresses() * resource.getpagesize() + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    main(words)


def ended(megabytes: int, words: list[str], cwd: Path) -> tuple[int, list[str]]:
    """How a command ends that may have so many MB more: exit code or minus the signal, and what is no progress."""
    command = [sys.executable, "-m", "tests.support.memory_sweep", str(megabytes << 20), *words]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, lines_of(done.stderr)


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip() and not FIXED.fullmatch(line)]


def pages_of_addresses() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
