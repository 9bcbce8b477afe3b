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
    record(folder, "traffic-fused", {**HEAD, "rows": [*own_kernels("sm89", 10.0), *own_kernels("sm120", 11.0)]})
    record(folder, "eight-bits", eight_bits())
    record(folder, "traffic-segmentation", {**HEAD, "rows": dense("transformers", "cnx-deploy")})
    record(folder, "cpu", benchmark())
    record(folder, "cpu-avx2", runtimes())
    record(folder, "cost", {**HEAD, **facts, "rows": cost})
    record(folder, "servers", served())
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


def own_kernels(target: str, recomputed: float) -> list[dict[str, Any]]:
    """The graphs of atto, and ours with own kernels."""
    rows = graphs("atto", timm=50.0, transformers=40.0, ours=30.0)
    modes = {"stored": 20.0, "recomputed": recomputed, "auto": 12.0}
    rows += [{**rows[-1], "graph": f"cnx-deploy, {mode}", "megabytes_per_image": mb} for mode, mb in modes.items()]
    return [{**row, "target": target} for row in rows]


def eight_bits() -> dict[str, Any]:
    """Engines of atto for a target with FP8 and one without, ModelOpt's of timm's graph, and a network's accuracy."""

    def engines(part: str, target: str, **megabytes: float) -> list[dict[str, Any]]:
        words = {"part": part, "variant": "atto", "image_size": 224, "target": target, "batch": 64, "kernels": 9}
        words |= {"graph": "timm", "modelopt": "0.47"} if part == "modelopt" else {}
        return [{**words, "precision": name, "megabytes_per_image": moved} for name, moved in megabytes.items()]

    case = {"network": "digits", "variant": "atto", "change": "", "images": "held out", "judge": "torch-deploy"}
    case |= {"count": 50, "relative_l2_median": 0.001, "relative_l2_worst": 0.002, "centred_cosine": 0.99999}
    judged = {**case, "part": "accuracy", "top1": 96.0, "reference_top1": 98.0, "flips": 3, "excused_flips": 2}
    int8 = {"precision": "int8", "method": "max", "gains": True}
    shares = {f"{name}_at_{k}": k / 20 for k in (1, 5, 10) for name in ("overlap", "recall")}
    labels = {"reference_label_at_1": 0.75, "candidate_label_at_1": 0.5}
    rows = [
        *engines("traffic", "sm89", fp16=40.0, fp8=20.0, int8=30.0),
        *engines("traffic", "sm86", fp16=50.0, int8=30.0),
        *engines("modelopt", "sm89", fp16=80.0, int8=100.0),
        {**judged, "precision": "fp16", "method": "", "gains": False, "top1": 98.0},
        {**judged, **int8},
        {**judged, **int8, "method": "mse", "gains": False, "top1": 95.0},
        {**judged, **int8, "change": "outliers", "gains": False, "top1": 40.0},
        {**judged, **int8, "judge": "onnxruntime", "top1": 97.0},
        {**case, **int8, "part": "features", **shares, **labels},
    ]
    return {**HEAD, "command": "record it", "commands": ["record traffic", "record accuracy"], "note": "A note.",
            "rows": rows}  # fmt: skip


def served() -> dict[str, Any]:
    """A bare loop, and a server that takes half as much processor time again."""
    row = {"clients": 1, "requests": 1000, "failures": 0, "images_a_second": 50.0, "p50_ms": 20.0, "p99_ms": 30.0}
    bare = {"server": "bare loop", **row, "processor_ms": 10.0}
    ratios = {"processor_ms": 15.0, "speed_of_bare": 0.8, "processor_of_bare": 1.5}
    ours = {"server": "cnx-deploy serve", **row, "clients": 8, "images_a_second": 40.0, **ratios}
    return {**HEAD, "machine": "some CPU", "file": "a file", "rows": [bare, ours]}


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
    return record_of(*rows, files=("atto-32-fp32.onnx",), not_run=missing).to_document()


IN_OPENVINO, ALONE = "timm.onnx in OpenVINO fp32", "timm.onnx in OpenVINO whole batch fp32"


def runtimes() -> dict[str, Any]:
    """One file in two runtimes beside timm's export in both. Its fastest row gives wrong answers."""
    speeds = {WHOLE: 80, BASELINE: 90, ALONE: 100, IN_OPENVINO: 125}

    def ours(backend: str, speed: float, status: str = "OK") -> Any:
        ratios = tuple(Ratio(peer, speed / other, 0.5, 2.5) for peer, other in speeds.items())
        return row(1, speed, name=f"atto-32-fp32.onnx [{backend}]", ratios=ratios, status=status)

    rows = [row(1, speed, name=name) for name, speed in speeds.items()]
    rows += [ours("onnxruntime", 110), ours("openvino", 140, "UNSTABLE"), ours("fused", 900, "INVALID")]
    return record_of(*rows, files=("atto-32-fp32.onnx",)).to_document()


