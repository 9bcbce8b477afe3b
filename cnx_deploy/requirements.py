"""Are the packages that this one needs installed, in releases without known holes? Nothing of them is imported.

The ranges are those of pyproject.toml, read from this package's own installed metadata, so they stand in one place. Run
from a source tree that was never installed there is no such metadata: then nothing is known and nothing is refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from cnx_deploy.environment import package_version
from cnx_deploy.errors import MissingRequirementError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = [
    "HOLES",
    "Hole",
    "Shortfall",
    "check_requirements",
    "declared_requirements",
    "is_inside",
    "pip_command",
    "shortfalls",
]

PROJECT = "cnx-deploy"


@dataclass(frozen=True, slots=True)
class Hole:
    """A weakness of every release before `fixed_in`, through which a file that is read here can do harm."""

    fixed_in: str
    what: str


HOLES: dict[str, Hole] = {
    "torch": Hole("2.10", "CVE-2026-24747, a checkpoint can run code although only weights are loaded"),
    "onnx": Hole("1.21", "CVE-2026-27489, a model's external data can be any file, through a symbolic link"),
    "onnxruntime": Hole("1.24", "a model's external data can be any file of this machine"),
    "onnxruntime-gpu": Hole("1.24", "a model's external data can be any file of this machine"),
    "pillow": Hole("12.2", "CVE-2026-40192, an image of some kB can fill the memory"),
}
"""Why these floors in pyproject.toml are what they are; a test compares."""

STAND_INS = {"onnxruntime-gpu": "onnxruntime", "onnxruntime": "onnxruntime-gpu"}
"""Another distribution of the same import: the wheel for the CPU does beside a GPU, with one finding of the doctor."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A requirement that is not met. `found` is the installed version, if any; `needed` a range as pip takes it."""

    name: str
    found: str | None
    needed: str
    why: str = ""

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.name}{self.needed}"

    def __str__(self) -> str:
        found = f"{self.name} {self.found} is installed" if self.found else f"{self.name} is not installed"
        return f"{found}, expected {self.needed or 'any release'}" + (f" ({self.why})" if self.why else "")


def check_requirements(names: Iterable[str] = ()) -> None:
    """Raise MissingRequirementError unless every base requirement is met, or each of `names` where some are given."""
    wanted = frozenset(names)
    short = [each for each in shortfalls() if not wanted or each.name in wanted]
    if short:
        listed = "\n".join(f"  {each}" for each in short)
        raise MissingRequirementError(
            f"This installation is not what {PROJECT} needs, so nothing was run:\n{listed}\n"
            f"Install it: {pip_command(short)}"
        )


def pip_command(short: Iterable[Shortfall]) -> str:
    """What installs the missing ones."""
    return " ".join(["pip install", *(f'"{each.requirement}"' for each in short)])


def shortfalls() -> tuple[Shortfall, ...]:
    """The base requirements that this installation does not meet, in their order; empty without metadata."""
    declared = declared_requirements()
    if declared is None:
        return ()
    try:
        from packaging.requirements import Requirement
    except ImportError:  # nothing can be compared without it
        lines = [line.partition(";")[0].strip() for line in declared if line.startswith("packaging")]
        return (Shortfall("packaging", None, lines[0].removeprefix("packaging") if lines else ""),)
    requirements = (Requirement(line) for line in declared)
    return tuple(short for each in requirements if _is_for_here(each) for short in _shortfalls_of(each))


def declared_requirements() -> tuple[str, ...] | None:
    """The lines of this package's own metadata, extras among them; None where it is not installed."""
    try:
        return tuple(metadata.requires(PROJECT) or ())
    except metadata.PackageNotFoundError:
        return None


def is_inside(requirement: "Requirement", version: str) -> bool:
    """Whether a version is in a requirement's range; pre-releases count, and what is no version at all is outside."""
    from packaging.version import InvalidVersion, Version

    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _is_for_here(requirement: "Requirement") -> bool:
    """Whether it is one of the base, for this system and Python."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _shortfalls_of(requirement: "Requirement") -> Iterator[Shortfall]:
    """One for each installed distribution of it that is out of range, or one that says that there is none."""
    names = [name for name in (requirement.name, STAND_INS.get(requirement.name)) if name]
    installed = {name: version for name in names if (version := package_version(name))}
    needed = str(requirement.specifier)
    if not installed:
        yield Shortfall(requirement.name, None, needed)
    for name, version in installed.items():
        if not is_inside(requirement, version):
            yield Shortfall(name, version, needed, _why(name, version))


def _why(name: str, version: str) -> str:
    from packaging.version import InvalidVersion, Version

    hole = HOLES.get(name)
    try:
        if hole is None or Version(version) >= Version(hole.fixed_in):
            return ""
    except InvalidVersion:
        return "that is no version number"
    return f"before {hole.fixed_in}: {hole.what}"
