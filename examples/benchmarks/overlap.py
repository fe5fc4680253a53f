"""Sampling and learning at once against one after the other: seconds, and what is learned, by the packaged pupil.

    python examples/benchmarks/overlap.py

Both sides take turns, each with one thread for sampling and one for learning, from the same seeds. The table has seconds of
training and the held-out accuracy after as many tokens; medians over the seeds.
"""

import argparse
import statistics
import time

import gymnasium as gym
import torch

import llm_env
from agents import GRPO

SIDES = {"one after the other": False, "at once": True}


def run(overlap: bool, seed: int, timesteps: int) -> dict[str, float]:
    """Seconds of training and held-out accuracy; the first rollout, which finds out what the model can, is not timed."""
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=256, seed=seed, overlap=overlap)
    agent.learn(1)
    begun = time.perf_counter()
    agent.learn(timesteps, reset_num_timesteps=False)
    seconds = time.perf_counter() - begun
    accuracy = agent.evaluate(gym.make("llm_env/Addition-v0", split="test"))["success_rate"]
    return {"seconds": seconds, "accuracy": accuracy}


def main() -> None:
    """Parse the command line; run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timesteps", type=int, default=50_000, help="action tokens of a run (default 50000)")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    for seed in range(arguments.seeds):
        for name, overlap in SIDES.items():
            found[name].append(run(overlap, seed, arguments.timesteps))
            last = found[name][-1]
            print(f"seed {seed}, {name}: {last['seconds']:.1f} s, accuracy {last['accuracy']:.3f}", flush=True)
    print(f"\n| {arguments.timesteps} tokens | seconds | held-out accuracy |\n| --- | ---: | --- |")
    for name, runs in found.items():
        accuracies = ", ".join(f"{entry['accuracy']:.3f}" for entry in runs)
        print(f"| {name} | {statistics.median(entry['seconds'] for entry in runs):.1f} | {accuracies} |")
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*found.values(), strict=True)]
    print(f"\ntimes as fast at once: {statistics.median(ratios):.2f} (median; {', '.join(f'{ratio:.2f}' for ratio in ratios)})")


if __name__ == "__main__":
    main()
