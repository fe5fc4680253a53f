"""One forward pass over groups of responses to one prompt, with each prompt computed once.

A row of the batch is `[prompt | response 1 | ... | response G]`. Responses attend to the prompt and, causally, to themselves,
not to each other, and their positions go on from the prompt's end: what comes out is what G rows `[prompt | response]` would
give, for P + G * T tokens in the place of G * (P + T). It goes through transformers' own `AttentionInterface`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "llm_env_shared_prompt"
OTHER_ATTENTION = ("sliding_window", "s_aux", "position_bias")  # arguments of attention that is computed otherwise than here


class NotShareable(Exception):
    """The model's attention is of a kind that this pass does not compute."""


class Attention(Protocol):
    """What attention computes in a row of a batch that is not one sequence."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Attention of L positions: `query` (N, H, L, D), scaled; `key`, `value` (N, K, L, D), K dividing H; (N, H, L, D)."""


_rows: ContextVar[Attention | None] = ContextVar("shared_prompt_rows", default=None)


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
    """What is registered with transformers: shapes as in `Attention.attend`, but for the result, (N, L, H, D)."""
    rows = _rows.get()
    assert rows is not None
    if dropout or any(kwargs.get(name) is not None for name in OTHER_ATTENTION):
        raise NotShareable
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return rows.attend(module.layer_idx, query * scale, key, value, softcap).transpose(1, 2), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attention)


@contextmanager
def attention_by(model: PreTrainedModel, rows: Attention) -> Iterator[None]:
    """The model's attention is computed by `rows` within."""
    before, token = model.config._attn_implementation, _rows.set(rows)
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before
        _rows.reset(token)


def scores_of(query: Tensor, key: Tensor, softcap: float | None) -> Tensor:
    """Products of queries (..., L, D) and keys (..., S, D), (..., L, S)."""
    scores = query @ key.transpose(-1, -2)
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def weights_of(*scores: Tensor) -> Tensor:
    """One softmax over all the scores, which differ in their last dimension only."""
    both = torch.cat(scores, -1) if len(scores) > 1 else scores[0]
    return both.softmax(-1, dtype=torch.float32).to(both.dtype)


@dataclass
class PackedRows:
    """Rows `[prompt, padded on the left | G responses, padded on the right]`.

    Attributes:
        visible: (N, P) bool, True at prompt tokens, False at padding.
        group: G; 0 for prompts alone.
        width: T of the responses.
        kept: the prompts' keys and values by layer, (N, K, P, D) each, if it is a dict.
        calls: how many layers were computed.
    """

    visible: Tensor
    group: int = 0
    width: int = 0
    kept: dict[int, tuple[Tensor, Tensor]] | None = None
    calls: int = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Prompts attend to what they hold before each token, responses to all of the prompt and to that of their own."""
        self.calls += 1
        (n, heads, _, d), keys = query.shape, key.shape[1]
        p, g, t, repeats = self.visible.shape[1], self.group, self.width, heads // keys
        query = query.view(n, keys, repeats, -1, d)
        prompt = key[:, :, :p], value[:, :, :p]
        if self.kept is not None:
            self.kept[layer] = prompt
        seen = self.visible[:, None, None]  # (N, 1, 1, P)
        lowest = torch.finfo(query.dtype).min

        def past(size: int) -> Tensor:
            return torch.ones(size, size, dtype=torch.bool, device=query.device).tril()

        scores = scores_of(query[..., :p, :].reshape(n, keys, repeats * p, d), prompt[0], softcap)
        scores = scores.masked_fill(~(past(p) & seen).repeat(1, 1, repeats, 1), lowest)
        out = (weights_of(scores) @ prompt[1]).view(n, heads, p, d)
        if t:
            query = query[..., p:, :]
            to_prompt = scores_of(query.reshape(n, keys, repeats * g * t, d), prompt[0], softcap).masked_fill(~seen, lowest)
            own_keys, own_values = (x[:, :, None, p:].view(n, keys, 1, g, t, d) for x in (key, value))
            to_own = scores_of(query.view(n, keys, repeats, g, t, d), own_keys, softcap).masked_fill(~past(t), lowest)
            weights = weights_of(to_prompt.view(n, keys, repeats, g, t, p), to_own)
            mixed = weights[..., :p].reshape(n, keys, repeats * g * t, p) @ prompt[1]
            mixed = mixed.view(n, keys, repeats, g, t, d) + weights[..., p:] @ own_values
            out = torch.cat([out, mixed.reshape(n, heads, g * t, d)], 2)
        return out


def group_states(base: PreTrainedModel, prompts: Sequence[Sequence[int]], groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Hidden states (B, T + 1, H) of the B rows of N groups: before each token of a row and after its last.

    Args:
        base: a model without its head that `shares_prompts`.
        prompts: N lists of token ids.
        groups: for each prompt the rows that go on from it, B in all.
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
    packed = PackedRows(visible.to(device), size, t)
    with attention_by(base, packed):
        out = base(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False).last_hidden_state
    if not packed.calls:
        raise NotShareable
    before = out[:, p - 1 : p].expand(-1, size, -1)[:, :, None]
    states = torch.cat([before, out[:, p:].view(n, size, t, out.shape[-1])], 2)
    return states[torch.tensor([[j < len(rows) for j in range(size)] for rows in groups], device=device)]


def _attends_to_everything(base: PreTrainedModel) -> bool:
    """Whether no layer is said to have a window, which a trial on a few tokens would not show."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return window is None and getattr(config, "attention_chunk_size", None) is None and kinds == {"full_attention"}


_able: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def shares_prompts(base: PreTrainedModel) -> bool:
    """Whether `group_states` gives what plain rows give, found out by a trial on a few tokens, once a model.

    It does for decoders whose layers all attend to everything before them, through `AttentionInterface`; not for sliding
    windows, state spaces and attention with terms of its own.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        return False  # attention would be computed again after the layout is gone
    if base not in _able and not _attends_to_everything(base):
        _able[base] = False
    if base not in _able:
        prompts, groups = [[1, 2, 0], [2]], [[[0, 1], [2]], [[1, 2], [0]]]
        try:
            with torch.no_grad():
                states = group_states(base, prompts, groups)
                alone = [
                    base(input_ids=torch.tensor([prompt + row], device=base.device), use_cache=False).last_hidden_state[0]
                    for prompt, rows in zip(prompts, groups, strict=True)
                    for row in rows
                ]
            rows = [row for group in groups for row in group]
            pairs = [(a[: len(row) + 1], b[-len(row) - 1 :]) for a, b, row in zip(states, alone, rows, strict=True)]
            _able[base] = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in pairs)
        except Exception:  # plain rows are taken, where an error that is the model's own comes again
            _able[base] = False
    return _able[base]
