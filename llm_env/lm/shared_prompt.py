"""Prefix sharing: one forward pass over groups of responses that computes each prompt once.

A row of the batch is `[prompt | response 1 | ... | response G]`. A response attends to the prompt and, causally, to itself, but
not to the other responses. Its position ids continue from the prompt's end. The result equals that of G rows
`[prompt | response]`, but takes P + G * T tokens instead of G * (P + T). There are three modes:

- "split": transformers' `AttentionInterface` calls `PackedRows`. One matrix product scores the prompt for the whole group,
  another scores each response's own tokens. One softmax covers both. In half precision on CUDA, each is a call of PyTorch's
  FlashAttention kernels instead; see `llm_env.lm.flash`.
- "flex" (CUDA only): the same by torch's `flex_attention`, which skips blocks of pairs that do not attend to each other. It is
  compiled for a minute before it is faster.
- "dense": the model's own attention under a mask over all pairs of positions, for models with sliding windows or additional
  terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from llm_env.lm import flash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = Sequence[Sequence[int]]

NAME = "llm_env_shared_prompt"
OTHER_ATTENTION = ("s_aux", "position_bias")  # keyword arguments of attention that this module does not compute
SCORES_BYTES = 2**24  # of scores per chunk of responses, to fit into a CPU's cache: twice the size takes four times as long
SCORES_BYTES_CUDA = 2**30  # the same on a GPU, where it bounds the memory: the backward pass computes a chunk's scores again


class PrefixSharingUnsupported(Exception):
    """Prefix sharing does not support this model's attention."""

    def __init__(self) -> None:
        super().__init__("the model's attention has dropout, too short a sliding window, or additional terms (sinks, biases)")


class WindowProbe:
    """Stand-in for attention that returns zeros and records the layers that call the `AttentionInterface`.

    Attributes:
        layers: layer numbers, in the order of the calls.
        windows: sliding window of each of these layers; None for full attention.
    """

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.windows: list[int | None] = []


class Attention(Protocol):
    """Interface of attention over batch rows that hold several sequences."""

    @property
    def max_distance(self) -> int:
        """The largest distance between two positions that see each other."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Compute attention over L positions.

        Args:
            layer: layer number.
            query: (N, H, L, D), already scaled.
            key: (N, K, L, D), K dividing H.
            value: (N, K, L, D).
            softcap: soft cap of the attention scores; None for no cap.

        Returns:
            (N, H, L, D).
        """


_attending: ContextVar[tuple[PreTrainedModel, Attention | WindowProbe] | None] = ContextVar("attending", default=None)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers' `AttentionInterface`, with the object that `attention_by` has set.

    Shapes are those of `Attention.attend`, but the result is (N, L, H, D).

    Raises:
        PrefixSharingUnsupported: If the layer uses dropout, too short a sliding window, or additional terms.
    """
    attending = _attending.get()
    assert attending is not None
    _, rows = attending
    window = kwargs.get("sliding_window")
    if isinstance(rows, WindowProbe):
        rows.layers.append(module.layer_idx)  # type: ignore[arg-type]
        rows.windows.append(window)
        return torch.zeros_like(query).transpose(1, 2), None
    too_far = window is not None and rows.max_distance >= window
    if dropout or too_far or any(kwargs.get(name) is not None for name in OTHER_ATTENTION):
        raise PrefixSharingUnsupported
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key = (query * scale).to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    return rows.attend(module.layer_idx, query, key, value, softcap).transpose(1, 2), None  # type: ignore[arg-type]


@cache
def register_attention() -> None:
    """Register `attention` with transformers under `NAME`, once."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


@contextmanager
def attention_by(model: PreTrainedModel, rows: Attention | WindowProbe) -> Iterator[None]:
    """Context in which `rows` computes the model's attention."""
    register_attention()
    parts = (getattr(model.config, name, None) for name in getattr(model.config, "sub_configs", {}))
    configs = [model.config, *(part for part in parts if part is not None)]  # setting the first one sets all of them
    before, token = [config._attn_implementation for config in configs], _attending.set((model, rows))
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
        _attending.reset(token)


def attention_as_now() -> Callable[[], AbstractContextManager[None]]:
    """Return a context factory that restores the current `attention_by`, for activation checkpointing."""
    attending = _attending.get()
    return nullcontext if attending is None else partial(attention_by, *attending)


