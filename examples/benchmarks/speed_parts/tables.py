"""The report in Markdown: medians over the turns of a series, and ratios of medians."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from speed_parts.line import PHASES
from speed_parts.worker import GENERATE, HERE, TRL, Series

MB = 2**20
Cells = Iterable[Any]


class Results:
    """All series of a run, by job, side and shape."""

    def __init__(self, series: list[Series]) -> None:
        self._series = {(s.job, s.side, s.prompt, s.group): s for s in series}

    def get(self, job: str, side: str, prompt: int, group: int) -> Series | None:
        """Return the series, where there are turns in it."""
        found = self._series.get((job, side, prompt, group))
        return found if found is not None and found.seconds else None

    def shapes(self, job: str) -> list[tuple[int, int]]:
        """(P, G) of the job, in order."""
        return sorted({(s.prompt, s.group) for s in self._series.values() if s.job == job})

    def died(self) -> list[Series]:
        """Return those whose worker a signal ended."""
        return [s for s in self._series.values() if s.died is not None]


def rows(head: Cells, lines: Iterable[Cells]) -> str:
    """Return a table."""
    head = list(head)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, ["---:"] * len(head), *lines])


def number(value: float | None, digits: int = 2) -> str:
    """As text; a dash for what was not measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def ratio(above: float | None, below: float | None) -> float | None:
    """Return a quotient, where there are both."""
    return None if above is None or below is None else above / below


def of(series: Series | None, name: str) -> float | None:
    """Return an attribute, where there is a series."""
    return None if series is None else float(getattr(series, name))


def rollouts(results: Results) -> str:
    """Tokens a second."""

    def line(prompt: int, group: int) -> Cells:
        here, other = (results.get("rollout", side, prompt, group) for side in (HERE, GENERATE))
        speeds = [None if s is None else s.tokens / s.turn for s in (here, other)]
        memory = [None if s is None else s.peak / MB for s in (here, other)]
        ratios = [ratio(*speeds), ratio(of(other, "cpu_turn"), of(here, "cpu_turn"))]
        return [prompt, group, *(number(x, 0) for x in speeds), *map(number, ratios), *(number(x, 0) for x in memory)]

    head = ["prompt", "group", "here, tokens/s", "`generate`, tokens/s", "times as fast", "by CPU time"]
    return rows([*head, "peak MB here", "`generate`"], (line(*shape) for shape in results.shapes("rollout")))


def steps(results: Results) -> str:
    """Seconds a step, and memory."""

    def line(prompt: int, group: int) -> Cells:
        here, trl = (results.get("step", side, prompt, group) for side in (HERE, TRL))
        seconds, cpu = ([of(s, name) for s in (here, trl)] for name in ("turn", "cpu_turn"))
        peak, before = ([None if s is None else getattr(s, name) / MB for s in (here, trl)] for name in ("peak", "before"))
        times = [*map(number, seconds), number(ratio(*seconds[::-1])), number(ratio(*cpu[::-1]))]
        memory = [*(number(x, 0) for x in peak), number(ratio(*peak)), *(number(x, 0) for x in before)]
        return [prompt, group, next(s.passes for s in (here, trl) if s is not None), *times, *memory]

    head = ["prompt", "group", "passes", "here, s", "TRL, s", "times as fast", "by CPU time", "peak MB here", "TRL", "here/TRL"]
    return rows([*head, "MB before, here", "TRL"], (line(*shape) for shape in results.shapes("step")))


def phases(results: Results) -> str:
    """Seconds by phase, in brackets those of the CPU."""

    def lines() -> Iterable[Cells]:
        for prompt, group in results.shapes("step"):
            for side in (HERE, TRL):
                series = results.get("step", side, prompt, group)
                if series is not None:
                    pairs = [*((series.phase(name), series.cpu_phase(name)) for name in PHASES), (series.turn, series.cpu_turn)]
                    yield [prompt, group, side, *(f"{wall:.2f} ({cpu:.2f})" for wall, cpu in pairs)]

    return rows(["prompt", "group", "side", *PHASES, "whole step"], lines())


def growth(results: Results) -> str:
    """Seconds per step against group size; empty where only one group size was measured."""

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
        "## Growth with the group\n\nSeconds per step of the largest group, b, over what they would be in proportion to those "
        "of the smallest, a; and the seconds that are added from a to b over those that would be added in proportion. In both, "
        f"1 is proportional; in brackets, by CPU time.\n\n{rows(head, found)}\n"
    )


def checks(found: list[dict[str, float]]) -> str:
    """Return what was compared before the timing."""
    lines = (
        [
            *(int(c[name]) for name in ("prompt", "group")),
            *(f"{c[name]:.7f}" for name in ("loss_here", "loss_trl")),
            *(f"{c[name]:.1e}" for name in ("gradient", "log_probs")),
            f"{c['clipped']:.2f}",
        ]
        for c in sorted(found, key=lambda c: (c["prompt"], c["group"]))
    )
    head = ["prompt", "group", "loss here", "loss in TRL", "gradients' relative difference"]
    return rows([*head, "log-probs, sampled less plain, at most", "ratios clipped"], lines)


def report(title: str, found: list[dict[str, float]], results: Results) -> str:
    """Everything that is known so far."""
    parts = [f"# Speed, side by side\n\n{title}\n"]
    if found:
        parts.append(
            "## The same is computed\n\nOn responses sampled here, in float32, after the policy was moved away from the one "
            f"that sampled and from the reference. Up to two prompts.\n\n{checks(found)}\n"
        )
    if results.shapes("rollout"):
        parts.append(f"## Rollouts\n\n{rollouts(results)}\n")
    if results.shapes("step"):
        parts.append(f"## GRPO steps\n\n{steps(results)}\n")
        parts.append(f"## Seconds of a step by phase (in brackets, of CPU)\n\n{phases(results)}\n")
        parts.append(growth(results))
    parts += [
        f"The {s.job} of {s.side} at prompt {s.prompt}, group {s.group} was ended by signal {s.died} after {len(s.seconds)} "
        "turns that count; 9 is the one that Linux sends where memory runs out.\n"
        for s in results.died()
    ]
    return "\n".join(filter(None, parts))
