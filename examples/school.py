"""Shared code of the addition examples: evaluate, train, evaluate again and save."""

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from tqdm import TqdmExperimentalWarning
from transformers.utils import logging

from agents.base import LanguageAgent

SHOWN = ["12+34=", "57+68=", "99+99=", "8+7=", "45+55="]


def teach(make_agent: Callable[..., LanguageAgent], name: str, timesteps: int, description: str) -> None:
    """Train an agent on `llm_env/Addition-v0` and print its held-out accuracy.

    Args:
        make_agent: function that creates the agent from an env and the keywords `seed` and `tensorboard_log`.
        name: name of the folder under `outputs` for the trained model.
        timesteps: default training budget, in action tokens. `--timesteps` overrides it.
        description: text for `--help`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--timesteps", type=int, default=timesteps, help=f"training budget, in action tokens (default {timesteps})"
    )
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard logs (default runs)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs") / name, help=f"folder for the model (default outputs/{name})"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=TqdmExperimentalWarning)

    held_out = gym.make("llm_env/Addition-v0", split="test")
    agent = make_agent(gym.make("llm_env/Addition-v0"), seed=arguments.seed, tensorboard_log=str(arguments.logs))
    before, old_answers = exam(agent, held_out)
    print(f"The pupil solves {before:.1%} of {len(held_out.unwrapped.rules.prompts)} held-out problems. Training ...")
    start = time.monotonic()
    agent.learn(arguments.timesteps, progress_bar=True)
    seconds = time.monotonic() - start
    after, new_answers = exam(agent, held_out)

    print("\nproblem   before   after")
    for prompt, old, new in zip(SHOWN, old_answers, new_answers, strict=True):
        print(f"{prompt:8}  {old:7}  {new}")
    print(f"\nheld-out accuracy: {before:.3f} before, {after:.3f} after {seconds:.0f} s on {agent.num_timesteps} tokens")
    agent.save(arguments.out / "agent")
    agent.policy.save_pretrained(arguments.out / "model")
    print(f"saved {arguments.out / 'agent.zip'} (resume with {type(agent).__name__}.load)")
    print(f"saved {arguments.out / 'model'} (load with AutoModelForCausalLM.from_pretrained)")
    print(f"curves and sample answers: tensorboard --logdir {arguments.logs}")


def exam(agent: LanguageAgent, held_out: Any) -> tuple[float, list[str]]:
    """Return the greedy accuracy on all held-out problems, and the answers to `SHOWN`."""
    return agent.evaluate(held_out)["success_rate"], agent.generate(SHOWN, deterministic=True)
