"""Whether the longest step of a training has room in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from agents.memory import free_bytes
from agents.preflight import LongestPass
from llm_env.report import FAILED, NOTE, PASSED, CheckRow

if TYPE_CHECKING:
    from agents.base import LanguageAgent


def memory_row(agent: LanguageAgent, optimizer: torch.optim.Optimizer) -> CheckRow:
    """Whether the largest pass of the update fits on the device, as `LongestPass.bytes_of` reckons, or what would."""
    check, budget = "memory of the longest step", agent.max_tokens_per_batch
    longest = LongestPass(agent, optimizer)
    seen = longest.described(budget)
    try:
        fits = longest.has_room(budget)
        seen = f"{seen}: {longest.reckoned(budget)}"
        if fits:
            return CheckRow(check, NOTE if free_bytes(agent.device) is None else PASSED, seen)
        return CheckRow(check, FAILED, f"{seen}; {longest.remedy(longest.has_room)}")
    except torch.OutOfMemoryError:
        return CheckRow(check, FAILED, f"{seen}: does not fit; {longest.remedy(longest.runs)}")
