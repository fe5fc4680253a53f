"""Several reward functions as one number a completion."""

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
ON_REQUEST = ("prompt_texts",)  # given to functions that name them
NOT_A_BATCH = ("trainer_state", "log_extra", "log_metric")
METRIC, EXTRA = NOTES = ("metric/", "extra/")  # what `log_metric` and `log_extra` are called in infos
LARGEST = float(np.finfo(np.float32).max)
NAME_LIMIT = 24  # SB3 cuts log keys at 36 characters and refuses two that collide


def process_reward(function: RewardFunction) -> RewardFunction:
    """Mark a reward function whose steps depend on nothing that comes after their end.

    On the token clock such a function is asked after every token, so that each step is paid at its token as on the response
    clock. Steps of an unmarked function are known, and paid, only at the end of an episode that is stepped token by token.

    >>> @process_reward
    ... def even(completion_ids):
    ...     return [[(i, 1.0) for i, token in enumerate(ids) if token % 2 == 0] for ids in completion_ids]
    >>> even([[3, 4, 6]])
    [[(1, 1.0), (2, 1.0)]]
    """

    def marked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    marked.__name__ = type(function).__name__  # an object has no name
    functools.update_wrapper(marked, function)
    marked.stepwise = True  # type: ignore[attr-defined]
    return marked


@dataclass
class TrainerState:
    """How far training is, for rewards that change on the way; by the names of transformers' own.

    Attributes:
        global_step: optimizer steps so far; 0 in an env that no agent trains on.
        max_steps: how many there will be, extrapolated from the tokens so far; at least 1.
        epoch: the share of `total_timesteps` that is over, from 0 to 1.
        num_train_epochs: 1, of which `epoch` is a share.
        num_input_tokens_seen: action tokens so far.
    """

    global_step: int = 0
    max_steps: int = 1
    epoch: float = 0.0
    num_train_epochs: int = 1
    num_input_tokens_seen: int = 0


class _Notes:
    """What reward functions log while they score B completions."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._metrics: dict[str, list[float]] = {}
        self._extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        """Note a number for the logs; several of one name are averaged."""
        self._metrics.setdefault(str(name), []).append(float(value))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Note one value a completion."""
        if len(values) != self._size:
            raise ValueError(f"log_extra({column!r}, ...) was given {len(values)} values for {self._size} completions")
        self._extras[str(column)] = list(values)

    def columns(self) -> dict[str, list[Any]]:
        """Return everything by its name in infos, B values each."""
        metrics = {METRIC + name: [float(np.mean(values))] * self._size for name, values in self._metrics.items()}
        return metrics | {EXTRA + column: values for column, values in self._extras.items()}


@dataclass
class Scores:
    """What B completions are worth.

    Attributes:
        outcome: (B,) float64, weighted sum of the plain scores, to be paid with the last token.
        components: (B,) float64 by name, before weighting; NaN for None, the sum of its steps for a process reward.
        steps: B lists of (index of the step's last token, weighted score), of functions that see whole responses.
        immediate_steps: the same of functions marked with `process_reward`.
        errors: by row, what went wrong where a policy put a value in a score's place.
        failed_rows: rows in which that happened to a function marked with `process_reward`: its steps are not known.
        given_steps: rows of which some function gave steps, if only an empty list.
        given_scores: rows to which some function of a weight other than 0 gave a plain score.
        notes: what functions logged with `log_metric` and `log_extra`, by its key in infos, B values each.
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
        """(B,) float64: outcome and steps together."""
        paid = [sum((score for _, score in a + b), 0.0) for a, b in zip(self.steps, self.immediate_steps, strict=True)]
        return self.outcome + np.array(paid)

    def final_steps(self, row: int, before: int, last: int) -> Steps:
        """Return the steps that are known only when token `last` ends the episode, with the token at which they are paid.

        Those that end among the first `before` tokens are paid with the last: these tokens have gone.
        """
        return [(end if end >= before else last, score) for end, score in self.steps[row]]

    def step_ends(self, row: int, before: int, last: int, paid_at_end: bool) -> tuple[int, ...]:
        """The tokens at which a step's reward is paid; the last is one if it is paid a score, even of 0, or a penalty."""
        ends = {end for end, _ in [*self.immediate_steps[row], *self.final_steps(row, before, last)]}
        if paid_at_end or row in self.given_scores:
            ends.add(last)
        return tuple(sorted(map(int, ends)))

    def add(self, name: str, called: Called, weight: float, live: bool) -> None:
        """Take in what one function said."""
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
    """The weighted sum of one or more reward functions, with every component kept by name.

    Args:
        functions: one reward function or several.
        weights: one weight a function; all 1 when left out.
        columns: names of the prompt columns that will be on offer; a function that needs another is refused here.
        incomplete: for each column that is not in every row, a row without it; a function that needs it is refused, too.

    Attributes:
        names: one name a function, unique and short enough for a log key.
        stepwise: whether some function is marked with `process_reward`.
        replaces_errors: whether some function has a policy that pays a number where it failed.
        trainer_state: how far training is; agents keep it.

    Raises:
        TypeError: If a function is not callable.
        ValueError: If no function, another number of weights, or a column that the prompts do not have.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        columns: Sequence[str] = (),
        incomplete: dict[str, int] | None = None,
    ) -> None:
        if not callable(functions) and not isinstance(functions, (list, tuple)):
            raise TypeError(f"reward={functions!r} is a {type(functions).__name__}; give a function or a list of functions")
        self.functions = [functions] if callable(functions) else list(functions)
        if not self.functions:
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
            prompt_texts: the prompts as they are rendered; by default those that are text, and "" for chats.

        Raises:
            ValueError: If a function raised, or returned another number of values, a NaN or an infinity, or no function
                scored some completion. The message names the function and the row.
        """
        given = _reward_inputs(prompts, completions, completion_ids, columns, prompt_texts)
        scores = self._ask(range(len(self.names)), given)
        unscored = np.flatnonzero(np.isnan(np.stack(list(scores.components.values()))).all(axis=0))
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
        """Return what the functions marked with `process_reward` say of B responses under way; their steps are what counts."""
        given = _reward_inputs(prompts, completions, completion_ids, columns, prompt_texts)
        return self._ask(np.flatnonzero(self._live).tolist(), given)

    def take_seconds(self) -> dict[str, float]:
        """Seconds spent in each function since this was last asked."""
        taken, self._seconds = self._seconds, dict.fromkeys(self.names, 0.0)
        return taken

    def _ask(self, which: Iterable[int], given: dict[str, Any]) -> Scores:
        """Return what the functions number `which` say of a batch."""
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
    """Return a copy of nested lists and dicts: a reward function may change its arguments."""
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
    """Return the keywords to call `function` with: all on offer if it takes `**kwargs`, else those that it names."""
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
            f"reward {name!r} needs {alone[0]!r}, which a PooledReward does not hand on: it calls the function for a few "
            "completions at a time, perhaps in another process; give the function itself as reward"
        )
    if singular := [key for key in missing if key in ("prompt", "completion")]:
        raise ValueError(
            f"reward {name!r} needs {singular}, but rewards are called with lists, prompts and completions; name its "
            f"parameters {[f'{key}s' for key in singular]} and return one number for each completion"
        )
    if "environments" in missing:
        raise ValueError(
            f"reward {name!r} needs 'environments', which TRL gives with its environment_factory; there are none here: take "
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
