"""Communication of a worker with the controller process, and timing of phases."""

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
    """Timer that assigns time to the innermost running phase, or to "other".

    Args:
        device: torch device. On CUDA, the timer synchronizes at the start and end of each phase.

    Attributes:
        seconds: wall-clock seconds by phase.
        cpu_seconds: CPU seconds of this process by phase.
    """

    def __init__(self, device: str) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self.begin()

    def begin(self) -> None:
        """Reset all phases and start the timer."""
        self.seconds, self.cpu_seconds = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        self._under_way = ["other"]
        self._since = self._now()

    def end(self) -> None:
        """Stop the timer. The phases sum up to the time since `begin`."""
        self._count()

    def time(self, owner: Any, method: str, phase: str) -> None:
        """Wrap `owner.method` so that its time is assigned to `phase`."""
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
    """Worker side of the protocol: read jobs, write results as JSON lines.

    Jobs are lines of standard input. Results go to the original standard output. All other output is redirected to standard
    error.

    Args:
        device: torch device whose memory is reported: resident memory of the process for the CPU, memory allocated by torch
            for CUDA.

    Attributes:
        phases: timer of the current job.
    """

    def __init__(self, device: str) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._cuda = torch.device(device).type == "cuda"
        self.phases = Phases(device)

    def ready(self) -> None:
        """Report that everything is loaded, with the memory in use."""
        self._send(before=torch.cuda.memory_allocated() if self._cuda else resident("VmRSS"))

    def next_job(self) -> str:
        """Wait for the next job and start the timer; return an empty string if none."""
        job = sys.stdin.readline().strip()
        self.phases.begin()
        return job

    def done(self, tokens: int) -> None:
        """Stop the timer; report response tokens, times and peak memory."""
        self.phases.end()
        peak = torch.cuda.max_memory_allocated() if self._cuda else resident("VmHWM")
        self._send(tokens=tokens, seconds=self.phases.seconds, cpu_seconds=self.phases.cpu_seconds, peak=peak)

    def _send(self, **answer: Any) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)


def resident(field: str) -> int:
    """Return resident memory in bytes, current (`VmRSS`) or peak (`VmHWM`)."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
