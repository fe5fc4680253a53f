"""Compare mathematical expressions with Math-Verify, in worker processes with a timeout."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from collections.abc import Callable
from typing import Any

from llm_env.rewards.answers import THINK_TAGS, ThinkTags, final_answer, parse_number_only, reference_text, strip_thoughts
from llm_env.rewards.pool import PooledReward

WORKERS = 2  # processes; each holds about as much memory as `import llm_env` takes
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\boxed")
_WITH_UNIT = re.compile(r"[-+]?[0-9][0-9.,/]*\s[A-Za-z]{3,}")  # "72 clips", not a product of the variables c, l, i, p, s
_EXPRESSION = re.compile(r"[0-9\\^_=+*/()\[\]{}<>-]|^[A-Za-z]$")  # excludes words


def math_gold(reference: Any, think_tags: ThinkTags = THINK_TAGS) -> str:
    r"""Format a reference so that Math-Verify extracts the whole expression.

    Math-Verify reads LaTeX only between delimiters: from `2\sqrt{3}` without them it extracts the 2. A reference that is a
    single number is converted to an exact fraction. Other expressions without delimiters are put between `$`. Text with
    delimiters, words, and a number with its unit ("72 clips") are returned unchanged.

    >>> math_gold(1e-05), math_gold("... #### 1,072"), math_gold(r"2\sqrt{3}"), math_gold(r"\boxed{x^2}"), math_gold("none")
    ('$1/100000$', '$1072$', '$2\\sqrt{3}$', '\\boxed{x^2}', 'none')
    """
    text = strip_thoughts(reference_text(reference), think_tags).rpartition("####")[2].strip()
    if _DELIMITED.search(text):
        return text
    text = final_answer(text, ())
    number = parse_number_only(text)
    if number is not None:
        return f"${reference_text(number)}$"
    return f"${text}$" if _EXPRESSION.search(text) and not _WITH_UNIT.fullmatch(text) else text


@functools.cache
def math_verifier(timeout: float) -> PooledReward:
    """Return the worker pool that compares completions with references.

    There is one pool per timeout, shared by all callers.

    Args:
        timeout: seconds for one completion.

    Raises:
        ImportError: If math-verify is not installed.
    """
    try:
        importlib.import_module("math_verify")
    except ImportError as error:
        raise ImportError('math_answer needs math-verify: pip install "llm-env[math]"') from error
    pool = PooledReward(_Comparison(), workers=WORKERS, processes=True, timeout=timeout, on_error=0.0)
    pool.__name__ = "math_answer"
    return pool


class _Comparison:
    """Reward function that runs in a worker process and compares completions with references."""

    def __call__(self, completions: list[str], golds: list[str]) -> list[float | None]:
        """Return 1.0 or 0.0 for each completion, or None if its reference has no expression."""
        package = importlib.import_module("math_verify")
        for name in ("parser", "grader"):
            logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)  # silence its warning about a missing timeout
        scores: list[float | None] = []
        for completion, gold in zip(completions, golds, strict=True):
            expected = package.parse(gold, parsing_timeout=None)
            given = package.parse(completion, parsing_timeout=None) if expected else []
            scores.append(float(package.verify(expected, given, timeout_seconds=None)) if expected else None)
        return scores

    def __reduce__(self) -> tuple[Callable[[], _Comparison], tuple[()]]:
        return _prepared, ()


def _prepared() -> _Comparison:
    """Import and use Math-Verify once, so that the first call's timeout does not include the import."""
    comparison = _Comparison()
    comparison(completions=["$1$"], golds=["$1$"])
    return comparison
