"""Define the tasks of `learning.py`: env arguments and settings of both sides."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm_env
from llm_env.tasks.addition import addition

sys.path.append(str(Path(__file__).parents[1]))  # train_stories.py is one folder up
from train_stories import BEGINNINGS, about_dogs, own_words


@dataclass(frozen=True)
class Task:
    """Model, env and GRPO settings of a benchmark task.

    Attributes:
        name: name in tables and figures.
        model: path of the model and its tokenizer.
        env: arguments of `TextGenerationEnv`: prompts, reward functions and their weights, and limits.
        group_size: completions per prompt, G.
        batch: completions per rollout. The rollout is used for one optimizer step.
        learning_rate: constant learning rate of AdamW.
        kl_coef: coefficient (beta) of the k3 estimate of the KL to the untrained model, in the loss.
        completions: default training budget, in completions.
        target: reward threshold. The completions and seconds until it is reached are reported.
        exam: arguments of an env with held-out problems and a success rate. Default None (no evaluation).
    """

    name: str
    model: str
    env: dict[str, Any]
    group_size: int
    batch: int
    learning_rate: float
    kl_coef: float
    completions: int
    target: float
    exam: dict[str, Any] | None = None

    @property
    def rewards(self) -> list[Any]:
        """Reward functions as a list; both sides call them in the same way."""
        reward = self.env["reward"]
        return list(reward) if isinstance(reward, list) else [reward]


def addition_task() -> Task:
    """Return the task of `train_grpo.py`: Addition with the packaged pupil."""
    return Task("Addition", llm_env.PUPIL, addition(), 8, 256, 3e-4, 0.0, 12_800, 0.9, exam=addition(split="test"))


def stories_task(model: str) -> Task:
    """Return the task of `train_stories.py`: stories about dogs, with a KL penalty."""
    env = {
        "prompts": BEGINNINGS,
        "reward": [about_dogs, own_words],
        "reward_weights": [1.0, 0.5],
        "tokenizer": model,
        "max_prompt_tokens": 32,
        "max_new_tokens": 64,
        "reference": model,
    }
    return Task("Stories", model, env, 8, 64, 5e-4, 0.05, 2_048, 1.2)
