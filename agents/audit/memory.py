"""How much memory a computation needs at its peak, and how much there is."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agents.audit.dry_run import replaced, take_step
from agents.rollout import Rollout
from llm_env.constraints import TokenConstraint
from llm_env.report import FAILED, NOTE, PASSED, CheckRow

if TYPE_CHECKING:
    from agents.base import LanguageAgent

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
USABLE = 0.9  # of what is free: allocators lose some of it between the pieces


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

    On CPU what Linux calls available, or what the process's control group (a container's limit) leaves.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu" or not MEMINFO.exists():
        return None
    available = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    free = int(available.split()[1]) * 1024
    limit = CGROUP / "memory.max"
    if limit.exists() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int((CGROUP / "memory.current").read_text()))
    return free


def longest_step(agent: LanguageAgent, rollout: Rollout, rows: int) -> int:
    """The most bytes that the longest step takes with `rows` episodes a micro-batch, gradients included.

    Two micro-batches, so that the second meets the gradients of the first. Half of the episodes are one token shorter, so that
    there is padding and its mask (but where `rows` is 1); the others are the longest prompt of the env and `max_new_tokens`.
    """
    rules, policy = agent.rules, agent.policy
    part, new = rollout.take([0] * 2 * rows), rules.max_new_tokens
    prompt = max(rules.prompts.ids, key=len).tolist()
    shorter = (prompt[1:], new) if len(prompt) > 1 else (prompt, max(1, new - 1))
    shapes = [shorter, (prompt, new)] * rows
    tables: dict[str, Any] = {
        name: torch.ones(2 * rows, new, device=value.device)
        for name, value in vars(part).items()
        if isinstance(value, Tensor) and value.ndim == 2
    }
    longest = replace(part, prompts=[p for p, _ in shapes], responses=[(p * new)[:n] for p, n in shapes], **tables)
    # The tokens are no answer: a constraint that costs the same, but allows them.
    anything = TokenConstraint(None, 0, rules.vocab_size, rules.eos_id)
    with replaced(agent, micro_batch_size=rows), replaced(policy, constraint=policy.constraint and anything):
        policy.zero_grad()
        peak = peak_bytes(partial(take_step, agent, longest), policy.device)
        policy.zero_grad()
    return peak


def memory_row(agent: LanguageAgent, rollout: Rollout, optimizer: torch.optim.Optimizer) -> CheckRow:
    """Whether the longest step fits on the device, and how many rows a forward pass may have.

    One row a micro-batch is measured, and two; each row more is reckoned at their difference, which is a little too much: one
    row has no padding, and needs no mask for it.
    """
    check, device = "memory of the longest step", agent.policy.device
    length = max(map(len, agent.rules.prompts.ids)) + agent.rules.max_new_tokens
    try:
        one, two = (longest_step(agent, rollout, rows) for rows in (1, 2))
    except torch.OutOfMemoryError:
        detail = f"two rows of {length} tokens do not fit: lower max_new_tokens, shorten the prompts or take a smaller model"
        return CheckRow(check, FAILED, detail)
    slope, free, states = max(two - one, 1), free_bytes(device), _states_to_come(optimizer)
    seen = f"{length} tokens: {_size(one)} for one row, {_size(slope)} for each more, {_size(states)} for the optimizer's state"
    if free is None:
        return CheckRow(check, NOTE, f"{seen}; how much is free is not known on {device.type}")
    fitting = max(0, int((free * USABLE - states - one) // slope) + 1)
    wanted = min(size for size in (agent.micro_batch_size, agent.batch_size, agent.n_envs) if size is not None)
    seen += f"; {_size(free)} are free"
    if fitting >= wanted:
        return CheckRow(check, PASSED, f"{seen}: micro_batch_size={wanted} fits, and up to {fitting} would")
    remedy = f"set micro_batch_size={fitting}" if fitting else "not even 1 does: lower max_new_tokens or take a smaller model"
    return CheckRow(check, FAILED, f"{seen}: micro_batch_size={wanted} does not fit; {remedy}")


def _states_to_come(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the optimizer will keep from its first step on: two numbers a weight with Adam and its kin, else one."""
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    return (2 if "betas" in optimizer.defaults else 1) * sum(p.nbytes for p in new)


def _size(count: float) -> str:
    """Bytes for people."""
    power = min(3, max(0, int(np.log2(max(count, 1)) // 10)))
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}"
