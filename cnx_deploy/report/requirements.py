"""The base packages that this installation lacks, or has in a release outside the range of pyproject.toml.

The ranges are read from this package's own installed metadata, so they stand in one place. Nothing is imported.
"""

from dataclasses import dataclass
from importlib import metadata

from cnx_deploy.core.system import package_version

__all__ = ["FLOOR_REASONS", "Shortfall", "shortfalls"]

FLOOR_REASONS: dict[str, str] = {
    "torch": "before 2.10 a checkpoint can run code although only weights are loaded, CVE-2026-24747",
    "onnx": "before 1.21 a model's external data can be any file, through a symbolic link, CVE-2026-27489",
    "onnxruntime": "before 1.24 a model's external data can be any file of this machine",
    "onnxruntime-gpu": "before 1.24 a model's external data can be any file of this machine",
    "pillow": "before 12.2 an image of some kB can fill the memory, CVE-2026-40192",
}
"""Why a floor in pyproject.toml is what it is, where an older release lets a file do harm."""

STAND_INS = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}
"""Another distribution of the same import: the wheel for the CPU does beside a GPU."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A requirement that is not met. `version` is the installed one or None, `needed` a range as pip takes it."""

    name: str
    version: str | None
    needed: str

    def __str__(self) -> str:
        if self.version is None:
            return f"{self.name} is not installed, expected {self.needed or 'any release'}"
        reason = f" ({FLOOR_REASONS[self.name]})" if self.name in FLOOR_REASONS else ""
        return f"{self.name} {self.version} is installed, expected {self.needed}{reason}"


def shortfalls() -> tuple[Shortfall, ...] | None:
    """Return the base requirements that this installation does not meet; None where no metadata says what they are."""
    try:
        lines = metadata.requires("cnx-deploy") or []
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return None
    try:
        from packaging.requirements import Requirement
    except ImportError:  # no range can be compared without it
        return (Shortfall("packaging", None, ""),)
    short = []
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue  # of an extra, another system or another Python
        names = filter(None, (requirement.name, STAND_INS.get(requirement.name)))
        installed = {name: version for name in names if (version := package_version(name))}
        for name, version in installed.items() or [(requirement.name, None)]:
            # A pre-release of the floor itself came before it: 2.10.0rc1 is not in >=2.10.
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                short.append(Shortfall(name, version, str(requirement.specifier)))
    return tuple(short)
