"""Our endpoint, LitServe and Triton beside a bare loop, in turns: images a second, latencies, processor time an image.

Runs in .venv-ray with LitServe (`.venv-ray/bin/pip install litserve==0.2.19`), and with .venv-triton for Triton, whose
backend for ONNX files is a stand-in in Python (`tests/support/triton_backends`). All serve one file, take the same
JPEGs and give logits. The bare loop decodes and runs one image after the other in one process; it is measured before
and after each server of a turn. Processor time is that of all processes of a server, its clients' is not in it.

    .venv-ray/bin/python scripts/compare_servers.py --record docs/data/servers.json
"""

import argparse
import base64
import contextlib
import datetime
import http.client
import io
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import cnx_deploy as cnx  # noqa: E402
from cnx_deploy.core.files import whole_file  # noqa: E402
from cnx_deploy.core.system import cpu_count, cpu_name  # noqa: E402
from cnx_deploy.data import image_like_batches  # noqa: E402
from tests.support.triton_server import triton_server  # noqa: E402

BARE = """
import json, sys, time
from pathlib import Path
import onnxruntime
from cnx_deploy.core.preprocessing import Preprocessing
from cnx_deploy.data.pixels import pixels_of_file
model, words, folder, count = sys.argv[1:]
preprocessing = Preprocessing.from_dict(json.loads(words))
files = [path.read_bytes() for path in sorted(Path(folder).glob("*.jpg"))]
options = onnxruntime.SessionOptions()
options.add_session_config_entry("session.intra_op.allow_spinning", "0")
session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
def run(index):
    started = time.perf_counter()
    pixels = pixels_of_file(files[index % len(files)], preprocessing)
    logits = session.run(["logits"], {"images": pixels[None]})[0]
    return time.perf_counter() - started, logits[0]
for index in range(10):
    run(index)
processor, started = time.process_time(), time.perf_counter()
seconds = [run(index)[0] for index in range(int(count))]
print(json.dumps({
    "processor": time.process_time() - processor, "seconds": time.perf_counter() - started, "latencies": seconds,
    "logits": run(0)[1].tolist(),
}))
"""


