"""The update: from a rollout to optimizer steps, whatever the algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.losses import token_weights
from agents.records import record_training
from agents.rollout import Rollout

if TYPE_CHECKING:
    from agents.base import LanguageAgent


def update(agent: LanguageAgent, rollout: Rollout) -> None:
    """`n_epochs` passes of optimizer steps over a rollout, then the `train/` log entries.

    Log-probs of pi_old come from the training path: from the first forward pass of the first epoch where that is one step
    over the whole rollout (the ratio is then exactly 1), else from a pass of its own before the first step.
    """
    step = min(agent.batch_size or len(rollout), len(rollout))
    single = step == len(rollout)
    if agent.needs_values or (agent.needs_old_logp and not single):
        score_before_update(agent, rollout, step)
    agent.compute_advantages(rollout)
    totals: dict[str, list[float]] = {}
    for epoch in range(agent.n_epochs):
        order = np.arange(len(rollout)) if single else agent.np_random.permutation(len(rollout))
        for begin in range(0, len(order), step):
            statistics = optimize(agent, rollout, order[begin : begin + step], fresh=single and epoch == 0)
            for key, value in statistics.items():
                totals.setdefault(key, []).append(value)
            if agent.stops_early(statistics):
                return record_training(agent, rollout, totals)
    return record_training(agent, rollout, totals)


@torch.no_grad()
def score_before_update(agent: LanguageAgent, rollout: Rollout, step: int) -> None:
    """Fill in `old_logp` and, with a value head, `old_values` and `last_values`."""
    rollout.old_logp = torch.zeros_like(rollout.rewards)
    old_values, last_values = torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.scores)
    for rows in _micro_batches(agent, np.arange(len(rollout)), step):
        part = rollout.take(rows)
        result = agent.policy.evaluate(part.prompts, part.responses, agent.temperature)
        width = result.logp.shape[1]
        rollout.old_logp[rows, :width] = result.logp * part.mask
        if result.values is not None:
            old_values[rows, :width] = result.values[:, :-1] * part.mask
            last_values[rows] = result.values[np.arange(len(rows)), part.lengths]
    if agent.needs_values:
        rollout.old_values, rollout.last_values = old_values, last_values


def optimize(agent: LanguageAgent, rollout: Rollout, rows: np.ndarray, fresh: bool) -> dict[str, float]:
    """One optimizer step over the episodes `rows`, micro-batch by micro-batch; none if the agent stops early.

    Args:
        agent: gives the loss.
        rollout: with advantages.
        rows: the episodes of this step.
        fresh: no update lies between sampling and this step, so that its log-probs are those of pi_old.

    Returns:
        Statistics of the step: the loss, its terms before their coefficients, and means over the action tokens.

    Raises:
        ValueError: the gradient is not finite; the weights are left as they were.
    """
    optimizer = agent.policy.optimizer
    mask = rollout.mask[torch.as_tensor(rows)]
    if agent.mask_truncated:
        mask = mask * ~rollout.truncated[torch.as_tensor(rows)][:, None]
    weights = token_weights(mask, agent.aggregation, agent.rules.max_new_tokens)
    if fresh and rollout.old_logp is None:
        rollout.old_logp = torch.zeros_like(rollout.rewards)
    sums: dict[str, float] = {}
    optimizer.zero_grad()
    done = 0
    for part_rows in _micro_batches(agent, rows, len(rows)):
        part = rollout.take(part_rows)
        result = agent.policy.evaluate(part.prompts, part.responses, agent.temperature)
        width = result.logp.shape[1]
        if fresh and rollout.old_logp is not None:
            part.old_logp = result.logp.detach()
            rollout.old_logp[part_rows, :width] = part.old_logp * part.mask
        terms, statistics = agent.loss(part, result, weights[done : done + len(part_rows), :width])
        total = torch.stack([coefficient * value for coefficient, value in terms.values()]).sum()
        total.backward()
        done += len(part_rows)
        tokens = part.mask.sum() / float(rollout.lengths[rows].sum())
        for key, value in {"loss": total, **{key: value for key, (_, value) in terms.items()}}.items():
            sums[key] = sums.get(key, 0.0) + value.item()
        statistics["entropy"] = result.entropy.detach()[part.mask.bool()].mean()
        for key, value in statistics.items():
            sums[key] = sums.get(key, 0.0) + (value * tokens).item()
    norm = torch.nn.utils.clip_grad_norm_(agent.policy.parameters(), agent.max_grad_norm)
    if not torch.isfinite(norm):
        optimizer.zero_grad()
        raise ValueError(f"the gradient is not finite (norm {norm.item()}); the weights are unchanged. Lower learning_rate")
    if not agent.stops_early(sums):
        optimizer.step()
        agent._n_updates += 1
    return {**sums, "grad_norm": norm.item()}


def _micro_batches(agent: LanguageAgent, rows: np.ndarray, step: int) -> list[Any]:
    size = min(agent.micro_batch_size or step, step)
    return [rows[i : i + size].tolist() for i in range(0, len(rows), size)]
