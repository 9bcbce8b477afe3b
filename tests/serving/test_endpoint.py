"""The endpoint behind uvicorn: its answers are `predict`'s, and every request that does not fit gets a sentence."""

import base64
import contextlib
import io
import json
import os
import socket
import struct
import subprocess
import threading
import time
import tracemalloc
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cnx_deploy as cnx
from tests.support.http_server import Answer, Server, running

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")
pytestmark = pytest.mark.ray

NAME = "tiny-test-32-fp32"
INFER = f"/v2/models/{NAME}/infer"
OUTPUTS = ("logits", "embedding", "class-maps")


def picture(
    seed: int = 0, kind: str = "JPEG", size: tuple[int, int] = (60, 40), mode: str = "RGB", **save: Any
) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size).convert(mode).save(stream, kind, **save)
    return stream.getvalue()


def behind_lengths(files: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(file)) + file for file in files)


def request_of(tensor: dict[str, Any], tail: bytes = b"", **more: Any) -> tuple[bytes, dict[str, str]]:
    head = json.dumps({"inputs": [tensor], **more}).encode()
    return head + tail, {"Inference-Header-Content-Length": str(len(head))} if tail else {}


def of_files(files: list[bytes], **more: Any) -> tuple[bytes, dict[str, str]]:
    tail = behind_lengths(files)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(files)]}
    return request_of({**tensor, "parameters": {"binary_data_size": len(tail)}}, tail, **more)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    words: dict[str, Any] = {"image_size": 32, "num_classes": 10, "batch": (1, 4, 8), "outputs": OUTPUTS}
    return cnx.export("tiny-test", precision="fp32", output_dir=folder, **words).path


@pytest.fixture(scope="module")
def endpoint(artifact: Path) -> Iterator[Any]:
    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec

    made = Endpoint(EndpointSpec(artifact=artifact, max_megabytes=2.0, max_queue=16, timeout_s=1.0))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(endpoint: Any) -> Iterator[Server]:
    with running(endpoint) as found:
        yield found


@pytest.fixture(scope="module")
def model(artifact: Path) -> Iterator[Any]:
    with cnx.load(artifact) as opened:
        yield opened


# --- the same answers as `predict` ------------------------------------------------------------------------------------

KINDS = {
    "jpeg": picture(),
    "png": picture(kind="PNG"),
    "webp": picture(kind="WEBP"),
    "palette": picture(kind="PNG", mode="P"),
    "grey": picture(kind="PNG", mode="L"),
    "cmyk": picture(mode="CMYK"),
    "turned": picture(exif=Image.Exif()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_upload_gets_predicts_answer(server: Server, model: Any, kind: str) -> None:
    answer = server.post("/v1/classify?top=3", KINDS[kind], content_type="image/jpeg")
    (row,) = answer.json["predictions"]
    expected = model.predict(KINDS[kind], top=3)
    assert answer.status == 200
    assert row["scores"] == list(expected.to_dict()["scores"])
    assert (row["text"], row["error"]) == (str(expected), None)


def test_logits_and_embeddings_of_files_are_those_of_predict_bit_for_bit(server: Server, model: Any) -> None:
    files = [picture(seed) for seed in range(5)]
    body, headers = of_files(files, parameters={"binary_data_output": True}, id="five")
    answer = server.ask("POST", INFER, body, headers)
    head = int(answer.headers["inference-header-content-length"])
    document, at = json.loads(answer.body[:head]), head
    expected = model.outputs(files)
    assert (document["model_name"], document["id"]) == (NAME, "five")
    assert [output["name"] for output in document["outputs"]] == ["logits", "embedding", "class_maps"]
    for output in document["outputs"]:
        size = output["parameters"]["binary_data_size"]
        values = np.frombuffer(answer.body[at : at + size], "<f4").reshape(output["shape"])
        assert np.array_equal(values, expected[output["name"]].numpy())
        at += size
    assert at == len(answer.body)


def test_a_file_as_the_whole_body_and_as_base64_give_the_same_numbers(server: Server, model: Any) -> None:
    file = picture(3)
    whole = server.post(INFER, file, Inference_Header_Content_Length="0")
    text = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}}
    coded = server.post(INFER, {"inputs": [{**text, "data": [base64.b64encode(file).decode()]}],
                                "outputs": [{"name": "embedding"}]})  # fmt: skip
    expected = model.outputs(file)
    logits, embedding, _ = whole.json["outputs"]
    assert logits["data"] == expected["logits"].flatten().tolist()
    assert coded.json["outputs"] == [{**embedding, "data": expected["embedding"].flatten().tolist()}]


