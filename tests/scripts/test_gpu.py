"""The run for a machine with an NVIDIA GPU, walked through on a CPU; its gates on rows with known figures."""

import argparse
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cnx_deploy.core.strict_json import strict_json
from cnx_deploy.core.variants import ALL_VARIANTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("gpu")


def options(**words: Any) -> argparse.Namespace:
    usual = {"variants": ["tiny-test"], "name": "tiny-test", "batch": [2], "image_size": 32, "factors": (1,)}
    return argparse.Namespace(**usual | words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's walk; a GPU runs the script itself")
def test_each_kernel_is_judged_at_each_stage_against_float64(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    script.kernels(options(), lambda key, row: rows.append(row))
    assert {(row["stage"], row["hidden"]) for row in rows} == {
        (stage, hidden) for stage in (1, 2, 3, 4) for hidden in ("stored", "recomputed")
    }
    assert all(row["passed"] for row in rows)
    assert all("gb_s" not in row for row in rows), "no time without a GPU"
    response_gain = script.launch.response_gain
    monkeypatch.setattr(script.launch, "response_gain", lambda *words, **more: response_gain(*words, **more) * 1.01)
    wrong: list[dict[str, Any]] = []
    script.kernels(options(), lambda key, row: wrong.append(row))
    assert not any(row["passed"] for row in wrong if row["kernel"].endswith("response_gain"))


def latency_row(variant: str, batch: int, *ratios: float) -> dict[str, Any]:
    names = ("torch eager .half() fp16", "torch.compile .half() fp16")
    return {
        "variant": variant, "batch": batch, "row": f"{variant}-224-fp16.onnx [fused]",
        "ratios": dict(zip(names, ratios, strict=True)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "limit", "passed"),
    [
        (latency_row("atto", 64, 2.0, 1.31), 1.3, True),
        (latency_row("atto", 64, 2.0, 1.29), 1.3, False),
        (latency_row("atto", 8, 2.0, 1.01), 1.0, True),
        (latency_row("base", 64, 0.99, 1.5), 1.0, False),
    ],
)
def test_own_kernels_are_held_against_the_faster_peer(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any], limit: float, passed: bool
) -> None:
    record = {"latency": [row, {**row, "row": "x.onnx [onnxruntime]"}], "kernels": []}
    assert script.gates(record) == [], "without a GPU there is nothing to judge"
    monkeypatch.setattr(script, "HAS_GPU", True)
    (gate,) = script.gates(record)
    assert (gate["limit"], gate["passed"]) == (limit, passed)


def test_the_large_kernels_of_the_first_stages_are_held_against_a_copy(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "HAS_GPU", True)
    row = {"variant": "atto", "stage": 2, "kernel": "norm_linear_gelu", "of_copy": 0.59}
    rows = [row, {**row, "of_copy": 0.61}, {**row, "stage": 3}, {**row, "kernel": "response_gain"}]
    assert [gate["passed"] for gate in script.gates({"latency": [], "kernels": rows})] == [False, True]


def test_what_matters_most_comes_first(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert next(script.plan(options(folder=tmp_path))) == ("prepare", "tiny-test"), "no file is there"
    monkeypatch.setattr(script, "missing", lambda options, name: iter(()))
    parts = list(script.plan(options(variants=["atto", "nano", "tiny"])))
    assert parts[:4] == [("parity", "atto"), ("hot", "atto"), ("kernels", "atto"), ("latency", "atto")]
    assert {name for part, name in parts if part == "latency"} == {"atto", "nano", "tiny"}


def test_a_part_that_hangs_or_fails_is_named_and_keeps_what_it_had(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys, time, pathlib\n"
        "words = sys.argv\n"
        "pathlib.Path(words[words.index('--answer') + 1]).write_text('{\"hot\": [1]}')\n"
        "sys.exit(7) if words[words.index('--part') + 1] == 'parity' else time.sleep(60)\n"
    )
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(code)
    monkeypatch.setattr(script, "__file__", str(stand_in))
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    asked = options(folder=tmp_path)
    failed, hung = (script.in_a_process(asked, part, "atto", 5.0) for part in ("parity", "hot"))
    assert failed == {
        "hot": [1],
        "not_run": [{"part": "parity", "name": "atto", "reason": failed["not_run"][0]["reason"]}],
    }
    assert "it ended with 7" in failed["not_run"][0]["reason"]
    assert "it was ended after 5 s" in hung["not_run"][0]["reason"]


def test_a_part_that_fails_says_why_and_keeps_its_rows(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(options: argparse.Namespace, add: Any) -> None:
        add("kernels", {"relative_l2": float("nan"), "passed": False})
        raise RuntimeError("illegal memory access")

    monkeypatch.setitem(script.PARTS, "kernels", fails)
    answer = tmp_path / "answer.json"
    assert script.run_part(options(part="kernels", answer=str(answer))) == 0
    rows = strict_json(answer.read_bytes())
    assert rows["kernels"] == [{"relative_l2": None, "passed": False}], "NaN is no JSON"
    assert "illegal memory access" in rows["not_run"][0]["reason"]


@pytest.mark.parametrize(
    ("budget", "answer", "code"),
    [
        (0, {}, 0),
        (100, {"hot": [{"graph": "cnx-deploy", "right": False}]}, 3),
        (100, {"hot": [{"graph": "timm", "right": False}]}, 0),
        (100, {"parity": [{"passed": False}]}, 3),
    ],
)
def test_the_record_on_the_disk_has_every_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int, answer: dict[str, Any], code: int
) -> None:
    words = ["gpu.py", "--folder", str(tmp_path), "--variants", "atto", "--budget", str(budget)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(script, "in_a_process", lambda *words: answer)
    assert script.main() == code
    record = json.loads((tmp_path / "record.json").read_text())
    left_out = [row["part"] for row in record["not_run"]]
    assert left_out == (["prepare", "parity", "hot", "kernels", "latency"] if budget == 0 else [])
    assert record["gates"] == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_run_on_a_cpu(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "scripts" / "gpu.py"),
        "--tiny",
        "--folder",
        str(tmp_path),
        "--budget",
        "1500",
    ]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert {row["candidate"] for row in record["parity"]} == {"onnxruntime fp16", "fused fp16"}
    assert {(row["graph"], row["times_limit"]) for row in record["hot"]} == {
        (graph, factor) for graph in ("cnx-deploy", "timm", "transformers") for factor in (1, 50)
    }
    assert all(row["right"] for row in record["hot"] if row["graph"] == "cnx-deploy")
    assert {row["row"] for row in record["latency"]} >= {"tiny-walk-32-fp16.onnx [onnxruntime]"}
    assert not record["energy"]
    assert "tiny-walk" not in ALL_VARIANTS
