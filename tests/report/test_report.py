"""Index and table from manifests: the repository's own records."""

import csv
import io
import shutil
from pathlib import Path

import pytest

from cnx_deploy.core.artifacts import read_artifact
from cnx_deploy.core.errors import InputError, RecordsError
from cnx_deploy.core.variants import VARIANTS
from cnx_deploy.report.records import BEGIN, END, check_records, index_csv, model_table, write_records

ROOT = Path(__file__).parents[2]
ONNX = read_artifact(ROOT / "export" / "atto-224-fp16.json")
ENGINE = read_artifact(ROOT / "engines" / "atto-224-fp16-rtx-sm89.json")


def test_the_index_has_a_line_an_artifact_with_its_hash() -> None:
    rows = list(csv.DictReader(io.StringIO(index_csv([ENGINE, ONNX]))))
    assert [row["stem"] for row in rows] == ["atto-224-fp16", "atto-224-fp16-rtx-sm89"]
    assert [row["sha256"] for row in rows] == [ONNX.sha256, ENGINE.sha256]
    assert [row["kernels"] for row in rows] == ["", str(ENGINE.manifest.facts.compiled.kernels)]


def test_the_table_has_the_variants_own_figures_and_a_dash_where_nothing_is_recorded() -> None:
    lines = model_table([ONNX], [ENGINE]).splitlines()[2:]
    assert len(lines) == len(VARIANTS)
    atto, *others = lines
    compiled, error = ENGINE.manifest.facts.compiled, ONNX.manifest.facts.worst_parity.differences.relative_l2_max
    assert [cell.strip() for cell in atto.split("|")[4:-1]] == [
        "–", f"{ONNX.size_bytes / 1e6:.1f} MB", "–", f"{error:.2e}", f"{ENGINE.size_bytes / 1e6:.1f} MB",
        str(compiled.kernels), f"{compiled.megabytes_per_image:.1f}",
    ]  # fmt: skip
    assert all(line.count("–") == 7 for line in others)


def test_a_second_write_changes_nothing_and_the_check_names_what_is_stale(tmp_path: Path) -> None:
    export, readme = tmp_path / "export", tmp_path / "README.md"
    export.mkdir()
    shutil.copy(ROOT / "export" / "atto-224-fp16.json", export)
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(InputError, match="no place for the table"):
        write_records(export, tmp_path / "none", readme)
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    assert write_records(export, tmp_path / "none", readme) == [export / "index.csv", readme]
    assert write_records(export, tmp_path / "none", readme) == []
    check_records(export, tmp_path / "none", readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    (export / "index.csv").write_text("stale\n", encoding="utf-8")
    readme.write_text(text.replace("3,708,400", "3,708,401"), encoding="utf-8")
    with pytest.raises(RecordsError, match=r"index\.csv.*README\.md"):
        check_records(export, tmp_path / "none", readme)
