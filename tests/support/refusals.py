"""What `inspect` says of a file that it refuses, and what the refusal cost."""

import resource
import time
from pathlib import Path

import pytest

from cnx_deploy.cli import main

SECONDS = 2.0
MEGABYTES = 60.0
"""Bounds on the processor time and memory of a refusal before any parser, far above what is seen: 0.05 s, 1 MB."""


def inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and standard error of `inspect`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(path)])
    return int(stop.value.code or 0), capsys.readouterr().err


def refused(path: Path, text: str, capsys: pytest.CaptureFixture[str], *, bounded: bool = True) -> None:
    """`inspect` ends with 4, one message and no traceback; where no parser is needed, soon and with little memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code, message = inspected(path, capsys)
    taken, grown = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (code, "Traceback" in message) == (4, False), message
    assert text in message
    assert path.name in message
    if bounded:
        assert taken < SECONDS
        assert grown / 1024 < MEGABYTES
