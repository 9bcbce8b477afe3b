"""The parts of a batch on Ray Data: actors that each hold the network, on this machine or a cluster.

Ray Data hands parts to actors, starts an actor anew whose process died and hands its part out again. The files of
`serving.batch` are the only record of what is done, so that nothing of Ray's is needed to go on: a part that was
written just before its actor died is found by the next one. Model, images and OUT lie on a file system that all
machines see.
"""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cnx_deploy.core.errors import CnxDeployError, MissingRequirementError
from cnx_deploy.core.system import cpu_count
from cnx_deploy.core.variants import ALL_VARIANTS, Variant, register_variant
from cnx_deploy.serving.batch import BatchRequest, PartResult, PartWriter
from cnx_deploy.serving.batch_sources import Part
from cnx_deploy.verification.inspect import takes_gpu

__all__ = ["check_ray", "check_room", "run_on_ray"]

SPARE_CPUS = 2
"""Processors that Ray Data keeps for its own tasks beside the actors; a cluster without them waits for ever."""


def check_ray(*, is_here: bool) -> Any:
    """The module `ray`. Raises MissingRequirementError, which names the extra.

    `is_here`: it is to be started on this machine alone, where its servers listen at 127.0.0.1.
    """
    if is_here:  # read when ray is imported; with _node_ip_address alone some servers listen at the machine's address
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingRequirementError(
            "Ray is not installed, which --engine ray runs on. Install it with pip install 'cnx-deploy[ray]', in an "
            "environment of its own, or use --engine local."
        ) from error
    return ray


def check_room(request: BatchRequest, cpus: int, gpus: float) -> int:
    """The number of actors. Raises MissingRequirementError where a cluster has fewer processors or GPUs than they take.

    Ray would wait for more without a word.
    """
    of_each, gpus_of_each = request.cpus_per_actor, gpus_per_actor(request)
    most = (cpus - SPARE_CPUS) // of_each
    if gpus_of_each:
        most = min(most, int(gpus // gpus_of_each))
    actors = max(1, most) if request.actors is None else request.actors
    if (needed := actors * of_each + SPARE_CPUS) > cpus:
        raise MissingRequirementError(
            f"{actors} actors of {of_each} processors each and {SPARE_CPUS} for Ray Data's own tasks are {needed}, and "
            f"the cluster has {cpus}: it would wait for ever. Use --actors {max(1, most)} (actors), or add machines."
        )
    if (gpus_needed := actors * gpus_of_each) > gpus:
        raise MissingRequirementError(
            f"{actors} actors of {gpus_of_each:g} GPUs each are {gpus_needed:g}, and the cluster has {gpus:g}: it "
            "would wait for ever. Use fewer --actors (actors), a share of a GPU as --gpus-per-actor (gpus_per_actor), "
            "or add machines."
        )
    return actors


def gpus_per_actor(request: BatchRequest) -> float:
    """GPUs of each actor: one for an engine and for the device cuda, unless the request says otherwise."""
    if request.gpus_per_actor is not None:
        return request.gpus_per_actor
    return float(takes_gpu(request.model, request.model_options.get("device")))


def run_on_ray(
    request: BatchRequest, document: Mapping[str, Any], parts: Sequence[Part], started: Callable[[float], None]
) -> Iterator[PartResult]:
    """Yield the result of each part once its file is there, in the order in which they are done.

    Raises the error of an actor as it would be raised in this process.
    """
    ray = check_ray(is_here=request.address is None)
    with _cluster(ray, request) as (cpus, gpus):
        actors = check_room(request, cpus, gpus)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        # A block has one part, so that an actor that dies loses one. Pickled, as names of files may be no UTF-8.
        rows = [{"part": pickle.dumps(part)} for part in parts]
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            _Actor,
            fn_constructor_args=(_absolute(request), dict(document), tuple(ALL_VARIANTS.values())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors, len(parts))),
            num_cpus=request.cpus_per_actor,
            num_gpus=gpus_per_actor(request) or None,
        )
        is_first = True
        try:
            for row in results.iter_rows():
                result, seconds = pickle.loads(row["result"])
                if isinstance(result, Exception):
                    raise result
                if is_first:
                    started(seconds)
                    is_first = False
                yield result
        except ray.exceptions.RayError as error:
            said = "\n".join(line for line in str(error).splitlines() if line.strip())
            raise CnxDeployError(
                f"Ray stopped. The same command goes on with what is not done. It says:\n{said}"
            ) from error


class _Actor:
    """A process that holds the network and makes the files of the parts it is given.

    An error of the package or the system is handed on as a result, since Ray makes a text of what a call raises.
    """

    def __init__(self, request: BatchRequest, document: Mapping[str, Any], variants: Sequence[Variant]) -> None:
        import torch

        torch.set_num_threads(request.cpus_per_actor)
        for variant in variants:
            if variant.name not in ALL_VARIANTS:
                register_variant(variant)
        self.writer: PartWriter | Exception
        try:
            self.writer = PartWriter(request, document, request.cpus_per_actor)
        except (CnxDeployError, OSError) as error:
            self.writer = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begun = time.perf_counter()  # machines' clocks differ: how long it took is told, not when it began
        results = [self._result(pickle.loads(part)) for part in batch["part"]]
        return {"result": [pickle.dumps((result, time.perf_counter() - begun)) for result in results]}

    def _result(self, part: Part) -> PartResult | Exception:
        if isinstance(self.writer, Exception):
            return self.writer
        try:
            return self.writer.write(part)
        except (CnxDeployError, OSError) as error:
            return error


@contextmanager
def _cluster(ray: Any, request: BatchRequest) -> Iterator[tuple[int, float]]:
    """A running cluster's processors and GPUs; one on this machine is started, and stopped at the end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its makers of each cluster
    os.environ.setdefault(
        "RAY_BACKEND_LOG_LEVEL", "fatal"
    )  # what ends a run comes as an error; the rest is in its logs
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    is_mine = not ray.is_initialized()
    if is_mine:
        words: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if request.address is None:
            actors = request.actors or max(1, cpu_count() // request.cpus_per_actor)
            # Ray Data's own tasks wait more than they compute, so that they share the processors with the actors.
            words |= {"num_cpus": actors * request.cpus_per_actor + SPARE_CPUS, "include_dashboard": False}
            words |= {"_node_ip_address": "127.0.0.1"}
        try:
            ray.init(address=request.address or "local", **words)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"No Ray cluster answers at {request.address}" if request.address else "Ray does not start here"
            raise MissingRequirementError(
                f"{where} ({str(error).strip().splitlines()[0]}). Check it with `ray status`, or use --engine local."
            ) from error
    try:
        resources = ray.cluster_resources()
        yield int(resources.get("CPU", 0)), float(resources.get("GPU", 0))
    finally:
        if is_mine:
            ray.shutdown()


def _absolute(request: BatchRequest) -> BatchRequest:
    """The request with paths that mean the same in another process."""
    opened = {
        name: tuple(map(_full, value)) if name == "soup" else _full(value) if isinstance(value, Path) else value
        for name, value in request.model_options.items()
    }
    return replace(request, model=_full(request.model), out=_full(request.out), model_options=opened)


def _full(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 - links are kept as they are
