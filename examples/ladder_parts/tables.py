"""Format the numbers of the ladder as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ladder_parts import credit
from ladder_parts.runs import STEPS, Run

LAST = 5  # final rollouts to average for a noisy curve
Numbers = dict[str, Any]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format mean ± standard deviation over seeds; a single value has no deviation."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def tokens_to(runs: list[Run], accuracy: float) -> str:
    """Format the tokens to an accuracy, over the runs that reached it.

    If not all runs reached it, the text includes their number.
    """
    tokens = [run.tokens_to(accuracy) for run in runs]
    reached = [number for number in tokens if np.isfinite(number)]
    share = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)} runs)"
    return (spread(reached, 0) if reached else "never") + share


def last(run: Run, name: str) -> float:
    """Return the mean of a curve over the last `LAST` rollouts."""
    return float(run.values(name)[-LAST:].mean())


def collapsed(run: Run) -> bool:
    """Return whether the final accuracy is below the initial accuracy."""
    accuracy = run.values("accuracy")
    return bool(accuracy[-1] < accuracy[0])


def noise_to_signal(runs: Sequence[Run]) -> float:
    """Return noise over signal of the gradient, each averaged over runs first."""
    noise, signal = (np.mean([run.values(name).mean() for run in runs]) for name in ("noise", "signal"))
    return float(noise / signal) if signal > 0 else float("inf")


def jackknife(estimate: Callable[[Sequence[Any]], float], seeds: Sequence[Any]) -> tuple[float, float]:
    """Return an estimate from all seeds and its jackknife standard error.

    The jackknife repeats the estimate with each seed left out. The error is NaN with a single seed. It is infinite if any of
    the estimates is not finite.
    """
    value, count = estimate(seeds), len(seeds)
    if count == 1:
        return value, float("nan")
    others = np.array([estimate([*seeds[:i], *seeds[i + 1 :]]) for i in range(count)])
    if not np.isfinite([value, *others]).all():
        return value, float("inf")
    return value, float(np.sqrt((count - 1) / count * np.square(others - others.mean()).sum()))


def told(value: float, error: float, digits: int = 2) -> str:
    """Format value ± error, or "?" if the error is at least as large as the value."""
    if np.isnan(error):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if error < abs(value) else "?"


def runs_of(part: dict[str, list[dict[str, Any]]]) -> dict[str, list[Run]]:
    """Convert runs loaded from JSON to `Run` objects, by name."""
    return {name: [Run(**run) for run in runs] for name, runs in part.items()}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def ladder_table(numbers: Numbers) -> str:
    """Format the comparison of the five agents."""
    header = ["step", "agent", "tokens to 90%", "tokens to 95%", "final accuracy", "best accuracy"]
    header += ["KL per update, median (nats)", "KL, maximum", "noise / signal", "CPU s"]
    rows = []
    for step in STEPS:
        runs = [Run(**run) for run in numbers["ladder"][step.name]]
        settings = ", ".join(f"{key}={value!r}" for key, value in step.settings.items())
        if "kl_coef" in step.rules:
            settings += f"; env: kl_coef={step.rules['kl_coef']}"
        row = [step.name, f"`{step.kind.__name__}({settings})`", tokens_to(runs, 0.9), tokens_to(runs, 0.95)]
        row += [
            spread([run.values("accuracy")[-1] for run in runs], 3),
            spread([run.values("accuracy").max() for run in runs], 3),
        ]
        row += [spread([np.median(run.values("update_kl")) for run in runs], 4)]
        row += [spread([run.values("update_kl").max() for run in runs], 3)]
        row += [told(*jackknife(noise_to_signal, runs), 1), spread([run.seconds for run in runs], 0)]
        rows.append(row)
    return table(header, rows)


def pooled(point: Sequence[Numbers], name: str, which: str = "noise / signal") -> float:
    """Return noise over signal of an estimator, or its cosine with the naive one.

    The cosine is between the mean gradients. Estimates of a single seed are noisy and may be negative, so they are averaged
    over seeds before division. The result is infinite if an averaged ||E g||^2 is not positive.
    """
    square, product, noise = np.mean([seed["estimators"][name] for seed in point], axis=0)
    naive, _, _ = np.mean([seed["estimators"]["naive"] for seed in point], axis=0)
    if min(square, naive) <= 0:
        return float("inf")
    return float(noise / square if which == "noise / signal" else product / np.sqrt(square * naive))


def variance_table(numbers: Numbers) -> str:
    """Format noise over signal and the cosine with the naive gradient."""
    points = list(zip(*numbers["variance"], strict=True))  # by checkpoint, then by seed
    header = ["baseline"]
    for name in ("noise / signal", "cosine"):
        header += [f"{name} at accuracy {np.mean([seed['accuracy'] for seed in point]):.2f}" for point in points]
    rows = []
    for name in points[0][0]["estimators"]:
        estimates = [partial(pooled, name=name, which=which) for which in ("noise / signal", "cosine")]
        rows.append([name, *(told(*jackknife(estimate, point)) for estimate in estimates for point in points)])
    explained = [spread([seed["explained_variance"] for seed in point]) for point in points]
    return f"{table(header, rows)}\n\nExplained variance of the critic on new episodes: {', '.join(explained)}."


def collapse_table(numbers: Numbers) -> str:
    """Format the comparison of PPO with and without clipping."""
    header = ["PPO, learning rate", "best accuracy", "final accuracy", "collapsed", "KL per update, median (nats)"]
    rows = []
    for name, runs in runs_of(numbers["collapse"]).items():
        accuracies = [run.values("accuracy") for run in runs]
        row = [name, spread([values.max() for values in accuracies]), spread([values[-1] for values in accuracies])]
        row += [f"{sum(map(collapsed, runs))} of {len(runs)}"]
        rows.append([*row, spread([np.median(run.values("update_kl")) for run in runs], 3)])
    return table(header, rows)


def credit_table(numbers: Numbers) -> str:
    """Format the returns of the game of several turns, over all rollouts and at the end."""
    rows = []
    for step in credit.STEPS:
        runs = [Run(**run) for run in numbers["credit"][step.name]]
        settings = ", ".join(f"{key}={value!r}" for key, value in step.settings.items())
        mean, end = [run.values(credit.RETURN).mean() for run in runs], [last(run, credit.RETURN) for run in runs]
        rows.append([step.name, f"`{step.kind.__name__}({settings})`", spread(mean), spread(end)])
    return table(["credit", "agent", "mean return", "return at the end"], rows)


def hacking_table(numbers: Numbers) -> str:
    """Format proxy, true reward and KL, in the first rollout and at the end."""
    names = {"reward/lazy_teacher": 2, "reward/exact_match": 2, "kl": 2}
    runs = runs_of(numbers["hacking"])
    first = [run for each in runs.values() for run in each]
    rows = [["the pupil", *(spread([run.values(name)[0] for run in first], digits) for name, digits in names.items())]]
    for name, each in runs.items():
        rows.append([name, *(spread([last(run, key) for run in each], digits) for key, digits in names.items())])
    return table(["PPO", "proxy (training reward)", "correct answers (true reward)", "KL per answer, nats"], rows)


def costs_table(numbers: Numbers) -> str:
    """Format CPU seconds and peak memory of an update."""
    parts = numbers["costs"]
    header = ["agent", *(f"{what}, {name}" for name in parts for what in ("CPU s", "peak MiB"))]
    agents = next(iter(parts.values()))
    rows = []
    for agent in agents:
        cells = [(part[agent][0], part[agent][1] / 2**20) for part in parts.values()]
        rows.append([agent, *(cell for seconds, size in cells for cell in (f"{seconds:.2f}", f"{size:.0f}"))])
    return table(header, rows)


NOTES = {
    ladder_table: """Every rollout has 64 episodes.

