"""Gymnasium environments as text environments."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from llm_env.adapters.base import Adapter, Prompt, Step, ToAction, ToText, last_of, numbers

NAMES = {  # of discrete actions, by the id without its version
    "FrozenLake": ["left", "down", "right", "up"],
    "CliffWalking": ["up", "right", "down", "left"],
    "Taxi": ["south", "north", "east", "west", "pickup", "dropoff"],
    "Blackjack": ["stick", "hit"],
    "CartPole": ["left", "right"],
    "MountainCar": ["left", "none", "right"],
    "Acrobot": ["left", "none", "right"],
}
DIGITS = 4  # significant digits of a float


class GymnasiumTextEnv(Adapter):
    r"""Any Gymnasium environment as a `llm_env.TextEnv`.

    Observations and actions of Discrete, Box, MultiDiscrete, MultiBinary, Dict, Tuple and Text spaces have default texts:
    numbers, lists, `key: value`, and boards for FrozenLake, CliffWalking and Taxi. A discrete action is written by name (see
    `action_names`) or number, others as JSON. A text that is no action is answered and counted; nothing else happens then.

    Args:
        env: an id, a function without arguments that makes an environment, or an environment.
        observation_to_text: converts an observation to text.
        text_to_action: converts a turn to an action, or raises `ValueError`.
        prompt: see `llm_env.adapters.base.Adapter`. By default the actions and the first observation.
        action_names: names of the actions of a Discrete space, in order; known for the environments of Gymnasium's own.
        illegal_reward: reward of a text that is no action.
        kwargs: arguments of `gymnasium.make`, with an id.

    Raises:
        TypeError: If `env` is none of these, or a space has no default text.

    Examples:
        >>> from llm_env.adapters import GymnasiumTextEnv
        >>> env = GymnasiumTextEnv("FrozenLake-v1", is_slippery=False)
        >>> print(env.reset(seed=0)[0])
        actions: left, down, right, up
        @FFF
        FHFH
        FFFH
        HFFG
        <BLANKLINE>
        >>> text, reward, *_ = env.step("I go right.")
        >>> print(text)
        S@FF
        FHFH
        FFFH
        HFFG
        <BLANKLINE>
        >>> env.step("jump")[0]
        "'jump' is no action; the actions are left, down, right, up\n"
    """

    def __init__(
        self,
        env: str | Callable[[], gym.Env] | gym.Env,
        observation_to_text: ToText = None,
        text_to_action: ToAction = None,
        *,
        prompt: Prompt = None,
        action_names: list[str] | None = None,
        illegal_reward: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt, observation_to_text, text_to_action, illegal_reward)
        if isinstance(env, str):
            env = gym.make(env, **{"disable_env_checker": True, **kwargs})
        elif kwargs:
            raise TypeError(f"{sorted(kwargs)} are arguments of gymnasium.make, for an id; make the environment with them")
        elif not isinstance(env, gym.Env):
            if not callable(env):
                raise TypeError(f"env={env!r} must be an id, a function that makes a gymnasium.Env, or a gymnasium.Env")
            env = env()
        self.env: gym.Env[Any, Any] = env
        self._name = "" if env.spec is None else env.spec.id.split("-v")[0].split("/")[-1]
        self._names = self._action_names(action_names)
        if observation_to_text is None:
            _check_space(env.observation_space, "observation")
        if text_to_action is None:
            _check_space(env.action_space, "action")

    def _action_names(self, given: list[str] | None) -> list[str] | None:
        space = self.env.action_space
        if not isinstance(space, spaces.Discrete):
            return None
        names = given or NAMES.get(self._name.removesuffix("8x8"))
        if names is not None and len(names) != space.n:
            if given is None:
                return None
            raise ValueError(f"action_names={given} must be {space.n} names, one for each action of {space}")
        return names

    @property
    def actions(self) -> str:
        """A text that says which actions there are."""
        space = self.env.action_space
        if self._names is not None:
            return ", ".join(self._names)
        if isinstance(space, spaces.Discrete):
            first, last = int(space.start), int(space.start + space.n - 1)
            return f"{first} to {last}" if space.n > 4 else ", ".join(map(str, range(first, last + 1)))
        return _described(space)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed)
        own = self._text(observation, self._default_text)
        head = "" if self._prompt is not None or self._to_action is not None else f"actions: {self.actions}\n"
        return self._first(head + own), numbers(info)

    def _advance(self, action: Any) -> Step:
        observation, reward, terminated, truncated, info = self.env.step(action)
        text = self._text(observation, self._default_text)
        info = {**numbers(info), "illegal_actions": self.illegal_actions}
        return text, float(reward), bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _default_text(self, observation: Any) -> str:
        board = BOARDS.get(self._name.removesuffix("8x8"))
        if board is not None:
            return board(self.env.unwrapped, observation) + "\n"
        return space_text(self.env.observation_space, observation) + "\n"

    def _parse(self, text: str) -> Any:
        space = self.env.action_space
        if isinstance(space, spaces.Discrete):
            first = int(space.start)
            numbered = [str(first + i) for i in range(int(space.n))]
            found = last_of([*(self._names or []), *numbered], text)
            if found is None:
                raise ValueError(f"{text.strip()[:80]!r} is no action; the actions are {self.actions}")
            return first + self._names.index(found) if self._names and found in self._names else int(found)
        return parse_action(space, text)


def space_text(space: spaces.Space[Any], value: Any) -> str:
    """Return a value of a space as text."""
    if isinstance(space, spaces.Dict):
        return ", ".join(f"{key}: {space_text(part, value[key])}" for key, part in space.spaces.items())
    if isinstance(space, spaces.Tuple):
        return ", ".join(space_text(part, one) for part, one in zip(space.spaces, value, strict=True))
    if isinstance(space, spaces.Text):
        return str(value)
    array = np.asarray(value)
    if array.ndim == 0:
        return _number(array.item())
    if array.ndim == 2 and array.dtype.kind in "iub":
        return "\n".join(" ".join(map(str, row)) for row in array.tolist())
    return json.dumps([json.loads(_number(number)) for number in array.ravel().tolist()]) if array.ndim == 1 else _nested(array)


def _nested(array: np.ndarray) -> str:
    return "[" + ", ".join(_nested(part) if part.ndim else _number(part.item()) for part in array) + "]"


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, (bool, int)) else f"{value:.{DIGITS}g}"


def parse_action(space: spaces.Space[Any], text: str) -> Any:
    """Read an action of a space from JSON, or a text of a Text space.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(space, spaces.Text):
        value: Any = text.strip()
    else:
        try:
            value = _as_sample(space, json.loads(text))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{text.strip()[:80]!r} is no action; write {_described(space)}") from error
    if not space.contains(value):
        raise ValueError(f"{text.strip()[:80]!r} is no action; write {_described(space)}")
    return value


