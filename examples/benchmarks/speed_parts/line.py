"""A worker's end of the line to the process that commands it, and its clock."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

PHASES = ("generate", "reward", "reference", "update", "other")


class Phases:
    """Where the time of a turn goes: every moment belongs to the innermost of the phases under way, else to "other".

    Args:
        device: on CUDA, what was begun in a phase is waited for at its end.

    Attributes:
        seconds: of the wall clock, by phase.
        cpu_seconds: of this process, by phase.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.begin()

    def begin(self) -> None:
        """Start a turn."""
        self.seconds, self.cpu_seconds = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self._under_way = ["other"]
        self._since = self._now()

    def end(self) -> None:
        """Stop: the sum of the seconds of all phases is the whole turn."""
        self._count()

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Let what `owner.method` takes belong to `phase`."""
        function = getattr(owner, method)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._in(phase):
                return function(*args, **kwargs)

        setattr(owner, method, timed)

    @contextmanager
    def _in(self, phase: str) -> Iterator[None]:
        self._count()
        self._under_way.append(phase)
        try:
            yield
        finally:
            self._count()
            self._under_way.pop()

    def _count(self) -> None:
        now = self._now()
        self.seconds[self._under_way[-1]] += now[0] - self._since[0]
        self.cpu_seconds[self._under_way[-1]] += now[1] - self._since[1]
        self._since = now

    def _now(self) -> tuple[float, float]:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class Line:
    """Jobs come in as lines of standard input, what they took goes out as lines of JSON; other output becomes an error's.

    Args:
        device: whose memory is reported: the process's resident memory for the CPU, what torch has allocated on CUDA.

    Attributes:
        phases: the clock of the turn under way.
    """

    def __init__(self, device: str) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cuda = torch.device(device).type == "cuda"
        self.phases = Phases(device)

    def ready(self) -> None:
        """Everything is loaded: say how much memory that took."""
        self._send(before=torch.cuda.memory_allocated() if self._cuda else resident("VmRSS"))

    def next_job(self) -> str:
        """Wait for a job, and start the clock; empty where there is none any more."""
        job = sys.stdin.readline().strip()
        self.phases.begin()
        return job

    def done(self, tokens: int) -> None:
        """The job is done, with so many response tokens."""
        self.phases.end()
        peak = torch.cuda.max_memory_allocated() if self._cuda else resident("VmHWM")
        self._send(tokens=tokens, seconds=self.phases.seconds, cpu_seconds=self.phases.cpu_seconds, peak=peak)

    def _send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def resident(field: str) -> int:
    """Return bytes of this process's memory, now (`VmRSS`) or at most so far (`VmHWM`), as Linux counts them."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
