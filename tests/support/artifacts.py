"""Copies of the shared artifacts, for tests that change files."""

import shutil
from pathlib import Path

from cnx_deploy.core.artifacts import open_artifact
from cnx_deploy.core.manifest import Artifact


def copy_artifact(artifact: Artifact, folder: Path) -> Artifact:
    """The files of an artifact and its manifest in another folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (f"{artifact.manifest.stem}.json", *(file.name for file in artifact.manifest.files)):
        shutil.copy(artifact.path.parent / name, folder)
    return open_artifact(folder / artifact.path.name)
