"""RLHF end to end, offline: preference pairs, a reward model, and PPO with and without a reference.

    python examples/train_rlhf.py --seed 0

A reward model is trained on pairs of the packaged pupil's answers (see `train_reward_model.py`); the better answer of a pair
is the right sum. Who forgets to carry gets too little, so of the pupil's own answers the larger one is the right one, and
most clearly so where it alone has three digits: that is what the reward model learns to like. PPO then maximizes its score
twice from the same start: once with the KL to the pupil in the reward, and once without. The true reward, the share of right
sums, is measured besides and not paid.

Without the KL the policy soon writes what no pair has ever shown the reward model (12+34=126): the proxy goes on rising and
the true reward falls. This is reward hacking; over-optimization in Gao et al. 2022, arXiv 2210.10760. With it the policy
chooses among the pupil's own answers, where the reward model knows what it says, and learns to carry as far as that goes:
57+68=125, but 45+17=52 still, since of two answers of two digits the reward model hardly knows the better one.

A table is printed at the end, and the curves are left in
`outputs/rlhf/rlhf.png`, the reward model in `outputs/rlhf/reward_model`, the policies in `outputs/rlhf/with_kl` and
`outputs/rlhf/without_kl`.
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
LAST = 4  # rollouts whose mean is the result
Point = tuple[float, ...]  # tokens, and the means of MEASURES


class Curves(BaseCallback):
    """Notes what the answers of every rollout were worth, as `points`."""

    def __init__(self) -> None:
        super().__init__()
        self.points: list[Point] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        infos = self.locals["infos"]
        self.points.append((self.num_timesteps, *(float(np.mean([info[key] for info in infos])) for key in MEASURES)))


def make_env(reward: RewardModel, kl_coef: float) -> TextGenerationEnv:
    """Addition, paid by the reward model; the true reward has weight 0, and the KL is measured even where it costs nothing."""
    rules = addition(reward=[reward, exact_match], reward_weights=[1.0, 0.0], reference=llm_env.PUPIL, kl_coef=kl_coef)
    return TextGenerationEnv(**rules)


def make_agent(env: TextGenerationEnv, **settings: Any) -> PPO:
    """PPO from the pupil: 256 problems a rollout, one pass over it in four optimizer steps."""
    return PPO(llm_env.PUPIL, env, n_envs=256, batch_size=64, n_epochs=1, **settings)


def make_reward(pairs: int, seed: int, out: Path) -> RewardModel:
    """Train the reward model, say how good it is, save it, and calibrate it on answers of the pupil."""
    judge = Judge(seed)
    reward = train(llm_env.PUPIL, judge.pairs(pairs), seed)
    share = accuracy(reward, Judge(seed, "test").pairs(HELD_OUT))
    print(f"The reward model agrees with {share:.1%} of {HELD_OUT} held-out pairs, after {pairs} to learn from.")
    reward.model.save_pretrained(out)
    reward.tokenizer.save_pretrained(out)
    rows, answers, _ = judge.answers(CALIBRATED_ON)
    return reward.calibrate([row["prompt"] for row in rows], answers)


def draw(runs: dict[str, list[Point]], path: Path) -> None:
    """Proxy, true reward and KL over tokens, one panel each, one line a run."""
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
    """Print proxy, share of right sums and KL in nats."""
    print(f"\n{'':12}  {'proxy':>6}  {'true':>6}  {'KL':>6}")
    for name, (_, *values) in table:
        print(f"{name:12}  " + "  ".join(f"{value:6.2f}" for value in values))
    print(f"(the pupil: the first rollout; the others: mean of the last {LAST})\n")


def main() -> None:
    """Parse the command line; pairs, reward model, PPO twice, figure and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pairs", type=int, default=500, help="preference pairs (default 500)")
    parser.add_argument("--timesteps", type=int, default=36_000, help="action tokens of each of the two runs (default 36000)")
    parser.add_argument("--kl-coef", type=float, default=0.3, help="of the run with KL, in reward per nat (default 0.3)")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard (default runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs/rlhf"), help="folder for figure and models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # on a model of this size threads cost more than they give
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # the reward model's head is new, and is to be
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
    print(
        f"{time.monotonic() - start:.0f} s; saved {arguments.out / 'rlhf.png'}, and beside it the reward model and the policies"
    )


if __name__ == "__main__":
    main()
