"""Train atto on the digits, export, build, verify, benchmark, and say in one table what was made.

Every step is a command that a reader can run alone; each is printed before it runs.
"""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path("demo")
DATA, RUN, EXPORT, ENGINES = ROOT / "digits", ROOT / "run", ROOT / "export", ROOT / "engines"
EPOCHS = 10
SIDE = 32
"""Pixels: a digit has 8, so more of them would be made up, and an epoch would take nearly twice as long at 64."""
TARGETS = ("sm86", "sm89", "sm120")
BIN = Path(sys.executable).parent


def main() -> int:
    """Run the steps; the exit code is the first failing step's."""
    start = time.monotonic()
    folders = ["--export-dir", str(EXPORT), "--engines-dir", str(ENGINES)]
    step("The data: 1,797 handwritten digits as an image folder")
    run("python", "scripts/make_digits.py", str(DATA))
    step(f"Training atto from scratch, {EPOCHS} epochs at {SIDE} px")
    train()
    step("Export: FP32 for processors, FP16 for GPUs; each compared with PyTorch before it is put into place")
    weights = ["--variant", "atto", "--checkpoint", str(RUN / "best.safetensors")]
    run("cnx-deploy", "export", *weights, "--name", "digits", "--output-dir", str(EXPORT))
    step(f"Engines for {', '.join(TARGETS)}, ahead of time")
    targets = [word for target in TARGETS for word in ("--target", target)]
    run("cnx-deploy", "build-trt", "--export-dir", str(EXPORT), "--output-dir", str(ENGINES), *targets)
    step("Verify everything against PyTorch on the validation images")
    verified = cnx_json("verify", *folders, "--data", str(DATA / "val"))
    step("Accuracy on the validation images")
    files = sorted(EXPORT.glob("*.onnx"))
    accuracy = {file.name: cnx_json("eval", str(file), str(DATA)) for file in files}
    step("Benchmark: PyTorch and ONNX Runtime in turns")
    benched = cnx_json("bench", *folders, "--compare", "torch", "--duration", "1.5")
    closing_table(verified, accuracy, benched, time.monotonic() - start)
    return 0


def train() -> None:
    """Train, go on with an interrupted run, or keep a finished one."""
    finished = (RUN / "metrics.csv").is_file() and len((RUN / "metrics.csv").read_text().splitlines()) > EPOCHS
    if finished and (RUN / "best.safetensors").is_file():
        print(f"  {RUN} holds a finished run: reused", flush=True)
        return
    settings = f"--image-size {SIDE} --no-flip --crop-ratio 1.0 --min-crop-area 0.8 --label-smoothing 0"
    words = ["--epochs", str(EPOCHS), *settings.split(), "--run-dir", str(RUN)]
    run("cnx-deploy", "train", str(DATA), "--variant", "atto", *words, *(["--resume"] if RUN.exists() else []))


def step(title: str) -> None:
    """Say what comes next."""
    print(f"\n== {title}", flush=True)


def cnx_json(*words: str) -> Any:
    """Run a cnx-deploy command with --json; progress stays on stderr."""
    return json.loads(run("cnx-deploy", *words, "--json"))


def run(*command: str) -> str:
    """Print and run a command; leave with its exit code when it fails. What it prints as JSON is returned."""
    print(f"$ {shlex.join(command)}", flush=True)
    output = subprocess.PIPE if command[-1] == "--json" else None
    done = subprocess.run([BIN / command[0], *command[1:]], stdout=output, text=True, check=False)
    if done.returncode:
        print(done.stdout or "", f"The demo stops here: exit code {done.returncode}.", sep="\n", file=sys.stderr)
        sys.exit(done.returncode)
    return done.stdout or ""


def closing_table(verified: dict[str, Any], accuracy: dict[str, Any], benched: dict[str, Any], seconds: float) -> None:
    """What was made, how right it is, how fast, and what was not run."""
    speed = {(row["name"], row["batch"]): row for row in benched["rows"]}
    compiled = {row["name"]: row for row in benched["not_run"]}
    print(f"\n{'made':34} {'MB':>6} {'top-1 %':>7} {'rel. L2':>8} {'parity':>7}  speed")
    for entry in verified["verifications"]:
        name = entry["artifact"]
        size = next(folder / name for folder in (EXPORT, ENGINES) if (folder / name).is_file()).stat().st_size / 1e6
        worst = max((result["differences"]["relative_l2_max"] for result in entry["results"]), default=None)
        top1 = accuracy.get(name, {}).get("top1_percent")
        parity = ("pass" if entry["passed"] else "FAIL") if entry["results"] else "not run"
        print(
            f"{name:34} {size:>6.1f} {'-' if top1 is None else format(top1, '.2f'):>7} "
            f"{'-' if worst is None else format(worst, '.1e'):>8} {parity:>7}  {speed_of(name, speed, compiled)}"
        )
    print(
        "\nSpeed: images/s of ONNX Runtime on this machine's processors, where an FP16 file is computed in FP32, and"
        "\nhow many times PyTorch eager. Not run for lack of a GPU: the engines' parity and latency; where a GPU is,"
        f"\n`cnx-deploy verify` and `cnx-deploy bench` run them. Done in {seconds:.0f} s; everything is in {ROOT}/."
    )


def speed_of(name: str, speed: dict[Any, Any], compiled: dict[str, Any]) -> str:
    """The speed cell of one artifact."""
    row = compiled.get(name)
    if row is not None and row["kernels"] is not None:  # a file is also there for a batch that it does not take
        return f"{row['kernels']} kernels, {row['megabytes_per_image']:.1f} MB an image; latency: not run (no GPU)"
    cells = [
        f"batch {batch}: {row['images_per_second']:.0f}/s ({ratio['ratio']:.2f}x torch"
        f"{'' if row['status'] == 'OK' else ', ' + row['status']})"
        for (row_name, batch), row in sorted(speed.items())
        for ratio in row["ratios"]
        if row_name == name and ratio["peer"].startswith("torch eager")
    ]
    return ", ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
