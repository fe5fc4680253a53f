"""Built-in tasks, registered with Gymnasium.

Each task is a function in its own module that returns the arguments of an env.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium as gym

from llm_env.env import TextGenerationEnv
from llm_env.vector_env import TextGenerationVectorEnv

TASKS = {
    "llm_env/Addition-v0": "llm_env.tasks.addition:addition",
    "llm_env/Continuation-v0": "llm_env.tasks.continuation:continuation",
    "llm_env/Countdown-v0": "llm_env.tasks.countdown:countdown_task",
    "llm_env/GSM8K-v0": "llm_env.tasks.gsm8k:gsm8k",
    "llm_env/ReasoningGym-v0": "llm_env.tasks.reasoning_gym:reasoning_gym",
    "llm_env/TextEnv-v0": "llm_env.tasks.text_env:text_env",
    "llm_env/Gymnasium-v0": "llm_env.tasks.text_env:gymnasium_env",
}


def _arguments(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    module, _, function = task.partition(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def make_env(task: str, render_mode: str | None = None, **arguments: Any) -> TextGenerationEnv:
    """Make a single env of a task; the entry point of `gym.make`.

    Args:
        task: `"module:function"` of the task.
        render_mode: render mode of the env.
        arguments: arguments of the task's function.
    """
    return TextGenerationEnv(**_arguments(task, arguments), render_mode=render_mode)


def make_vec(task: str, num_envs: int, autoreset_mode: Any = None, **arguments: Any) -> TextGenerationVectorEnv:
    """Make a native vector env of a task; the entry point of `gym.make_vec`.

    Args:
        task: `"module:function"` of the task.
        num_envs: number of rows.
        autoreset_mode: autoreset mode of the env; None uses the default.
        arguments: arguments of the task's function.
    """
    mode = {} if autoreset_mode is None else {"autoreset_mode": autoreset_mode}
    return TextGenerationVectorEnv(num_envs=num_envs, **_arguments(task, arguments), **mode)


def register_tasks() -> None:
    """Register every task with Gymnasium. `import llm_env` calls this function."""
    for env_id, task in TASKS.items():
        if env_id not in gym.registry:
            gym.register(
                env_id,
                entry_point="llm_env.tasks:make_env",
                vector_entry_point="llm_env.tasks:make_vec",
                kwargs={"task": task},
            )
