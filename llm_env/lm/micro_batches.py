"""Split a batch into micro-batches by a token budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

from llm_env.lm.capabilities import width_of
from llm_env.lm.scoring import head_of
from llm_env.lm.shared_prompt import Rows
from llm_env.lm.sharing import BatchShape, PrefixSharing, sharing_modes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_TOKENS_CPU = 2048  # tokens per forward pass; larger passes are slower (measured: a Llama of 7M parameters, one thread)


def padded_tokens(model: PreTrainedModel, length: int, prefix_sharing: PrefixSharing) -> Callable[[BatchShape], int]:
    """Return a function that counts the tokens of a forward pass over a batch, including padding.

    Args:
        model: a causal language model.
        length: maximum length of a prompt and its response, in tokens.
        prefix_sharing: see `llm_env.lm.sharing.sharing_modes`. A shared prompt counts once.
    """
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
    groups: Sequence[int] | None = None,
) -> list[list[int]]:
    """Split rows into forward passes within a token budget; rows of a prompt are adjacent.

    If all rows fit into one pass, there is one pass. Otherwise passes are filled from the longest rows to the shortest, by two
    plans, and the plan with fewer tokens is used:

    - by prompt: the rows of a prompt stay together if they fit, so that the prompt can be shared;
    - by row: prompts may be computed several times, but short rows are not padded to the longest row of their group. Not tried
      if `prefix_sharing=True`.

    The split affects time and memory only, not the results.

    Args:
        model: a causal language model; determines whether prompts can be shared.
        prompts: B lists of token ids.
        lengths: B lengths of the responses, in tokens.
        most: maximum number of rows per pass.
        max_tokens_per_batch: token budget of a pass, including padding. None: on a CPU, `DEFAULT_TOKENS_CPU` or the size of
            the largest group, whichever is larger; no limit on other devices.
        prefix_sharing: see `llm_env.lm.sharing.sharing_modes`.
        groups: B numbers; rows of one number have one prompt and are kept together. By default rows with equal prompts are.

    Returns:
        The row indices of each pass. A pass exceeds the budget only if it has a single row.
    """
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    positions = padded_tokens(model, longest, prefix_sharing)
    keys: list[Any] = [tuple(prompt) for prompt in prompts] if groups is None else list(groups)
    runs: dict[Any, list[int]] = {}
    for row, key in enumerate(keys):
        runs.setdefault(key, []).append(row)

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
    place = {key: i for i, key in enumerate(runs)}
    return [sorted(part, key=lambda row: place[keys[row]]) for part in parts]


def _fill(
    units: list[list[int]],
    extent_of: Callable[[list[int]], BatchShape],
    fits: Callable[[BatchShape], bool],
    positions: Callable[[BatchShape], int],
) -> tuple[list[list[int]], int]:
    """Fill passes with units of rows, and return the passes and their total number of tokens.

    The rows of a unit are sorted from longest to shortest. A unit too large for any pass is split. A unit that does not fit
    into the current pass starts a new one.
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
