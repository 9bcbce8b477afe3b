"""A queue in front of a model: images of several requests are collected into batches, which one thread runs.

Ray Serve's own `@serve.batch` takes what is there before it waits for the model to be free, so that most of its batches
hold one image. Here a batch is taken when the model is free, and everything that came meanwhile is in it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

__all__ = ["Batcher", "QueueFullError"]

Item = TypeVar("Item")
Result = TypeVar("Result")
Run = Callable[[Sequence[Item]], Sequence[Result | Exception]]


class QueueFullError(Exception):
    """More images wait than the queue holds."""


@dataclass(frozen=True, slots=True)
class _Entry(Generic[Item, Result]):
    item: Item
    future: "asyncio.Future[Result]"
    since: float


class Batcher(Generic[Item, Result]):
    """Give items to `run` in batches, in the order they came; for use inside one event loop.

    Args:
        run: gives a result for each item of a batch, or the exception that is this item's alone. It is called in one
            thread, never twice at once. Where it raises, its batch is run again item by item, so that only the item
            that is at fault gets the error.
        max_batch: items in a batch.
        max_wait_ms: how long the first of a batch waits for others while nothing runs.
        max_queue: items that may wait; more are refused.
        told: is given the size of each batch, and the seconds that it ran.
    """

    def __init__(
        self,
        run: Run[Item, Result],
        *,
        max_batch: int,
        max_wait_ms: float,
        max_queue: int,
        told: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.max_batch, self.max_wait_ms, self.max_queue = max_batch, max_wait_ms, max_queue
        self._run, self._told = run, told
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    async def submit(self, items: Sequence[Item], *, return_exceptions: bool = False) -> list[Any]:
        """Wait for the results of some items, which may go through the model in different batches.

        Raises QueueFullError, at once and for all of them, where they do not fit; else the exception of the first item
        that has one, unless exceptions are to stand among the results. Items whose caller is cancelled before they are
        run are not run.
        """
        if len(self._waiting) + len(items) > self.max_queue:
            raise QueueFullError(f"{len(self._waiting)} of {self.max_queue} images wait already.")
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._work())
        entries: list[_Entry[Item, Result]] = [_Entry(item, loop.create_future(), loop.time()) for item in items]
        self._waiting.extend(entries)
        self._arrived.set()
        try:
            return await asyncio.gather(*(entry.future for entry in entries), return_exceptions=return_exceptions)
        finally:
            for entry in entries:
                entry.future.cancel()

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        """Call a function in the model's thread, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def close(self) -> None:
        """Wait for the batch that is running, and end the thread; what still waits gets no answer."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(cancel_futures=True)

    async def _work(self) -> None:
        while True:
            if not self._waiting:
                await self._signal(None)
                continue
            until = self._waiting[0].since + self.max_wait_ms / 1e3
            now = asyncio.get_running_loop().time()
            if len(self._waiting) < self.max_batch and now < until:
                await self._signal(until - now)
                continue
            batch = [self._waiting.popleft() for _ in range(min(self.max_batch, len(self._waiting)))]
            if batch := [entry for entry in batch if not entry.future.done()]:
                await self._answer(batch)

    async def _signal(self, seconds: float | None) -> None:
        """Wait until something arrives, at most so long."""
        self._arrived.clear()
        waiter = asyncio.ensure_future(self._arrived.wait())
        await asyncio.wait([waiter], timeout=seconds)
        waiter.cancel()

    async def _answer(self, batch: Sequence[_Entry[Item, Result]]) -> None:
        loop, started = asyncio.get_running_loop(), time.perf_counter()
        done = loop.run_in_executor(self._thread, self._run, [entry.item for entry in batch])
        await asyncio.wait([done])
        self._told(len(batch), time.perf_counter() - started)
        error = done.exception()
        if error is not None and len(batch) > 1:
            for entry in batch:
                await self._answer([entry])
            return
        results = [error] if error is not None else done.result()
        for entry, result in zip(batch, results, strict=True):
            if entry.future.done():  # its caller left while it ran
                continue
            if isinstance(result, BaseException):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)
