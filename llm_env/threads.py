"""Calls in threads: several at a time, or with a time limit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any


def call_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call a function with each entry of `calls` as its arguments, up to `workers` calls at a time; raise the first error."""
    with ThreadPoolExecutor(min(workers, len(calls))) as pool:
        list(pool.map(function, *zip(*calls, strict=True)))


class Background:
    """Work in threads, by number, that is fetched when it is done.

    Args:
        workers: maximum number of works at a time.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers)
        self._futures: dict[int, Future[None]] = {}

    def begin(self, number: int, work: Callable[[], None] | None) -> None:
        """Begin a work; None is done at once."""
        self._futures[number] = Future() if work is None else self._pool.submit(work)
        if work is None:
            self._futures[number].set_result(None)

    def ready(self, block: bool) -> list[int]:
        """Return the numbers of the works that are done, in ascending order, each once; with `block`, wait for one.

        Raises:
            Exception: What a work has raised.
        """
        if block and self._futures:
            wait(self._futures.values(), return_when=FIRST_COMPLETED)
        done = sorted(number for number, future in self._futures.items() if future.done())
        for number in done:
            self._futures.pop(number).result()
        return done

    def close(self) -> None:
        """Drop what has not begun, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._futures.clear()


def within(timeout: float, work: Callable[[], Any]) -> Any:
    """Run `work` in a thread and return its result.

    Raises:
        TimeoutError: If it takes longer than `timeout` seconds. The thread keeps running.
    """
    results: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        worked, result = results.get(timeout=timeout)
    except queue.Empty:
        raise TimeoutError from None
    if not worked:
        raise result
    return result
