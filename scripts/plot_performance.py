"""Fill the tables of docs/performance.md and draw docs/plots from the records in docs/data.

usage: plot_performance.py [--check] [--docs-dir docs]

Needs matplotlib (the extra `report`). The same data and the same matplotlib give the same bytes. `--check` writes
nothing and exits with 3 when the page or a plot is not what the data say; if only plots are named, another matplotlib
may have drawn them. A section whose data file is missing says so and has no plot.
"""

import argparse
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from cnx_deploy.bench.bounds import work_of
from cnx_deploy.core.eight_bits import METHODS
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, SKY, svg_bytes
from cnx_deploy.core.variants import VARIANTS

Document = dict[str, Any]
"""A file of docs/data, or one of its rows."""
OURS, PEERS = "cnx-deploy", ("timm", "transformers")
BASELINE, WHOLE = "timm.onnx fp32", "timm.onnx whole batch fp32"
"""timm's graph, run as our files are; and the same file as ONNX Runtime runs it by itself."""
IN_OPENVINO, ALONE_IN_OPENVINO = "timm.onnx in OpenVINO fp32", "timm.onnx in OpenVINO whole batch fp32"
COMPILED = "torch.compile fp32"
BY_THEMSELVES = {WHOLE: "timm in ONNX Runtime", ALONE_IN_OPENVINO: "timm in OpenVINO", COMPILED: "torch.compile"}
"""The peers as their runtimes run them by themselves, and what a table calls them."""
NO_GPU = "No GPU: kernels and bytes are the compiler's; no latency was measured."
TOOLS = (
    "cnx-deploy",
    "tensorrt-rtx",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "torch",
    "timm",
    "transformers",
    "ray",
    "litserve",
)
GROWTHS = {
    "export_seconds": "export time", "build_seconds": "build time",
    "export_peak_mib": "export memory", "build_peak_mib": "build memory",
}  # fmt: skip
COST_COLUMNS = (
    ("export_seconds", "export, s", ",.1f"), ("export_peak_mib", "peak MiB", ",.0f"),
    ("build_seconds", "build, s", ",.1f"), ("build_peak_mib", "peak MiB", ",.0f"),
    ("onnx_megabytes", "FP16 ONNX, MB", ",.1f"), ("engine_megabytes", "sm89 engine, MB", ",.1f"),
)  # fmt: skip
LOOKS = tuple(zip((BLUE, SKY, ORANGE, GREEN, PURPLE, GREY, BLUE, SKY, ORANGE), "oDs^vXP*d", strict=True))
"""Colour and marker of the first, second, … series of a plot."""
FLOORS = ("floor, stored", "floor, recomputed", "weights alone")
GRAPH_LOOKS = {OURS: (BLUE, "o"), "timm": (ORANGE, "s"), "transformers": (GREEN, "^"), "fused floor": (GREY, "|")}
OWN = tuple(f"{OURS}, {mode}" for mode in ("stored", "recomputed", "auto"))
"""Our graph with own kernels."""
USUAL = ("sm89", 64)
"""The target and batch that stand for the others where one has to."""
DECLARED = "The bytes of own kernels are what they declare to the compiler."
FUSED_LOOKS = {
    **{graph: look for graph, look in GRAPH_LOOKS.items() if graph != "fused floor"},
    OWN[0]: (PURPLE, "v"), OWN[1]: (SKY, "D"), "floor, stored": (GREY, "|"), "floor, recomputed": (GREY, "."),
}  # fmt: skip
HEAD, FOOT, GAP = 1.1, 0.5, 0.35
"""Inches above the panels for titles and legend, below them for ticks, between them. Fixed margins, since a layout
engine of matplotlib moves the axes by the last digit each time, and that changes the bytes."""


def main(arguments: list[str] | None = None) -> int:
    """Write or check; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 3 when something is out of date")
    parser.add_argument("--docs-dir", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    options = parser.parse_args(arguments)
    stale = [
        (path, content)
        for path, content in wanted_files(options.docs_dir)
        if content != (path.read_bytes() if path.is_file() else None)
    ]
    for path, content in stale:
        print(f"{path} is not what docs/data says" if options.check else path)
        if options.check:
            continue
        if content is None:
            path.unlink()
        else:
            with whole_file(path) as temporary:
                temporary.write_bytes(content)
    return 3 if options.check and stale else 0


def wanted_files(docs: Path) -> Iterator[tuple[Path, bytes | None]]:
    """Yield each plot and, last, the page with what they should hold; None for a plot without data."""
    text = (docs / "performance.md").read_text(encoding="utf-8")
    for name, (command, alt, condition, tell, draw) in SECTIONS.items():
        path, filling, content = docs / "data" / f"{name}.json", "Not recorded yet.", None
        if name == "gpu":  # a file for each card
            records = [json.loads(file.read_bytes()) for file in sorted((docs / "data" / "gpu").glob("*.json"))]
            filling = "\n\n".join(map(gpu_text, records)) or "Not run: no machine with an NVIDIA GPU was there."
        elif path.is_file():
            data = json.loads(path.read_bytes())
            command, day = data.get("command", command), (data.get("environment") or data)["date"][:10]
            source = f"{command}; {day}. {condition}"
            picture = f"![{alt}](plots/{name}.svg)\n\n" if draw is not None else ""
            filling = f"{picture}Recorded {day} with `{command}`.\n\n{tell(data)}"
            if draw is not None:
                content = svg_bytes(lambda draw=draw, data=data, source=source: draw(data, source))
        begin, end = f"<!-- {name}: begin (scripts/plot_performance.py) -->", f"<!-- {name}: end -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found, f"performance.md has no line {begin!r}"
        assert closed, f"performance.md has no line {end!r}"
        text = f"{before}{begin}\n{filling}\n{end}{after}"
        if draw is None:
            continue
        yield docs / "plots" / f"{name}.svg", content
    yield docs / "performance.md", text.encode()


# --- what is compared -------------------------------------------------------------------------------------------------


def comparisons(data: Document) -> dict[tuple[str, int, str, int], dict[str, Document]]:
    """Group rows by variant, image size, target and batch, each by graph."""
    found: dict[tuple[str, int, str, int], dict[str, Document]] = {}
    for row in data["rows"]:
        found.setdefault((row["variant"], row["image_size"], row["target"], row["batch"]), {})[row["graph"]] = row
    return found


def best_peer(graphs: Mapping[str, Document]) -> float | None:
    """Return the megabytes an image of the peer that moves least; None without a peer."""
    return min((graphs[peer]["megabytes_per_image"] for peer in PEERS if peer in graphs), default=None)


def share(graphs: Mapping[str, Document], graph: str = OURS) -> float | None:
    """Return the bytes of a graph over those of the better peer; None where either is missing."""
    best = best_peer(graphs)
    return graphs[graph]["megabytes_per_image"] / best if best and graph in graphs else None


def fused_floor(variant: str, image_size: int, batch: int) -> float:
    """Return the fewest megabytes an image: blocks fused as far as GRN allows, weights read once a batch."""
    work = work_of(variant, image_size, "fp16")
    return (work.fused_bytes + work.weight_bytes / batch) / 1e6


def recomputed_floor(variant: str, image_size: int, batch: int) -> float:
    """Return the same where no hidden tensor is stored."""
    work = work_of(variant, image_size, "fp16")
    return (work.recomputed_bytes + work.weight_bytes / batch) / 1e6


def weights_alone(variant: str, image_size: int, batch: int) -> float:
    """Return the weights' megabytes an image, read once a batch."""
    return work_of(variant, image_size, "fp16").weight_bytes / batch / 1e6


