"""Decoding of many responses to each of some prompts, whose keys and values are there once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_env.lm.capabilities import Verdicts, agree, passes_once, plain_outputs, token, trial_rows
from llm_env.lm.inputs import model_inputs, only_last, pad
from llm_env.lm.shared_prompt import PackedRows, attention_by, scores_of, weights_of, window_of

BLOCK = 64  # tokens by which the responses' keys and values get more room
COMPACT = 0.8  # rows are moved together when at most this share of the slots is left by it
COMPACT_GRAPH = 0.5  # likewise, where a CUDA graph has to be captured again

Cached = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer


class SharedDecoding:
    """Responses that are under way, in slots (N, G): up to G responses to each of N prompts.

    On CUDA shapes are static, but for growth and compaction, and a step is a CUDA graph (not measured).

    Args:
        model: a causal language model whose body `shares_prompts`.
        group_size: G.
        static: whether a step computes all W tokens for which there is room, under a mask, so that its shapes stay; by default
            on CUDA.

    Attributes:
        rows: (N, G) int64, the number of the response in a slot, -1 where a slot is empty.
        ages: (N, G) int64, how many tokens of the response have been computed.
        lengths: (N,) int64, tokens of the prompts.
        prompts: (N, K, D, P) and (N, K, P, D), padded on the left: keys lie in memory as they are multiplied with.
        own: (2, N, K, G, W, D) by layer, the responses' keys and values, with room for W tokens.
    """

    refills = True  # responses may begin while others are under way

    def __init__(self, model: PreTrainedModel, group_size: int, static: bool | None = None) -> None:
        self.model, self.group_size, self.begun = model, group_size, 0
        self.captures = model.device.type == "cuda"
        self.static = self.captures if static is None else static
        self._clear()

    def _clear(self) -> None:
        self.rows = torch.empty(0, self.group_size, dtype=torch.int64, device=self.model.device)
        self.ages, self.lengths = self.rows.clone(), self.rows[:, 0].clone()
        self.prompts: Cached = {}
        self.own: dict[int, Tensor] = {}
        self.oldest = 0
        self.even = True  # all responses have that age
        self._hidden: Tensor | None = None
        self._ahead: Tensor | None = None
        self._graph: CapturedStep | None = None

    @property
    def reach(self) -> int:
        """The largest distance between two positions that see each other."""
        return next(iter(self.prompts.values()))[1].shape[2] + self.oldest

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin responses to n more prompts, numbered from the last on: logits (n * G, V) of their first tokens."""
        ids, mask = pad(prompts, "left", self.model.device)
        packed = PackedRows(mask.bool(), kept={})
        inputs = model_inputs(self.model, ids, mask)
        with attention_by(self.model, packed):
            logits = (
                self.model(**inputs, **only_last(self.model, 1), use_cache=False)
                .logits[:, -1]
                .repeat_interleave(self.group_size, 0)
            )
        assert packed.kept is not None
        rows = self.begun + torch.arange(len(logits), device=ids.device).view(-1, self.group_size)
        self.begun += len(logits)
        self._join(rows, mask.sum(1), packed.kept)
        return logits

    def _join(self, rows: Tensor, lengths: Tensor, prompts: Cached) -> None:
        """Put n prompts and their responses, of age 0, below those that are there."""
        self.oldest = int(self.ages.max()) if self.own else 0
        self.even = self.oldest == 0 and not self.static
        self._graph = None
        self.rows = torch.cat([widened(self.rows, 1, self.group_size, value=-1), rows])
        self.ages = torch.cat([widened(self.ages, 1, self.group_size), torch.zeros_like(rows)])
        self.lengths = torch.cat([self.lengths, lengths])
        width = max(int(self.lengths.max()), next(iter(self.prompts.values()))[1].shape[2] if self.prompts else 0)
        for layer, (keys, values) in prompts.items():
            keys, values = widened(keys.transpose(-1, -2), 3, -width), widened(values, 2, -width)
            if layer in self.prompts:
                old_keys, old_values = self.prompts[layer]
                keys = torch.cat([widened(old_keys, 3, -width), keys])
                values = torch.cat([widened(old_values, 2, -width), values])
            self.prompts[layer] = keys.contiguous(), values.contiguous()
        for layer, own in self.own.items():
            own[..., self.oldest :, :] = 0
            self.own[layer] = widened(widened(own, 3, self.group_size), 1, len(self.rows))
        padding = torch.arange(width, device=rows.device) < width - self.lengths[:, None]
        self._hidden = (
            torch.zeros(padding.shape, device=rows.device).masked_fill(padding, -torch.inf) if padding.any() else None
        )

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after the next token of each response that is left, `tokens` (R,), in the order of their numbers."""
        filled = self.rows >= 0
        ids = torch.zeros_like(self.rows).masked_scatter(filled, tokens)
        self._make_room()
        if self.captures and self._graph is None:
            self._graph = CapturedStep(self._forward, ids)
        logits = self._forward(ids) if self._graph is None else self._graph(ids)
        self.ages += filled
        self.oldest += 1
        return logits.flatten(0, 1) if len(tokens) == ids.numel() else logits[filled]

    def _make_room(self) -> None:
        """Room for one more token of every response."""
        width = next(iter(self.own.values())).shape[4] if self.own else 0
        if width > self.oldest:
            return
        for layer, (_, values) in self.prompts.items():
            n, kinds, _, d = values.shape
            more = values.new_empty(2, n, kinds, self.rows.shape[1], max(BLOCK, width), d)
            if not self.even:  # what is hidden by a mask is multiplied with 0, and has to be a number
                more.zero_()
            self.own[layer] = torch.cat([self.own[layer], more], 4) if width else more
        self._graph = None

    @property
    def _width(self) -> int:
        """How many of a response's own tokens a step looks at."""
        return next(iter(self.own.values())).shape[4] if self.static else self.oldest + 1

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits (N, G, V) after the tokens `ids` (N, G)."""
        if not self.even:
            ahead = torch.arange(self._width, device=ids.device) > self.ages[..., None]  # (N, G, W)
            self._ahead = torch.zeros(ahead.shape, device=ids.device).masked_fill(ahead, -torch.inf)[:, None, :, None]
        with attention_by(self.model, self):
            return self.model(input_ids=ids, position_ids=self.lengths[:, None] + self.ages, use_cache=False).logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Each of the G positions of a row is a response's next token: it attends to the prompt and to its own past."""
        (n, heads, g, d), kinds = query.shape, key.shape[1]
        prompt_keys, prompt_values = self.prompts[layer]
        p, repeats = prompt_keys.shape[3], heads // kinds
        own_keys, own_values = self._remember(layer, key, value)
        query = query.view(n, kinds, repeats, g, d).transpose(2, 3)
        to_prompt = scores_of(query.reshape(n, kinds, g * repeats, d), prompt_keys.transpose(-1, -2), softcap)
        if self._hidden is not None:
            to_prompt = to_prompt + self._hidden[:, None, None].to(to_prompt.dtype)
        to_own = scores_of(query, own_keys, softcap)
        if self._ahead is not None:
            to_own = to_own + self._ahead.to(to_own.dtype)
        weights = weights_of(to_prompt.view(n, kinds, g, repeats, p), to_own)
        mixed = (weights[..., :p].reshape(n, kinds, g * repeats, p) @ prompt_values).view(n, kinds, g, repeats, d)
        mixed = mixed + weights[..., p:] @ own_values
        return mixed.transpose(2, 3).reshape(n, heads, g, d)

    def _remember(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Add the new tokens' keys and values, (N, K, G, D) each, to the responses' own: those so far, (2, N, K, G, W, D)."""
        own = self.own[layer]
        if self.even:
            own[0, :, :, :, self.oldest], own[1, :, :, :, self.oldest] = key, value
        else:
            n, g = (torch.arange(size, device=key.device) for size in self.ages.shape)
            at = n[:, None], slice(None), g, self.ages
            own[0][at], own[1][at] = key.transpose(1, 2), value.transpose(1, 2)
        return own[..., : self._width, :]

    def keep(self, numbers: Tensor) -> None:
        """Go on with these responses only, (R,) int64 in ascending order; rows move together where that saves enough."""
        left = torch.isin(self.rows, numbers)
        self.rows = self.rows.masked_fill(~left, -1)
        counts = left.sum(1)
        prompts, width = (counts > 0).nonzero()[:, 0], int(counts.max())
        if width == 0:
            return self._clear()
        if len(prompts) * width > (COMPACT_GRAPH if self.captures else COMPACT) * self.rows.numel():
            return
        self._graph = None
        order = left[prompts].to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        self.rows, self.ages = self.rows[prompts].gather(1, order), self.ages[prompts].gather(1, order)
        self.lengths = self.lengths[prompts]
        self._hidden = None if self._hidden is None else self._hidden[prompts]
        self.prompts = {layer: (k[prompts], v[prompts]) for layer, (k, v) in self.prompts.items()}
        kinds = torch.arange(next(iter(self.prompts.values()))[1].shape[1], device=prompts.device)
        at = (slice(None), prompts[:, None, None], kinds[None, :, None], order[:, None])
        self.own = {layer: own[at] for layer, own in self.own.items()}


_decodes: Verdicts = WeakKeyDictionary()


def decodes_shared(model: PreTrainedModel) -> bool:
    """Whether `SharedDecoding` gives what plain forward passes give; found out by a trial, once a model.

    A body that shares prompts is not enough: a language model around it may take no positions (Whisper).
    """
    return passes_once(model, _decodes, _passes_trial)


def _passes_trial(model: PreTrainedModel) -> bool:
    window = window_of(model.base_model)
    first, second, third = trial_rows(model, short=window is not None and window < 32)
    decoding = SharedDecoding(model, 2)
    decoding.captures = False
    found, rows = [decoding.add([first, second])], [first, first, second, second]
    expected = [plain_outputs(model, [row])[0, -1:] for row in rows]

    def step() -> None:
        tokens = [token(model, 11 * i + 5 * len(found)) for i in range(len(rows))]
        rows[:] = [[*row, new] for row, new in zip(rows, tokens, strict=True)]
        found.append(decoding(torch.tensor(tokens, device=model.device)))
        expected.extend(plain_outputs(model, [row])[0, -1:] for row in rows)

    step()
    rows[:] = [rows[0], *rows[2:]]
    decoding.keep(torch.tensor([0, 2, 3], device=model.device))
    step()
    found.append(decoding.add([third]))
    rows += [third, third]
    expected += [plain_outputs(model, [row])[0, -1:] for row in rows[-2:]]
    step()
    return agree(list(torch.cat(found)[:, None]), expected)


class CapturedStep:
    """A function of token ids (N, G) as a CUDA graph, which is launched at once in the place of some hundred kernels.

    What the function reads besides must stay in its place in memory.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], ids: Tensor) -> None:
        self.ids = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self.ids)  # libraries set themselves up, which cannot be captured; it writes what the first step will
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = function(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """The function's value, which the next call overwrites."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def widened(table: Tensor, dim: int, size: int, value: int = 0) -> Tensor:
    """A table with more entries along one dimension, `size` in all, after those that are there, or before them if negative."""
    more = abs(size) - table.shape[dim]
    if more == 0:
        return table
    sides = (more, 0) if size < 0 else (0, more)
    return nn.functional.pad(table, (0, 0) * (table.ndim - 1 - dim) + sides, value=value)
