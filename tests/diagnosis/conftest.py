"""An engine to refuse."""

import json
from pathlib import Path

import pytest

from cnx_deploy.core.artifacts import open_artifact, sha256_of_file
from cnx_deploy.core.manifest import Artifact

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """One of the repository's own engines by its manifest, for what looks no further than that."""
    path = tmp_path_factory.mktemp("engines") / "atto-224-fp16-rtx-sm89.engine"
    path.write_bytes(b"engine")
    data = json.loads((ROOT / "engines" / f"{path.stem}.json").read_text(encoding="utf-8"))
    data["files"][0].update(size_bytes=path.stat().st_size, sha256=sha256_of_file(path))
    path.with_suffix(".json").write_text(json.dumps(data), encoding="utf-8")
    return open_artifact(path)