def slope(rows: Sequence[Document], column: str) -> float | None:
    """Return b of `column` = a · parameters^b, least squares on logarithms; None for fewer than three rows."""
    points = [(row["parameters"], row[column]) for row in rows if row[column] is not None]
    if len(points) < 3:
        return None
    parameters, values = np.log(np.asarray(points, dtype=np.float64)).T
    return float(np.polyfit(parameters, values, 1)[0])


def ratio_to(row: Document, peer: str) -> Document | None:
    """Return the ratio of a benchmark's row to a peer of the same run; None for the peer itself."""
    return next((ratio for ratio in row["ratios"] if ratio["peer"] == peer), None)


# --- tables -----------------------------------------------------------------------------------------------------------


def traffic_text(data: Document) -> str:
    """Kernels and megabytes an image of each graph, by variant."""
    found = comparisons(data)
    (condition,) = {f"{target}, batch {batch}, {size} px" for _, size, target, batch in found}
    rows = []
    for (variant, size, _, batch), graphs in found.items():
        cells = [cell for graph in (*PEERS, OURS) for cell in (
            (str(graphs[graph]["kernels"]), f"{graphs[graph]['megabytes_per_image']:.1f}") if graph in graphs
            else ("not run", "not run"))]  # fmt: skip
        rows.append((variant, *cells, number(share(graphs), ".3f", "–"), f"{fused_floor(variant, size, batch):.1f}"))
    titles = [title for graph in (*PEERS, OURS) for title in (f"{graph}, kernels", "MB")]
    conditions_and_tools = f"{condition}, FP16; MB an image. {NO_GPU} {versions(data['tools'])}"
    header = ("variant", *titles, "ours ÷ the better peer's", "fused floor, MB")
    return paragraphs(table(header, rows), left_out(row[0] for row in rows), conditions_and_tools)


def fused_text(data: Document) -> str:
    """Kernels and megabytes an image with own kernels, at the usual target and batch, then ratios at all of them."""
    found = comparisons(data)
    rows = []
    for (variant, size, target, batch), graphs in found.items():
        if (target, batch) == USUAL:
            cells = [cell for graph in (OURS, *OWN) for cell in (
                str(graphs[graph]["kernels"]), f"{graphs[graph]['megabytes_per_image']:.1f}",
                *((number(share(graphs, graph), ".3f"),) if graph in OWN else ()))]  # fmt: skip
            floors = (floor(variant, size, batch) for floor in (fused_floor, recomputed_floor))
            rows.append((variant, number(best_peer(graphs), ".1f"), *cells, *(f"{floor:.1f}" for floor in floors)))
    titles = [title for graph in OWN for title in (f"{mode_of(graph)}, kernels", "MB", "÷ the peer's")]
    header = ("variant", "better peer, MB", "without own kernels", "MB", *titles, "floor, stored", "floor, recomputed")
    targets = sorted({target for _, _, target, _ in found}, key=lambda name: int(name.removeprefix("sm")))
    batches = sorted({batch for *_, batch in found})
    ratios = []
    for variant, batch in itertools.product(dict.fromkeys(key[0] for key in found), batches):
        alike = [graphs for key, graphs in found.items() if (key[0], key[3]) == (variant, batch)]
        floors = (floor(variant, 224, batch) for floor in (fused_floor, recomputed_floor, weights_alone))
        ratios.append((
            variant, str(batch),
            *(span(share(graphs, graph) for graphs in alike) for graph in OWN),
            *(span(floor / best_peer(graphs) for graphs in alike if best_peer(graphs)) for floor in floors),
        ))  # fmt: skip
    target, batch = USUAL
    return paragraphs(
        f"{target}, batch {batch}, 224 px; MB an image:",
        table(header, rows),
        "Ratios to the better peer, at every batch: one figure where those recorded of "
        f"{', '.join(targets)} agree, else the least and the most. "
        "Beside them the floors, and the weights alone, which every FP16 engine reads once a batch.",
        table(("variant", "batch", *(mode_of(graph) for graph in OWN), *FLOORS), ratios),
        left_out(variant for variant, *_ in found),
        f"{DECLARED} {NO_GPU} {versions(data['tools'])}",
    )


def mode_of(graph: str) -> str:
    """`stored` of "cnx-deploy, stored"."""
    return graph.removeprefix(f"{OURS}, ")


def span(ratios: Iterable[float | None]) -> str:
    """Return one figure where all agree, else the smallest and the largest."""
    texts = sorted({f"{ratio:.3f}" for ratio in ratios if ratio is not None})
    return "–".join(dict.fromkeys((texts[0], texts[-1]))) if texts else "not run"


