"""Find the largest difference between two computations of the same numbers, and name its likely cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.policy import LanguagePolicy

LOGP_TOLERANCE = 1e-3  # nats
LOGP_TOLERANCE_BF16 = 0.3  # nats; rounding alone makes 0.05 in a model of 0.5B parameters (examples/benchmarks/gpu.md)


def logp_tolerance(policy: LanguagePolicy) -> float:
    """Return how far two computations of a log-prob may be apart, in nats."""
    return LOGP_TOLERANCE_BF16 if policy.bf16 else LOGP_TOLERANCE


@dataclass
class Gap:
    """The place where two lists of rows differ most.

    Attributes:
        row, token: the place.
        difference: the first minus the second there; infinite where either is NaN.
    """

    row: int = 0
    token: int = 0
    difference: float = 0.0

    @property
    def size(self) -> float:
        """The absolute difference."""
        return abs(self.difference)


def largest_gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> Gap:
    """Find the largest gap between two lists of rows (n_i,) on the CPU; of rows of unequal length the common part counts."""
    largest = Gap()
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        n = min(len(x), len(y))
        difference = torch.nan_to_num(x[:n] - y[:n], nan=torch.inf)
        if n and difference.abs().max() > largest.size:
            token = int(difference.abs().argmax())
            largest = Gap(row, token, difference[token].item())
    return largest


def likely_cause(
    temperature: float, wrong: Sequence[Tensor], right: Sequence[Tensor], untempered: Sequence[Tensor], padded: list[bool]
) -> str:
    """Name the likely cause of a gap between log-probs of the fast code and of naive forward passes.

    Args:
        temperature: the agent's.
        wrong: B tensors (n_i,), log-probs by the fast code, in nats.
        right: B tensors (n_i,), log-probs by naive forward passes.
        untempered: `right` at temperature 1.
        padded: B bools, whether the prompt of a row was padded on the left.
    """
    large = largest_gap(wrong, right).size / 10
    if temperature != 1 and largest_gap(wrong, untempered).size < large:
        return (
            f"They are the log-probs at temperature 1, not at the agent's {temperature:g}: divide the logits by the "
            "temperature in sampling and in training alike"
        )
    later = [(x[1:], y[:-1]) for x, y in zip(wrong, right, strict=True) if len(x) > 1]
    if later and largest_gap(*zip(*later, strict=True)).size < large:
        return (
            "They are those of the token before, an off-by-one: the last token of the prompt is in the loss and the last of "
            "the response is not. Logits at position t are of token t + 1"
        )
    unpadded = [i for i, pad in enumerate(padded) if not pad]
    if unpadded and len(unpadded) < len(padded):
        if largest_gap([wrong[i] for i in unpadded], [right[i] for i in unpadded]).size < large:
            return (
                "Only rows whose prompt was padded on the left are wrong: the padding is attended to (give the "
                "attention_mask), or shifts the positions (give position_ids = attention_mask.cumsum(-1) - 1, which GPT-2 "
                "does not make by itself)"
            )
    if largest_gap([row[:1] for row in wrong], [row[:1] for row in right]).size < large:
        return (
            "Only tokens after the first are wrong: a cache of keys and values is of other weights or tokens, or positions "
            "and attention mask do not continue where the prompt ends"
        )
    return (
        "Check positions and attention mask, what is done to the logits (temperature, forbidden tokens), half precision or "
        "TF32, and the attention implementation"
    )


def active_dropout(policy: LanguagePolicy) -> list[str]:
    """Return the names of the modules whose dropout is on now."""
    return [name for name, module in policy.named_modules() if module.training and getattr(module, "p", 0)]
