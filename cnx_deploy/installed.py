"""Which installed packages does this one use, which of them needs which, and under which licences? From metadata alone.

Followed are the requirements of this package and, from package to package, theirs, with the extras that are asked for
on the way. Of this package's own extras whatever is installed counts: it would be used.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from cnx_deploy.errors import MissingRequirementError
from cnx_deploy.requirements import PROJECT, STAND_INS, check_requirements

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["Installation", "InstalledPackage", "find_installation"]

LONGEST_NAME = 100
"""Characters of a licence's name; the field `License` often holds a licence's whole text."""

Node = tuple[str, str]
"""A distribution, and the extra of it that is followed; "" for none."""


@dataclass(frozen=True, slots=True)
class InstalledPackage:
    """One distribution. `name` is normalised, `licences` one SPDX expression or names, as its metadata has them.

    `needs` are names of installed packages; `is_optional` that only extras of this package lead to it.
    """

    name: str
    version: str
    licences: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class Installation:
    """This package, what it uses in the order of names, and the requirements that nothing installed meets."""

    root: InstalledPackage
    packages: tuple[InstalledPackage, ...]
    absent: tuple[str, ...]


def find_installation(root: str = PROJECT) -> Installation:
    """Look at this process's packages.

    Raises MissingRequirementError where this package was not installed, so that no metadata say what it needs.
    """
    check_requirements(["packaging"])
    if _distribution(root) is None:
        raise MissingRequirementError(
            f"{root} runs from a source tree: which packages it uses is in the metadata of an installed one, and there "
            "is none. Install it: pip install ."
        )
    base = _Walk(root, follow_extras=False)
    whole = _Walk(root, follow_extras=True)
    found = {name: _package(name, needs, name not in base.needs) for name, needs in whole.needs.items()}
    packages = tuple(found[name] for name in sorted(found) if name != root)
    return Installation(found[root], packages, tuple(sorted(whole.absent)))


class _Walk:
    """What is reached from a distribution: of each the names that it needs; in `absent` who needs what in vain."""

    def __init__(self, root: str, *, follow_extras: bool) -> None:
        self.needs: dict[str, set[str]] = {root: set()}
        self.absent: set[str] = set()
        extras = _distribution_extras(root) if follow_extras else []
        self.own_extras: set[Node] = {(root, extra) for extra in extras}
        self.seen: set[Node] = set()
        self.waiting: list[Node] = [(root, ""), *self.own_extras]
        while self.waiting:
            self._follow(self.waiting.pop())

    def _follow(self, node: Node) -> None:
        if node in self.seen:
            return
        self.seen.add(node)
        for requirement in _requirements(*node):
            name = _installed_name(requirement)
            if name is None:
                if node not in self.own_extras:
                    self.absent.add(f"{requirement.name}{requirement.specifier}, which {node[0]} needs")
                continue
            self.needs.setdefault(name, set())
            if name != node[0]:
                self.needs[node[0]].add(name)
            self.waiting += [(name, extra) for extra in ("", *sorted(requirement.extras))]


def _requirements(name: str, extra: str) -> Iterator["Requirement"]:
    """What a distribution needs here; with an extra, what that adds."""
    from packaging.requirements import Requirement

    distribution = _distribution(name)
    for line in (distribution.requires or ()) if distribution else ():
        requirement = Requirement(line)
        is_base = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if is_base != bool(extra) and (is_base or _needs_extra(requirement, extra)):
            yield requirement


def _needs_extra(requirement: "Requirement", extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _installed_name(requirement: "Requirement") -> str | None:
    """The installed distribution that meets a requirement by its name or in its place; None without one."""
    names = (requirement.name, STAND_INS.get(requirement.name, ""))
    return next((_plain(name) for name in names if name and _distribution(name)), None)


def _package(name: str, needs: Iterable[str], is_optional: bool) -> InstalledPackage:
    distribution = _distribution(name)
    assert distribution is not None  # the walk found it
    licences = tuple(_licences(distribution))
    return InstalledPackage(name, distribution.version or "unknown", licences, tuple(sorted(needs)), is_optional)


def _licences(distribution: metadata.Distribution) -> Iterable[str]:
    """The SPDX expression; without one the short form of the older field; without that the classifiers' names."""
    fields = distribution.metadata
    expression = (fields["License-Expression"] or "").strip()
    if expression:
        return [expression]
    old = (fields["License"] or "").strip()
    if old and "\n" not in old and len(old) <= LONGEST_NAME and old.upper() != "UNKNOWN":
        return [old]
    classified = [each for each in fields.get_all("Classifier") or () if each.startswith("License ::")]
    return sorted({each.rpartition(" :: ")[2] for each in classified if not each.endswith("OSI Approved")})


def _distribution_extras(name: str) -> list[str]:
    distribution = _distribution(name)
    return list(distribution.metadata.get_all("Provides-Extra") or ()) if distribution else []


def _distribution(name: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(name))
