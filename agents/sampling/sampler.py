"""Sample a token from logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from agents.sampling.sample_kernel import block_sums, runs_on
from llm_env.arguments import as_int

LARGE = 1024  # tokens of a vocabulary that is sampled in two steps: first a block, then a token in it
BLOCK = 64  # tokens in a block


@dataclass(frozen=True)
class Sampler:
    """Samples a token from logits.

    Attributes:
        temperature: divides the logits, here and in training.
        top_k: sample among the k likeliest tokens; 0 is off.
        top_p: sample among the likeliest tokens of total probability p; 1 is off.
        min_p: sample among tokens at least `min_p` times as likely as the likeliest (arXiv 2407.01082); 0 is off. The three
            apply in this order. Log-probs stay those of the whole distribution, so that training with them is off-policy.
        deterministic: take the likeliest token.
        generator: source of randomness; torch's global generator by default.
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
        if (as_int(self.top_k) or 0) != self.top_k or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be a whole number of at least 0 (0 is off)")
        if not isinstance(self.min_p, (int, float, np.number)) or not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p={self.min_p} must be in [0, 1] (0 is off)")

    @property
    def restricted(self) -> bool:
        """Whether top_k, top_p or min_p is on."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0

    def spawn(self, number: int) -> Sampler:
        """Return a sampler with a new generator, seeded by this one's next random number plus `number`."""
        if self.generator is None:
            return self
        drawn = torch.randint(2**62, (), generator=self.generator, device=self.generator.device)
        return replace(self, generator=torch.Generator(self.generator.device).manual_seed(int(drawn) + number))

    def uniforms(self, rows: int, steps: int, vocab_size: int, device: torch.device) -> Tensor:
        """Draw the uniform random numbers for a whole batch of responses.

        A row's tokens then depend neither on the other rows in the batch, nor on the order, nor on the process.

        Args:
            rows: number of responses.
            steps: tokens of the longest response.
            vocab_size: a large vocabulary needs two numbers a token.
            device: of the result.

        Returns:
            (rows, steps, 1 or 2), in [0, 1); (rows, steps, 0) if deterministic.
        """
        if self.deterministic:
            return torch.empty(rows, steps, 0, device=device)
        return torch.rand(rows, steps, 1 + (vocab_size > LARGE), generator=self.generator, device=device)

    def __call__(self, logits: Tensor, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sample a token for each row, by inverting the cumulative distribution.

        One uniform random number a row is enough, where `torch.multinomial` draws V. In a large vocabulary it selects a block
        of tokens, and a second one the token in the block.

        Args:
            logits: (B, V).
            uniforms: (B, 1 or 2), uniform random numbers; drawn here by default.

        Returns:
            The tokens (B,), and their log-probs (B,) under the tempered distribution, in nats.
        """
        if not self.deterministic and not self.restricted and logits.shape[-1] > LARGE and runs_on(logits.device):
            if uniforms is None:
                uniforms = self.uniforms(len(logits), 1, logits.shape[-1], logits.device)[:, 0]
            return self._sample_by_blocks(logits, uniforms)
        scaled = logits.float() / self.temperature if self.temperature != 1 else logits
        probabilities = scaled.softmax(-1, dtype=torch.float32)  # converts within its kernel
        if self.deterministic:
            tokens = scaled.argmax(-1, keepdim=True)
        else:
            if uniforms is None:
                uniforms = self.uniforms(len(scaled), 1, scaled.shape[-1], scaled.device)[:, 0]
            weights = self._restrict(scaled.float()).softmax(-1) if self.restricted else probabilities
            uniform = uniforms[:, :1]
            if weights.shape[-1] <= LARGE:
                tokens = _look_up(weights, uniform * weights.sum(-1, keepdim=True))
            else:
                # With one number, tokens rarer than the resolution of a float32 would never be sampled.
                blocks = nn.functional.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
                sums = blocks.sum(-1)
                block = _look_up(sums, uniform * sums.sum(-1, keepdim=True))
                weights = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0]
                tokens = block * BLOCK + _look_up(weights, uniforms[:, 1:] * weights.sum(-1, keepdim=True))
        return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()

    def _sample_by_blocks(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Do the same in a large vocabulary without a table of probabilities; see `agents.sampling.sample_kernel`."""
        sums, top = block_sums(logits, self.temperature, BLOCK)
        total = sums.sum(-1, keepdim=True)
        block = _look_up(sums, uniforms[:, :1] * total)
        at = block * BLOCK + torch.arange(BLOCK, device=logits.device)
        inside = at < logits.shape[-1]
        scaled = logits.gather(1, at.clamp(max=logits.shape[-1] - 1)).float() / self.temperature
        weights = (scaled - top).exp() * inside
        within = _look_up(weights, uniforms[:, 1:] * weights.sum(-1, keepdim=True))
        return (block * BLOCK + within)[:, 0], (scaled.gather(1, within) - top - total.log())[:, 0]

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
    """Return the first entry at which the cumulative sum of the weights exceeds a number.

    An entry of weight 0 is never returned; if rounding puts the number beyond the total, the largest entry is.

    Args:
        weights: (B, W), at least 0.
        at: (B, 1), at least 0.

    Returns:
        (B, 1) int64.
    """
    entry = torch.searchsorted(weights.cumsum(-1), at, right=True)
    return torch.where(entry < weights.shape[-1], entry, weights.argmax(-1, keepdim=True))
