"""The recorded rescues: the page's table is what the record says, and the record holds what the page promises."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = json.loads((ROOT / "docs" / "data" / "rescue.json").read_text(encoding="utf-8"))["rows"]
PAGE = (ROOT / "docs" / "rescue.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["graph"])
def test_the_page_has_every_recorded_figure(row) -> None:
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {row['graph']} |")]
    for made in row["compiled"].values():
        assert f"{made['kernels']}, {made['megabytes_per_image']:.1f}" in line
    assert f"{row['fp16_relative_l2']:.1e}" in line


def test_every_rescue_of_the_record_is_proven_and_its_islands_cost_what_the_page_says() -> None:
    for row in ROWS:
        naive, rescued = (row["compiled"][name] for name in ("naive", "rescued"))
        assert row["fp32_relative_l2"] < 1e-6
        assert row["fp16_relative_l2"] < 1.5e-2
        assert (row["not_recognised"], row["fp16_not_run"]) == ([], "")
        assert rescued["kernels"] - naive["kernels"] <= 3
        assert rescued["megabytes_per_image"] / naive["megabytes_per_image"] < 1.003
    assert any("NaN" in row["naive"] for row in ROWS)
