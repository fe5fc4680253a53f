"""Compare five agents, from REINFORCE to GRPO; measure the effect of each step.

    python examples/ladder.py

The script trains the packaged pupil model (see `pretrain_pupil.py`) on `llm_env/Addition-v0`. Every agent gets the same
number of tokens. The five steps of the ladder are:

1. naive reward: `REINFORCE`;
2. a critic as baseline: `REINFORCE(baseline="value")`;
3. clipping, which allows several optimizer steps per rollout: `PPO`;
4. a reference model against reward hacking: `PPO` on an env with `kl_coef`;
5. a group of answers instead of a critic: `GRPO`.

It measures, over several seeds:

- the variance of the policy gradient at fixed weights, per baseline (`ladder_parts/variance.py`);
- the tokens to 90% accuracy on held-out problems, and the size of every update (`ladder_parts/runs.py`);
- PPO with and without clipping at learning rates that are too large;
- credit per token, per turn and per episode, in a game of several turns (`ladder_parts/credit.py`);
- a reward that can be hacked, with and without the reference model (`ladder_parts/hacking.py`);
- CPU time and memory of an update, with and without a critic (`ladder_parts/memory.py`).

The run takes an hour on one core. It writes the figure `ladder.png`, the tables `ladder.md` and all numbers
`ladder.json` to `--out`, and TensorBoard logs to `--logs`. `--numbers ladder.json` draws the figure and writes the tables from
stored numbers, without measuring.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ladder_parts import credit, hacking, memory, variance
from ladder_parts.runs import EPISODES, STEPS, Exam, Step, train
from ladder_parts.tables import tables
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import llm_env
from agents import PPO

try:
    from ladder_parts.figure import draw
except ImportError as error:
    raise SystemExit("this example draws a figure and needs matplotlib: pip install matplotlib") from error

NO_CLIP = 1e6  # clip range too wide to clip any ratio
RATES = (3e-4, 1e-3)  # learning rates for PPO with and without clipping
HACKING_RATE, HACKING_KL = 3e-4, 0.1
LARGER_EPISODES = 4


def train_all(steps: list[Step], seeds: list[int], timesteps: int, logs: Path) -> dict[str, list[dict[str, Any]]]:
    """Train every step once per seed; return the runs as dictionaries, by step name."""
    exam = Exam()
    results: dict[str, list[dict[str, Any]]] = {step.name: [] for step in steps}
    for seed in seeds:
        for step in steps:
            run = train(step, seed, timesteps, exam, str(logs))
            results[step.name].append(asdict(run))
            accuracy = run.values("accuracy")
            print(f"{step.name}, seed {seed}: {accuracy[-1]:.3f} correct, {run.seconds:.0f} s", flush=True)
    return results


def clipped_or_not() -> list[Step]:
    """Return steps for PPO with and without clipping, for each rate in `RATES`."""
    ranges = {"clipped": 0.2, "not clipped": NO_CLIP}
    return [
        Step(f"{name}, {rate:g}", PPO, {"learning_rate": rate, "clip_range": clip_range})
        for name, clip_range in ranges.items()
        for rate in RATES
    ]


def costs(length: int, repeats: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Measure CPU seconds and peak bytes of an update for a small and a larger model.

    The small model is the pupil, with Addition's prompt and response lengths. The larger model generates `length` tokens.
    """
    pupil = AutoModelForCausalLM.from_pretrained(llm_env.PUPIL)
    larger = memory.larger_llama(pupil.config.vocab_size)
    names = [f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters" for model in (pupil, larger)]
    return {
        f"{names[0]}, {EPISODES} responses of 4": memory.measure(pupil, EPISODES, 6, 4, repeats),
        f"{names[1]}, {LARGER_EPISODES} responses of {length}": memory.measure(
            larger, LARGER_EPISODES, max(1, length // 8), length, repeats
        ),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements; write `ladder.json` after each part; return the numbers."""
    seeds, tokens = list(range(arguments.seeds)), arguments.timesteps
    checkpoints = (0, tokens // 5, 4 * tokens // 5)
    logs = arguments.logs
    parts: dict[str, Callable[[], Any]] = {
        "ladder": lambda: train_all(STEPS, seeds, tokens, logs / "ladder"),
        "variance": lambda: [variance.measure(seed, arguments.rounds, checkpoints) for seed in seeds],
        "collapse": lambda: train_all(clipped_or_not(), seeds, tokens // 3, logs / "ladder_collapse"),
        "credit": lambda: credit.train_all(seeds, 3 * tokens, logs / "ladder_credit"),
        "hacking": lambda: train_all(hacking.steps(HACKING_RATE, HACKING_KL), seeds, 2 * tokens // 3, logs / "ladder_hacking"),
        "costs": lambda: costs(arguments.length, max(1, arguments.rounds // 4)),
    }
    settings = {"seeds": len(seeds), "timesteps": tokens, "rounds": arguments.rounds, "hacking_kl": HACKING_KL}
    numbers: dict[str, Any] = {"settings": settings}
    for name, part in parts.items():
        start = time.monotonic()
        numbers[name] = part()
        (arguments.out / "ladder.json").write_text(json.dumps(numbers))
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    return numbers


def main() -> None:
    """Parse the command line, measure, and write figure and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds per agent (default 5)")
    parser.add_argument(
        "--timesteps", type=int, default=10_000, help="training budget per agent, in action tokens (default 10000)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=12,
        help="gradients per estimator and checkpoint; updates are timed a quarter as often (default 12)",
    )
    parser.add_argument(
        "--length",
        type=int,
        default=128,
        help="response length of the larger model, in tokens, for time and memory (default 128)",
    )
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard logs (default runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs/ladder"), help="output folder for figure, tables and numbers")
    parser.add_argument("--numbers", type=Path, help="existing ladder.json: draw and write from it without measuring")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.numbers is None:
        measure(arguments)
    numbers = json.loads((arguments.numbers or arguments.out / "ladder.json").read_text())
    draw(numbers, arguments.out / "ladder.png")
    text = tables(numbers)
    (arguments.out / "ladder.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
