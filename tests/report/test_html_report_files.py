"""`cnx-deploy report --html` as a user meets it: what it is made from, how the file is written, what is refused."""

import contextlib
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.cli import main
from cnx_deploy.report.html.charts import linear_axis, log_axis
from cnx_deploy.report.html.page import MARK, write_page
from tests.support.html_page import ROOT, parsed, put, rows, section

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cnx(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `cnx-deploy report` in an empty folder, in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["report", *(str(word) for word in words)])
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return run


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- what it is made from ---------------------------------------------------------------------------------------------


def test_empty_folders_give_a_page_that_says_there_is_nothing(cnx: Command, tmp_path: Path) -> None:
    code, out, err = cnx("--html", "report.html")
    assert (code, out, err) == (0, "report.html\n", "")
    page = parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Nothing is recorded in export and engines" in section(page, "models").text
    assert "No engine is recorded" in section(page, "engines").text
    assert "0 nothing is recorded" in page.one("dl", class_="tiles").text
    assert names_in(tmp_path) == {"report.html"}


def test_without_artifacts_the_command_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cnx_deploy.cli import main\ntry: main(['report', '--html', 'a.html'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "a.html\nFalse\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not a manifest this version can read"),
        ("[" * 20_000, "nested too deeply"),
        ('{"rows": []}', "schema version None, expected 1"),
        (lambda data: data["facts"]["parity"]["differences"].update(relative_l2_max="0.1"), "l2_max: Expected float"),
        (lambda data: data["facts"]["parity"].update(found=[]), "facts.parity.found: Expected object, got array"),
        (lambda data: data["model"].update(image_size=None), "model.image_size: Expected int, got null"),
        (lambda data: data.update(tools={"torch": 2}), "tools[...]: Expected str, got int"),
    ],
)  # fmt: skip
def test_a_corrupt_manifest_is_a_row_that_says_why_and_exit_code_4(
    cnx: Command, tmp_path: Path, content: str | Callable[[dict[str, Any]], None], reason: str
) -> None:
    put(tmp_path, "femto-224-fp16")
    bad = put(tmp_path, "atto-224-fp16", None if isinstance(content, str) else content)
    if isinstance(content, str):
        bad.write_text(content, encoding="utf-8")
    code, out, err = cnx("--html", "report.html")
    assert code == 4
    assert out == "report.html\n"
    assert err.startswith("Error: 1 of 2 manifests cannot be read, and report.html says so: export/atto-224-fp16.json.")
    page = parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    (row,) = section(page, "corrupt").all("li")
    assert row.text.startswith("export/atto-224-fp16.json corrupt")
    assert reason in row.text
    assert list(rows(section(page, "models").one("table"))) == ["femto"]
    assert "1 unreadable" in page.one("dl", class_="tiles").text


