"""Prefix sharing: decide whether a forward pass computes a prompt once for several rows, and in which mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple
from weakref import WeakKeyDictionary

from llm_env.lm.capabilities import agree, describable, original_of, plain_outputs, tells, trial, trial_rows, width_of
from llm_env.lm.shared_prompt import Rows, group_states, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVES = 0.95  # share prompts if the estimated work drops below this fraction

WAYS = ("split", "dense")  # in order of preference; "flex" is left to `group_states`, as it is compiled for a minute

PrefixSharing = bool | Literal["auto"]


def groups_of(prompts: Rows, fed: Rows) -> tuple[Rows, Sequence[Rows]]:
    """Group consecutive rows with equal prompts: return N prompts and N lists of rows."""
    heads: list[Sequence[int]] = []
    members: list[list[Sequence[int]]] = []
    for prompt, row in zip(prompts, fed, strict=True):
        if not heads or list(heads[-1]) != list(prompt):
            heads.append(prompt)
            members.append([])
        members[-1].append(row)
    return heads, members


class BatchShape(NamedTuple):
    """Shape of a batch whose rows may share prompts.

    Attributes:
        rows: number of rows, B.
        prompts: number of prompts, N; consecutive equal prompts count once.
        group: number of rows of the prompt that has most.
        longest_prompt: length of the longest prompt, in tokens.
        longest: length of the longest row after its prompt, in tokens.
    """

    rows: int = 0
    prompts: int = 0
    group: int = 0
    longest_prompt: int = 0
    longest: int = 0

    @classmethod
    def of(cls, prompts: Rows, groups: Sequence[Rows]) -> BatchShape:
        """Return the batch shape of N prompts and the rows that continue each of them."""
        sizes = [len(rows) for rows in groups]
        return cls(sum(sizes), len(sizes), max(sizes), max(map(len, prompts)), max(len(row) for rows in groups for row in rows))

    def positions(self, shared: bool) -> int:
        """Count the tokens that the forward pass computes, including padding."""
        if shared:
            return self.prompts * (self.longest_prompt + self.group * self.longest)
        return self.rows * (self.longest_prompt + self.longest)

    def flops(self, mode: str | None, width: int) -> float:
        """Estimate the multiplications of one transformer layer, in units of `width` squared.

        A position costs 12 units: 4 for the attention projections and 8 for a feed-forward network of four times the width. A
        pair of positions whose attention score is computed costs 2 / `width` units.

        Args:
            mode: "split" or "dense"; None computes the prompt again for every row.
            width: size of the hidden states.
        """
        length = self.longest_prompt + self.longest
        if mode is None:
            pairs = self.rows * length**2
        elif mode == "dense":
            pairs = self.prompts * (self.longest_prompt + self.group * self.longest) ** 2
        else:
            pairs = self.prompts * (self.longest_prompt**2 + self.group * self.longest * length)
        return 12 * self.positions(mode is not None) + 2 * pairs / width

    def best_mode(self, able: Sequence[str], width: int, always: bool = False) -> str | None:
        """Return the mode with the least work; None if sharing prompts does not save enough.

        Args:
            able: the sharing modes that the model supports, in order of preference.
            width: size of the hidden states.
            always: return the first supported mode whenever a prompt has several rows, whatever the work.
        """
        if self.group < 2 or not able:
            return None
        if always:
            return able[0]
        best = min([None, *able], key=lambda mode: self.flops(mode, width))
        return best if self.flops(best, width) < SAVES * self.flops(None, width) else None

    def merge(self, other: BatchShape) -> BatchShape:
        """Return the shape of both batches in one; they must have no prompt in common."""
        return BatchShape(self.rows + other.rows, self.prompts + other.prompts, *map(max, self[2:], other[2:]))


def sharing_modes(base: PreTrainedModel, length: int, prefix_sharing: PrefixSharing = "auto") -> tuple[str, ...]:
    """Return the sharing modes that a model supports: a subset of "split" and "dense".

    Args:
        base: a model without its head.
        length: maximum length of a prompt and its response, in tokens.
        prefix_sharing: when to share prompts. "auto": if the model supports it and it saves work. True: whenever a prompt has
            several rows. False: never.

    Raises:
        ValueError: If `prefix_sharing=True` and the model supports no mode.
    """
    if prefix_sharing is False:
        return ()
    able = tuple(mode for mode in WAYS if supports_sharing(base, length, mode))
    if prefix_sharing is True and not able:
        raise ValueError(
            f"prefix_sharing=True, but {type(base).__name__} cannot compute a prompt once for several responses; set "
            "prefix_sharing='auto'"
        )
    return able


def sharing_mode(base: PreTrainedModel, shape: BatchShape, prefix_sharing: PrefixSharing = "auto") -> str | None:
    """Return the sharing mode for a batch; None to compute the prompt for every row. See `sharing_modes`."""
    if shape.group < 2:
        return None
    able = sharing_modes(base, shape.longest_prompt + shape.longest, prefix_sharing)
    return shape.best_mode(able, width_of(base) if able else 1, prefix_sharing is True)


_ways: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()


def supports_sharing(base: PreTrainedModel, length: int, mode: str = "split") -> bool:
    """Return whether `group_states` gives the same hidden states as plain rows of up to `length` tokens.

    A trial forward pass on a few tokens decides, once per model. The sliding window is read from the config instead. Models
    with state spaces or distance-dependent attention biases, for example, fail the trial.
    """
    window = window_of(base)
    if mode != "dense" and window is not None and length > window:
        return False
    trained = (module for module in base.modules() if module.training)
    if mode != "dense" and any(getattr(module, "gradient_checkpointing", False) for module in trained):
        return False  # the backward pass would recompute attention outside `attention_by`
    base = original_of(base)
    if base not in _ways:
        with trial(base):
            if describable(base) and not tells(plain_outputs(base, trial_rows(base)[:1])[0]):
                return False  # inconclusive: repeat the trial next time
            _ways[base] = {name for name in WAYS if describable(base) and _passes_trial(base, name)}
    return mode in _ways[base]


def _passes_trial(base: PreTrainedModel, mode: str) -> bool:
    prompts, groups = [[1, 2, 0], [2]], [[[0, 1], [2]], [[1, 2], [0]]]
    rows = [(prompt, row) for prompt, group in zip(prompts, groups, strict=True) for row in group]
    try:
        states = group_states(base, prompts, groups, mode)
        alone = [plain_outputs(base, [prompt + row])[0] for prompt, row in rows]
        ends = [len(row) + 1 for _, row in rows]
        return agree(
            [outputs[:n] for outputs, n in zip(states, ends, strict=True)],
            [outputs[-n:] for outputs, n in zip(alone, ends, strict=True)],
        )
    except Exception:  # use plain rows; an error of the model itself is raised there again
        return False
