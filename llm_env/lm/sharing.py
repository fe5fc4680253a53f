"""Whether a forward pass can compute a prompt once for several rows, and whether it should, from the lengths at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from llm_env.lm.capabilities import agree, describable, plain_outputs, tells, trial, trial_rows, width_of
from llm_env.lm.shared_prompt import Rows, group_states, window_of

SAVES = 0.95  # prompts are shared where that leaves at most this share of the work

WAYS = ("flex", "split", "dense")  # in the order in which they are preferred
FLEX_DEVICES = ("cuda",)

PrefixSharing = bool | Literal["auto"]


def groups_of(prompts: Rows, fed: Rows) -> tuple[Rows, Sequence[Rows]]:
    """Return rows of one prompt that follow each other as N prompts and N lists of rows."""
    heads: list[Sequence[int]] = []
    members: list[list[Sequence[int]]] = []
    for prompt, row in zip(prompts, fed, strict=True):
        if not heads or list(heads[-1]) != list(prompt):
            heads.append(prompt)
            members.append([])
        members[-1].append(row)
    return heads, members


class BatchShape(NamedTuple):
    """The size of a batch that may share prompts.

    Attributes:
        rows: B.
        prompts: N, prompts that follow each other and are the same counted once.
        group: the most rows of one of these.
        longest_prompt: in tokens.
        longest: row after a prompt, in tokens.
    """

    rows: int = 0
    prompts: int = 0
    group: int = 0
    longest_prompt: int = 0
    longest: int = 0

    @classmethod
    def of(cls, prompts: Rows, groups: Sequence[Rows]) -> BatchShape:
        """Return the shape of N prompts and the rows that continue each."""
        sizes = [len(rows) for rows in groups]
        return cls(sum(sizes), len(sizes), max(sizes), max(map(len, prompts)), max(len(row) for rows in groups for row in rows))

    def positions(self, shared: bool) -> int:
        """Tokens that are computed, padding included."""
        if shared:
            return self.prompts * (self.longest_prompt + self.group * self.longest)
        return self.rows * (self.longest_prompt + self.longest)

    def flops(self, way: str | None, width: int) -> float:
        """Multiplications in a layer whose hidden states are `width` wide, in its square.

        A position takes 12, of which 4 are for projections and 8 for a feed-forward network of four times the width, and a
        pair of positions whose score is computed 2 in `width`.
        """
        length = self.longest_prompt + self.longest
        if way is None:
            pairs = self.rows * length**2
        elif way == "dense":
            pairs = self.prompts * (self.longest_prompt + self.group * self.longest) ** 2
        else:
            pairs = self.prompts * (self.longest_prompt**2 + self.group * self.longest * length)
        return 12 * self.positions(way is not None) + 2 * pairs / width

    def best_mode(self, able: Sequence[str], width: int, always: bool = False) -> str | None:
        """Return which of the ways that a model is able to share prompts in takes least work; None where that is sharing none.

        With `always` the first of them, wherever a prompt has several rows.
        """
        if self.group < 2 or not able:
            return None
        if always:
            return able[0]
        best = min([None, *able], key=lambda way: self.flops(way, width))
        return best if self.flops(best, width) < SAVES * self.flops(None, width) else None

    def merge(self, other: BatchShape) -> BatchShape:
        """Of both batches in one, which have no prompt in common."""
        return BatchShape(self.rows + other.rows, self.prompts + other.prompts, *map(max, self[2:], other[2:]))


def sharing_modes(base: PreTrainedModel, length: int, prefix_sharing: PrefixSharing = "auto") -> tuple[str, ...]:
    """How a forward pass can share prompts, of "flex", "split" and "dense", for rows of up to `length` tokens.

    Args:
        base: a model without its head.
        length: tokens of a prompt and its response.
        prefix_sharing: "auto" shares where the model can and it takes less work, True wherever a prompt has several rows, False
            never.

    Raises:
        ValueError: If `prefix_sharing=True` and the model cannot.
    """
    if prefix_sharing is False:
        return ()
    able = tuple(way for way in WAYS if supports_sharing(base, length, way))
    if prefix_sharing is True and not able:
        raise ValueError(
            f"prefix_sharing=True, but {type(base).__name__} cannot compute a prompt once for several responses; set "
            "prefix_sharing='auto'"
        )
    return able


def sharing_mode(base: PreTrainedModel, extent: BatchShape, prefix_sharing: PrefixSharing = "auto") -> str | None:
    """How a forward pass over a batch shares prompts; None where each row has its own. See `sharing_modes`."""
    if extent.group < 2:
        return None
    able = sharing_modes(base, extent.longest_prompt + extent.longest, prefix_sharing)
    return extent.best_mode(able, width_of(base) if able else 1, prefix_sharing is True)


_ways: WeakKeyDictionary[PreTrainedModel, set[str]] = WeakKeyDictionary()


def supports_sharing(base: PreTrainedModel, length: int, way: str = "split") -> bool:
    """Return whether `group_states` gives what plain rows give, for rows of up to `length` tokens.

    It is found out by a trial on a few tokens, once a model, but for windows, which the config tells. Dropped out are state
    spaces, attention with biases by distance and the like.
    """
    window = window_of(base)
    if way != "dense" and window is not None and length > window:
        return False
    trained = (module for module in base.modules() if module.training)
    if way != "dense" and any(getattr(module, "gradient_checkpointing", False) for module in trained):
        return False  # transformers would compute attention again when the layout is gone
    if base not in _ways:
        ways = WAYS if base.device.type in FLEX_DEVICES else WAYS[1:]
        with trial(base):
            if describable(base) and not tells(plain_outputs(base, trial_rows(base)[:1])[0]):
                return False  # no verdict, for the time being
            _ways[base] = {name for name in ways if describable(base) and _passes_trial(base, name)}
    return way in _ways[base]


def _passes_trial(base: PreTrainedModel, way: str) -> bool:
    prompts, groups = [[1, 2, 0], [2]], [[[0, 1], [2]], [[1, 2], [0]]]
    rows = [(prompt, row) for prompt, group in zip(prompts, groups, strict=True) for row in group]
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]  # not all, with an adapter
    with_gradient = way == "flex" and bool(trained)  # its backward pass is compiled on its own
    try:
        with torch.set_grad_enabled(with_gradient):
            states = group_states(base, prompts, groups, way)
            if with_gradient and not torch.autograd.grad(states.sum(), trained[0])[0].isfinite().all():
                return False
        alone = [plain_outputs(base, [prompt + row])[0] for prompt, row in rows]
        ends = [len(row) + 1 for _, row in rows]
        return agree(
            [outputs[:n] for outputs, n in zip(states, ends, strict=True)],
            [outputs[-n:] for outputs, n in zip(alone, ends, strict=True)],
        )
    except Exception:  # plain rows are taken, where an error that is the model's own comes again
        return False
