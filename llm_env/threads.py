"""Calls with a time limit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


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
