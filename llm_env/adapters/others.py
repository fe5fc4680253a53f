"""OpenEnv's and SkyRL's environments as text environments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llm_env.adapters.base import Adapter, GlobalGenerators, Prompt, Step, ToAction, ToText, numbers
from llm_env.dialogue.text_env import Text, close

TEXT_FIELDS = ("message", "text", "prompt", "content", "output", "echoed_message", "stdout")  # of an OpenEnv observation


class OpenEnvEnv(Adapter):
    """An environment of OpenEnv (https://github.com/meta-pytorch/OpenEnv) as a `llm_env.TextEnv`.

    A client's `reset` and `step` return a result with `observation`, `reward` and `done`; a server-side `Environment` returns
    the observation itself, with `reward` and `done`. Coroutines are not supported: use the client's `sync()`.

    Args:
        env: a client or an `Environment`, or a function that makes one.
        text_to_action: makes the environment's action of a turn. By default the action class of the client with the turn as
            its first field, where it is known (`action_cls=`).
        action_cls: the class of an action, for instance `EchoAction`.
        observation_to_text: converts an observation; by default its first field of the names `message`, `text`, `prompt`,
            `content`, `output` or `stdout`.
        prompt: see `llm_env.adapters.base.Adapter`.
        reset_kwargs: arguments of `reset`. `seed` is added where the environment takes it; without, episodes of one seed may
            differ, and `check_text_env` says so.
    """

    def __init__(
        self,
        env: Any,
        *,
        text_to_action: ToAction = None,
        action_cls: type | None = None,
        observation_to_text: ToText = None,
        prompt: Prompt = None,
        illegal_reward: float = 0.0,
        **reset_kwargs: Any,
    ) -> None:
        super().__init__(prompt, observation_to_text, text_to_action, illegal_reward)
        self.env = env if hasattr(env, "step") and not isinstance(env, type) else env()
        self._reset_kwargs, self._action_cls = reset_kwargs, action_cls
        if text_to_action is None and action_cls is None:
            raise ValueError("OpenEnvEnv needs action_cls=, the class of an action with a text, or text_to_action=")
        parameters = inspect.signature(self.env.reset).parameters.values()
        self._takes_seed = any(p.name == "seed" or p.kind is p.VAR_KEYWORD for p in parameters)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode."""
        result = self.env.reset(**self._reset_kwargs, **({"seed": seed} if self._takes_seed else {}))
        return self._first(self._text(_observation(result), _field)), {}

    def _advance(self, action: Any) -> Step:
        result = self.env.step(action)
        done, reward = bool(result.done), result.reward
        return self._text(_observation(result), _field), float(reward or 0.0), done, False, {}

    def close(self) -> None:
        """Close the environment, if it can be."""
        close(self.env)

    def _parse(self, text: str) -> Any:
        assert self._action_cls is not None
        fields = [p.name for p in inspect.signature(self._action_cls).parameters.values() if p.name != "metadata"]
        return self._action_cls(**{fields[0]: text})


def _observation(result: Any) -> Any:
    return getattr(result, "observation", result)


def _field(observation: Any) -> str:
    if isinstance(observation, str):
        return observation
    for name in TEXT_FIELDS:
        if isinstance(text := getattr(observation, name, None), str):
            return text
    raise TypeError(f"{type(observation).__name__} has none of the fields {TEXT_FIELDS}; give observation_to_text=")


class SkyRLEnv(Adapter):
    """A `BaseTextEnv` of SkyRL-Gym (https://github.com/NovaSky-AI/SkyRL) as a `llm_env.TextEnv`.

    A seed is a row of the dataset: an environment is made for it with the row as `extras`, and `init(prompt)` starts it.

    Args:
        env_cls: the class, or a function of `env_config` and `extras`.
        dataset: rows with `prompt` (messages, or a text) and what the environment reads from its extras.
        env_config: the configuration that it is made with.
        prompt, text_to_action, illegal_reward: see `llm_env.adapters.base.Adapter`.
        observation_to_text: converts the list of messages that a step returns; by default they are passed on as they are.
    """

    def __init__(
        self,
        env_cls: Callable[..., Any],
        dataset: Sequence[dict[str, Any]],
        env_config: Any = None,
        *,
        prompt: Prompt = None,
        observation_to_text: ToText = None,
        text_to_action: ToAction = None,
        illegal_reward: float = 0.0,
    ) -> None:
        super().__init__(prompt, observation_to_text, text_to_action, illegal_reward)
        if not len(dataset):
            raise ValueError("dataset has no rows")
        self.env_cls, self.dataset, self.env_config = env_cls, dataset, env_config
        self._generators = GlobalGenerators()
        self.env: Any = None

    def reset(self, *, seed: int | None = None) -> tuple[Text, dict[str, Any]]:
        """Start the episode of a row."""
        self.close()
        row = dict(self.dataset[(seed or 0) % len(self.dataset)])
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(message) for message in prompt]
        with self._generators.own(seed or 0):
            self.env = self.env_cls(env_config=self.env_config, extras=row)
            started = self.env.init(messages)
        messages = list(started[0]) if isinstance(started, tuple) else messages
        if isinstance(prompt, str) and len(messages) == 1:
            return self._first(messages[0]["content"]), {}
        return messages, {}

    def _advance(self, action: Any) -> Step:
        with self._generators.own():
            result = self.env.step(action)
        messages = list(result["observations"])
        text: Text = messages if self._to_text is None else self._to_text(messages)
        if isinstance(self.dataset[0]["prompt"], str) and self._to_text is None:
            text = "\n".join(message["content"] for message in messages)
        done = bool(result["done"])
        return "" if done else text, float(result["reward"]), done, False, numbers(result.get("metadata") or {})

    def close(self) -> None:
        """Close the environment of the last episode."""
        close(self.env)
        self.env = None
