"""Fill the tables of docs/performance.md and draw docs/plots from the records in docs/data.

usage: plot_performance.py [--check] [--docs-dir docs]

Needs matplotlib (the extra `report`). The same data and the same matplotlib give the same bytes. `--check` writes
nothing and exits with 3 when the page or a plot is not what the data say; if only plots are named, another matplotlib
may have drawn them. A section whose data file is missing says so and has no plot.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cnx_deploy.bench.bounds import work_of
from cnx_deploy.core.files import whole_file
from cnx_deploy.core.plotting import BLUE, GREEN, GREY, GRID, ORANGE, PURPLE, SKY, svg_bytes
from cnx_deploy.core.variants import VARIANTS

Document = dict[str, Any]
"""A file of docs/data, or one of its rows."""
OURS, PEERS = "cnx-deploy", ("timm", "transformers")
BASELINE, WHOLE = "timm.onnx fp32", "timm.onnx whole batch fp32"
"""timm's graph, run as our files are; and the same file as ONNX Runtime runs it by itself."""
NO_GPU = "No GPU: kernels and bytes are the compiler's; no latency was measured."
TOOLS = ("cnx-deploy", "tensorrt-rtx", "onnxruntime-gpu", "onnxruntime", "torch", "timm", "transformers")
GROWTHS = {
    "export_seconds": "export time", "build_seconds": "build time",
    "export_peak_mib": "export memory", "build_peak_mib": "build memory",
}  # fmt: skip
COST_COLUMNS = (
    ("export_seconds", "export, s", ",.1f"), ("export_peak_mib", "peak MiB", ",.0f"),
    ("build_seconds", "build, s", ",.1f"), ("build_peak_mib", "peak MiB", ",.0f"),
    ("onnx_megabytes", "FP16 ONNX, MB", ",.1f"), ("engine_megabytes", "sm89 engine, MB", ",.1f"),
)  # fmt: skip
LOOKS = tuple(zip((BLUE, SKY, ORANGE, GREEN, PURPLE, GREY), "oDs^vX", strict=True))
"""Colour and marker of the first, second, … series of a plot."""
GRAPH_LOOKS = {OURS: (BLUE, "o"), "timm": (ORANGE, "s"), "transformers": (GREEN, "^"), "fused floor": (GREY, "|")}
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
        if path.is_file():
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


def cpu_plot(data: Document, source: str) -> Any:
    """Times as fast as timm's model with the interval: a panel a batch; hollow where a row is not OK."""

    def place(row: Document) -> tuple[str, str]:
        network = data["networks"][row["network"]]
        variant, size = network["variant"], network["image_size"]
        words = row["name"].removesuffix(".onnx").split("-")  # atto-224-fp16.onnx is of the kind "ours fp16"
        own = " ".join(["ours", *(word for word in words if word not in (variant, str(size)))])
        kind = own if row["name"].endswith(".onnx") else row["name"]
        return variant if size == 224 else f"{variant}\n{size} px", kind

    rows = sorted((row for row in data["rows"] if ratio_to(row, BASELINE)), key=lambda row: place(row)[1][:4] != "ours")
    networks, batches = list(dict.fromkeys(place(row)[0] for row in rows)), sorted({row["batch"] for row in rows})
    looks = dict(zip(dict.fromkeys(place(row)[1] for row in rows), LOOKS, strict=False))
    drawn = f"times as fast as {BASELINE}, with its 95 % interval; hollow: UNSTABLE or INVALID"
    height = 0.16 * len(networks) * (len(looks) + 1)
    figure, (panels,) = canvas((1, len(batches)), height, "Speed on a CPU", drawn, source)
    for row in rows:
        (network, kind), ratio = place(row), ratio_to(row, BASELINE) or {}
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


def canvas(shape: tuple[int, int], panel_inches: float, title: str, drawn: str, source: str) -> tuple[Any, Any]:
    """Return a figure of rows × columns of panels and the axes of them.

    Above stand the title and what is drawn, below where the data come from. It is 5.6 inches wide to read on a phone.
    """
    from matplotlib.figure import Figure

    (rows, columns), lines = shape, textwrap.wrap(source, 105, break_on_hyphens=False)
    foot = FOOT + 0.13 * len(lines)
    height = HEAD + rows * panel_inches + (rows - 1) * GAP + foot
    figure = Figure(figsize=(5.6, height))
    axes = figure.subplots(rows, columns, sharex=True, sharey="row", squeeze=False)
    figure.subplots_adjust(0.14, foot / height, 0.97, 1 - HEAD / height, 0.1, GAP / panel_inches)
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


SECTIONS: dict[str, tuple[str, str, str, Callable[[Document], str], Callable[[Document, str], Any] | None]] = {
    "traffic": (
        "scripts/compare_traffic.py",
        "Bytes an image of our FP16 graph, of the peers' graphs and of the fused floor, over the better peer's.",
        NO_GPU, traffic_text, traffic_plot,
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
