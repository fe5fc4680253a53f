"""Which rows of a batch share a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

from transformers import PreTrainedModel

from llm_env.lm.capabilities import width_of
from llm_env.lm.scoring import head_of
from llm_env.lm.shared_prompt import Rows
from llm_env.lm.sharing import BatchShape, PrefixSharing, sharing_modes

DEFAULT_TOKENS_CPU = 2048  # positions in a forward pass: more than about this are slower (a Llama of 7M, one thread)


def padded_tokens(model: PreTrainedModel, length: int, prefix_sharing: PrefixSharing) -> Callable[[BatchShape], int]:
    """How many positions a forward pass over rows of up to `length` tokens has, padding included, prompts as it shares them."""
    base = model.base_model
    able = sharing_modes(base, length, prefix_sharing) if head_of(model) is not None else ()
    width = width_of(base) if able else 1
    return lambda extent: extent.positions(extent.best_mode(able, width, prefix_sharing is True) is not None)


def micro_batches(
    model: PreTrainedModel,
    prompts: Rows,
    lengths: Sequence[int],
    most: int,
    max_tokens_per_batch: int | None,
    prefix_sharing: PrefixSharing,
) -> list[list[int]]:
    """Return rows as forward passes, in each of which the rows of a prompt stand together.

    All go into one pass where that keeps to the bounds. Else passes are filled from the longest rows to the shortest, once with
    the rows of a prompt kept together where they fit, and once row by row, where prompts are computed again but short rows are
    not padded to the longest of their group; the plan with fewer tokens is taken. The passes decide
    about time and memory and nothing else.

    Args:
        model: says whether prompts can be computed once.
        prompts: B lists of token ids.
        lengths: B lengths of the responses, in tokens.
        most: rows of a pass.
        max_tokens_per_batch: positions of a pass; None is `DEFAULT_TOKENS_CPU`, or as many as the longest group needs, on a
            CPU, and no limit elsewhere.
        prefix_sharing: see `llm_env.lm.sharing.sharing_modes`.

    Returns:
        The numbers of the rows in each pass. One that holds more positions than the budget holds a single row.
    """
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    positions = padded_tokens(model, longest, prefix_sharing)
    runs: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        runs.setdefault(tuple(prompt), []).append(row)

    def extent_of(unit: list[int]) -> BatchShape:
        return BatchShape(len(unit), 1, len(unit), len(prompts[unit[0]]), max(lengths[row] for row in unit))

    budget = max_tokens_per_batch
    if budget is None and model.device.type == "cpu":
        budget = max(DEFAULT_TOKENS_CPU, *(positions(extent_of(run)) for run in runs.values()))

    def fits(extent: BatchShape) -> bool:
        return extent.rows <= most and (budget is None or positions(extent) <= budget)

    together = list(runs.values())
    single = [[row] for run in together for row in run]
    plans = []
    for units in [together] if prefix_sharing is True else [together, single]:
        if fits(reduce(BatchShape.merge, map(extent_of, units))):
            return [[row for unit in units for row in unit]]
        longest_first = [sorted(unit, key=lambda row: -lengths[row]) for unit in units]
        longest_first.sort(key=extent_of, reverse=True)
        plans.append(_fill(longest_first, extent_of, fits, positions))
    parts, _ = min(plans, key=lambda plan: plan[1])
    place = {prompt: i for i, prompt in enumerate(runs)}
    return [sorted(part, key=lambda row: place[tuple(prompts[row])]) for part in parts]


def _fill(
    units: list[list[int]],
    extent_of: Callable[[list[int]], BatchShape],
    fits: Callable[[BatchShape], bool],
    positions: Callable[[BatchShape], int],
) -> tuple[list[list[int]], int]:
    """Units of rows, each from its longest to its shortest, as passes; and the positions of all passes.

    A unit that fits into no pass is cut; another begins a new pass where it does not fit into the one at hand.
    """
    parts: list[list[int]] = [[]]
    extents = [BatchShape()]
    for unit in units:
        left, extent = unit, extent_of(unit)
        room = fits(extents[-1].merge(extent)) or not fits(extent)
        while left:
            pieces = (extent._replace(rows=n, group=n) for n in range(len(left), 0, -1))
            fitting = (piece for piece in pieces if fits(extents[-1].merge(piece)))
            piece = next(fitting, None) if room else None
            if piece is None and not parts[-1]:
                piece = extent._replace(rows=1, group=1)
            if piece is None:
                parts.append([])
                extents.append(BatchShape())
                room = True
                continue
            parts[-1] += left[: piece.rows]
            extents[-1] = extents[-1].merge(piece)
            left = left[piece.rows :]
            extent = extent_of(left) if left else extent
    return parts, sum(map(positions, extents))
