"""Sampling from a causal language model over transformers' own cache: whole responses, or the next token of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from agents.caching import cached_logits, decodes_with_cache, new_cache, plain_logits, skips_hidden_slots
from agents.decoding import SharedDecoding, decodes_shared
from agents.sampler import Sampler
from llm_env.arguments import whole
from llm_env.constraints import TokenConstraint
from llm_env.lm.capabilities import takes_left_padding
from llm_env.lm.inputs import model_inputs, pad
from llm_env.lm.scoring import restrict
from llm_env.lm.sharing import PrefixSharing, shares_prompts

StopRule = Callable[[Sequence[int]], bool]


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampler: Sampler,
    *,
    vocab_size: int,
    eos_id: int | Collection[int],
    max_new_tokens: int | Sequence[int],
    group_size: int = 1,
    completes_stop: StopRule | None = None,
    constraint: TokenConstraint | None = None,
    max_num_seqs: int | None = None,
    prefix_sharing: PrefixSharing = "auto",
    numbers: Tensor | None = None,
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Draw `group_size` responses to every prompt.

    Each prompt is computed once for its group, and rows that have ended leave the batch.

    Args:
        model: any causal language model of transformers.
        prompts: N lists of token ids.
        sampler: draws a token.
        vocab_size: ids from here on are never drawn.
        eos_id: the end token, or several; the one that ends a response is part of it.
        max_new_tokens: the longest response, or that to each of the N prompts.
        group_size: G.
        completes_stop: whether the last token of a response completes a stop string.
        constraint: which tokens may come next.
        max_num_seqs: responses for which there is room at a time, at least G; a prompt that waits takes the place of one whose
            responses have all ended. All by default.
        prefix_sharing: whether a prompt's keys and values are held once for its responses: "auto" where the model can, True, or
            False.
        numbers: (N * G, the longest response, 1 or 2), by which tokens are drawn; see `Sampler.numbers`. New ones by default.

    Returns:
        N * G responses (lists of ids; those to prompt i at i*G..i*G+G-1) and the log-probs of their tokens in nats (float32).

    Raises:
        ValueError: `max_num_seqs`, `max_new_tokens` or `prefix_sharing` is unusable.
    """
    limits = response_limits(max_new_tokens, len(prompts)).repeat(whole("group_size", group_size, 1))
    places = len(prompts) if max_num_seqs is None else max_num_seqs // group_size
    if len(prompts) and places < 1:
        raise ValueError(
            f"max_num_seqs={max_num_seqs} has no room for a group of {group_size} responses; raise it to that at least"
        )
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    responses: list[list[int]] = [[] for _ in limits]
    logps: list[list[float]] = [[] for _ in limits]
    rows: list[int] = []  # under way
    logits = torch.empty(0, device=model.device)
    longest = max(map(len, prompts), default=0) + int(limits.max(initial=0))
    decoding = _decoding(model, group_size, longest, prefix_sharing)
    if numbers is None:
        numbers = sampler.numbers(len(limits), int(limits.max(initial=0)), vocab_size, model.device)
    begun = 0
    while begun < len(prompts) or rows:
        if waiting := len(prompts) - begun:
            free = min(places - len({row // group_size for row in rows}), waiting)
            # A few at a time: what is there is copied.
            if not rows or (decoding.refills and free >= max(1, min(places // 4, waiting))):
                first = decoding.add(prompts[begun : begun + free])
                logits = torch.cat([logits.reshape(-1, first.shape[-1]), first])
                rows = [*rows, *range(begun * group_size, (begun + free) * group_size)]
                begun += free
        allowed = None
        if constraint is not None:
            allowed = constraint.masks([(prompts[row // group_size], responses[row]) for row in rows])
        at = numbers[rows, [len(responses[row]) for row in rows]]
        tokens, logp = sampler(restrict(logits[:, :vocab_size], allowed), at)
        if not logp.isfinite().all():
            raise ValueError("the model's logits are not finite: its weights, or the update that made them, have gone wrong")
        for row, token, value in zip(rows, tokens.tolist(), logp.tolist(), strict=True):
            responses[row].append(token)
            logps[row].append(value)
        goes_on = [
            responses[row][-1] not in ends
            and len(responses[row]) < limits[row]
            and not (completes_stop is not None and completes_stop(responses[row]))
            for row in rows
        ]
        if not all(goes_on):
            rows = [row for row, more in zip(rows, goes_on, strict=True) if more]
            tokens = tokens[torch.tensor(goes_on, device=tokens.device)]
            decoding.keep(torch.tensor(rows, dtype=torch.int64, device=tokens.device))
        logits = decoding(tokens) if rows else logits[:0]
    return responses, [np.array(row, dtype=np.float32) for row in logps]


def _decoding(
    model: PreTrainedModel, group_size: int, longest: int, prefix_sharing: PrefixSharing
) -> SharedDecoding | PlainDecoding:
    """For prompts and responses of up to `longest` tokens together."""
    shares = prefix_sharing is not False and shares_prompts(model.base_model, longest) and decodes_shared(model)
    if prefix_sharing is True and not shares:
        raise ValueError(
            f"prefix_sharing=True, but {type(model).__name__} cannot decode several responses to one prompt of up to {longest} "
            "tokens together; set prefix_sharing='auto'"
        )
    return (SharedDecoding if shares else PlainDecoding)(model, group_size)


def response_limits(max_new_tokens: int | Sequence[int], count: int) -> np.ndarray:
    """The longest response to each of `count` prompts, (count,) int64."""
    limits = np.asarray(max_new_tokens)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (count,)) or (limits < 1).any():
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be a whole number of at least 1, or one for each of the {count} prompts"
        )
    return np.broadcast_to(limits, (count,))


class PlainDecoding:
    """What `SharedDecoding` does, for any model: a row a response, over transformers' own cache, or over none.

    Prompts of different lengths have caches of their own where the model takes no padding on the left.
    """

    refills = False

    def __init__(self, model: PreTrainedModel, group_size: int) -> None:
        self.model, self.group_size, self.begun = model, group_size, 0
        self.numbers: list[Tensor] = []  # of the responses, one tensor a part
        self.parts: list[CachedRows | RecomputedRows] = []

    def add(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Begin responses to n prompts, numbered from the last on, once all others have ended: logits (n * G, V)."""
        kind = CachedRows if decodes_with_cache(self.model) else RecomputedRows
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        apart = kind is CachedRows and not takes_left_padding(self.model)
        keys = lengths if apart else torch.zeros_like(lengths)
        group = torch.arange(self.group_size)
        self.numbers, self.parts, logits = [], [], []
        for key in keys.unique():
            chosen = (keys == key).nonzero()[:, 0]
            self.parts.append(kind(self.model))
            self.numbers.append((self.begun + chosen[:, None] * self.group_size + group).flatten().to(self.model.device))
            logits.append(self.parts[-1].begin([prompts[i] for i in chosen], self.group_size))
        self.begun += len(prompts) * self.group_size
        return self._in_order(logits)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after the next token of each response that is left, `tokens` (R,), in the order of their numbers."""
        if len(self.parts) == 1:
            return self.parts[0](tokens)
        order = torch.cat(self.numbers).argsort()
        given = torch.empty_like(tokens)
        given[order] = tokens
        split = given.split([len(numbers) for numbers in self.numbers])
        return self._in_order([part(new) for part, new in zip(self.parts, split, strict=True)])

    def _in_order(self, logits: list[Tensor]) -> Tensor:
        return logits[0] if len(logits) == 1 else torch.cat(logits)[torch.cat(self.numbers).argsort()]

    def keep(self, numbers: Tensor) -> None:
        """Go on with these responses only, (R,) int64 in ascending order."""
        left = [torch.isin(own, numbers) for own in self.numbers]
        self.numbers = [own[kept] for own, kept in zip(self.numbers, left, strict=True) if kept.any()]
        for part, kept in zip(self.parts, left, strict=True):
            if kept.any():
                part.keep(kept.nonzero()[:, 0])
        self.parts = [part for part, kept in zip(self.parts, left, strict=True) if kept.any()]


class CachedRows:
    """Rows over one cache: padded on the left, or, for a model that does not take that, of one length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Logits (n * G, V) after n prompts, each of which becomes G rows."""
        self.cache = new_cache(self.model)
        ids, mask = pad(prompts, "left", self.model.device)
        logits = _forward(self.model, ids, mask, self.cache).repeat_interleave(group_size, 0)
        self.mask = mask.repeat_interleave(group_size, 0)
        if group_size > 1:
            self.cache.batch_repeat_interleave(group_size)
        return logits

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after one more token of each row, `tokens` (R,)."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        return _forward(self.model, tokens[:, None], self.mask, self.cache)

    def keep(self, left: Tensor) -> None:
        """Go on with these rows only, (R,) int64."""
        self.mask = self.mask[left]
        self.cache.batch_select_indices(left)


class RecomputedRows:
    """Rows that are computed from the beginning for each token: for state spaces and models with caches of their own."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Logits (n * G, V) after n prompts, each of which becomes G rows."""
        self.rows = [list(prompt) for prompt in prompts for _ in range(group_size)]
        return plain_logits(self.model, prompts).repeat_interleave(group_size, 0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (R, V) after one more token of each row, `tokens` (R,)."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return plain_logits(self.model, self.rows)

    def keep(self, left: Tensor) -> None:
        """Go on with these rows only, (R,) int64."""
        self.rows = [self.rows[i] for i in left.tolist()]


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Logits (B, V) after the last of the new tokens `ids` (B, n); `mask` (B, S + n) covers the cache's S slots as well."""
    padded = takes_left_padding(model)
    return cached_logits(model, model_inputs(model, ids, mask) if padded else {"input_ids": ids}, cache)


@dataclass
class StepState:
    """What `next_logits` remembers of a batch between two tokens: the recurrent state of `predict`.

    Attributes:
        cache: keys and values, S slots a row; None for a model whose cache cannot be used here.
        slots: (B, S) 0/1; slots of an episode that is over, and padding, are 0 and never attended to again.
        rows: the token ids whose keys and values are in the cache, one list a row.
        version: of the weights that made it; with other weights the cache is worthless.
        prompt_lengths: how many tokens of each row were there when its episode was first seen.
    """

    cache: DynamicCache | None
    slots: Tensor
    rows: list[list[int]]
    version: int
    prompt_lengths: list[int]

    def serves(self, batch_size: int, version: int) -> bool:
        """Whether this state is of the same batch and weights, and its cache has not gone on with a later state."""
        current = self.cache is not None and self.cache.get_seq_length() == self.slots.shape[1]
        return len(self.rows) == batch_size and self.version == version and current


def weights_version(model: torch.nn.Module) -> int:
    """A number that changes whenever a weight is written to."""
    return sum(parameter._version for parameter in model.parameters())


@torch.no_grad()
def next_logits(
    model: PreTrainedModel, rows: list[list[int]], state: StepState | None, episode_start: Sequence[bool] | None = None
) -> tuple[Tensor, StepState]:
    """Logits (B, V) of the token after each of the B rows, computing only what `state` does not hold already.

    A row that does not go on from what the state holds of it (a new episode), or of which `episode_start` says so, begins
    anew: its old slots are masked out.
    """
    version = weights_version(model)
    starts = [False] * len(rows) if episode_start is None else list(episode_start)
    told = [[]] * len(rows) if state is None or len(state.rows) != len(rows) else state.rows
    goes_on = [
        not start and 0 < len(old) < len(row) and row[: len(old)] == old
        for row, old, start in zip(rows, told, starts, strict=True)
    ]
    lengths = [state.prompt_lengths[i] if state is not None and goes_on[i] else len(row) for i, row in enumerate(rows)]
    if state is not None and not state.serves(len(rows), version):
        state = None
    known = [state.rows[i] if state is not None and goes_on[i] else [] for i in range(len(rows))]
    fresh, fresh_mask = pad([row[len(old) :] for row, old in zip(rows, known, strict=True)], "left", model.device)
    full = 2 * max(map(len, rows))
    has_gaps = not (all(known) and fresh_mask.all())  # slots in the middle of a row that are hidden
    too_wide = state is not None and state.slots.shape[1] + fresh.shape[1] > full
    if state is None or not any(known) or too_wide or (has_gaps and not skips_hidden_slots(model)):
        ids, mask = pad(rows, "left", model.device)
        if not decodes_with_cache(model) or not (takes_left_padding(model) or mask.all()):
            return plain_logits(model, rows), StepState(None, mask, rows, version, lengths)
        cache = new_cache(model)
        logits = _forward(model, ids, mask, cache)
        # A sliding window counts slots, not positions, so that masked slots within it would shorten it.
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        return logits, StepState(cache if plain else None, mask, rows, version, lengths)
    begun = torch.tensor([bool(old) for old in known], device=model.device)
    slots = torch.cat([state.slots * begun[:, None], fresh_mask], 1)
    logits = _forward(model, fresh, slots, state.cache)
    return logits, StepState(state.cache, slots, rows, version, lengths)
