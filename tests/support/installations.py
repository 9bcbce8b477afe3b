"""Installations that lack packages, and the real command line run in them.

A folder of links stands in for site-packages: `python -S` knows no other. The metadata in it are real files; only their
text is made up.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

__all__ = ["PROJECT", "ROOT", "distribution", "installation", "run_python", "site_packages"]


def site_packages() -> list[Path]:
    """The folders that hold the installed packages of the interpreter that runs the tests."""
    return [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]


def distribution(folder: Path, name: str, version: str, needs: Iterable[str] = ()) -> None:
    """Put a distribution's metadata into a folder: what pip would leave, without the package."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
    metadata.write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in needs)]) + "\n", encoding="utf-8")


def installation(folder: Path, *names: str) -> Path:
    """A site-packages with cnx-deploy's metadata and links to the packages of these names."""
    distribution(folder, "cnx-deploy", "0.1.0", PROJECT["dependencies"])
    for entry in (entry for place in site_packages() for entry in place.iterdir()):
        if entry.stem.partition("-")[0] in names:
            (folder / entry.name).symlink_to(entry)
    return folder


def run_python(folder: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python on `words` with this source tree, the packages of `folder` and no others."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-S", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip
