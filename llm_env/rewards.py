"""Reward functions in TRL's convention, and how several become one number.

A reward function is any callable `f(prompts, completions, **columns) -> list[float]`: `prompts` and `completions` are
lists of str of one length, every column of the prompts comes as a keyword with a list of that length, and so does
`completion_ids` (lists of token ids). Of these it is given what its signature names, or all of them with `**kwargs`.
It returns one number a completion; None says "not applicable to this one".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llm_env.answers import final_answer as final_answer
from llm_env.answers import parse_number as parse_number

RewardFunction = Callable[..., Sequence[float | None]]
ALWAYS_GIVEN = ("prompts", "completions", "completion_ids")
NAME_LIMIT = 24  # SB3 cuts log keys at 36 characters and refuses two that collide


class RewardSum:
    """The weighted sum of one or more reward functions, with every component kept by name.

    Args:
        functions: one reward function or several.
        weights: one weight a function; all 1 when left out.
        columns: names of the prompt columns that will be on offer; a function that needs another is refused here.
        incomplete: for each column that is not in every row, a row without it; a function that needs it is refused, too.

    Attributes:
        names: one name a function, unique and short enough for a log key.

    Raises:
        TypeError: a function is not callable.
        ValueError: no function, another number of weights, or a column that the prompts do not have.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        columns: Sequence[str] = (),
        incomplete: dict[str, int] | None = None,
    ) -> None:
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
            raise ValueError("reward is an empty list: give at least one reward function")
        for function in self.functions:
            if not callable(function):
                raise TypeError(f"reward {function!r} is a {type(function).__name__}; it must be callable")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(self.functions)} reward functions; give one each"
            )
        self.weights = np.asarray(weights, dtype=np.float64)
        if not np.isfinite(self.weights).all():
            raise ValueError(f"reward_weights={weights} must be finite numbers")
        self.names = _unique_names(self.functions)
        self._columns = [
            _wanted_columns(f, name, columns, incomplete or {}) for f, name in zip(self.functions, self.names, strict=True)
        ]

    def __call__(
        self, prompts: list[str], completions: list[str], completion_ids: list[list[int]], columns: dict[str, list[Any]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Score a batch.

        Returns:
            The weighted sums, shape (B,), and the components before weighting by name, each (B,), NaN for None.

        Raises:
            ValueError: a function raised, or returned another number of values, a NaN or an infinity, or no function
                scored some completion. The message names the function and the row.
        """
        given = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        components = {
            name: _call(function, name, {key: given[key] for key in wanted}, prompts)
            for function, name, wanted in zip(self.functions, self.names, self._columns, strict=True)
        }
        scores = np.stack(list(components.values()))
        unscored = np.flatnonzero(np.isnan(scores).all(axis=0))
        if len(unscored):
            raise ValueError(
                f"no reward function of {self.names} scored row {unscored[0]} of {len(prompts)} (all returned None): "
                f"prompt {prompts[unscored[0]]!r}, completion {completions[unscored[0]]!r}; at least one must return a number"
            )
        return np.nansum(scores * self.weights[:, None], axis=0), components


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        full = getattr(function, "__name__", type(function).__name__).strip("<>")
        name, count = full[:NAME_LIMIT], 1
        while name in names:
            count += 1
            suffix = f"_{count}"
            name = full[: NAME_LIMIT - len(suffix)] + suffix
        names.append(name)
    return names


def _wanted_columns(function: RewardFunction, name: str, columns: Sequence[str], incomplete: dict[str, int]) -> list[str]:
    """The keywords to call `function` with: all on offer if it takes `**kwargs`, else those that it names."""
    on_offer = [*ALWAYS_GIVEN, *(column for column in columns if column not in ALWAYS_GIVEN)]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return on_offer
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [key for key in needed if key not in on_offer]:
        raise ValueError(
            f"reward {name!r} needs {missing}, but the prompts have only the columns {list(columns)}; add the column to "
            f"every row (dicts with 'prompt' and {missing[0]!r}) or give the parameter a default"
        )
    for key in needed:
        if key in incomplete and key not in ALWAYS_GIVEN:
            raise ValueError(
                f"reward {name!r} needs the column {key!r}, but row {incomplete[key]} of the prompts has none; add it"
            )
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return on_offer
    named = {p.name for p in parameters}
    return [key for key in on_offer if key in named]


def _call(function: RewardFunction, name: str, given: dict[str, Any], prompts: list[str]) -> np.ndarray:
    try:
        values = function(**given)
    except Exception as error:
        raise ValueError(
            f"reward {name!r} raised {type(error).__name__}: {error} on a batch of {len(prompts)} completions, the first "
            f"to the prompt {prompts[0]!r}"
        ) from error
    if values is None:
        raise ValueError(f"reward {name!r} returned None for all {len(prompts)} completions; it must return one number each")
    try:
        scores = np.array([np.nan if value is None else float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise ValueError(f"reward {name!r} must return one number a completion, but returned {values!r}"[:500]) from error
    if len(scores) != len(prompts):
        raise ValueError(
            f"reward {name!r} returned {len(scores)} values for {len(prompts)} completions; it must return one each"
        )
    for row, value in enumerate(values):
        if value is not None and not np.isfinite(scores[row]):
            raise ValueError(
                f"reward {name!r} returned {value} for row {row} of {len(prompts)}, the prompt {prompts[row]!r}; rewards must "
                "be finite (return None where the function does not apply)"
            )
    return scores


# --- reward functions that ship ---------------------------------------------------------------------------------------


def exact_match(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    """1.0 where the completion, stripped of white space, is the final answer of the column `answer`, else 0.0."""
    return [float(c.strip() == final_answer(str(a))) for c, a in zip(completions, answer, strict=True)]


def numeric_answer(completions: list[str], answer: list[Any], **_: Any) -> list[float]:
    r"""1.0 where the completion's final answer is the number that the column `answer` ends in, else 0.0.

    The column holds a number, or a solution in GSM8K's form (`... #### 72`). Which number of a completion counts, and which
    forms are understood, says `llm_env.answers.parse_number`.

    >>> numeric_answer(completions=["So she sold 1,072.00 clips."], answer=["... #### 1072"])
    [1.0]
    """
    scores = []
    for completion, reference in zip(completions, answer, strict=True):
        expected = parse_number(str(reference))
        if expected is None:
            raise ValueError(f"the column 'answer' holds {reference!r}, which ends in no number")
        scores.append(float(parse_number(completion) == expected))
    return scores