def scores_of(query: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Return attention scores (..., L, S) of queries (..., L, D) and keys (..., S, D), soft-capped if asked."""
    scores = query @ key.transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weights_of(*scores: Tensor) -> Tensor:
    """Return one softmax over all scores, concatenated along their last dimension."""
    both = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    return both.softmax(-1, dtype=torch.float32).to(both.dtype)


@dataclass
class PackedRows:
    """Attention over rows `[prompt, padded on the left | G responses, padded on the right]`.

    Attributes:
        visible: (N, P) bool, True at prompt tokens, False at padding.
        group: number of responses per prompt, G; 0 for prompts without responses.
        width: padded length of a response, T.
        kept: None, or a dict in which the prompts' keys and values are stored by layer, (N, K, P, D) each.
        calls: number of layers computed.
        lengths: N lengths of the prompts, in tokens; by default, `visible` is read, which waits for the device.
    """

    visible: Tensor
    group: int = 0
    width: int = 0
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    calls: int = 0
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.lengths:
            self.lengths = self.visible.sum(1).tolist()

    @property
    def max_distance(self) -> int:
        """The largest distance between two positions that see each other."""
        return self.visible.shape[1] + self.width - 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Compute causal attention in the prompt, and of each response to the prompt and itself."""
        self.calls += 1
        (n, heads, _, _), p, g, t = query.shape, self.visible.shape[1], self.group, self.width
        keys, values = key[:, :, :p], value[:, :, :p]
        if self.kept is not None:
            self.kept[layer] = keys, values
        if softcap is None and flash.runs_on(query):
            return self.layout.attend(query, key, value)
        out = [self._of_prompts(query[:, :, :p], keys, values, softcap)]
        if g * t == 0:
            return out[0]
        parts = -(-4 * n * heads * g * t * (p + t) // (SCORES_BYTES_CUDA if query.is_cuda else SCORES_BYTES))
        size = -(-g // max(parts, 1))  # responses at a time
        of_responses = self._of_responses
        if query.is_cuda and size < g and query.requires_grad:
            of_responses = partial(checkpoint, self._of_responses, use_reentrant=False, preserve_rng_state=False)
        for first in range(0, g, size):
            at = slice(p + first * t, p + min(first + size, g) * t)
            out.append(of_responses(query[:, :, at], keys, values, key[:, :, at], value[:, :, at], softcap))
        return torch.cat(out, 2)

    def _of_responses(
        self, query: Tensor, keys: Tensor, values: Tensor, own_keys: Tensor, own_values: Tensor, softcap: float | None
    ) -> Tensor:
        (n, heads, _, d), kinds, p, t = query.shape, keys.shape[1], keys.shape[2], self.width
        repeats, g = heads // kinds, query.shape[2] // t
        query = query.reshape(n, kinds, repeats * g * t, d)
        to_prompt = scores_of(query, keys, softcap)
        if self.padding is not None:
            to_prompt = to_prompt + self.padding.to(to_prompt.dtype)
        own_keys, own_values = (x.reshape(n, kinds, 1, g, t, d) for x in (own_keys, own_values))
        later = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
        to_own = scores_of(query.view(n, kinds, repeats, g, t, d), own_keys, softcap)
        to_own = to_own.masked_fill(later, torch.finfo(to_own.dtype).min)  # under autocast, not the query's dtype
        weights = weights_of(to_prompt.view(n, kinds, repeats, g, t, p), to_own)
        mixed = (weights[..., :p].reshape(n, kinds, repeats * g * t, p) @ values).view(n, kinds, repeats, g, t, d)
        return (mixed + weights[..., p:] @ own_values).reshape(n, heads, g * t, d)

    @cached_property
    def padding(self) -> Tensor | None:
        """Attention bias (N, 1, 1, P) that masks prompt padding; None without padding."""
        if min(self.lengths) == self.visible.shape[1]:
            return None
        added = torch.zeros(self.visible.shape, device=self.visible.device)
        return added.masked_fill(~self.visible, torch.finfo(torch.bfloat16).min)[:, None, None]

    @cached_property
    def layout(self) -> flash.SharedLayout:
        """Where prompts and responses lie, for the FlashAttention kernels."""
        return flash.SharedLayout(self.lengths, self.visible.shape[1], self.group, self.width, self.visible.device)

    def _of_prompts(self, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        p, heads = query.shape[2], query.shape[1]
        attended = partial(nn.functional.scaled_dot_product_attention, scale=1.0, enable_gqa=heads != key.shape[1])
        if self.padding is None and softcap is None:
            return attended(query, key, value, is_causal=True)
        later = torch.ones(p, p, dtype=torch.bool, device=query.device).triu(1)
        added = torch.zeros(p, p, device=query.device).masked_fill(later, torch.finfo(torch.bfloat16).min)
        added = (added if self.padding is None else torch.minimum(added, self.padding)).to(query.dtype)
        if softcap is None and not query.is_cuda:
            return attended(query, key, value, added)
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        if softcap is None:  # no CUDA kernel takes a mask and grouped heads: PyTorch would fall back to plain matrix products
            return nn.functional.scaled_dot_product_attention(query, key, value, added, scale=1.0)
        scores = scores_of(query, key, softcap)
        return weights_of(scores + added.to(scores.dtype)) @ value


class FlexRows(PackedRows):
    """Attention over the rows of `PackedRows` with `torch.nn.attention.flex_attention`."""

    @cached_property
    def mask(self) -> BlockMask:
        """The block mask: the blocks of position pairs that are computed."""
        # As tensors: the mask would be compiled again for every new value of a number.
        p, t = torch.tensor([self.visible.shape[1], max(self.width, 1)], device=self.visible.device)
        visible = self.visible

        def sees(row: Tensor, _head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            of_prompt = (j < p) & visible[row, torch.minimum(j, p - 1)]
            of_response = (j >= p) & ((i - p) // t == (j - p) // t)
            return (i >= j) & (of_prompt | of_response)

        length = self.visible.shape[1] + self.group * self.width
        # Compiled, because the uncompiled version materializes all pairs.
        return create_block_mask(sees, len(visible), None, length, length, device=str(visible.device), _compile=visible.is_cuda)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Compute attention as in `PackedRows.attend`; the output at prompt padding is 0."""
        self.calls += 1

        def capped(score: Tensor, *_: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

        modified = None if softcap is None else capped
        out = flex()(query, key, value, modified, self.mask, scale=1.0, enable_gqa=query.shape[1] != key.shape[1])
        assert isinstance(out, Tensor)
        return out


@cache
def flex() -> Callable[..., Tensor | tuple[Tensor, ...]]:
    """Return compiled `flex_attention`; the uncompiled version materializes all scores."""
    return torch.compile(flex_attention, dynamic=True)


def group_states(base: PreTrainedModel, prompts: Rows, groups: Sequence[Rows], mode: str = "split") -> Tensor:
    """Compute hidden states (B, T + 1, H) of B rows in N groups, each prompt once.

    The states are those before each token of a row and after its last token.

    Args:
        base: a model without its head for which `supports_sharing` is true in this mode.
        prompts: N lists of token ids.
        groups: N lists of rows; the rows continue the prompt with the same index. B rows in total.
        mode: "flex", "split" or "dense".

    Raises:
        PrefixSharingUnsupported: If the model's attention does not go through the `AttentionInterface`, or a layer uses an
            unsupported feature.
    """
    size, t = max(map(len, groups)), max(len(row) for rows in groups for row in rows)
    n, p, device = len(prompts), max(map(len, prompts)), base.device
    ids, positions = torch.zeros((2, n, p + size * t), dtype=torch.int64).unbind()
    visible = torch.zeros(n, p, dtype=torch.bool)
    for i, (prompt, rows) in enumerate(zip(prompts, groups, strict=True)):
        visible[i, p - len(prompt) :] = True
        ids[i, p - len(prompt) : p] = torch.as_tensor(prompt)
        positions[i, p - len(prompt) : p] = torch.arange(len(prompt))
        positions[i, p:] = (len(prompt) + torch.arange(t)).repeat(size)
        for j, row in enumerate(rows):
            ids[i, p + j * t : p + j * t + len(row)] = torch.as_tensor(row, dtype=torch.int64)
    ids, positions, visible = ids.to(device), positions.to(device), visible.to(device)
    if mode == "dense":
        mask = _dense_masks(base, visible, positions, size, t)
        out = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    else:
        lengths = [len(prompt) for prompt in prompts]
        packed = (FlexRows if mode == "flex" else PackedRows)(visible, size, t, lengths=lengths)
        with attention_by(base, packed):
            out = base(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        if not packed.calls:
            raise PrefixSharingUnsupported
    before = out[:, p - 1 : p].expand(-1, size, -1)[:, :, None]
    states = torch.cat([before, out[:, p:].view(n, size, t, out.shape[-1])], 2)
    if all(len(rows) == size for rows in groups):
        return states.flatten(0, 1)
    filled = [i * size + j for i, rows in enumerate(groups) for j in range(len(rows))]
    return states.flatten(0, 1)[torch.tensor(filled, device=device)]


def _dense_masks(base: PreTrainedModel, visible: Tensor, positions: Tensor, size: int, t: int) -> Tensor | dict[str, Tensor]:
    """Build the additive attention mask (N, 1, L, L); a dict by layer type if the model has several types."""
    n, p = visible.shape
    part = torch.arange(size, device=visible.device).repeat_interleave(t)
    part = torch.cat([part.new_full((p,), -1), part])  # index of the response, -1 in the prompt
    at = torch.arange(p + size * t, device=visible.device)
    seen = (at[:, None] >= at) & ((part == -1) | (part[:, None] == part))
    seen = seen & torch.cat([visible, visible.new_ones(n, size * t)], 1)[:, None]
    seen = seen | torch.eye(len(at), dtype=torch.bool, device=seen.device)  # padding sees itself: no fully masked row

    def added(pairs: Tensor) -> Tensor:
        return torch.zeros(pairs.shape, dtype=base.dtype, device=pairs.device).masked_fill(~pairs, torch.finfo(base.dtype).min)[
            :, None
        ]

    window = window_of(base)
    if window is None:
        return added(seen)
    near = seen & (positions[:, :, None] - positions[:, None] < window)
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or [])
    return {"full_attention": added(seen), "sliding_attention": added(near)} if len(kinds) > 1 else added(near)


def window_of(base: PreTrainedModel) -> int | None:
    """Return the sliding window in tokens, including the token itself; None without windowed layers."""
    config = base.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    slides = getattr(config, "use_sliding_window", True) and "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None