def targets_text(data: Document) -> str:
    """Ours, the better peer's and their ratio: a line a variant, size and target, a column a batch."""
    found = comparisons(data)
    batches = sorted({batch for *_, batch in found})
    rows = []
    for line in dict.fromkeys(key[:3] for key in found):
        by_batch = [found.get((*line, batch), {}) for batch in batches]
        rows.append((*map(str, line), *(
            f"{graphs[OURS]['megabytes_per_image']:.1f} ÷ {best_peer(graphs):.1f} = {ratio:.3f}"
            if (ratio := share(graphs)) else "not run" for graphs in by_batch)))  # fmt: skip
    ratios = {key: ratio for key, graphs in found.items() if (ratio := share(graphs)) is not None}
    worse = [f"{name} {size} px {target} batch {batch} ({ratio:.3f})"
             for (name, size, target, batch), ratio in ratios.items() if ratio > 1.0]  # fmt: skip
    said = f"Ours moves more in {len(worse)} of {len(ratios)}{': ' if worse else ''}{', '.join(worse)}."
    return paragraphs(
        table(("variant", "px", "target", *(f"batch {batch}" for batch in batches)), rows),
        f"{said} {left_out(variant for variant, *_ in found)}".rstrip(),
        f"MB an image: ours ÷ the better peer's = ratio. {NO_GPU} {versions(data['tools'])}",
    )


def dense_text(data: Document) -> str:
    """Tell the graphs of a task with an answer at each place, a row each."""
    rows = (
        [row["variant"], size_of(row["image_size"]), row["target"], str(row["batch"]), row["graph"],
         str(row["kernels"]), f"{row['megabytes_per_image']:,.1f}", number(row["of_best_peer"], ".3f", "")]
        for row in data["rows"]
    )  # fmt: skip
    header = ("variant", "px", "target", "batch", "graph", "kernels", "MB an image", "ours ÷ the peer's")
    return paragraphs(table(header, rows), f"{NO_GPU} {versions(data['tools'])}")


