"""Measure the peak memory of a computation."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return the peak bytes allocated during a call, minus those allocated before it.

    On CUDA the peak is that of the caching allocator. On other devices torch's profiler records every allocation and release.
    """
    if device.type != "cuda":
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        results = profiler.profiler.kineto_results  # type: ignore[union-attr]
        events = sorted((event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]")
        return max(accumulate((size for _, size in events), initial=0))
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
