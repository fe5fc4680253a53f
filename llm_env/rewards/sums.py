"""Combine several reward functions into a weighted sum."""

from __future__ import annotations

import functools
import inspect
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llm_env.rewards.calls import BadValue, Called, Steps, Value, call
from llm_env.rewards.pool import PooledReward

RewardFunction = Callable[..., Sequence[Value]]
ALWAYS_GIVEN = ("prompts", "completions", "completion_ids")
ON_REQUEST = ("prompt_texts",)  # passed only to functions whose signature names them
NOT_A_BATCH = ("trainer_state", "log_extra", "log_metric")
ENV_REWARD = "env"  # name of the reward component of a text env
METRIC, EXTRA = NOTES = ("metric/", "extra/")  # prefixes of the info keys for `log_metric` and `log_extra`
LARGEST = float(np.finfo(np.float32).max)
NAME_LIMIT = 24  # SB3 truncates log keys to 36 characters and raises if two collide


def process_reward(function: RewardFunction) -> RewardFunction:
    """Mark a process reward whose step scores depend only on the tokens up to the step's end.

    In an env with one step per token, a marked function is called after every token. Each step is then paid at its token, as
    it is in an env with one step per response. Without the mark, the function is called only at the end of the episode, and
    steps that ended earlier are paid with the last token.

    >>> @process_reward
    ... def even(completion_ids):
    ...     return [[(i, 1.0) for i, token in enumerate(ids) if token % 2 == 0] for ids in completion_ids]
    >>> even([[3, 4, 6]])
    [[(1, 1.0), (2, 1.0)]]
    """

    def marked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    marked.__name__ = type(function).__name__  # for callable objects, which have no __name__
    functools.update_wrapper(marked, function)
    marked.stepwise = True  # type: ignore[attr-defined]
    return marked


@dataclass
class TrainerState:
    """Training progress, for rewards that change during training.

    The attributes have the names of transformers' `TrainerState`.

    Attributes:
        global_step: number of optimizer steps so far; 0 without an agent that trains on the env.
        max_steps: expected total number of optimizer steps, extrapolated from the tokens so far; at least 1.
        epoch: completed fraction of `total_timesteps`, from 0 to 1.
        num_train_epochs: always 1.
        num_input_tokens_seen: number of action tokens so far.
    """

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0
    num_train_epochs: int = 1
    num_input_tokens_seen: int = 0


class _Notes:
    """Values that reward functions log while they score B completions."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number; several numbers with the same name are averaged."""
        self._metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Log one value per completion."""
        if len(values) != self._size:
            raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {self._size} completions")
        self._extras[str(column)] = list(values)

    def columns(self) -> dict[str, list[Any]]:
        """Return everything by its name in infos, B values each."""
        metrics = {METRIC + name: [float(np.mean(values))] * self._size for name, values in self._metrics.items()}
        return metrics | {EXTRA + column: values for column, values in self._extras.items()}


@dataclass
class Scores:
    """Scores of B completions.

    Attributes:
        outcome: (B,) float64, weighted sum of the plain scores, paid with the last token.
        components: (B,) float64 by function name, before weighting. For a process reward this is the sum of its steps; for
            None it is NaN.
        steps: B lists of (index of the step's last token, weighted score), from functions without the `process_reward` mark.
        immediate_steps: B lists of the same form, from functions marked with `process_reward`.
        errors: error messages by row, for rows in which a failed call was given its `on_error` score.
        failed_rows: rows in which a function marked with `process_reward` failed, so that its steps are not known.
        given_steps: rows for which a function returned steps, possibly an empty list.
        given_scores: rows for which a function with a nonzero weight returned a plain score.
        notes: values logged with `log_metric` and `log_extra`: B values per info key.
    """

    outcome: np.ndarray
    components: dict[str, np.ndarray]
    steps: list[Steps]
    immediate_steps: list[Steps]
    errors: dict[int, str]
    failed_rows: set[int]
    given_steps: set[int] = field(default_factory=set)
    given_scores: set[int] = field(default_factory=set)
    notes: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def total(self) -> np.ndarray:
        """Return the (B,) float64 sum of outcome and steps."""
        paid = [sum((score for _, score in a + b), 0.0) for a, b in zip(self.steps, self.immediate_steps, strict=True)]
        return self.outcome + np.array(paid)

    def final_steps(self, row: int, before: int, last: int) -> Steps:
        """Return (token index of payment, score) for the steps that are known only at the end of the episode.

        Steps that end among the first `before` tokens are paid with token `last`, since the env has already returned the
        rewards of those tokens.
        """
        return [(end if end >= before else last, score) for end, score in self.steps[row]]

    def step_ends(self, row: int, before: int, last: int, paid_at_end: bool) -> tuple[int, ...]:
        """Return the token indexes at which rewards are paid.

        The last token is included if it is paid a score, even of 0, or a penalty (`paid_at_end`).
        """
        ends = {end for end, _ in [*self.immediate_steps[row], *self.final_steps(row, before, last)]}
        if paid_at_end or row in self.given_scores:
            ends.add(last)
        return tuple(sorted(map(int, ends)))

    def add(self, name: str, called: Called, weight: float, live: bool) -> None:
        """Add the values of one function."""
        component = np.full(len(called.values), np.nan)
        for row, value in enumerate(called.values):
            if isinstance(value, list):
                component[row] = sum(score for _, score in value)
                kept = self.immediate_steps if live else self.steps
                kept[row] += [(end, weight * score) for end, score in value]
                self.given_steps.add(row)
            elif value is not None:
                component[row] = value
                self.outcome[row] += weight * value
                if weight != 0:
                    self.given_scores.add(row)
        self.components[name] = component
        for row, error in called.errors.items():
            self.errors[row] = "; ".join(filter(None, [self.errors.get(row), error]))
        if live:
            self.failed_rows.update(called.errors)


class RewardSum:
    """Weighted sum of one or more reward functions, with the components by name.

    Args:
        functions: one reward function or several.
        weights: one weight per function; all 1 by default.
        columns: names of the available prompt columns.
        incomplete: columns that some rows lack, each with the index of a row without it.
        required: whether at least one function must exist and score each completion; a text env has rewards without any.

    Attributes:
        names: one name per function, unique and short enough for a log key.
        stepwise: whether a function is marked with `process_reward`.
        replaces_errors: whether a function has a numeric `on_error`.
        trainer_state: training progress, updated by agents.

    Raises:
        TypeError: If a function is not callable.
        ValueError: If there is no function, the number of weights differs from the number of functions, or a function needs
            a column that the prompts or some of their rows lack.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        columns: Sequence[str] = (),
        incomplete: dict[str, int] | None = None,
        required: bool = True,
    ) -> None:
        if not callable(functions) and not isinstance(functions, (list, tuple)):
            raise TypeError(f"reward={functions!r} is a {type(functions).__name__}; give a function or a list of functions")
        self.functions = [functions] if callable(functions) else list(functions)
        self._required = required
        if not self.functions and required:
            raise ValueError("reward is an empty list: give at least one reward function")
        for function in self.functions:
            if not callable(function):
                raise TypeError(f"reward {function!r} is a {type(function).__name__}; it must be callable")
        if weights is not None and (isinstance(weights, (str, bytes, dict)) or not hasattr(weights, "__len__")):
            raise TypeError(f"reward_weights={weights!r} must be a list of numbers, one a reward function")
        weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(weights) != len(self.functions):
            raise ValueError(
                f"reward_weights has {len(weights)} numbers for {len(self.functions)} reward functions; give one each"
            )
        if not all(isinstance(w, (int, float, np.integer, np.floating)) and np.isfinite(w) for w in weights):
            raise ValueError(f"reward_weights={weights} must be finite numbers")
        self.weights = np.asarray(weights, dtype=np.float64)
        self.names = _unique_names(self.functions)
        self.trainer_state = TrainerState()
        self._seconds = dict.fromkeys(self.names, 0.0)
        self._live = [getattr(function, "stepwise", False) for function in self.functions]
        self.stepwise = any(self._live)
        self.replaces_errors = any(getattr(function, "on_error", "raise") != "raise" for function in self.functions)
        self._columns = [
            _wanted_columns(f, name, columns, incomplete or {}) for f, name in zip(self.functions, self.names, strict=True)
        ]

    def __call__(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        prompt_texts: list[str] | None = None,
    ) -> Scores:
        """Score a batch of B completions.

        Args:
            prompts: B texts or chats.
            completions: B texts or chats.
            completion_ids: B lists of token ids.
            columns: B values each, by name.
            prompt_texts: B rendered prompts; by default the prompts that are text, and "" for chats.

        Raises:
            ValueError: If a function raises, or returns a wrong number of values, NaN or infinity; or if no function scores a
                completion. The message names the function and the row.
        """
        given = _reward_inputs(prompts, completions, completion_ids, columns, prompt_texts)
        scores = self._ask(range(len(self.names)), given)
        components = list(scores.components.values()) if self._required else [np.zeros(len(prompts))]
        unscored = np.flatnonzero(np.isnan(np.stack(components)).all(axis=0))
        if len(unscored):
            raise ValueError(
                f"no reward function of {self.names} scored row {unscored[0]} of {len(prompts)} (all returned None): "
                f"prompt {prompts[unscored[0]]!r}, completion {completions[unscored[0]]!r}; at least one must return a number"
            )
        total = scores.total
        over = np.flatnonzero(~(np.abs(total) <= LARGEST))
        if len(over):
            raise ValueError(
                f"the weighted sum of the rewards {self.names} is {total[over[0]]:g} for row {over[0]}: agents "
                f"hold rewards in float32, at most {LARGEST:g}; scale them down"
            )
        return scores

    def steps_so_far(
        self,
        prompts: list[Any],
        completions: list[Any],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        prompt_texts: list[str] | None = None,
    ) -> Scores:
        """Score B unfinished responses with the functions marked with `process_reward`.

        Only the `immediate_steps` of the result are meaningful.
        """
        given = _reward_inputs(prompts, completions, completion_ids, columns, prompt_texts)
        return self._ask(np.flatnonzero(self._live).tolist(), given)

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each function since the last call, and reset them."""
        taken, self._seconds = self._seconds, dict.fromkeys(self.names, 0.0)
        return taken

    def _ask(self, which: Iterable[int], given: dict[str, Any]) -> Scores:
        """Score a batch with the functions whose indexes are in `which`."""
        rows = given["prompts"]
        scores = Scores(np.zeros(len(rows)), {}, [[] for _ in rows], [[] for _ in rows], {}, set())
        notes = _Notes(len(rows))
        logging = {"log_extra": notes.log_extra, "log_metric": notes.log_metric}
        given = {**given, "trainer_state": replace(self.trainer_state), **logging}
        for k in which:
            scores.add(self.names[k], self._call(k, given), float(self.weights[k]), self._live[k])
        scores.notes = notes.columns()
        return scores

    def _call(self, k: int, given: dict[str, Any]) -> Called:
        function, name = self.functions[k], self.names[k]
        wanted = {key: _own(given[key]) for key in self._columns[k]}
        prompts, ids = given["prompts"], given["completion_ids"]
        lengths = [len(row) for row in ids]
        begin = time.perf_counter()
        try:
            if isinstance(function, PooledReward):
                keys = [prompt if isinstance(prompt, str) else pickle.dumps(prompt) for prompt in prompts]
                return function.run(wanted, list(zip(keys, map(tuple, ids), strict=True)), lengths)
            return Called(call(function, wanted, lengths))
        except BadValue as error:
            raise ValueError(f"reward {name!r} {error}; the first prompt of the batch is {prompts[0]!r}") from error
        except Exception as error:
            raise ValueError(
                f"reward {name!r} raised {type(error).__name__}: {error} on a batch of {len(prompts)} completions, the first "
                f"to the prompt {prompts[0]!r}"
            ) from error
        finally:
            self._seconds[name] += time.perf_counter() - begin


def _reward_inputs(
    prompts: list[Any], completions: list[Any], completion_ids: list[Any], columns: dict[str, Any], texts: list[str] | None
) -> dict[str, Any]:
    texts = [prompt if isinstance(prompt, str) else "" for prompt in prompts] if texts is None else texts
    always = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    return {**columns, **always, "prompt_texts": texts}


def _own(value: Any) -> Any:
    """Copy nested lists and dicts, since a reward function may modify its arguments."""
    if type(value) is list:
        return [_own(v) if type(v) in (list, dict) else v for v in value]
    if type(value) is dict:
        return {key: _own(v) for key, v in value.items()}
    return value


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        bound = function.func if isinstance(function, functools.partial) else function
        full = getattr(bound, "__name__", type(bound).__name__).strip("<>")
        name, count = full[:NAME_LIMIT], 1
        while name in names:
            count += 1
            suffix = f"_{count}"
            name = full[: NAME_LIMIT - len(suffix)] + suffix
        names.append(name)
    return names


def _wanted_columns(function: RewardFunction, name: str, columns: Sequence[str], incomplete: dict[str, int]) -> list[str]:
    """Return the keywords to call `function` with: all if it takes `**kwargs`, else those it names."""
    batches = [*ALWAYS_GIVEN, *(column for column in columns if column not in (*ALWAYS_GIVEN, *ON_REQUEST, *NOT_A_BATCH))]
    on_offer = batches if isinstance(function, PooledReward) else [*batches, *NOT_A_BATCH]
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin without a signature
        return on_offer
    if nameless := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        raise ValueError(
            f"reward {name!r} takes {nameless} by position only, but rewards are called with keywords, as "
            "f(prompts=..., completions=...); wrap it in a function that takes 'completions'"
        )
    needed = [p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    missing = [key for key in needed if key not in (*on_offer, *ON_REQUEST)]
    if alone := [key for key in missing if key in NOT_A_BATCH]:
        raise ValueError(
            f"reward {name!r} needs {alone[0]!r}, which a PooledReward does not pass on: it calls the function for a few "
            "completions at a time, possibly in another process; pass the function itself as reward"
        )
    if singular := [key for key in missing if key in ("prompt", "completion")]:
        raise ValueError(
            f"reward {name!r} needs {singular}, but rewards are called with lists, prompts and completions; name its "
            f"parameters {[f'{key}s' for key in singular]} and return one number for each completion"
        )
    if "environments" in missing:
        raise ValueError(
            f"reward {name!r} needs 'environments', which TRL passes with its environment_factory; llm_env has none: read "
            "what it needs from columns of the prompts"
        )
    if missing:
        raise ValueError(
            f"reward {name!r} needs {missing}, but the prompts have only the columns {list(columns)}; add the column to "
            f"every row (dicts with 'prompt' and {missing[0]!r}) or give the parameter a default"
        )
    for key in needed:
        if key in incomplete and key not in ALWAYS_GIVEN:
            raise ValueError(
                f"reward {name!r} needs the column {key!r}, but row {incomplete[key]} of the prompts has none; add it"
            )
    named = {p.name for p in parameters}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return [*on_offer, *(key for key in ON_REQUEST if key in named)]
    return [key for key in (*on_offer, *ON_REQUEST) if key in named]
