"""The command line, run in this process."""

from collections.abc import Callable

import pytest

from cnx_deploy.cli import main

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cnx(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `cnx-deploy` with some words: (exit code, stdout, stderr)."""

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run
