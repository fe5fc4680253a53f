"""Call a synchronous or asynchronous reward function and check its return value."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np


class BadValue(ValueError):
    """Error for an invalid return value of a reward function."""


Steps = list[tuple[int, float]]
Value = float | Steps | None


@dataclass
class Called:
    """Return values of a reward function for B completions.

    Attributes:
        values: B values: a number, the steps of a process reward, or None for "not applicable".
        errors: error messages by row, for rows whose call failed and whose value is `on_error`.
    """

    values: list[Value]
    errors: dict[int, str] = field(default_factory=dict)


def call(
    function: Callable[..., Any], given: dict[str, Any], lengths: Sequence[int], timeout: float | None = None
) -> list[Value]:
    """Call a reward function on a batch and check its return value.

    The result of an asynchronous function is awaited.

    Args:
        function: the reward function.
        given: its keyword arguments.
        lengths: number of tokens of each completion.
        timeout: seconds after which an asynchronous call is cancelled, or None for no limit. Ignored for synchronous functions.

    Raises:
        BadValue: If the function did not return one finite number, list of steps or None per completion.
    """
    values = function(**given)
    if inspect.isawaitable(values):
        values = wait_for(values, timeout)
    return checked(values, lengths)


def attempt(
    function: Callable[..., Any], given: dict[str, Any], lengths: Sequence[int], timeout: float | None = None
) -> list[Value] | str:
    """Call a reward function; return its values, or an error message if it fails. See `call`."""
    try:
        return call(function, given, lengths, timeout)
    except BadValue as error:
        return str(error)
    except TimeoutError as error:
        return f"TimeoutError: {error}" if str(error) else time_out_message(timeout)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def time_out_message(timeout: float | None) -> str:
    """Return the error message for a call that took longer than `timeout` seconds."""
    return f"TimeoutError: no answer within {timeout} s of the call's start"


def wait_for(awaitable: Any, timeout: float | None = None) -> Any:
    """Wait for the result of an awaitable.

    The awaitable is cancelled after `timeout` seconds, or if the wait is interrupted. All awaitables of a process run in one
    event loop in a separate thread. Calls can therefore share a client, and the function works in a notebook, where an event
    loop is already running. A coroutine that blocks delays all others.

    Raises:
        TimeoutError: If the awaitable takes longer than `timeout` seconds.
    """

    async def result() -> Any:
        return await asyncio.wait_for(awaitable, timeout)

    future = asyncio.run_coroutine_threadsafe(result(), _loop(os.getpid()))
    try:
        return future.result()
    except asyncio.TimeoutError as error:  # a different class from TimeoutError before Python 3.11
        raise TimeoutError(str(error)) from error
    except BaseException:
        future.cancel()
        raise


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of a process.

    A forked process needs a new loop, since the thread of its parent's loop does not survive the fork.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process}", daemon=True).start()
    return loop


def checked(values: Any, lengths: Sequence[int]) -> list[Value]:
    """Check the return value of a reward function and convert its numbers to float.

    Raises:
        BadValue: If `values` is not one finite number, list of steps or None per completion. The message names the row.
    """
    if values is None:
        raise BadValue(f"returned None for all {len(lengths)} completions; it must return one number each")
    if isinstance(values, (str, bytes, dict, set, frozenset)) or not hasattr(values, "__iter__"):
        raise BadValue(f"must return one number a completion, but returned {values!r}"[:500])
    if getattr(values, "ndim", 1) != 1:  # iterating over it would give rows, or the column names of a DataFrame
        raise BadValue(
            f"must return one number a completion, but returned a {type(values).__name__} of {values.ndim} dimensions"
        )
    values = list(values)
    if len(values) != len(lengths):
        raise BadValue(f"returned {len(values)} values for {len(lengths)} completions; it must return one each")
    return [_checked_value(value, row, lengths) for row, value in enumerate(values)]


def _checked_value(value: Any, row: int, lengths: Sequence[int]) -> Value:
    if value is None:
        return None
    if isinstance(value, (list, tuple)):
        steps = [_checked_step(step, row, lengths[row]) for step in value]
        if [end for end, _ in steps] != sorted({end for end, _ in steps}):
            raise BadValue(f"returned the steps {value!r} for row {row}; their ends must be different and in order"[:500])
        return steps
    return _number(value, row, len(lengths))


def _checked_step(step: Any, row: int, length: int) -> tuple[int, float]:
    if not isinstance(step, (list, tuple)) or len(step) != 2 or not isinstance(step[0], (int, np.integer)):
        raise BadValue(f"returned {step!r} as a step for row {row}; a step is (index of its last token, score)"[:500])
    if not 0 <= step[0] < length:
        raise BadValue(
            f"returned a step that ends at token {step[0]} for row {row}, whose completion has the tokens 0..{length - 1}"
        )
    return int(step[0]), _number(step[1], row, 1)


def _number(value: Any, row: int, count: int) -> float:
    try:
        if isinstance(value, (str, bytes)):
            raise TypeError("text is not a score, even if it reads like a number")
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadValue(f"must return one number a completion, but returned {value!r} for row {row}"[:500]) from error
    if not np.isfinite(number):
        raise BadValue(
            f"returned {value} for row {row} of {count}; rewards must be finite (return None where the function does not apply)"
        )
    return number
