"""Train a story model to write about dogs, with a KL penalty to a reference model.

    python examples/train_stories.py MODEL_DIR --algorithm ppo

MODEL_DIR is the folder of a causal language model for stories. The example was made for the 260K-parameter TinyStories Llama
of https://huggingface.co/karpathy/tinyllamas, converted to the format of transformers.

The reward is 1 if the story mentions a dog, plus 0.5 times the share of distinct words. The KL to the untrained model keeps
the text fluent. It is part of the reward (PPO) or of the loss (GRPO). Samples are printed before and after training.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from agents import GRPO, PPO
from agents.base import LanguageAgent
from llm_env import TextGenerationEnv

BEGINNINGS = [
    "Once upon a time, there was a little girl named Lily.",
    "One day, Tim went to the park.",
    "Once upon a time, there was a boy named Ben.",
    "Mom and Sara were in the kitchen.",
    "The sun was hot and the sky was blue.",
    "Tom had a big red ball.",
    "It was a rainy day.",
    "Anna liked to sing.",
]


def about_dogs(completions: list[str], **_: Any) -> list[float]:
    """Return reward 1.0 for stories that mention a dog, else 0.0."""
    return [float(bool(re.search(r"\b(dog|dogs|puppy)\b", text.lower()))) for text in completions]


def own_words(completions: list[str], **_: Any) -> list[float]:
    """Return the share of distinct words, so that "dog dog dog" scores low."""
    words = [re.findall(r"\w+", text.lower()) for text in completions]
    return [len(set(found)) / len(found) if found else 0.0 for found in words]


def make_agent(algorithm: str, model: str, seed: int, logs: str | None, n_envs: int = 64) -> LanguageAgent:
    """Create a PPO or GRPO agent and its env.

    The KL to the untrained model is part of the reward for PPO, and of the loss for GRPO.
    """
    kl_in_reward = {"kl_coef": 0.02} if algorithm == "ppo" else {}
    env = TextGenerationEnv(
        BEGINNINGS,
        [about_dogs, own_words],
        model,
        reward_weights=[1.0, 0.5],
        max_prompt_tokens=32,
        max_new_tokens=64,
        reference=model,
        success="about_dogs",
        **kl_in_reward,
    )
    settings: dict[str, Any] = {"n_envs": n_envs, "seed": seed, "tensorboard_log": logs, "learning_rate": 5e-4}
    if algorithm == "ppo":
        return PPO(model, env, batch_size=32, n_epochs=2, **settings)
    return GRPO(model, env, group_size=8, kl_coef=0.05, **settings)


def report(agent: LanguageAgent, title: str) -> None:
    """Print the number of stories that mention a dog, and four sample stories."""
    stories = agent.generate(BEGINNINGS * 8)
    print(f"\n{title}: {sum(about_dogs(stories)):.0f} of {len(stories)} stories have a dog")
    for beginning, story in list(zip(BEGINNINGS, stories, strict=False))[:4]:
        print(f"  {beginning} | {story.strip()!r}")


def main() -> None:
    """Parse the command line, train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("--algorithm", choices=["ppo", "grpo"], default="grpo")
    parser.add_argument("--timesteps", type=int, default=250_000, help="training budget, in action tokens (default 250000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", default="runs", help="folder for TensorBoard logs (default runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs/stories"), help="folder for the trained model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    agent = make_agent(arguments.algorithm, arguments.model, arguments.seed, arguments.logs)
    report(agent, "before")
    agent.learn(arguments.timesteps, progress_bar=True)
    report(agent, "after")
    agent.policy.save_pretrained(arguments.out)
    print(f"\nsaved {arguments.out}; curves and samples: tensorboard --logdir {arguments.logs}")


if __name__ == "__main__":
    main()
