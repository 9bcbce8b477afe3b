"""What stands between the markers of docs/performance.md: a table for each data file, and what was not run."""

from collections.abc import Iterable, Iterator, Sequence

from cnx_deploy.roofline import work_of
from performance_page.data import (
    BASELINE,
    GROWTHS,
    OURS,
    PEERS,
    Comparison,
    Document,
    Speed,
    comparisons,
    growth,
    speeds,
)  # fmt: skip

__all__ = ["NOT_RECORDED", "NO_GPU", "cost_text", "cpu_text", "targets_text", "traffic_text"]

NOT_RECORDED = "Not recorded yet."
NOT_RUN = "not run"
NO_GPU = "No GPU: kernels and bytes are the compiler's; no latency was measured."
VERSIONS = ("cnx-deploy", "tensorrt-rtx", "onnxruntime-gpu", "onnxruntime", "torch", "timm", "transformers")


def traffic_text(document: Document) -> str:
    """Kernels and megabytes an image of each graph, by variant."""
    header = ("variant", "px", "target", "batch", *(f"{graph}, kernels | MB" for graph in (*PEERS, OURS)))
    header = tuple(cell for title in header for cell in title.split(" | "))
    rows = [
        (
            *_condition(found), *(cell for graph in (*PEERS, OURS) for cell in _kernels_and_bytes(found, graph)),
            _number(found.ratio, ".3f"), f"{found.floor:.1f}",
        )
        for found in comparisons(document)
    ]  # fmt: skip
    return _paragraphs(
        _table((*header, "ratio to the better peer", "fused floor, MB"), rows, text_columns=1),
        f"{NO_GPU} {_versions(document['tools'])}",
    )


def targets_text(document: Document) -> str:
    """Ours, the better peer's and their ratio, a line a variant, size and target and a column a batch."""
    found = comparisons(document)
    batches = sorted({comparison.batch for comparison in found})
    lines: dict[tuple[str, ...], dict[int, Comparison]] = {}
    for comparison in found:
        lines.setdefault(_condition(comparison)[:3], {})[comparison.batch] = comparison
    rows = [(*line, *(_division(by_batch.get(batch)) for batch in batches)) for line, by_batch in lines.items()]
    header = ("variant", "px", "target", *(f"batch {batch}" for batch in batches))
    return _paragraphs(
        _table(header, rows, text_columns=1),
        f"MB an image: ours ÷ the better peer's = ratio. {NO_GPU} {_versions(document['tools'])}",
    )


def cpu_text(document: Document) -> str:
    """Images a second and the ratio to timm's model, a line a row of the benchmark."""
    found = speeds(document)
    rows = [
        (speed.variant, str(speed.image_size), str(speed.batch), speed.name, f"{speed.images_per_second:.1f}",
         _ratio_cell(speed), _status_cell(speed))
        for speed in found
    ]  # fmt: skip
    header = ("variant", "px", "batch", "what", "images/s", f"× {BASELINE} (95 %)", "status")
    missing = [f"{row['name']} ({row['reason']})" for row in document["not_run"]]
    return _paragraphs(
        _table(header, rows, text_columns=1),
        _machine(document),
        f"Not run: {', '.join(missing)}." if missing else "",
        f"Doubts at the start: {'; '.join(document['warnings'])}." if document["warnings"] else "",
        _shared_work(found),
    )


def cost_text(document: Document) -> str:
    """Seconds, peak memory and file sizes of export and build by variant, and how they grow."""
    figures = {
        "export_seconds": "export, s", "export_peak_mib": "peak MiB", "build_seconds": "build, s",
        "build_peak_mib": "peak MiB", "onnx_megabytes": "ONNX, MB", "engine_megabytes": "engines, MB",
    }  # fmt: skip
    rows = [
        (row["variant"], f"{row['parameters']:,}", *(_number(row[column], ",.1f", NOT_RUN) for column in figures))
        for row in document["rows"]
    ]
    grown = [f"{name} × {10**slope:.1f}" for name, slope in _growths(document["rows"])]
    return _paragraphs(
        _table(("variant", "parameters", *figures.values()), rows, text_columns=1),
        f"Ten times the parameters (a straight line through the logarithms): {', '.join(grown)}." if grown else "",
        f"Machine: {document['machine']}. `cnx-deploy --help` takes {document['help_seconds']:.2f} s. {NO_GPU}",
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """A Markdown table; the first `text_columns` are left-aligned, the others right-aligned."""
    rule = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def _paragraphs(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _condition(found: Comparison) -> tuple[str, str, str, str]:
    return found.variant, str(found.image_size), found.target, str(found.batch)


def _kernels_and_bytes(found: Comparison, graph: str) -> tuple[str, str]:
    if graph not in found.graphs:
        return NOT_RUN, NOT_RUN
    return str(found.graphs[graph]["kernels"]), f"{found.megabytes(graph):.1f}"


def _division(found: Comparison | None) -> str:
    if found is None or found.ratio is None:
        return NOT_RUN
    return f"{found.megabytes(OURS):.1f} ÷ {found.best_peer:.1f} = {found.ratio:.3f}"


def _number(value: float | None, form: str, missing: str = "–") -> str:
    return missing if value is None else f"{value:{form}}"


def _versions(tools: Document) -> str:
    """The versions that shape the figures, of those a data file keeps."""
    return f"Versions: {', '.join(f'{name} {tools[name]}' for name in VERSIONS if name in tools)}."


def _ratio_cell(speed: Speed) -> str:
    if speed.ratio is None:
        return "baseline" if speed.name == BASELINE else "–"
    return f"{speed.ratio.ratio:.2f} ({speed.ratio.low:.2f}–{speed.ratio.high:.2f})"


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
    shares = ", ".join(f"{work.variant} {work.gemm_macs / work.macs:.1%}" for work in works)
    return f"Multiply-accumulates in matrix products, counted from the architecture: {shares}."


def _growths(rows: Sequence[Document]) -> Iterator[tuple[str, float]]:
    for column, name in GROWTHS.items():
        slope = growth(rows, column)
        if slope is not None:
            yield name, slope