def _as_sample(space: spaces.Space[Any], value: Any) -> Any:
    if isinstance(space, spaces.Dict):
        return {key: _as_sample(part, value[key]) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(_as_sample(part, one) for part, one in zip(space.spaces, value, strict=True))
    if isinstance(space, spaces.Discrete):
        return int(value)
    if isinstance(space, (spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary)):
        return np.asarray(value, dtype=space.dtype).reshape(space.shape)
    return value


def _described(space: spaces.Space[Any]) -> str:
    if isinstance(space, spaces.Box):
        low, high = _number(space.low.min().item()), _number(space.high.max().item())
        return f"JSON: {'x'.join(map(str, space.shape)) or 'a number'} numbers from {low} to {high}"
    if isinstance(space, spaces.MultiDiscrete):
        return f"JSON: whole numbers below {space.nvec.tolist()}"
    if isinstance(space, spaces.MultiBinary):
        return f"JSON: {space.n} numbers, 0 or 1"
    if isinstance(space, spaces.Dict):
        return "JSON: {" + ", ".join(f'"{key}": {_described(part)}' for key, part in space.spaces.items()) + "}"
    if isinstance(space, spaces.Tuple):
        return "JSON: [" + ", ".join(_described(part) for part in space.spaces) + "]"
    if isinstance(space, spaces.Discrete):
        return f"{int(space.start)} to {int(space.start + space.n - 1)}"
    return f"a text of {space.min_length} to {space.max_length} characters" if isinstance(space, spaces.Text) else repr(space)


def _check_space(space: spaces.Space[Any], kind: str) -> None:
    if isinstance(space, spaces.Dict):
        parts: list[spaces.Space[Any]] = list(space.spaces.values())
    elif isinstance(space, spaces.Tuple):
        parts = list(space.spaces)
    else:
        known = (spaces.Discrete, spaces.Box, spaces.MultiDiscrete, spaces.MultiBinary, spaces.Text)
        if not isinstance(space, known):
            argument = "observation_to_text" if kind == "observation" else "text_to_action"
            raise TypeError(f"the {kind} space is a {type(space).__name__}, which has no default text; give {argument}=")
        return
    for part in parts:
        _check_space(part, kind)


def _frozen_lake(env: Any, observation: Any) -> str:
    rows = [[cell.decode() for cell in row] for row in env.desc]
    row, column = divmod(int(observation), len(rows[0]))
    rows[row][column] = "@"
    return "\n".join("".join(row) for row in rows)


def _cliff(env: Any, observation: Any) -> str:
    height, width = env.shape
    rows = [["." for _ in range(width)] for _ in range(height)]
    rows[-1][1:-1] = ["C"] * (width - 2)
    rows[-1][-1] = "G"
    row, column = divmod(int(observation), width)
    rows[row][column] = "@"
    return "\n".join("".join(row) for row in rows)


def _taxi(env: Any, observation: Any) -> str:
    row, column, passenger, destination = env.decode(int(observation))
    names = ["R", "G", "Y", "B"]
    where = "in the taxi" if passenger == 4 else f"at {names[passenger]}"
    rows = [[cell.decode() for cell in line] for line in env.desc]
    rows[1 + row][2 * column + 1] = "@"
    return "\n".join("".join(line) for line in rows) + f"\npassenger {where}, destination {names[destination]}"


def _blackjack(_env: Any, observation: Any) -> str:
    total, dealer, ace = observation
    return f"you have {int(total)}{', an ace counts 11' if ace else ''}; the dealer shows {int(dealer)}"


BOARDS: dict[str, Callable[[Any, Any], str]] = {
    "FrozenLake": _frozen_lake,
    "CliffWalking": _cliff,
    "Taxi": _taxi,
    "Blackjack": _blackjack,
}
