"""What of `serve` needs no Ray: what it says without the extra, and what it asks of a cluster."""

import http.server
import importlib.util
import threading
from pathlib import Path
from typing import Any

import pytest

from cnx_deploy.core.errors import MissingRequirementError
from cnx_deploy.serving import serve


def test_serving_without_the_extra_names_it(tiny_onnx_fp32: Any, monkeypatch: pytest.MonkeyPatch, cnx: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else found(name, *rest))
    code, _, err = cnx("serve", Path(tiny_onnx_fp32.path), "--port", "0")
    assert (code, "cnx-deploy[ray]" in err) == (MissingRequirementError.exit_code, True)


def test_replicas_do_not_ask_for_more_than_there_is(tiny_onnx_fp32: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "cpu_count", lambda: 8)
    for replicas in range(1, 9):
        words: dict[str, Any] = {"artifact": tiny_onnx_fp32.path, "replicas": replicas}
        asked = serve._resources(serve.ServeRequest(**words, model_options={"device": "cuda"}))
        # Ray rounds each to 1/10,000.
        assert [
            replicas * round(10_000 * asked[name]) <= 10_000 * most for name, most in (("num_cpus", 8), ("num_gpus", 1))
        ] == [True, True]
        assert "num_gpus" not in serve._resources(serve.ServeRequest(**words))


def test_an_engine_gets_a_gpu(tiny_engine: Any) -> None:
    assert serve._resources(serve.ServeRequest(artifact=tiny_engine.path))["num_gpus"] == 1


def test_the_endpoint_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setattr(serve.time, "sleep", lambda seconds: None)
    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        serve._wait_until_ready(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
