"""How one token is drawn from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from llm_env.arguments import as_whole

LARGE, BLOCK = 1024, 64  # from how many tokens on the probabilities of blocks are summed first when one is drawn; and of which


@dataclass(frozen=True)
class Sampler:
    """How one token is drawn from logits.

    Attributes:
        temperature: divides the logits, here and in training.
        top_k, top_p, min_p: draw among the k likeliest tokens; among the likeliest of total probability p; among those that
            are at least `min_p` times as likely as the likeliest (arXiv 2407.01082). In this order, and off by default: the
            log-probs stay those of the whole distribution, so that training with these on is off-policy.
        deterministic: take the likeliest token.
        generator: source of the randomness.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    deterministic: bool = False
    generator: torch.Generator | None = None
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.temperature, (int, float, np.number)) or not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive; for greedy decoding set deterministic=True")
        if not isinstance(self.top_p, (int, float, np.number)) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1] (1 is off)")
        if (as_whole(self.top_k) or 0) != self.top_k or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 0 (0 is off)")
        if not isinstance(self.min_p, (int, float, np.number)) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1] (0 is off)")

    @property
    def restricted(self) -> bool:
        """Whether some tokens that are possible are never drawn."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def spawn(self, number: int) -> Sampler:
        """A sampler with random numbers of its own, set by the next of this one's and `number`."""
        if self.generator is None:
            return self
        drawn = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
        return replace(self, generator=torch.Generator(self.generator.device).manual_seed(int(drawn) + number))

    def numbers(self, rows: int, steps: int, vocab_size: int, device: torch.device) -> Tensor:
        """Random numbers, uniform in [0, 1), by which `steps` tokens in each of `rows` rows are drawn: (rows, steps, 1 or 2).

        Drawn at once, so that a row's tokens do not depend on which other rows are drawn beside it, when, and by which process.
        """
        if self.deterministic:
            return torch.empty(rows, steps, 0, device=device)
        return torch.rand(rows, steps, 1 + (vocab_size > LARGE), generator=self.generator, device=device)

    def __call__(self, logits: Tensor, numbers: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Draw from logits (B, V): tokens (B,) and their log-probs (B,) under the tempered distribution, in nats.

        One uniform random number a row, where `torch.multinomial` takes V, is looked up in the running sums of the
        probabilities. In a large vocabulary it is looked up in the sums of blocks of tokens, and a second one within the block.

        Args:
            logits: (B, V).
            numbers: (B, 1 or 2), the uniform random numbers; new ones by default.
        """
        scaled = logits.float() / self.temperature if self.temperature != 1 else logits.float()
        probabilities = scaled.softmax(-1)
        if self.deterministic:
            tokens = scaled.argmax(-1, keepdim=True)
        else:
            if numbers is None:
                numbers = self.numbers(len(scaled), 1, scaled.shape[-1], scaled.device)[:, 0]
            weights = self._restrict(scaled).softmax(-1) if self.restricted else probabilities
            uniform = numbers[:, :1]
            if weights.shape[-1] <= LARGE:
                tokens = _look_up(weights, uniform * weights.sum(-1, keepdim=True))
            else:
                # The second number is looked up within the block: tokens rarer than the steps of a float32 are sampled, too.
                blocks = nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
                sums = blocks.sum(-1)
                block = _look_up(sums, uniform * sums.sum(-1, keepdim=True))
                weights = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
                tokens = block * BLOCK + _look_up(weights, numbers[:, 1:] * weights.sum(-1, keepdim=True))
        return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()

    def _restrict(self, scaled: Tensor) -> Tensor:
        if 0 < self.top_k < scaled.shape[-1]:
            kth = scaled.topk(self.top_k, -1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = scaled.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the likeliest token always stays
            dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            scaled = scaled.masked_fill(dropped, -torch.inf)
        if self.min_p > 0:
            scaled = scaled.masked_fill(scaled < scaled.amax(-1, keepdim=True) + math.log(self.min_p), -torch.inf)
        return scaled


def _look_up(weights: Tensor, at: Tensor) -> Tensor:
    """The first entry, (B, 1), at which the running sum of `weights` (B, W) is over `at` (B, 1), at least 0.

    An entry of weight 0 is never taken: where rounding has put `at` beyond the sum of all, the largest is.
    """
    entry = torch.searchsorted(weights.cumsum(-1), at, right=True)
    return torch.where(entry < weights.shape[-1], entry, weights.argmax(-1, keepdim=True))
