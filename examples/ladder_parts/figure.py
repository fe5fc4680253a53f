"""Draw the figure of the ladder: one panel per measurement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ladder_parts import credit
from ladder_parts.runs import STEPS, Curve, Run
from ladder_parts.tables import Numbers, jackknife, pooled, runs_of, told

COLOURS = dict(zip([step.name for step in STEPS], ["C7", "C0", "C1", "C2", "C3"], strict=True))
POINTS = 60  # points of a mean curve


def mean_curve(curves: list[Curve], smooth: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate the seeds' curves on a common grid of tokens.

    Args:
        curves: one curve per seed.
        smooth: window of the running mean over preceding points. Default 1 (no smoothing).

    Returns:
        The grid in thousands of tokens, (POINTS,), and the interpolated curves, (seeds, POINTS).
    """
    grids = [np.array(curve, dtype=float) for curve in curves]
    begin, end = max(grid[0, 0] for grid in grids), min(grid[-1, 0] for grid in grids)
    tokens = np.linspace(begin, end, POINTS)
    rows = []
    for grid in grids:
        width = min(smooth, len(grid))
        smoothed = np.convolve(np.pad(grid[:, 1], (width - 1, 0), mode="edge"), np.ones(width) / width, mode="valid")
        rows.append(np.interp(tokens, grid[:, 0], smoothed))
    return tokens / 1000, np.array(rows)


def lines(axes: Axes, runs: list[Run], name: str, smooth: int = 1, **style: Any) -> None:
    """Plot the mean of a curve over seeds, with a band from minimum to maximum."""
    tokens, rows = mean_curve([run.curves[name] for run in runs], smooth)
    (line,) = axes.plot(tokens, rows.mean(0), **style)
    axes.fill_between(tokens, rows.min(0), rows.max(0), color=line.get_color(), alpha=0.15, linewidth=0)


def variance_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot noise over signal as bars: one group per estimator, one bar per checkpoint."""
    points = list(zip(*numbers["variance"], strict=True))
    names = list(points[0][0]["estimators"])
    height = 0.8 / len(points)
    for i, point in enumerate(points):
        estimates = [jackknife(partial(pooled, name=name), point) for name in names]
        values = [np.nan if told(*estimate) == "?" else estimate[0] for estimate in estimates]
        label = f"{np.mean([seed['accuracy'] for seed in point]):.0%} right"
        places = np.arange(len(names)) + (i - (len(points) - 1) / 2) * height
        axes.barh(places, values, height, label=label, color=f"C{i}", alpha=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set(title="Variance of the gradient, by baseline", xlabel=r"E||g - Eg||² / ||Eg||² (weights fixed)", xscale="log")
    axes.set_xlim(right=10 * axes.get_xlim()[1])  # room for the legend
    axes.legend(fontsize=9, loc="upper right")


def accuracy_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot held-out accuracy over tokens."""
    for name, runs in runs_of(numbers["ladder"]).items():
        lines(axes, runs, "accuracy", color=COLOURS[name], label=name)
    axes.axhline(0.9, color="black", linewidth=0.7, linestyle=":")
    axes.set(title="Sample efficiency", xlabel="thousand tokens", ylabel="held-out problems solved")
    axes.legend(fontsize=9)


def jumps_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot the KL of every update over tokens."""
    for name, runs in runs_of(numbers["ladder"]).items():
        lines(axes, runs, "update_kl", smooth=5, color=COLOURS[name], label=name)
    axes.set(title="Size of an update", xlabel="thousand tokens", ylabel="KL(old, new) per token, nats", yscale="log")


def collapse_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot the final accuracy of every run, with and without clipping."""
    runs = runs_of(numbers["collapse"])
    rates = list(dict.fromkeys(name.split(", ")[1] for name in runs))
    for offset, kind, colour in ((-0.12, "clipped", "C0"), (0.12, "not clipped", "C3")):
        for i, rate in enumerate(rates):
            values = [run.values("accuracy") for run in runs[f"{kind}, {rate}"]]
            label = kind if i == 0 else None
            axes.plot([i + offset] * len(values), [v[-1] for v in values], "o", color=colour, alpha=0.6, label=label)
            axes.plot([i + offset], [np.mean([v[-1] for v in values])], "_", color=colour, markersize=22)
    start = next(iter(runs.values()))[0].values("accuracy")[0]
    axes.axhline(start, color="black", linewidth=0.7, linestyle=":", label="the pupil at start")
    axes.set_xticks(range(len(rates)), rates)
    axes.set(title="PPO, too large a learning rate", xlabel="learning rate", ylabel="solved at the end", ylim=(-0.03, 1.03))
    axes.legend(fontsize=9)


def hacking_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot proxy and true reward, without and with the KL term."""
    for (name, runs), colour in zip(runs_of(numbers["hacking"]).items(), ("C3", "C0"), strict=True):
        lines(axes, runs, "reward/lazy_teacher", 3, color=colour, linestyle="--", label=f"paid, {name}")
        lines(axes, runs, "reward/exact_match", 3, color=colour, label=f"meant, {name}")
    axes.set(title="A reward that can be hacked", xlabel="thousand tokens", ylabel="mean per answer", ylim=(0, 1.03))
    axes.legend(fontsize=9, loc="lower left")


def credit_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot the return of the game of several turns over tokens."""
    for name, runs in runs_of(numbers["credit"]).items():
        lines(axes, runs, credit.RETURN, 3, label=name)
    axes.set(title=f"Credit in a game of {credit.TURNS} turns", xlabel="thousand tokens", ylabel="return")
    axes.legend(fontsize=9)


def costs_panel(axes: Axes, numbers: Numbers) -> None:
    """Plot peak memory of an update of the larger model, labeled with CPU seconds."""
    title, part = list(numbers["costs"].items())[-1]
    names = list(part)
    seconds, sizes = np.array(list(part.values())).T
    axes.barh(range(len(names)), sizes / 2**20, color="C0", alpha=0.8)
    for i, (size, second) in enumerate(zip(sizes / 2**20, seconds, strict=True)):
        axes.text(size * 0.97, i, f"{second:.1f} s", va="center", ha="right", fontsize=9, color="white")
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.set(title="Peak memory and time of an update", xlabel=f"MiB ({title})")


def draw(numbers: Numbers, path: Path) -> None:
    """Draw all panels and save the figure."""
    figure = Figure(figsize=(10, 13), layout="constrained")
    panels = [variance_panel, accuracy_panel, jumps_panel, collapse_panel, hacking_panel, costs_panel]
    grid = figure.add_gridspec(4, 2)
    places = [grid[i // 2, i % 2] for i in range(len(panels))] + [grid[3, :]]
    for place, panel in zip(places, [*panels, credit_panel], strict=True):
        axes = figure.add_subplot(place)
        panel(axes, numbers)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=110)
