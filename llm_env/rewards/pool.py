"""Run reward functions in a pool of workers, with timeouts, error handling and a cache."""

from __future__ import annotations

import inspect
import logging
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llm_env.arguments import check_seconds
from llm_env.rewards.calls import BadValue, Called, Value, attempt, time_out_message
from llm_env.rewards.processes import NoWorker, WorkerProcesses
from llm_env.threads import within

logger = logging.getLogger("llm_env")

GRACE = 0.5  # extra seconds for an asynchronous call to be cancelled by its own timeout before its thread is abandoned
LONG = 10**9  # tokens of a completion whose length is not known
NOT_PICKLED = ("_process_id", "_threads", "_lock", "_cache", "_processes")


class PooledReward:
    """Reward function wrapper that runs calls in a pool of worker threads or processes.

    A PooledReward is itself a reward function; pass it as the env's `reward`. The batch is split into calls of `batch_size`
    completions, and up to `workers` calls run in parallel. An asynchronous function is awaited in each call.

    A call fails if it raises, returns an invalid score or exceeds `timeout`. With `on_error="raise"` the env then raises. If
    `on_error` is a number, the completions of the failed call get that number as their score. The info of their last step
    holds the error message under `reward_error`, and the share of such episodes is logged as `rollout/reward_errors`.

    Args:
        function: a reward function; see `llm_env.rewards`.
        workers: maximum number of parallel calls.
        processes: whether to use processes instead of threads, for functions that hold the GIL or may crash. Needs pebble (the
            extra `pool`). The function must be importable (not a lambda or a local function), and a script must start its
            work under `if __name__ == "__main__":`.
        timeout: seconds that a call may take, not counting the time in the queue; None for no limit. At the timeout a process
            is killed. A thread cannot be killed: it keeps running and its result is discarded.
        on_error: `"raise"`, or the score of a completion whose call failed.
        batch_size: number of completions per call, or None for one call per batch.
        cache_size: maximum number of scores in the cache, keyed by prompt, token ids and columns; 0 for no cache. The score
            must depend on these only.

    Raises:
        ValueError, TypeError: If an argument is invalid.
        ImportError: If `processes` is set and pebble is not installed.

    Examples:
        >>> import time
        >>> def judge(completions):
        ...     time.sleep(10.0 if "slow" in completions[0] else 0.0)
        ...     return [1.0]
        >>> PooledReward(judge, timeout=0.2, on_error=-1.0)(completions=["quick", "slow"])
        [1.0, -1.0]
    """

    def __init__(
        self,
        function: Callable[..., Any],
        workers: int = 4,
        *,
        processes: bool = False,
        timeout: float | None = None,
        on_error: str | float = "raise",
        batch_size: int | None = 1,
        cache_size: int = 0,
    ) -> None:
        if not callable(function):
            raise TypeError(f"reward {function!r} is a {type(function).__name__}; it must be callable")
        for name, value, least in (("workers", workers, 1), ("batch_size", batch_size, 1), ("cache_size", cache_size, 0)):
            if (name, value) != ("batch_size", None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")
        check_seconds("timeout", timeout)
        if on_error != "raise" and (isinstance(on_error, str) or not np.isfinite(on_error)):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or a finite number")
        self.function, self.workers, self.processes, self.timeout = function, workers, processes, timeout
        self.on_error, self.batch_size, self.cache_size = on_error, batch_size, cache_size
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.stepwise = getattr(function, "stepwise", False)
        try:
            self.__signature__ = inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without a signature
            pass
        if processes:
            _check_importable(function, self.__name__)
        self._start()

    def _start(self) -> None:
        self._process_id = os.getpid()
        self._failing_batches = 0
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._cache: OrderedDict[Any, Value] = OrderedDict()
        self._processes = WorkerProcesses(self.function, self.workers) if self.processes else None

    def _start_if_forked(self) -> None:
        if os.getpid() != self._process_id:  # after a fork there are no threads, and the workers belong to the parent process
            self._start()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in NOT_PICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._start()

    def __call__(self, **given: Any) -> list[Value]:
        """Return the scores of a batch, as the wrapped reward function would."""
        count = len(next(iter(given.values())))
        return self.run(given, [()] * count, [LONG] * count).values

    def run(self, given: dict[str, Any], states: Sequence[Any], lengths: Sequence[int]) -> Called:
        """Score a batch of B completions.

        Args:
            given: the function's keyword arguments, lists of length B.
            states: B hashable values, the prompt and token ids, which are part of the cache key besides `given`.
            lengths: B numbers of tokens, to check the steps of process rewards.

        Raises:
            ValueError: If a call failed and `on_error` is `"raise"`.
        """
        self._start_if_forked()
        keys = self._keys(given, states)
        with self._lock:
            known = {key: self._cache[key] for key in keys if key in self._cache}
        todo = list({key: row for row, key in enumerate(keys) if key not in known}.values())
        size = self.batch_size or max(1, len(todo))
        calls = [todo[i : i + size] for i in range(0, len(todo), size)]
        failed: dict[Any, str] = {}
        for rows, result in zip(calls, self._pool().map(lambda rows: self._attempt(given, lengths, rows), calls), strict=True):
            if isinstance(result, str):
                failed.update({keys[row]: result for row in rows})
            else:
                known.update({keys[row]: value for row, value in zip(rows, result, strict=True)})
        self._remember({keys[row]: known[keys[row]] for row in todo if keys[row] in known})
        if failed:
            self._report(failed, keys)
        values = [self.on_error if key in failed else known[key] for key in keys]
        errors = {row: f"{self.__name__}: {failed[key]}" for row, key in enumerate(keys) if key in failed}
        return Called(values, errors)  # type: ignore[arg-type]

    def close(self) -> None:
        """Wait for running calls, then stop the worker processes; the next call starts new ones."""
        self._start_if_forked()
        if self._processes is not None:
            self._processes.close()

    def _keys(self, given: dict[str, Any], states: Sequence[Any]) -> list[Any]:
        if not self.cache_size:
            return list(range(len(states)))
        columns = [given[key] for key in sorted(given)]
        return [(state, pickle.dumps([column[row] for column in columns])) for row, state in enumerate(states)]

    def _remember(self, scored: dict[Any, Value]) -> None:
        if not self.cache_size:
            return
        with self._lock:
            self._cache.update(scored)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)

    def _report(self, failed: dict[Any, str], keys: list[Any]) -> None:
        first = next(row for row, key in enumerate(keys) if key in failed)
        what = f"failed for {sum(key in failed for key in keys)} of {len(keys)} completions, the first in row {first}: "
        what += failed[keys[first]]
        if self.on_error == "raise":
            raise BadValue(f"{what} (set on_error= of PooledReward to a number to use that as the score)")
        self._failing_batches += 1
        if self._failing_batches & (self._failing_batches - 1) == 0:  # log only the 1st, 2nd, 4th, 8th, ...
            count = self._failing_batches
            logger.warning("reward %r %s; scored on_error=%s (failing batch %d)", self.__name__, what, self.on_error, count)

    def _pool(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix=f"reward-{self.__name__}")
            return self._threads

    def _attempt(self, given: dict[str, Any], lengths: Sequence[int], rows: list[int]) -> list[Value] | str:
        """Call the function on some rows; return its values, or an error message if it fails.

        The timeout starts here, in the worker, not when the call was queued.
        """
        part = {key: [column[row] for row in rows] for key, column in given.items()}
        spans = [lengths[row] for row in rows]
        if self._processes is not None:
            try:
                return self._processes.call(part, spans, self.timeout)
            except NoWorker:
                raise
            except Exception as error:  # columns that cannot be pickled
                return f"{type(error).__name__}: {error}"
        if self.timeout is None:
            return attempt(self.function, part, spans)
        patience = self.timeout + (GRACE if _is_async(self.function) else 0.0)
        try:
            return within(patience, lambda: attempt(self.function, part, spans, self.timeout))
        except TimeoutError:
            return time_out_message(self.timeout)


def _is_async(function: Callable[..., Any]) -> bool:
    function = inspect.unwrap(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _check_importable(function: Callable[..., Any], name: str) -> None:
    try:
        pickle.dumps(function)
    except Exception as error:
        raise TypeError(
            f"reward {name!r} cannot be sent to a worker process ({error}); define it at the top of a module, or use "
            "processes=False"
        ) from error
