"""An endpoint behind uvicorn in a thread of this process, and plain requests to it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "Server", "running"]


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers with names in lower case, and body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, which has to be JSON without NaN."""

        def refuse(word: str) -> Any:
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.body, parse_constant=refuse)

    @property
    def error(self) -> str:
        """The sentence of an error, which is all that its body has."""
        assert self.headers["content-type"] == "application/json", self.body
        assert list(self.json) == ["error"]
        return str(self.json["error"])


@dataclass(frozen=True, slots=True)
class Server:
    """A server on the loopback interface."""

    port: int

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            chunked = not isinstance(body, bytes | None)
            connection.request(method, path, body, dict(headers or {}), encode_chunked=chunked)
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        """GET; an underscore in a header's name is a hyphen."""
        return self.ask("GET", path, headers=_headers(headers))

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        """POST bytes, or a document as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.ask("POST", path, content, _headers(headers))


@contextlib.contextmanager
def running(application: Any) -> Iterator[Server]:
    """Serve an ASGI application until the block ends."""
    import uvicorn

    config = uvicorn.Config(application, host="127.0.0.1", port=0, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Server(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def _headers(words: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in words.items()}