def test_the_fastest_right_row_of_ours_stands_over_each_peer_and_the_fastest_of_them(docs: Path) -> None:
    interval = " (0.50–2.50)"
    ratios = [f"1.75{interval}", f"1.40{interval}", "not run", f"1.40{interval}", f"1.12{interval}"]
    name = "`atto-32-fp32.onnx [openvino]` (UNSTABLE)"
    assert cells(docs, "cpu-avx2") == [["atto", "1", name, "140.0", *ratios]]


def test_bf16_has_a_column_of_its_own_and_is_not_our_fastest(script: ModuleType) -> None:
    document = runtimes()
    half = {**document["rows"][-2], "name": "atto-32-bf16.onnx [openvino-bf16]", "arithmetic": "bf16", "status": "OK"}
    half |= {"images_per_second": 180.0, "ratios": [{"peer": ALONE, "ratio": 1.8, "low": 1.7, "high": 1.9}]}
    (network,) = document["networks"].values()
    network["files"]["atto-32-bf16.onnx"] = {}
    text = script.runtimes_text({**document, "rows": [*document["rows"], half]})
    (line,) = [line for line in text.splitlines() if line.startswith("| atto")]
    assert line.split(" | ")[2].startswith("`atto-32-fp32.onnx [openvino]`")
    assert line.endswith(" | 1.80 (1.70–1.90) |")
    assert "| BF16 in OpenVINO, × the fastest |" in text
    assert "BF16" not in script.runtimes_text(document)


def part(docs: Path, name: str) -> str:
    """What the page says between the markers of a section."""
    text = (docs / "performance.md").read_text(encoding="utf-8")
    return text.partition(f"<!-- {name}: begin")[2].partition(f"<!-- {name}: end")[0]


def cells(docs: Path, name: str) -> list[list[str]]:
    """The rows of a section's table, without its head."""
    lines = [line for line in part(docs, name).splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def tables(docs: Path, name: str) -> dict[str, list[list[str]]]:
    """The tables of a section, each by the title of a column that no table before it has."""
    found: dict[str, list[list[str]]] = {}
    for text in part(docs, name).split("\n\n"):
        if text.startswith("| "):
            titles, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines())
            for title in titles:
                found.setdefault(title, rows)
    return found


