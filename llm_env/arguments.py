"""What users hand in, checked where it enters: whole numbers, numbers, arrays of them, text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np


def as_int(value: Any) -> int | None:
    """A whole number of any kind (Python's, numpy's, a scalar tensor) as an int; None for what is none, bools included."""
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_int(name: str, value: Any, least: int, most: int | None = None) -> int:
    """`value` as an int.

    Raises:
        ValueError: If it is no whole number from `least` to `most`.
    """
    number = as_int(value)
    if number is None or number < least or (most is not None and number > most):
        at_most = "" if most is None else f", at most {most}"
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}{at_most}")
    return number


def integers(values: Any, what: str, expected: str) -> np.ndarray:
    """`values` as a one-dimensional int64 array.

    Args:
        values: a flat sequence of whole numbers; an empty one may have any type.
        what: begins the error message.
        expected: what must be given instead; the second half of the message.

    Raises:
        ValueError: If they are no such thing.
    """
    try:
        found = np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} must be {expected}; got rows of different lengths") from error
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise ValueError(f"{what} must be {expected}; got shape {found.shape} of {found.dtype}")
    if found.dtype == np.uint64 and len(found) and found.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{what} must be {expected}; {found.max()} is none")
    return found.astype(np.int64)


def finite(values: Any, what: str) -> np.ndarray:
    """`values` as a float64 array.

    Raises:
        ValueError: If they are no numbers, or not finite ones.
    """
    try:
        found = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a flat sequence of numbers; got {values!r}"[:500]) from error
    if not np.isfinite(found).all():
        raise ValueError(f"{what} must be finite; position {np.argwhere(~np.isfinite(found))[0].tolist()} is not")
    return found


def one_per_row(given: Any, name: str, num_envs: int) -> list[Any]:
    """Return the entries of `given`, one for each row of a vector env.

    Raises:
        TypeError: If it is nothing to walk through in order.
        ValueError: If there are more or fewer.
    """
    if isinstance(given, (str, bytes, dict, set, frozenset)) or not hasattr(given, "__iter__"):
        raise TypeError(f"{name} is a {type(given).__name__}; give a list, one entry for each of {num_envs} rows")
    rows = list(given)
    if len(rows) != num_envs:
        raise ValueError(f"{len(rows)} {name} for num_envs={num_envs} rows; give one each")
    return rows


def check_text(text: str, what: str) -> None:
    """Refuse a str with half of a surrogate pair, as JSON can hold it: no valid text, which tokenizers cannot read.

    Raises:
        ValueError: If there is one; the message says where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} is no valid text: character {error.start} is {text[error.start]!r}, half of a surrogate pair; replace it, "
            "for instance with text.encode('utf-8', 'replace').decode()"
        ) from error


def reset_options(options: Any, known: Sequence[str]) -> dict[str, Any]:
    """Return the options of a reset, none for None.

    Raises:
        TypeError: If they are no dict.
        ValueError: If one of them is not known: a misspelt one would go unnoticed.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(f"options={options!r} must be a dict with any of the keys {list(known)}, or None")
    if unknown := [key for key in options if key not in known]:
        raise ValueError(f"the reset options {unknown} are not known; give any of {list(known)}")
    return options