def test_the_networks_own_input_is_taken_as_json_and_as_binary(server: Server, model: Any) -> None:
    pixels = np.random.default_rng(1).random((2, 3, 32, 32), dtype=np.float32)
    tensor = {"name": "images", "datatype": "FP32", "shape": [2, 3, 32, 32]}
    flat = server.post(INFER, {"inputs": [{**tensor, "data": pixels.ravel().tolist()}]})
    nested = server.post(INFER, {"inputs": [{**tensor, "data": pixels.tolist()}]})
    body, headers = request_of({**tensor, "parameters": {"binary_data_size": pixels.nbytes}}, pixels.tobytes())
    binary = server.ask("POST", INFER, body, headers)
    import torch

    expected = model.runner.run(torch.from_numpy(pixels))["logits"].flatten().tolist()
    assert [answer.json["outputs"][0]["data"] for answer in (flat, nested, binary)] == [expected] * 3


def test_several_files_of_a_form_are_answered_each_with_its_name(server: Server) -> None:
    parts = [("a.jpg", picture(1)), ("notes.txt", b"no picture"), ("b.png", picture(2, "PNG"))]
    body = b"".join(
        b'--X\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n\r\n%s\r\n' % (name.encode(), content)
        for name, content in parts
    )
    answer = server.post("/v1/classify", body + b"--X--\r\n", Content_Type="multipart/form-data; boundary=X")
    rows = answer.json["predictions"]
    assert [row["name"] for row in rows] == [name for name, _ in parts]
    assert [row["error"] is None for row in rows] == [True, False, True]
    assert len(rows[0]["scores"]) == 5
    assert "cannot be read as an image" in rows[1]["error"]


def test_class_maps_have_the_logit_as_their_mean_and_the_crop_is_where_the_network_looks(
    server: Server, model: Any
) -> None:
    file = picture(4)
    (row,) = server.post("/v1/classify?maps=2", file).json["predictions"]
    logits = model.outputs(file)["logits"][0]
    assert [one["index"] for one in row["maps"]] == [score["index"] for score in row["scores"][:2]]
    for one in row["maps"]:
        assert np.mean(one["values"]) == pytest.approx(float(logits[one["index"]]), abs=1e-3)
    left, top, width, height = row["crop"]
    assert (width, left + width / 2) == (pytest.approx(height), pytest.approx(30, abs=1))  # the middle of 60x40
    assert top + height / 2 == pytest.approx(20, abs=1)


def test_without_a_wish_there_are_no_maps(server: Server) -> None:
    (row,) = server.post("/v1/classify", picture()).json["predictions"]
    assert not row.keys() & {"maps", "crop"}


# --- health, metadata, metrics ----------------------------------------------------------------------------------------


def test_health_and_metadata_are_the_protocols(server: Server, artifact: Path) -> None:
    from cnx_deploy.core.files import sha256_of_file

    version = sha256_of_file(artifact)[:12]
    paths = (
        "/v2/health/live",
        "/v2/health/ready",
        f"/v2/models/{NAME}/ready",
        f"/v2/models/{NAME}/versions/{version}/ready",
    )
    assert [server.get(path).status for path in paths] == [200] * 4
    assert server.get("/v2").json["extensions"] == ["binary_tensor_data"]
    found = server.get(f"/v2/models/{NAME}").json
    assert (found["name"], found["versions"]) == (NAME, [version])
    assert found["inputs"] == [
        {"name": "image", "datatype": "BYTES", "shape": [-1]},
        {"name": "images", "datatype": "FP32", "shape": [-1, 3, 32, 32]},
    ]
    assert [(each["name"], each["shape"]) for each in found["outputs"]] == [
        ("logits", [-1, 10]), ("embedding", [-1, 64]), ("class_maps", [-1, 10, 1, 1]),
    ]  # fmt: skip
    assert "random" in found["parameters"]["notes"][0]


