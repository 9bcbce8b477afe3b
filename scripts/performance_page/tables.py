"""What stands between the markers of docs/performance.md: a table for each data file, and what was not run."""

from collections.abc import Iterable, Iterator, Sequence

from cnx_deploy.bench.roofline import work_of
from cnx_deploy.core.variants import VARIANTS
from performance_page.data import (
    BASELINE,
    GROWTHS,
    OURS,
    PEERS,
    WHOLE_BATCHES,
    Comparison,
    Document,
    Speed,
    comparisons,
    growth,
    shared_condition,
    speeds,
)  # fmt: skip

__all__ = ["NOT_RECORDED", "NO_GPU", "cost_text", "cpu_text", "targets_text", "traffic_text"]

NOT_RECORDED = "Not recorded yet."
NOT_RUN = "not run"
NO_GPU = "No GPU: kernels and bytes are the compiler's; no latency was measured."
VERSIONS = ("cnx-deploy", "tensorrt-rtx", "onnxruntime-gpu", "onnxruntime", "torch", "timm", "transformers")


def traffic_text(document: Document) -> str:
    """Kernels and megabytes an image of each graph, by variant."""
    found = comparisons(document)
    titles = [title for graph in (*PEERS, OURS) for title in (f"{graph}, kernels", "MB")]
    rows = [
        (
            each.variant,
            *(cell for graph in (*PEERS, OURS) for cell in _kernels_and_bytes(each, graph)),
            _number(each.ratio, ".3f"),
            f"{each.floor:.1f}",
        )
        for each in found
    ]
    return _paragraphs(
        _table(("variant", *titles, "ours ÷ the better peer's", "fused floor, MB"), rows),
        _left_out(each.variant for each in found),
        f"{shared_condition(found)}, FP16; MB an image. {NO_GPU} {_versions(document['tools'])}",
    )


def targets_text(document: Document) -> str:
    """Ours, the better peer's and their ratio, a line a variant, size and target and a column a batch."""
    found = comparisons(document)
    batches = sorted({comparison.batch for comparison in found})
    lines: dict[tuple[str, ...], dict[int, Comparison]] = {}
    for comparison in found:
        lines.setdefault((comparison.variant, str(comparison.image_size), comparison.target), {})[comparison.batch] = (
            comparison
        )
    rows = [(*line, *(_division(by_batch.get(batch)) for batch in batches)) for line, by_batch in lines.items()]
    header = ("variant", "px", "target", *(f"batch {batch}" for batch in batches))
    return _paragraphs(
        _table(header, rows),
        f"{_where_ours_moves_more(found)} {_left_out(comparison.variant for comparison in found)}",
        f"MB an image: ours ÷ the better peer's = ratio. {NO_GPU} {_versions(document['tools'])}",
    )


def cpu_text(document: Document) -> str:
    """Images a second and the ratio to timm's model, a line a row of the benchmark."""
    found = speeds(document)
    rows = [
        (speed.variant, str(speed.image_size), str(speed.batch), speed.name, f"{speed.images_per_second:.1f}",
         _ratio_cell(speed, BASELINE), _ratio_cell(speed, WHOLE_BATCHES), _status_cell(speed))
        for speed in found
    ]  # fmt: skip
    header = ("variant", "px", "batch", "what", "images/s", f"× {BASELINE} (95 %)", f"× {WHOLE_BATCHES}", "status")
    missing = [f"{row['name']} ({row['reason']})" for row in document["not_run"]]
    return _paragraphs(
        _table(header, rows),
        _machine(document),
        f"Not run: {', '.join(missing)}." if missing else "",
        f"Doubts at the start: {'; '.join(document['warnings'])}." if document["warnings"] else "",
        _shared_work(found),
        _left_out(speed.variant for speed in found),
    )


