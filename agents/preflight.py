"""The longest pass that an update can meet, tried before the first rollout, so that memory runs out in the first minute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from heapq import nlargest
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from agents.batches import kept_together, micro_batches
from agents.checks import check_budget
from agents.memory import free_bytes, peak_bytes, size_of
from agents.optimizers import states_to_come
from agents.rollout import Rollout
from agents.untouched import replaced, untouched
from agents.update import accumulate
from llm_env.constraints import TokenConstraint
from llm_env.lm.micro_batches import positions_of
from llm_env.lm.scoring import CHUNK_BYTES
from llm_env.lm.sharing import Extent

if TYPE_CHECKING:
    from agents.base import LanguageAgent

USABLE = 0.9  # of what is free: allocators lose some of it between the pieces
UNTRIED = ("cpu",)  # devices on which a pass that is too large ends the process, so that it is reckoned and not tried

_passed: WeakKeyDictionary[LanguageAgent, tuple[object, ...]] = WeakKeyDictionary()  # with these limits


def preflight(agent: LanguageAgent) -> None:
    """Find out before anything is drawn whether the largest pass of the update has room in memory.

    That is an optimizer step of the env's longest prompts with `max_new_tokens` each, or as many of them as `micro_batch_size`
    and `max_tokens_per_batch` let into one pass, forward and backward, with all gradients and the optimizer's state beside it.
    On a GPU it is run. On a CPU, where a process that asks for too much is killed, some rows are measured and the rest is
    reckoned (`LongestPass.bytes_of`), if the system says how much is free. An agent does so once, and again where a limit
    has changed; with `preflight=False` never. Its weights, attributes and random numbers stay as they were, but for what a loss
    of one's own adds to a list or buffer. Such a loss may want more than made-up episodes have: it fails with a warning.
    Sampling and the reference are not tried.

    Raises:
        ValueError: there is no env, or `max_tokens_per_batch` does not hold its longest episode.
        MemoryError: there is no room; the message names a `max_tokens_per_batch` that there is room for. The agent is as it
            was: set that and go on.
    """
    rules, device, budget = agent.rules, agent.device, agent.max_tokens_per_batch
    check_budget(budget, rules)
    longest = max(map(len, rules.prompts.ids)), rules.max_new_tokens
    limits = (*longest, agent.n_envs, agent.batch_size, agent.micro_batch_size, budget, device, agent.gradient_checkpointing)
    is_tried = device.type not in UNTRIED
    # Sharded, every pass brings all processes together.
    if not agent.preflight or agent.world.sharded or _passed.get(agent) == limits:
        return
    agent.world.together(partial(_try, agent, is_tried))
    _passed[agent] = limits


def _try(agent: LanguageAgent, is_tried: bool) -> None:
    budget, device, optimizer, processes = agent.max_tokens_per_batch, agent.device, agent.policy.optimizer, agent.world.size
    with untouched(agent, 0):
        longest_pass = LongestPass(agent, optimizer, processes)
        fits = longest_pass.runs if is_tried else longest_pass.has_room
        try:
            has_room = fits(budget)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            warnings.warn(f"preflight could not try the longest pass ({detail}); preflight=False leaves it out", stacklevel=3)
            has_room = True
        if not has_room:
            fault = f"does not fit into the memory of {device}" if is_tried else longest_pass.reckoned(budget)
            raise MemoryError(
                f"the longest pass of the update, {longest_pass.described(budget)}, {fault}; {longest_pass.remedy(fits)}"
            )


class LongestPass:
    """The largest forward and backward pass of an agent's update.

    Args:
        agent: within `untouched`, which puts back the gradients that are overwritten here.
        optimizer: its own.
        processes: how many share an optimizer step.
    """

    def __init__(self, agent: LanguageAgent, optimizer: torch.optim.Optimizer, processes: int = 1) -> None:
        self.agent, self.rules, self.device = agent, agent.rules, agent.device
        step = min(agent.batch_size or agent.n_envs, agent.n_envs)
        unit = kept_together(step, agent.n_envs, agent.group_size)
        self.unit = unit if step >= unit * processes else 1
        rows = -(-step // (self.unit * processes)) * self.unit
        self.most = min(agent.micro_batch_size or rows, rows)
        self.rollout = self._longest_rollout(rows)
        self.prompt, self.new = max(map(len, self.rules.prompts.ids)), self.rules.max_new_tokens
        self.states = states_to_come(optimizer)
        self._trained = [parameter for parameter in agent.policy.parameters() if parameter.requires_grad]
        self._measured: dict[int, int] = {}

    def _longest_rollout(self, rows: int) -> Rollout:
        """An optimizer step's episodes; those of one prompt follow each other, more than a group where the env has few."""
        rules, mask = self.rules, torch.ones(rows, self.rules.max_new_tokens, device=self.device)
        prompts = [ids.tolist() for ids in nlargest(-(-rows // self.unit), rules.prompts.ids, key=len)]
        values = mask if self.agent.needs_values else None
        return Rollout(
            prompts=sorted([prompts[row // self.unit % len(prompts)] for row in range(rows)], key=lambda ids: (-len(ids), ids)),
            responses=[[rules.eos_id] * rules.max_new_tokens] * rows,
            mask=mask,
            rewards=mask,
            sampled_logp=mask,
            ref_logp=None if rules.reference is None else mask,
            step_ends=mask,
            truncated=mask[:, 0] == 0,
            infos=[{"prompt": "", "completion": ""}] * rows,
            group_size=self.agent.group_size,
            old_logp=mask,
            old_values=values,
            last_values=None if values is None else mask[:, 0],
            advantages=mask,
            returns=values,
        )

    def rows_at_once(self, budget: int | None) -> int:
        """How many episodes are in one pass, that of the longest, where `max_tokens_per_batch` is `budget`."""
        with replaced(self.agent, max_tokens_per_batch=budget):
            parts = micro_batches(self.agent, self.rollout, np.arange(len(self.rollout)))
        return next(len(part) for part in parts if 0 in part)

    def positions(self, rows: int, new: int) -> int:
        """Of a pass over the first episodes, their responses cut to `new` tokens."""
        answers = [len(list(run)) for _, run in groupby(self.rollout.prompts[:rows])]
        extent = Extent(rows, len(answers), max(answers), self.prompt, new)
        policy = self.agent.policy
        return positions_of(policy.lm, self.prompt + new, policy.prefix_sharing)(extent)

    def run(self, rows: int, new: int) -> None:
        """A pass over the first episodes, their responses cut to `new` tokens, with all that is there in a second step.

        Every other response is made a token shorter, so that there is padding and its mask.
        """
        part, policy = self.rollout.take(range(rows)), self.agent.policy
        part.responses = [row[: max(1, new - i % 2)] for i, row in enumerate(part.responses)]
        part = part.take(range(rows))  # cuts the tables to the responses
        part.mask[1::2, max(1, new - 1) :] = 0
        # Costs what the env's own constraint does, and allows these tokens.
        anything = TokenConstraint(None, 0, self.rules.vocab_size, self.rules.eos_id)
        try:
            states = torch.empty(self.states, dtype=torch.uint8, device=self.device)
            for parameter in self._trained:
                parameter.grad = torch.zeros_like(parameter)
            with replaced(policy, constraint=policy.constraint and anything):
                accumulate(self.agent, part, part.mask / part.mask.sum(), fresh=False)
            del states
        finally:
            policy.zero_grad()

    def runs(self, budget: int | None) -> bool:
        """Whether the largest pass can be run; and one that fills the budget, with a row more of shorter responses."""
        rows = self.rows_at_once(budget)
        try:
            self.run(rows, self.new)
            if budget is not None and rows < self.most:
                shorter = [new for new in range(1, self.new) if self.positions(rows + 1, new) <= budget]
                if shorter:
                    self.run(rows + 1, shorter[-1])
            return True
        except torch.OutOfMemoryError:
            pass
        if self.device.type == "cuda":  # out here, where the error no longer holds on to what the pass had made
            torch.cuda.empty_cache()
        return False

    def has_room(self, budget: int | None) -> bool:
        """Whether there is room for the largest pass, as it is reckoned; True where nobody says how much is free."""
        free = free_bytes(self.device)
        return free is None or self.bytes_of(budget, free) <= free * USABLE

    def bytes_of(self, budget: int | None, free: float = float("inf")) -> float:
        """The most bytes that the largest pass holds, gradients and the optimizer's state included.

        One row is measured, and then one group and two (one row and two, where no group stays together), or so many that their
        logits are more than are made at a time; each position more, up to the budget, is reckoned at their difference. What
        by that would not fit into `free` is not measured.
        """
        rows = self.rows_at_once(budget)
        positions = self.positions(rows, self.new)
        if budget is not None and rows < self.most:
            positions = max(positions, budget)
        chunk = -(-CHUNK_BYTES // (4 * self.rules.vocab_size * self.new))  # rows
        unit = max(self.unit, chunk) if rows > chunk else self.unit
        seen, peak, slope = 0, self.states + sum(parameter.nbytes for parameter in self._trained), 0.0
        for size in sorted({min(size, rows) for size in (1, unit, 2 * unit)}):
            here = self.positions(size, self.new)
            if seen and peak + (here - seen) * slope > free:
                break
            found = self._measure(size)
            seen, peak, slope = here, found, max((found - peak) / (here - seen), 0.0)
        return peak + (positions - seen) * slope

    def _measure(self, rows: int) -> int:
        if rows not in self._measured:
            self._measured[rows] = peak_bytes(partial(self.run, rows, self.new), self.device)
        return self._measured[rows]

    def described(self, budget: int | None) -> str:
        """The largest pass in words."""
        return f"{self.rows_at_once(budget)} episodes of {self.prompt + self.new} tokens"

    def reckoned(self, budget: int | None) -> str:
        """What it takes of what there is, in words."""
        free = free_bytes(self.device)
        taken = self.bytes_of(budget, float("inf") if free is None else free)
        left = f"how much is free is not known on {self.device.type}" if free is None else f"{size_of(free)} are free"
        return f"takes {size_of(taken)}, {size_of(self.states)} for the optimizer's state included; {left}"

    def remedy(self, fits: Callable[[int | None], bool]) -> str:
        """What to do where the largest pass does not fit."""
        budget = self.fitting(fits)
        if budget is not None:
            return f"set max_tokens_per_batch={budget}"
        length = self.prompt + self.new
        return f"not even one of {length} tokens fits: lower max_new_tokens, shorten the prompts or take a smaller model"

    def fitting(self, fits: Callable[[int | None], bool]) -> int | None:
        """A `max_tokens_per_batch` that fits where the agent's own does not, within an eighth of the largest; None for none."""
        low = self.prompt + self.new
        high = self.rows_at_once(self.agent.max_tokens_per_batch) * low
        if not fits(low):
            return None
        while high - low > low // 8:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return self.positions(self.rows_at_once(low), self.new)  # what was tried, where more could be filled in