def test_metrics_count_requests_batches_and_errors(server: Server) -> None:
    def value(text: str, name: str) -> float:
        return next((float(line.split()[-1]) for line in text.splitlines() if line.startswith(name)), 0.0)

    asked = [f'cnx_requests_total{{endpoint="classify",status="{status}"}}' for status in (200, 400)]
    counted = (*asked, "cnx_batch_images_count", 'cnx_request_seconds_count{endpoint="classify"}')
    before = server.get("/metrics").body.decode()
    server.post("/v1/classify", picture())
    server.post("/v1/classify", b"no picture")
    after = server.get("/metrics").body.decode()
    assert [value(after, name) - value(before, name) for name in counted] == [1, 1, 2, 2]
    assert value(after, "cnx_model{") == 1


def test_a_client_that_leaves_is_counted_as_such_and_not_as_an_error_of_the_server(endpoint: Any) -> None:
    import asyncio

    from starlette.requests import Request

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def scenario() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], "query_string": b""}
        answering = asyncio.ensure_future(endpoint.answer(Request(scope, receive)))
        await asyncio.sleep(0.01)
        answering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answering

    asyncio.run(scenario())
    text = endpoint._metrics.text().decode()
    assert 'cnx_requests_total{endpoint="classify",status="499"} 1.0' in text
    assert 'status="500"' not in text


def test_of_a_replica_that_died_no_images_wait(tmp_path: Path) -> None:
    from prometheus_client.mmap_dict import MmapedDict

    from cnx_deploy.serving.endpoint import _Metrics

    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid()):
        MmapedDict(str(tmp_path / f"gauge_livesum_{pid}.db")).close()
    metrics = _Metrics()
    metrics._folder = str(tmp_path)
    metrics.text()
    assert [path.name for path in tmp_path.iterdir()] == [f"gauge_livesum_{os.getpid()}.db"]


def test_eight_clients_share_batches(server: Server) -> None:
    def images_and_batches() -> tuple[float, float]:
        lines = server.get("/metrics").body.decode().splitlines()
        values = {line.split()[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}
        return values["cnx_batch_images_sum"], values["cnx_batch_images_count"]

    images, batches = images_and_batches()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: server.post("/v1/classify", picture(seed)), range(64)))
    assert [answer.status for answer in answers] == [200] * 64
    after = images_and_batches()
    assert after[0] - images == 64
    assert after[1] - batches < 40


# --- requests that do not fit -----------------------------------------------------------------------------------------

