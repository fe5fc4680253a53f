"""The longest pass that an update can meet, tried on a GPU before the first rollout."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby

import numpy as np
import torch

from agents.rollout import Rollout
from agents.training.batching import group_unit
from agents.training.optimizers import missing_state_bytes
from agents.training.preserve import preserve_state
from agents.training.trainer import Trainer
from agents.validation import check_budget
from llm_env.constraints import TokenConstraint
from llm_env.lm.micro_batches import padded_tokens
from llm_env.lm.sharing import BatchShape
from llm_env.patching import patched
from llm_env.rules import Rules
from llm_env.warn import warn

DEVICES = ("cuda",)  # on which a pass that is too large raises an error; on a CPU the system would kill the process


def preflight(trainer: Trainer, rules: Rules, n_envs: int, is_on: bool = True) -> None:
    """Try whether the longest pass of an update fits into the GPU's memory; do nothing on other devices.

    That is an optimizer step of the env's longest prompts with `max_new_tokens` each, or as many of them as `micro_batch_size`
    and `max_tokens_per_batch` allow in one forward and backward pass, with all gradients and the optimizer's state beside it.
    Weights and random numbers stay as they are. A loss that needs more than made-up episodes have fails here with a warning.
    Sampling and the reference are not tried.

    Args:
        trainer: with the settings of the update.
        rules: the env's.
        n_envs: episodes in a rollout.
        is_on: whether to try the pass; `max_tokens_per_batch` is checked anyway.

    Raises:
        ValueError: If `max_tokens_per_batch` does not hold the env's longest episode.
        MemoryError: If the pass does not fit; the message names a `max_tokens_per_batch` that does. The agent is unchanged.
    """
    budget, communicator = trainer.max_tokens_per_batch, trainer.communicator
    check_budget(budget, rules)
    device = trainer.policy.device
    # Sharded, every pass needs all processes.
    if not is_on or communicator.sharded or device.type not in DEVICES:
        return
    error = None
    try:
        _try(trainer, rules, n_envs)
    except Exception as raised:
        error = raised
    communicator.gather_or_raise(None, error)


def _try(trainer: Trainer, rules: Rules, n_envs: int) -> None:
    budget, device = trainer.max_tokens_per_batch, trainer.policy.device
    with preserve_state(trainer.policy, trainer.rng):
        step = WorstCaseStep(trainer, rules, n_envs)
        try:
            fits = step.fits(budget)
        except Exception as error:
            detail = f"{type(error).__name__}: {error}"
            warn(f"preflight could not try the longest pass ({detail}); preflight=False leaves it out")
            return
        if not fits:
            raise MemoryError(
                f"the longest pass of the update, {step.describe(budget)}, does not fit into the memory of {device}; "
                f"{step.suggestion()}"
            )


class WorstCaseStep:
    """An optimizer step of an env's longest prompts and responses.

    Args:
        trainer: with the settings of the update.
        rules: the env's.
        n_envs: episodes in a rollout.
    """

    def __init__(self, trainer: Trainer, rules: Rules, n_envs: int) -> None:
        self.trainer, self.rules, self.device = trainer, rules, trainer.policy.device
        processes, group_size = trainer.communicator.size, trainer.objective.group_size
        size = min(trainer.batch_size or n_envs, n_envs)
        unit = group_unit(size, n_envs, group_size)
        self.unit = unit if size >= unit * processes else 1
        rows = -(-size // (self.unit * processes)) * self.unit
        self.max_rows = min(trainer.micro_batch_size or rows, rows)
        self.rollout = self._longest_rollout(rows, group_size)
        self.prompt, self.new = rules.longest_prompt, rules.max_episode_tokens
        self._parameters = [parameter for parameter in trainer.policy.parameters() if parameter.requires_grad]

    def _longest_rollout(self, rows: int, group_size: int) -> Rollout:
        """Make up an optimizer step's episodes; those of one prompt follow each other, more than a group in a small env."""
        rules, mask = self.rules, torch.ones(rows, self.rules.max_episode_tokens, device=self.device)
        prompts = rules.prompts.longest(-(-rows // self.unit))
        values = mask if self.trainer.objective.needs_values else None
        return Rollout(
            prompts=sorted([prompts[row // self.unit % len(prompts)] for row in range(rows)], key=lambda ids: (-len(ids), ids)),
            responses=[[rules.eos_id] * rules.max_episode_tokens] * rows,
            mask=mask,
            rewards=mask,
            sampled_logp=mask,
            ref_logp=None if rules.reference is None else mask,
            step_ends=mask,
            truncated=mask[:, 0] == 0,
            infos=[{"prompt": "", "completion": ""}] * rows,
            group_size=group_size,
            old_logp=mask,
            old_values=values,
            last_values=None if values is None else mask[:, 0],
            advantages=mask,
            returns=values,
        )

    def rows_at_once(self, budget: int | None) -> int:
        """Return how many episodes the pass with the longest one has, where `max_tokens_per_batch` is `budget`."""
        trainer = replace(self.trainer, max_tokens_per_batch=budget)
        parts = trainer.micro_batches(self.rollout, np.arange(len(self.rollout)))
        return next(len(part) for part in parts if 0 in part)

    def padded_tokens(self, rows: int, new: int) -> int:
        """Return the tokens of a pass over the first episodes, their responses cut to `new` tokens, with padding."""
        responses = [len(list(run)) for _, run in groupby(self.rollout.prompts[:rows])]
        extent = BatchShape(rows, len(responses), max(responses), self.prompt, new)
        policy = self.trainer.policy
        return padded_tokens(policy.lm, self.prompt + new, policy.prefix_sharing)(extent)

    def run(self, rows: int, new: int) -> None:
        """Make a pass over the first episodes, their responses cut to `new` tokens, with the memory of a second step.

        Every other response is a token shorter, so that there is padding and its mask.
        """
        policy = self.trainer.policy
        batch = self.rollout.select(range(rows))
        batch.responses = [row[: max(1, new - i % 2)] for i, row in enumerate(batch.responses)]
        batch = batch.select(range(rows))  # cuts the tensors to the responses
        batch.mask[1::2, max(1, new - 1) :] = 0
        # Costs what the env's own constraint does, and allows these tokens.
        anything = TokenConstraint(None, 0, self.rules.vocab_size, self.rules.eos_id)
        try:
            states = torch.empty(missing_state_bytes(self.trainer.optimizer), dtype=torch.uint8, device=self.device)
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
            with patched(policy, constraint=policy.constraint and anything):
                self.trainer.backward_micro_batch(batch, batch.mask / batch.mask.sum())
            del states
        finally:
            policy.zero_grad()

    def fits(self, budget: int | None) -> bool:
        """Run the largest pass; and one that fills the budget, with one row more of shorter responses."""
        rows = self.rows_at_once(budget)
        try:
            self.run(rows, self.new)
            if budget is not None and rows < self.max_rows:
                shorter = [new for new in range(1, self.new) if self.padded_tokens(rows + 1, new) <= budget]
                if shorter:
                    self.run(rows + 1, shorter[-1])
            return True
        except torch.OutOfMemoryError:
            pass
        if self.device.type == "cuda":  # out here, where the error no longer holds on to the pass's tensors
            torch.cuda.empty_cache()
        return False

    def describe(self, budget: int | None) -> str:
        """Describe the largest pass."""
        return f"{self.rows_at_once(budget)} episodes of {self.prompt + self.new} tokens"

    def suggestion(self) -> str:
        """Return what to change where the largest pass does not fit."""
        budget = self.fitting_budget()
        if budget is not None:
            return f"set max_tokens_per_batch={budget}"
        length = self.prompt + self.new
        return f"not even one of {length} tokens fits: lower max_new_tokens, shorten the prompts or take a smaller model"

    def fitting_budget(self) -> int | None:
        """Find a `max_tokens_per_batch` that fits, within an eighth of the largest; None if none does."""
        low = self.prompt + self.new
        high = self.rows_at_once(self.trainer.max_tokens_per_batch) * low
        if not self.fits(low):
            return None
        while high - low > low // 8:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(middle) else (low, middle)
        return self.padded_tokens(self.rows_at_once(low), self.new)  # what was tried, where more could be filled in
