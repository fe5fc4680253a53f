"""Calls in threads: several at a time, or with a time limit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def call_all(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int) -> None:
    """Call a function with each entry of `calls` as its arguments, up to `workers` calls at a time; raise the first error."""
    with ThreadPoolExecutor(min(workers, len(calls))) as pool:
        list(pool.map(function, *zip(*calls, strict=True)))


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