FLOATS = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32]}
FILES = {"name": "image", "datatype": "BYTES", "shape": [1]}
BINARY = {"parameters": {"binary_data_size": 12}}
DATA = {"data": [0.5] * 3072}
WRONG: dict[str, tuple[Any, str]] = {
    "no-json": (b"{", "no request of the Open Inference Protocol"),
    "not-utf8": (b'{"inputs": "\xff"}', "no request of the Open Inference Protocol"),
    "deep": (b"[" * 100_000, "no request of the Open Inference Protocol"),
    "a-list": ([], "no request of the Open Inference Protocol"),
    "no-inputs": ({}, "missing required field `inputs`"),
    "empty-inputs": ({"inputs": []}, "has 0 inputs"),
    "two-inputs": ({"inputs": [FILES, FILES]}, "has 2 inputs"),
    "unknown-name": ({"inputs": [{**FLOATS, **DATA, "name": "pixels"}]}, "no input 'pixels'"),
    "wrong-type": ({"inputs": [{**FLOATS, **DATA, "datatype": "UINT8"}]}, "FP32, not 'UINT8'"),
    "unknown-type": ({"inputs": [{**FLOATS, **DATA, "datatype": "COMPLEX"}]}, "FP32, not 'COMPLEX'"),
    "no-data": ({"inputs": [FLOATS]}, "neither data nor"),
    "short-data": ({"inputs": [{**FLOATS, "data": [0.5] * 3071}]}, "expected 3072 numbers"),
    "ragged": ({"inputs": [{**FLOATS, "data": [[0.5], [0.5, 0.5]]}]}, "expected 3072 numbers"),
    "ragged-deep": ({"inputs": [{**FLOATS, "data": [[[0.5, 0.5]], [[0.5], [0.5]]]}]}, "expected 3072 numbers"),
    "texts": ({"inputs": [{**FLOATS, "data": ["a"] * 3072}]}, "expected 3072 numbers"),
    "truths": ({"inputs": [{**FLOATS, "data": [True] * 3072}]}, "expected 3072 numbers"),
    "nan": (b'{"inputs": [{"name": "images", "datatype": "FP32", "shape": [1], "data": [NaN]}]}', "no request"),
    "too-large-number": ({"inputs": [{**FLOATS, "data": [1e39] * 3072}]}, "reach beyond FP32"),
    "endless-number": ({"inputs": [{**FLOATS, "data": [10**400] * 3072}]}, "reach beyond FP32"),
    "negative-side": ({"inputs": [{**FLOATS, **DATA, "shape": [-1, 3, 32, 32]}]}, "has shape"),
    "no-images": ({"inputs": [{**FLOATS, "data": [], "shape": [0, 3, 32, 32]}]}, "has shape"),
    "too-few-axes": ({"inputs": [{**FLOATS, **DATA, "shape": [3, 32, 32]}]}, "has shape"),
    "other-size": ({"inputs": [{**FLOATS, **DATA, "shape": [1, 3, 32, 33]}]}, "has shape"),
    "huge-shape": ({"inputs": [{**FLOATS, **DATA, "shape": [4_000_000_000, 3, 32, 32]}]}, "expected"),
    "huger-shape": ({"inputs": [{**FLOATS, **DATA, "shape": [10**30, 3, 32, 32]}]}, ""),
    "a-fraction": ({"inputs": [{**FLOATS, **DATA, "shape": [1.5, 3, 32, 32]}]}, "no request"),
    "binary-size": ({"inputs": [{**FILES, **BINARY}]}, "0 bytes follow"),
    "both": ({"inputs": [{**FILES, **BINARY, "data": ["a"]}]}, "both data"),
    "plain-text": ({"inputs": [{**FILES, "data": ["a"]}]}, "base64"),
    "no-base64": ({"inputs": [{**FILES, "data": ["ä"], "parameters": {"content_type": "base64"}}]}, "no base64"),
    "shared-memory": (
        {"inputs": [{**FILES, "parameters": {"shared_memory_region": "a"}}]}, "'shared_memory_region' of the input",
    ),
    "classification": (
        {"inputs": [{**FLOATS, **DATA}], "outputs": [{"name": "logits", "parameters": {"classification": 3}}]},
        "/v1/classify",
    ),
    "unknown-output": ({"inputs": [{**FLOATS, **DATA}], "outputs": [{"name": "boxes"}]}, "no output 'boxes'"),
    "output-twice": ({"inputs": [{**FLOATS, **DATA}], "outputs": [{"name": "logits"}] * 2}, "twice"),
    "a-switch": ({"inputs": [{**FLOATS, **DATA}], "parameters": {"binary_data_output": 1}}, "true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_does_not_fit_is_a_400_with_a_sentence(server: Server, case: str) -> None:
    body, words = WRONG[case]
    answer = server.post(INFER, body)
    assert answer.status == 400
    assert words in answer.error


def test_a_long_text_among_numbers_takes_no_memory() -> None:
    """NumPy makes every text of an array as long as the longest."""
    from cnx_deploy.core.errors import InputError
    from cnx_deploy.serving.open_inference import Declared, read_request

    body = json.dumps({"inputs": [{**FLOATS, "data": ["a" * 10_000, *["a"] * 3071]}]}).encode()
    tracemalloc.start()
    with pytest.raises(InputError, match="expected 3072 numbers"):
        read_request(body, None, (Declared("images", "FP32", (-1, 3, 32, 32)),), ("logits",))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize(
    ("header", "words"),
    [("x", "expected a number"), ("-1", "expected a number"), ("999999", "the body has"), ("9" * 5000, "the body has")],
)
def test_a_wrong_length_of_the_json_is_a_400(server: Server, header: str, words: str) -> None:
    answer = server.post(INFER, {"inputs": []}, Inference_Header_Content_Length=header)
    assert (answer.status, words in answer.error) == (400, True)


@pytest.mark.parametrize(
    ("tail", "count"),
    [(b"\1\0\0", 1), (b"\xff\xff\xff\xff", 1), (behind_lengths([b"a"]), 2), (behind_lengths([b"a", b"b"]), 1)],
)
def test_a_tensor_of_files_that_is_cut_is_a_400(server: Server, tail: bytes, count: int) -> None:
    tensor = {**FILES, "shape": [count], "parameters": {"binary_data_size": len(tail)}}
    body, headers = request_of(tensor, tail)
    answer = server.ask("POST", INFER, body, headers)
    assert (answer.status, "behind its length" in answer.error) == (400, True)


BROKEN = {
    "empty": b"",
    "text": b"hello, world",
    "truncated": picture(size=(600, 400))[:-2000],
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_picture_is_a_400(server: Server, case: str) -> None:
    for answer in (
        server.post("/v1/classify", BROKEN[case]),
        server.post(INFER, BROKEN[case], Inference_Header_Content_Length="0"),
    ):
        assert answer.status == 400
        assert "cannot be read as an image" in answer.error
        assert "object at" not in answer.error


@pytest.mark.parametrize(("side", "words"), [(10_000, "limit 89000000"), (30_000, "bomb")])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(server: Server, side: int, words: str) -> None:
    stream = io.BytesIO()
    Image.new("1", (side, side)).save(stream, "PNG")
    assert len(stream.getvalue()) < 1_000_000
    started = time.perf_counter()
    answer = server.post("/v1/classify", stream.getvalue())
    assert (answer.status, words in answer.error) == (400, True)
    assert time.perf_counter() - started < 5


def test_a_broken_picture_hurts_only_its_own_request(server: Server) -> None:
    bodies = [picture(seed) if seed % 3 else b"no picture" for seed in range(24)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda body: server.post("/v1/classify", body).status, bodies))
    assert answers == [200 if seed % 3 else 400 for seed in range(24)]


def test_a_body_above_the_limit_is_a_413_with_and_without_its_length(server: Server) -> None:
    assert server.post("/v1/classify", b"x" * 2_000_001).status == 413
    answer = server.ask("POST", "/v1/classify", (b"x" * 100_000 for _ in range(25)), {"Transfer-Encoding": "chunked"})
    assert (answer.status, "2,000,000 bytes" in answer.error) == (413, True)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404), ("GET", "/v2/models/other", 404), ("POST", "/v2/models/other/infer", 404),
        ("GET", f"/v2/models/{NAME}/versions/2", 404), ("GET", "/v1/classify", 405), ("DELETE", "/v2", 405),
        ("PATCH", INFER, 405), ("GET", "/v2/models/%2e%2e%2f", 404),
    ],
)  # fmt: skip
def test_what_is_not_there_is_a_404_and_a_wrong_method_a_405(
    server: Server, method: str, path: str, status: int
) -> None:
    answer = server.ask(method, path)
    assert (answer.status, bool(answer.error), "?" in answer.error) == (status, True, False)


