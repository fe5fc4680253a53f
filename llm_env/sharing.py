"""Whether a forward pass should compute a prompt once for several rows, from the lengths at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedModel

from llm_env.shared_prompt import Rows, shares_prompts

SAVES = 0.95  # prompts are shared where that leaves at most this share of the work

PrefixSharing = bool | Literal["auto"]


def groups_of(prompts: Rows, fed: Rows) -> tuple[list[Sequence[int]], list[Rows]]:
    """Rows of one prompt that follow each other as N prompts and N lists of rows."""
    heads: list[Sequence[int]] = []
    members: list[list[Sequence[int]]] = []
    for prompt, row in zip(prompts, fed, strict=True):
        if not heads or list(heads[-1]) != list(prompt):
            heads.append(prompt)
            members.append([])
        members[-1].append(row)
    return heads, list(members)


class Extent(NamedTuple):
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
    def of(cls, prompts: Rows, groups: Sequence[Rows]) -> Extent:
        """From N prompts and the rows that go on from each."""
        sizes = [len(rows) for rows in groups]
        return cls(sum(sizes), len(sizes), max(sizes), max(map(len, prompts)), max(len(row) for rows in groups for row in rows))

    def positions(self, shared: bool) -> int:
        """Tokens that are computed, padding included."""
        if shared:
            return self.prompts * (self.longest_prompt + self.group * self.longest)
        return self.rows * (self.longest_prompt + self.longest)

    def work(self, way: str | None, width: int) -> float:
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


def way_to_share(base: PreTrainedModel, extent: Extent, prefix_sharing: PrefixSharing = "auto") -> str | None:
    """How a forward pass over a batch shares prompts, "flex", "split" or "dense"; None where each row has its own prompt.

    Args:
        base: a model without its head.
        extent: the size of the batch.
        prefix_sharing: "auto" shares where the model can and it takes less work, True wherever a prompt has several rows, False
            never.

    Raises:
        ValueError: `prefix_sharing=True` and the model cannot.
    """
    if prefix_sharing is False or extent.group < 2:
        return None
    length = extent.longest_prompt + extent.longest
    able = [way for way in ("flex", "split", "dense") if shares_prompts(base, length, way)]
    if prefix_sharing is True:
        if not able:
            raise ValueError(
                f"prefix_sharing=True, but {type(base).__name__} cannot compute a prompt once for several responses; set "
                "prefix_sharing='auto'"
            )
        return able[0]
    width = base.config.get_text_config().hidden_size
    best = min([None, *able], key=lambda way: extent.work(way, width))
    return best if extent.work(best, width) < SAVES * extent.work(None, width) else None
