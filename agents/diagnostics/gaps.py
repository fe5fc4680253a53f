"""The largest difference between two ways to the same numbers, and what makes such differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from agents.base import LanguageAgent
    from agents.policy import LanguagePolicy


LOGP_TOLERANCE = 1e-3  # nats


@dataclass
class Gap:
    """Where two lists of rows differ most.

    Attributes:
        row, token: the place.
        signed: the first less the second there; infinite where either is no number.
    """

    row: int = 0
    token: int = 0
    signed: float = 0.0

    @property
    def size(self) -> float:
        """The distance there."""
        return abs(self.signed)


def gap_of(a: Sequence[Tensor], b: Sequence[Tensor]) -> Gap:
    """The largest gap between rows (n_i,) on the CPU; where one is longer, what both have is compared."""
    largest = Gap()
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        n = min(len(x), len(y))
        difference = torch.nan_to_num(x[:n] - y[:n], nan=torch.inf)
        if n and difference.abs().max() > largest.size:
            token = int(difference.abs().argmax())
            largest = Gap(row, token, difference[token].item())
    return largest


def likely_cause(
    agent: LanguageAgent, wrong: Sequence[Tensor], right: Sequence[Tensor], cold: Sequence[Tensor], padded: list[bool]
) -> str:
    """What the differences between the log-probs of one of the fast ways and those of a plain forward look like.

    Args:
        agent: whose they are.
        wrong: B tensors (n_i,), by the fast way, in nats.
        right: B tensors (n_i,), by plain forwards.
        cold: the same at temperature 1.
        padded: B bools, whether the prompt of a row was padded on the left.
    """
    large = gap_of(wrong, right).size / 10
    if agent.temperature != 1 and gap_of(wrong, cold).size < large:
        return (
            f"They are the log-probs at temperature 1, not at the agent's {agent.temperature:g}: divide the logits by the "
            "temperature in sampling and in training alike"
        )
    later = [(x[1:], y[:-1]) for x, y in zip(wrong, right, strict=True) if len(x) > 1]
    if later and gap_of(*zip(*later, strict=True)).size < large:
        return (
            "They are those of the token before, an off-by-one: the last token of the prompt is in the loss and the last of "
            "the response is not. Logits at position t are of token t + 1"
        )
    kept = [i for i, pad in enumerate(padded) if not pad]
    if kept and len(kept) < len(padded) and gap_of([wrong[i] for i in kept], [right[i] for i in kept]).size < large:
        return (
            "Only rows whose prompt was padded on the left are wrong: the padding is attended to (give the attention_mask), or "
            "shifts the positions (give position_ids = attention_mask.cumsum(-1) - 1, which GPT-2 does not make by itself)"
        )
    if gap_of([row[:1] for row in wrong], [row[:1] for row in right]).size < large:
        return (
            "Only tokens after the first are wrong: a cache of keys and values is of other weights or tokens, or positions "
            "and attention mask do not go on where the prompt ends"
        )
    return (
        "Look at positions and attention mask, at what is done to the logits (temperature, forbidden tokens), at half "
        "precision or TF32, and at the attention implementation"
    )


def active_dropout(policy: LanguagePolicy) -> list[str]:
    """The names of the modules that drop something out as things are."""
    return [name for name, module in policy.named_modules() if module.training and getattr(module, "p", 0)]