@pytest.mark.parametrize("query", ["top=0", "top=a", "top=-1", "maps=1.5", "top="])
def test_a_wrong_number_in_the_query_is_a_400(server: Server, query: str) -> None:
    assert "whole number from 1" in server.post(f"/v1/classify?{query}", picture()).error


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b"x"), ("multipart/form-data; boundary=X", b"x"),
        ("multipart/form-data; boundary=X", b'--X\r\nContent-Disposition: form-data; name="a"\r\n\r\nb\r\n--X--\r\n'),
        ("multipart/form-data; boundary=X", b'--X\r\nContent-Disposition: form-data; name="a"; filename="b"\r\n\r\nb'),
    ],
)  # fmt: skip
def test_a_form_that_is_none_is_a_400(server: Server, kind: str, body: bytes) -> None:
    assert server.post("/v1/classify", body, Content_Type=kind).status == 400


def test_a_compressed_body_is_a_415(server: Server) -> None:
    assert server.post("/v1/classify", picture(), Content_Encoding="gzip").status == 415


def test_more_images_than_the_queue_holds_are_a_400(server: Server) -> None:
    body, headers = of_files([picture()] * 17)
    assert "1 to 16 images" in server.ask("POST", INFER, body, headers).error


def test_a_full_queue_is_a_503_that_says_when_to_come_back(endpoint: Any, server: Server) -> None:
    hold, go = threading.Event(), threading.Event()

    def wait() -> None:
        hold.set()
        assert go.wait(30)

    thread = endpoint._batcher._thread.submit(wait)
    assert hold.wait(10)
    with ThreadPoolExecutor(40) as pool:
        asked = [pool.submit(server.post, "/v1/classify", picture()) for _ in range(40)]
        while len(endpoint._batcher) < 16:
            time.sleep(0.01)
        assert "\ncnx_queue_images 16.0\n" in server.get("/metrics").body.decode()
        # At most 8 are in the batch that waits for the model, and 16 behind it.
        refused = [each.result() for _, each in zip(range(16), as_completed(asked, timeout=20), strict=False)]
        go.set()
        statuses = [each.result().status for each in asked]
    thread.result()
    assert {(answer.status, answer.headers["retry-after"]) for answer in refused} == {(503, "1")}
    assert "images wait already" in refused[0].error
    assert 17 <= statuses.count(200) <= 24
    assert statuses.count(200) + statuses.count(503) == 40
    assert server.post("/v1/classify", picture()).status == 200


