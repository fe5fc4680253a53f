"""The main job: GRPO makes the packaged pupil carry, from nothing but "right" and "wrong".

    python examples/train_grpo.py --seed 0

prints the accuracy on held-out problems before and after, some answers, and leaves TensorBoard logs in `runs` and the
trained model in `outputs`.
"""

import argparse
import time
from pathlib import Path

import gymnasium as gym
import torch

import llm_env
from agents import GRPO

SHOWN = ["12+34=", "57+68=", "99+99=", "8+7=", "45+55="]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=150_000, help="action tokens to train on")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard")
    parser.add_argument("--out", type=Path, default=Path("outputs/grpo_addition"), help="folder for the trained model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # on a model of this size threads cost more than they give

    env = gym.make("llm_env/Addition-v0")
    held_out = gym.make("llm_env/Addition-v0", split="test")
    agent = GRPO(
        llm_env.PUPIL,
        env,
        learning_rate=3e-4,
        group_size=8,
        n_envs=256,
        seed=arguments.seed,
        tensorboard_log=str(arguments.logs),
    )
    before, answers_before = agent.evaluate(held_out)["success_rate"], agent.generate(SHOWN, deterministic=True)
    start = time.monotonic()
    agent.learn(arguments.timesteps, progress_bar=True)
    seconds = time.monotonic() - start
    after, answers_after = agent.evaluate(held_out)["success_rate"], agent.generate(SHOWN, deterministic=True)

    print("\nproblem   before  after")
    for prompt, old, new in zip(SHOWN, answers_before, answers_after, strict=True):
        print(f"{prompt:8}  {old:6}  {new}")
    print(f"\naccuracy on {len(held_out.unwrapped.rules.prompts)} held-out problems: {before:.3f} before, {after:.3f} after")
    print(f"trained for {seconds:.0f} s on {agent.num_timesteps} tokens")
    agent.save(arguments.out / "agent")
    agent.policy.save_pretrained(arguments.out / "model")
    print(f"agent: {arguments.out / 'agent.zip'} (GRPO.load), model: {arguments.out / 'model'} (transformers from_pretrained)")
    print(f"curves and samples: tensorboard --logdir {arguments.logs}")


if __name__ == "__main__":
    main()