def main() -> int:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000, help="by eight clients, over all turns")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--without", choices=["litserve", "triton"], action="append", default=[])
    parser.add_argument("--record", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as held:
        folder = Path(name)
        words: dict[str, Any] = {"input_kind": "uint8", "output_dir": folder / "export"}
        artifact = cnx.export("atto", precision="fp32", **words)
        preprocessing = json.dumps(asdict(artifact.manifest.model.preprocessing))
        pictures = write_pictures(folder / "pictures", 200)
        servers = {"cnx-deploy serve": ours(held, artifact.path)}
        if "litserve" not in asked.without:
            servers["LitServe"] = litserve(held, artifact.path, preprocessing)
        if "triton" not in asked.without:
            servers["Triton, stand-in"] = triton(held, artifact, folder)
        # A server forgets what it did to begin with.
        for ask, pid in servers.values():
            load(ask, pid, pictures, clients=8, count=40)
        bare = [str(artifact.path), preprocessing, str(folder / "pictures")]
        rows = measured(servers, bare, pictures, asked.turns, asked.requests // asked.turns)
    document = {
        "date": datetime.date.today().isoformat(),
        "command": f"scripts/compare_servers.py --requests {asked.requests} --turns {asked.turns}",
        "machine": f"{cpu_name()}, {cpu_count()} processors, {platform.machine()}",
        "file": "atto-224-fp32.onnx, uint8 input, random weights; 200 JPEGs of 500x375 pixels",
        "tools": {name: version(name) for name in ("cnx-deploy", "onnxruntime-gpu", "ray", "litserve", "pillow")},
        "note": "Each figure is the median over the turns. Other work ran on the same processors.",
        "rows": rows,
    }
    print(json.dumps(document, indent=2))
    if asked.record is not None:
        with whole_file(asked.record) as temporary:
            temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


Ask = Callable[[http.client.HTTPConnection, bytes], Any]
"""Sends a picture and gives its logits, or raises."""
Server = tuple[tuple[int, Ask], int]
"""A port and how it is asked, and the process that it is."""


def ours(held: contextlib.ExitStack, path: Path) -> Server:
    """The command, as it is."""
    command = [sys.executable, "-m", "cnx_deploy", "serve", str(path), "--port", "0", "--json"]
    process = started(held, command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    text = process.stdout.readline()
    while not text.rstrip().endswith(b"}"):
        line = process.stdout.readline()
        assert line, "the endpoint has ended"
        text += line
    port = int(json.loads(text)["url"].rpartition(":")[2])
    return (port, raw_bytes(f"/v2/models/{path.stem}/infer")), process.pid


def litserve(held: contextlib.ExitStack, path: Path, preprocessing: str) -> Server:
    """`scripts/litserve_app.py`; pictures come as base64 in JSON, as LitServe's own examples have them."""
    port = 18000 + os.getpid() % 1000
    process = started(
        held, [sys.executable, str(ROOT / "scripts" / "litserve_app.py"), str(path), preprocessing, str(port)]
    )
    wait_for(port, process)

    def ask(connection: http.client.HTTPConnection, content: bytes) -> Any:
        body = json.dumps({"image": base64.b64encode(content).decode()})
        return answer(connection, "/predict", body, {"Content-Type": "application/json"})[0]["logits"]

    return (port, ask), process.pid


def triton(held: contextlib.ExitStack, artifact: Any, folder: Path) -> Server:
    """The ensemble of `package triton`, which takes picture files."""
    cnx.package([artifact], "triton", to=folder / "repository", name="net")
    (folder / "server").mkdir()
    before = set(children(os.getpid()))
    server = held.enter_context(triton_server(folder / "repository", folder / "server"))
    (pid,) = [pid for pid in children(os.getpid()) if pid not in before and parent_of(pid) == os.getpid()]
    return (server.http, raw_bytes("/v2/models/net/infer")), pid


def raw_bytes(path: str) -> Ask:
    """A picture's file as the whole body of a request of the Open Inference Protocol."""

    def ask(connection: http.client.HTTPConnection, content: bytes) -> Any:
        document, tail = answer(connection, path, content, {"Inference-Header-Content-Length": "0"})
        at = 0  # Triton gives what was asked for without JSON in binary
        for output in document["outputs"]:
            size = output.get("parameters", {}).get("binary_data_size", 0)
            if output["name"] == "logits":
                return output["data"] if "data" in output else np.frombuffer(tail[at : at + size], "<f4")
            at += size
        raise AssertionError("no logits in the answer")

    return ask


def answer(connection: http.client.HTTPConnection, path: str, body: Any, headers: dict[str, str]) -> Any:
    """The JSON of an answer and the bytes behind it; AssertionError for another status than 200."""
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = response.read()
    assert response.status == 200, content[:300]
    end = int(response.headers.get("Inference-Header-Content-Length", len(content)))
    return json.loads(content[:end]), content[end:]


def measured(
    servers: dict[str, Server], bare: list[str], pictures: list[bytes], turns: int, count: int
) -> list[dict[str, Any]]:
    """A row for the bare loop and each server, the median over the turns, all latencies together."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    loops = [bare_loop(bare, count // 2)]
    for turn in range(turns):
        for name, (port_and_ask, pid) in servers.items():
            for clients, images in ((1, max(20, count // 5)), (8, count)):
                found.setdefault((name, clients), []).append(load(port_and_ask, pid, pictures, clients, images))
            print(f"turn {turn + 1}, {name}: {found[name, 8][-1]['images_a_second']:.1f} images/s", file=sys.stderr)
            loops.append(bare_loop(bare, count // 2))
    reference = np.array(loops[0]["logits"])
    for (name, _), runs in found.items():
        for run in runs:
            off = float(np.abs(np.array(run["logits"]) - reference).max())
            assert off < 1e-4, f"{name} answers something else: {off}"
    rows = [row_of("bare loop", 1, loops, None)]
    for (name, clients), runs in found.items():
        rows.append(row_of(name, clients, runs, rows[0]))
    return rows


def row_of(name: str, clients: int, runs: list[dict[str, Any]], bare: dict[str, Any] | None) -> dict[str, Any]:
    """Medians over the turns, and the ratios to the bare loop's."""
    percentiles = [np.percentile(np.array(run["latencies"]) * 1e3, (50, 99)) for run in runs]
    row = {
        "server": name,
        "clients": clients,
        "requests": sum(len(run["latencies"]) for run in runs),
        "failures": sum(run.get("failures", 0) for run in runs),
        "images_a_second": round(statistics.median(run["images_a_second"] for run in runs), 2),
        "p50_ms": round(statistics.median(float(p50) for p50, _ in percentiles), 1),
        "p99_ms": round(statistics.median(float(p99) for _, p99 in percentiles), 1),
        "processor_ms": round(statistics.median(run["processor_ms"] for run in runs), 2),
    }
    if bare is not None:
        row["speed_of_bare"] = round(row["images_a_second"] / bare["images_a_second"], 2)
        row["processor_of_bare"] = round(row["processor_ms"] / bare["processor_ms"], 2)
    return row


def bare_loop(words: list[str], count: int) -> dict[str, Any]:
    """The loop without a server, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words, str(count)], capture_output=True, text=True, check=True, env=environment
    )
    found = json.loads(done.stdout)
    speed, processor = count / found["seconds"], found["processor"] / count * 1e3
    return {**found, "images_a_second": speed, "processor_ms": processor}


def load(port_and_ask: tuple[int, Ask], pid: int, pictures: list[bytes], clients: int, count: int) -> dict[str, Any]:
    """So many requests by so many clients, each of which asks again once it is answered."""
    port, ask = port_and_ask
    numbers, lock = iter(range(count)), threading.Lock()
    latencies, failures, first = list[float](), list[str](), list[Any]()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                connection.close()
                return
            begun = time.perf_counter()
            try:
                logits = ask(connection, pictures[number % len(pictures)])
            except (OSError, AssertionError, http.client.HTTPException) as error:
                failures.append(str(error))
                continue
            latencies.append(time.perf_counter() - begun)
            if number == 0:
                first.append(np.ravel(logits).tolist())

    threads = [threading.Thread(target=client) for _ in range(clients)]
    processor, begun = processor_seconds(pid), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall, processor = time.perf_counter() - begun, processor_seconds(pid) - processor
    assert first, failures[:3]
    return {
        "latencies": latencies, "failures": len(failures), "logits": first[0], "images_a_second": count / wall,
        "processor_ms": processor / count * 1e3,
    }  # fmt: skip


def processor_seconds(pid: int) -> float:
    """Of a process and all below it, since they began."""
    ticks = 0
    for each in (pid, *children(pid)):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """The processes below one, at any depth."""
    parents = {int(path.name): parent_of(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    found, known = list[int](), {pid}
    while more := [each for each, parent in parents.items() if parent in known and each not in known]:
        known.update(more)
        found += more
    return found


def parent_of(pid: int) -> int:
    """The process that started one; 0 where it has ended."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def started(held: contextlib.ExitStack, command: list[str], **words: Any) -> "subprocess.Popen[bytes]":
    """A process that is ended with the script."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    words = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True, **words}
    process = subprocess.Popen(command, env=environment, **words)

    def end() -> None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):  # LitServe's processes stay where their parent has ended
            os.killpg(process.pid, signal.SIGKILL)

    held.callback(end)
    return process


def wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    """Until something listens there."""
    for _ in range(1200):
        assert process.poll() is None, "the server has ended"
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.25)
    raise AssertionError("the server does not begin")


def write_pictures(folder: Path, count: int) -> list[bytes]:
    """Seeded pictures of 500x375 pixels as JPEG files, and their contents."""
    folder.mkdir()
    contents = list[bytes]()
    for number, pixels in enumerate(pictures_of(count)):
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
        (folder / f"{number:04}.jpg").write_bytes(contents[-1])
    return contents


def pictures_of(count: int) -> Iterator[np.ndarray]:
    """Arrays (375, 500, 3) uint8."""
    for batch in image_like_batches(count, (375, 500), batch_size=1):
        yield batch[0].numpy()


if __name__ == "__main__":
    sys.exit(main())
