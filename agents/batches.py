"""Which episodes make an optimizer step, and which of those a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from llm_env.scoring import head_of
from llm_env.sharing import Extent, ways_to_share

if TYPE_CHECKING:
    from agents.base import LanguageAgent
    from agents.policy import LanguagePolicy
    from agents.rollout import Rollout

DEFAULT_TOKENS_CPU = 3072  # positions in a forward pass: of 1280 to 10240, 2560 took the least time (7M Llama, 1 thread)


def token_budget(agent: LanguageAgent) -> int | None:
    """The most positions in a forward pass of the update; None for no limit."""
    if agent.max_tokens_per_batch is None and agent.device.type == "cpu":
        return DEFAULT_TOKENS_CPU
    return agent.max_tokens_per_batch


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


def positions_of(policy: LanguagePolicy, length: int) -> Callable[[Extent], int]:
    """How many positions a forward pass over rows of up to `length` tokens has, padding included, prompts as it shares them."""
    base = policy.lm.base_model
    able: tuple[str, ...] = ()
    if head_of(policy.lm) is not None:
        able = ways_to_share(base, length, policy.prefix_sharing)
    width, always = base.config.get_text_config().hidden_size, policy.prefix_sharing is True
    return lambda extent: extent.positions(extent.way(able, width, always) is not None)


def micro_batches(agent: LanguageAgent, rollout: Rollout, rows: np.ndarray, most: int | None = None) -> list[list[int]]:
    """The episodes `rows` as forward passes, in each of which the rows of a prompt stand together.

    All go into one pass where that keeps to the bounds, `micro_batch_size` and `token_budget`. Else passes are filled from the
    longest responses to the shortest, once with the answers to a prompt kept together where they fit, and once row by row,
    where prompts are computed again but short answers are not padded to the longest of their group; that which has fewer
    positions in all is taken. Which passes there are decides about time and memory and nothing else.

    Args:
        agent: has the bounds, and the model, which says whether prompts can be computed once.
        rollout: has the episodes.
        rows: their numbers, in any order.
        most: another bound on the rows of a pass.

    Returns:
        The numbers of each pass. One that holds more positions than the budget holds a single row.
    """
    lengths, runs = rollout.lengths.tolist(), dict[tuple[int, ...], list[int]]()
    positions = positions_of(agent.policy, max(len(rollout.prompts[row]) + lengths[row] for row in rows.tolist()))
    most, budget = min(agent.micro_batch_size or len(rows), most or len(rows)), token_budget(agent)
    for row in rows.tolist():
        runs.setdefault(tuple(rollout.prompts[row]), []).append(row)

    def fits(extent: Extent) -> bool:
        return extent.rows <= most and (budget is None or positions(extent) <= budget)

    def extent_of(unit: list[int]) -> Extent:
        return Extent(len(unit), 1, len(unit), len(rollout.prompts[unit[0]]), max(lengths[row] for row in unit))

    together = list(runs.values())
    single = [[row] for run in together for row in run]
    plans = []
    for units in [together, single]:
        if fits(reduce(Extent.beside, map(extent_of, units))):
            return [[row for unit in units for row in unit]]
        longest_first = [sorted(unit, key=lambda row: -lengths[row]) for unit in units]
        longest_first.sort(key=extent_of, reverse=True)
        plans.append(_fill(longest_first, extent_of, fits, positions))
    parts, _ = min(plans, key=lambda plan: plan[1])
    place = {prompt: i for i, prompt in enumerate(runs)}
    return [sorted(part, key=lambda row: place[tuple(rollout.prompts[row])]) for part in parts]


def _fill(
    units: list[list[int]],
    extent_of: Callable[[list[int]], Extent],
    fits: Callable[[Extent], bool],
    positions: Callable[[Extent], int],
) -> tuple[list[list[int]], int]:
    """Units of rows, each from its longest to its shortest, as passes; and the positions of all passes.

    A unit that fits into no pass is cut; another begins a new pass where it does not fit into the one at hand.
    """
    parts: list[list[int]] = [[]]
    extents = [Extent()]
    for unit in units:
        left, extent = unit, extent_of(unit)
        room = fits(extents[-1].beside(extent)) or not fits(extent)
        while left:
            pieces = (extent._replace(rows=n, group=n) for n in range(len(left), 0, -1))
            fitting = (piece for piece in pieces if fits(extents[-1].beside(piece)))
            piece = next(fitting, None) if room else None
            if piece is None and not parts[-1]:
                piece = extent._replace(rows=1, group=1)
            if piece is None:
                parts.append([])
                extents.append(Extent())
                room = True
                continue
            parts[-1] += left[: piece.rows]
            extents[-1] = extents[-1].beside(piece)
            left = left[piece.rows :]
            extent = extent_of(left) if left else extent
    return parts, sum(map(positions, extents))
