"""GRPO here and TRL's GRPOTrainer, side by side: what a completion teaches, and what it costs.

    pip install -c constraints.txt -e ".[extra,bench]"
    python examples/benchmarks/learning.py --model STORIES_MODEL_DIR

Both train the same model on the same prompts in the same order, with the same reward functions and settings (`tasks.py`; what
they are called in TRL and why stands in `sides.py`), on one CPU thread, in fp32. Two tasks: Addition with the packaged pupil,
and with a folder of a story model (see `train_stories.py`) the stories about dogs with a KL to the untrained model. The runs
alternate, here and TRL, seed by seed, so that what else the machine does falls on both.

The reward is the mean over a rollout's completions before they are learned from; the time is that of the training alone,
without loading and without the exam on held-out problems, and after a first rollout of each side that does not count.
A table and a figure are left in `outputs/benchmarks`; those in this folder were made by the command above.
"""

import argparse
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers.utils import logging

try:
    from matplotlib.figure import Figure
    from sides import Run, exam, train_here, train_trl
except ImportError as error:
    raise SystemExit(f"this example needs TRL and matplotlib ({error}): pip install trl datasets matplotlib") from error
from tasks import Task, addition_task, stories_task

SIDES = ("here", "TRL")
HOW_TO_READ = (
    "Mean ± standard deviation over the seeds, or median (least to greatest). Where other programs share the machine, CPU "
    "seconds are the steadier measure."
)
WINDOW = 3  # rollouts whose mean has to reach the target
Runs = dict[str, list[Run]]  # by side, one run a seed


