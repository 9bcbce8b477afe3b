"""constraints.txt beside pyproject.toml: every direct dependency pinned, in its range, and what is installed agrees."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.installations import PROJECT, ROOT

LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
NOT_HAD = {"tensorrt-cu13"}
"""The extra `tensorrt`, of data-centre GPUs: not among the packages that were tested together."""

NEVER_PINNED = {"cnx-deploy", "pip"}
"""The project itself, and what installs it."""


def pins_in(lines):
    """Normalised name -> version."""
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pairs}


def direct_requirements():
    """Those of pyproject.toml that hold on this machine, of the base and of every extra."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    found = (Requirement(line) for line in (*PROJECT["dependencies"], *extras))
    return [each for each in found if each.marker is None or each.marker.evaluate()]


def unmet(requirements, pins):
    """The requirements that a set of pins leaves open or breaks, each with what is pinned."""
    return [
        f"{each}: {pins.get(name)}"
        for each in requirements
        if (name := str(canonicalize_name(each.name))) not in NOT_HAD | NEVER_PINNED
        and not (name in pins and each.specifier.contains(pins[name], prereleases=True))
    ]


def needed_by(name):
    """What an installed distribution needs here, without extras."""
    found = (Requirement(line) for line in metadata.requires(name) or ())
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def test_every_line_is_one_exact_pin_and_no_name_is_pinned_twice():
    pins = [line for line in LINES if not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    assert len(pins_in(LINES)) == len(pins)
    assert pins == sorted(pins, key=str.lower)


def test_every_direct_dependency_is_pinned_in_its_range():
    assert len(direct_requirements()) > 30
    assert unmet(direct_requirements(), pins_in(LINES)) == []


def test_a_pin_below_a_floor_and_one_that_is_missing_are_found():
    lines = [line for line in LINES if not line.startswith("safetensors==")]
    spoilt = pins_in("pillow==12.1.1" if line.startswith("pillow==") else line for line in lines)
    assert unmet(direct_requirements(), spoilt) == ["pillow>=12.2: 12.1.1", "safetensors>=0.5: None"]


def test_what_the_pinned_packages_need_of_each_other_is_pinned_in_their_ranges():
    # The resolver's work, for what is installed here at its pin; scripts/check-constraints asks the resolver itself.
    pins = pins_in(LINES)
    here = [name for name in pins if _version(name) == pins[name]]
    if len(here) < 0.8 * len(pins):
        pytest.skip(f"only {len(here)} of {len(pins)} packages are installed at their pins")
    broken = {name: unmet(needed_by(name), pins) for name in here}
    assert {name: found for name, found in broken.items() if found} == {}


def test_a_pin_that_another_package_does_not_take_is_found():
    pins = pins_in(LINES) | {"protobuf": "3.19.0"}
    assert any("protobuf" in found for found in unmet(needed_by("onnx"), pins))


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
