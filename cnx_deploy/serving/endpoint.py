"""The served endpoint without a cluster: an ASGI application in front of one model, on Starlette.

It speaks the Open Inference Protocol (`open_inference`), takes an uploaded picture under /v1/classify, and has health,
metrics and a page. Pictures come as bytes and go the way that `predict` takes, so their pixels are the same.
`serving.serve` runs it on Ray Serve.
"""

import asyncio
import contextlib
import hashlib
import hmac
import json
import math
import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cnx_deploy import __version__
from cnx_deploy.core.errors import CnxDeployError, InputError
from cnx_deploy.core.files import sha256_of_file
from cnx_deploy.core.image_size import sides
from cnx_deploy.data import GivenImages
from cnx_deploy.data.preprocessing import placement
from cnx_deploy.model.source_config import weights_in
from cnx_deploy.model.tasks.base import Prediction
from cnx_deploy.serving.batching import Batcher, QueueFullError
from cnx_deploy.serving.open_inference import DATATYPES, HEADER_LENGTH, Declared, answer_of, read_request
from cnx_deploy.verification.inspect import recorded_artifact
from cnx_deploy.verification.predict import Model, open_predictor, outputs_of_images, outputs_of_pixels, predict_images

__all__ = ["Endpoint", "EndpointSpec", "hashed_token"]

ENCODED, RAW = "image", "images"
"""The two inputs of the protocol's requests, as `package triton` names them: files, or what the network takes."""
CLASS_MAPS = "class_maps"
LEFT = 499
"""The status of a request whose client left before its answer, as nginx counts it."""
SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'; base-uri 'none'"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSpec:
    """How one replica answers.

    `max_batch` images go through the model at once, cut to what it takes; the first of them waits `max_wait_ms` for
    others; `max_queue` images wait at most. A request has at most `max_megabytes` (1e6 bytes) and has to be there
    after `timeout_s` seconds. `token_sha256`: see `hashed_token`; None asks for none. `threads` None is all
    processors. `model_options` are those of `predict.open_predictor`.
    """

    artifact: Path
    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_megabytes: float = 32.0
    timeout_s: float = 30.0
    token_sha256: str | None = None
    threads: int | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"max_batch": 1, "max_queue": 1, "max_wait_ms": 0, "max_megabytes": 1e-3, "timeout_s": 1e-3}
        for name, limit in least.items():
            if not limit <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least {limit:g} and finite, got {getattr(self, name)}.")


def hashed_token(token: str) -> str:
    """What a replica keeps of a token: its SHA-256. Raises InputError for one that no header can carry."""
    if not re.fullmatch(r"[!-~]{8,512}", token):
        raise InputError("A token has 8 to 512 characters of ASCII, without spaces.")
    return hashlib.sha256(token.encode()).hexdigest()


class _HttpError(Exception):
    """An answer other than 200: its status, a sentence, and headers."""

    def __init__(self, status: int, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass(frozen=True, slots=True)
class _Served:
    """A model that answers, under its name and version. The version is the beginning of the file's SHA-256."""

    model: Model
    name: str
    version: str
    max_batch: int
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]