FUZZED = (
    "/", "/v2", "/v2/", "/v2/health/live", "/v2/health/ready", "/v2/health", f"/v2/models/{NAME}",
    f"/v2/models/{NAME}/ready", INFER, f"/v2/models/{NAME}/versions/1/infer", "/v2/models//infer", "/v2/models/x/ready",
    "/v1/classify", "/v1/classify?top=3", "/v1/classify?top=\xff", "/v1/classify?maps=99", "/metrics", "/nowhere",
    "/%00", "/..%2f..%2fetc/passwd", "//", "/v2/repository/index",
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
TENSORS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["images", "image", "x"]) | VALUES,
        "datatype": st.sampled_from(["FP32", "BYTES", "UINT8"]) | VALUES,
        "shape": st.lists(st.integers(-2, 40), max_size=5) | st.just([1, 3, 32, 32]) | VALUES,
        "data": st.just([0.5] * 3072) | st.just(["a"]) | VALUES,
        "parameters": st.dictionaries(st.sampled_from(["binary_data_size", "content_type", "x"]), VALUES, max_size=2),
    },
)
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.lists(TENSORS, max_size=2) | VALUES,
        "outputs": st.lists(st.fixed_dictionaries({"name": st.sampled_from(["logits", "x"])}), max_size=2) | VALUES,
        "id": st.text(max_size=5) | VALUES,
        "parameters": VALUES,
    },
)
BODIES = st.one_of(
    st.binary(max_size=200),
    (REQUESTS | VALUES).map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=40).map(lambda noise: KINDS["jpeg"][:400] + noise),
    st.binary(max_size=60).map(lambda noise: b"--X\r\nContent-Disposition: form-data; filename=a\r\n\r\n" + noise),
    st.just(KINDS["jpeg"]),
)
HEADERS = st.dictionaries(
    st.sampled_from(
        ["Content-Type", "Inference-Header-Content-Length", "Content-Encoding", "Authorization", "Accept", "X-Y"]
    ),
    st.sampled_from(
        ["application/json", "multipart/form-data; boundary=X", "multipart/form-data", "0", "5", "-1", "9e9"]
    )
    | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["Cc"]), max_size=12),
    max_size=3,
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"]), st.sampled_from(FUZZED), BODIES, HEADERS)
def test_random_requests_never_get_a_500_and_every_error_is_a_sentence(
    server: Server, method: str, path: str, body: bytes, headers: dict[str, str]
) -> None:
    answer = server.ask(method, urllib.parse.quote(path, safe="/%?=&"), body, headers)
    assert answer.status < 500
    if answer.status >= 400 and method != "HEAD" and answer.headers["content-type"] == "application/json":
        assert answer.error
    if answer.headers["content-type"] == "application/json" and answer.body:
        assert answer.json is not None


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200) | st.binary(max_size=80).map(lambda noise: HEAD + noise))
def test_random_bytes_in_place_of_http_leave_the_server_up(server: Server, text: bytes) -> None:
    with opened(server, text) as connection:
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(5)
        with contextlib.suppress(OSError):
            connection.recv(4096)
    assert server.get("/v2/health/ready").status == 200


