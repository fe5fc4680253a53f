"""Which episodes make an optimizer step."""

from __future__ import annotations

import numpy as np


def group_unit(size: int, total: int, group_size: int) -> int:
    """Return how many consecutive rows stay together where `total` rows are cut into steps of `size`: a group, or one."""
    return group_size if size % group_size == 0 == total % group_size else 1


def minibatches(total: int, size: int, group_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the episodes of each optimizer step of one pass over a rollout.

    Whole groups are drawn where `size` is a multiple of the group size, so that a step computes a prompt once for all
    responses to it; else single episodes. A rollout that is one step is not permuted.

    Args:
        total: episodes in the rollout.
        size: episodes in a step; the last step has the remaining ones.
        group_size: G.
        rng: draws the permutation.

    Returns:
        The rows of each step, int64 arrays.
    """
    if size == total:
        return [np.arange(total)]
    unit = group_unit(size, total, group_size)
    order = rng.permutation(total // unit)
    rows = (order[:, None] * unit + np.arange(unit)).ravel()
    return [rows[begin : begin + size] for begin in range(0, len(rows), size)]
