"""Format the Markdown report: medians over repetitions, and ratios of medians."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from speed_parts.line import PHASES
from speed_parts.worker import GENERATE, HERE, TRL, Series

MB = 2**20
Cells = Iterable[Any]


class Results:
    """Series of a run, by job, side and shape."""

    def __init__(self, series: list[Series]) -> None:
        self._series = {(s.job, s.side, s.prompt, s.group): s for s in series}

    def get(self, job: str, side: str, prompt: int, group: int) -> Series | None:
        """Return a series, or None if it has no timed repetitions."""
        found = self._series.get((job, side, prompt, group))
        return found if found is not None and found.seconds else None

    def shapes(self, job: str) -> list[tuple[int, int]]:
        """Return the sorted shapes (P, G) of a job."""
        return sorted({(s.prompt, s.group) for s in self._series.values() if s.job == job})

    def died(self) -> list[Series]:
        """Return the series whose worker was killed by a signal."""
        return [s for s in self._series.values() if s.died is not None]


def rows(head: Cells, lines: Iterable[Cells]) -> str:
    """Format a Markdown table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---:"] * len(head), *lines])


def number(value: float | None, digits: int = 2) -> str:
    """Format a number, or a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(above: float | None, below: float | None) -> float | None:
    """Return `above / below`, or None if one of them is None."""
    return None if above is None or below is None else above / below


def of(series: Series | None, name: str) -> float | None:
    """Return an attribute of a series as float, or None if there is no series."""
    return None if series is None else float(getattr(series, name))


def rollouts(results: Results) -> str:
    """Format the table of rollouts: tokens per second, speedup and peak memory."""

    def line(prompt: int, group: int) -> Cells:
        here, other = (results.get("rollout", side, prompt, group) for side in (HERE, GENERATE))
        speeds = [None if s is None else s.tokens / s.turn for s in (here, other)]
        memory = [None if s is None else s.peak / MB for s in (here, other)]
        ratios = [ratio(*speeds), ratio(of(other, "cpu_turn"), of(here, "cpu_turn"))]
        return [prompt, group, *(number(x, 0) for x in speeds), *map(number, ratios), *(number(x, 0) for x in memory)]

    head = ["prompt", "group", "here, tokens/s", "`generate`, tokens/s", "speedup", "speedup, CPU time"]
    return rows([*head, "peak MiB, here", "peak MiB, `generate`"], (line(*shape) for shape in results.shapes("rollout")))


def steps(results: Results) -> str:
    """Format the table of steps: seconds, speedup and memory."""

    def line(prompt: int, group: int) -> Cells:
        here, trl = (results.get("step", side, prompt, group) for side in (HERE, TRL))
        seconds, cpu = ([of(s, name) for s in (here, trl)] for name in ("turn", "cpu_turn"))
        peak, before = ([None if s is None else getattr(s, name) / MB for s in (here, trl)] for name in ("peak", "before"))
        times = [*map(number, seconds), number(ratio(*seconds[::-1])), number(ratio(*cpu[::-1]))]
        memory = [*(number(x, 0) for x in peak), number(ratio(*peak)), *(number(x, 0) for x in before)]
        return [prompt, group, next(s.passes for s in (here, trl) if s is not None), *times, *memory]

    head = ["prompt", "group", "passes", "here, s", "TRL, s", "speedup", "speedup, CPU time"]
    head += ["peak MiB, here", "peak MiB, TRL", "peak, here / TRL", "MiB before, here", "MiB before, TRL"]
    return rows(head, (line(*shape) for shape in results.shapes("step")))


def phases(results: Results) -> str:
    """Format the table of seconds by phase; CPU seconds are in parentheses."""

    def lines() -> Iterable[Cells]:
        for prompt, group in results.shapes("step"):
            for side in (HERE, TRL):
                series = results.get("step", side, prompt, group)
                if series is not None:
                    pairs = [*((series.phase(name), series.cpu_phase(name)) for name in PHASES), (series.turn, series.cpu_turn)]
                    yield [prompt, group, side, *(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in pairs)]

    return rows(["prompt", "group", "side", *PHASES, "whole step"], lines())


def growth(results: Results) -> str:
    """Format the growth of step time with group size; empty for a single size."""

    def lines() -> Iterable[Cells]:
        for prompt in sorted({prompt for prompt, _ in results.shapes("step")}):
            for side in (HERE, TRL):
                found = [results.get("step", side, *shape) for shape in results.shapes("step") if shape[0] == prompt]
                series = [s for s in found if s is not None]
                if len(series) > 1:
                    first, last = series[0], series[-1]
                    times, wall, cpu = (getattr(last, x) / getattr(first, x) for x in ("group", "turn", "cpu_turn"))
                    shares = f"{wall / times:.2f} ({cpu / times:.2f})"
                    added = f"{(wall - 1) / (times - 1):.2f} ({(cpu - 1) / (times - 1):.2f})"
                    measured = ", ".join(f"{s.group}: {s.turn:.2f} ({s.cpu_turn:.2f})" for s in series)
                    yield [prompt, side, measured, f"{first.group} to {last.group}", shares, added]

    found = list(lines())
    if not found:
        return ""
    head = ["prompt", "side", "seconds by group size", "from a to b", "t_b / (b/a t_a)", "(t_b - t_a) / ((b/a - 1) t_a)"]
    return (
        "## Growth with the group size\n\na is the smallest group size, b the largest, and t_a and t_b are the seconds per "
        "step. The last two columns compare t_b, and the growth from t_a to t_b, with growth proportional to the group size. A "
        f"value of 1 means proportional growth. Values in parentheses are for CPU time.\n\n{rows(head, found)}\n"
    )


def checks(found: list[dict[str, float]]) -> str:
    """Format the table of the comparison before timing."""
    lines = (
        [
            *(int(c[name]) for name in ("prompt", "group")),
            *(f"{c[name]:.7f}" for name in ("loss_here", "loss_trl")),
            *(f"{c[name]:.1e}" for name in ("gradient", "log_probs")),
            f"{c['clipped']:.2f}",
        ]
        for c in sorted(found, key=lambda c: (c["prompt"], c["group"]))
    )
    head = ["prompt", "group", "loss here", "loss in TRL", "gradients, relative difference"]
    return rows([*head, "log-probs, largest difference", "clip fraction"], lines)


def report(title: str, found: list[dict[str, float]], results: Results) -> str:
    """Format the report of all results so far."""
    parts = [f"# Speed, side by side\n\n{title}\n"]
    if found:
        parts.append(
            "## Comparison of loss and gradient\n\nBoth sides compute loss and gradient in float32, on the same responses to "
            "at most two prompts, sampled by this package. The weights of the policy were perturbed after sampling, so that it "
            "differs from the sampling policy and from the reference. Log-probs of sampled tokens are compared with those of a "
            f"plain forward pass.\n\n{checks(found)}\n"
        )
    if results.shapes("rollout"):
        parts.append(f"## Rollouts\n\n{rollouts(results)}\n")
    if results.shapes("step"):
        parts.append(f"## GRPO steps\n\n{steps(results)}\n")
        parts.append(f"## Seconds of a step by phase (CPU seconds in parentheses)\n\n{phases(results)}\n")
        parts.append(growth(results))
    parts += [
        f"The {s.job} of {s.side} at prompt {s.prompt}, group {s.group} was killed by signal {s.died} after {len(s.seconds)} "
        "timed repetitions. Linux sends signal 9 if memory runs out.\n"
        for s in results.died()
    ]
    return "\n".join(filter(None, parts))