# --- slow clients and those that leave --------------------------------------------------------------------------------


def opened(server: Server, text: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(text)
    return connection


HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n"


def test_a_body_that_does_not_come_is_a_408_and_the_connection_ends(server: Server) -> None:
    started = time.monotonic()
    with opened(server, HEAD + b"x" * 10) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"10 bytes did" in answer
    assert 0.9 < time.monotonic() - started < 15


def test_clients_that_stall_or_leave_do_not_hold_up_others(server: Server) -> None:
    stalled = [opened(server, text) for text in (HEAD, HEAD + b"x" * 10, b"POST /v1/cla", b"") for _ in range(10)]
    for connection in stalled[::2]:
        connection.close()
    started = time.monotonic()
    assert [server.post("/v1/classify", picture(seed)).status for seed in range(5)] == [200] * 5
    assert time.monotonic() - started < 5
    for connection in stalled[1::2]:
        connection.close()


def test_a_client_that_leaves_with_its_answer_under_way_changes_nothing(server: Server) -> None:
    file = picture()
    for _ in range(20):
        head = b"POST /v1/classify HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(file)
        opened(server, head + file).close()
    assert server.post("/v1/classify", file).status == 200


# --- NaN --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unsteady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A network that is finite for a black image and gives infinity, so NaN as probabilities, for a bright one."""
    import onnx
    from onnx import numpy_helper

    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec

    folder = tmp_path_factory.mktemp("unsteady")
    made = cnx.export("tiny-test", precision="fp32", image_size=32, num_classes=10, output_dir=folder).path
    graph = onnx.load(made)
    (output,) = graph.graph.output
    factor = numpy_helper.from_array(np.array([3e38], np.float32), "factor")
    # logits + mean of the pixels x 3e38 x 3e38: infinite unless the mean is 0.
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images", "axes"], ["brightness"], keepdims=0),
        onnx.helper.make_node("Mul", ["brightness", "factor"], ["large"]),
        onnx.helper.make_node("Mul", ["large", "factor"], ["larger"]),
        onnx.helper.make_node("Unsqueeze", ["larger", "last"], ["column"]),
        onnx.helper.make_node("Add", ["plain", "column"], [output.name]),
    ]
    for node in graph.graph.node:
        node.output[:] = ["plain" if name == output.name else name for name in node.output]
    constants = {"axes": [1, 2, 3], "last": [1]}
    graph.graph.initializer.extend(
        [factor, *(numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items())]
    )
    graph.graph.node.extend(nodes)
    path = folder / "unsteady.onnx"
    onnx.save(graph, path)
    made = Endpoint(EndpointSpec(artifact=path, max_wait_ms=100.0))
    with running(made) as server:
        yield server
    made.close()


def test_nan_in_an_answer_is_a_500_with_a_sentence_and_never_in_json(unsteady: Server) -> None:
    black = picture_of(0)
    assert unsteady.post("/v1/classify", black).status == 200
    for answer in (
        unsteady.post("/v1/classify", picture_of(200)),
        unsteady.post("/v2/models/unsteady/infer", picture_of(200), Inference_Header_Content_Length="0"),
    ):
        assert (answer.status, "not finite" in answer.error) == (500, True)
    assert unsteady.get("/v2/health/ready").status == 200


def test_nan_of_one_image_of_a_batch_is_the_error_of_its_request_alone(unsteady: Server) -> None:
    levels = [0, 200, 0, 200, 0, 0, 0, 0]
    with ThreadPoolExecutor(8) as pool:
        answers: list[Answer] = list(pool.map(lambda level: unsteady.post("/v1/classify", picture_of(level)), levels))
    assert [answer.status for answer in answers] == [500 if level else 200 for level in levels]


def picture_of(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (32, 32), (level,) * 3).save(stream, "PNG")
    return stream.getvalue()


# --- the token --------------------------------------------------------------------------------------------------------


