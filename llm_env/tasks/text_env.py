"""Text environments of the user: `gym.make("llm_env/TextEnv-v0", make=..., tokenizer=...)`."""

from __future__ import annotations

from functools import partial
from typing import Any

from typing_extensions import Unpack

from llm_env.dialogue.text_env import TextEnvTasks
from llm_env.keywords import AGENT_NAMES, check_keywords
from llm_env.rules import NAMES, RulesOptions


def text_env(
    make: Any,
    tokenizer: Any,
    reward: Any = None,
    num_tasks: int | None = 1000,
    first_seed: int = 0,
    check_seeds: bool = True,
    workers: int = 1,
    timeout: float | None = None,
    on_error: float | str = "raise",
    **rules: Unpack[RulesOptions],
) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/TextEnv-v0`; see `TextGenerationEnv.from_text_env`.

    Args:
        make: a class or a function that returns a `llm_env.TextEnv`, or its name, `"module:Class"`. A name can be saved with
            the spec of the env.
        tokenizer: a path, a hub id or a transformers tokenizer.
        reward: reward functions, in addition to the text env's rewards.
        num_tasks: number of seeds; None for fresh seeds without end.
        first_seed: seed of prompt 0.
        check_seeds: play two seeds twice, and raise if the episodes differ.
        workers: maximum number of instances that are stepped at a time, each in a thread.
        timeout: seconds that a `reset` or `step` may take; None for no limit.
        on_error: `"raise"`, or the reward of a turn whose `step` fails.
        rules: keywords of `llm_env.rules.Rules`.
    """
    check_keywords("llm_env/TextEnv-v0", rules, NAMES - {"prompts"}, AGENT_NAMES)
    tasks = TextEnvTasks(make, num_tasks, first_seed, check_seeds, workers, timeout, on_error)
    return {"prompts": tasks, "reward": reward, "tokenizer": tokenizer, **rules}


def gymnasium_env(
    env_id: str,
    tokenizer: Any,
    reward: Any = None,
    num_tasks: int | None = 1000,
    first_seed: int = 0,
    env_kwargs: dict[str, Any] | None = None,
    **rules: Unpack[RulesOptions],
) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/Gymnasium-v0`; see `llm_env.adapters.GymnasiumTextEnv`.

    Args:
        env_id: id of a Gymnasium environment, such as `"FrozenLake-v1"`.
        tokenizer: a path, a hub id or a transformers tokenizer.
        reward: reward functions, in addition to the environment's rewards.
        num_tasks: number of seeds; None for fresh seeds without end.
        first_seed: seed of prompt 0.
        env_kwargs: arguments of `GymnasiumTextEnv` and of `gymnasium.make`.
        rules: keywords of `llm_env.rules.Rules`.
    """
    from llm_env.adapters import GymnasiumTextEnv

    check_keywords("llm_env/Gymnasium-v0", rules, NAMES - {"prompts"}, AGENT_NAMES)
    make = partial(GymnasiumTextEnv, env_id, **(env_kwargs or {}))
    return {"prompts": TextEnvTasks(make, num_tasks, first_seed), "reward": reward, "tokenizer": tokenizer, **rules}
