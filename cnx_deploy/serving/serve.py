"""The endpoint on Ray Serve: a cluster of this machine alone, one or more replicas, and a handle to stop them."""

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cnx_deploy.core.errors import CnxDeployError, InputError, MissingRequirementError
from cnx_deploy.core.system import cpu_count
from cnx_deploy.verification.inspect import takes_gpu

__all__ = ["ServeRequest", "Serving", "start"]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
APPLICATION, DEPLOYMENT = "cnx-deploy", "Replica"
NEEDED = ("ray", "starlette", "prometheus_client", "python_multipart")
STOP_SECONDS = 60.0
"""What is under way may take so long once the endpoint is stopped."""
RELOAD_SECONDS = 600.0
"""A model may take so long to open and warm up beside the one that answers."""
PATIENCE = 3
"""So many checks in a row may get no answer."""
QUIET = {
    # Ray's processes take their share of the same processors that the model runs on. The loop that looks after the
    # replicas runs ten times a second by itself, and metrics, which nobody reads here, are put together as often.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "60000",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A new process of Ray may take long to begin on a busy machine.
    "RAY_raylet_start_wait_time_s": "120",
    # Who speaks to Ray's own ports may run code: they stay on the loopback interface, the name of the first setting
    # notwithstanding, and ask for a token that nobody else has.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
"""Settings of the cluster's processes by environment variable."""
DIRECT = {
    # The replica listens by itself. Through the proxy an image takes 1.5 times as much processor time.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    "RAY_SERVE_PORT_QUARANTINE_S": "0",
}
"""More of them for a single replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRequest:
    """What `cnx-deploy serve` takes; `max_batch` to `timeout_s` are those of `endpoint.EndpointSpec`.

    `host` and `port`: where it listens; port 0 takes a free one. An address that other machines reach needs a `token`.
    `replicas` share the processors between them. `model_options` are those of `predict.open_predictor`: device …
    """

    artifact: Path
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    replicas: int = 1
    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_megabytes: float = 32.0
    timeout_s: float = 30.0
    model_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"A port is a number from 0 to 65535, not {self.port}.")
        if not 1 <= self.replicas <= cpu_count():
            raise InputError(f"replicas must be from 1 to the {cpu_count()} processors here, got {self.replicas}.")
        if self.host not in LOOPBACK and self.token is None:
            raise InputError(
                f"Other machines reach {self.host}, so the endpoint needs a token: set CNX_DEPLOY_TOKEN or --token "
                f"(token). Without one it listens on {LOOPBACK[0]} alone."
            )


class Serving:
    """A running endpoint: its `url`, the model's `name`. Use it as a context manager, or call `stop`."""

    def __init__(self, url: str, name: str, version: str, held: contextlib.ExitStack) -> None:
        self.url, self.name, self.version = url, name, version
        self._held = held
        self._unanswered = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"Serving({self.url}, {self.name} {self.version})"

    def reload(self) -> str:
        """Have every replica take the artifact's file anew; the version.

        Raises CnxDeployError where the file cannot be opened: the earlier version goes on answering.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            told = _of_all("reload", RELOAD_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise CnxDeployError(f"The file was not taken: {lines[-1]}. Reload it again.") from error
        for version, reason in told:
            if reason is not None:
                raise CnxDeployError(f"{reason} Version {version} goes on answering.")
        versions = {version for version, _ in told}
        if len(versions) != 1:
            raise CnxDeployError(f"The replicas took {len(versions)} versions of the file. Reload it again.")
        (self.version,) = versions
        return self.version

    def check(self) -> None:
        """Raise CnxDeployError where the endpoint has died. A replica that has is started again by Ray Serve."""
        import ray
        from ray import serve
        from ray.exceptions import RayError

        try:
            application = serve.status().applications.get(APPLICATION) if ray.is_initialized() else None
            self._unanswered = 0
        except (RayError, TimeoutError):  # the machine is busy, unless it stays so
            self._unanswered += 1
            if self._unanswered < PATIENCE:
                return
            application = None
        if application is None or str(application.status.value) == "DEPLOY_FAILED":
            told = "Ray has ended" if application is None else application.message or application.status.value
            raise CnxDeployError(f"The endpoint has died: {told}. Start it again.")

    def stop(self) -> None:
        """Take nothing more, answer what is under way, and end every process."""
        self._held.close()


def start(request: ServeRequest, note: Callable[[str], None] = lambda text: None) -> Serving:
    """Serve an artifact; returns once it answers, its model warmed up.

    `note` is told what is being done. Raises MissingRequirementError without the extra `ray`, InputError for a port
    that is taken, and whatever `open_predictor` raises: the artifact is opened here once before anything is started.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise MissingRequirementError(
            f"Serving needs {', '.join(missing)}: install the extra ray with pip install 'cnx-deploy[ray]'."
        )
    from cnx_deploy.serving.endpoint import Endpoint, EndpointSpec, hashed_token

    alike = {each.name for each in fields(EndpointSpec)} & {each.name for each in fields(ServeRequest)}
    words = {name: getattr(request, name) for name in alike}
    words |= {"artifact": request.artifact.resolve(), "threads": cpu_count() // request.replicas}
    words["token_sha256"] = None if request.token is None else hashed_token(request.token)
    spec = EndpointSpec(**words)
    port = _free_port(request.host, request.port)
    note(f"Opening {request.artifact}")
    tried = Endpoint(spec)
    name, version, notes = tried.name, tried.version, tried.notes
    tried.close()
    for text in notes:
        note(f"Note: {text}")
    note("Starting Ray")
    with contextlib.ExitStack() as held:
        settings = dict(QUIET)
        if request.replicas == 1:
            ports = {"RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": port, "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": port + 1}
            settings |= {**DIRECT, **{name: str(value) for name, value in ports.items()}}
        _start_ray(held, settings)
        _deploy(held, request, spec, port if request.replicas > 1 else _free_port(request.host, 0))
        host = f"[{request.host}]" if ":" in request.host else request.host
        url = f"http://{host}:{port}"
        _wait_until_ready(url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))
        return Serving(url, name, version, held.pop_all())


def _start_ray(held: contextlib.ExitStack, settings: Mapping[str, str]) -> None:
    """A cluster of this process: it ends with it."""
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise InputError("Ray runs in this process already, and an endpoint has its own. Call ray.shutdown() before.")
    folder = tempfile.mkdtemp(prefix="cnx-serve-")
    held.callback(shutil.rmtree, folder, ignore_errors=True)
    # Until the end, because this process reads some of them when it speaks to the others.
    held.enter_context(_environment({**settings, "PROMETHEUS_MULTIPROC_DIR": folder}))
    import ray
    from ray import serve  # noqa: F401 - sets its logger up

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(
            address="local",
            num_cpus=cpu_count(),
            include_dashboard=False,  # its agent takes long to start, and the raylet dies without it
            object_store_memory=80 << 20,  # the least; requests do not go through it
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise CnxDeployError(f"Ray does not start here: {str(error).strip().splitlines()[0]}") from error
    held.callback(ray.shutdown)


def _deploy(held: contextlib.ExitStack, request: ServeRequest, spec: Any, port: int) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=request.replicas,
        ray_actor_options=_resources(request),
        # The endpoint's own queue refuses what is too much; a request whose body comes slowly waits outside of it.
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        graceful_shutdown_wait_loop_s=0.2,
        max_constructor_retry_count=3,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(_Replica)
    options = HTTPOptions(host=request.host, port=port, keep_alive_timeout_s=75)
    serve.start(
        proxy_location="HeadOnly", http_options=options,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )  # fmt: skip
    held.callback(_stop)
    serve.run(deployment.bind(spec), name=APPLICATION, route_prefix="/", blocking=False)
    _of_all("ping")  # what the first call sets up takes a second, which a call to drain has not


def _resources(request: ServeRequest) -> dict[str, Any]:
    """What Ray keeps for each replica, rounded down: of shares that it rounds up the last replica waits for ever."""
    resources: dict[str, Any] = {"num_cpus": cpu_count() // request.replicas}
    if takes_gpu(request.artifact, request.model_options.get("device")):
        resources["num_gpus"] = 10_000 // request.replicas / 10_000
    return resources


def _wait_until_ready(url: str) -> None:
    """Raise CnxDeployError where the endpoint does not say that it is ready, though Ray does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches this machine's own address
    for _ in range(100):
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            opener.open(f"{url}/v2/health/ready", timeout=10).close()
            return
        time.sleep(0.1)
    raise CnxDeployError(f"Ray Serve runs, and {url} does not answer: another program may have taken the port.")


def _stop() -> None:
    """Not ready at once; then the replicas answer what they have. The cluster's end is the rest's."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    # A replica that has died has nothing under way.
    with contextlib.suppress(RayError, RayServeException, RuntimeError, TimeoutError):
        _of_all("drain")
        serve.delete(APPLICATION)


def _of_all(method: str, timeout_s: float = STOP_SECONDS) -> list[Any]:
    """What every replica returns for a call."""
    from ray import serve

    handle: Any = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    return list(handle.broadcast(method).results(timeout_s=timeout_s))


class _Replica:
    """What runs in each replica's process."""

    def __init__(self, spec: Any) -> None:
        from cnx_deploy.serving.endpoint import Endpoint

        self._endpoint = Endpoint(spec)

    async def __call__(self, request: Any) -> Any:
        return await self._endpoint.answer(request)

    async def reload(self) -> tuple[str, str | None]:
        """Its version after a reload, and why that is still the earlier one."""
        try:
            return await self._endpoint.reload(), None
        except CnxDeployError as error:
            return self._endpoint.version, str(error)

    async def ping(self) -> None:
        """It answers."""

    async def drain(self) -> None:
        """Say that it is not ready."""
        self._endpoint.is_ready = False


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises InputError where it is taken, or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(f"Nothing can listen on {host}:{port} ({error}). Choose another with --port.") from error
        found: int = probe.getsockname()[1]
        return found


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for this process, and those that it starts, inside the block."""
    earlier = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in earlier.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
