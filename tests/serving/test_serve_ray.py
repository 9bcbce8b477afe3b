"""The command on Ray Serve: answers, a corrupt new version, a killed replica, the end, what is refused at once."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cnx_deploy as cnx
from tests.support.http_server import Server

pytest.importorskip("ray", reason="Ray is in an environment of its own")
pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def picture(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(stream, "JPEG")
    return stream.getvalue()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Served:
    """A running command, its server, and what it wrote."""

    process: "subprocess.Popen[bytes]"
    server: Server
    folder: Path

    def said(self) -> str:
        return (self.folder / "stderr").read_text(encoding="utf-8")

    def wait_for(self, text: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while text not in self.said() and time.monotonic() < until:
            time.sleep(0.1)
        assert text in self.said()

    def children(self) -> dict[int, str]:
        """Every process below it, by its id, with its name."""
        parents, names = dict[int, int](), dict[int, str]()
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                name, _, rest = path.read_text().partition("(")[2].rpartition(")")
                parents[int(path.parent.name)], names[int(path.parent.name)] = int(rest.split()[1]), name
        found, known = dict[int, str](), {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in known and pid not in known}:
            known |= more
            found |= {pid: names[pid] for pid in more}
        return found


@contextlib.contextmanager
def served(artifact: Path, folder: Path, *words: str) -> Iterator[Served]:
    port = free_port()
    command = [sys.executable, "-m", "cnx_deploy", "serve", str(artifact), "--port", str(port), "--json", *words]
    folder.mkdir(exist_ok=True)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    found = Served(process, Server(port), folder)
    try:
        until = time.monotonic() + 300
        while not (folder / "stdout").read_bytes().rstrip().endswith(b"}"):
            assert process.poll() is None, found.said()
            assert time.monotonic() < until, found.said()
            time.sleep(0.2)
        yield found
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(90)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without its manifest, which names a variant that other processes do not know."""
    folder = tmp_path_factory.mktemp("served")
    words: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "output_dir": folder / "export"}
    made = cnx.export("tiny-test", precision="fp32", **words).path
    return shutil.copy(made, folder / "net.onnx")


@pytest.fixture(scope="module")
def running(artifact: Path) -> Iterator[Served]:
    with served(artifact, artifact.parent / "out") as found:
        yield found


def test_it_says_where_it_is_and_answers_as_predict_does(running: Served, artifact: Path) -> None:
    document = json.loads((running.folder / "stdout").read_bytes())
    assert document["url"] == f"http://127.0.0.1:{running.server.port}"
    assert running.server.get("/v2/health/ready").status == 200
    with cnx.load(artifact) as model:
        for seed in range(3):
            answer = running.server.post("/v1/classify", picture(seed)).json
            assert answer["predictions"][0]["scores"] == list(model.predict(picture(seed)).to_dict()["scores"])
            assert (answer["model"], answer["version"]) == ("net", document["version"])


def test_no_port_but_the_endpoints_own_is_open_to_others_except_one_of_the_replica(running: Served) -> None:
    """Ray 2.60 opens one port a replica on all interfaces, as docs/endpoint.md says."""
    names = {**running.children(), running.process.pid: "cnx-deploy"}
    listening = {
        line.split()[9]: line.split()[1].rpartition(":")[0]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[3] == "0A"
    }
    loopback = ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000")
    found = []
    for pid, name in names.items():
        with contextlib.suppress(OSError):
            for link in (Path("/proc") / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = str(link.readlink()).removeprefix("socket:[").removesuffix("]")
                    if inode in listening and listening[inode] not in loopback:
                        found.append(name)
    assert [name for name in found if not name.startswith("ray::ServeRepli")] == []
    assert len(found) <= 1


def test_tritons_client_gets_the_networks_outputs(running: Served, artifact: Path) -> None:
    triton = pytest.importorskip("tritonclient.http")
    files = [picture(seed) for seed in range(3)]
    with cnx.load(artifact) as model:
        expected = model.outputs(files)["logits"].numpy()
    tensor = triton.InferInput("image", [3], "BYTES")
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_))
    with triton.InferenceServerClient(f"127.0.0.1:{running.server.port}") as client:
        assert client.is_server_live()
        assert client.is_model_ready("net")
        assert client.get_model_metadata("net")["inputs"][0]["name"] == "image"
        for outputs in (None, [triton.InferRequestedOutput("logits")], [triton.InferRequestedOutput("logits", False)]):
            assert np.array_equal(client.infer("net", [tensor], outputs=outputs).as_numpy("logits"), expected)
        tensor.set_data_from_numpy(np.array([b"no picture"] * 3, dtype=np.object_))
        with pytest.raises(triton.InferenceServerException, match="cannot be read as an image"):
            client.infer("net", [tensor])


