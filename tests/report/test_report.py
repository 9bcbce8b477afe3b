"""Index and table from manifests."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from cnx_deploy.core.errors import InputError, RecordsError
from cnx_deploy.core.manifest import Artifact
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.report.records import BEGIN, END, check_records, index_csv, model_table, write_records


def test_the_index_has_a_line_an_artifact_with_its_hash(tiny_onnx_fp16: Artifact, tiny_engine: Artifact) -> None:
    rows = list(csv.DictReader(io.StringIO(index_csv([tiny_engine, tiny_onnx_fp16]))))
    assert [row["stem"] for row in rows] == ["tiny-test-32-fp16", "tiny-test-32-fp16-rtx-sm89"]
    assert [row["sha256"] for row in rows] == [tiny_onnx_fp16.sha256, tiny_engine.sha256]
    assert rows[1]["kernels"] == str(tiny_engine.manifest.facts.compiled.kernels)


def test_the_table_shows_a_dash_where_nothing_is_recorded() -> None:
    lines = model_table([], []).splitlines()[2:]
    assert len(lines) == len(VARIANTS)
    assert all(line.count("–") == 7 for line in lines)


def renamed(artifact: Artifact, stem: str) -> Artifact:
    manifest = artifact.manifest
    files = tuple(replace(file, name=f"{stem}{Path(file.name).suffix}") for file in manifest.files)
    return replace(artifact, manifest=replace(manifest, stem=stem, files=files))


def test_the_table_takes_figures_from_the_variants_own_records(tiny_onnx_fp16: Artifact, tiny_engine: Artifact) -> None:
    onnx, engine = renamed(tiny_onnx_fp16, "atto-224-fp16"), renamed(tiny_engine, "atto-224-fp16-rtx-sm89")
    atto = next(line for line in model_table([onnx], [engine]).splitlines() if line.startswith("| atto"))
    assert f"| {tiny_engine.manifest.facts.compiled.kernels} |" in atto


def test_a_second_write_changes_nothing_and_the_check_passes(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    export = tmp_path / "export"
    export.mkdir()
    (export / f"{tiny_onnx_fp16.manifest.stem}.json").write_text(tiny_onnx_fp16.manifest.to_json(), encoding="utf-8")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    assert write_records(export, tmp_path / "none", readme) == [export / "index.csv", readme]
    assert write_records(export, tmp_path / "none", readme) == []
    check_records(export, tmp_path / "none", readme)
    assert readme.read_text(encoding="utf-8").startswith("before\n")
    assert readme.read_text(encoding="utf-8").endswith("after\n")
    (export / "index.csv").write_text("stale\n", encoding="utf-8")
    with pytest.raises(RecordsError, match=r"index\.csv"):
        check_records(export, tmp_path / "none", readme)
    write_records(export, tmp_path / "none", readme)
    readme.write_text(readme.read_text(encoding="utf-8").replace("3,708,400", "3,708,401"), encoding="utf-8")
    with pytest.raises(RecordsError, match=r"README\.md"):
        check_records(export, tmp_path / "none", readme)


def test_a_readme_without_a_place_for_the_table_is_refused(tiny_onnx_fp16: Artifact, tmp_path: Path) -> None:
    (tmp_path / f"{tiny_onnx_fp16.manifest.stem}.json").write_text(tiny_onnx_fp16.manifest.to_json(), encoding="utf-8")
    (tmp_path / "README.md").write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="no place for the table"):
        write_records(tmp_path, tmp_path / "none", tmp_path / "README.md")
