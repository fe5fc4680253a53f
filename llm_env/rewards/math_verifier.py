"""Compare mathematical expressions with Math-Verify, in worker processes that are killed at a time-out."""

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
_WITH_UNIT = re.compile(r"[-+]?[0-9][0-9.,/]*\s[A-Za-z]{3,}")  # 72 clips, which is no product c l i p s
_EXPRESSION = re.compile(r"[0-9\\^_=+*/()\[\]{}<>-]|^[A-Za-z]$")  # and no words


def math_gold(reference: Any, think_tags: ThinkTags = THINK_TAGS) -> str:
    r"""Return a reference in a form from which Math-Verify extracts all of it, and not only a number in it.

    Math-Verify reads LaTeX between delimiters only: of a bare `2\sqrt{3}` it takes the 2. A reference that is one number and
    nothing else becomes a fraction, exactly. All other bare expressions are put between `$`. Text with delimiters, words, and
    a number with its unit ("72 clips") stay as they are.

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
    """Return the pool that compares completions with golds: one for each time-out, shared by all callers.

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
    """Compare completions with golds, in a worker process."""

    def __call__(self, completions: list[str], golds: list[str]) -> list[float | None]:
        """1.0 or 0.0 for each completion; None where the gold parses to nothing."""
        package = importlib.import_module("math_verify")
        for name in ("parser", "grader"):
            logging.getLogger(f"math_verify.{name}").setLevel(logging.ERROR)  # it warns that nothing limits the time
        scores: list[float | None] = []
        for completion, gold in zip(completions, golds, strict=True):
            expected = package.parse(gold, parsing_timeout=None)
            given = package.parse(completion, parsing_timeout=None) if expected else []
            scores.append(float(package.verify(expected, given, timeout_seconds=None)) if expected else None)
        return scores

    def __reduce__(self) -> tuple[Callable[[], _Comparison], tuple[()]]:
        return _prepared, ()


def _prepared() -> _Comparison:
    """A comparison in a process that has imported and used Math-Verify, so that the time of the first call is the call's."""
    comparison = _Comparison()
    comparison(completions=["$1$"], golds=["$1$"])
    return comparison