def test_sighup_refuses_a_corrupt_file_and_takes_a_whole_one(running: Served, artifact: Path) -> None:
    whole, file = artifact.read_bytes(), picture(1)
    before = running.server.post("/v1/classify", file).json
    artifact.write_bytes(whole[:-100])
    running.process.send_signal(signal.SIGHUP)
    running.wait_for("goes on answering")
    after = running.server.post("/v1/classify", file).json
    assert (after["version"], after["predictions"]) == (before["version"], before["predictions"])
    words: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "seed": 3}
    made = cnx.export("tiny-test", precision="fp32", output_dir=artifact.parent / "other", **words).path
    artifact.write_bytes(made.read_bytes())
    running.process.send_signal(signal.SIGHUP)
    running.wait_for(" answers.")
    new = running.server.post("/v1/classify", file).json
    assert new["version"] != before["version"]
    assert new["predictions"] != before["predictions"]
    artifact.write_bytes(whole)


def test_a_client_that_leaves_frees_the_replica(running: Served) -> None:
    for _ in range(10):
        with socket.create_connection(("127.0.0.1", running.server.port), timeout=20) as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 500)
    started = time.monotonic()
    assert [running.server.post("/v1/classify", picture(seed)).status for seed in range(5)] == [200] * 5
    assert time.monotonic() - started < 10


def test_a_replica_that_is_killed_comes_back_at_the_same_port(running: Served) -> None:
    (replica,) = [pid for pid, name in running.children().items() if name.startswith("ray::ServeRepli")]
    os.kill(replica, signal.SIGKILL)
    until, status = time.monotonic() + 120, 0
    while status != 200 and time.monotonic() < until:
        time.sleep(0.5)
        with contextlib.suppress(OSError):
            status = running.server.get("/v2/health/ready").status
    assert running.server.post("/v1/classify", picture(0)).status == 200


def test_sigterm_answers_what_is_under_way_and_ends_with_code_0(running: Served) -> None:
    """The last test of the running command."""
    statuses, file = list[int](), picture(0)

    def ask() -> None:
        statuses.append(running.server.post("/v1/classify", file).status)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    children = running.children()
    running.process.terminate()
    for thread in threads:
        thread.join(60)
    assert running.process.wait(90) == 0, running.said()
    assert statuses == [200] * 40
    assert "Stopping" in running.said()
    assert [name for pid, name in children.items() if (Path("/proc") / str(pid)).exists()] == []


@pytest.mark.slow
def test_two_replicas_answer_through_the_proxy_and_reload_together(artifact: Path, tmp_path: Path) -> None:
    with served(artifact, tmp_path / "two", "--replicas", "2") as found:
        assert [found.server.post("/v1/classify", picture(seed)).status for seed in range(20)] == [200] * 20
        counted = 'cnx_requests_total{endpoint="classify",status="200"} 20.0'
        assert counted in found.server.get("/metrics").body.decode()
        found.process.send_signal(signal.SIGHUP)
        found.wait_for(" answers.")
        assert 'cnx_reloads_total{result="taken"} 2.0' in found.server.get("/metrics").body.decode()
        found.process.terminate()
        assert found.process.wait(90) == 0


# --- refused before anything starts ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in Ray Serve's own use of pydantic
@pytest.mark.parametrize(
    ("told", "words"),
    [
        (TimeoutError("late"), "late"), ([], "0 versions"), ([("a", None), ("b", None)], "2 versions"),
        ([("a", "It is cut off.")], "Version a goes on answering"),
    ],
)  # fmt: skip
def test_a_reload_that_fails_does_not_end_the_endpoint(told: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnx_deploy.core.errors import CnxDeployError
    from cnx_deploy.serving import serve

    def answer(*given: Any) -> Any:
        if isinstance(told, Exception):
            raise told
        return told

    monkeypatch.setattr(serve, "_of_all", answer)
    serving = serve.Serving("http://127.0.0.1:1", "net", "a", contextlib.ExitStack())
    with pytest.raises(CnxDeployError, match=words):
        serving.reload()
    assert serving.version == "a"


def test_an_address_that_others_reach_needs_a_token(artifact: Path) -> None:
    from cnx_deploy.core.errors import InputError

    with pytest.raises(InputError, match="CNX_DEPLOY_TOKEN"):
        cnx.serve(artifact, host="0.0.0.0")


def test_a_port_that_is_taken_is_refused(artifact: Path) -> None:
    from cnx_deploy.core.errors import InputError

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="Nothing can listen"):
            cnx.serve(artifact, port=taken.getsockname()[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": 0}, "replicas must be from 1"), ({"port": 70_000}, "from 0 to 65535"),
        ({"max_batch": 0}, "max_batch must be at least 1"), ({"max_megabytes": float("inf")}, "and finite, got inf"),
        ({"timeout_s": float("nan")}, "timeout_s must be"),
        ({"token": "short"}, "8 to 512 characters"), ({"thread": 1}, "no option 'thread'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_are_refused(artifact: Path, options: dict[str, Any], words: str) -> None:
    from cnx_deploy.core.errors import InputError

    with pytest.raises(InputError, match=words):
        cnx.serve(artifact, **options)


def test_a_file_that_does_not_open_starts_nothing(tmp_path: Path) -> None:
    from cnx_deploy.core.errors import CnxDeployError

    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(CnxDeployError):
        cnx.serve(tmp_path / "net.onnx", port=0)
    ray = sys.modules.get("ray")
    assert ray is None or not ray.is_initialized()
