"""Call reward functions in worker processes that are killed at a timeout; needs pebble."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from llm_env.rewards.calls import BadValue, Value, attempt, time_out_message

if TYPE_CHECKING:
    from pebble import ProcessPool

CHECK_EVERY = 1.0  # seconds between checks that the pool is active


class NoWorker(BadValue):
    """Error if no worker process can be started. `on_error` does not apply, since no call failed."""


class WorkerProcesses:
    """Pool of worker processes that call one reward function.

    The processes start at the first call. They use the start method "spawn", since fork is unsafe with torch's threads. A
    process that was killed or died is replaced.

    Args:
        function: a picklable reward function.
        workers: number of processes.

    Raises:
        ImportError: If pebble is not installed.
    """

    def __init__(self, function: Callable[..., Any], workers: int) -> None:
        try:
            import pebble  # noqa: F401
        except ImportError as error:
            raise ImportError('processes=True needs pebble: pip install "llm-env[pool]"') from error
        self._function, self._workers = function, workers
        self._lock = threading.Lock()
        self._pool: ProcessPool | None = None
        self._proven: WeakSet[ProcessPool] = WeakSet()  # pools that have completed a call

    def call(self, given: dict[str, Any], lengths: Sequence[int], timeout: float | None) -> list[Value] | str:
        """Call the function in a worker; return its values, or an error message if it fails.

        Args:
            given: keyword arguments of the function.
            lengths: number of tokens of each completion.
            timeout: seconds, counted from when a worker starts the call; None for no limit.

        Raises:
            NoWorker: If no worker process can be started.
        """
        if multiprocessing.current_process().daemon:
            raise NoWorker(
                "cannot start a worker process from a daemonic one; use processes=False, or start the env's process with "
                "daemon=False (gymnasium's AsyncVectorEnv)"
            )
        payload = pickle.dumps(given)  # as bytes, so that pebble's own unpickling cannot fail
        while True:
            with self._lock:
                pool = self._running_pool()
                future = pool.schedule(_call_installed, args=(payload, list(lengths)), timeout=timeout)
            try:
                result = _result(pool, future, timeout)
            except BrokenProcessPool:
                if pool in self._proven:  # its idle workers were killed, e.g. by the operating system: start new ones
                    continue
                raise NoWorker(
                    "has no worker: the process exited before it was ready; start the work of your script under "
                    'if __name__ == "__main__":, or use processes=False'
                ) from None
            self._proven.add(pool)
            return result

    def close(self) -> None:
        """Wait for running calls, then stop the processes; the next call starts new ones."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()
            pool.join()

    def _running_pool(self) -> ProcessPool:
        if self._pool is None or not self._pool.active:
            from pebble import ProcessPool

            if self._pool is not None:
                _stop(self._pool)
            self._pool = ProcessPool(
                self._workers, initializer=_install, initargs=(self._function,), context=multiprocessing.get_context("spawn")
            )
            # pebble's threads keep an unreferenced pool alive, so stop it explicitly. At exit, pebble stops the processes.
            weakref.finalize(self, _stop_in_background, self._pool, os.getpid()).atexit = False
        return self._pool


def _result(pool: ProcessPool, future: Future[list[Value] | str], timeout: float | None) -> list[Value] | str:
    from pebble import ProcessExpired

    while not wait([future], timeout=CHECK_EVERY).done:
        if not pool.active:
            raise BrokenProcessPool
    try:
        return future.result()
    except TimeoutError:
        return time_out_message(timeout)
    except ProcessExpired as error:
        return f"the worker process died with exit code {error.exitcode}"


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


def _stop_in_background(pool: ProcessPool, process_id: int) -> None:
    if os.getpid() == process_id:  # a forked process must not stop its parent's workers
        # In a new thread: the garbage collector may run in one of the pool's threads, which cannot join itself.
        threading.Thread(target=_stop, args=(pool,), daemon=True).start()


_installed: list[Callable[..., Any]] = []  # the function of this worker process


def _install(function: Callable[..., Any]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a Python handler would run only after C code returns, e.g. a huge power
    _installed[:] = [function]


def _call_installed(payload: bytes, lengths: list[int]) -> list[Value] | str:
    try:
        return attempt(_installed[0], pickle.loads(payload), lengths)
    except BaseException as error:  # also SystemExit, which must not propagate to the main process
        return f"{type(error).__name__}: {error}"
