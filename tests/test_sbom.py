"""The bill of materials: which packages are in it, what is said of them, and that it is what CycloneDX 1.6 takes."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest

from cnx_deploy.environment import package_version
from cnx_deploy.errors import InputError, MissingRequirementError, OutputExistsError
from cnx_deploy.installed import find_installation
from cnx_deploy.sbom import bill_of_materials, check_sbom
from tests.installations import ROOT, distribution, installation, run_command
from tests.test_imports import HEAVY, modules_after

needs_library = pytest.mark.skipif(
    package_version("cyclonedx-python-lib") is None, reason="cyclonedx-python-lib (extra sbom) is not installed"
)


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Distributions made for the test, in front of those that are installed: (name, version, further metadata)."""
    monkeypatch.syspath_prepend(str(tmp_path / "made-up"))

    def make(name: str, version: str, *lines: str) -> None:
        distribution(tmp_path / "made-up", name, version, lines)

    return make


def sbom(*words, **environment):
    """Run the command in a process of its own; returns (exit code, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "cnx_deploy", "sbom", *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def document():
    """The bill of the environment that runs the tests, as of 2026-01-01."""
    code, out, _ = sbom("--epoch", 1_767_225_600)
    assert code == 0
    return json.loads(out)


def graph(found):
    return {package.name: package.needs for package in (found.root, *found.packages)}


def test_what_is_needed_is_followed_with_the_extras_that_are_asked_for(made_up):
    made_up("top", "1.0", "Requires-Dist: middle[fast]>=1", "Requires-Dist: absent-here; sys_platform == 'beos'")
    made_up("middle", "1.1", "Provides-Extra: fast", "Provides-Extra: slow", "Requires-Dist: top",
            "Requires-Dist: low-fast; extra == 'fast'", "Requires-Dist: low-slow; extra == 'slow'")  # fmt: skip
    made_up("low-fast", "2.0")
    made_up("low-slow", "2.0")
    found = find_installation("top")
    assert graph(found) == {"top": ("middle",), "middle": ("low-fast", "top"), "low-fast": ()}
    assert found.absent == ()


def test_of_its_own_extras_what_is_installed_is_optional_and_what_is_not_is_no_gap(made_up):
    made_up("top", "1.0", "Requires-Dist: base", "Provides-Extra: more", "Requires-Dist: extra-here; extra == 'more'",
            "Requires-Dist: extra-absent; extra == 'more'")  # fmt: skip
    made_up("base", "1.0")
    made_up("extra-here", "1.0", "Requires-Dist: base", "Requires-Dist: below")
    made_up("below", "1.0")
    found = find_installation("top")
    assert {each.name: each.is_optional for each in found.packages} == {
        "base": False, "below": True, "extra-here": True,
    }  # fmt: skip
    assert found.absent == ()


def test_what_is_needed_and_not_installed_is_named_with_who_needs_it(made_up):
    made_up("top", "1.0", "Requires-Dist: base")
    made_up("base", "1.0", "Requires-Dist: gone>=3")
    assert find_installation("top").absent == ("gone>=3, which base needs",)


def test_names_are_normalised_and_the_cpu_wheel_stands_in_for_the_other(made_up):
    made_up("top", "1.0", "Requires-Dist: Some_Odd.Name")
    made_up("some-odd-name", "1.0")
    assert graph(find_installation("top"))["top"] == ("some-odd-name",)


@pytest.mark.parametrize(
    ("lines", "licences"),
    [
        (("License-Expression: MIT OR Apache-2.0", "License: something else"), ("MIT OR Apache-2.0",)),
        (("License: BSD-3-Clause", "Classifier: License :: OSI Approved :: MIT License"), ("BSD-3-Clause",)),
        (("License: UNKNOWN", "Classifier: License :: OSI Approved :: MIT License"), ("MIT License",)),
        (("License: " + "Permission is hereby granted " * 9, "Classifier: License :: OSI Approved"), ()),
        (("Classifier: License :: Other/Proprietary License",), ("Other/Proprietary License",)),
        ((), ()),
    ],
)
def test_a_licence_is_the_expression_or_a_short_field_or_the_classifiers(made_up, lines, licences):
    made_up("top", "1.0", *lines)
    assert find_installation("top").root.licences == licences


def test_without_metadata_nothing_is_known_of_what_is_needed():
    with pytest.raises(MissingRequirementError, match="runs from a source tree") as raised:
        find_installation("never-installed")
    assert "pip install ." in str(raised.value)


def test_asking_what_is_installed_imports_no_heavy_package():
    assert not modules_after("import cnx_deploy.installed as i; i.find_installation()") & set(HEAVY)


def test_missing_or_wrong_dependency_without_the_library_the_extra_is_named(tmp_path):
    packages = installation(tmp_path / "packages", without=("cyclonedx", "cyclonedx_python_lib"))
    done = run_command(packages, "sbom", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (5, "")
    assert "cyclonedx-python-lib is not installed" in done.stderr
    assert "pip install 'cnx-deploy[sbom]'" in done.stderr


@needs_library
def test_missing_or_wrong_dependency_the_bill_says_what_is_there_where_others_refuse(tmp_path):
    packages = installation(tmp_path / "packages", without=("filelock",), versions={"torch": "2.9.0"})
    done = run_command(packages, "sbom", cwd=tmp_path)
    assert done.returncode == 0
    components = {each["name"]: each["version"] for each in json.loads(done.stdout)["components"]}
    assert components["torch"] == "2.9.0"
    assert "filelock" not in components
    assert "Note: left out, because it is not installed: filelock>=3.13, which cnx-deploy needs." in done.stderr
    written = run_command(packages, "sbom", "--output", "sbom.json", cwd=tmp_path)  # which filelock is needed for
    assert (written.returncode, (tmp_path / "sbom.json").exists()) == (5, False)
    assert "filelock is not installed, expected >=3.13" in written.stderr


@needs_library
def test_the_bill_of_this_environment_is_a_cyclonedx_1_6_document(document):
    pytest.importorskip("jsonschema", reason="needs cyclonedx-python-lib[json-validation]")
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert document["specVersion"] == "1.6"
    assert validator.validate_str(json.dumps(document)) is None
    for spoilt in ({"serialNumber": "1"}, {"components": [{"type": "library"}]}, {"unheard-of": True}):
        assert validator.validate_str(json.dumps(document | spoilt)) is not None


@needs_library
def test_every_package_of_the_bill_has_version_purl_and_a_place_in_the_graph(document):
    components = {each["name"]: each for each in document["components"]}
    assert {"torch", "onnx", "numpy", "pillow", "click"} <= set(components)
    assert [name for name, each in components.items() if each["version"] != metadata.version(name)] == []
    assert components["torch"]["purl"] == f"pkg:pypi/torch@{metadata.version('torch').replace('+', '%2B')}"
    needs = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    references = {each["bom-ref"] for each in components.values()}
    root = document["metadata"]["component"]["bom-ref"]
    assert set(needs) == references | {root}
    assert {reference for each in needs.values() for reference in each} <= set(needs)
    assert components["torch"]["bom-ref"] in needs[root]
    assert components["numpy"]["bom-ref"] in needs[components["onnx"]["bom-ref"]]


@needs_library
def test_licences_are_identifiers_expressions_or_names(document):
    by_name = {each["name"]: each.get("licenses", []) for each in document["components"]}
    assert by_name["rich"] == [{"license": {"acknowledgement": "declared", "id": "MIT"}}]
    assert by_name["packaging"][0]["expression"] == "Apache-2.0 OR BSD-2-Clause"
    assert sum(map(bool, by_name.values())) >= 0.9 * len(by_name)


@pytest.mark.slow
@needs_library
def test_the_same_packages_and_time_give_the_same_bytes_whatever_the_hash_seed():
    first = sbom(SOURCE_DATE_EPOCH="1767225600", PYTHONHASHSEED="1")
    assert first == sbom("--epoch", 1_767_225_600, PYTHONHASHSEED="2")
    assert json.loads(first[1])["metadata"]["timestamp"] == "2026-01-01T00:00:00+00:00"


@pytest.mark.slow
@needs_library
def test_without_a_time_serial_number_and_timestamp_alone_differ():
    first, second = (json.loads(bill_of_materials(find_installation())) for _ in range(2))
    assert first.pop("serialNumber") != second.pop("serialNumber")
    assert first["metadata"].pop("timestamp") != second["metadata"].pop("timestamp")
    assert first == second


@pytest.mark.slow
@needs_library
def test_a_file_is_written_and_replaced_where_it_is_a_bill(tmp_path):
    path = tmp_path / "new" / "sbom.json"
    code, out, _ = sbom("--output", path, "--json")
    assert code == 0
    assert json.loads(out)["packages"] == len(json.loads(path.read_text())["components"])
    assert sbom("--output", path)[:2] == (0, f"{path}\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["sbom.json"]


@needs_library
def test_another_file_is_replaced_with_force_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    code, _, said = sbom("--output", path)
    assert (code, path.read_text()) == (2, "mine")
    assert "exists and is no bill of materials. Use --force to replace it, or another name." in said
    assert sbom("--output", path, "--force")[0] == 0
    assert json.loads(path.read_text())["bomFormat"] == "CycloneDX"


@needs_library
def test_a_folder_is_no_place_for_it(tmp_path):
    with pytest.raises(InputError, match=r"is no file, where one was expected\. Give a file name"):
        check_sbom(tmp_path, force=True)
    with pytest.raises(OutputExistsError):
        check_sbom(ROOT / "LICENSE", force=False)


@needs_library
@pytest.mark.parametrize("epoch", ["-1", "yesterday", "253402300800"])
def test_a_time_that_is_none_is_wrong_usage(epoch):
    code, out, said = sbom(SOURCE_DATE_EPOCH=epoch)
    assert (code, out) == (2, "")
    assert "SOURCE_DATE_EPOCH" in said
