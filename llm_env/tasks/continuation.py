"""Continuation task: continue a text, with a user-defined reward and tokenizer."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from llm_env.pupil import PUPIL
from llm_env.rewards.answers import Texts, completion_text
from llm_env.rules import SplitTaskOptions


def word_count(completions: Texts, **_: Any) -> list[float]:
    """Return the number of words of each completion.

    This is a placeholder; pass your own `reward` to the task.
    """
    return [float(len(completion_text(completion).split())) for completion in completions]


def continuation(**overrides: Unpack[SplitTaskOptions]) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/Continuation-v0`.

    Args:
        overrides: arguments of `TextGenerationEnv` that override those of the task. Set at least `prompts`, `reward` and
            `tokenizer`.
    """
    defaults: dict[str, Any] = {
        "prompts": ["Once upon a time"],
        "reward": word_count,
        "tokenizer": PUPIL,
        "max_prompt_tokens": 64,
        "max_new_tokens": 64,
    }
    return {**defaults, **overrides}
