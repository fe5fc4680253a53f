"""Whether a model's logits over transformers' cache are those of plain forward passes: found out by a trial, once a model."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

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


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache of the kinds of layers that the model's config names."""
    return DynamicCache(config=model.config)


def cached_logits(model: PreTrainedModel, inputs: dict[str, Tensor], cache: DynamicCache) -> Tensor:
    """Logits (B, V) after the last of the new tokens `inputs["input_ids"]` (B, n), whose keys and values join the cache.

    The mask, if there is one, covers the cache's slots as well; so may the positions, of which the last n are taken.
    """
    if "position_ids" in inputs:
        inputs = {**inputs, "position_ids": inputs["position_ids"][:, -inputs["input_ids"].shape[1] :]}
    return model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]


@torch.no_grad()
def plain_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits (B, V) after each of B rows, which are computed as a whole, padded on the right."""
    ids, lengths = pad_with_tokens(rows, model.device), torch.tensor([len(row) for row in rows], device=model.device)
    last = only_last(model, ids.shape[1] - min(map(len, rows)) + 1)
    outputs = model(input_ids=ids, **last, **without_cache(model)).logits
    return outputs[torch.arange(len(rows), device=ids.device), lengths - 1 - (ids.shape[1] - outputs.shape[1])]


_decodes: Verdicts = WeakKeyDictionary()


def decodes_with_cache(model: PreTrainedModel) -> bool:
    """Whether rows can be decoded over a `DynamicCache`, and repeated and selected in it; found out by a trial.

    They are padded on the left where the model takes that, and of one length, without a mask, where it does not. Models with
    states or caches of their own (MiniMax) cannot, nor can those without any (GPT-1).

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
    """Rows under way, and what the cache and plain forward passes say of each next token."""

    def __init__(self, model: PreTrainedModel, rows: list[list[int]], padded: bool) -> None:
        self.model, self.rows, self.padded, self.cache = model, rows, padded, new_cache(model)
        ids, self.mask = pad(rows, "left", model.device)
        self.found: list[Tensor] = []
        self.expected: list[Tensor] = []
        self._forward(ids.masked_fill(self.mask == 0, rows[0][0]))

    def _forward(self, ids: Tensor) -> None:
        inputs = model_inputs(self.model, ids, self.mask) if self.padded else {"input_ids": ids}
        self.found.append(cached_logits(self.model, inputs, self.cache))
        self.expected += [plain_outputs(self.model, [row])[0, -1:] for row in self.rows]

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self.mask = self.mask.repeat_interleave(times, 0)
        self.rows = [row for row in self.rows for _ in range(times)]

    def select(self, left: list[int]) -> None:
        at = torch.tensor(left, device=self.mask.device)
        self.cache.batch_select_indices(at)
        self.mask, self.rows = self.mask[at], [self.rows[i] for i in left]

    def step(self) -> None:
        """One more token in every row, another one in each."""
        tokens = [token(self.model, 11 * i + 5 * len(self.found)) for i in range(len(self.rows))]
        self.rows = [[*row, new] for row, new in zip(self.rows, tokens, strict=True)]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self._forward(torch.tensor(tokens, device=self.mask.device)[:, None])

    def begin_anew(self) -> None:
        """In the first row two tokens of another one, whose old slots are hidden, and in the others one more each."""
        fresh = [[token(self.model, 7 * i + j) for j in range(2 if i == 0 else 1)] for i in range(len(self.rows))]
        ids, mask = pad(fresh, "left", self.mask.device)
        self.mask[0] = 0
        self.mask = torch.cat([self.mask, mask], 1)
        self.rows = [fresh[0], *([*row, *new] for row, new in zip(self.rows[1:], fresh[1:], strict=True))]
        self._forward(ids.masked_fill(mask == 0, self.rows[0][0]))

    def agrees(self) -> bool:
        return agree(list(torch.cat(self.found)[:, None]), self.expected)


_skips: Verdicts = WeakKeyDictionary()


def skips_hidden_slots(model: PreTrainedModel) -> bool:
    """Whether a cache may hold slots in the middle of a row that the mask hides, where an episode was over.

    Positions that are counted by the slot do not allow for it, nor do windows, of which those that the model hides would not
    show in a trial.
    """
    able = takes_left_padding(model) and decodes_with_cache(model) and describable(model.base_model)
    return able and passes_once(model, _skips, _passes_trial_with_gaps)


def _passes_trial_with_gaps(model: PreTrainedModel) -> bool:
    decoded = _Decoded(model, trial_rows(model), padded=True)
    decoded.step()
    decoded.begin_anew()
    decoded.step()
    return decoded.agrees()
