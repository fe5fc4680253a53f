"""Run RLHF end to end: preference pairs, reward model, PPO with and without KL.

    python examples/train_rlhf.py --seed 0

The script first trains a reward model on pairs of the packaged pupil's answers (see `train_reward_model.py`). The preferred
answer of a pair is the correct sum. The pupil's wrong answers omit the carry and are too small, so the larger answer of a
pair is the correct one. The difference is clearest if only the correct answer has three digits. The reward model learns to
prefer such answers.

PPO then maximizes the score of the reward model (the proxy) in two runs from the same start: one without and one with the KL
to the pupil in the reward. The true reward, the share of correct sums, is measured but is not part of the reward.

Without the KL, the policy soon writes answers that occur in no training pair (12+34=126). The proxy keeps rising and the true
reward falls. This is reward hacking (over-optimization in Gao et al. 2022, arXiv 2210.10760). With the KL, the policy stays
close to the pupil's own answers, where the reward model is reliable. It learns to carry in 57+68=125, but still answers
45+17=52, because the reward model can hardly tell which of two two-digit answers is better.

The script prints a table and writes to `outputs/rlhf`: the curves (`rlhf.png`), the reward model (`reward_model`) and the
policies (`with_kl`, `without_kl`).
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from tqdm import TqdmExperimentalWarning
from train_reward_model import HELD_OUT, Judge, accuracy, train
from transformers.utils import logging

import llm_env
from agents import PPO
from llm_env import RewardModel, TextGenerationEnv
from llm_env.rewards import exact_match
from llm_env.tasks.addition import addition

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise SystemExit("this example draws a figure and needs matplotlib: pip install matplotlib") from error

MEASURES = ("reward/reward_model", "reward/exact_match", "kl")
SHOWN = ["12+34=", "57+68=", "8+7=", "45+17="]
CALIBRATED_ON = 1000  # answers of the pupil
LAST = 4  # final rollouts to average
Point = tuple[float, ...]  # tokens, then the mean of each of MEASURES


class Curves(BaseCallback):
    """Callback that records the means of `MEASURES` of every rollout in `points`."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        infos = self.locals["infos"]
        self.points.append((self.num_timesteps, *(float(np.mean([info[key] for info in infos])) for key in MEASURES)))


def make_env(reward: RewardModel, kl_coef: float) -> TextGenerationEnv:
    """Create the Addition env with the reward model as reward.

    The true reward has weight 0. The KL is measured even if `kl_coef` is 0.
    """
    rules = addition(reward=[reward, exact_match], reward_weights=[1.0, 0.0], reference=llm_env.PUPIL, kl_coef=kl_coef)
    return TextGenerationEnv(**rules)


def make_agent(env: TextGenerationEnv, **settings: Any) -> PPO:
    """Create a PPO agent for the pupil.

    A rollout has 256 problems and is used for one epoch of four optimizer steps.
    """
    return PPO(llm_env.PUPIL, env, n_envs=256, batch_size=64, n_epochs=1, **settings)


def make_reward(pairs: int, seed: int, out: Path) -> RewardModel:
    """Train, evaluate and save the reward model; calibrate it on answers of the pupil."""
    judge = Judge(seed)
    reward = train(llm_env.PUPIL, judge.pairs(pairs), seed)
    share = accuracy(reward, Judge(seed, "test").pairs(HELD_OUT))
    print(f"The reward model agrees with {share:.1%} of {HELD_OUT} held-out pairs after training on {pairs} pairs.")
    reward.model.save_pretrained(out)
    reward.tokenizer.save_pretrained(out)
    rows, answers, _ = judge.answers(CALIBRATED_ON)
    return reward.calibrate([row["prompt"] for row in rows], answers)


def draw(runs: dict[str, list[Point]], path: Path) -> None:
    """Plot proxy, true reward and KL over tokens: one panel each, one line per run."""
    panels = [
        ("Proxy: what is paid", "reward model's score (standard deviations)"),
        ("True reward: what was meant", "share of right sums"),
        ("Distance from the pupil", "KL per answer (nats)"),
    ]
    figure = Figure(figsize=(12, 4), layout="constrained")
    for column, (axes, (title, label)) in enumerate(zip(figure.subplots(1, 3), panels, strict=True), start=1):
        for (name, points), style in zip(runs.items(), ("C3-", "C0--"), strict=True):
            values = np.array(points)
            axes.plot(values[:, 0] / 1000, values[:, column], style, label=name)
        axes.set(title=title, xlabel="trained on (thousand tokens)", ylabel=label)
        axes.grid(alpha=0.3)
        if column == 2:
            axes.set_ylim(0, 1)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(table: list[tuple[str, Point]]) -> None:
    """Print proxy, share of correct sums and KL in nats."""
    print(f"\n{'':12}  {'proxy':>6}  {'true':>6}  {'KL':>6}")
    for name, (_, *values) in table:
        print(f"{name:12}  " + "  ".join(f"{value:6.2f}" for value in values))
    print(f"(the pupil: first rollout; other rows: mean of the last {LAST} rollouts)\n")


def main() -> None:
    """Parse the command line, train the reward model and both policies, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=500, help="number of preference pairs (default 500)")
    parser.add_argument(
        "--timesteps", type=int, default=36_000, help="training budget per run, in action tokens (default 36000)"
    )
    parser.add_argument(
        "--kl-coef", type=float, default=0.3, help="KL coefficient of the run with KL, in reward per nat (default 0.3)"
    )
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard logs (default runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs/rlhf"), help="output folder for figure and models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers warns that the head has new weights, which is intended
    warnings.filterwarnings("ignore", category=TqdmExperimentalWarning)

    start = time.monotonic()
    reward = make_reward(arguments.pairs, arguments.seed, arguments.out / "reward_model")
    runs: dict[str, list[Point]] = {}
    table: list[tuple[str, Point]] = []
    for name, kl_coef in (("without KL", 0.0), ("with KL", arguments.kl_coef)):
        print(f"PPO {name} ...", flush=True)
        folder, curves = name.lower().replace(" ", "_"), Curves()
        settings = {"learning_rate": arguments.learning_rate, "seed": arguments.seed, "tensorboard_log": str(arguments.logs)}
        agent = make_agent(make_env(reward, kl_coef), **settings)
        agent.learn(arguments.timesteps, callback=curves, tb_log_name=f"RLHF_{folder}", progress_bar=True)
        agent.policy.save_pretrained(arguments.out / folder)
        runs[f"{name} ({kl_coef:g} per nat)" if kl_coef else name] = curves.points
        table += [("the pupil", curves.points[0])] if not table else []
        table += [(name, tuple(np.mean(curves.points[-LAST:], axis=0)))]
        print("  ".join(map("".join, zip(SHOWN, agent.generate(SHOWN, deterministic=True), strict=True))))
    draw(runs, arguments.out / "rlhf.png")
    report(table)
    print(f"{time.monotonic() - start:.0f} s; saved {arguments.out / 'rlhf.png'}; reward model and policies are beside it")


if __name__ == "__main__":
    main()
