"""The update: from a rollout to optimizer steps, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from agents.batches import kept_together, micro_batches, minibatches
from agents.losses import token_weights, truncated_importance
from agents.out_of_memory import suggest_token_budget
from agents.records import record_training
from agents.rollout import Rollout
from agents.sharded import whole, whole_tensor

if TYPE_CHECKING:
    from agents.base import LanguageAgent


def update(agent: LanguageAgent, rollout: Rollout) -> None:
    """`n_epochs` passes of optimizer steps over a rollout, then the `train/` log entries.

    Log-probs of pi_old come from the training path: from the first forward pass of the first epoch where that is one step
    over the whole rollout (the ratio is then exactly 1), else from a pass of its own before the first step.
    """
    step = min(agent.batch_size or len(rollout), len(rollout))
    single = step == len(rollout)
    if agent.needs_values or ((agent.needs_old_logp or agent.importance is not None) and not single):
        score_before_update(agent, rollout, step)
    agent.compute_advantages(rollout)
    totals: dict[str, list[float]] = {}
    for epoch in range(agent.n_epochs):
        for rows in minibatches(agent, rollout, step):
            statistics = optimize(agent, rollout, rows, fresh=single and epoch == 0)
            for key, value in statistics.items():
                totals.setdefault(key, []).append(value)
            if agent.stops_early(statistics):
                return record_training(agent, rollout, totals)
    return record_training(agent, rollout, totals)


@torch.no_grad()
def score_before_update(agent: LanguageAgent, rollout: Rollout, step: int) -> None:
    """Fill in `old_logp` and, with a value head, `old_values` and `last_values`, at most `step` episodes a forward pass."""
    rollout.old_logp = torch.zeros_like(rollout.rewards)
    old_values, last_values = torch.zeros_like(rollout.rewards), torch.zeros_like(rollout.scores)
    with whole(agent.policy):
        for rows in own_passes(agent, rollout, np.arange(len(rollout)), step):
            part = rollout.take(rows)
            with suggest_token_budget(agent.policy, agent.rules, part.prompts, part.responses):
                result = agent.policy.evaluate(part.prompts, part.responses, agent.temperature)
            width = result.logp.shape[1]
            rollout.old_logp[rows, :width] = result.logp * part.mask
            if result.values is not None:
                old_values[rows, :width] = result.values[:, :-1] * part.mask
                last_values[rows] = result.values[np.arange(len(rows)), part.lengths]
    agent.world.add([rollout.old_logp, old_values, last_values])
    if agent.needs_values:
        rollout.old_values, rollout.last_values = old_values, last_values


def own_passes(agent: LanguageAgent, rollout: Rollout, rows: np.ndarray, most: int | None = None) -> list[list[int]]:
    """The forward passes over those of the episodes `rows` that are this process's; see `micro_batches`.

    Groups are kept together where there are enough of them for all processes.
    """
    unit = kept_together(len(rows), len(rollout), rollout.group_size)
    own = rows[agent.world.part(len(rows), unit if len(rows) >= unit * agent.world.size else 1)]
    return micro_batches(agent, rollout, own, most) if len(own) else []


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
    index, tokens = torch.as_tensor(rows, device=rollout.mask.device), float(rollout.lengths[rows].sum())
    mask = rollout.mask[index]
    if agent.mask_truncated:
        mask = mask * ~rollout.truncated[index][:, None]
    weights = torch.zeros_like(rollout.mask)  # of all episodes, so that each finds its own whichever pass it is in
    weights[index] = token_weights(mask, agent.aggregation, agent.rules.max_new_tokens)
    if fresh and rollout.old_logp is None:
        rollout.old_logp = torch.zeros_like(rollout.rewards)
    optimizer.zero_grad()
    parts = own_passes(agent, rollout, rows)

    def run() -> dict[str, float]:
        own: dict[str, float] = {}
        for part_rows in parts:
            part = rollout.take(part_rows)
            with suggest_token_budget(agent.policy, agent.rules, part.prompts, part.responses):
                terms, means = accumulate(agent, part, weights[part_rows], fresh)
            if fresh and rollout.old_logp is not None and part.old_logp is not None:
                rollout.old_logp[part_rows, : part.old_logp.shape[1]] = part.old_logp * part.mask
            share = part.mask.sum() / tokens
            for key, value in {**terms, **{key: value * share for key, value in means.items()}}.items():
                own[key] = own.get(key, 0.0) + value.item()
        return own

    sums = add_up(agent, rollout, run, len(parts), fresh)
    norm = whole_tensor(torch.nn.utils.clip_grad_norm_(agent.policy.parameters(), agent.max_grad_norm))
    if not torch.isfinite(norm):
        optimizer.zero_grad()
        raise ValueError(f"the gradient is not finite (norm {norm.item()}); the weights are unchanged. Lower learning_rate")
    if not agent.stops_early(sums):
        optimizer.step()
        agent._n_updates += 1
    return {**sums, "grad_norm": norm.item()}


def add_up(
    agent: LanguageAgent, rollout: Rollout, run: Callable[[], dict[str, float]], passes: int, fresh: bool
) -> dict[str, float]:
    """Bring together what all processes have for an optimizer step: gradients, old log-probs and statistics, which it gives.

    Sharded weights come together in each pass, so that all processes run as many: those that are left are of an episode that
    weighs nothing. Where they are not sharded, an error in one process is one in all.

    Args:
        agent: has the gradients.
        rollout: has the old log-probs; where they are `fresh`, each process has those of its own episodes, and 0 for others.
        run: makes this process's passes, and gives its statistics.
        passes: how many they are.
        fresh: see `optimize`.
    """
    world = agent.world
    if world.size == 1:
        return run()
    if world.sharded:
        idle = max(world.gather(passes, "passes")) - passes
        own = run()
        for _ in range(idle):
            nothing = rollout.take([0])
            accumulate(agent, replace(nothing, old_logp=nothing.sampled_logp), torch.zeros_like(nothing.mask), fresh=False)
        found = world.gather(own, "statistics")
    else:
        found = world.together(run)
        world.add_gradients(agent.policy.parameters())
    if fresh and rollout.old_logp is not None:
        world.add([rollout.old_logp])
    sums: dict[str, float] = {}
    for entry in found:
        for key, value in entry.items():
            sums[key] = sums.get(key, 0.0) + value
    return sums


def accumulate(
    agent: LanguageAgent, part: Rollout, weights: Tensor, fresh: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Add the gradient of the loss of some episodes, from one forward pass, to the gradients that there are.

    Args:
        agent: gives the loss.
        part: B episodes with advantages.
        weights: (B, at least T), the tokens' weights in the loss of the whole optimizer step.
        fresh: the log-probs of this pass are those of pi_old, and become the `old_logp` of `part`.

    Returns:
        The loss and its terms before their coefficients, sums over the tokens; and statistics, means over the action tokens.
    """
    result = agent.policy.evaluate(part.prompts, part.responses, agent.temperature)
    if fresh:
        part.old_logp = result.logp.detach()
    correction = {} if agent.importance is None else correct(part, agent.importance)
    terms, statistics = agent.loss(part, result, weights[:, : result.logp.shape[1]])
    total = torch.stack([coefficient * value for coefficient, value in terms.values() if coefficient]).sum()
    total.backward()
    statistics["entropy"] = result.entropy.detach()[part.mask.bool()].mean()
    return {"loss": total, **{key: value for key, (_, value) in terms.items()}}, statistics | correction


def correct(part: Rollout, cap: float) -> dict[str, Tensor]:
    """Multiply the advantages of some episodes by their tokens' truncated importance; every surrogate is linear in them.

    Returns:
        Means over the action tokens: of the weights, and of whether the cap was reached.
    """
    assert part.old_logp is not None and part.advantages is not None
    importance = truncated_importance(part.old_logp, part.sampled_logp, cap)
    part.advantages = part.advantages * importance
    weights = importance[part.mask.bool()]
    return {"importance": weights.mean(), "importance_capped": (weights >= cap).float().mean()}
