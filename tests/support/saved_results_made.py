"""A folder of saved results, small, written by the code that writes them; and its index after a lie, sealed again."""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from cnx_deploy.core.gates import GATES, ParityResult
from cnx_deploy.core.manifest import Artifact, manifest_from_json
from cnx_deploy.runners.base import RunnerInfo
from cnx_deploy.verification import saved_results
from cnx_deploy.verification.agreement import BrokenImage, Tally
from cnx_deploy.verification.parity import differences
from cnx_deploy.verification.saved_results import INDEX_NAME, Labelling, SavedOutputs

__all__ = ["CANDIDATE", "REFERENCE", "save_results", "sealed", "with_outputs"]

ROOT = Path(__file__).parents[2]
CANDIDATE, REFERENCE = "onnxruntime fp16", "torch fp32"


def save_results(folder: Path, images: tuple[str, str, str] = ("a.png", "b.png", "c.png")) -> Path:
    """Two runs of one file: four made images in two batches, and three labelled ones of two classes."""
    manifest = manifest_from_json((ROOT / "export" / "atto-224-fp16.json").read_bytes())
    artifact, gate = Artifact(Path("atto-224-fp16.onnx"), manifest), GATES["fp16"]
    info = RunnerInfo("onnxruntime", "1.0", "some CPU", "fp16", "float32", (("threads", "1"),))
    outputs = SavedOutputs(folder)
    reference = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    candidate = reference + 1e-4
    writer = outputs.writer(artifact, info, (CANDIDATE, REFERENCE))
    for here in (slice(0, 1), slice(1, 4)):
        writer.add(candidate[here], reference[here], [f"image {at}" for at in range(4)[here]])
    found = differences(candidate, reference)
    writer.close(ParityResult(CANDIDATE, REFERENCE, gate, (1, 3), found, gate.failures(found)))
    labelled = outputs.writer(artifact, info, (CANDIDATE, REFERENCE))
    labelled.add(candidate[:3], reference[:3], images, [0, 1, 1])
    tally = Tally(("cat", "dog"))
    tally.add(candidate[:3], reference[:3], [0, 1, 1], images)
    broken = (BrokenImage("d.png", "no image"),)
    result = tally.result((CANDIDATE, REFERENCE), gate, (3,), available=4, broken=broken)
    labelled.close(result, Labelling(("cat", "dog"), 4, broken))
    outputs.finish(artifact, ("tensorrt: no GPU",), ("a note",))
    return folder


def sealed(document: Any) -> bytes:
    """An index as a file's bytes, with the hash of itself that it has to have where it can have one."""
    if isinstance(document, dict):
        rest = {name: value for name, value in document.items() if name != "sha256"}
        with contextlib.suppress(ValueError):  # NaN
            document = {**rest, "sha256": saved_results._own_hash(rest)}
    return json.dumps(document).encode()


def with_outputs(folder: Path, index: dict[str, Any], content: bytes) -> Path:
    """Put other bytes into the first file of logits, and their size and hash into the index."""
    record = index["artifacts"][0]["runs"][0]["files"][0]
    (folder / record["name"]).write_bytes(content)
    record.update(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / INDEX_NAME).write_bytes(sealed(index))
    return folder
