"""Validate user arguments: integers, floats, arrays, text and reset options."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def as_int(value: Any) -> int | None:
    """Convert an integer of any type (Python, NumPy, scalar tensor) to an int.

    Returns None if `value` is not an integer. A bool is not an integer here.
    """
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_seconds(name: str, value: Any) -> float | None:
    """Return a time limit; None for no limit.

    Raises:
        ValueError: If it is neither None nor a positive number.
    """
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if value is not None and not (is_number and value > 0):
        raise ValueError(f"{name}={value!r} must be a positive number of seconds, or None")
    return value


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Convert `value` to an int and check its range.

    Args:
        name: name of the argument, for the error message.
        value: the value to check.
        least: the minimum.
        most: the maximum; default no maximum.

    Raises:
        ValueError: If `value` is not an integer from `least` to `most`.
    """
    number = as_int(value)
    if number is None or number < least or (most is not None and number > most):
        at_most = "" if most is None else f", at most {most}"
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{at_most}")
    return number


def integers(values: Any, what: str, expected: str) -> np.ndarray:
    """Convert `values` to a one-dimensional int64 array.

    Args:
        values: a flat sequence of integers; an empty sequence may have any dtype.
        what: name of the argument, for the error message.
        expected: description of valid values, for the error message.

    Raises:
        ValueError: If `values` is not a flat sequence of integers that fit into int64.
    """
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} must be {expected}; got rows of different lengths") from error
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"{what} must be {expected}; got shape {found.shape} of {found.dtype}")
    if found.dtype == np.uint64 and len(found) and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{what} must be {expected}; got {found.max()}, which does not fit into int64")
    return found.astype(np.int64)


def finite(values: Any, what: str) -> np.ndarray:
    """Convert `values` to a float64 array and check that all of them are finite.

    Args:
        values: numbers, in any shape.
        what: name of the argument, for the error message.

    Raises:
        ValueError: If a value is not a number or not finite.
    """
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a flat sequence of numbers; got {values!r}"[:500]) from error
    if not np.isfinite(found).all():
        raise ValueError(f"{what} must be finite; position {np.argwhere(~np.isfinite(found))[0].tolist()} is not")
    return found


def one_per_row(given: Any, name: str, num_envs: int) -> list[Any]:
    """Convert `given` to a list with one entry per row of a vector env.

    Raises:
        TypeError: If `given` is not an ordered iterable.
        ValueError: If its length is not `num_envs`.
    """
    if isinstance(given, (str, bytes, dict, set, frozenset)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} is a {type(given).__name__}; give a list, one entry for each of {num_envs} rows")
    rows = list(given)
    if len(rows) != num_envs:
        raise ValueError(f"{len(rows)} {name} for num_envs={num_envs} rows; give one each")
    return rows


def check_text(text: str, what: str) -> None:
    """Raise if a str has an unpaired surrogate.

    JSON allows unpaired surrogates, but tokenizers cannot encode them.

    Args:
        text: the text to check.
        what: name of the text, for the error message.

    Raises:
        ValueError: If `text` has an unpaired surrogate. The message has its position.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is no valid text: character {error.start} is {text[error.start]!r}, half of a surrogate pair; replace it, "
            "for instance with text.encode('utf-8', 'replace').decode()"
        ) from error


def reset_options(options: Any, known: Sequence[str]) -> dict[str, Any]:
    """Check the keys of reset options; None becomes an empty dict.

    Raises:
        TypeError: If `options` is neither a dict nor None.
        ValueError: If a key is not in `known`. Otherwise a misspelled key would be ignored silently.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(f"options={options!r} must be a dict with any of the keys {list(known)}, or None")
    if unknown := [key for key in options if key not in known]:
        raise ValueError(f"the reset options {unknown} are not known; give any of {list(known)}")
    return options
