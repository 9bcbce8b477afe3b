"""The command line, run in this process, and an engine to refuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cnx_deploy.cli import main
from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.manifest import Artifact

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One of the repository's own engines by its manifest, for what looks no further than that."""
    path = tmp_path_factory.mktemp("engines") / "atto-224-fp16-rtx-sm89.engine"
    path.write_bytes(b"engine")
    data = json.loads((ROOT / "engines" / f"{path.stem}.json").read_text(encoding="utf-8"))
    data["files"][0].update(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    path.with_suffix(".json").write_text(json.dumps(data), encoding="utf-8")
    return open_artifact(path)
