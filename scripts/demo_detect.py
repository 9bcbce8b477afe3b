"""Train Mask R-CNN on atto on scenes of digits, export, verify, evaluate, draw, and say in one table what was made.

Every step is a command that a reader can run alone; each is printed before it runs.
"""

import resource
import sys
import time
from pathlib import Path

from demo import cnx_json, run, step

ROOT = Path("demo-detect")
DATA, RUN, EXPORT = ROOT / "scenes", ROOT / "run", ROOT / "export"
EPOCHS = 7
SIDE = 96
HEADS = {
    "channels": 48, "box_channels": 128, "mask_channels": 32, "anchor_sizes": "[16,24,32,48,64]", "pre_nms": 100,
    "proposals": 64, "training_proposals": 64, "detections": 20, "candidates": 100,
}  # fmt: skip
"""Anchors for digits of 24 to 53 pixels, and heads that a processor trains in 0.65 seconds a step of 8 images."""
TRAINING = (
    "--task detect --variant atto --batch-size 8 --learning-rate 2e-3 --scale-jitter 0.8,1.2 --no-flip "
    "--no-photometric --channels-last --clip-norm 5 --workers 0 --no-image-check"
)


def main() -> int:
    """Run the steps; the exit code is the first failing step's."""
    start = time.monotonic()
    step("The data: 600 scenes of handwritten digits on photographs, with exact masks, as COCO's JSON")
    run("python", "scripts/make_scenes.py", str(DATA), "--val", "100", "--side", str(SIDE))
    step(f"Training Mask R-CNN on atto from scratch, {EPOCHS} epochs at {SIDE} px")
    seconds = train()
    step("Export: FP32 for processors, FP16 for GPUs; each compared with PyTorch before it is put into place")
    weights = ["--variant", "atto", "--checkpoint", str(RUN / "best.safetensors")]
    run("cnx-deploy", "export", *weights, "--name", "digits", "--output-dir", str(EXPORT))
    step("Verify both files against PyTorch on the validation images: detections matched by overlap and label")
    folders = ["--export-dir", str(EXPORT), "--engines-dir", str(ROOT / "engines")]
    verified = cnx_json("verify", *folders, "--data", str(DATA))
    step("COCO's average precision on the validation images")
    files = sorted(EXPORT.glob("*.onnx"))
    found = {file.name: cnx_json("eval", str(file), str(DATA)) for file in files}
    step("What is found on four pictures")
    pictures = [str(path) for path in sorted((DATA / "images" / "val").glob("*.png"))[:4]]
    run("cnx-deploy", "predict", str(files[0]), *pictures, "--draw", str(ROOT / "pictures"))
    print(f"\n{'made':30} {'MB':>6} {'boxes AP':>9} {'AP50':>6} {'masks AP':>9} {'AP50':>6} {'parity':>7}")
    for entry in verified["verifications"]:
        name = entry["artifact"]
        rates = [100 * found[name][kind][figure] for kind in ("boxes", "masks") for figure in ("AP", "AP50")]
        print(
            f"{name:30} {(EXPORT / name).stat().st_size / 1e6:>6.1f} {rates[0]:>9.2f} {rates[1]:>6.2f} "
            f"{rates[2]:>9.2f} {rates[3]:>6.2f} {'pass' if entry['passed'] else 'FAIL':>7}"
        )
    spent = "an earlier run" if seconds is None else f"{seconds:.0f} processor seconds"
    print(f"\nTraining took {spent}. Done in {time.monotonic() - start:.0f} s; everything is in {ROOT}/.")
    return 0


def train() -> float | None:
    """Train, go on with an interrupted run, or keep a finished one; the processor's seconds, None of a kept one."""
    finished = (RUN / "metrics.csv").is_file() and len((RUN / "metrics.csv").read_text().splitlines()) > EPOCHS
    if finished and (RUN / "best.safetensors").is_file():
        print(f"  {RUN} holds a finished run: reused", flush=True)
        return None
    words = [*TRAINING.split(), "--image-size", str(SIDE), "--epochs", str(EPOCHS), "--run-dir", str(RUN)]
    words += [word for name, value in HEADS.items() for word in ("--task-option", f"{name}={value}")]
    run("cnx-deploy", "train", str(DATA), *words, *(["--resume"] if RUN.exists() else []))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    sys.exit(main())
