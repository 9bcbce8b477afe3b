"""Train UPerNet on atto on scenes of digits, export, verify, evaluate, draw, and say in one table what was made.

Every step is a command that a reader can run alone; each is printed before it runs. The training takes some 250 seconds
of one processor.
"""

import resource
import sys
import time
from pathlib import Path

from demo import cnx_json, run, step

ROOT = Path("demo-segment")
DATA, RUN, EXPORT = ROOT / "scenes", ROOT / "run", ROOT / "export"
EPOCHS = 5
SIDE = 96
TRAINING = (
    "--task segment --variant atto --task-option channels=64 --task-option auxiliary_channels=64 --batch-size 8 "
    "--learning-rate 2e-3 --scale-jitter 0.8,1.3 --no-photometric --channels-last --workers 0 --no-image-check"
)


def main() -> int:
    """Run the steps; the exit code is the first failing step's."""
    start = time.monotonic()
    step("The data: 600 scenes of handwritten digits on photographs, with exact masks")
    run("python", "scripts/make_scenes.py", str(DATA), "--val", "100", "--side", str(SIDE))
    step(f"Training UPerNet on atto from scratch, {EPOCHS} epochs at {SIDE} px")
    seconds = train()
    step("Export: FP32 for processors, FP16 for GPUs; each compared with PyTorch before it is put into place")
    weights = ["--variant", "atto", "--checkpoint", str(RUN / "best.safetensors")]
    run("cnx-deploy", "export", *weights, "--name", "scenes", "--output-dir", str(EXPORT))
    step("Verify both files against PyTorch on the validation images, and each change of a pixel's class")
    folders = ["--export-dir", str(EXPORT), "--engines-dir", str(ROOT / "engines")]
    verified = cnx_json("verify", *folders, "--data", str(DATA))
    step("mIoU on the validation images")
    files = sorted(EXPORT.glob("*.onnx"))
    found = {file.name: cnx_json("eval", str(file), str(DATA)) for file in files}
    step("Classes of four pictures, in their own pixels")
    pictures = [str(path) for path in sorted((DATA / "images" / "val").glob("*.png"))[:4]]
    run("cnx-deploy", "predict", str(files[0]), *pictures, "--draw", str(ROOT / "pictures"))
    print(f"\n{'made':34} {'MB':>6} {'mIoU %':>7} {'ink %':>7} {'rel. L2':>8} {'parity':>7}")
    for entry in verified["verifications"]:
        name = entry["artifact"]
        ink = next(row["iou"] for row in found[name]["per_class"] if row["name"] == "ink")
        worst = max((result["differences"]["relative_l2_max"] for result in entry["results"]), default=None)
        print(
            f"{name:34} {(EXPORT / name).stat().st_size / 1e6:>6.1f} {100 * found[name]['mean_iou']:>7.2f} "
            f"{100 * ink:>7.2f} {'-' if worst is None else format(worst, '.1e'):>8} "
            f"{'pass' if entry['passed'] else 'FAIL':>7}"
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
    run("cnx-deploy", "train", str(DATA), *words, *(["--resume"] if RUN.exists() else []))
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    sys.exit(main())