def test_with_a_token_only_health_and_the_page_are_open(artifact: Path) -> None:
    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec, hashed_token

    made = Endpoint(EndpointSpec(artifact=artifact, token_sha256=hashed_token("correct-horse")))
    with running(made) as server:
        assert [server.get(path).status for path in ("/", "/v2/health/live", "/v2/health/ready")] == [200] * 3
        closed = ("/v2", f"/v2/models/{NAME}", "/metrics")
        for words in ("", "Bearer", "Bearer wrong-horse", "Basic correct-horse", "Bearer ü"):
            headers = {"Authorization": words.encode().decode("latin-1")} if words else {}
            assert {server.ask("GET", path, headers=headers).status for path in closed} == {401}
            assert server.ask("POST", "/v1/classify", picture(), headers).status == 401
        assert [server.get(path, Authorization="Bearer correct-horse").status for path in closed] == [200] * 3
        assert server.post("/v1/classify", picture(), Authorization="bearer correct-horse").status == 200
    made.close()


@pytest.mark.parametrize("token", ["", "short", "with space 1", "ümlaut-token", "x" * 513])
def test_a_token_that_no_header_can_carry_is_refused(token: str) -> None:
    from cnx_deploy.core.errors import InputError
    from cnx_deploy.serving.endpoint import hashed_token

    with pytest.raises(InputError, match="8 to 512 characters"):
        hashed_token(token)


# --- a new version ----------------------------------------------------------------------------------------------------


def test_a_corrupt_new_version_is_refused_and_the_earlier_one_answers(artifact: Path, tmp_path: Path) -> None:
    import asyncio
    import shutil

    from cnx_deploy.core.errors import ArtifactError
    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec

    for name in (artifact.name, artifact.with_suffix(".json").name):
        shutil.copy(artifact.parent / name, tmp_path / name)
    path = tmp_path / artifact.name
    made = Endpoint(EndpointSpec(artifact=path))
    with running(made) as server:
        before = server.post("/v1/classify", picture()).json
        content = path.read_bytes()
        path.write_bytes(content[:-100] + bytes(100))
        with pytest.raises(ArtifactError):
            asyncio.run(made.reload())
        after = server.post("/v1/classify", picture()).json
        assert (after["version"], after["predictions"]) == (before["version"], before["predictions"])
        assert 'cnx_reloads_total{result="refused"} 1.0' in server.get("/metrics").body.decode()
        words: dict[str, Any] = {"image_size": 32, "num_classes": 10, "seed": 5, "force": True, "output_dir": tmp_path}
        cnx.export("tiny-test", precision="fp32", batch=(1, 4, 8), **words)
        version = asyncio.run(made.reload())
        new = server.post("/v1/classify", picture()).json
        assert (new["version"], version != before["version"]) == (version, True)
        assert new["predictions"] != before["predictions"]
        with cnx.load(path) as opened:
            assert new["predictions"][0]["scores"] == list(opened.predict(picture()).to_dict()["scores"])
        assert made._batcher.max_batch == 8
        cnx.export("tiny-test", precision="fp32", batch=(1, 2, 2), **words)
        asyncio.run(made.reload())
        assert made._batcher.max_batch == 2
    made.close()


def test_a_model_that_fails_its_warm_up_is_freed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnx_deploy.core.errors import CheckFailedError
    from cnx_deploy.serving import endpoint
    from cnx_deploy.verification.predict import Model

    def fail(*words: Any) -> Any:
        raise CheckFailedError("not finite")

    freed = list[Any]()
    monkeypatch.setattr(endpoint, "outputs_of_pixels", fail)
    monkeypatch.setattr(Model, "__exit__", lambda self, *words: freed.append(self))
    with pytest.raises(CheckFailedError):
        endpoint.Endpoint(endpoint.EndpointSpec(artifact=artifact))
    assert len(freed) == 1


def test_requests_that_run_while_a_version_changes_are_all_answered(endpoint: Any, server: Server) -> None:
    import asyncio

    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(server.post, "/v1/classify", picture(seed)) for seed in range(100)]
        for _ in range(3):
            asyncio.run(endpoint.reload())
        assert {each.result().status for each in asked} == {200}