def size_of(size: int | Sequence[int]) -> str:
    """`512`, or `800x1344`."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def cpu_text(data: Document) -> str:
    """Images a second and the ratios to timm's model, a line a row of the benchmark."""

    def cell(row: Document, peer: str) -> str:
        ratio = ratio_to(row, peer)
        if ratio is None:
            return "baseline" if row["name"] == peer else "–"
        return f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"

    rows, sizes = [], {}
    for row in data["rows"]:
        network = data["networks"][row["network"]]
        sizes[network["variant"], network["image_size"]] = work_of(network["variant"], network["image_size"], "fp32")
        status = row["status"] if row["status"] == "OK" else f"**{row['status']}**"
        speed = f"{row['images_per_second']:.1f}"
        rows.append((network["variant"], str(network["image_size"]), str(row["batch"]), row["name"], speed,
                     cell(row, BASELINE), cell(row, WHOLE), status))  # fmt: skip
    machine = data["environment"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    missing = ", ".join(f"{row['name']} ({row['reason']})" for row in data["not_run"])
    shares = ", ".join(f"{work.variant} {100 * work.gemm_macs / work.macs:.1f} %" for work in sizes.values())
    return paragraphs(
        table(("variant", "px", "batch", "what", "images/s", f"× {BASELINE} (95 %)", f"× {WHOLE}", "status"), rows),
        f"Machine: {machine['cpu']} ({' '.join(machine['isa'])}), {machine['processors']} processors, "
        f"{machine['threads']} threads; {machine['duration_seconds']:g} s a row{commit}. {versions(machine['tools'])}",
        f"Not run: {missing}." if missing else "",
        f"Doubts at the start: {'; '.join(data['warnings'])}." if data["warnings"] else "",
        f"Multiply-accumulates in matrix products, counted from the architecture: {shares}.",
        left_out(variant for variant, *_ in rows),
    )


def runtimes_text(data: Document) -> str:
    """Our fastest form and runtime for each network and batch, and its ratios to the peers of the same turns."""
    groups: dict[tuple[str, int], list[Document]] = {}
    for row in data["rows"]:
        groups.setdefault((row["network"], row["batch"]), []).append(row)

    def cell(row: Document, peers: Mapping[str, Document]) -> str:
        """The ratio to the fastest of some peers."""
        fastest = max(peers, key=lambda peer: peers[peer]["images_per_second"], default=None)
        ratio = None if fastest is None else ratio_to(row, fastest)
        return "not run" if ratio is None else f"{ratio['ratio']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})"

    rows = []
    for (network, batch), found in groups.items():
        facts = data["networks"][network]
        peers = {row["name"]: row for row in found if own_file(row, facts) is None and row["status"] != "INVALID"}
        ours = [row for row in found if own_file(row, facts) is not None and row["status"] != "INVALID"]
        narrow = [row for row in ours if row["arithmetic"] != "fp32"]
        best = max((row for row in ours if row not in narrow), key=lambda row: row["images_per_second"])
        unsteady = "" if best["status"] == "OK" else f" ({best['status']})"
        alone = {peer: peers[peer] for peer in BY_THEMSELVES if peer in peers}
        as_ours = {peer: peers[peer] for peer in (BASELINE, IN_OPENVINO) if peer in peers}
        each = [cell(best, {peer: peers[peer]} if peer in peers else {}) for peer in BY_THEMSELVES]
        in_half = [cell(max(narrow, key=lambda row: row["images_per_second"]), alone)] if narrow else []
        rows.append((facts["variant"], str(batch), f"`{best['name']}`{unsteady}", f"{best['images_per_second']:.1f}",
                     *each, cell(best, alone), cell(best, as_ours), *in_half))  # fmt: skip
    header = ("variant", "batch", "our fastest", "images/s", *(f"× {name}" for name in BY_THEMSELVES.values()),
              "× the fastest of them", "× timm, run as ours",
              *("BF16 in OpenVINO, × the fastest" for row in rows[:1] if len(row) > 9))  # fmt: skip
    machine = data["environment"]
    ran = {row["name"].partition(" [")[0] for row in data["rows"]}  # a file that one backend ran is not missing
    left = [row for row in data["not_run"] if row["name"].partition(" [")[0] not in ran]
    missing = ", ".join(f"{row['name']} ({row['reason']})" for row in left)
    return paragraphs(
        table(header, rows),
        f"Machine: {machine['cpu']} ({' '.join(machine['isa'])}), {machine['processors']} processors, "
        f"{machine['threads']} threads; {machine['duration_seconds']:g} s a row. {versions(machine['tools'])}",
        f"Not run: {missing}." if missing else "",
        f"Doubts at the start: {'; '.join(data['warnings'])}." if data["warnings"] else "",
        left_out(variant for variant, *_ in rows),
    )


def own_file(row: Document, network: Document) -> str | None:
    """The file of a benchmark's row, by the row's name with or without its backend; None of a peer."""
    name = row["name"].partition(" [")[0]
    return name if name in network["files"] else None


def cost_text(data: Document) -> str:
    """Seconds, peak memory and file sizes of export and build by variant, and how they grow."""
    rows = [
        (row["variant"], f"{row['parameters']:,}", *(number(row[name], form) for name, _, form in COST_COLUMNS))
        for row in data["rows"]
    ]
    grown = [f"{name} × {10**exponent:.1f}" for column, name in GROWTHS.items()
             if (exponent := slope(data["rows"], column)) is not None]  # fmt: skip
    return paragraphs(
        table(("variant", "parameters", *(title for _, title, _ in COST_COLUMNS)), rows),
        f"For ten times the parameters: {', '.join(grown)}." if grown else "",
        left_out(row["variant"] for row in data["rows"]),
        f"Engines for {', '.join(data['targets'])}. Machine: {data['machine']}, no GPU. "
        f"`cnx-deploy --help` takes {data['help_seconds']:.2f} s. {versions(data['tools'])}",
    )


def servers_text(data: Document) -> str:
    """Servers of one file beside a bare loop: speed, latencies, processor time an image."""
    bare = data["rows"][0]
    rows = [
        (
            row["server"], str(row["clients"]), f"{row['requests']:,}", str(row["failures"]),
            number(row["images_a_second"], ".1f"), number(row.get("speed_of_bare"), ".2f", "–"),
            number(row["p50_ms"], ".0f"), number(row["p99_ms"], ".0f"), number(row["p99_ms"] / row["p50_ms"], ".2f"),
            number(row["processor_ms"], ".1f"), number(row.get("processor_of_bare"), ".2f", "–"),
        )
        for row in data["rows"]
    ]  # fmt: skip
    titles = (
        "server", "clients", "requests", "failures", "images/s", "÷ bare", "p50, ms", "p99, ms", "p99 ÷ p50",
        "processor, ms an image", "÷ bare",
    )  # fmt: skip
    return paragraphs(
        table(titles, rows),
        f"{data['file']}. The bare loop ran {bare['requests']:,} images, between the servers' turns. Machine: "
        f"{data['machine']}. {data.get('note', '')} {versions(data['tools'])}",
    )


def eight_bits_text(data: Document) -> str:
    """Bytes of FP8 and INT8 beside FP16, what NVIDIA's quantiser makes of others' graphs and ours, and accuracy."""
    parts = {name: [row for row in data["rows"] if row["part"] == name]
             for name in ("traffic", "dense", "modelopt", "accuracy", "features")}  # fmt: skip
    engines = by_precision(parts["traffic"])
    target, batch = USUAL
    usual = {key[0]: rows for key, rows in engines.items() if key[1:3] == USUAL and key[3] == OURS}
    lines = [(variant, *kernels_and_bytes(rows)) for variant, rows in usual.items()]
    return paragraphs(
        "```bash\n" + "\n".join(data["commands"]) + "\n```",
        f"{target}, batch {batch}, 224 px; MB an image. {data['note']}",
        table(("variant", *KERNELS_AND_BYTES), lines),
        "MB an image, and the share of the FP16 engine's of the same target and batch:",
        eight_bit_targets(engines),
        left_out(variant for variant, *_ in engines),
        "**Segmentation and detection**: UPerNet of 150 classes, Mask R-CNN of 80; their heads stay in FP16.",
        dense_eight_bits(parts["dense"]),
        "**NVIDIA's ModelOpt**",
        modelopt_text(parts["modelopt"], usual),
        "**Accuracy**",
        accuracy_text(parts["accuracy"]),
        "**Features**",
        features_text(parts["features"]),
        f"{NO_GPU} {versions(data['tools'])}",
    )


KERNELS_AND_BYTES = ("FP16, kernels", "MB", "FP8, kernels", "MB", "÷ FP16's", "INT8, kernels", "MB", "÷ FP16's")
EIGHT_BITS = {"fp8": "FP8", "int8": "INT8"}
"""Precisions in eight bits, and what tables call them."""


def by_precision(rows: Iterable[Document]) -> dict[tuple[str, str, int, str], dict[str, Document]]:
    """Group engines by variant, target, batch and graph, each by precision."""
    found: dict[tuple[str, str, int, str], dict[str, Document]] = {}
    for row in rows:
        key = row["variant"], row["target"], row["batch"], row.get("graph", OURS)
        found.setdefault(key, {})[row["precision"]] = row
    return found


def share_of_half(engines: Mapping[str, Document], precision: str) -> float | None:
    """Return the bytes of a precision over those of FP16 for the same graph; None where either is missing."""
    if "fp16" not in engines or precision not in engines:
        return None
    moved: float = engines[precision]["megabytes_per_image"]
    return moved / engines["fp16"]["megabytes_per_image"]


def kernels_and_bytes(engines: Mapping[str, Document]) -> Iterator[str]:
    """Yield the cells of `KERNELS_AND_BYTES`."""
    for precision in ("fp16", *EIGHT_BITS):
        row = engines.get(precision)
        yield from ("not run", "not run") if row is None else (
            str(row["kernels"]), f"{row['megabytes_per_image']:.1f}")  # fmt: skip
        if precision in EIGHT_BITS:
            yield number(share_of_half(engines, precision), ".3f", "–")


def dense_eight_bits(rows: Iterable[Document]) -> str:
    """A line a network, image size, target and batch."""
    found: dict[tuple[str, ...], dict[str, Document]] = {}
    for row in rows:
        key = row["variant"], row["task"], size_of(row["image_size"]), row["target"], str(row["batch"])
        found.setdefault(key, {})[row["precision"]] = row
    in_order = sorted(found.items(), key=lambda item: (item[0][2:], list(VARIANTS).index(item[0][0])))
    lines = [(*key, *kernels_and_bytes(engines)) for key, engines in in_order]
    return table(("variant", "task", "px", "target", "batch", *KERNELS_AND_BYTES), lines) if lines else "Not run."


def eight_bit_targets(engines: Mapping[tuple[str, str, int, str], Mapping[str, Document]]) -> str:
    """A line a variant and target, a column a batch and precision."""
    batches = sorted({key[2] for key in engines})
    lines = []
    for variant, target in dict.fromkeys(key[:2] for key in engines):
        cells = []
        for batch, precision in ((batch, precision) for batch in batches for precision in EIGHT_BITS):
            found = engines.get((variant, target, batch, OURS), {})
            part = share_of_half(found, precision)
            missing = "none" if found and precision not in found else "not run"
            cells.append(missing if part is None else f"{found[precision]['megabytes_per_image']:.1f} ({part:.3f})")
        lines.append((variant, target, *cells))
    titles = [f"batch {batch}, {name}" for batch in batches for name in EIGHT_BITS.values()]
    return paragraphs(
        table(("variant", "target", *titles), lines),
        "*none*: the compiler has no FP8 for a target below sm89." if any("none" in line for line in lines) else "",
    )


def modelopt_text(rows: Sequence[Document], ours: Mapping[str, Mapping[str, Document]]) -> str:
    """What ModelOpt makes of each graph, beside what our own placement makes of ours."""
    if not rows:
        return "Not run."
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        found = by_precision(row for row in rows if row["variant"] == variant)
        named = {OF_MODELOPT.get(graph, graph): engines for (*_, graph), engines in found.items()}
        if variant in ours:
            named["cnx-deploy, its own placement"] = ours[variant]
        lines += [(variant, graph, *kernels_and_bytes(engines)) for graph, engines in named.items()]
    version, target, batch = rows[0]["modelopt"], rows[0]["target"], rows[0]["batch"]
    return paragraphs(
        table(("variant", "graph", *KERNELS_AND_BYTES), lines),
        f"{target}, batch {batch}; nvidia-modelopt {version}, its usual options, calibrated on images from a seed.",
    )


OF_MODELOPT = {"timm": "timm, ModelOpt", "transformers": "transformers, ModelOpt", OURS: "cnx-deploy, ModelOpt"}


def accuracy_text(rows: Sequence[Document]) -> str:
    """As trained; by method of calibration; with hidden tensors that are hard to round; and by what runs the form."""
    if not rows:
        return "Not run."
    form = [row for row in rows if row["judge"] == "torch-deploy"]
    trained = [row for row in form if not row["change"]]
    usual = [row for row in trained if row["precision"] == "fp16" or (row["method"] == "max" and row["gains"])]
    changed = [row for row in form if row["change"]]
    files = [row for row in rows if row not in form]
    network, images, precision = (
        ("network", network_of),
        ("images", itemgetter("images")),
        ("precision", named_precision),
    )
    return paragraphs(
        "Networks as they were trained, calibrated with the largest values (`max`), with gains:",
        accuracy_table(usual, (network, images, precision)),
        "By method of calibration: relative L2 in the median and of the worst image, and flips:",
        methods_table([row for row in trained if row["method"]]),
        "The same networks with hidden tensors 50 times as large (*hot*), and with two hidden channels a block 30 "
        "times as large (*outliers*):",
        accuracy_table(changed, (network, ("weights", itemgetter("change")), images, precision, ("gains", gains_of))),
        "The exported file, `max` with gains, in what runs it:",
        accuracy_table(files, (network, precision, ("run by", itemgetter("judge")))),
        "Differences are from PyTorch in FP32. Of relative L2 the median and the worst image, of the cosine the worst; "
        "a flip is *excused* where FP32's margin is within the noise. `torch-deploy` is the deploy form in PyTorch.",
    )


def network_of(row: Document) -> str:
    """`digits (atto)`."""
    return f"{row['network']} ({row['variant']})"


def named_precision(row: Document) -> str:
    """`INT8`."""
    return str(row["precision"]).upper()


def gains_of(row: Document) -> str:
    """Whether channels are evened out before they are rounded; FP16 has nothing to even out."""
    return "" if row["precision"] == "fp16" else "yes" if row["gains"] else "no"


def methods_table(rows: Iterable[Document]) -> str:
    """A line a network, images, precision and gains, a column a method."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        key = network_of(row), row["images"], named_precision(row), gains_of(row)
        text = f"{row['relative_l2_median']:.1e}, {row['relative_l2_worst']:.1e}, {row['flips']}"
        found.setdefault(key, {})[row["method"]] = text
    lines = [(*key, *(cells.get(method, "not run") for method in METHODS)) for key, cells in found.items()]
    return table(("network", "images", "precision", "gains", *METHODS), lines)


def accuracy_table(rows: Iterable[Document], columns: Sequence[tuple[str, Callable[[Document], str]]]) -> str:
    """Columns that say what a row is of, and its figures."""
    lines = [
        (*(of(row) for _, of in columns), str(row["count"]), f"{row['reference_top1']:.2f}", f"{row['top1']:.2f}",
         f"{row['relative_l2_median']:.1e}", f"{row['relative_l2_worst']:.1e}",
         f"{row['flips']} ({row['excused_flips']})", f"{row['centred_cosine']:.5f}")
        for row in rows
    ]  # fmt: skip
    header = ("count", "FP32, top-1 %", "top-1 %", "relative L2", "worst", "flips (excused)", "cosine")
    return table((*(title for title, _ in columns), *header), lines)


def features_text(rows: Sequence[Document]) -> str:
    """How the nearest neighbours of embeddings agree with those in FP32."""
    if not rows:
        return "Not run."
    lines = []
    for row in rows:
        if row["method"] in ("", "max") and (row["gains"] or not row["method"]):
            shares = [f"{100 * row[f'{name}_at_{k}']:.2f}" for k in (1, 5, 10) for name in ("overlap", "recall")]
            labels = [f"{100 * row[f'{side}_label_at_1']:.2f}" for side in ("reference", "candidate")]
            lines.append((network_of(row), row["images"], named_precision(row), f"{row['relative_l2_median']:.1e}",
                          f"{row['relative_l2_worst']:.1e}", *shares, *labels))  # fmt: skip
    titles = [title for k in (1, 5, 10) for title in (f"same {k}, %", f"nearest among {k}, %")]
    labelled = ("FP32, label of the nearest, %", "label, %")
    header = ("network", "images", "precision", "relative L2", "worst", *titles, *labelled)
    return paragraphs(
        table(header, lines),
        "Embeddings before the head, searched by cosine: of FP32's k nearest those that are among the k nearest here, "
        "and of the images those whose nearest is among them.",
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its first column left-aligned and the others right-aligned."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["--:"] * (len(header) - 1), *rows))


def paragraphs(*texts: str) -> str:
    """Join what is not empty."""
    return "\n\n".join(text for text in texts if text)


def number(value: float | None, form: str, missing: str = "not run") -> str:
    """Return a figure in a form, or what stands for a missing one."""
    return missing if value is None else f"{value:{form}}"


def left_out(recorded: Iterable[str]) -> str:
    """Name the variants that a data file does not have."""
    names = set(recorded)
    missing = [variant for variant in VARIANTS if variant not in names]
    return f"Not recorded: {', '.join(missing)}." if missing else ""


def versions(tools: Mapping[str, str]) -> str:
    """Name the versions that shape the figures, of those that a data file keeps."""
    return f"Versions: {', '.join(f'{name} {tools[name]}' for name in TOOLS if name in tools)}."


# --- plots ------------------------------------------------------------------------------------------------------------


def traffic_plot(data: Document, source: str) -> Any:
    """Bytes an image over the better peer's, a line a variant: ours, the peers and the fused floor."""
    found = {key[0]: (key, graphs) for key, graphs in comparisons(data).items() if best_peer(graphs)}
    drawn = "bytes an image ÷ the better peer's, less is better; labels: ours, MB"
    figure, ((axes,),) = canvas((1, 1), 0.32 * len(found), "FP16 memory traffic", drawn, source)
    for graph, (colour, marker) in GRAPH_LOOKS.items():
        for line, ((variant, size, _, batch), graphs) in enumerate(found.values()):
            floor = fused_floor(variant, size, batch) / (best_peer(graphs) or 1.0)
            value = floor if graph == "fused floor" else share(graphs, graph)
            # timm's square is hollow and large: where both peers move the same bytes, both can be seen.
            points, face = (9, "white") if graph == "timm" else (6, colour)
            point(axes, value, line, colour, marker, points, face, graph)
            if graph == OURS and value is not None:
                text = f"{graphs[OURS]['megabytes_per_image']:.0f} MB"
                axes.annotate(text, (value, line), (6, 0), textcoords="offset points", va="center", fontsize=8)
    name_lines(axes, list(found))
    axes.set_xlim(left=0)
    return with_legend(figure, axes)


def fused_plot(data: Document, source: str) -> Any:
    """Bytes an image over the better peer's, a line a variant: without own kernels, with them, and both floors."""
    found = {
        key[0]: (key, graphs) for key, graphs in comparisons(data).items() if key[2:] == USUAL and best_peer(graphs)
    }
    drawn = f"{USUAL[0]}, batch {USUAL[1]}: bytes ÷ the better peer's, less is better; labels: MB an image"
    figure, ((axes,),) = canvas(
        (1, 1), 0.36 * len(found), "FP16 memory traffic with own kernels", drawn, source, HEAD + 0.2
    )
    for line, ((variant, size, _, batch), graphs) in enumerate(found.values()):
        best = best_peer(graphs) or 1.0
        floors = {"floor, stored": fused_floor, "floor, recomputed": recomputed_floor}
        values = {
            **{graph: share(graphs, graph) for graph in (*PEERS, OURS, *OWN[:2])},
            **{name: floor(variant, size, batch) / best for name, floor in floors.items()},
        }
        for graph, (colour, marker) in FUSED_LOOKS.items():
            # Hollow and large where marks may lie on each other: both peers, and both ways with wide stages.
            points, face = (9, "white") if graph in (PEERS[0], OWN[0]) else (6, colour)
            point(axes, values[graph], line, colour, marker, points, face, graph)
        if (value := values[OWN[0]]) is not None:
            text = " or ".join(dict.fromkeys(f"{graphs[graph]['megabytes_per_image']:.0f}" for graph in OWN[:2]))
            axes.annotate(text, (value, line), (7, 0), textcoords="offset points", va="center", fontsize=8)
    name_lines(axes, list(found))
    axes.set_xlim(left=0)
    return with_legend(figure, axes)


def eight_bits_plot(data: Document, source: str) -> Any:
    """Bytes over FP16's of the same graph, a line a variant: FP8 and INT8, and what ModelOpt makes of three graphs."""
    rows = [row for row in data["rows"] if row["part"] in ("traffic", "modelopt") and row["target"] == USUAL[0]]
    variants = list(dict.fromkeys(row["variant"] for row in rows if row["part"] == "traffic"))
    drawn = f"{USUAL[0]}: bytes ÷ the same graph's in FP16, less is better; labels: MB, batch {USUAL[1]}"
    figure, ((axes,),) = canvas((1, 1), 0.5 * len(variants), "Memory traffic in eight bits", drawn, source, HEAD + 0.2)
    for part, looks in (("traffic", OWN_LOOKS), ("modelopt", MODELOPT_LOOKS)):
        engines = by_precision(row for row in rows if row["part"] == part)
        for (batch, graph, precision), (colour, marker, face, label) in looks.items():
            for line, variant in enumerate(variants):
                found = engines.get((variant, USUAL[0], batch, graph), {})
                value = share_of_half(found, precision)
                place = line - 0.18 if precision == "fp8" else line + 0.18
                point(axes, value, place, colour, marker, 6, face, label)
                if part == "traffic" and batch == USUAL[1] and value is not None:
                    text, left = f"{found[precision]['megabytes_per_image']:.0f}", precision == "fp8"
                    axes.annotate(text, (value, place), (-7 if left else 7, 0), textcoords="offset points",
                                  va="center", ha="right" if left else "left", fontsize=8)  # fmt: skip
    name_lines(axes, variants)
    axes.set_xlim(left=0)
    return with_legend(figure, axes)


OWN_LOOKS = {
    (64, OURS, "fp8"): (BLUE, "o", BLUE, "FP8, batch 64"), (64, OURS, "int8"): (ORANGE, "o", ORANGE, "INT8, batch 64"),
    (1, OURS, "fp8"): (BLUE, "o", "white", "FP8, batch 1"), (1, OURS, "int8"): (ORANGE, "o", "white", "INT8, batch 1"),
}  # fmt: skip
"""By batch, graph and precision: colour, marker, face and label."""
MODELOPT_LOOKS = {
    (USUAL[1], graph, precision): (colour, marker, colour, f"ModelOpt, {graph}")
    for graph, marker in (("timm", "s"), ("transformers", "^"), (OURS, "D"))
    for precision, colour in (("fp8", BLUE), ("int8", ORANGE))
}


def targets_plot(data: Document, source: str) -> Any:
    """Our ratio to the better peer: a panel a variant and size, a line a target, a mark a batch."""
    found = {key: ratio for key, graphs in comparisons(data).items() if (ratio := share(graphs)) is not None}
    variants, sizes = list(dict.fromkeys(key[0] for key in found)), sorted({key[1] for key in found})
    targets = sorted({key[2] for key in found}, key=lambda name: int(name.removeprefix("sm")))
    looks = dict(zip(sorted({key[3] for key in found}), LOOKS, strict=False))
    drawn = "our bytes an image ÷ the better peer's, less is better; a mark a batch size"
    shape = (len(variants), len(sizes))
    figure, panels = canvas(shape, 0.3 * len(targets), "FP16 memory traffic by GPU generation", drawn, source)
    for (variant, size, target, batch), ratio in found.items():
        axes = panels[variants.index(variant)][sizes.index(size)]
        offset = (list(looks).index(batch) + 1) / (len(looks) + 1) - 0.5
        point(axes, ratio, targets.index(target) + offset, *looks[batch], label=f"batch {batch}")
        axes.set_title(f"{variant}, {size} px")
    for axes in (axes for row in panels for axes in row):
        name_lines(axes, targets)
    return with_legend(figure, panels[0][0])


def cpu_plot(data: Document, source: str, baseline: str = BASELINE) -> Any:
    """Times as fast as timm's model with the interval: a panel a batch; hollow where a row is not OK."""

    def place(row: Document) -> tuple[str, str]:
        network = data["networks"][row["network"]]
        variant, size = network["variant"], network["image_size"]
        file = own_file(row, network)
        # atto-224-fp16.onnx is of the kind "ours fp16"; with a backend "[openvino]" that stands behind.
        words = [] if file is None else file.removesuffix(".onnx").split("-")
        own = " ".join(["ours", *(word for word in words if word not in (variant, str(size)))])
        kind = row["name"] if file is None else own + row["name"].removeprefix(file)
        return variant if size == 224 else f"{variant}\n{size} px", kind

    rows = sorted((row for row in data["rows"] if ratio_to(row, baseline)), key=lambda row: place(row)[1][:4] != "ours")
    networks, batches = list(dict.fromkeys(place(row)[0] for row in rows)), sorted({row["batch"] for row in rows})
    looks = dict(zip(dict.fromkeys(place(row)[1] for row in rows), LOOKS, strict=False))
    drawn = f"times as fast as {baseline}, with its 95 % interval; hollow: UNSTABLE or INVALID"
    height = 0.16 * len(networks) * (len(looks) + 1)
    figure, (panels,) = canvas((1, len(batches)), height, "Speed on a CPU", drawn, source)
    for row in rows:
        (network, kind), ratio = place(row), ratio_to(row, baseline) or {}
        axes, (colour, marker) = panels[batches.index(row["batch"])], looks[kind]
        line = networks.index(network) + (list(looks).index(kind) + 1) / (len(looks) + 1) - 0.5
        axes.plot((ratio["low"], ratio["high"]), (line, line), "-", color=colour, linewidth=1.5)
        face = colour if row["status"] == "OK" else "white"
        point(axes, ratio["ratio"], line, colour, marker, 5, face, kind)
        axes.set_title(f"batch {row['batch']}")
    for axes in panels:
        name_lines(axes, networks)
    return with_legend(figure, panels[0])


def cost_plot(data: Document, source: str) -> Any:
    """Seconds and peak memory of export and build over the parameters, all axes logarithmic."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    drawn = "by million parameters, all axes logarithmic"
    figure, ((seconds,), (memory,)) = canvas((2, 1), 2.1, "What export and build take", drawn, source)
    for axes, unit, title in ((seconds, "seconds", "seconds"), (memory, "peak_mib", "peak memory, MiB")):
        for stage, (colour, marker) in (("export", LOOKS[0]), ("build", LOOKS[2])):
            column = f"{stage}_{unit}"
            points = [(row["parameters"], row[column]) for row in data["rows"] if row[column] is not None]
            exponent = slope(data["rows"], column)
            grown = "" if exponent is None else f": × {10**exponent:.1f} for 10 × the parameters"
            axes.plot(
                *zip(*points, strict=True), f"{marker}-", color=colour, linewidth=1, label=GROWTHS[column] + grown
            )
        axes.set(xscale="log", yscale="log", title=title)
        axes.legend(loc="upper left")
        for axis, unit_size in ((axes.xaxis, 1e6), (axes.yaxis, 1)):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _, unit_size=unit_size: f"{value / unit_size:,.12g}"))
            axis.set_minor_formatter(NullFormatter())
    return figure


def canvas(
    shape: tuple[int, int], panel_inches: float, title: str, drawn: str, source: str, head: float = HEAD
) -> tuple[Any, Any]:
    """Return a figure of rows × columns of panels and the axes of them.

    Above stand the title and what is drawn, below where the data come from. It is 5.6 inches wide to read on a phone.
    """
    from matplotlib.figure import Figure

    (rows, columns), lines = shape, textwrap.wrap(source, 105, break_on_hyphens=False)
    foot = FOOT + 0.13 * len(lines)
    height = head + rows * panel_inches + (rows - 1) * GAP + foot
    figure = Figure(figsize=(5.6, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(0.14, foot / height, 0.97, 1 - head / height, 0.1, GAP / panel_inches)
    figure.text(0.02, 1 - 0.08 / height, title, size=11, weight="bold", va="top")
    figure.text(0.02, 1 - 0.3 / height, drawn, size=8.5, va="top")
    figure.text(0.02, 0.08 / height, "\n".join(lines), size=6.5, color=GREY)
    return figure, axes.tolist()


def point(
    axes: Any, across: float | None, line: float, colour: str, marker: str, size: float = 6, face: str | None = None,
    label: str | None = None,
) -> None:  # fmt: skip
    """Draw one mark, or nothing where there is no figure."""
    if across is not None:
        axes.plot(across, line, marker, color=colour, markersize=size, markerfacecolor=face or colour, label=label)


def name_lines(axes: Any, names: Sequence[str]) -> None:
    """Put names down the left side, the first on top, and a line at 1, where both sides are equal."""
    axes.axvline(1.0, color=GREY, linewidth=0.8, zorder=0.5)
    axes.hlines([line - 0.5 for line in range(1, len(names))], 0, 1, color=GRID, linewidth=0.8,
                transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")


def with_legend(figure: Any, axes: Any) -> Any:
    """Put each label of a panel once below what is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    place = (0.0, 1 - 0.45 / figure.get_figheight())
    figure.legend(once.values(), once.keys(), loc="upper left", ncols=4 if len(once) < 5 else 3, bbox_to_anchor=place,
                  columnspacing=1.0, handletextpad=0.2, handlelength=1.4)  # fmt: skip
    return figure


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def gpu_text(data: Document) -> str:
    """The tables of one card: gates, parity, hot weights, speed, kernels, energy, and what did not run."""
    lines = [
        f"### {data['device']}",
        "",
        f"Recorded {data['date'][:10]} with `{data['command']}`, {data['seconds']} s.",
        "",
    ]
    tables = {
        "gates": ("gate", "measured", "limit", "passed"),
        "parity": ("file", "candidate", "output", "images", "relative_l2", "cosine", "passed"),
        "hot": ("variant", "times_limit", "graph", "backend", "finite", "relative_l2", "right"),
        "latency": ("variant", "batch", "row", "images_s", "median_ms", "of_roofline", "relative_l2", "status"),
        "kernels": (
            "variant", "stage", "channels", "kernel", "hidden", "microseconds", "gb_s", "of_copy", "relative_l2",
        ),
        "energy": ("variant", "batch", "row", "watts", "joules_an_image"),
        "not_run": ("part", "name", "reason"),
    }  # fmt: skip
    for name, columns in tables.items():
        if rows := data.get(name):
            title = f"**{name.replace('_', ' ')}**"
            lines += [title, "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
            lines += [f"| {' | '.join(gpu_cell(row.get(column)) for column in columns)} |" for row in rows]
            lines.append("")
    return "\n".join(lines).rstrip()


def gpu_cell(value: Any) -> str:
    """A figure with three digits; a dash where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


SECTIONS: dict[str, tuple[str, str, str, Callable[[Document], str], Callable[[Document, str], Any] | None]] = {
    "traffic": (
        "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph, of the peers' graphs and of the fused floor, over the better peer's.",
        NO_GPU, traffic_text, traffic_plot,
    ),
    "traffic-fused": (
        "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph with and without own kernels, of the peers' graphs and of two floors, over "
        "the better peer's.",
        f"{DECLARED} {NO_GPU}", fused_text, fused_plot,
    ),
    "eight-bits": (
        "scripts/record_eight_bits.py",
        "Bytes an image in FP8 and INT8 over those of the same graph in FP16, of our graphs and of those that ModelOpt "
        "quantises.",
        NO_GPU, eight_bits_text, eight_bits_plot,
    ),
    "traffic-targets": (
        "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph over the better peer's, by variant, image size, target and batch.",
        NO_GPU, targets_text, targets_plot,
    ),
    "traffic-segmentation": ("scripts/compare_traffic.py", "", NO_GPU, dense_text, None),
    "traffic-detection": ("scripts/compare_traffic.py", "", NO_GPU, dense_text, None),
    "cpu": (
        "cnx-deploy bench export/{atto,nano,tiny,base}-224-fp32.onnx --batch 1 --batch 8 "
        "--compare timm,timm-whole,timm-18,torch,compile --no-spin --json",
        "Speed of our ONNX files and of PyTorch over timm's model in ONNX Runtime, with 95 % intervals.",
        "A CPU's speeds; no GPU was there.", cpu_text, cpu_plot,
    ),
    "gpu": ("scripts/gpu", "", "", lambda data: gpu_text(data), None),
    "cpu-avx2": (
        "cnx-deploy bench export/{atto,nano,tiny,base}{,-openvino}-224-fp32.onnx --batch 1 --batch 8 "
        "--backend onnxruntime --backend openvino "
        "--compare timm-whole,timm-openvino-whole,compile,timm,timm-openvino --no-spin --json",
        "Speed of our two forms in ONNX Runtime and OpenVINO over timm's model in ONNX Runtime, with 95 % intervals.",
        "A CPU's speeds; no GPU was there.", runtimes_text, partial(cpu_plot, baseline=WHOLE),
    ),
    "cpu-avx512": (
        "cnx-deploy bench export/{NAME,NAME-openvino}-224-fp32.onnx export/NAME-openvino-224-bf16.onnx --batch 1 "
        "--batch 8 --backend onnxruntime --backend openvino --backend openvino-bf16 "
        "--compare timm-whole,timm-openvino-whole,compile,timm,timm-openvino --no-spin --duration 2 --json",
        "Speed of our two forms in ONNX Runtime and OpenVINO over timm's model in ONNX Runtime, with 95 % intervals.",
        "A CPU's speeds; no GPU was there.", runtimes_text, partial(cpu_plot, baseline=WHOLE),
    ),
    "servers": ("scripts/compare_servers.py", "", "A CPU's speeds.", servers_text, None),
    "cost": (
        "scripts/measure_cost.py",
        "Seconds and peak memory of export and build over the number of parameters, on logarithmic axes.",
        "Made without a GPU.", cost_text, cost_plot,
    ),
}  # fmt: skip
"""By data file: the command where the file does not keep its own, the plot in words, what was not run, table and plot,
or no plot."""

if __name__ == "__main__":
    sys.exit(main())
