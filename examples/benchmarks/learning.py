"""Compare sample efficiency and training time of GRPO with TRL's GRPOTrainer.

    pip install -c constraints.txt -e ".[extra,bench]"
    python examples/benchmarks/learning.py --model STORIES_MODEL_DIR

Both train the same model on the same prompts in the same order, with the same reward functions and settings, on one CPU thread
in float32. The settings are in `tasks.py`; `sides.py` maps them to TRL's arguments. There are two tasks:

- Addition with the packaged pupil;
- stories about dogs, with a KL to the untrained model, if `--model` names the folder of a story model (see `train_stories.py`).

The two sides ("here" and "TRL") alternate for every seed, so that other load on the machine affects both.

The reward is the mean over the completions of a rollout, before the update on them. The time is that of training, without
loading and without the evaluation on held-out problems. A warm-up rollout of each side is not timed. The script writes a table
and a figure to `outputs/benchmarks`. The files in this folder were made with the command above.
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
    "Values are mean ± standard deviation over seeds, or median (minimum to maximum). CPU seconds are the more stable measure "
    "if other programs run on the machine."
)
WINDOW = 3  # rollouts in the moving average that is compared with the target
Runs = dict[str, list[Run]]  # by side, one run per seed


def compare(task: Task, rollouts: int, seeds: int) -> Runs:
    """Train both sides alternately, for every seed."""
    train_trl(task, train_here(task, 1, seed=0).rows, seed=0)  # warm-up: imports and lazy initialization
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
    """Return the mean reward of each quarter of a run, and of the whole run."""
    return [*(float(np.mean(part)) for part in np.array_split(run.rewards, 4)), float(np.mean(run.rewards))]


def reached(task: Task, run: Run) -> tuple[float, float]:
    """Return completions and seconds until the reward reaches the target.

    The reward is averaged over `WINDOW` rollouts. Both are infinite if it never reaches the target.
    """
    means = np.convolve(run.rewards, np.ones(WINDOW) / WINDOW, "valid")
    there = np.flatnonzero(means >= task.target)
    if not len(there):
        return np.inf, np.inf
    last = int(there[0]) + WINDOW - 1
    return (last + 1) * task.batch, run.seconds[last]


def spread(values: list[float], digits: int = 3) -> str:
    """Format mean ± standard deviation over seeds."""
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def middle(values: list[float]) -> str:
    """Format median, minimum and maximum over seeds; show infinity as "never"."""
    numbers = (np.median(values), min(values), max(values))
    median, least, most = (f"{number:.0f}" if np.isfinite(number) else "never" for number in numbers)
    return f"{median} ({least} to {most})"


def table(task: Task, runs: Runs, before: float | None) -> str:
    """Format the results of a task as Markdown.

    Values are mean ± standard deviation over seeds, or median and range.
    """
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
    rows.append(("seconds, total", [middle(whole[side]) for side in SIDES]))
    rows.append(("CPU seconds, total", [middle(cpu[side]) for side in SIDES]))

    seeds, rollouts = len(runs["here"]), len(runs["here"][0].rewards)
    difference = np.subtract(parts["here"][-1], parts["TRL"][-1])
    error = np.std(difference, ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan
    ratios = [np.median(seconds["TRL"]) / np.median(seconds["here"]) for seconds in (whole, cpu)]
    return "\n".join(
        [
            f"## {task.name}\n",
            f"{rollouts} rollouts of {task.batch} completions, {task.group_size} per prompt; learning rate "
            f"{task.learning_rate:g}, KL coefficient {task.kl_coef:g}; {seeds} seeds.\n",
            "| | here | TRL |",
            "|---|---|---|",
            *(f"| {name} | {here} | {trl} |" for name, (here, trl) in rows),
            "",
            f"Reward of the whole run, here - TRL, paired by seed: {difference.mean():+.4f}, standard error {error:.4f}. "
            f"Ratio of median times, TRL / here: {ratios[0]:.2f} (wall clock), {ratios[1]:.2f} (CPU).\n",
        ]
    )


def draw(results: list[tuple[Task, Runs]], path: Path) -> None:
    """Plot reward over completions and over seconds, one row per task.

    Lines are means over seeds, bands are standard deviations.
    """
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
    """Parse the command line, train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a story model (default: run only the Addition task)")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds per side (default 5)")
    parser.add_argument("--completions", type=int, help="training budget per run, in completions (default: see tasks.py)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="output folder for table and figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for models of this size
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    tasks = [addition_task(), *([] if arguments.model is None else [stories_task(arguments.model)])]
    if arguments.model is None:
        print("--model is not set: skipping the stories task")
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
