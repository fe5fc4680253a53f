"""Draw step time by phase and its growth with group size, per prompt length."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from speed_parts.line import PHASES
from speed_parts.tables import Results
from speed_parts.worker import HERE, TRL

COLOURS = dict(zip(PHASES, ("C0", "C1", "C2", "C3", "C7"), strict=True))
LINES = {HERE: "black", TRL: "C4"}


def bars(axes: Axes, results: Results, prompt: int, groups: list[int]) -> None:
    """Plot stacked bars of phases, one bar per group size and side."""
    marks: list[tuple[float, str]] = []
    for i, group in enumerate(groups):
        for x, side in ((i - 0.21, HERE), (i + 0.21, TRL)):
            series = results.get("step", side, prompt, group)
            marks.append((x, side))
            if series is None:
                axes.annotate("not run", (x, 0), (0, 4), textcoords="offset points", ha="center", fontsize=9, rotation=90)
                continue
            below = 0.0
            for phase in PHASES:
                seconds = series.phase(phase)
                axes.bar(x, seconds, 0.36, below, color=COLOURS[phase], label=phase if not i and side == HERE else None)
                below += seconds
            axes.annotate(f"{series.turn:.3g}", (x, below), (0, 2), textcoords="offset points", ha="center", fontsize=9)
        axes.annotate(f"group {group}", (i, 0), (0, -30), textcoords="offset points", ha="center", annotation_clip=False)
    axes.set_xticks([x for x, _ in marks], [side for _, side in marks], fontsize=9)
    axes.set(title=f"prompt {prompt}", xlim=(-0.6, len(groups) - 0.4))
    axes.margins(y=0.1)


def lines(axes: Axes, results: Results, prompt: int, groups: list[int]) -> None:
    """Plot seconds over group size, with a dotted line for proportional growth."""
    for side, colour in LINES.items():
        points = [(s.group, s.turn) for s in (results.get("step", side, prompt, group) for group in groups) if s is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", label=side)
            (first, seconds), (last, _) = points[0], points[-1]
            axes.plot([first, last], [seconds, seconds * last / first], color=colour, linestyle=":", linewidth=1)
    axes.set_xticks(groups)
    axes.set(xlabel="group size", xlim=(0, 1.05 * max(groups)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def draw(results: Results, path: Path) -> None:
    """Draw and save the figure; omit the lines if there is only one group size."""
    shapes = results.shapes("step")
    groups = {prompt: [g for p, g in shapes if p == prompt] for prompt in sorted({p for p, _ in shapes})}
    grows = max(map(len, groups.values())) > 1
    size = (max(6, 1.6 + sum(1.2 + 1.1 * len(g) for g in groups.values())), 8 if grows else 4.6)
    figure = Figure(figsize=size, layout="constrained")
    widths = [1 + len(g) for g in groups.values()]
    grid = figure.subplots(1 + grows, len(groups), squeeze=False, width_ratios=widths)
    for column, (prompt, sizes) in enumerate(groups.items()):
        bars(grid[0, column], results, prompt, sizes)
        if grows:
            lines(grid[1, column], results, prompt, sizes)
    grid[0, 0].set_ylabel("seconds per step (median)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(PHASES), frameon=False)
    if grows:
        grid[1, 0].set_ylabel("seconds per step (median)")
        grid[1, 0].plot([], [], color="grey", linestyle=":", linewidth=1, label="in proportion to the smallest")
        grid[1, 0].legend(fontsize=9)
    figure.savefig(path, dpi=110)