def test_another_process_draws_the_same_bytes_and_a_changed_figure_is_found(
    script: ModuleType, docs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {path.stem for path in (docs / "plots").iterdir()} == {
        "traffic",
        "traffic-fused",
        "eight-bits",
        "traffic-targets",
        "cpu",
        "cpu-avx2",
        "cost",
    }
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


def test_the_records_of_each_card_make_its_tables(script: ModuleType, docs: Path) -> None:
    assert "Not run: no machine with an NVIDIA GPU was there." in (docs / "performance.md").read_text()
    row = {"variant": "atto", "batch": 64, "row": "a.onnx [fused]", "images_s": 12345.6, "status": "OK"}
    record = {"device": "CARD", "date": "2030-01-02T03:04:05", "command": "scripts/gpu", "seconds": 9, "latency": [row]}
    (docs / "data" / "gpu").mkdir()
    (docs / "data" / "gpu" / "card.json").write_text(json.dumps(record))
    assert script.main(["--docs-dir", str(docs)]) == 0
    page = (docs / "performance.md").read_text()
    assert "### CARD" in page
    assert "| atto | 64 | a.onnx [fused] | 1.23e+04 | – | – | – | OK |" in page


def test_own_kernels_are_told_at_the_usual_target_and_their_ratios_at_all(docs: Path) -> None:
    work = work_of("atto", 224, "fp16")
    floors = [(moved + work.weight_bytes / 64) / 1e6 for moved in (work.fused_bytes, work.recomputed_bytes, 0)]
    figures, ratios = cells(docs, "traffic-fused")[0], cells(docs, "traffic-fused")[-1]
    own = ["9", "20.0", "0.500", "9", "10.0", "0.250", "9", "12.0", "0.300"]
    assert figures == ["atto", "40.0", "9", "30.0", *own, *(f"{floor:.1f}" for floor in floors[:2])]
    assert ratios[:5] == ["atto", "64", "0.500", "0.250–0.275", "0.300"]
    assert ratios[5:] == [f"{floor / 40:.3f}" for floor in floors]
    assert "where those recorded of sm89, sm120 agree" in part(docs, "traffic-fused")
    assert "The bytes of own kernels are what they declare" in part(docs, "traffic-fused")
    assert "20 or 10<" in (docs / "plots" / "traffic-fused.svg").read_text(encoding="utf-8")


def test_eight_bits_are_told_beside_fp16_of_the_same_graph_and_target(docs: Path) -> None:
    by_title = tables(docs, "eight-bits")
    assert by_title["÷ FP16's"] == [["atto", "9", "40.0", "9", "20.0", "0.500", "9", "30.0", "0.750"]]
    assert by_title["batch 64, INT8"] == [
        ["atto", "sm89", "20.0 (0.500)", "30.0 (0.750)"],
        ["atto", "sm86", "none", "30.0 (0.600)"],
    ]
    others, ours = by_title["graph"]
    assert others == ["atto", "timm, ModelOpt", "9", "80.0", "not run", "not run", "–", "9", "100.0", "1.250"]
    assert ours == ["atto", "cnx-deploy, its own placement", "9", "40.0", "9", "20.0", "0.500", "9", "30.0", "0.750"]
    assert "nvidia-modelopt 0.47" in part(docs, "eight-bits")
    assert "record traffic\nrecord accuracy" in part(docs, "eight-bits")
    plot = (docs / "plots" / "eight-bits.svg").read_text(encoding="utf-8")
    assert "ModelOpt, timm" in plot
    assert "ModelOpt, transformers" not in plot


def test_accuracy_in_eight_bits_has_a_table_for_each_question(docs: Path) -> None:
    by_title = tables(docs, "eight-bits")
    figures = ["50", "98.00", "96.00", "1.0e-03", "2.0e-03", "3 (2)", "0.99999"]
    trained = [["digits (atto)", "held out", name, "50", "98.00", top1, *figures[3:]]
               for name, top1 in (("FP16", "98.00"), ("INT8", "96.00"))]  # fmt: skip
    assert by_title["count"] == trained
    key, difference = ["digits (atto)", "held out", "INT8"], "1.0e-03, 2.0e-03, 3"
    assert by_title["percentile"] == [
        [*key, "yes", difference, "not run", "not run"],
        [*key, "no", "not run", difference, "not run"],
    ]
    assert by_title["weights"] == [
        ["digits (atto)", "outliers", "held out", "INT8", "no", "50", "98.00", "40.00", *figures[3:]]
    ]
    assert by_title["run by"] == [["digits (atto)", "INT8", "onnxruntime", "50", "98.00", "97.00", *figures[3:]]]
    shares = ["5.00", "5.00", "25.00", "25.00", "50.00", "50.00", "75.00", "50.00"]
    assert by_title["nearest among 5, %"] == [["digits (atto)", "held out", "INT8", "1.0e-03", "2.0e-03", *shares]]


def test_a_part_of_eight_bits_that_was_not_recorded_is_named(script: ModuleType) -> None:
    document = eight_bits()
    document["rows"] = [row for row in document["rows"] if row["part"] == "traffic"]
    text = script.eight_bits_text(document)
    for title in ("**NVIDIA's ModelOpt**", "**Accuracy**", "**Features**"):
        assert f"{title}\n\nNot run." in text
    assert "Not recorded: femto," in text


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
    assert cells(docs, "servers") == [
        ["bare loop", "1", "1,000", "0", "50.0", "–", "20", "30", "1.50", "10.0", "–"],
        ["cnx-deploy serve", "8", "1,000", "0", "40.0", "0.80", "20", "30", "1.50", "15.0", "1.50"],
    ]
    for name in ("traffic", "traffic-targets", "cost"):
        assert "Recorded 2026-01-02 with `record it`." in part(docs, name)
        assert "no gpu" in part(docs, name).lower()
        assert "record it; 2026-01-02" in (docs / "plots" / f"{name}.svg").read_text(encoding="utf-8")


def test_the_committed_page_and_plots_are_what_the_data_say(script: ModuleType) -> None:
    recorded = {path.stem for path in (ROOT / "docs" / "data").glob("*.json")}
    names = [name for name, section in script.SECTIONS.items() if section[-1] is not None and name in recorded]
    drawn = [(ROOT / "docs" / "plots" / f"{name}.svg").read_text(encoding="utf-8") for name in names]
    if not all(f"Matplotlib v{matplotlib.__version__}," in text for text in drawn):
        pytest.skip(f"another matplotlib than {matplotlib.__version__} drew the plots")
    assert script.main(["--check"]) == 0
