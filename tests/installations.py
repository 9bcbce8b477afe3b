"""Installations that lack a package or have another release of it, and the real command line run in them.

A folder of links stands in for site-packages: `python -S` knows no other. The metadata in it are real files; only their
text is made up.
"""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

__all__ = ["PROJECT", "ROOT", "distribution", "installation", "run_command", "site_packages"]


def site_packages() -> list[Path]:
    """The folders that hold the installed packages of the interpreter that runs the tests."""
    return [Path(entry) for entry in sys.path if entry.endswith(("site-packages", "dist-packages"))]


def distribution(folder: Path, name: str, version: str, lines: Iterable[str] = ()) -> None:
    """Put a distribution's metadata into a folder: what pip would leave, without the package."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True, exist_ok=True)
    text = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}", *lines]
    metadata.write_text("\n".join(text) + "\n", encoding="utf-8")


def installation(
    folder: Path, *, only: Iterable[str] | None = None, without: Iterable[str] = (),
    versions: Mapping[str, str] | None = None, is_installed: bool = True,
) -> Path:  # fmt: skip
    """A site-packages of links to this one's entries.

    `only`: names of the distributions and packages that it has; `without`: those that it lacks; `versions`: releases of
    made-up metadata in place of the real; `is_installed` False: a source tree of which no metadata is known.
    """
    versions = versions or {}
    folder.mkdir(parents=True)
    left_out = {_plain(name) for name in (*without, *versions, "cnx-deploy")}
    for entry in (entry for place in site_packages() for entry in sorted(place.iterdir())):
        name = _plain(entry.name.partition("-")[0] if entry.name.endswith(".dist-info") else entry.stem)
        is_metadata_left_out = name in left_out and entry.name.endswith(".dist-info")
        if is_metadata_left_out or entry.suffix == ".pth" or (only is not None and name not in only):
            continue
        if name not in {_plain(each) for each in without} and not (folder / entry.name).exists():
            (folder / entry.name).symlink_to(entry)
    for name, version in versions.items():
        distribution(folder, name, version)
    if is_installed:
        distribution(folder, "cnx-deploy", "0.1.0", [f"Requires-Dist: {line}" for line in PROJECT["dependencies"]])
    return folder


def run_command(folder: Path | str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `cnx-deploy` of this source tree with the packages of `folder` and no others."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}
    command = [sys.executable, "-S", "-m", "cnx_deploy", *words]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
