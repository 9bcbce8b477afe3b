"""A Triton server out of `.venv-triton` (scripts/venv-triton), with a stand-in for its ONNX Runtime backend."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-triton"
PYTHON = VENV / "bin" / "python"
STAND_INS = Path(__file__).parent / "triton_backends"
START_SECONDS = 240.0
NUMPY_TYPES = {"FP32": np.float32, "UINT8": np.uint8, "INT64": np.int64}


@dataclass(frozen=True)
class Answer:
    """What the server says: the HTTP status, its error, and its outputs by name."""

    status: int
    error: str | None
    outputs: Mapping[str, Any]


@dataclass(frozen=True)
class Server:
    """A running server: its ports, and what it has written so far."""

    http: int
    grpc: int
    metrics: int
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http}/v2/{path}"

    def get(self, path: str, content: bytes | None = None) -> Any:
        """The JSON at a path; None where the answer has no body. Raises HTTPError for other answers than 200."""
        with urllib.request.urlopen(urllib.request.Request(self.url(path), content), timeout=60) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def stats(self, model: str) -> Any:
        return self.get(f"models/{model}/stats")["model_stats"][0]

    def batches(self, model: str) -> dict[int, int]:
        """How often a batch of each size was run."""
        return {row["batch_size"]: row["compute_infer"]["count"] for row in self.stats(model)["batch_stats"]}

    def ask(
        self, model: str, inputs: Mapping[str, Any], outputs: Sequence[Any] = (), shape: Sequence[int] | None = None
    ) -> Answer:
        """Run a model on arrays, or on a list of byte strings (n, 1) or `shape`, in the binary form of the protocol."""
        described, parts = [], list[bytes]()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                kind = next(kind for kind, dtype in NUMPY_TYPES.items() if value.dtype == dtype)
                sizes, part = list(value.shape), value.tobytes()
            else:
                kind, sizes = "BYTES", list(shape or (len(value), 1))
                part = b"".join(len(row).to_bytes(4, "little") + row for row in value)
            parameters = {"binary_data_size": len(part)}
            described.append({"name": name, "datatype": kind, "shape": sizes, "parameters": parameters})
            parts.append(part)
        asked: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True}}
        if outputs:
            del asked["parameters"]
            asked["outputs"] = list(outputs)
        header = json.dumps(asked).encode()
        return self.post(model, header + b"".join(parts), len(header))

    def post(self, model: str, body: bytes, header_length: int = 0) -> Answer:
        """Send a body whose first bytes are the JSON header: none of them for a picture's file."""
        headers = {"Inference-Header-Content-Length": str(header_length), "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.url(f"models/{model}/infer"), body, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content, length = answer.read(), answer.headers.get("Inference-Header-Content-Length")
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read())["error"], {})
        end = int(length) if length else len(content)
        outputs = {}
        for output in json.loads(content[:end])["outputs"]:
            if (size := output.get("parameters", {}).get("binary_data_size")) is None:
                outputs[output["name"]] = output["data"]
                continue
            raw, end = content[end : end + size], end + size
            if output["datatype"] == "BYTES":
                outputs[output["name"]] = _strings(raw)
            else:
                values = np.frombuffer(raw, NUMPY_TYPES[output["datatype"]])
                outputs[output["name"]] = values.reshape(output["shape"])
        return Answer(200, None, outputs)


class ServerEndedError(Exception):
    """The server ended before it was ready; the message is what it wrote."""


def _strings(raw: bytes) -> list[str]:
    found, at = [], 0
    while at < len(raw):
        length = int.from_bytes(raw[at : at + 4], "little")
        found.append(raw[at + 4 : at + 4 + length].decode())
        at += 4 + length
    return found


@contextlib.contextmanager
def triton_server(repository: Path, folder: Path) -> Iterator[Server]:
    """Start a server of a repository, wait until it is ready, and stop it at the end; `folder` is for its files.

    Raises ServerEndedError, with what it wrote, for a server that ends, as it does where a model does not load.
    """
    backends = folder / "backends"
    wheel = next(VENV.glob("lib/python3*/site-packages/pytriton/tritonserver"))
    version = wheel.parts[-4].removeprefix("python")
    # Copies, because the server takes a link for an escape from its folder.
    shutil.copytree(wheel / "backends" / "python", backends / "python")
    shutil.copy(wheel / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    shutil.copytree(STAND_INS, backends, dirs_exist_ok=True)
    shown = [str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libpython = subprocess.run(shown, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PATH"] = f"{PYTHON.parent}:{environment['PATH']}"  # the python backend takes the first python3
    environment["LD_LIBRARY_PATH"] = f"{wheel.parents[1] / 'nvidia_pytriton.libs'}:{libpython}"
    http, grpc, metrics = _free_ports(3)
    shared = f"cnx_triton_{os.getpid()}_{http}"
    words = [
        f"--model-repository={repository}", f"--backend-directory={backends}", "--disable-auto-complete-config",
        f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}", "--http-address=127.0.0.1",
        "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1", "--exit-timeout-secs=5",
        *(f"--backend-config={backend},shm-region-prefix-name={shared}" for backend in ("python", "onnxruntime")),
    ]  # fmt: skip
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [wheel / "bin" / "tritonserver", *words], stdout=stream, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    server = Server(http, grpc, metrics, log)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)
        # A server that ends while it loads leaves processes of its python backend, and shared memory.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for region in Path("/dev/shm").glob(f"{shared}*"):
            region.unlink()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerEndedError(server.log)
        with contextlib.suppress(OSError):
            server.get("health/ready")
            return
        time.sleep(0.1)
    raise AssertionError(f"no server after {START_SECONDS:.0f} s\n{server.log}")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def in_triton(code: str, *words: object) -> Any:
    """The JSON that a program prints in `.venv-triton`, where the clients are."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [PYTHON, "-c", code, *map(str, words)], capture_output=True, text=True, check=False, timeout=120,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
