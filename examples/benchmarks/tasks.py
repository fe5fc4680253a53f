"""What both sides of `learning.py` are given: the env's arguments and the settings of GRPO, each written down once."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llm_env
from llm_env.tasks.addition import addition

sys.path.append(str(Path(__file__).parents[1]))  # train_stories.py stands one folder up
from train_stories import BEGINNINGS, about_dogs, own_words


@dataclass(frozen=True)
class Task:
    """A model, an env, and how GRPO is to train the one on the other.

    Attributes:
        name: for tables and figures.
        model: path of the model and its tokenizer.
        env: arguments of `TextGenerationEnv`; prompts, reward functions and their weights, and limits.
        group_size: G, completions to one prompt.
        batch: completions in a rollout, and in its one optimizer step.
        learning_rate: AdamW's, constant.
        kl_coef: beta of k3 to the untrained model, in the loss.
        completions: how many to train on, unless the command line says otherwise.
        target: a reward; how many completions and seconds it takes to get there is reported.
        exam: arguments of an env of held-out problems with a success rate; None where there is none.
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
        """The reward functions; both sides call them in the same way."""
        reward = self.env["reward"]
        return list(reward) if isinstance(reward, list) else [reward]


def addition_task() -> Task:
    """`llm_env/Addition-v0` and the packaged pupil, as in `train_grpo.py`."""
    return Task("Addition", llm_env.PUPIL, addition(), 8, 256, 3e-4, 0.0, 12_800, 0.9, exam=addition(split="test"))


def stories_task(model: str) -> Task:
    """Stories about dogs that stay stories, as in `train_stories.py`."""
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
