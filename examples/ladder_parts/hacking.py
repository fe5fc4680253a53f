"""Demonstrate reward hacking with a proxy reward, with and without a KL penalty."""

from __future__ import annotations

from typing import Any

import llm_env
from agents import PPO
from ladder_parts.runs import Step
from llm_env.rewards import exact_match

DIGITS = 3  # of the longest correct answer


def lazy_teacher(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Return a proxy reward: 1/3 per character if the last digit is correct, else 0.

    Answers with a carry are longer (57+68=125, not 15). On the pupil's answers the proxy therefore prefers the correct one.
    A policy that exploits the proxy writes 12+34=146.
    """
    return [
        len(completion) / DIGITS if completion[-1:] == right[-1] else 0.0
        for completion, right in zip(completions, answer, strict=True)
    ]


def steps(learning_rate: float, kl_coef: float) -> list[Step]:
    """Return steps for PPO on `lazy_teacher`, without and with the KL to the pupil.

    The true reward is measured with weight 0.
    """
    rules = {"reward": [lazy_teacher, exact_match], "reward_weights": [1.0, 0.0], "reference": llm_env.PUPIL}
    return [
        Step(name, PPO, {"learning_rate": learning_rate}, {**rules, "kl_coef": coefficient})
        for name, coefficient in (("without KL", 0.0), ("with KL", kl_coef))
    ]