def cost_text(document: Document) -> str:
    """Seconds, peak memory and file sizes of export and build by variant, and how they grow."""
    figures = (
        ("export_seconds", "export, s", ",.1f"), ("export_peak_mib", "peak MiB", ",.0f"),
        ("build_seconds", "build, s", ",.1f"), ("build_peak_mib", "peak MiB", ",.0f"),
        ("onnx_megabytes", "FP16 ONNX, MB", ",.1f"), ("engine_megabytes", "sm89 engine, MB", ",.1f"),
    )  # fmt: skip
    rows = [
        (row["variant"], f"{row['parameters']:,}", *(_number(row[name], form, NOT_RUN) for name, _, form in figures))
        for row in document["rows"]
    ]
    grown = [f"{name} × {10**slope:.1f}" for name, slope in _growths(document["rows"])]
    return _paragraphs(
        _table(("variant", "parameters", *(title for _, title, _ in figures)), rows),
        f"For ten times the parameters: {', '.join(grown)}." if grown else "",
        _left_out(row["variant"] for row in document["rows"]),
        f"Engines for {', '.join(document['targets'])}. Machine: {document['machine']}, no GPU. "
        f"`cnx-deploy --help` takes {document['help_seconds']:.2f} s. {_versions(document['tools'])}",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column left-aligned and the others right-aligned."""
    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _kernels_and_bytes(found: Comparison, graph: str) -> tuple[str, str]:
    if graph not in found.graphs:
        return NOT_RUN, NOT_RUN
    return str(found.graphs[graph]["kernels"]), f"{found.megabytes(graph):.1f}"


def _division(found: Comparison | None) -> str:
    if found is None or found.ratio is None:
        return NOT_RUN
    return f"{found.megabytes(OURS):.1f} ÷ {found.best_peer:.1f} = {found.ratio:.3f}"


def _left_out(recorded: Iterable[str]) -> str:
    """The variants that a data file does not have."""
    found = set(recorded)
    missing = [variant for variant in VARIANTS if variant not in found]
    return f"Not recorded: {', '.join(missing)}." if missing else ""


def _where_ours_moves_more(found: Sequence[Comparison]) -> str:
    """The conditions under which the better peer moves fewer bytes, so that no reader has to look for them."""
    compared = [(each, each.ratio) for each in found if each.ratio is not None]
    worse = [
        f"{each.variant} {each.image_size} px {each.target} batch {each.batch} ({ratio:.3f})"
        for each, ratio in compared
        if ratio > 1.0
    ]
    return f"Ours moves more in {len(worse)} of {len(compared)}{': ' if worse else ''}{', '.join(worse)}."


def _number(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else f"{value:{form}}"


def _versions(tools: Document) -> str:
    """The versions that shape the figures, of those a data file keeps."""
    return f"Versions: {', '.join(f'{name} {tools[name]}' for name in VERSIONS if name in tools)}."


def _ratio_cell(speed: Speed, baseline: str) -> str:
    ratio = speed.ratio if baseline == BASELINE else speed.whole_ratio
    if ratio is None:
        return "baseline" if speed.name == baseline else "–"
    return f"{ratio.ratio:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _status_cell(speed: Speed) -> str:
    return speed.status if speed.status == "OK" else f"**{speed.status}**"


def _machine(document: Document) -> str:
    machine = document["environment"]
    commit = f", commit {machine['commit']}" if machine["commit"] else ""
    return (
        f"Machine: {machine['cpu']} ({' '.join(machine['isa'])}), {machine['processors']} processors, "
        f"{machine['threads']} threads; {machine['duration_seconds']:g} s a row{commit}. {_versions(machine['tools'])}"
    )


def _shared_work(found: Sequence[Speed]) -> str:
    """Which share of the work no graph can leave out: counted from the architecture, not measured."""
    sizes = dict.fromkeys((speed.variant, speed.image_size) for speed in found)
    works = [work_of(variant, size, "fp32") for variant, size in sizes]
    shares = ", ".join(f"{work.variant} {100 * work.gemm_macs / work.macs:.1f} %" for work in works)
    return f"Multiply-accumulates in matrix products, counted from the architecture: {shares}."


def _growths(rows: Sequence[Document]) -> Iterator[tuple[str, float]]:
    for column, name in GROWTHS.items():
        slope = growth(rows, column)
        if slope is not None:
            yield name, slope