- Accuracy: expected share of 256 held-out problems solved by answers sampled as in training (the mean probability of the
  correct answer); measured every 500 tokens.
- KL per update: KL(old, new) per token of a whole update, k3 estimate on the rollout of that update.
- Noise / signal: of a rollout's gradient, estimated from its two halves. It is measured every fourth rollout and averaged over
  runs, ± standard error. "?" means that the standard error is at least as large as the number.
- Learning rates: the best of four per algorithm, by the accuracy after 8000 tokens of one run with another seed.
  "reference" uses the learning rate of "clipping".
- CPU s: CPU seconds, including all measurements.""",
    variance_table: """- Noise / signal: E||g - E g||^2 / ||E g||^2 of the gradient of 64 episodes.
- Cosine: between the mean gradient and the mean gradient of "naive".
- Checkpoints: the pupil, and after 1/5 and 4/5 of the tokens.
- Critic: fitted by least squares on the last hidden states of other episodes.
- Groups: "naive, in groups", RLOO and GRPO use 8 problems with 8 answers each, the others 64 problems.
- "?" means that the standard error is at least as large as the number.""",
    collapse_table: """Each rollout is used for four epochs. clip_range is 0.2 or 1e6. The token budget is a third of that
above. Collapsed: the final accuracy is below the accuracy of the pupil.""",
    credit_table: f"""The game has {credit.TURNS} turns. In each, a number of {credit.DIGITS} digits has to be
repeated. The reward is the share of correct digits, so that the largest return is {credit.TURNS}. Every
rollout has {credit.GAMES} episodes. The token budget is three times that of the ladder. "Mean return": over
all rollouts; "at the end": over the last five. Learning rates: the best of four, by the mean return of one
run with another seed and two thirds of the tokens.""",
    hacking_table: """The proxy rewards the length of answers whose last digit is correct. "the pupil" is the mean of the first
rollout, the other rows are means of the last five rollouts.""",
    costs_table: """Peak of live tensors: weights, gradients, optimizer state, activations. One CPU thread.""",
}


def tables(numbers: Numbers) -> str:
    """Return the text of `ladder.md`."""
    seeds, tokens, rounds = (numbers["settings"][name] for name in ("seeds", "timesteps", "rounds"))
    titles = {
        ladder_table: f"The ladder: {tokens} tokens per agent, mean ± standard deviation over {seeds} seeds",
        variance_table: f"Variance of the gradient at fixed weights, {rounds} gradients per seed, ± standard error",
        collapse_table: "PPO with and without clipping",
        credit_table: "Credit per token, per turn and per episode, in a game of several turns",
        hacking_table: f"Reward hacking, without KL and with kl_coef={numbers['settings']['hacking_kl']}",
        costs_table: "Time and memory of an update",
    }
    return "\n\n".join(f"## {title}\n\n{make(numbers)}\n\n{NOTES[make]}" for make, title in titles.items()) + "\n"
