"""Copies of the shared artifacts, for tests that change files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.manifest import Artifact


def copy_artifact(artifact: Artifact, folder: Path) -> Artifact:
    """The files of an artifact and its manifest in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f"{artifact.manifest.stem}.json", *(file.name for file in artifact.manifest.files)):
        shutil.copy(artifact.path.parent / name, folder)
    return open_artifact(folder / artifact.path.name)


def altered_artifact(artifact: Artifact, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The path of a copy in a new folder, whose manifest says something else: `change` is given it as plain types."""
    copy_artifact(artifact, folder)
    place = folder / artifact.path.with_suffix(".json").name
    manifest = json.loads(place.read_text(encoding="utf-8"))
    change(manifest)
    place.write_text(json.dumps(manifest), encoding="utf-8")
    return folder / artifact.path.name
