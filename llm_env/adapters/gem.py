"""GEM's environments (gem-llm) as text environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_env.adapters.base import Adapter, GlobalGenerators, Prompt, Step, ToAction, ToText, import_package, numbers


class GEMEnv(Adapter):
    r"""An environment of GEM (https://github.com/axon-rl/gem, arXiv 2510.01051) as a `llm_env.TextEnv`.

    GEM draws from the global random generators, in constructors and in `step` too. Each instance has separate generator states,
    which are swapped in for each call under a lock of the process: seeds count, and instances do not disturb each other.

    Args:
        env: an id such as `"game:GuessTheNumber-v0-easy"` (the package gem-llm must be installed), or a function that makes an
            environment with GEM's `reset(seed)` and `step(action)`.
        prompt, observation_to_text, text_to_action, illegal_reward: see `llm_env.adapters.base.Adapter`. An observation is
            GEM's text and, by default, the suffix of its info. Actions are texts; GEM's games read the last `\boxed{...}`.
        kwargs: arguments of `gem.make`.
    """

    def __init__(
        self,
        env: str | Callable[[], Any],
        *,
        prompt: Prompt = None,
        observation_to_text: ToText = None,
        text_to_action: ToAction = None,
        illegal_reward: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt, observation_to_text, text_to_action, illegal_reward)
        self._generators = GlobalGenerators()
        with self._generators.own(0):
            if isinstance(env, str):
                self.env = import_package("gem", "gem-llm", f"GEMEnv({env!r})").make(env, **kwargs)
            else:
                self.env = env(**kwargs)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode."""
        with self._generators.own(seed):
            observation, info = self.env.reset(seed=seed)
        return self._first(self._said(observation, info)), numbers(info)

    def _advance(self, action: Any) -> Step:
        with self._generators.own():
            observation, reward, terminated, truncated, info = self.env.step(action)
        text = "" if terminated or truncated else self._said(observation, info)
        return text, float(reward), bool(terminated), bool(truncated), numbers(info)

    def _said(self, observation: Any, info: dict[str, Any]) -> str:
        suffix = info.get("suffix")
        return self._text(observation, lambda said: f"{said}\n{suffix}\n" if suffix else f"{said}\n")
