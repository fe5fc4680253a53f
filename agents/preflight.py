"""Try the longest pass of the update before the first rollout, so that a GPU runs out of memory in the first minute."""

from __future__ import annotations

import warnings
from functools import partial
from heapq import nlargest
from itertools import groupby
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch

from agents.batches import kept_together, micro_batches
from agents.checks import check_budget
from agents.optimizers import states_to_come
from agents.rollout import Rollout
from agents.untouched import replaced, untouched
from agents.update import accumulate
from llm_env.constraints import TokenConstraint
from llm_env.passes import positions_of
from llm_env.sharing import Extent

if TYPE_CHECKING:
    from agents.base import LanguageAgent

DEVICES = ("cuda",)  # where an allocation that fails is an error; a CPU process that asks for too much may be killed

_passed: WeakKeyDictionary[LanguageAgent, tuple[object, ...]] = WeakKeyDictionary()  # with these limits


def preflight(agent: LanguageAgent) -> None:
    """Try the largest pass of the update on a GPU before the first rollout.

    The pass is an optimizer step of the env's longest prompts with `max_new_tokens` each, or as many of them as
    `micro_batch_size` and `max_tokens_per_batch` allow in one pass: forward and backward, with all gradients and the
    optimizer's state allocated. It runs once, and again after a limit has changed. On other devices, with sharded weights
    and with `preflight=False` nothing is tried. Sampling and the reference are never tried.

    The agent's weights, attributes and random states are restored, except for what a custom loss adds to a list or buffer.
    A custom loss may need more than the made-up episodes contain: its error becomes a warning.

    Raises:
        ValueError: If there is no env, or `max_tokens_per_batch` is smaller than its longest episode.
        MemoryError: If the pass runs out of memory. The message names a `max_tokens_per_batch` that was tried successfully;
            set it on the agent and call `learn` again.
    """
    rules, device, budget = agent.rules, agent.device, agent.max_tokens_per_batch
    check_budget(budget, rules)
    longest = max(map(len, rules.prompts.ids)), rules.max_new_tokens
    limits = (*longest, agent.n_envs, agent.batch_size, agent.micro_batch_size, budget, device, agent.gradient_checkpointing)
    # Sharded, every pass brings all processes together.
    if device.type not in DEVICES or not agent.preflight or agent.world.sharded or _passed.get(agent) == limits:
        return
    agent.world.together(partial(_try, agent))
    _passed[agent] = limits


def _try(agent: LanguageAgent) -> None:
    budget, optimizer, processes = agent.max_tokens_per_batch, agent.policy.optimizer, agent.world.size
    with untouched(agent, 0):
        longest_pass = LongestPass(agent, optimizer, processes)
        try:
            has_room = longest_pass.runs(budget)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            warnings.warn(f"preflight could not try the longest pass ({detail}); preflight=False leaves it out", stacklevel=3)
            has_room = True
        if not has_room:
            raise MemoryError(
                f"the longest pass of the update, {longest_pass.described(budget)}, does not fit into the memory of "
                f"{agent.device}; {longest_pass.remedy()}"
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

    def described(self, budget: int | None) -> str:
        """The largest pass in words."""
        return f"{self.rows_at_once(budget)} episodes of {self.prompt + self.new} tokens"

    def remedy(self) -> str:
        """Name a budget that fits, or what else to change."""
        budget = self.fitting()
        if budget is not None:
            return f"set max_tokens_per_batch={budget}"
        length = self.prompt + self.new
        return f"not even one of {length} tokens fits: lower max_new_tokens, shorten the prompts or take a smaller model"

    def fitting(self) -> int | None:
        """A `max_tokens_per_batch` that fits where the agent's own does not, within an eighth of the largest; None for none."""
        low = self.prompt + self.new
        high = self.rows_at_once(self.agent.max_tokens_per_batch) * low
        if not self.runs(low):
            return None
        while high - low > low // 8:
            middle = (low + high) // 2
            low, high = (middle, high) if self.runs(middle) else (low, middle)
        return self.positions(self.rows_at_once(low), self.new)  # what was tried, where more could be filled in
