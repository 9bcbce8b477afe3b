"""The performance page and its plots, from records with chosen figures; and the committed page against its own."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pytest

from cnx_deploy.bench.bounds import work_of
from cnx_deploy.bench.record import NotRun, Ratio
from tests.support.bench_rows import record_of, row

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "plot_performance.py"
HEAD = {"date": "2026-01-02", "command": "record it", "tools": {"tensorrt-rtx": "1.5"}}
BASELINE, WHOLE = "timm.onnx fp32", "timm.onnx whole batch fp32"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/plot_performance.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))
        yield importlib.import_module("plot_performance")


@pytest.fixture(scope="module")
def drawn(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page and a small record of every kind, filled and drawn once."""
    folder = tmp_path_factory.mktemp("performance")
    (folder / "data").mkdir()
    (folder / "performance.md").write_bytes((ROOT / "docs" / "performance.md").read_bytes())
    traffic = [*graphs("atto", timm=50.0, transformers=40.0, ours=30.0), *graphs("tiny", timm=150.0, ours=100.0)]
    cost = [grown("atto", 1_000_000), grown("pico", 4_000_000), {**grown("base", 9_000_000), "build_seconds": None}]
    facts = {"machine": "some CPU", "targets": ["sm89"], "help_seconds": 0.2}
    record(folder, "traffic", {**HEAD, "rows": traffic})
    record(folder, "traffic-targets", {**HEAD, "rows": [*traffic, *graphs("base", timm=100.0, ours=125.0)]})
    record(folder, "traffic-segmentation", {**HEAD, "rows": dense("transformers", "cnx-deploy")})
    record(folder, "cpu", benchmark())
    record(folder, "cost", {**HEAD, **facts, "rows": cost})
    assert script.main(["--docs-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def docs(drawn: Path, tmp_path: Path) -> Path:
    """A copy of that folder."""
    return shutil.copytree(drawn, tmp_path / "docs")


def dense(*names: str) -> list[dict[str, Any]]:
    words = {"variant": "atto", "image_size": [64, 96], "target": "sm89", "batch": 8, "kernels": 5}
    return [
        {**words, "graph": name, "megabytes_per_image": 40.0 - 10 * at, "of_best_peer": 0.75 if at else None}
        for at, name in enumerate(names)
    ]


def record(docs: Path, name: str, content: dict[str, Any]) -> None:
    (docs / "data" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def graphs(variant: str, *, ours: float, **peers: float) -> list[dict[str, Any]]:
    condition = {"variant": variant, "image_size": 224, "target": "sm89", "batch": 64, "kernels": 9}
    moved = {**peers, "cnx-deploy": ours}
    return [{**condition, "graph": graph, "megabytes_per_image": megabytes} for graph, megabytes in moved.items()]


def grown(variant: str, parameters: int) -> dict[str, Any]:
    """Seconds grow with the square root of the parameters."""
    sizes = {"export_peak_mib": 700, "build_peak_mib": 900, "onnx_megabytes": 7.5, "engine_megabytes": 11.5}
    seconds = {"export_seconds": parameters**0.5, "build_seconds": 2.0}
    return {"variant": variant, "parameters": parameters, **seconds, **sizes}


def benchmark() -> dict[str, Any]:
    """What `bench --json` prints of one file of ours beside timm's model, the file's row unstable."""
    ratio = (Ratio(BASELINE, 1.25, 1.2, 1.3), Ratio(WHOLE, 1.5, 1.4, 1.6))
    rows = (row(1, 80, name=BASELINE), row(1, 100, name="atto-32-fp32.onnx", ratios=ratio, status="UNSTABLE"))
    missing = (NotRun("atto-32-fp16-rtx-sm89.engine", "atto-32", 64, 98, 31.2, "no GPU"),)
    return record_of(*rows, not_run=missing).to_document()


def part(docs: Path, name: str) -> str:
    """What the page says between the markers of a section."""
    text = (docs / "performance.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {name}: begin")[2].partition(f"<!-- {name}: end")[0]


def cells(docs: Path, name: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    lines = [line for line in part(docs, name).splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_another_process_draws_the_same_bytes_and_a_changed_figure_is_found(
    script: ModuleType, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.stem for path in (docs / "plots").iterdir()} == {"traffic", "traffic-targets", "cpu", "cost"}
    command = [sys.executable, str(SCRIPT), "--check", "--docs-dir", str(docs)]
    seeded = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, cwd=docs, env=seeded, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    stale = {
        ("data/traffic.json", ": 30.0", ": 29.0"): ["plots/traffic.svg", "performance.md"],
        ("plots/traffic.svg", "30 MB", "29 MB"): ["plots/traffic.svg"],
    }
    for (file, old, new), named in stale.items():
        text = (docs / file).read_text(encoding="utf-8")
        assert old in text
        (docs / file).write_text(text.replace(old, new), encoding="utf-8")
        capsys.readouterr()
        assert script.main(["--check", "--docs-dir", str(docs)]) == 3
        assert capsys.readouterr().out.splitlines() == [f"{docs / name} is not what docs/data says" for name in named]
        assert (docs / file).read_text(encoding="utf-8") == text.replace(old, new)
        (docs / file).write_text(text, encoding="utf-8")


def test_a_table_of_a_dense_task_has_a_row_for_each_graph_and_no_plot(docs: Path) -> None:
    rows = [["atto", "64x96", "sm89", "8", name] for name in ("transformers", "cnx-deploy")]
    assert cells(docs, "traffic-segmentation") == [[*rows[0], "5", "40.0"], [*rows[1], "5", "30.0", "0.750"]]
    assert "Not recorded yet." in part(docs, "traffic-detection")


def test_a_section_without_data_says_so_and_loses_its_plot(script: ModuleType, docs: Path) -> None:
    (docs / "data" / "cpu.json").unlink()
    assert script.main(["--docs-dir", str(docs)]) == 0
    assert part(docs, "cpu").splitlines()[1:] == ["Not recorded yet."]
    assert not (docs / "plots" / "cpu.svg").exists()
    assert (docs / "plots" / "cost.svg").exists()


def test_tables_have_the_rows_of_the_data_and_say_what_is_missing(docs: Path) -> None:
    work = work_of("atto", 224, "fp16")
    floor = f"{(work.fused_bytes + work.weight_bytes / 64) / 1e6:.1f}"
    atto, tiny = cells(docs, "traffic")
    assert atto == ["atto", "9", "50.0", "9", "40.0", "9", "30.0", "0.750", floor]
    assert (tiny[3:5], tiny[7]) == (["not run", "not run"], "0.667")
    assert cells(docs, "traffic-targets") == [
        ["atto", "224", "sm89", "30.0 ÷ 40.0 = 0.750"],
        ["tiny", "224", "sm89", "100.0 ÷ 150.0 = 0.667"],
        ["base", "224", "sm89", "125.0 ÷ 100.0 = 1.250"],
    ]
    worse = (
        "Ours moves more in 1 of 3: base 224 px sm89 batch 64 (1.250). Not recorded: femto, pico, nano, large, huge."
    )
    assert worse in part(docs, "traffic-targets")
    assert [line[0] for line in cells(docs, "cost")] == ["atto", "pico", "base"]
    assert cells(docs, "cost")[2][4] == "not run"
    assert "export time × 3.2" in part(docs, "cost")  # ten to the power of a half
    assert "build time ×" not in part(docs, "cost")  # two points have no slope
    baseline, ours = cells(docs, "cpu")
    assert baseline[3:] == [BASELINE, "80.0", "baseline", "–", "OK"]
    assert ours[3:] == ["atto-32-fp32.onnx", "100.0", "1.25 (1.20–1.30)", "1.50 (1.40–1.60)", "**UNSTABLE**"]
    assert "Not run: atto-32-fp16-rtx-sm89.engine (no GPU)." in part(docs, "cpu")
    for name in ("traffic", "traffic-targets", "cost"):
        assert "Recorded 2026-01-02 with `record it`." in part(docs, name)
        assert "no gpu" in part(docs, name).lower()
        assert "record it; 2026-01-02" in (docs / "plots" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_committed_page_and_plots_are_what_the_data_say(script: ModuleType) -> None:
    names = [name for name, section in script.SECTIONS.items() if section[-1] is not None]
    drawn = [(ROOT / "docs" / "plots" / f"{name}.svg").read_text(encoding="utf-8") for name in names]
    if not all(f"Matplotlib v{matplotlib.__version__}," in text for text in drawn):
        pytest.skip(f"another matplotlib than {matplotlib.__version__} drew the plots")
    assert script.main(["--check"]) == 0