def test_json_is_one_document_also_when_a_manifest_is_corrupt(cnx: Command, tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16")
    (tmp_path / "export" / "notes.json").write_text("{}", encoding="utf-8")
    code, out, err = cnx("--html", "report.html", "--json")
    document = json.loads(out)
    assert code == 4
    assert (document["html"], document["artifacts"], document["corrupt"]) == ("report.html", 1, ["export/notes.json"])
    assert "Nothing was timed" in document["not_run"]
    assert err.startswith("Error: 1 of 2 manifests")


# --- how it is written ------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_such_page_is_kept_unless_forced(cnx: Command, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("<!doctype html><p>mine", encoding="utf-8")
    code, _, err = cnx("--html", "report.html")
    assert code == 2
    assert err == (
        "Error: report.html exists and is no page of cnx-deploy report. Use --force to replace it, or another name.\n"
    )
    assert target.read_text(encoding="utf-8") == "<!doctype html><p>mine"
    assert cnx("--html", "report.html", "--force")[0] == 0
    assert MARK in target.read_text(encoding="utf-8")


def test_an_earlier_page_is_replaced_without_a_word(cnx: Command, tmp_path: Path) -> None:
    assert cnx("--html", "new folder/péage.html")[0] == 0
    put(tmp_path, "atto-224-fp16")
    assert cnx("--html", "new folder/péage.html")[0] == 0
    assert "atto-224-fp16.onnx" in (tmp_path / "new folder" / "péage.html").read_text(encoding="utf-8")
    assert names_in(tmp_path / "new folder") == {"péage.html"}


def test_a_full_disk_leaves_the_earlier_page_and_no_part_of_the_new_one(cnx: Command, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    write_page(target, f"{MARK} the earlier one")
    with _files_of_at_most(4096):
        code, out, err = cnx("--html", "report.html")
    assert (code, out) == (1, "")
    assert err.startswith("Error: No room to write report.html (File too large)")
    assert target.read_text(encoding="utf-8") == f"{MARK} the earlier one"
    assert names_in(tmp_path) == {"report.html"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "is a folder, where a file was expected. Give"),
        ("file/report.html", "Cannot write in file: "),
        ("pipe", "is a device or a pipe, where a file was expected. Give"),
    ],
)
def test_a_path_that_can_hold_no_page_is_wrong_usage(cnx: Command, tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    os.mkfifo(tmp_path / "pipe")
    code, out, err = cnx("--html", path, "--force")
    assert (code, out) == (2, "")
    assert message in err
    assert names_in(tmp_path) == {"file", "pipe"}
    assert (tmp_path / "pipe").is_fifo()


def test_without_jinja2_the_command_names_the_extra_and_writes_nothing(
    cnx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    code, out, err = cnx("--html", "report.html")
    assert (code, out) == (5, "")
    assert "jinja2 is not installed" in err
    assert "pip install 'cnx-deploy[report]'" in err
    assert names_in(tmp_path) == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--html", "a.html", "--check"), "--html writes a page and nothing else"),
        (("--bench", "b.json"), "add --html FILE"),
        (("--force",), "add --html FILE"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    cnx: Command, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    code, _, err = cnx(*words)
    assert code == 2
    assert message in err
    assert names_in(tmp_path) == set()


def test_the_page_leaves_the_index_and_the_readme_alone(cnx: Command, tmp_path: Path) -> None:
    put(tmp_path, "atto-224-fp16")
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    assert cnx("--html", "report.html")[0] == 0
    assert names_in(tmp_path / "export") == {"atto-224-fp16.json"}
    assert (tmp_path / "README.md").read_bytes() == (ROOT / "README.md").read_bytes()


def test_the_templates_are_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = ROOT / "cnx_deploy" / "html_report" / "templates"
    assert names >= {path.relative_to(ROOT).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[2e-7, 0.015], [1e-3], [0.0], [], [math.inf, 3.0], [5e-324, 1.7e308]])
def test_a_log_axis_begins_and_ends_at_decades_and_has_few_ticks(values: list[float]) -> None:
    axis = log_axis(values, "{:g}".format)
    assert 2 <= len(axis.ticks) <= 7
    assert all(0.0 <= axis.at(value) <= 100.0 for value in [*values, 0.0, 1e300])
    assert axis.ticks[0].at == 0.0
    assert math.log10(axis.low) == pytest.approx(round(math.log10(axis.low)))


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.4], [0.58, 1.0, 1.41], [1.0, 250.0], [1.0, math.nan, 1e300], []])
def test_a_linear_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    axis = linear_axis(values)
    labels = [float(tick.label) for tick in axis.ticks]
    assert 2 <= len(labels) <= 8
    steps = {round(after - before, 9) for before, after in itertools.pairwise(labels)}
    assert len(steps) == 1
    usual = [value for value in values if abs(value) < 1e12] or [0.0, 1.0]
    assert labels[0] <= min(usual) <= max(usual) <= labels[-1]
    assert labels[-1] - labels[0] <= 4 * max(0.1, max(usual) - min(usual))
    assert axis.at(labels[1]) == pytest.approx(100 / (len(labels) - 1), abs=0.01)


@contextlib.contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes meanwhile: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
