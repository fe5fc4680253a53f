"""Decoding of many responses to each of some prompts, whose keys and values are there once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_env.scoring import model_inputs, pad
from llm_env.shared_prompt import PackedRows, attention_by, scores_of, weights_of

BLOCK = 64  # tokens by which the responses' keys and values get more room
COMPACT = 0.8  # rows are moved together when at most this share of the slots is left by it

Cached = tuple[Tensor, Tensor]  # keys and values


class SharedDecoding:
    """N prompts and, in slots (N, G), responses that go on from them, all of the same length so far.

    Args:
        model: a causal language model whose body `shares_prompts`.
        prompts: N lists of token ids.
        group_size: G.

    Attributes:
        logits: (N * G, V), of the first token of each response.
        rows: (N, G) int64, the number i * G + j of the response in a slot, -1 where a slot is empty.
    """

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], group_size: int) -> None:
        self.model = model
        ids, mask = pad(prompts, "left", model.device)
        packed = PackedRows(mask.bool(), kept={})
        inputs = model_inputs(model, ids, mask)
        last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        with attention_by(model, packed):
            self.logits = model(**inputs, **last, use_cache=False).logits[:, -1].repeat_interleave(group_size, 0)
        assert packed.kept is not None
        # In the order of memory in which they are multiplied with at every token.
        self.prompts = {layer: (k.transpose(-1, -2).contiguous(), v.contiguous()) for layer, (k, v) in packed.kept.items()}
        self.lengths = mask.sum(1)
        self.hidden = None if mask.all() else torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, -torch.inf)
        self.rows = torch.arange(len(prompts) * group_size, device=ids.device).view(len(prompts), group_size)
        self.full = True  # no slot is empty
        self.own: dict[int, Cached] = {}
        self.step = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after the next token of each response that is left, `tokens` (R,), in the order of their numbers."""
        filled = self.rows >= 0
        ids = torch.zeros_like(self.rows).masked_scatter(filled, tokens)
        positions = (self.lengths + self.step)[:, None].expand_as(ids)
        with attention_by(self.model, self):
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        self.step += 1
        return logits.flatten(0, 1) if self.full else logits[filled]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Each of the G positions of a row is a response's next token: it attends to the prompt and to its own past."""
        (n, heads, g, d), kinds, t = query.shape, key.shape[1], self.step
        prompt_keys, prompt_values = self.prompts[layer]  # (N, K, D, P) and (N, K, P, D)
        p, repeats = prompt_keys.shape[3], heads // kinds
        own_keys, own_values = self._room(layer, key)
        own_keys[:, :, :, t], own_values[:, :, :, t] = key, value
        query = query.view(n, kinds, repeats, g, d).transpose(2, 3)
        to_prompt = scores_of(query.reshape(n, kinds, g * repeats, d), prompt_keys.transpose(-1, -2), softcap)
        if self.hidden is not None:
            to_prompt = to_prompt + self.hidden[:, None, None].to(to_prompt.dtype)
        to_own = scores_of(query, own_keys[:, :, :, : t + 1], softcap)
        weights = weights_of(to_prompt.view(n, kinds, g, repeats, p), to_own)
        mixed = (weights[..., :p].reshape(n, kinds, g * repeats, p) @ prompt_values).view(n, kinds, g, repeats, d)
        mixed = mixed + weights[..., p:] @ own_values[:, :, :, : t + 1]
        return mixed.transpose(2, 3).reshape(n, heads, g, d)

    def _room(self, layer: int, key: Tensor) -> Cached:
        """The responses' keys and values, (N, K, G, at least step + 1, D) each."""
        if layer not in self.own or self.own[layer][0].shape[3] == self.step:
            n, kinds, g, d = key.shape
            keys, values = self.own.get(layer, (key.new_empty(n, kinds, g, 0, d),) * 2)
            more = key.new_empty(n, kinds, g, max(BLOCK, self.step), d)
            self.own[layer] = torch.cat([keys, more], 3), torch.cat([values, more], 3)
        return self.own[layer]

    def keep(self, numbers: Tensor) -> None:
        """Go on with these responses only, (R,) int64 in ascending order; rows move together where that saves enough."""
        left = torch.isin(self.rows, numbers)
        self.rows = self.rows.masked_fill(~left, -1)
        self.full = False
        counts = left.sum(1)
        prompts, width = (counts > 0).nonzero()[:, 0], int(counts.max())
        if len(prompts) * width > COMPACT * self.rows.numel():
            return
        order = left[prompts].to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        self.rows = self.rows[prompts].gather(1, order)
        self.lengths = self.lengths[prompts]
        self.hidden = None if self.hidden is None else self.hidden[prompts]
        self.prompts = {layer: (k[prompts], v[prompts]) for layer, (k, v) in self.prompts.items()}
        if not self.own:
            return
        kinds = torch.arange(next(iter(self.own.values()))[0].shape[1], device=prompts.device)
        at = (prompts[:, None, None], kinds[None, :, None], order[:, None])
        self.own = {layer: (k[at], v[at]) for layer, (k, v) in self.own.items()}