def compare(task: Task, rollouts: int, seeds: int) -> Runs:
    """Train on both sides with every seed, in turns."""
    train_trl(task, train_here(task, 1, seed=0).rows, seed=0)  # imports and lazy initialization are paid for here
    runs: Runs = {side: [] for side in SIDES}
    for seed in range(seeds):
        runs["here"].append(train_here(task, rollouts, seed))
        runs["TRL"].append(train_trl(task, runs["here"][-1].rows, seed))
        for side in SIDES:
            run = runs[side][-1]
            last = np.mean(run.rewards[-(rollouts // 4) :])
            print(f"{task.name}, seed {seed}, {side:4}: reward {last:.3f} at the end, {run.seconds[-1]:.0f} s", flush=True)
    return runs


def quarters(run: Run) -> list[float]:
    """Return mean reward of each quarter of a run, and of all of it."""
    return [*(float(np.mean(part)) for part in np.array_split(run.rewards, 4)), float(np.mean(run.rewards))]


def reached(task: Task, run: Run) -> tuple[float, float]:
    """Completions and seconds until the mean reward of `WINDOW` rollouts is at least the target; infinite if it never is."""
    means = np.convolve(run.rewards, np.ones(WINDOW) / WINDOW, "valid")
    there = np.flatnonzero(means >= task.target)
    if not len(there):
        return np.inf, np.inf
    last = int(there[0]) + WINDOW - 1
    return (last + 1) * task.batch, run.seconds[last]


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean and standard deviation over the seeds."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def middle(values: list[float]) -> str:
    """Median, and least and greatest, over the seeds; infinite values are such as never came."""
    numbers = (np.median(values), min(values), max(values))
    median, least, most = (f"{number:.0f}" if np.isfinite(number) else "never" for number in numbers)
    return f"{median} ({least} to {most})"


def table(task: Task, runs: Runs, before: float | None) -> str:
    """Return the numbers of one task in Markdown: mean ± standard deviation over the seeds, or the median and the range."""
    rows: list[tuple[str, list[str]]] = []
    parts = {side: np.array([quarters(run) for run in runs[side]]).T.tolist() for side in SIDES}
    for i, name in enumerate(["first quarter", "second quarter", "third quarter", "last quarter", "whole run"]):
        rows.append((f"reward, {name}", [spread(parts[side][i]) for side in SIDES]))
    if before is not None:
        accuracy = {side: [run.exam for run in runs[side] if run.exam is not None] for side in SIDES}
        rows.append((f"held-out accuracy ({before:.3f} before)", [spread(accuracy[side]) for side in SIDES]))
    arrivals = {side: np.array([reached(task, run) for run in runs[side]]).T.tolist() for side in SIDES}
    rows.append((f"completions to a reward of {task.target}", [middle(arrivals[side][0]) for side in SIDES]))
    rows.append((f"seconds to a reward of {task.target}", [middle(arrivals[side][1]) for side in SIDES]))
    whole = {side: [run.seconds[-1] for run in runs[side]] for side in SIDES}
    cpu = {side: [run.cpu_seconds for run in runs[side]] for side in SIDES}
    rows.append(("seconds in all", [middle(whole[side]) for side in SIDES]))
    rows.append(("CPU seconds in all", [middle(cpu[side]) for side in SIDES]))

    seeds, rollouts = len(runs["here"]), len(runs["here"][0].rewards)
    difference = np.subtract(parts["here"][-1], parts["TRL"][-1])
    error = np.std(difference, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
    ratios = [np.median(seconds["TRL"]) / np.median(seconds["here"]) for seconds in (whole, cpu)]
    return "\n".join(
        [
            f"## {task.name}\n",
            f"{rollouts} rollouts of {task.batch} completions, {task.group_size} to a prompt; learning rate "
            f"{task.learning_rate:g}, KL coefficient {task.kl_coef:g}; {seeds} seeds.\n",
            "| | here | TRL |",
            "|---|---|---|",
            *(f"| {name} | {here} | {trl} |" for name, (here, trl) in rows),
            "",
            f"Reward of the whole run, here less TRL, seed by seed: {difference.mean():+.4f}, standard error {error:.4f}. "
            f"Time, TRL's median over ours: {ratios[0]:.2f} on the clock, {ratios[1]:.2f} of CPU.\n",
        ]
    )


def draw(results: list[tuple[Task, Runs]], path: Path) -> None:
    """Reward against completions and against seconds, one row a task: mean and standard deviation over the seeds."""
    figure = Figure(figsize=(11, 4 * len(results)), layout="constrained")
    for (task, runs), axes in zip(results, figure.subplots(len(results), 2, squeeze=False, sharey="row"), strict=True):
        for side, color in zip(SIDES, ("C0", "C1"), strict=True):
            rewards = np.array([run.rewards for run in runs[side]])
            mean, deviation = rewards.mean(0), rewards.std(0, ddof=min(1, len(rewards) - 1))
            completions = task.batch * np.arange(1, len(mean) + 1)
            seconds = np.mean([run.seconds for run in runs[side]], axis=0)
            for axis, x in zip(axes, (completions, seconds), strict=True):
                axis.plot(x, mean, color, label=side)
                axis.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        axes[0].set(title=task.name, xlabel="completions", ylabel="reward of a rollout")
        axes[1].set(title=task.name, xlabel="seconds (mean over the seeds)")
        for axis in axes:
            axis.grid(alpha=0.3)
            axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse the command line, train, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a story model; without it Addition is the only task")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each side (default 5)")
    parser.add_argument("--completions", type=int, help="of every run (default: see tasks.py)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder for table and figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # on models of this size threads cost more than they give
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    tasks = [addition_task(), *([] if arguments.model is None else [stories_task(arguments.model)])]
    if arguments.model is None:
        print("no --model given: the stories are left out")
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: list[tuple[Task, Runs]] = []
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    report = [f"# Learning, side by side\n\n{versions}; one CPU thread. {HOW_TO_READ}\n"]
    for task in tasks:
        rollouts = max(4, (arguments.completions or task.completions) // task.batch)
        results.append((task, compare(task, rollouts, arguments.seeds)))
        report.append(table(task, results[-1][1], exam(task)))
    (arguments.out / "learning.md").write_text("\n".join(report))
    draw(results, arguments.out / "learning.png")
    print("\n".join(["", *report]))
    print(f"saved {arguments.out / 'learning.md'} and {arguments.out / 'learning.png'}")


if __name__ == "__main__":
    main()
