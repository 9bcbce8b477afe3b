"""From manifests to what people read: an index of each folder and the README's table.

Generated, never written by hand; `check_records` says when they are out of date.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnx_deploy.core.artifacts import find_artifacts
from cnx_deploy.core.errors import InputError, RecordsError
from cnx_deploy.core.files import write_text
from cnx_deploy.core.image_size import size_text
from cnx_deploy.core.manifest import Artifact, Compiled, EngineFacts, EngineManifest, OnnxFacts
from cnx_deploy.core.strict_json import MAX_DOCUMENT_BYTES
from cnx_deploy.core.variants import VARIANTS

__all__ = ["check_records", "has_place", "index_csv", "model_table", "write_records"]

BEGIN, END = "<!-- models: begin (cnx-deploy report) -->", "<!-- models: end -->"


def index_csv(artifacts: Sequence[Artifact]) -> str:
    """One line an artifact, by name; there is at least one."""
    rows = [_index_row(artifact) for artifact in sorted(artifacts, key=lambda entry: entry.manifest.stem)]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def model_table(onnx: Sequence[Artifact], engines: Sequence[Artifact]) -> str:
    """The README's table: one line a variant recorded at 224 px under its own name; "–" where nothing is recorded."""
    header = (
        "| variant | parameters | GMAC | FP32 ONNX | FP16 ONNX | rel. L2 FP32 | rel. L2 FP16 | engine sm89 | kernels "
        "| MB an image |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    )
    recorded = {artifact.manifest.stem: artifact for artifact in (*onnx, *engines)}
    rows = []
    for variant in VARIANTS.values():
        stems = (f"{variant.name}-224-fp32", f"{variant.name}-224-fp16", f"{variant.name}-224-fp16-rtx-sm89")
        single, half, engine = (recorded.get(stem) for stem in stems)
        sizes = [
            f"{sum(file.size_bytes for file in artifact.manifest.files) / 1e6:.1f} MB" if artifact else ""
            for artifact in (single, half, engine)
        ]
        compiled = _compiled(engine)
        cells = (
            variant.name,
            f"{variant.parameter_count:,}",
            f"{variant.mac_count() / 1e9:.2f}",
            *sizes[:2],
            _relative_l2(single),
            _relative_l2(half),
            sizes[2],
            str(compiled.kernels) if compiled else "",
            f"{compiled.megabytes_per_image:.1f}" if compiled else "",
        )
        rows.append(f"| {' | '.join(cell or '–' for cell in cells)} |")
    return "\n".join((*header, *rows)) + "\n"


def write_records(export_dir: Path, engines_dir: Path, readme: Path | None) -> list[Path]:
    """Write what is out of date; returns the files that changed."""
    changed = []
    for path, text in _wanted(export_dir, engines_dir, readme):
        if not _holds(path, text):
            write_text(path, text)
            changed.append(path)
    return changed


def check_records(export_dir: Path, engines_dir: Path, readme: Path | None) -> None:
    """Raise RecordsError when an index or the README's table is not what the manifests say."""
    stale = [str(path) for path, text in _wanted(export_dir, engines_dir, readme) if not _holds(path, text)]
    if stale:
        raise RecordsError(f"Out of date against the manifests: {', '.join(stale)}. Run `cnx-deploy report`.")


def has_place(readme: Path) -> bool:
    """Whether a file has the line that the table stands below; False for what is no text."""
    try:
        return readme.is_file() and BEGIN in _text(readme)
    except InputError:
        return False


def _holds(path: Path, text: str) -> bool:
    content = text.encode("utf-8", "backslashreplace")
    return path.is_file() and path.read_bytes().replace(b"\r\n", b"\n") == content


def _text(path: Path) -> str:
    """InputError for what is no text in UTF-8, or has more than a record would."""
    if (size := path.stat().st_size) > MAX_DOCUMENT_BYTES:
        raise InputError(
            f"{path} has {size:,} bytes: expected a text of at most {MAX_DOCUMENT_BYTES:,}. Check --readme."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8 ({error}). Save it in UTF-8.") from error


def _wanted(export_dir: Path, engines_dir: Path, readme: Path | None) -> list[tuple[Path, str]]:
    onnx, engines = find_artifacts(export_dir, "onnx"), find_artifacts(engines_dir, "engine")
    if not onnx and not engines:
        raise InputError(f"No manifest in {export_dir} or {engines_dir}; run `cnx-deploy export --variant atto` first.")
    pairs = ((export_dir, onnx), (engines_dir, engines))
    wanted = [(folder / "index.csv", index_csv(artifacts)) for folder, artifacts in pairs if artifacts]
    if readme is not None:
        wanted.append((readme, _with_table(readme, model_table(onnx, engines))))
    return wanted


def _with_table(readme: Path, table: str) -> str:
    text = _text(readme)
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{readme} has no place for the table: put a line {BEGIN!r} and a line {END!r} into it.")
    return f"{before}{BEGIN}\n{table}{END}{after}"


def _index_row(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    facts, compiled = manifest.facts, _compiled(artifact)
    return {
        "stem": manifest.stem,
        "kind": manifest.kind,
        "variant": manifest.model.variant,
        "image_size": size_text(manifest.model.image_size),
        "precision": manifest.precision.name,
        "input": manifest.deploy.input_kind,
        "weights": manifest.model.weights.source,
        "target": manifest.request.target if isinstance(manifest, EngineManifest) else "",
        "runtime_version": getattr(facts, "runtime_version", ""),
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "source": manifest.source_name,
        "relative_l2": _relative_l2(artifact),
        "half_share": facts.half_share_of_products if isinstance(facts, EngineFacts) else facts.half_share,
        "kernels": compiled.kernels if compiled else "",
        "megabytes_per_image": compiled.megabytes_per_image if compiled else "",
        "measured_at_batch": compiled.batch if compiled else "",
    }


def _relative_l2(artifact: Artifact | None) -> str:
    facts = artifact.manifest.facts if artifact else None
    worst = facts.worst_parity if isinstance(facts, OnnxFacts) else None
    return f"{worst.differences.relative_l2_max:.2e}" if worst else ""


def _compiled(artifact: Artifact | None) -> Compiled | None:
    facts = artifact.manifest.facts if artifact else None
    return facts.compiled if isinstance(facts, EngineFacts) else None
