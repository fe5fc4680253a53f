"""Text environments: Gymnasium's reset and step over text, with seeds in the place of prompts."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from gymnasium.envs.registration import load_env_creator

from llm_env.arguments import as_int, check_int, check_seconds, check_text
from llm_env.dialogue.chat import Messages, check_message
from llm_env.threads import call_all, within

Text = str | list[dict[str, Any]]
LARGEST_SEED = 2**32 - 1  # accepted by numpy's and Python's global generators
SEEDS_CHECKED = 2
CHECKED_TURNS = ("a", "1", "")  # actions of the seed check
ENDLESS = 2**31  # number of seeds with num_tasks=None


@runtime_checkable
class TextEnv(Protocol):
    """A multi-turn environment: Gymnasium's five values over text.

    A text is a str, or a list of messages `{"role": ..., "content": ...}`. An env may also have

    - `close()`, called when it is no longer needed;
    - `final_reward() -> float`, called once if a limit of the token env ends the episode (`max_turns`, `max_episode_tokens`, a
      turn's limit, `rollout_timeout`); what it returns is paid at the episode's last action token. It is not called when `step`
      ends the episode;
    - an attribute `keeps_special_tokens = True`, to get turns with their special tokens (without end tokens). Some models mark
      tool calls with them.

    Examples:
        >>> import numpy as np
        >>> class GuessNumber:
        ...     def reset(self, *, seed=None):
        ...         self.number = int(np.random.default_rng(seed).integers(1, 8))
        ...         return "guess 1-7: ", {}
        ...     def step(self, action):
        ...         guess = int(action) if action.isdigit() else 0
        ...         if guess == self.number:
        ...             return "", 1.0, True, False, {"is_success": True}
        ...         return "higher " if guess < self.number else "lower ", 0.0, False, False, {}
        >>> isinstance(GuessNumber(), TextEnv)
        True
    """

    def reset(self, *, seed: int | None = None) -> tuple[Text, dict[str, Any]]:
        """Start an episode; return the first observation and an info. The episode must depend on the seed only."""

    def step(self, action: str) -> tuple[Text, float, bool, bool, dict[str, Any]]:
        """Take a turn; return observation, reward, terminated, truncated and info."""


@dataclass(frozen=True)
class Transition:
    """The result of one step of a text env.

    Attributes:
        observation: a str or a list of messages.
        reward: the reward of the turn.
        terminated: whether the episode has ended.
        truncated: whether the text env cut the episode off.
        info: the info of the step.
        messages: the turn and the observation as reward functions get them; None for a plain assistant message and the
            observation.
    """

    observation: Text
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
    messages: Messages | None = None


class TextEnvTasks:
    """Tasks of a text env: task `i` is the episode of `reset(seed=first_seed + i)`.

    Args:
        make: a class or a function without arguments that returns a `TextEnv`; or its name, `"module:Class"`.
        num_tasks: number of seeds; None for fresh seeds without end.
        first_seed: seed of task 0.
        check_seeds: play two seeds twice with the same actions, and raise if the results differ.
        workers: maximum number of instances that are stepped at a time, each in a thread.
        timeout: seconds that a `reset` or `step` may take; None for no limit. A thread cannot be stopped: an instance that
            takes longer is left to itself, and a new one takes its place.
        on_error: `"raise"`, or the reward of a turn whose `step` raises an exception or takes too long. The episode ends with
            this turn, and its last info has the message as `env_error`.

    Attributes:
        checked_observations: the observations after turns that the check of the seeds has met.
        keeps_special_tokens: whether instances get turns with their special tokens.

    Raises:
        TypeError: If `make` cannot be called, or what it returns has no `reset` and `step`.
        ValueError: If the arguments are out of range, the text env returns unusable values, or it ignores its seed.
    """

    def __init__(
        self,
        make: Any,
        num_tasks: int | None = 1000,
        first_seed: int = 0,
        check_seeds: bool = True,
        workers: int = 1,
        timeout: float | None = None,
        on_error: float | str = "raise",
    ) -> None:
        self.make: Callable[[], Any] = load_env_creator(make) if isinstance(make, str) else make
        if not callable(self.make):
            raise TypeError(f"make={make!r} must be a class or a function that returns a text env, or its name 'module:Class'")
        self.name = getattr(self.make, "__name__", type(self.make).__name__)
        self.num_tasks = ENDLESS if num_tasks is None else check_int("num_tasks", num_tasks, 1, ENDLESS)
        self.first_seed = check_int("first_seed", first_seed, 0, LARGEST_SEED + 1 - self.num_tasks)
        self.endless = num_tasks is None
        self.workers = check_int("workers", workers, 1)
        if on_error != "raise" and not (_is_number(on_error) and math.isfinite(float(on_error))):
            raise ValueError(f"on_error={on_error!r} must be 'raise', or the reward of a turn that fails")
        self.timeout, self.on_error = check_seconds("timeout", timeout), on_error
        self._seconds = 0.0
        self.keeps_special_tokens = False
        self.checked_observations: list[Text] = []
        if check_seeds:
            self._check_seeds()

    def new(self) -> Any:
        """Create an instance of the text env."""
        env = self.make()
        if not (callable(getattr(env, "reset", None)) and callable(getattr(env, "step", None))):
            raise TypeError(
                f"make() returned a {type(env).__name__} without reset and step; it must return a text env: reset(seed=) -> "
                "(text, info) and step(action) -> (text, reward, terminated, truncated, info)"
            )
        self.keeps_special_tokens = bool(getattr(env, "keeps_special_tokens", False))
        return env

    def reset(self, env: Any, seed: int) -> tuple[Text, dict[str, Any]]:
        """Reset an instance and check what it returns.

        Raises:
            ResetFailed: If `reset` raises, or takes too long.
            ValueError, TypeError: If it returns anything but a text and a dict.
        """
        where = f"{self.name}.reset(seed={seed})"
        try:
            result = self._timed(env.reset, seed=seed)
        except Exception as error:
            raise ResetFailed(f"{where} {_said(error)}") from error
        if not isinstance(result, (tuple, list)) or len(result) != 2:
            raise ValueError(f"{where} must return (text, info); got {_short(result)}")
        text, info = result
        check_observation(text, where)
        if not isinstance(info, dict):
            raise TypeError(f"{where} returned an info of type {type(info).__name__}; it must be a dict")
        return copy.deepcopy(text), dict(info)

    def step(self, env: Any, action: str) -> Transition:
        """Step an instance and check what it returns.

        Raises:
            StepFailed: If `step` raises, or takes too long.
            ValueError, TypeError: If it returns anything but a text, a finite reward, two bools and a dict.
        """
        where = f"{self.name}.step({_short(action)})"
        try:
            result = self._timed(env.step, action)
        except Exception as error:
            raise StepFailed(f"{where} {_said(error)}") from error
        if not isinstance(result, (tuple, list)) or len(result) != 5:
            raise ValueError(f"{where} must return (text, reward, terminated, truncated, info); got {_short(result)}")
        text, reward, terminated, truncated, info = result
        check_observation(text, where)
        _check_reward(reward, where)
        for name, value in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(value, (bool, np.bool_)):
                raise TypeError(f"{where} returned {name}={value!r}; it must be a bool")
        if not isinstance(info, dict):
            raise TypeError(f"{where} returned an info of type {type(info).__name__}; it must be a dict")
        return Transition(copy.deepcopy(text), float(reward), bool(terminated), bool(truncated), dict(info))

    def final_reward(self, env: Any) -> float:
        """Return what an instance pays an episode that a limit has ended; 0 if it has no `final_reward`.

        Raises:
            StepFailed: If `final_reward` raises, or takes too long.
            ValueError: If it returns anything but a finite number.
        """
        if not callable(method := getattr(env, "final_reward", None)):
            return 0.0
        where = f"{self.name}.final_reward()"
        try:
            reward = self._timed(method)
        except Exception as error:
            raise StepFailed(f"{where} {_said(error)}") from error
        _check_reward(reward, where)
        return float(reward)

    def take_seconds(self) -> float:
        """Return the seconds spent in `reset` and `step` since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def add_seconds(self, seconds: float) -> None:
        """Count seconds that threads have spent together."""
        self._seconds += seconds

    def _timed(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        try:
            if self.timeout is None:
                return method(*args, **kwargs)
            try:
                return within(self.timeout, lambda: method(*args, **kwargs))
            except TimeoutError as error:
                raise TimedOut(f"takes longer than timeout={self.timeout} seconds") from error
        finally:
            if threading.current_thread() is threading.main_thread():
                self._seconds += time.perf_counter() - begin

    def _check_seeds(self) -> None:
        env = self.new()
        try:
            for seed in range(self.first_seed, self.first_seed + min(SEEDS_CHECKED, self.num_tasks)):
                first, second = self._play(env, seed), self._play(env, seed)
                different = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
                if different is not None or len(first) != len(second):
                    i = min(len(first), len(second)) - 1 if different is None else different
                    raise ValueError(
                        f"{self.name} does not repeat an episode: with seed {seed} and the actions {list(CHECKED_TURNS[:i])} "
                        f"it gave {_short(first[i])}, then {_short(second[i])}. Draw all random numbers of an episode from "
                        "np.random.default_rng(seed) in reset, or set check_seeds=False"
                    )
        finally:
            close(env)

    def _play(self, env: Any, seed: int) -> list[Any]:
        text, info = self.reset(env, seed)
        results: list[Any] = [(text, sorted(info))]
        for action in CHECKED_TURNS:
            try:
                step = self.step(env, action)
            except StepFailed as error:  # a text env may refuse these actions, in the same way twice
                if isinstance(error.__cause__, TimedOut):
                    raise
                return [*results, str(error)]
            results.append((step.observation, step.reward, step.terminated, step.truncated, sorted(step.info)))
            if not step.terminated and step.observation not in self.checked_observations:
                self.checked_observations.append(step.observation)
            if step.terminated or step.truncated:
                break
        return results


class EnvFailed(Exception):
    """A text env raised an exception, or took too long."""


class ResetFailed(EnvFailed, ValueError):
    """`reset` raised an exception, or took too long."""


class StepFailed(EnvFailed, RuntimeError):
    """`step` raised an exception, or took too long."""


class TimedOut(Exception):
    """A call took too long; it is still running."""


def _check_reward(reward: Any, where: str) -> None:
    if isinstance(reward, (bool, np.bool_)) or not _is_number(reward) or not math.isfinite(reward):
        raise ValueError(f"{where} returned the reward {reward!r}; it must be a finite number")


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, TimedOut) else f"raised {type(error).__name__}: {error}"


@dataclass
class _Session:
    """One row's episode with its own instance of the text env.

    Attributes:
        seed: seed of the episode.
        observation: the first observation, as the prompt has it.
        env: the instance; None until the first step.
        played: the turns that the instance has taken since its reset; None if it has to be reset.
        steps: turns with their transitions; a repeated call finds them here.
        failed: turns whose last one failed in a thread, and the error; None if there are none.
        closing: the turns of an episode that a limit ended, and what `final_reward` paid; None before.
    """

    seed: int
    observation: Text
    env: Any = None
    played: list[str] | None = None
    steps: list[tuple[str, Transition]] = field(default_factory=list)
    failed: tuple[list[str], Exception] | None = None
    closing: tuple[list[str], Transition] | None = None


class Sessions:
    """Instances of a text env, one a row, made when a row takes its first turn.

    A transition is kept until the row starts a new episode. A call that is repeated after an error therefore steps nothing
    twice. An instance whose `step` raised is discarded; the next call plays the episode so far on a new one.

    Args:
        tasks: makes and steps the instances.
    """

    def __init__(self, tasks: TextEnvTasks) -> None:
        self.tasks = tasks
        self._sessions: dict[int, _Session] = {}

    def __getstate__(self) -> dict[str, Any]:
        sessions = {
            row: _Session(each.seed, each.observation, steps=list(each.steps), closing=each.closing)
            for row, each in self._sessions.items()
        }
        return {"tasks": self.tasks, "_sessions": sessions}  # text envs need not be picklable: the copy plays on new ones

    def start(self, row: int, seed: int, observation: Text) -> None:
        """Begin the episode of a seed in a row; its first observation must be `observation` at every reset."""
        before = self._sessions.get(row)
        self._sessions[row] = _Session(seed, observation, None if before is None else before.env)

    def prepare(self, calls: Sequence[tuple[int, list[str]]]) -> None:
        """Take turns of several rows at a time, in threads; `step` then finds their transitions, or raises their errors.

        Args:
            calls: rows and their turns, as `step` gets them.
        """
        if self.tasks.workers == 1 or len(calls) < 2:
            return
        begin = time.perf_counter()
        call_all(self.try_step, calls, self.tasks.workers)
        self.tasks.add_seconds(time.perf_counter() - begin)

    def try_step(self, row: int, turns: list[str]) -> None:
        """Take a turn, and keep its error for `step`."""
        try:
            self.step(row, turns)
        except Exception as error:
            self._sessions[row].failed = (turns, error)

    def step(self, row: int, turns: Sequence[str]) -> Transition:
        """Take the last of a row's turns.

        Args:
            row: the row.
            turns: the texts of all turns of the episode, the new one included.

        Raises:
            RuntimeError: If the text env raised an exception.
            ValueError, TypeError: If it returned unusable values, or does not repeat the first observation of its seed.
        """
        session = self._sessions[row]
        *before, action = turns
        known = [text for text, _ in session.steps]
        if known[: len(turns)] == list(turns):
            return session.steps[len(before)][1]
        del session.steps[len(before) :]
        failed, session.failed = session.failed, None
        if failed is not None and failed[0] == list(turns):
            raise failed[1]
        transition = self._called(session, before, row, lambda: self._take(session, before, action, row))
        session.steps.append((action, transition))
        return transition

    def close_episode(self, row: int, turns: Sequence[str]) -> Transition:
        """Return what the text env pays an episode that a limit has ended after these turns: a transition without a text.

        Args:
            row: the row.
            turns: the texts of the turns that the text env has taken.

        Raises:
            RuntimeError, ValueError: As `step`.
        """
        session = self._sessions[row]
        if session.closing is None or session.closing[0] != list(turns):

            def pay() -> Transition:
                return Transition("", self.tasks.final_reward(session.env), False, True, {})

            session.closing = (list(turns), self._called(session, list(turns), row, pay))
        return session.closing[1]

    def _called(self, session: _Session, before: list[str], row: int, call: Callable[[], Transition]) -> Transition:
        """Call an instance that has taken the turns `before`; an error raises, or gives the transition of `on_error`."""
        try:
            self._replay(session, before)
            return call()
        except EnvFailed as error:
            self._drop(session, abandon=isinstance(error.__cause__, TimedOut))
            if self.tasks.on_error == "raise":
                raise type(error)(f"{error} (row {row}, seed {session.seed}, turns before: {before})") from error.__cause__
            return Transition("", float(self.tasks.on_error), True, False, _failed_info(error, session))
        except BaseException:  # also KeyboardInterrupt: the instance may have stepped
            self._drop(session)
            raise

    def discard(self, row: int) -> None:
        """Forget the last transition of a row, which cannot be used; the next call plays the episode on a new instance."""
        session = self._sessions[row]
        session.steps.pop()
        self._drop(session)

    @staticmethod
    def _drop(session: _Session, abandon: bool = False) -> None:
        if not abandon:  # a call that is still running would be disturbed
            close(session.env)
        session.env = session.played = None

    def _replay(self, session: _Session, before: list[str]) -> None:
        """Bring the instance to the state after the turns `before`."""
        if session.env is not None and session.played == before:
            return
        if session.env is None:
            session.env = self.tasks.new()
        session.played = None
        observation, _ = self.tasks.reset(session.env, session.seed)
        if observation != session.observation:
            raise ValueError(
                f"{self.tasks.name}.reset(seed={session.seed}) returned {_short(session.observation)}, and now "
                f"{_short(observation)}: the episodes of a group would differ. Draw all random numbers from the seed"
            )
        session.played = []
        for text in before:
            self.tasks.step(session.env, text)
            session.played.append(text)

    def _take(self, session: _Session, before: list[str], action: str, row: int) -> Transition:
        try:
            transition = self.tasks.step(session.env, action)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{error} (row {row}, seed {session.seed}, turns before: {before})") from error
        session.played = [*before, action]
        return transition

    def close(self) -> None:
        """Close all instances."""
        for session in self._sessions.values():
            self._drop(session)


def _failed_info(error: EnvFailed, session: _Session) -> dict[str, Any]:
    """Return the info of a turn that failed; not a success where the text env defines success."""
    told = any("is_success" in step.info for _, step in session.steps)
    return {"env_error": str(error), **({"is_success": False} if told else {})}


def close(env: Any) -> None:
    """Call `close()` of a text env that has one."""
    if callable(method := getattr(env, "close", None)):
        method()


def as_messages(text: Text) -> Messages:
    """Return messages as they are, and a str as a user message."""
    return [{"role": "user", "content": text}] if isinstance(text, str) else text


def check_observation(text: Any, where: str) -> None:
    """Check that an observation is a str or a list of messages.

    Raises:
        TypeError, ValueError: If it is anything else.
    """
    if isinstance(text, str):
        check_text(text, f"the observation of {where}")
    elif isinstance(text, list):
        for message in text:
            check_message(message, f"the observation of {where}")
    else:
        raise TypeError(f"{where} returned {_short(text)} as its observation; it must be a str or a list of messages")


def env_scores(info: dict[str, Any]) -> dict[str, float]:
    """Return the numeric and bool entries of a step's info, as floats."""
    return {key: float(value) for key, value in info.items() if isinstance(key, str) and _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_, int, float, np.integer, np.floating)) or (
        getattr(value, "ndim", None) == 0 and as_int(value) is not None
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
