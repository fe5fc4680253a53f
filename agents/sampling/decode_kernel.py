"""Attention of one new token per response over a shared prompt and the response's own tokens, as a Triton kernel.

In PyTorch, the attention of a decoding step is a dozen operations, each a launch on a GPU, over caches that are read up to the
width that is allocated. This kernel reads the tokens that a response has, stores the new key and value, and keeps the scores in
registers, as FlashAttention does (arXiv 2205.14135). Where there are few responses, the tokens of each are computed in parts,
as in Flash-Decoding (https://pytorch.org/blog/flash-decoding).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without Triton
    triton = None

PROGRAMS = 512  # a GPU has about a hundred multiprocessors; with fewer programs than this, responses are computed in parts
BLOCK = 64  # tokens that a program reads at a time
WARPS, STAGES = 2, 3  # of a program: warps, and loads under way; the best of 12 on an H100, see examples/benchmarks/gpu.md
SMALLEST = 16  # smallest side of a matrix product in Triton
MOST_PARTS = 64


def runs_on(model: PreTrainedModel) -> bool:
    """Return whether the kernel can be used for a model: on CUDA, where Triton is installed."""
    return triton is not None and model.device.type == "cuda"


def attend_slots(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    caches: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    num_generated: Tensor,
    softcap: float | None,
    splits: int | None = None,
) -> Tensor:
    """Store the keys and values of one new token per slot, and attend to the prompt, the slot's tokens and the new one.

    Args:
        query: (N, H, G, D), already scaled.
        key: (N, K, G, D), of the new tokens, for K key-value heads.
        value: (N, K, G, D).
        caches: keys (N, K, D, P) and values (N, K, P, D) of the prompts, padded on the left, the keys a view of (N, K, P, D);
            and those of the responses, (2, N, K, G, W, D), in which `key` and `value` are stored at index `num_generated`.
        lengths: (N,) int64, tokens of the prompts.
        num_generated: (N, G) int64, tokens of each response in the cache, less than W.
        softcap: caps the scores; None for no cap.
        splits: number of parts in which a response is computed; by default from the number of programs.

    Returns:
        (N, H, G, D).
    """
    prompt_keys, prompt_values, responses = caches[0].transpose(-1, -2).contiguous(), *caches[1:]
    (n, heads, g, d), k, p, w = query.shape, key.shape[1], prompt_values.shape[2], responses.shape[4]
    groups, key = heads // k, key.to(responses.dtype)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if splits is None:
        splits = max(1, min(-(-PROGRAMS // (n * g * k)), (p + w) // (2 * BLOCK), MOST_PARTS))
    rows, wide = (max(SMALLEST, triton.next_power_of_2(size)) for size in (groups, d))
    out = torch.empty(n, g, heads, d, dtype=value.dtype, device=query.device)
    partial = n * g * k * splits if splits > 1 else 0
    mixed = torch.empty(partial, rows, wide, dtype=torch.float32, device=query.device)
    sums = torch.empty(partial, 2, rows, dtype=torch.float32, device=query.device)
    sizes: dict[str, Any] = {"D": d, "GROUPS": groups, "ROWS": rows, "WIDE": wide}
    _attend[(n * g, k, splits)](
        query, key, value, prompt_keys, prompt_values, responses, lengths, num_generated, out, mixed, sums,
        0.0 if softcap is None else softcap, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        k, g, p, w, splits, responses.stride(0), HAS_CAP=softcap is not None, IN_PARTS=splits > 1, TOKENS=BLOCK,
        num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
    if splits > 1:
        _merge[(n * g, k)](out, mixed, sums, k, splits, PARTS=MOST_PARTS, **sizes)
    return out.transpose(1, 2)


STRIDES = [f"{tensor}_{dim}" for tensor in ("query", "key", "value") for dim in "nhg"]

if triton is not None:

    @triton.jit
    def _update(
        q, keys, values, seen, maximum, total, mixed, cap, HAS_CAP: tl.constexpr
    ):  # q (ROWS, WIDE), keys (WIDE, TOKENS), values (TOKENS, WIDE)
        scores = tl.dot(q, keys, input_precision="ieee")
        if HAS_CAP:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(maximum, tl.max(scores, 1))
        shrunk, weights = tl.exp(maximum - higher), tl.exp(scores - higher[:, None])
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        return higher, total * shrunk + tl.sum(weights, 1), mixed

    # Numbers would be compiled in where they are 1 or divisible by 16: again and again, as prompts and batches change.
    @triton.jit(do_not_specialize=[*STRIDES, "K", "G", "P", "W", "SPLITS", "to_values"])
    def _attend(
        query, key, value, prompt_keys, prompt_values, responses, lengths, num_generated, out, mixed_parts, sums, cap,
        query_n, query_h, query_g, key_n, key_h, key_g, value_n, value_h, value_g, K, G, P, W, SPLITS, to_values,
        HAS_CAP: tl.constexpr, IN_PARTS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr,
        ROWS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        slot, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        n, g = slot // G, slot % G
        row, dim, step = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, TOKENS)
        fits = dim < D
        heads = query + n * query_n + (head * GROUPS + row[:, None]) * query_h + g * query_g
        q = tl.load(heads + dim[None, :], mask=(row[:, None] < GROUPS) & fits[None, :], other=0.0)
        own, length, count = (n * K + head) * G + g, tl.load(lengths + n), tl.load(num_generated + slot)
        own_keys = responses + own * W * D
        own_values = own_keys + to_values
        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        mixed = tl.zeros([ROWS, WIDE], tl.float32)
        if split == 0:  # the new token
            k = tl.load(key + n * key_n + head * key_h + g * key_g + dim, mask=fits, other=0.0)
            v = tl.load(value + n * value_n + head * value_h + g * value_g + dim, mask=fits, other=0.0)
            tl.store(own_keys + count * D + dim, k, mask=fits)
            tl.store(own_values + count * D + dim, v, mask=fits)
            maximum = tl.sum(q.to(tl.float32) * k[None, :].to(tl.float32), 1)
            if HAS_CAP:
                maximum = cap * (2.0 * tl.sigmoid(2.0 * maximum / cap) - 1.0)
            total = tl.full([ROWS], 1.0, tl.float32)
            mixed = tl.zeros([ROWS, WIDE], tl.float32) + v[None, :].to(tl.float32)
        size = (length + SPLITS - 1) // SPLITS
        begin = P - length + split * size
        end = tl.minimum(begin + size, P)
        shared = n * K + head
        for first in range(begin, end, TOKENS):
            at = first + step
            seen = at < end
            keys = tl.load(
                prompt_keys + (shared * P + at[None, :]) * D + dim[:, None], mask=fits[:, None] & seen[None, :], other=0.0
            )
            values = tl.load(
                prompt_values + (shared * P + at[:, None]) * D + dim[None, :], mask=seen[:, None] & fits[None, :], other=0.0
            )
            maximum, total, mixed = _update(q, keys, values, seen, maximum, total, mixed, cap, HAS_CAP)
        size = (count + SPLITS - 1) // SPLITS
        begin = split * size
        end = tl.minimum(begin + size, count)
        for first in range(begin, end, TOKENS):
            at = first + step
            seen = at < end
            keys = tl.load(own_keys + at[None, :] * D + dim[:, None], mask=fits[:, None] & seen[None, :], other=0.0)
            values = tl.load(own_values + at[:, None] * D + dim[None, :], mask=seen[:, None] & fits[None, :], other=0.0)
            maximum, total, mixed = _update(q, keys, values, seen, maximum, total, mixed, cap, HAS_CAP)
        if not IN_PARTS:
            to = out + (slot * K + head) * GROUPS * D + row[:, None] * D + dim[None, :]
            written = (mixed / total[:, None]).to(out.dtype.element_ty)
            tl.store(to, written, mask=(row[:, None] < GROUPS) & fits[None, :])
        else:
            part = (slot * K + head) * SPLITS + split
            tl.store(mixed_parts + (part * ROWS + row[:, None]) * WIDE + dim[None, :], mixed)
            tl.store(sums + part * 2 * ROWS + row, maximum)
            tl.store(sums + (part * 2 + 1) * ROWS + row, total)

    @triton.jit(do_not_specialize=["K", "splits"])
    def _merge(
        out, mixed_parts, sums, K, splits, PARTS: tl.constexpr, D: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        own = tl.program_id(0).to(tl.int64) * K + tl.program_id(1)
        row, dim, part = tl.arange(0, ROWS), tl.arange(0, WIDE), tl.arange(0, PARTS)
        at = (own * splits + part[:, None]) * 2 * ROWS + row[None, :]
        some = part[:, None] < splits
        maxima = tl.load(sums + at, mask=some, other=float("-inf"))
        weights = tl.exp(maxima - tl.max(maxima, 0)[None, :])
        total = tl.sum(weights * tl.load(sums + at + ROWS, mask=some, other=0.0), 0)
        highest = tl.max(maxima, 0)
        mixed = tl.zeros([ROWS, WIDE], tl.float32)
        for i in range(0, splits):
            weight = tl.exp(tl.load(sums + (own * splits + i) * 2 * ROWS + row) - highest)
            mixed += weight[:, None] * tl.load(mixed_parts + ((own * splits + i) * ROWS + row[:, None]) * WIDE + dim[None, :])
        to = out + own * GROUPS * D + row[:, None] * D + dim[None, :]
        written = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(to, written, mask=(row[:, None] < GROUPS) & (dim[None, :] < D))
