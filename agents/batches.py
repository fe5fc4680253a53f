"""Which episodes make an optimizer step, and which of those a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llm_env.lm.micro_batches import passes

if TYPE_CHECKING:
    from agents.base import LanguageAgent
    from agents.rollout import Rollout


def kept_together(size: int, total: int, group_size: int) -> int:
    """How many rows that follow each other stay together where `total` are cut into steps of `size`: a group, or one."""
    return group_size if size % group_size == 0 == total % group_size else 1


def minibatches(agent: LanguageAgent, rollout: Rollout, size: int) -> list[np.ndarray]:
    """The episodes of each optimizer step of one pass over a rollout, `size` of them and in the last one the rest.

    Whole groups are drawn where `size` is a multiple of the group size, so that a step can compute a prompt once for all
    answers to it; else single episodes. A rollout that is one step is not permuted.
    """
    if size == len(rollout):
        return [np.arange(len(rollout))]
    unit = kept_together(size, len(rollout), rollout.group_size)
    order = agent.np_random.permutation(len(rollout) // unit)
    rows = (order[:, None] * unit + np.arange(unit)).ravel()
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]


def micro_batches(agent: LanguageAgent, rollout: Rollout, rows: np.ndarray, most: int | None = None) -> list[list[int]]:
    """The episodes `rows` as forward passes, within `micro_batch_size` and `max_tokens_per_batch`; see `llm_env.lm`.

    Args:
        agent: has the bounds, and the model, which says whether prompts can be computed once.
        rollout: has the episodes.
        rows: their numbers, in any order.
        most: another bound on the rows of a pass.
    """
    policy, lengths = agent.policy, rollout.lengths[rows].tolist()
    most = min(agent.micro_batch_size or len(rows), most or len(rows))
    prompts = [rollout.prompts[row] for row in rows]
    parts = passes(policy.lm, prompts, lengths, most, agent.max_tokens_per_batch, policy.prefix_sharing)
    return [[int(rows[i]) for i in part] for part in parts]
