"""One call of a reward function: plain or awaited, and what may come back."""

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
    """What a reward function returned is no score."""


Steps = list[tuple[int, float]]
Value = float | Steps | None


@dataclass
class Called:
    """What a reward function said of B completions.

    Attributes:
        values: one a completion: a number, the steps of a process reward, or None for "not applicable".
        errors: by row, what went wrong where the policy put a value in the score's place.
    """

    values: list[Value]
    errors: dict[int, str] = field(default_factory=dict)


def call(
    function: Callable[..., Any], given: dict[str, Any], lengths: Sequence[int], timeout: float | None = None
) -> list[Value]:
    """Call a reward function on a batch, await it if it is asynchronous, and check what comes back.

    Args:
        function: the reward function.
        given: its keyword arguments.
        lengths: tokens of each completion.
        timeout: seconds after which an asynchronous one is cancelled.

    Raises:
        BadValue: If what it returned is not one finite number, list of steps or None a completion.
    """
    values = function(**given)
    if inspect.isawaitable(values):
        values = wait_for(values, timeout)
    return checked(values, lengths)


def attempt(
    function: Callable[..., Any], given: dict[str, Any], lengths: Sequence[int], timeout: float | None = None
) -> list[Value] | str:
    """Return the values of one call, or the message of its failure; see `call`."""
    try:
        return call(function, given, lengths, timeout)
    except BadValue as error:
        return str(error)
    except TimeoutError as error:
        return f"TimeoutError: {error}" if str(error) else time_out_message(timeout)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def time_out_message(timeout: float | None) -> str:
    """Return the message of a call that took longer than `timeout` seconds."""
    return f"TimeoutError: no answer within {timeout} s of the call's start"


def wait_for(awaitable: Any, timeout: float | None = None) -> Any:
    """Return the result of an awaitable, which is cancelled after `timeout` seconds and where the wait is interrupted.

    All are awaited in one loop, in a separate thread, so that a client may be shared between calls and a notebook, whose own
    loop is running, is no special case. A coroutine that blocks holds up the others.

    Raises:
        TimeoutError: If it took longer.
    """

    async def result() -> Any:
        return await asyncio.wait_for(awaitable, timeout)

    future = asyncio.run_coroutine_threadsafe(result(), _loop(os.getpid()))
    try:
        return future.result()
    except asyncio.TimeoutError as error:  # before Python 3.11 not yet TimeoutError itself
        raise TimeoutError(str(error)) from error
    except BaseException:
        future.cancel()
        raise


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the loop of a process; a forked one has no use for its parent's, whose thread it did not get."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"rewards-{process}", daemon=True).start()
    return loop


def checked(values: Any, lengths: Sequence[int]) -> list[Value]:
    """Return one value a completion, numbers as floats.

    Raises:
        BadValue: If it is not one finite number, list of steps or None a completion; the message names the row.
    """
    if values is None:
        raise BadValue(f"returned None for all {len(lengths)} completions; it must return one number each")
    if isinstance(values, (str, bytes, dict, set, frozenset)) or not hasattr(values, "__iter__"):
        raise BadValue(f"must return one number a completion, but returned {values!r}"[:500])
    if getattr(values, "ndim", 1) != 1:  # iterating would give rows, and for a table the names of its columns
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
            raise TypeError("text is no score, even where it reads like a number")
        number = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise BadValue(f"must return one number a completion, but returned {value!r} for row {row}"[:500]) from error
    if not np.isfinite(number):
        raise BadValue(
            f"returned {value} for row {row} of {count}; rewards must be finite (return None where the function does not apply)"
        )
    return number
