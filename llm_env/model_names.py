"""Check model names and paths before any request to a model hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium as gym

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SB3_POLICY = re.compile(r"(Mlp|Cnn|MultiInput)(Lstm)?Policy")


def check_model_name(value: Any, argument: str) -> None:
    """Raise if a name or path cannot be a model, tokenizer or adapter.

    Other names are passed on to transformers.

    Args:
        value: the user's value; only `str` and `Path` are checked.
        argument: name of the argument, for the error message.

    Raises:
        FileNotFoundError: If it is a path that does not exist.
        ValueError: If it is the name of a Stable-Baselines3 policy, the id of an env, an agent's checkpoint, or a single
            file.
    """
    if not isinstance(value, (str, Path)):
        return
    text, path = str(value), Path(value).expanduser()
    if SB3_POLICY.fullmatch(text):
        raise ValueError(
            f"{argument}={text!r} is the name of a network of Stable-Baselines3; give a causal language model: a path, a hub "
            "id, or a transformers model, such as llm_env.PUPIL"
        )
    if text.rpartition(":")[2] in gym.registry:
        raise ValueError(f"{argument}={text!r} is the id of an env; the model comes first, then the env: GRPO(model, {text!r})")
    if path.is_dir():
        return
    if path.suffix == ".zip":
        raise ValueError(
            f"{argument}={text!r} is the name of an agent's checkpoint, not of a model; load it with the agent's class: "
            f"GRPO.load({text!r}, env=env)"
        )
    if path.is_file():
        raise ValueError(f"{argument}={text!r} is a single file; give the folder with config, weights and tokenizer")
    names_a_place = isinstance(value, Path) or text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1
    if names_a_place or not HUB_ID.fullmatch(text) or ("/" in text and path.parent.is_dir()):
        raise FileNotFoundError(
            f"{argument}={text!r}: there is no such folder (looked for {path.absolute()}); give the path of a model, or a "
            "hub id such as 'organization/name'"
        )
