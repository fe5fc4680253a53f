"""Log-probs of tokens and entropies of softmax(logits) as Triton kernels, which read the logits once in their own dtype.

In PyTorch, they take a copy of the logits in float32 and five passes over it, forward and backward. With a vocabulary of
150,000 tokens and a small model, that takes longer than the model's matrix products. The kernels keep a running maximum and
rescale the sums (Milakov and Gimelshein, arXiv 1805.02867).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

BLOCK = 4096  # logits that a program reads at a time


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels can be used: on CUDA, where Triton is installed."""
    return triton is not None and device.type == "cuda"


class FusedLogProbs(torch.autograd.Function):
    """Log-probs and entropies in nats: float32 (N,) each, from logits (N, V) in any dtype and tokens (N,)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute log-probs and entropies of softmax(logits / temperature)."""
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        logp, entropies, log_sums = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device).unbind()
        if len(logits):
            _forward[(len(logits),)](
                logits, tokens, logp, entropies, log_sums, logits.stride(0), logits.shape[1], 1 / temperature,
                BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        ctx.save_for_backward(logits, tokens, entropies, log_sums)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logp: Tensor | None, of_entropies: Tensor | None) -> tuple[Tensor, None, None]:
        """With l = log_softmax(x) and p = exp(l): d l_token / d x = onehot(token) - p, and d H / d x = -p * (l + H)."""
        logits, tokens, entropies, log_sums = ctx.saved_tensors
        of_logp, of_entropies = (
            torch.zeros_like(entropies) if part is None else part.contiguous() for part in (of_logp, of_entropies)
        )
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if len(logits):
            _backward[(len(logits), triton.cdiv(logits.shape[1], BLOCK))](
                logits, tokens, entropies, log_sums, of_logp, of_entropies, out, logits.stride(0), logits.shape[1],
                1 / ctx.temperature, BLOCK=BLOCK, num_warps=8,
            )  # fmt: skip
        return out, None, None


if triton is not None:

    @triton.jit
    def _forward(logits, tokens, logp, entropies, log_sums, stride, V, inverse_temperature, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        start, at = logits + row * stride, tl.arange(0, BLOCK)
        # Per lane: the maximum, the sum of exp(x - maximum) and of exp(x - maximum) * (x - maximum).
        highest = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        moment = tl.zeros([BLOCK], tl.float32)
        for first in range(0, V, BLOCK):
            inside = first + at < V
            x = tl.load(start + first + at, mask=inside, other=float("-inf")).to(tl.float32) * inverse_temperature
            x = tl.where(inside, x, -1e30)
            higher = tl.maximum(highest, x)
            shrunk, weight = tl.exp(highest - higher), tl.where(inside, tl.exp(x - higher), 0.0)
            moment = shrunk * (moment + (highest - higher) * total) + weight * (x - higher)
            total = shrunk * total + weight
            highest = higher
        top = tl.max(highest, 0)
        shrunk = tl.exp(highest - top)
        moment = tl.sum(shrunk * (moment + (highest - top) * total), 0)
        total = tl.sum(shrunk * total, 0)
        token = tl.load(tokens + row)
        chosen = tl.load(start + token).to(tl.float32) * inverse_temperature
        tl.store(log_sums + row, top + tl.log(total))
        tl.store(logp + row, chosen - top - tl.log(total))
        tl.store(entropies + row, tl.log(total) - moment / total)

    @triton.jit
    def _backward(
        logits, tokens, entropies, log_sums, of_logp, of_entropies, out, stride, V, inverse_temperature, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < V
        x = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32) * inverse_temperature
        log_p = x - tl.load(log_sums + row)
        p = tl.exp(log_p)
        by_logp, by_entropy = tl.load(of_logp + row), tl.load(of_entropies + row)
        gradient = tl.where(at == tl.load(tokens + row), by_logp, 0.0) - by_logp * p
        gradient -= by_entropy * p * (log_p + tl.load(entropies + row))
        tl.store(out + row * V + at, (gradient * inverse_temperature).to(out.dtype.element_ty), mask=inside)
