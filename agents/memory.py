"""How much memory a computation needs at its peak, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
RECLAIMED = ("active_file", "inactive_file")  # pages of a control group that the kernel gives up where it needs them


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on and are still alive, in forward and backward passes.

    What an operator takes and gives back within itself, before it returns, is not seen. What was there before does not count.

    Attributes:
        now: bytes alive.
        peak: the largest `now` there was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in _tensors((args, kwargs)):  # of these the outputs may be views
            self._note(tensor, counts=False)
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._note(tensor, counts=True)
        self.peak = max(self.peak, self.now)
        return out

    def _note(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counts else 0
        if key not in self._known:
            self._known.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among what an operator takes or gives: values, lists of them and keyword arguments."""
    if isinstance(tree, Tensor):
        return [tree]
    branches = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for branch in branches for tensor in _tensors(branch)]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The most bytes that `call` holds at a time, beyond what is held before it.

    On CUDA as its caching allocator counts them; elsewhere as `LiveBytes` does, whose number does not depend on what the
    process has used before, as the resident set size would.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            call()
        return live.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be had on the device, those that torch keeps for later included; None where nobody says.

    On CPU what Linux calls available, or what the process's control group (a container's limit) leaves, which counts the files
    that it keeps in memory as used.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    free = 1024 * _numbers(MEMINFO)["MemAvailable:"]
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        pages = _numbers(CGROUP / "memory.stat")
        used = int((CGROUP / "memory.current").read_text()) - sum(pages[name] for name in RECLAIMED)
        free = min(free, int(most) - used)
    return free


def _numbers(file: Path) -> dict[str, int]:
    """A file of lines `name number`, and perhaps a unit."""
    lines = [line.split() for line in file.read_text().splitlines()]
    return {line[0]: int(line[1]) for line in lines}


def size_of(count: float) -> str:
    """Bytes for people."""
    power = min(3, max(0, int(np.log2(max(count, 1)) // 10)))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
