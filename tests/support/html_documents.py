"""Documents that bench, diagnose headroom and diagnose layers print, with chosen figures, for tests of the page."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnx_deploy.bench.record import Correctness, NotRun, Ratio
from cnx_deploy.cli.options import _finite
from cnx_deploy.core.gates import GATES
from cnx_deploy.diagnosis.headroom import Headroom
from cnx_deploy.diagnosis.layer_record import BackendResult, LayerComparison, OutputDifferences, OutputResult
from cnx_deploy.diagnosis.layer_record import Verdict as LayerVerdict
from cnx_deploy.diagnosis.ranges import NormRange, ParameterRange, ResponseRange, TensorRange
from tests.support.bench_rows import NETWORK, record_of, row

PEER = "timm.onnx fp32"


def written(path: Path, content: Any) -> Path:
    """A document as a command's --json prints it: null for what is not finite."""
    path.write_text(json.dumps(_finite(content), allow_nan=False), encoding="utf-8")
    return path


def benchmark(name: str = "atto.onnx") -> dict[str, Any]:
    """Four rows at batch 1: the peer, one of ours, one that is not stable and one whose logits were wrong."""
    fails = ("relative L2 0.5, gate 1e-05",)
    ours = row(1, 125.0, name=name, ratios=(Ratio(PEER, 1.25, 1.2, 1.31),))
    shaky = row(1, 90.0, name="torch eager fp32", status="UNSTABLE", ratios=(Ratio(PEER, 0.9, 0.5, 1.4),))
    wrong = row(1, 999.0, name="wrong.onnx", status="INVALID", ratios=(Ratio(PEER, 9.99, 9.9, 10.1),))
    rows = (
        row(1, 100.0, name=PEER),
        ours,
        replace(shaky, remarks=("medians of 9, 12 ms",)),
        replace(wrong, remarks=fails, correctness=Correctness(3, 1.0, 0.5, 0.1, 0.0, 0, fails)),
    )
    missing = (NotRun("other.engine", NETWORK, 64, 9, 3.0, "no GPU"),)
    record = record_of(*rows, files=(name, "wrong.onnx"), not_run=missing, warnings=("others are working",))
    return record.to_document()


def headroom(*, largest: float = 100.0) -> Headroom:
    """One block and the head; the tensor stored first reaches `largest`."""
    weights = {"origin": "random", "reference": "0", "sha256": "a" * 64}
    return Headroom(
        network={"variant": "atto", "num_classes": 10, "weights": weights},
        source="seeded image-like",
        images=1,
        image_size=32,
        margin=4.0,
        tensors=(TensorRange("stages.0.0.dwconv", "output", largest), TensorRange("stages.0.0", "output", 1.0)),
        responses=(ResponseRange("stages.0.0.grn", 64, 30.0, 57600.0),),
        norms=(NormRange("stages.0.0.norm", 8.0, 2.0),),
        parameters=(ParameterRange("head.weight", 10, 0.1, 0, 0, 0),),
    )


def layers(error: float, verdict: LayerVerdict) -> dict[str, Any]:
    """Two modules of one block on two backends, the second's last as told; a third did not run."""
    good = OutputResult("stages.0.0.dwconv", "ok", OutputDifferences(1e-4, 1.0, 0, 3.0))
    bad = OutputResult("stages.0.0.grn", verdict, OutputDifferences(error, 0.5, 0 if math.isfinite(error) else 7, 3.0))
    gate = GATES["fp16"].relative_l2_max
    backends = (
        BackendResult("torch", gate, (good, replace(good, module="stages.0.0.grn"))),
        BackendResult("emulator", gate, (good, bad)),
        BackendResult("tensorrt", gate, not_run="no GPU here"),
    )
    return {"layers": [LayerComparison("atto-224-fp16.onnx", 2, backends, {}).to_dict()]}
