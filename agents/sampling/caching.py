"""Decode with transformers' KV cache, and find out by a trial whether a model's logits over it are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llm_env.lm.capabilities import (
    Verdicts,
    agree,
    describable,
    passes_once,
    plain_outputs,
    takes_left_padding,
    token,
    trial_rows,
)
from llm_env.lm.inputs import model_inputs, only_last, pad, pad_with_tokens, without_cache

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """Return an empty cache with the kinds of layers that the model's config names."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def cached_logits(model: PreTrainedModel, inputs: dict[str, Tensor], cache: DynamicCache) -> Tensor:
    """Compute the logits after new tokens, and append the tokens' keys and values to the cache.

    Args:
        model: a causal language model.
        inputs: `input_ids` (B, n); perhaps `attention_mask`, which covers the cache's slots as well, and `position_ids`, of
            which the last n are used.
        cache: keys and values of the tokens before.

    Returns:
        (B, V), after the last new token.
    """
    if "position_ids" in inputs:
        inputs = {**inputs, "position_ids": inputs["position_ids"][:, -inputs["input_ids"].shape[1] :]}
    return model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Compute the logits (B, V) after B rows of token ids without a cache, padded on the right."""
    ids, lengths = pad_with_tokens(rows, model.device), torch.tensor([len(row) for row in rows], device=model.device)
    last = only_last(model, ids.shape[1] - min(map(len, rows)) + 1)
    outputs = model(input_ids=ids, **last, **without_cache(model)).logits
    return outputs[torch.arange(len(rows), device=ids.device), lengths - 1 - (ids.shape[1] - outputs.shape[1])]


_decodes: Verdicts = WeakKeyDictionary()


def decodes_with_cache(model: PreTrainedModel) -> bool:
    """Return whether a model can decode over a `DynamicCache` whose rows are repeated and selected; by a trial, once a model.

    The trial's rows are padded on the left if the model takes that, else they have one length and no mask. Models with
    recurrent states or other caches (MiniMax) cannot, nor can those without a cache (GPT-1).

    Raises:
        NotCausal: If the model is refused; see `takes_left_padding`.
    """
    takes_left_padding(model)
    return passes_once(model, _decodes, _passes_trial)


def _passes_trial(model: PreTrainedModel) -> bool:
    rows, padded = trial_rows(model), takes_left_padding(model)
    if not padded:
        length = len(rows[1])
        rows = [rows[0][:length], *([token(model, 5 * i + 3 * row) for i in range(length)] for row in (1, 2))]
    decoded = _Decoded(model, rows, padded)
    decoded.repeat(2)
    decoded.step()
    decoded.step()
    decoded.select([i for i in range(len(decoded.rows)) if i not in (0, 3)])
    decoded.step()
    decoded.step()
    return decoded.agrees()


class _Decoded:
    """A trial: decodes rows over a cache, and collects the logits of the cache and of plain forward passes."""

    def __init__(self, model: PreTrainedModel, rows: list[list[int]], padded: bool) -> None:
        self.model, self.rows, self.padded, self.cache = model, rows, padded, new_cache(model)
        ids, self.mask = pad(rows, "left", model.device)
        self.cached: list[Tensor] = []
        self.expected: list[Tensor] = []
        self._forward(ids.masked_fill(self.mask == 0, rows[0][0]))

    def _forward(self, ids: Tensor) -> None:
        inputs = model_inputs(self.model, ids, self.mask) if self.padded else {"input_ids": ids}
        self.cached.append(cached_logits(self.model, inputs, self.cache))
        self.expected += [plain_outputs(self.model, [row])[0, -1:] for row in self.rows]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)
        self.rows = [row for row in self.rows for _ in range(times)]

    def select(self, kept: list[int]) -> None:
        at = torch.tensor(kept, device=self.mask.device)
        self.cache.batch_select_indices(at)
        self.mask, self.rows = self.mask[at], [self.rows[i] for i in kept]

    def step(self) -> None:
        """Append a different token to every row."""
        tokens = [token(self.model, 11 * i + 5 * len(self.cached)) for i in range(len(self.rows))]
        self.rows = [[*row, new] for row, new in zip(self.rows, tokens, strict=True)]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self._forward(torch.tensor(tokens, device=self.mask.device)[:, None])

    def restart_first(self) -> None:
        """Start another row of two tokens in place of the first one, its old slots masked; append a token to the others."""
        fresh = [[token(self.model, 7 * i + j) for j in range(2 if i == 0 else 1)] for i in range(len(self.rows))]
        ids, mask = pad(fresh, "left", self.mask.device)
        self.mask[0] = 0
        self.mask = torch.cat([self.mask, mask], 1)
        self.rows = [fresh[0], *([*row, *new] for row, new in zip(self.rows[1:], fresh[1:], strict=True))]
        self._forward(ids.masked_fill(mask == 0, self.rows[0][0]))

    def agrees(self) -> bool:
        return agree(list(torch.cat(self.cached)[:, None]), self.expected)


_skips: Verdicts = WeakKeyDictionary()


def skips_hidden_slots(model: PreTrainedModel) -> bool:
    """Return whether a cache may hold masked slots in the middle of a row (those of an episode that has ended).

    Models that count positions by slots cannot, nor can those with sliding windows, which a short trial would not show.
    """
    able = takes_left_padding(model) and decodes_with_cache(model) and describable(model.base_model)
    return able and passes_once(model, _skips, _passes_trial_with_gaps)


def _passes_trial_with_gaps(model: PreTrainedModel) -> bool:
    decoded = _Decoded(model, trial_rows(model), padded=True)
    decoded.step()
    decoded.restart_first()
    decoded.step()
    return decoded.agrees()
