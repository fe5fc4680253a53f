"""The commanding end: workers as processes of their own, and turns taken by them one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from speed_parts.work import Work

HERE, GENERATE, TRL = SIDES = ("here", "generate", "TRL")
MODULES = dict(zip(SIDES, ("speed_parts.here", "speed_parts.generate", "speed_parts.with_trl"), strict=True))
JOBS = {"rollout": (HERE, GENERATE), "step": (HERE, TRL)}
CHECKED = 2  # prompts on which loss and gradient are compared


@dataclass
class Series:
    """The turns of one side at one job and shape.

    Attributes:
        job: `"rollout"` or `"step"`.
        side: one of `SIDES`.
        prompt, group: P and G.
        passes: forward passes to an update.
        tokens: response tokens in a turn.
        before: bytes of memory before the first turn.
        peak: bytes of memory at most, up to the last turn.
        seconds: by phase, a dict a turn.
        cpu_seconds: of the process, by phase, a dict a turn.
        died: the signal that ended the worker, None where none did; there may be no turns then.
    """

    job: str
    side: str
    prompt: int
    group: int
    passes: int
    tokens: int
    before: int = 0
    peak: int = 0
    seconds: list[dict[str, float]] = field(default_factory=list)
    cpu_seconds: list[dict[str, float]] = field(default_factory=list)
    died: int | None = None

    @property
    def turn(self) -> float:
        """Median of the turns' seconds."""
        return median(sum(turn.values()) for turn in self.seconds)

    @property
    def cpu_turn(self) -> float:
        """Median of the turns' CPU seconds."""
        return median(sum(turn.values()) for turn in self.cpu_seconds)

    def phase(self, name: str) -> float:
        """Median of the turns' seconds in a phase."""
        return median(turn[name] for turn in self.seconds)

    def cpu_phase(self, name: str) -> float:
        """Median of the turns' CPU seconds in a phase."""
        return median(turn[name] for turn in self.cpu_seconds)


class Killed(Exception):
    """A signal has ended a worker; the number is the argument."""


def start(module: str, work: Work) -> subprocess.Popen[str]:
    """Return a side's process."""
    folder = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(work.threads),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, "-m", module, work.to_argument()]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Return the next thing that a worker says.

    Raises:
        Killed: If a signal has ended it.
        SystemExit: If it has failed; what it said of that is on standard error.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if line:
        return json.loads(line)
    code = process.wait()
    if code < 0:
        raise Killed(-code)
    raise SystemExit(f"{' '.join(process.args[1:3])} has failed; see above")  # type: ignore[index]


class Worker:
    """One side's process, for one shape; it is loading until `ready`."""

    def __init__(self, side: str, work: Work) -> None:
        self.side, self.work = side, work
        self._process = start(MODULES[side], work)
        self._before = 0

    def ready(self) -> None:
        """Wait until everything is loaded."""
        self._before = answer_of(self._process)["before"]

    def series(self, job: str) -> Series:
        """Room for the turns at a job."""
        work = self.work
        return Series(job, self.side, work.prompt, work.group, work.passes, work.tokens, self._before)

    def turn(self, series: Series, counts: bool) -> None:
        """Do the job once and add it to the series, if it counts.

        Raises:
            Killed: If a signal ended the worker.
            SystemExit: If it has not done all the work.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer, or that there is none, says why
            print(series.job, file=self._process.stdin, flush=True)
        answer = answer_of(self._process)
        if answer["tokens"] != self.work.tokens:
            raise SystemExit(
                f"a {series.job} of {self.side} has {answer['tokens']} response tokens, it should have {self.work.tokens}"
            )
        series.peak = answer["peak"]
        if counts:
            series.seconds.append(answer["seconds"])
            series.cpu_seconds.append(answer["cpu_seconds"])

    def close(self) -> None:
        """Let the process end."""
        self._process.communicate()


def measure(work: Work, sides: list[str], repeats: int, warm_ups: int) -> tuple[dict[str, float] | None, list[Series]]:
    """Return all jobs at one shape; the sides of a job take turns.

    Returns:
        What `speed_parts.check` says, where both sides of a step are there, and the series.

    Raises:
        SystemExit: If the sides do not compute the same, or one has failed.
    """
    checking = start("speed_parts.check", work.smaller(CHECKED)) if set(JOBS["step"]) <= set(sides) else None
    workers = {side: Worker(side, work) for side in sides}
    try:
        found = None if checking is None else answer_of(checking)
        for worker in workers.values():
            worker.ready()
        results: list[Series] = []
        for job, able in JOBS.items():
            results += turns(job, [workers[side] for side in able if side in workers], repeats, warm_ups)
            if job == "rollout" and GENERATE in workers:
                workers.pop(GENERATE).close()  # it has no other job; its memory is given back
        return found, results
    except Killed as killed:
        raise SystemExit(f"signal {killed} has ended a worker before its first turn; is there memory enough?") from killed
    finally:
        for worker in workers.values():
            worker.close()
        if checking is not None:
            checking.communicate()


def turns(job: str, workers: list[Worker], repeats: int, warm_ups: int) -> list[Series]:
    """Return one job, A B A B; a worker that is killed is left out from there on."""
    series = [worker.series(job) for worker in workers]
    for i in range(warm_ups + repeats):
        for worker, mine in zip(workers, series, strict=True):
            if mine.died is None:
                try:
                    worker.turn(mine, counts=i >= warm_ups)
                except Killed as killed:
                    mine.died = killed.args[0]
    return series
