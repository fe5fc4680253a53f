"""Attention over shared prompts with PyTorch's FlashAttention kernels: no table of scores, in half precision on CUDA.

A response attends to its prompt and to itself. Each is one call of the kernel (Dao, arXiv 2307.08691), which also gives the log
of the sum of exponentials, by which the two results are weighed. The backward pass calls its kernel once for each, with the
result and the log-sum of both: these are all that it needs to know of the other one, as in ring attention (Liu et al., arXiv
2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD = 256


def runs_on(query: Tensor) -> bool:
    """Return whether the kernels take queries (..., D)."""
    if not query.is_cuda or query.dtype not in DTYPES or query.shape[-1] % 8 or query.shape[-1] > LARGEST_HEAD:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(query.device)[0] >= 8


@dataclass
class Parts:
    """Sequences that lie one after the other.

    Attributes:
        bounds: (N + 1,) int32, where each of N sequences begins; the last entry is the number of tokens.
        longest: tokens of the longest one.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Parts:
        """Return parts of some lengths."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(bounds.to(device), max(lengths, default=0))


class SharedLayout:
    """Where the tokens of N prompts and their G responses of T tokens lie in rows `[prompt, padded on the left | responses]`.

    Args:
        lengths: N lengths of the prompts, in tokens.
        width: padded length of a prompt, P.
        group: G; 0 without responses.
        new: T.
        device: of the tensors.
    """

    def __init__(self, lengths: Sequence[int], width: int, group: int, new: int, device: torch.device) -> None:
        n = len(lengths)
        self.width, self.new_tokens = width, group * new
        self.prompts = Parts.of(lengths, device)
        self.groups = Parts.of([group * new] * n, device)
        self.responses = Parts.of([new] * (n * group), device)
        self.prompt_tokens: Tensor | None = None  # of N * P; None without padding
        if min(lengths) < width:
            at = torch.cat([torch.arange((i + 1) * width - length, (i + 1) * width) for i, length in enumerate(lengths)])
            self.prompt_tokens = at.to(device)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention over L = P + G * T positions.

        Args:
            query: (N, H, L, D), already scaled.
            key: (N, K, L, D), K dividing H.
            value: (N, K, L, D).

        Returns:
            (N, H, L, D), 0 at prompt padding.
        """
        n, p = len(query), self.width
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        prompts = [x[:, :p].flatten(0, 1) for x in (query, key, value)]
        if self.prompt_tokens is not None:
            prompts = [x[self.prompt_tokens] for x in prompts]
        out = _Attention.apply(*prompts, None, None, (self.prompts, self.prompts, None))
        if self.prompt_tokens is not None:
            out = out.new_zeros(n * p, *out.shape[1:]).index_copy(0, self.prompt_tokens, out)
        out = out.unflatten(0, (n, p))
        if self.new_tokens:
            responses = [x[:, p:].flatten(0, 1) for x in (query, key, value)]
            parts = (self.groups, self.prompts, self.responses)
            of_responses = _Attention.apply(responses[0], *prompts[1:], *responses[1:], parts)
            out = torch.cat([out, of_responses.unflatten(0, (n, -1))], 1)
        return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    """Attention of queries (S, H, D) to keys (S', K, D) of their prompt, and causal attention to keys (S, K, D) beside them.

    Without the latter, attention to the prompt is causal: queries and keys are those of the prompt itself. All tensors hold
    sequences one after the other. `parts` are those of the queries, of the prompts and of the keys beside the queries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        prompt_keys: Tensor,
        prompt_values: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        parts: tuple[Parts, Parts, Parts | None],
    ) -> Tensor:
        groups, prompts, responses = parts
        out, log_sum = forward(query, prompt_keys, prompt_values, groups, prompts, keys is None)
        if keys is not None and values is not None and responses is not None:
            beside, log_sum_beside = forward(query, keys, values, responses, responses, True)
            both = torch.logaddexp(log_sum, log_sum_beside)  # (H, S)
            weight = (log_sum_beside - both).exp().T[..., None]
            out, log_sum = torch.lerp(out.to(weight.dtype), beside.to(weight.dtype), weight).to(out.dtype), both
        ctx.save_for_backward(query, prompt_keys, prompt_values, keys, values, out, log_sum)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
        query, prompt_keys, prompt_values, keys, values, out, log_sum = ctx.saved_tensors
        groups, prompts, responses = ctx.parts
        results = of_out.contiguous(), out, log_sum
        of_query, *of_prompts = backward(results, query, prompt_keys, prompt_values, groups, prompts, keys is None)
        if keys is None:
            return of_query, *of_prompts, None, None, None
        of_query_beside, *of_responses = backward(results, query, keys, values, responses, responses, True)
        return of_query + of_query_beside, *of_prompts, *of_responses, None


def forward(query: Tensor, key: Tensor, value: Tensor, queries: Parts, keys: Parts, causal: bool) -> tuple[Tensor, Tensor]:
    """Return attention (S, H, D), and the log of the sum of exponentials of the scores (H, S), float32."""
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, queries.bounds, keys.bounds, queries.longest, keys.longest, 0.0, causal, False, scale=1.0
    )
    return out, log_sum


def backward(
    results: tuple[Tensor, Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Parts,
    keys: Parts,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value.

    Args:
        results: the gradient of the result, the result and its log-sum; the last two over these and other keys together.
        query: (S, H, D).
        key: (S', K, D).
        value: (S', K, D).
        queries: where the sequences of queries lie.
        keys: where the sequences of keys lie.
        causal: whether a query sees no later key.
    """
    of_out, out, log_sum = results
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of a dropout that is off
    return torch.ops.aten._flash_attention_backward(
        of_out, query, key, value, out, log_sum, queries.bounds, keys.bounds, queries.longest, keys.longest, 0.0, causal,
        random_state, torch.empty(0, device=query.device), scale=1.0,
    )  # fmt: skip
