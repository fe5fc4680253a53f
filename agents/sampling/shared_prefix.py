"""Decode many responses to each prompt with the prompt's keys and values stored once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from agents.sampling.decode_kernel import attend_slots, runs_on
from llm_env.lm.capabilities import Verdicts, agree, passes_once, plain_outputs, token, trial_rows
from llm_env.lm.compiling import compiled_layers
from llm_env.lm.inputs import model_inputs, only_last, pad
from llm_env.lm.shared_prompt import PackedRows, attention_by, scores_of, weights_of, window_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 64  # tokens for which the responses' cache is first allocated; it doubles when full
BLOCK_GRAPH = 256  # the same, if a CUDA graph has to be captured again whenever it grows
COMPACT = 0.8  # slots are compacted if at most this share of them remains
COMPACT_GRAPH = 0.5  # the same, if a CUDA graph has to be captured again
CAPTURE_AFTER = 4  # steps: capturing costs two, which very short responses would not earn back

LayerCaches = dict[int, tuple[Tensor, Tensor]]  # keys and values by layer


class SharedDecoding:
    """Decodes up to G responses to each of N prompts, in slots (N, G).

    On CUDA the shapes are static between growth and compaction, a step is a CUDA graph, and attention is one Triton kernel (see
    `agents.sampling.decode_kernel`). Which slots are in use is known on the host, so that a step waits for no result.

    Args:
        model: a causal language model whose body `supports_sharing`.
        group_size: G.
        static: compute all W allocated tokens in a step, under a mask, so that shapes are static; by default on CUDA.
        captures: capture a step as a CUDA graph, which needs static shapes; by default on CUDA.
        fused: compute attention by the Triton kernel; by default where it runs.
        compile_layers: compile the model's layers, see `llm_env.lm.compiling`.

    Attributes:
        num_started: responses so far; the next ones are numbered from here.
        slot_ids: (N, G) int64 on the CPU, the number of the response in each slot, -1 for an empty slot.
        counts: (N, G) int64 on the CPU, tokens of each response whose keys and values are stored.
        num_generated: `counts` on the model's device.
        lengths: (N,) int64 on the model's device, tokens of the prompts.
        prompts: (N, K, D, P) keys and (N, K, P, D) values by layer, padded on the left; keys are stored transposed, as they are
            multiplied.
        response_kv: (2, N, K, G, W, D) by layer, keys and values of the responses, allocated for W tokens.
        max_generated: the largest of `num_generated`.
        same_length: whether all responses have as many tokens.
    """

    refills = True  # prompts may be added before all responses have ended

    def __init__(
        self,
        model: PreTrainedModel,
        group_size: int,
        *,
        static: bool | None = None,
        captures: bool | None = None,
        fused: bool | None = None,
        compile_layers: bool = False,
    ) -> None:
        self.model, self.group_size, self.num_started = model, group_size, 0
        is_cuda = model.device.type == "cuda"
        self.static = is_cuda if static is None else static
        self.captures = is_cuda if captures is None else captures
        self.fused = runs_on(model) if fused is None else fused
        self.compiled = [model] if compile_layers else []
        self._num_steps = 0
        self._clear()

    def _clear(self) -> None:
        self.slot_ids = torch.empty(0, self.group_size, dtype=torch.int64)
        self.counts = self.slot_ids.clone()
        self.num_generated = self.counts.to(self.model.device)
        self.lengths = self.num_generated[:, 0].clone()
        self.prompts: LayerCaches = {}
        self.response_kv: dict[int, Tensor] = {}
        self.max_generated = 0
        self.same_length = True
        self._longest_prompt = 0
        self._filled: Tensor | None = None  # (R,) int64, the filled slots of N * G; None if all are
        self._prompt_bias: Tensor | None = None  # (N, P), -inf at padding
        self._future_bias: Tensor | None = None  # (N, 1, G, 1, W), -inf at tokens that are not generated yet
        self._graph: CapturedStep | None = None

    @property
    def max_distance(self) -> int:
        """The largest distance between a token and one that it attends to."""
        return next(iter(self.prompts.values()))[1].shape[2] + self.max_generated

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start the responses to n more prompts; return the logits (n * G, V) of their first tokens."""
        ids, mask = pad(prompts, "left", self.model.device)
        packed = PackedRows(mask.bool(), kept={}, lengths=[len(prompt) for prompt in prompts])
        inputs = model_inputs(self.model, ids, mask)
        with attention_by(self.model, packed):
            logits = (
                self.model(**inputs, **only_last(self.model, 1), use_cache=False)
                .logits[:, -1]
                .repeat_interleave(self.group_size, 0)
            )
        assert packed.kept is not None
        slot_ids = self.num_started + torch.arange(len(logits)).view(-1, self.group_size)
        self.num_started += len(logits)
        self._append(slot_ids, torch.tensor([len(prompt) for prompt in prompts]), packed.kept)
        return logits

    def _append(self, slot_ids: Tensor, lengths: Tensor, prompts: LayerCaches) -> None:
        """Append n prompts of `lengths` (n,) tokens, and slots for their responses."""
        device = self.model.device
        self.max_generated = int(self.counts.max()) if self.response_kv else 0
        self._mask_lengths()
        self.same_length = self.max_generated == 0 and not self.static
        self.slot_ids = torch.cat([widened(self.slot_ids, 1, self.group_size, value=-1), slot_ids])
        self.counts = torch.cat([widened(self.counts, 1, self.group_size), torch.zeros_like(slot_ids)])
        self.num_generated, self._filled = self.counts.to(device), _filled_slots(self.slot_ids, device)
        known = self._prompt_bias is not None
        old = self._longest_prompt
        self._longest_prompt = max(int(lengths.max()), old)
        is_padded = known or (old not in (0, self._longest_prompt)) or int(lengths.min()) < self._longest_prompt
        self.lengths = torch.cat([self.lengths, lengths.to(device)])
        width = max(self._longest_prompt, next(iter(self.prompts.values()))[1].shape[2] if self.prompts else 0)
        for layer, (keys, values) in prompts.items():
            keys, values = widened(keys.transpose(-1, -2), 3, -width), widened(values, 2, -width)
            if layer in self.prompts:
                old_keys, old_values = self.prompts[layer]
                keys = torch.cat([widened(old_keys, 3, -width), keys])
                values = torch.cat([widened(old_values, 2, -width), values])
            self.prompts[layer] = self._laid_out(keys), values.contiguous()
        for layer, kv in self.response_kv.items():
            self.response_kv[layer] = widened(widened(kv, 3, self.group_size), 1, len(self.slot_ids))
        padding = torch.arange(width, device=device) < width - self.lengths[:, None]
        self._prompt_bias = torch.zeros(padding.shape, device=device).masked_fill(padding, -torch.inf) if is_padded else None

    def _laid_out(self, keys: Tensor) -> Tensor:
        """Lay out the prompts' keys (N, K, D, P) as they are read: token by token by the kernel, else in rows."""
        return keys.transpose(-1, -2).contiguous().transpose(-1, -2) if self.fused else keys.contiguous()

    def __call__(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Append a token to each remaining response, or to some.

        Args:
            tokens: (R,), in the order of the responses' numbers.
            active: int64 on the CPU, the numbers of the responses to append to; all by default. The others are computed, but
                nothing of it is kept.

        Returns:
            The logits (R, V) of the next tokens, in the same order; those of others than `active` mean nothing.
        """
        if active is not None and self.same_length:
            self._mask_lengths()
        ids = tokens.view(self.slot_ids.shape) if self._filled is None else self._of_slots(tokens)
        self._allocate()
        if self.captures and self._graph is None and self._num_steps >= CAPTURE_AFTER:
            self._graph = CapturedStep(self._forward, ids)
        self._num_steps += 1
        logits = (self._forward(ids) if self._graph is None else self._graph(ids)).flatten(0, 1)
        self._count(self.slot_ids >= 0 if active is None else torch.isin(self.slot_ids, active))
        return logits if self._filled is None else logits[self._filled]

    def _of_slots(self, values: Tensor) -> Tensor:
        """Put one value (R,) a response into its slot; return (N, G), 0 in empty slots."""
        table = values.new_zeros(self.slot_ids.numel())
        table[self._filled] = values
        return table.view(self.slot_ids.shape)

    def _count(self, added: Tensor) -> None:
        """Add the numbers of new tokens (N, G), on the CPU, to `counts` and `num_generated`."""
        self.counts += added
        self.max_generated = int(self.counts.max())
        self.num_generated.copy_(self.counts, non_blocking=True)  # in place: a captured graph reads it

    def extend(self, slot_ids: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append several tokens to each of some responses, in one pass.

        Args:
            slot_ids: (R,) int64 on the CPU, their numbers in ascending order.
            tokens: R lists of token ids, at least one each.

        Returns:
            The logits (R, V) of their next tokens.
        """
        device = self.model.device
        counts = torch.tensor([len(row) for row in tokens])
        chosen, filled = torch.isin(self.slot_ids, slot_ids), self.slot_ids >= 0
        most = int(counts.max())
        if self.same_length and not (torch.equal(chosen, filled) and int(counts.min()) == most):
            self._mask_lengths()
        self._allocate(most)
        prompts, width = chosen.any(1).nonzero()[:, 0], int(chosen.sum(1).max())
        order = chosen[prompts].to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        kept = chosen[prompts].gather(1, order)
        grid = torch.zeros(*order.shape, most, dtype=torch.int64)
        grid[kept] = pad(tokens, "left", grid.device)[0]
        counted = torch.zeros_like(order).masked_scatter(kept, counts)
        is_whole = order.shape == chosen.shape and bool((order == torch.arange(width)).all())
        extension = _Extension(self, prompts.to(device), order.to(device), counted.to(device), most, is_whole)
        at = torch.arange(most - 1, width * most, most, device=device)  # the last token of each slot
        with attention_by(self.model, extension):
            logits = self.model(
                input_ids=grid.flatten(1).to(device),
                position_ids=extension.position_ids().flatten(1),
                use_cache=False,
                **only_last(self.model, at),
            ).logits
        if logits.shape[1] != width:
            logits = logits[:, at]
        self._count(torch.zeros_like(self.counts).masked_scatter(chosen, counts))
        return logits.flatten(0, 1)[kept.flatten().nonzero()[:, 0].to(device)]

    def _mask_lengths(self) -> None:
        """Let responses have different numbers of tokens from here on."""
        self.same_length, self._graph = False, None
        for kv in self.response_kv.values():
            kv[..., self.max_generated :, :] = 0  # masked values are multiplied with 0: they must not be NaN

    def _allocate(self, count: int = 1) -> None:
        """Allocate the cache of the responses for at least `count` more tokens."""
        width = next(iter(self.response_kv.values())).shape[4] if self.response_kv else 0
        if width >= self.max_generated + count:
            return
        size = max(BLOCK_GRAPH if self.captures else BLOCK, width, self.max_generated + count - width)
        for layer, (_, values) in self.prompts.items():
            n, num_kv_heads, _, d = values.shape
            more = values.new_empty(2, n, num_kv_heads, self.slot_ids.shape[1], size, d)
            if not self.same_length:  # masked values are multiplied with 0: they must not be NaN
                more.zero_()
            self.response_kv[layer] = torch.cat([self.response_kv[layer], more], 4) if width else more
        self._graph = None

    @property
    def _width(self) -> int:
        """How many response tokens a step attends to."""
        return next(iter(self.response_kv.values())).shape[4] if self.static else self.max_generated + 1

    def _forward(self, ids: Tensor) -> Tensor:
        """Compute the logits (N, G, V) after the tokens `ids` (N, G)."""
        if not (self.same_length or self.fused):
            future = torch.arange(self._width, device=ids.device) > self.num_generated[..., None]  # (N, G, W)
            bias = torch.zeros(future.shape, device=ids.device).masked_fill(future, -torch.inf)
            self._future_bias = bias[:, None, :, None]
        with attention_by(self.model, self), compiled_layers(self.compiled):
            return self.model(input_ids=ids, position_ids=self.lengths[:, None] + self.num_generated, use_cache=False).logits

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Compute the attention of each response's next token over the prompt and the response's earlier tokens.

        Args:
            layer: number of the layer.
            query: (N, H, G, D).
            key: (N, K, G, D), for K key-value heads.
            value: (N, K, G, D).
            softcap: caps the scores; None for no cap.

        Returns:
            (N, H, G, D).
        """
        (n, heads, g, d), num_kv_heads = query.shape, key.shape[1]
        prompt_keys, prompt_values = self.prompts[layer]
        if self.fused and not self.same_length:
            caches = prompt_keys, prompt_values, self.response_kv[layer]
            return attend_slots(query, key, value, caches, self.lengths, self.num_generated, softcap)
        p, num_kv_groups = prompt_keys.shape[3], heads // num_kv_heads
        response_keys, response_values = self._store(layer, key, value)
        query = query.view(n, num_kv_heads, num_kv_groups, g, d).transpose(2, 3)
        to_prompt = scores_of(query.reshape(n, num_kv_heads, g * num_kv_groups, d), prompt_keys.transpose(-1, -2), softcap)
        if self._prompt_bias is not None:
            to_prompt = to_prompt + self._prompt_bias[:, None, None].to(to_prompt.dtype)
        to_response = scores_of(query, response_keys, softcap)
        if self._future_bias is not None:
            to_response = to_response + self._future_bias.to(to_response.dtype)
        weights = weights_of(to_prompt.view(n, num_kv_heads, g, num_kv_groups, p), to_response)
        mixed = weights[..., :p].reshape(n, num_kv_heads, g * num_kv_groups, p) @ prompt_values
        mixed = mixed.view(n, num_kv_heads, g, num_kv_groups, d) + weights[..., p:] @ response_values
        return mixed.transpose(2, 3).reshape(n, heads, g, d)

    def _store(self, layer: int, key: Tensor, value: Tensor) -> Tensor:
        """Store new keys and values, (N, K, G, D) each; return those of all response tokens so far, (2, N, K, G, W, D)."""
        kv = self.response_kv[layer]
        if self.same_length:
            kv[0, :, :, :, self.max_generated], kv[1, :, :, :, self.max_generated] = key, value
        else:
            n, g = (torch.arange(size, device=key.device) for size in self.num_generated.shape)
            at = n[:, None], slice(None), g, self.num_generated
            kv[0][at], kv[1][at] = key.transpose(1, 2), value.transpose(1, 2)
        return kv[..., : self._width, :]

    def retain(self, slot_ids: Tensor) -> None:
        """Drop all responses except these, (R,) int64 on the CPU; slots are compacted where that saves enough."""
        device, kept = self.model.device, torch.isin(self.slot_ids, slot_ids)
        self.slot_ids = self.slot_ids.masked_fill(~kept, -1)
        per_prompt = kept.sum(1)
        prompts, width = (per_prompt > 0).nonzero()[:, 0], int(per_prompt.max())
        if width == 0:
            return self._clear()
        if len(prompts) * width > (COMPACT_GRAPH if self.captures else COMPACT) * self.slot_ids.numel():
            self._filled = _filled_slots(self.slot_ids, device)
            return
        self._graph = None
        order = kept[prompts].to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
        self.slot_ids = self.slot_ids[prompts].gather(1, order)
        self.counts = self.counts[prompts].gather(1, order)
        self.num_generated, self._filled = self.counts.to(device), _filled_slots(self.slot_ids, device)
        prompts, order = prompts.to(device), order.to(device)
        self.lengths = self.lengths[prompts]
        self._prompt_bias = None if self._prompt_bias is None else self._prompt_bias[prompts]
        self.prompts = {layer: (self._laid_out(k[prompts]), v[prompts]) for layer, (k, v) in self.prompts.items()}
        kv_heads = torch.arange(next(iter(self.prompts.values()))[1].shape[1], device=device)
        at = (slice(None), prompts[:, None, None], kv_heads[None, :, None], order[:, None])
        self.response_kv = {layer: kv[at] for layer, kv in self.response_kv.items()}


def _filled_slots(slot_ids: Tensor, device: torch.device) -> Tensor | None:
    """Return the indices (R,) of the slots in use, on a device; None if all are."""
    filled = slot_ids.flatten() >= 0
    return None if filled.all() else filled.nonzero()[:, 0].to(device)


@dataclass
class _Extension:
    """Attention of several new tokens in each of some slots, over the prompt, the response so far and each other.

    Attributes:
        decoding: holds the caches.
        prompts: (n,) the prompts of these slots.
        order: (n, g) the slots of each prompt; some may be others, whose tokens are ignored.
        counts: (n, g) number of new tokens, the last ones of T; 0 in slots that are ignored.
        size: T.
        is_whole: whether these are all slots, in their order.
    """

    decoding: SharedDecoding
    prompts: Tensor
    order: Tensor
    counts: Tensor
    size: int
    is_whole: bool

    def __post_init__(self) -> None:
        before = self.decoding.num_generated[self.prompts].gather(1, self.order)[..., None]
        step, padding = torch.arange(self.size, device=before.device), self.size - self.counts[..., None]
        is_new = step >= padding
        self._last = before + torch.where(is_new, step - padding, 0)  # (n, g, T), the last token that is seen
        # Padding is stored behind the new tokens, where the next ones overwrite it before they are seen.
        self._store_at = before + torch.where(is_new, step - padding, self.counts[..., None] + step)
        self._width = self.decoding.max_generated + self.size
        unseen = torch.arange(self._width, device=before.device) > self._last[..., None]
        self._bias = torch.zeros(unseen.shape, device=before.device).masked_fill(unseen, -torch.inf)  # (n, g, T, W)

    @property
    def max_distance(self) -> int:
        """The largest distance between a token and one that it attends to."""
        return self.decoding.max_distance + self.size

    def position_ids(self) -> Tensor:
        """Return (n, g, T) int64."""
        return self.decoding.lengths[self.prompts][:, None, None] + self._last

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, softcap: float | None) -> Tensor:
        """Store keys and values (n, K, g * T, D) each, and attend; see `SharedDecoding.attend`."""
        (n, heads, _, d), num_kv_heads, (_, g), t = query.shape, key.shape[1], self.order.shape, self.size
        num_kv_groups, kv = heads // num_kv_heads, self.decoding.response_kv[layer]
        at = self.prompts[:, None, None], slice(None), self.order[..., None], self._store_at
        for stored, new in zip(kv, (key, value), strict=True):
            stored[at] = new.view(n, num_kv_heads, g, t, d).permute(0, 2, 3, 1, 4)
        kv = kv[..., : self._width, :]
        prompt_keys, prompt_values = self.decoding.prompts[layer]
        bias = self.decoding._prompt_bias
        if not self.is_whole:
            kv_heads = torch.arange(num_kv_heads, device=kv.device)[None, :, None]
            kv = kv[:, self.prompts[:, None, None], kv_heads, self.order[:, None]]
        if len(self.prompts) < len(prompt_keys):
            prompt_keys, prompt_values = prompt_keys[self.prompts], prompt_values[self.prompts]
            bias = None if bias is None else bias[self.prompts]
        p = prompt_keys.shape[3]
        query = query.view(n, num_kv_heads, num_kv_groups, g, t, d).transpose(2, 3)  # (n, K, g, groups, T, D)
        to_prompt = scores_of(query.reshape(n, num_kv_heads, -1, d), prompt_keys.transpose(-1, -2), softcap)
        if bias is not None:
            to_prompt = to_prompt + bias[:, None, None].to(to_prompt.dtype)
        to_response = scores_of(query.flatten(3, 4), kv[0], softcap).view(n, num_kv_heads, g, num_kv_groups, t, -1)
        to_response = to_response + self._bias[:, None, :, None].to(to_response.dtype)
        weights = weights_of(to_prompt.view(n, num_kv_heads, g, num_kv_groups, t, p), to_response)
        mixed = (weights[..., :p].reshape(n, num_kv_heads, -1, p) @ prompt_values).view(query.shape)
        mixed = mixed + (weights[..., p:].flatten(3, 4) @ kv[1]).view(query.shape)
        return mixed.transpose(2, 3).reshape(n, heads, g * t, d)


_decodes: Verdicts = WeakKeyDictionary()


def decodes_shared(model: PreTrainedModel) -> bool:
    """Return whether `SharedDecoding` gives the logits of plain forward passes; by a trial, once a model.

    A body that shares prompts is not enough: the language model around it may take no positions (Whisper).
    """
    return passes_once(model, _decodes, _passes_trial)


def _passes_trial(model: PreTrainedModel) -> bool:
    window = window_of(model.base_model)
    first, second, third = trial_rows(model, short=window is not None and window < 32)
    decoding = SharedDecoding(model, 2, captures=False)
    logits, rows = [decoding.prefill([first, second])], [first, first, second, second]
    expected = [plain_outputs(model, [row])[0, -1:] for row in rows]

    def step() -> None:
        tokens = [token(model, 11 * i + 5 * len(logits)) for i in range(len(rows))]
        rows[:] = [[*row, new] for row, new in zip(rows, tokens, strict=True)]
        logits.append(decoding(torch.tensor(tokens, device=model.device)))
        expected.extend(plain_outputs(model, [row])[0, -1:] for row in rows)

    step()
    rows[:] = [rows[0], *rows[2:]]
    decoding.retain(torch.tensor([0, 2, 3]))
    step()
    logits.append(decoding.prefill([third]))
    rows += [third, third]
    expected += [plain_outputs(model, [row])[0, -1:] for row in rows[-2:]]
    step()
    added = [[token(model, 3 * i + 7 * row) for i in range(1 + row)] for row in (0, 2)]
    rows[0], rows[2] = [*rows[0], *added[0]], [*rows[2], *added[1]]
    numbers = decoding.slot_ids[decoding.slot_ids >= 0]
    logits.append(decoding.extend(numbers[[0, 2]], added))
    expected += [plain_outputs(model, [rows[i]])[0, -1:] for i in (0, 2)]
    step()
    return agree(list(torch.cat(logits)[:, None]), expected)


class CapturedStep:
    """A function of token ids captured as a CUDA graph: one launch instead of several hundred kernels.

    The other tensors that the function reads must keep their addresses.

    Args:
        function: from token ids (N, G) to logits (N, G, V).
        ids: (N, G), an example.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], ids: Tensor) -> None:
        self.ids = ids.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(self.ids)  # initializes libraries, which cannot be captured; the first step overwrites what it stores
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # An update may run in another thread meanwhile (`overlap`), which allocates memory and waits for the device.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits = function(self.ids)

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the function's value, in memory that the next call overwrites."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits


def widened(tensor: Tensor, dim: int, size: int, value: int = 0) -> Tensor:
    """Pad one dimension to abs(size) entries: at its end, or at its beginning if `size` is negative."""
    more = abs(size) - tensor.shape[dim]
    if more == 0:
        return tensor
    sides = (more, 0) if size < 0 else (0, more)
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + sides, value=value)