@dataclass(frozen=True, slots=True)
class _Picture:
    """The file of a picture, and what is asked of it; `maps` best classes get their class maps."""

    content: bytes
    top: int | None = None
    maps: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one image got: outputs without the batch's axis, and of a picture the task's prediction."""

    served: _Served
    outputs: Mapping[str, np.ndarray]
    prediction: Prediction | None = None
    crop: tuple[float, float, float, float] | None = None


Handler = Callable[["Endpoint", Request, Mapping[str, str]], Awaitable[Response]]


class Endpoint:
    """One model behind HTTP; an ASGI application.

    The model is opened and warmed up, with one image and with a whole batch, before the constructor returns. Raises
    what `open_predictor` raises, and CheckFailedError for a model whose answer to a black image is not finite.
    """

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self._served = self._open()
        self._batcher: Batcher[Any, _Answer] = Batcher(
            self._run,
            max_batch=self._served.max_batch,
            max_wait_ms=spec.max_wait_ms,
            max_queue=spec.max_queue,
            told=self._ran,
        )
        self._metrics = _Metrics()
        self.is_ready = True
        self._metrics.model.labels(self._served.name, self._served.version).set(1)

    @property
    def name(self) -> str:
        """What the model is called: the stem of its file."""
        return self._served.name

    @property
    def version(self) -> str:
        """The beginning of the file's SHA-256."""
        return self._served.version

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed of the model, a sentence each."""
        return self._served.model.notes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application, for any server of such; Ray Serve calls `answer`."""
        if scope["type"] == "http":
            await (await self.answer(Request(scope, receive)))(scope, receive, send)

    async def answer(self, request: Request) -> Response:
        """Answer one request; whatever is wrong with it is an answer too, {"error": …} with a status of 4xx."""
        started, name, status = time.perf_counter(), "other", 500
        try:
            name, handler, words = _route(request)
            response = await self._checked(name, handler, request, words)
            status = response.status_code
        except _HttpError as error:
            status, response = error.status, _json(error.status, {"error": str(error)}, error.headers)
        except asyncio.CancelledError:
            status = LEFT
            raise
        finally:
            self._metrics.requests.labels(name, str(status)).inc()
            self._metrics.seconds.labels(name).observe(time.perf_counter() - started)
        return response

    async def reload(self) -> str:
        """Open the artifact's file anew and take it from the next batch on; its version.

        Raises what the constructor raises for a file that cannot be opened, or fails its warm-up: the earlier one goes
        on.
        """
        try:
            served = await asyncio.to_thread(self._open)
        except Exception:
            self._metrics.reloads.labels("refused").inc()
            raise

        def take() -> None:
            earlier, self._served = self._served, served
            self._batcher.max_batch = served.max_batch
            earlier.model.__exit__(None, None, None)
            self._metrics.model.labels(earlier.name, earlier.version).set(0)
            self._metrics.model.labels(served.name, served.version).set(1)

        await self._batcher.in_thread(take)
        self._metrics.reloads.labels("taken").inc()
        return served.version

    def close(self) -> None:
        """Free the model once its batch is done."""
        self._batcher.close()
        self._served.model.__exit__(None, None, None)

    def _open(self) -> _Served:
        spec = self.spec
        file = weights_in(spec.artifact) if spec.artifact.is_dir() else spec.artifact
        with contextlib.ExitStack() as held:
            opened = open_predictor(spec.artifact, many=True, threads=spec.threads, **spec.model_options)
            model = held.enter_context(opened)
            recorded = recorded_artifact(file)
            version = (recorded.sha256 if recorded is not None else sha256_of_file(file))[:12]
            takes = model.runner.input_spec
            max_batch = min(spec.max_batch, takes.max_batch or spec.max_batch)
            for batch in (max_batch, 1):  # memory for the largest, then one
                black = torch.zeros((batch, *sides(model.preprocessing.image_size), takes.in_chans), dtype=torch.uint8)
                outputs = outputs_of_pixels(model, black, "a black image")
            held.pop_all()  # it stays open
        given = tuple(
            Declared(name, DATATYPES[array.numpy().dtype.name], (-1, *array.shape[1:]))
            for name, array in outputs.items()
        )
        open_sides = (-1, -1) if takes.size_range is not None else sides(takes.image_size)
        is_bytes = takes.kind == "uint8"
        shape = (-1, *open_sides, takes.in_chans) if is_bytes else (-1, takes.in_chans, *open_sides)
        taken = Declared(ENCODED, "BYTES", (-1,)), Declared(RAW, "UINT8" if is_bytes else "FP32", shape)
        return _Served(model, spec.artifact.stem, version, max_batch, taken, given)

    def _run(self, items: Sequence[Any]) -> list[_Answer | Exception]:
        """Answer a batch, in the model's thread: pictures that are asked for the same, and tensors of one shape."""
        served, answers = self._served, dict[int, _Answer | Exception]()
        groups: dict[Any, list[int]] = {}
        for at, item in enumerate(items):
            groups.setdefault(item.top if isinstance(item, _Picture) else item.shape, []).append(at)
        for places in groups.values():
            chosen = [items[at] for at in places]
            run = _run_pictures if isinstance(chosen[0], _Picture) else _run_tensors
            answers |= zip(places, run(served, chosen), strict=True)
        return [answers[at] for at in range(len(items))]

    def _ran(self, size: int, seconds: float) -> None:
        self._metrics.batches.observe(size)
        self._metrics.runs.observe(seconds)
        self._metrics.queue.set(len(self._batcher))

    async def _checked(self, name: str, handler: Handler, request: Request, words: Mapping[str, str]) -> Response:
        """Let a request in, and turn what is wrong with it into an answer."""
        if name not in ("page", "live", "ready"):
            self._check_token(request)
        if words.get("model") not in (None, self._served.name):
            raise _HttpError(404, f"No model is called {words['model']!r:.80}: expected {self._served.name}.")
        if words.get("version") not in (None, self._served.version):
            raise _HttpError(
                404, f"{self._served.name} has no version {words['version']!r:.80}: expected {self._served.version}."
            )
        try:
            return await handler(self, request, words)
        except QueueFullError as error:
            raise _HttpError(503, f"{error} Ask again in a second.", retry_after="1") from error
        except InputError as error:
            raise _HttpError(400, str(error)) from error
        except CnxDeployError as error:
            raise _HttpError(500, str(error)) from error

    def _check_token(self, request: Request) -> None:
        expected = self.spec.token_sha256
        if expected is None:
            return
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).hexdigest()
        if kind.lower() != "bearer" or not hmac.compare_digest(given, expected):
            raise _HttpError(
                401, "This endpoint asks for a token: send the header Authorization: Bearer TOKEN.",
                www_authenticate="Bearer",
            )  # fmt: skip

    async def _body(self, request: Request) -> bytes:
        """The whole body, unless it is too large or comes too slowly."""
        limit = int(self.spec.max_megabytes * 1e6)
        if (coding := request.headers.get("content-encoding", "identity")) != "identity":
            raise _HttpError(415, f"Bodies are not taken in the encoding {coding!r:.40}. Send it as it is.")
        length = request.headers.get("content-length", "0")
        too_large = _HttpError(413, f"A request may have {limit:,} bytes. Send fewer images at once, or smaller ones.")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise too_large
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(self.spec.timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > limit:
                        raise too_large
                    parts.append(part)
        except TimeoutError as error:
            raise _HttpError(
                408, f"The request did not come within {self.spec.timeout_s:g} seconds: {size} bytes did.",
                connection="close",
            ) from error  # fmt: skip
        except ClientDisconnect as error:
            raise _HttpError(LEFT, "The client left before its request was there.") from error
        return b"".join(parts)

    async def _submit(self, items: Sequence[Any], *, return_exceptions: bool = False) -> list[Any]:
        """An `_Answer` for each item, or, among them, the exception that it has in place of one."""
        if not 0 < len(items) <= self.spec.max_queue:
            raise InputError(f"A request has 1 to {self.spec.max_queue} images, not {len(items)}.")
        return await self._batcher.submit(items, return_exceptions=return_exceptions)

    # --- what is answered ---------------------------------------------------------------------------------------------

    async def page(self, request: Request, words: Mapping[str, str]) -> Response:
        """The page for a browser."""
        text = (resources.files("cnx_deploy.serving") / "page.html").read_bytes()
        headers = {"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer"}
        return _response(200, text, "text/html; charset=utf-8", headers)

    async def live(self, request: Request, words: Mapping[str, str]) -> Response:
        """The process answers, and its model is loaded: nothing answers before."""
        return _response(200, b"", "application/json")

    async def ready(self, request: Request, words: Mapping[str, str]) -> Response:
        """New requests are welcome: not once it is to stop."""
        if not self.is_ready:
            raise _HttpError(503, "The endpoint is about to stop.")
        return _response(200, b"", "application/json")

    async def server(self, request: Request, words: Mapping[str, str]) -> Response:
        """What the server is."""
        return _json(200, {"name": "cnx-deploy", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def metadata(self, request: Request, words: Mapping[str, str]) -> Response:
        """What the model takes and gives, and where it comes from."""
        served = self._served
        model, info = served.model, served.model.runner.info
        parameters = {"task": model.task.name, "arithmetic": info.arithmetic, "device": info.device}
        return _json(200, {
            "name": served.name, "versions": [served.version], "platform": f"cnx-deploy_{info.backend}",
            "inputs": [tensor.to_dict() for tensor in served.inputs],
            "outputs": [tensor.to_dict() for tensor in served.outputs],
            "parameters": {**parameters, "notes": list(model.notes)},
        })  # fmt: skip

    async def infer(self, request: Request, words: Mapping[str, str]) -> Response:
        """An inference request of the protocol."""
        body, served = await self._body(request), self._served
        names = [tensor.name for tensor in served.outputs]
        wanted = read_request(body, request.headers.get(HEADER_LENGTH), served.inputs, names)
        if isinstance(wanted.images, np.ndarray):
            items: list[Any] = list(wanted.images)
        else:
            items = [_Picture(content) for content in wanted.images]
        answers = await self._submit(items)
        outputs = {name: np.stack([answer.outputs[name] for answer in answers]) for name in answers[0].outputs}
        content, headers = answer_of(wanted, outputs, model=served.name, version=answers[-1].served.version)
        return _response(200, content, headers.pop("content-type"), headers)

    async def classify(self, request: Request, words: Mapping[str, str]) -> Response:
        """A plain upload: a picture as the body, or pictures as a form."""
        started = time.perf_counter()
        top, maps = _whole(request, "top"), _whole(request, "maps") or 0
        files = await self._files(request)
        pictures = [_Picture(content, top, maps) for _, content in files]
        # A single picture that cannot be read is a 400; of several each has its own error.
        answers = await self._submit(pictures, return_exceptions=len(files) > 1)
        rows = [_row(name, answer, maps) for (name, _), answer in zip(files, answers, strict=True)]
        milliseconds = round((time.perf_counter() - started) * 1e3, 1)
        versions = [answer.served.version for answer in answers if isinstance(answer, _Answer)]
        named = {"model": self._served.name, "version": versions[-1] if versions else self._served.version}
        return _json(200, {**named, "predictions": rows, "milliseconds": milliseconds})

    async def metrics(self, request: Request, words: Mapping[str, str]) -> Response:
        """What Prometheus reads; of several replicas the sums."""
        self._metrics.queue.set(len(self._batcher))
        return _response(200, self._metrics.text(), "text/plain; version=0.0.4; charset=utf-8")

    async def _files(self, request: Request) -> list[tuple[str, bytes]]:
        """Names and contents of the pictures in a request."""
        body = await self._body(request)
        if not request.headers.get("content-type", "").lower().startswith("multipart/"):
            return [("image", body)]
        return _files_of_form(body, request.headers["content-type"])


MODEL = r"/v2/models/(?P<model>[^/]+)(?:/versions/(?P<version>[^/]+))?"
ROUTES: tuple[tuple[str, str, re.Pattern[str], Handler], ...] = (
    ("page", "GET", re.compile("/"), Endpoint.page),
    ("classify", "POST", re.compile("/v1/classify"), Endpoint.classify),
    ("infer", "POST", re.compile(f"{MODEL}/infer"), Endpoint.infer),
    ("live", "GET", re.compile("/v2/health/live"), Endpoint.live),
    ("ready", "GET", re.compile("/v2/health/ready"), Endpoint.ready),
    ("ready", "GET", re.compile(f"{MODEL}/ready"), Endpoint.ready),
    ("metadata", "GET", re.compile(MODEL), Endpoint.metadata),
    ("server", "GET", re.compile("/v2/?"), Endpoint.server),
    ("metrics", "GET", re.compile("/metrics"), Endpoint.metrics),
)
"""Name in the metrics, method, path, and who answers."""


def _route(request: Request) -> tuple[str, Handler, Mapping[str, str]]:
    path, allowed = request.scope["path"], []
    method = "GET" if request.method == "HEAD" else request.method
    for name, wanted, pattern, handler in ROUTES:
        if (match := pattern.fullmatch(path)) is not None:
            if wanted == method:
                return name, handler, match.groupdict()
            allowed.append(wanted)
    if allowed:
        raise _HttpError(405, f"{path:.80} takes {' and '.join(allowed)}, not {method:.20}.", allow=", ".join(allowed))
    paths = (pattern.pattern.removesuffix("/?") for _, _, pattern, _ in ROUTES)
    known = ", ".join(dict.fromkeys(path for path in paths if "P<" not in path))
    raise _HttpError(404, f"Nothing is at {path:.80}. There is {known} and /v2/models/NAME.")


def _run_pictures(served: _Served, pictures: Sequence[_Picture]) -> list[_Answer | Exception]:
    source, arrays = GivenImages([picture.content for picture in pictures]), dict[int, Mapping[str, np.ndarray]]()

    def keep(batch: Any, outputs: Mapping[str, torch.Tensor]) -> None:
        arrays.update(zip(batch.indices, _rows(outputs), strict=True))

    answers: list[_Answer | Exception] = []
    top = pictures[0].top
    for at, row in enumerate(predict_images(served.model, source, top=top, batch_size=len(pictures), each=keep)):
        if at not in arrays:
            answers.append(InputError(str(row.error)))
            continue
        crop = _crop(served, source, at) if pictures[at].maps and CLASS_MAPS in arrays[at] else None
        answers.append(_Answer(served, arrays[at], row, crop))
    return answers


def _run_tensors(served: _Served, images: Sequence[np.ndarray]) -> list[_Answer | Exception]:
    tensor = torch.from_numpy(np.stack(images))
    return [_Answer(served, row) for row in _rows(outputs_of_images(served.model, tensor, "the request's image"))]


def _rows(outputs: Mapping[str, torch.Tensor]) -> list[dict[str, np.ndarray]]:
    """Outputs (n, ...) by name -> of each image by name."""
    arrays = {name: output.numpy() for name, output in outputs.items()}
    count = len(next(iter(arrays.values())))
    return [{name: array[at] for name, array in arrays.items()} for at in range(count)]


def _crop(served: _Served, source: GivenImages, index: int) -> tuple[float, float, float, float]:
    """What the network sees of a picture, in its pixels: left, top, width, height."""
    place = placement(source.picture(index, served.model.preprocessing).size, served.model.preprocessing)
    (across, down), (left, top), (width, height) = place.scale, place.offset, place.canvas
    return -left / across, -top / down, width / across, height / down


def _row(name: str, answer: Any, maps: int) -> dict[str, Any]:
    """One picture's answer in plain types."""
    if isinstance(answer, InputError):
        return {"name": name, "error": str(answer)}
    if isinstance(answer, BaseException):
        raise answer
    prediction = answer.prediction.to_dict()
    row = {"name": name, **{key: value for key, value in prediction.items() if key != "path"}}
    row["text"] = str(answer.prediction)
    if answer.crop is not None:
        chosen = [score["index"] for score in prediction.get("scores", ())][:maps]
        values = answer.outputs[CLASS_MAPS]
        row["crop"] = [round(side, 2) for side in answer.crop]
        row["maps"] = [{"index": index, "values": np.round(values[index], 4).tolist()} for index in chosen]
    return row


def _files_of_form(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    """Names and contents of the files in a form; its other fields are left out."""
    kind, words = parse_options_header(content_type)
    files, ended = list[Any](), list[bool]()
    on_end, in_memory = lambda: ended.append(True), {"MAX_MEMORY_FILE_SIZE": math.inf}
    try:
        boundary = words.get(b"boundary")
        FormParser(kind.decode(), lambda field: None, files.append, on_end, boundary, config=in_memory).write(body)
        if not ended:
            raise ValueError("its last boundary is missing")
    except (FormParserError, ValueError) as error:
        raise InputError(f"The form cannot be read: {error}. Send it as curl -F image=@photo.jpg does.") from error
    if not files:
        raise InputError("The form has no file. Send it as curl -F image=@photo.jpg does.")
    return [(file.file_name.decode("utf-8", "replace") or "image", file.file_object.getvalue()) for file in files]


def _whole(request: Request, name: str) -> int | None:
    """A whole number from 1 in the query, such as ?top=3."""
    text = request.query_params.get(name)
    if text is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise InputError(f"{name} is a whole number from 1, not {text!r:.40}.")
    return int(text)


def _json(status: int, document: Any, headers: Mapping[str, str] | None = None) -> Response:
    # allow_nan: NaN is no JSON; every output was found finite before, so that this raises for a fault of ours alone.
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _response(status, text.encode("utf-8", "backslashreplace"), "application/json", headers)


def _response(status: int, content: bytes, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    words = {"content-type": kind, "cache-control": "no-store", "x-content-type-options": "nosniff", **(headers or {})}
    return Response(content, status, words)


class _Metrics:
    """Counters and histograms for Prometheus, of this process; with PROMETHEUS_MULTIPROC_DIR of all replicas."""

    def __init__(self) -> None:
        self._folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        self._registry = registry = CollectorRegistry()
        words: dict[str, Any] = {"registry": registry}
        self.requests = Counter("cnx_requests", "Requests by endpoint and status", ["endpoint", "status"], **words)
        self.seconds = Histogram(
            "cnx_request_seconds", "Seconds from a request's headers to its answer", ["endpoint"], buckets=SECONDS,
            **words,
        )  # fmt: skip
        self.batches = Histogram(
            "cnx_batch_images", "Images of a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **words
        )
        self.runs = Histogram("cnx_batch_seconds", "Seconds a batch ran, decoding included", buckets=SECONDS, **words)
        self.queue = Gauge("cnx_queue_images", "Images that wait", multiprocess_mode="livesum", **words)
        self.reloads = Counter("cnx_reloads", "Reloads by their end", ["result"], **words)
        self.model = Gauge(
            "cnx_model", "1 for the version that answers", ["name", "version"], multiprocess_mode="livemax", **words
        )

    def text(self) -> bytes:
        """The exposition format."""
        registry = self._registry
        if self._folder is not None:
            for file in Path(self._folder).glob("gauge_live*_*.db"):  # of a replica that died nothing waits any more
                try:
                    os.kill(int(file.stem.rpartition("_")[2]), 0)
                except ProcessLookupError:
                    file.unlink(missing_ok=True)
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry, path=self._folder)
        return bytes(generate_latest(registry))
