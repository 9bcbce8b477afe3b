"""The queue in front of a model: batches, the wait, refusal, and whose error it is."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from cnx_deploy.serving.batching import Batcher, QueueFullError


class Model:
    """Doubles numbers. It can be held up, and dies of 13 with all of its batch; 7 is refused by itself."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, items: Sequence[int]) -> list[Any]:
        self.batches.append(list(items))
        assert self.go.wait(20)
        if 13 in items:
            raise RuntimeError("13 kills a batch")
        return [ValueError("7 is refused") if item == 7 else 2 * item for item in items]


def batcher(model: Model, **options: Any) -> Batcher[int, int]:
    return Batcher(model, **{"max_batch": 4, "max_wait_ms": 50.0, "max_queue": 8, **options})


def run(scenario: Callable[[], Any]) -> Any:
    return asyncio.run(asyncio.wait_for(scenario(), 30))


async def until(condition: Callable[[], Any]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_single_requests_that_come_together_are_one_batch() -> None:
    model = Model()

    async def scenario() -> list[list[int]]:
        queue = batcher(model)
        return await asyncio.gather(*(queue.submit([number]) for number in range(4)))

    assert run(scenario) == [[0], [2], [4], [6]]
    assert model.batches == [[0, 1, 2, 3]]


def test_what_comes_while_the_model_runs_is_the_next_batch_without_a_wait() -> None:
    model = Model()
    model.go.clear()

    async def scenario() -> float:
        queue = batcher(model, max_wait_ms=0.0, max_queue=16)
        first = asyncio.ensure_future(queue.submit([0]))
        await until(lambda: model.batches)
        others = [asyncio.ensure_future(queue.submit([number])) for number in range(1, 7)]
        await until(lambda: len(queue) == 6)
        queue.max_wait_ms = 20_000.0
        queue.max_batch = 3
        model.go.set()
        started = time.monotonic()
        await asyncio.gather(first, *others)
        return time.monotonic() - started

    assert run(scenario) < 10
    assert model.batches == [[0], [1, 2, 3], [4, 5, 6]]


def test_a_single_image_goes_after_the_wait() -> None:
    model = Model()

    async def scenario() -> float:
        queue, loop = batcher(model, max_wait_ms=80.0), asyncio.get_running_loop()
        started = loop.time()
        assert await queue.submit([5]) == [10]
        return loop.time() - started

    assert 0.07 < run(scenario) < 5


def test_a_request_larger_than_a_batch_is_cut_and_its_results_keep_their_order() -> None:
    model = Model()
    numbers = [0, 1, 2, 3, 4, 5]
    assert run(lambda: batcher(model).submit(numbers)) == [2 * number for number in numbers]
    assert model.batches == [[0, 1, 2, 3], [4, 5]]


def test_a_queue_that_is_full_refuses_all_of_a_request_at_once() -> None:
    model = Model()
    model.go.clear()

    async def scenario() -> None:
        queue = batcher(model, max_wait_ms=0.0, max_queue=3)
        running = asyncio.ensure_future(queue.submit([0]))
        await until(lambda: model.batches)
        waiting = asyncio.ensure_future(queue.submit([1, 2]))
        await until(lambda: len(queue) == 2)
        with pytest.raises(QueueFullError, match="2 of 3"):
            await queue.submit([3, 4])
        assert len(queue) == 2
        model.go.set()
        assert await running == [0]
        assert await waiting == [2, 4]

    run(scenario)


def test_an_error_is_only_its_own_requests() -> None:
    model = Model()

    async def scenario() -> list[Any]:
        queue = batcher(model)
        return await asyncio.gather(*(queue.submit([number]) for number in (1, 7, 2)), return_exceptions=True)

    first, refused, last = run(scenario)
    assert (first, last) == ([2], [4])
    assert str(refused) == "7 is refused"
    assert len(model.batches) == 1


def test_errors_may_stand_among_the_results_of_a_request() -> None:
    model = Model()
    first, refused, last = run(lambda: batcher(model).submit([1, 7, 2], return_exceptions=True))
    assert (first, str(refused), last) == (2, "7 is refused", 4)
    with pytest.raises(ValueError, match="7 is refused"):
        run(lambda: batcher(model).submit([1, 7, 2]))


def test_a_batch_that_dies_is_run_again_one_by_one() -> None:
    model = Model()

    async def scenario() -> list[Any]:
        queue = batcher(model)
        return await asyncio.gather(*(queue.submit([number]) for number in (1, 13, 2)), return_exceptions=True)

    first, dead, last = run(scenario)
    assert (first, last) == ([2], [4])
    assert str(dead) == "13 kills a batch"
    assert model.batches == [[1, 13, 2], [1], [13], [2]]


def test_what_a_client_that_left_has_asked_is_not_run() -> None:
    model = Model()
    model.go.clear()

    async def scenario() -> None:
        queue = batcher(model, max_wait_ms=0.0)
        running = asyncio.ensure_future(queue.submit([0]))
        await until(lambda: model.batches)
        left, stays = asyncio.ensure_future(queue.submit([1])), asyncio.ensure_future(queue.submit([2]))
        await until(lambda: len(queue) == 2)
        left.cancel()
        await asyncio.sleep(0)
        model.go.set()
        await running
        assert await stays == [4]

    run(scenario)
    assert model.batches == [[0], [2]]


def test_the_end_waits_for_the_batch_that_is_running() -> None:
    model, done = Model(), list[int]()
    model.go.clear()

    def run_and_note(items: Sequence[int]) -> list[Any]:
        results = model(items)
        done.extend(items)
        return results

    async def scenario() -> None:
        queue = Batcher[int, int](run_and_note, max_batch=4, max_wait_ms=0.0, max_queue=8)
        running = asyncio.ensure_future(queue.submit([1]))
        await until(lambda: model.batches)
        threading.Timer(0.05, model.go.set).start()
        queue.close()
        assert done == [1]
        running.cancel()

    run(scenario)


def test_a_function_between_two_batches_has_the_model_for_itself() -> None:
    model = Model()
    model.go.clear()

    async def scenario() -> list[list[int]]:
        queue = batcher(model, max_wait_ms=0.0)
        running = asyncio.ensure_future(queue.submit([0]))
        await until(lambda: model.batches)
        between = asyncio.ensure_future(queue.in_thread(lambda: list(model.batches)))
        waiting = asyncio.ensure_future(queue.submit([1]))
        await until(lambda: len(queue) == 1)
        await asyncio.sleep(0.05)
        assert not between.done()
        model.go.set()
        seen = await between
        await asyncio.gather(running, waiting)
        return seen

    assert run(scenario) == [[0]]
    assert model.batches == [[0], [1]]
