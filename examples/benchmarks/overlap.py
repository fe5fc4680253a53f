"""Benchmark GRPO with overlapping sampling and learning (`overlap=True`).

    python examples/benchmarks/overlap.py

The script trains the packaged pupil with and without overlap, alternately and with the same seeds. torch uses one thread per
operation. The table contains the median training time over seeds, and the held-out accuracy of each seed.
"""

import argparse
import statistics
import time

import gymnasium as gym
import torch

import llm_env
from agents import GRPO

SIDES = {"without overlap": False, "with overlap": True}


def run(overlap: bool, seed: int, timesteps: int) -> dict[str, float]:
    """Train an agent; return training seconds and held-out accuracy.

    The first rollout is not timed, because it includes one-time setup such as probing the model.
    """
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=256, seed=seed, overlap=overlap)
    agent.learn(1)
    begun = time.perf_counter()
    agent.learn(timesteps, reset_num_timesteps=False)
    seconds = time.perf_counter() - begun
    accuracy = agent.evaluate(gym.make("llm_env/Addition-v0", split="test"))["success_rate"]
    return {"seconds": seconds, "accuracy": accuracy}


def main() -> None:
    """Parse the command line, run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--timesteps", type=int, default=50_000, help="training budget per run, in action tokens (default 50000)"
    )
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
    print(
        f"\nspeedup with overlap: {statistics.median(ratios):.2f} (median of {', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    )


if __name__ == "__main__":
    main()
