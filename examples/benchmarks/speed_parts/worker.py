"""Controller of `speed.py`: start worker processes and run their jobs alternately."""

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
CHECKED = 2  # prompts for the comparison of loss and gradient


@dataclass
class Series:
    """Timed repetitions of a job by one side, for one shape.

    Attributes:
        job: `"rollout"` or `"step"`.
        side: one of `SIDES`.
        prompt, group: prompt length in tokens (P) and group size (G).
        passes: forward passes per update.
        tokens: response tokens per repetition.
        before: memory in bytes before the first repetition. Default 0.
        peak: peak memory in bytes up to the last repetition. Default 0.
        seconds: wall-clock seconds by phase, one dict per repetition.
        cpu_seconds: CPU seconds of the process by phase, one dict per repetition.
        died: number of the signal that killed the worker. Default None (not killed).
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
        """Median wall-clock seconds of a repetition."""
        return median(sum(turn.values()) for turn in self.seconds)

    @property
    def cpu_turn(self) -> float:
        """Median CPU seconds of a repetition."""
        return median(sum(turn.values()) for turn in self.cpu_seconds)

    def phase(self, name: str) -> float:
        """Return the median wall-clock seconds of a phase."""
        return median(turn[name] for turn in self.seconds)

    def cpu_phase(self, name: str) -> float:
        """Return the median CPU seconds of a phase."""
        return median(turn[name] for turn in self.cpu_seconds)


class Killed(Exception):
    """Raised if a worker was killed by a signal, with the signal number."""


def start(module: str, work: Work) -> subprocess.Popen[str]:
    """Start a module as a worker process."""
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
    """Wait for the next answer of a worker.

    Raises:
        Killed: If the worker was killed by a signal.
        SystemExit: If the worker failed. Its error message is on standard error.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if line:
        return json.loads(line)
    code = process.wait()
    if code < 0:
        raise Killed(-code)
    raise SystemExit(f"{' '.join(process.args[1:3])} failed; its error message is above")  # type: ignore[index]


class Worker:
    """Worker process of one side, for one shape; `ready` waits until it has loaded."""

    def __init__(self, side: str, work: Work) -> None:
        self.side, self.work = side, work
        self._process = start(MODULES[side], work)
        self._before = 0

    def ready(self) -> None:
        """Wait until the worker has loaded the model."""
        self._before = answer_of(self._process)["before"]

    def series(self, job: str) -> Series:
        """Create an empty series for a job."""
        work = self.work
        return Series(job, self.side, work.prompt, work.group, work.passes, work.tokens, self._before)

    def turn(self, series: Series, counts: bool) -> None:
        """Run a job once; add the times to the series if `counts` is True.

        Raises:
            Killed: If the worker was killed by a signal.
            SystemExit: If the number of response tokens is wrong, or the worker failed.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # `answer_of` reports the reason
            print(series.job, file=self._process.stdin, flush=True)
        answer = answer_of(self._process)
        if answer["tokens"] != self.work.tokens:
            raise SystemExit(
                f"a {series.job} of {self.side} has {answer['tokens']} response tokens; expected {self.work.tokens}"
            )
        series.peak = answer["peak"]
        if counts:
            series.seconds.append(answer["seconds"])
            series.cpu_seconds.append(answer["cpu_seconds"])

    def close(self) -> None:
        """Close standard input, so that the process ends, and wait for it."""
        self._process.communicate()


def measure(work: Work, sides: list[str], repeats: int, warm_ups: int) -> tuple[dict[str, float] | None, list[Series]]:
    """Compare and time the sides for one shape; the sides of a job alternate.

    Returns:
        The result of `speed_parts.check`, or None unless both sides of the step job are measured. The series of all jobs.

    Raises:
        SystemExit: If the sides compute different results, or a worker failed.
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
                workers.pop(GENERATE).close()  # it has no other job; free its memory
        return found, results
    except Killed as killed:
        raise SystemExit(
            f"signal {killed} killed a worker before its first repetition. Check whether the machine has enough memory."
        ) from killed
    finally:
        for worker in workers.values():
            worker.close()
        if checking is not None:
            checking.communicate()


def turns(job: str, workers: list[Worker], repeats: int, warm_ups: int) -> list[Series]:
    """Run a job alternately (A B A B) on all workers; skip workers that were killed."""
    series = [worker.series(job) for worker in workers]
    for i in range(warm_ups + repeats):
        for worker, mine in zip(workers, series, strict=True):
            if mine.died is None:
                try:
                    worker.turn(mine, counts=i >= warm_ups)
                except Killed as killed:
                    mine.died = killed.args[0]
    return series
