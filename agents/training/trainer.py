"""The update: from a rollout to optimizer steps, for every algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from agents.distributed.communicator import Communicator
from agents.distributed.fsdp import full_params, full_tensor
from agents.losses import masked_mean, token_weights, truncated_importance
from agents.policy import LanguagePolicy
from agents.rollout import Rollout, logged_turns
from agents.training.batching import group_unit, minibatches
from agents.training.objective import Objective
from agents.training.out_of_memory import suggest_token_budget
from llm_env.lm.micro_batches import micro_batches
from llm_env.rules import Rules


@dataclass
class Trainer:
    """Takes optimizer steps on rollouts.

    `train` is one update: log-probs and values of the old policy, advantages, then epochs of minibatches. `step` is one
    optimizer step: a loop over micro-batches (forward, loss, backward), then the gradient norm is clipped.

    Args:
        policy: the model.
        objective: the algorithm, which gives advantages and loss.
        communicator: the processes that share the micro-batches of a step.
        optimizer: steps the policy's parameters.
        rng: draws the minibatches.
        rules: the env's; its length limit divides the loss with `aggregation="constant"`.
        n_epochs: passes over a rollout.
        batch_size: episodes in an optimizer step; the whole rollout by default.
        micro_batch_size: episodes in a forward pass; `batch_size` by default.
        max_tokens_per_batch: tokens in a forward pass, padding included; see `llm_env.lm.micro_batches`.
        max_grad_norm: the gradient is scaled down to this norm.
        temperature: divides the logits.
        aggregation: see `agents.losses.token_weights`.
        mask_truncated: leave responses that the length limit ended out of the loss.
        importance_cap: cap of the importance weights; None for none. See `agents.losses.truncated_importance`.
        on_step: called after every optimizer step.
    """

    policy: LanguagePolicy
    objective: Objective
    communicator: Communicator
    optimizer: Optimizer
    rng: np.random.Generator
    rules: Rules
    n_epochs: int = 1
    batch_size: int | None = None
    micro_batch_size: int | None = None
    max_tokens_per_batch: int | None = None
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    aggregation: str = "token"
    mask_truncated: bool = False
    importance_cap: float | None = None
    on_step: Callable[[], None] | None = None

    def train(self, rollout: Rollout) -> dict[str, float]:
        """Update the policy on a rollout.

        Log-probs of the old policy come from the training path: from the first forward pass of the first epoch where that is
        one step over the whole rollout (the ratio is then exactly 1), else from a separate pass before the first step.

        Returns:
            Statistics: means over the optimizer steps.

        Raises:
            ValueError: If the gradient of a step is not finite. That step is not taken.
        """
        size = min(self.batch_size or len(rollout), len(rollout))
        is_single_step = size == len(rollout)
        needs_old_logp = self.objective.needs_old_logp or self.importance_cap is not None
        if self.objective.needs_values or (needs_old_logp and not is_single_step):
            self.compute_old_logprobs(rollout)
        self.objective.compute_advantages(rollout)
        steps: list[dict[str, float]] = []
        for epoch in range(self.n_epochs):
            for rows in minibatches(len(rollout), size, rollout.group_size, self.rng):
                steps.append(self.step(rollout, rows, is_first_pass=is_single_step and epoch == 0))
                if self.objective.should_stop(steps[-1]):
                    return _means(steps)
        return _means(steps)

    @torch.no_grad()
    def compute_old_logprobs(self, rollout: Rollout) -> None:
        """Fill in `old_logp` and, with a value head, `old_values` and `last_values`."""
        old_logp, old_values = torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.rewards)
        last_values = torch.zeros_like(rollout.scores)
        size = min(self.batch_size or len(rollout), len(rollout))
        with full_params(self.policy):
            for rows in self.local_micro_batches(rollout, np.arange(len(rollout)), size):
                batch = rollout.select(rows)
                with suggest_token_budget(self.policy, self.rules, batch.prompts, batch.responses):
                    evaluation = self.policy.evaluate_actions(
                        batch.prompts, batch.responses, self.temperature, batch.turn_lists
                    )
                width = evaluation.logp.shape[1]
                old_logp[rows, :width] = evaluation.logp * batch.mask
                if evaluation.values is not None:
                    old_values[rows, :width] = evaluation.values[:, :-1] * batch.mask
                    last_values[rows] = evaluation.values[np.arange(len(rows)), batch.lengths]
        self.communicator.all_reduce([old_logp, old_values, last_values])
        rollout.old_logp = old_logp
        if self.objective.needs_values:
            rollout.old_values, rollout.last_values = old_values, last_values

    def step(self, rollout: Rollout, rows: np.ndarray, is_first_pass: bool = False) -> dict[str, float]:
        """Take one optimizer step, micro-batch by micro-batch; the weights stay as they are if the objective says stop.

        Args:
            rollout: with advantages.
            rows: the episodes of this step.
            is_first_pass: whether no update lies between sampling and this step, so that its log-probs are `old_logp`.

        Returns:
            Statistics of the step: the loss, its terms before their coefficients, and means over the action tokens.

        Raises:
            ValueError: If the gradient is not finite. The weights are unchanged.
            torch.OutOfMemoryError: If a pass does not fit; the message names a smaller `max_tokens_per_batch`.
        """
        weights, tokens = self._token_weights(rollout, rows), float(rollout.num_actions[rows].sum())
        turn_sizes = _turn_sizes(rollout, rows)
        old_logp = torch.zeros_like(rollout.rewards) if is_first_pass else None
        micro_batches = self.local_micro_batches(rollout, rows)
        idle = self._num_idle_passes(len(micro_batches))
        self.optimizer.zero_grad()
        sums: dict[str, float] = {}
        error: Exception | None = None
        try:
            for part in micro_batches:
                batch = rollout.select(part)
                with suggest_token_budget(self.policy, self.rules, batch.prompts, batch.responses):
                    terms, statistics = self.backward_micro_batch(batch, weights[part], is_first_pass, turn_sizes)
                if old_logp is not None and batch.old_logp is not None:
                    old_logp[part, : batch.old_logp.shape[1]] = batch.old_logp * batch.mask
                share = batch.mask.sum() / tokens
                values = {**terms, **{key: value * share for key, value in statistics.items()}}
                for key, value in zip(values, torch.stack([*values.values()]).tolist(), strict=True):  # one transfer
                    sums[key] = sums.get(key, 0.0) + value
            for _ in range(idle):
                self._idle_pass(rollout)
        except Exception as raised:
            error = raised
        sums = self._reduce_step(sums, error, old_logp)
        if old_logp is not None:
            rollout.old_logp = old_logp
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm))
        if not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise ValueError(f"the gradient is not finite (norm {norm.item()}); the weights are unchanged. Lower learning_rate")
        if not self.objective.should_stop(sums):
            self.optimizer.step()
            self.policy.num_steps += 1
            if self.on_step is not None:
                self.on_step()
        return {**sums, "grad_norm": norm.item()}

    def backward_micro_batch(
        self, batch: Rollout, weights: Tensor, is_first_pass: bool = False, turn_sizes: Sequence[int] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradient of the loss of B episodes, from one forward pass, to the parameters' gradients.

        Args:
            batch: B episodes with advantages.
            weights: (B, at least T), the tokens' weights in the loss of the whole optimizer step.
            is_first_pass: the log-probs of this pass are those of the old policy; sets `batch.old_logp`.
            turn_sizes: number of action tokens of the first turns in the whole step, to log their entropies apart.

        Returns:
            The loss, its terms before their coefficients and the first turns' entropies, sums over the tokens; and statistics,
            means over the action tokens.
        """
        evaluation = self.policy.evaluate_actions(batch.prompts, batch.responses, self.temperature, batch.turn_lists)
        if is_first_pass:
            batch.old_logp = evaluation.logp.detach()
        correction = {} if self.importance_cap is None else apply_importance_weights(batch, self.importance_cap)
        terms, statistics = self.objective.loss(batch, evaluation, weights[:, : evaluation.logp.shape[1]])
        loss = torch.stack([coefficient * value for coefficient, value in terms.values() if coefficient]).sum()
        loss.backward()
        entropy = evaluation.entropy.detach()
        statistics["entropy"] = masked_mean(entropy, batch.mask)
        sums = {"loss": loss, **{key: value for key, (_, value) in terms.items()}}
        for turn, size in enumerate(turn_sizes):
            if size:
                sums[f"entropy/turn_{turn + 1}"] = torch.where(batch.turn_ids == turn, entropy, 0.0).sum() / size
        return sums, statistics | correction

    def local_micro_batches(self, rollout: Rollout, rows: np.ndarray, max_rows: int | None = None) -> list[list[int]]:
        """Return the micro-batches of this process for the episodes `rows`; see `micro_batches`.

        Groups are kept together where there are enough of them for all processes.
        """
        unit = group_unit(len(rows), len(rollout), rollout.group_size)
        local = self.communicator.split_rows(len(rows), unit if len(rows) >= unit * self.communicator.size else 1)
        return self.micro_batches(rollout, rows[local], max_rows) if len(local) else []

    def micro_batches(self, rollout: Rollout, rows: np.ndarray, max_rows: int | None = None) -> list[list[int]]:
        """Split the episodes `rows` into forward passes, within `micro_batch_size` and `max_tokens_per_batch`.

        Args:
            rollout: has the episodes.
            rows: their numbers, in any order.
            max_rows: another bound on the rows of a pass.
        """
        lengths, prompts = rollout.lengths[rows].tolist(), [rollout.prompts[row] for row in rows]
        most = min(self.micro_batch_size or len(rows), max_rows or len(rows))
        # First observations of different tasks are often equal: prompts alone would make one group of a whole rollout.
        groups = None if self.rules.text_env is None else [int(row) // rollout.group_size for row in rows]
        parts = micro_batches(
            self.policy.lm, prompts, lengths, most, self.max_tokens_per_batch, self.policy.prefix_sharing, groups
        )
        return [[int(rows[i]) for i in part] for part in parts]

    def _token_weights(self, rollout: Rollout, rows: np.ndarray) -> Tensor:
        """Compute the tokens' weights in the loss of one step; (B, T) for all episodes, 0 for those outside of the step."""
        index = torch.as_tensor(rows, device=rollout.mask.device)
        mask = rollout.mask[index]
        if self.mask_truncated:
            mask = mask * ~rollout.truncated[index][:, None]
        weights = torch.zeros_like(rollout.mask)
        weights[index] = token_weights(mask, self.aggregation, self.rules.max_actions)
        return weights

    def _num_idle_passes(self, num_passes: int) -> int:
        """Return how many passes other processes make after this one's last: sharded weights are gathered in every pass."""
        if not self.communicator.sharded:
            return 0
        return max(self.communicator.all_gather_object(num_passes, "passes")) - num_passes

    def _idle_pass(self, rollout: Rollout) -> None:
        """Make a pass over an episode that has no weight."""
        batch = rollout.select([0])
        self.backward_micro_batch(replace(batch, old_logp=batch.sampled_logp), torch.zeros_like(batch.mask))

    def _reduce_step(self, sums: dict[str, float], error: Exception | None, old_logp: Tensor | None) -> dict[str, float]:
        """Sum the gradients, old log-probs and statistics of all processes; an error in one is raised in all.

        Sharded weights have their gradients summed already, in every pass.
        """
        communicator = self.communicator
        if error is not None and communicator.sharded:
            raise error
        found = communicator.gather_or_raise(sums, error)
        if not communicator.sharded:
            communicator.all_reduce_gradients(self.policy.parameters())
        if old_logp is not None:
            communicator.all_reduce([old_logp])
        totals: dict[str, float] = {}
        for entry in found:
            for key, value in entry.items():
                totals[key] = totals.get(key, 0.0) + value
        return totals


def apply_importance_weights(batch: Rollout, cap: float) -> dict[str, Tensor]:
    """Multiply advantages by their tokens' truncated importance weights; every surrogate is linear in them.

    Returns:
        Means over the action tokens: of the weights, and of whether the cap was reached.
    """
    assert batch.old_logp is not None and batch.advantages is not None
    importance = truncated_importance(batch.old_logp, batch.sampled_logp, cap)
    batch.advantages = batch.advantages * importance
    return {
        "importance": masked_mean(importance, batch.mask),
        "importance_capped": masked_mean((importance >= cap).float(), batch.mask),
    }


def _turn_sizes(rollout: Rollout, rows: np.ndarray) -> list[int]:
    """Return the number of action tokens of the first turns in the episodes `rows`; empty if no episode has several turns."""
    turn_ids = rollout.turn_ids[torch.as_tensor(rows, device=rollout.turn_ids.device)]
    return [int((turn_ids == turn).sum()) for turn in logged_turns(rollout)]


def _means(steps: list[dict[str, float]]) -> dict[str, float]:
    columns: dict[str, list[float]] = {}
    for statistics in steps:
        for key, value in statistics.items():
            columns.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in columns.items()}
