"""Generate responses with a causal language model, or the next token of a batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.sampling.caching import cached_logits, decodes_with_cache, new_cache, plain_logits, skips_hidden_slots
from agents.sampling.sampler import Sampler
from agents.sampling.shared_prefix import SharedDecoding, decodes_shared
from llm_env.arguments import check_int
from llm_env.constraints import TokenConstraint
from llm_env.lm.capabilities import takes_left_padding
from llm_env.lm.inputs import model_inputs, pad
from llm_env.lm.scoring import restrict
from llm_env.lm.sharing import PrefixSharing, supports_sharing

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

StopRule = Callable[[Sequence[int]], bool]
OnTurns = Callable[[Sequence[int], list[list[int]], list[np.ndarray]], "list[list[int] | None]"]
OnTokens = Callable[[int], None]


class TurnQueue(Protocol):
    """The env's part of turns that are stepped while other rows are decoded."""

    def begin(self, row: int, turn: list[int]) -> None:
        """Begin to step the env with a turn that has ended; the row waits until it is returned by `ready`."""

    def ready(self, wait: bool) -> list[int]:
        """Return the rows whose step is done, in ascending order, each once; with `wait`, at least one."""


class StopRollout(Exception):
    """Raised by `on_tokens` to end a rollout early: it is neither trained on nor counted."""


def ignore_tokens(count: int) -> None:
    """Do nothing with the number of new tokens."""


def end_episodes(rows: Sequence[int], turns: list[list[int]], logprobs: list[np.ndarray]) -> list[list[int] | None]:
    """Let every episode end with its first turn: the `on_turns` of a generation without an env."""
    return [None] * len(rows)


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
    uniforms: Tensor | None = None,
    on_tokens: OnTokens = ignore_tokens,
    on_turns: OnTurns = end_episodes,
    max_episode_tokens: int | None = None,
    queue: TurnQueue | None = None,
    compile_layers: bool = False,
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Sample `group_size` responses to each prompt, or conversations of several turns.

    A prompt is computed once for its group, and rows that have ended leave the batch. With `on_turns`, keys and values stay in
    the cache between turns: what the env writes is computed in one pass for all turns that end in a decoding step, and no row
    waits for another one's turn.

    Args:
        model: any causal language model of transformers.
        prompts: N lists of token ids.
        sampler: samples a token.
        vocab_size: token ids from here on are never sampled.
        eos_id: the end token, or several; a response includes the one that ends it.
        max_new_tokens: tokens of the longest response, one limit or one a prompt.
        group_size: G.
        completes_stop: returns whether the last token of a response completes a stop string.
        constraint: the tokens that are allowed next.
        max_num_seqs: responses that are generated at a time, at least G; a waiting prompt takes the place of one whose
            responses have all ended. All by default.
        prefix_sharing: store a prompt's keys and values once for its responses: "auto" where the model can, True, or False.
        uniforms: (N * G, the longest response, 1 or 2), random numbers to sample by; see `Sampler.uniforms`. Drawn here by
            default.
        on_tokens: called with the number of new tokens in every decoding step; an error in it ends the sampling.
        on_turns: called with the numbers of the rows whose turn has ended in a decoding step, in ascending order, their new
            tokens and log-probs; returns what the env writes after each turn, None where the episode has ended. By default,
            every episode ends with its first turn. `keeps_cache` must be True then.
        max_episode_tokens: limit of the tokens after the prompt with `on_turns`, turns and observations together.
        queue: steps the env while other rows are decoded; `on_turns` is then called with the rows that are ready. By default,
            the env is stepped by `on_turns`. The tokens of a row are the same, since its random numbers are its own.
        compile_layers: compile the layers of decoding over shared prompts, see `llm_env.lm.compiling`.

    Returns:
        N * G responses (the tokens of all turns, without observations), lists of token ids, those to prompt i at
        i*G..i*G+G-1; and the log-probs of their tokens, one float32 array a response, in nats.

    Raises:
        ValueError: If `max_num_seqs`, `max_new_tokens` or `prefix_sharing` is unusable, or the logits are not finite.
    """
    limits = response_limits(max_new_tokens, len(prompts)).repeat(check_int("group_size", group_size, 1))
    most = int(limits.max(initial=0)) if max_episode_tokens is None else max_episode_tokens
    places = len(prompts) if max_num_seqs is None else max_num_seqs // group_size
    if len(prompts) and places < 1:
        raise ValueError(
            f"max_num_seqs={max_num_seqs} must hold a group of {group_size} responses; set max_num_seqs={group_size} at least"
        )
    ends = {eos_id} if isinstance(eos_id, int) else set(eos_id)
    episodes = _Episodes([list(prompts[i // group_size]) for i in range(len(limits))], limits, most, ends, vocab_size)
    longest = max(map(len, prompts), default=0) + most
    batch = _Batch(_decoding(model, group_size, longest, prefix_sharing, compile_layers), prompts, group_size, places)
    if uniforms is None:
        uniforms = sampler.uniforms(len(limits), most, vocab_size, model.device)
    with torch.no_grad():  # not a decorator: one frame less between `learn` and a sampled token
        while batch.refill():
            live, ended = batch.live(), batch.rows[:0]
            tokens = torch.empty(0, dtype=torch.int64, device=model.device)
            if len(live):
                rows = batch.rows[live]
                allowed = None
                if constraint is not None:
                    allowed = constraint.masks([(episodes.contexts[row], episodes.turn(row)) for row in rows])
                at = torch.from_numpy(np.stack([rows, episodes.counts[rows]])).to(uniforms.device)
                logits = restrict(batch.logits_of(live)[:, :vocab_size], allowed)
                tokens, logp = sampler(logits, uniforms[at[0], at[1]])
                # One transfer for both: the only time in a step that the host waits for the device.
                sampled, logps = torch.stack([tokens.double(), logp.double()]).cpu().numpy()
                if not np.isfinite(logps).all():
                    raise ValueError("the model's logits are not finite: its weights, or the last update, have gone wrong")
                on_tokens(len(live))
                ended = live[episodes.append(rows, sampled, logps, completes_stop)]
            if queue is not None:
                ended = batch.wait(ended, queue, episodes)
            written = _take_turns(episodes, batch.rows[ended].tolist(), on_turns)
            batch.feed(live, tokens, ended, written, None if queue is None else episodes)
    return episodes.tokens(), episodes.logprobs()


class _Batch:
    """The responses under way: R rows that have not ended.

    Args:
        decoding: computes the logits.
        prompts: N lists of token ids.
        group_size: G.
        places: number of prompts whose responses may be under way at a time.

    Attributes:
        rows: (R,) their numbers, ascending.
        waits: (R,) bool, whether a row waits for the env to answer its turn.
        logits: (R, V) of the next tokens; those of rows that wait mean nothing.
        num_started: prompts so far.
    """

    def __init__(
        self, decoding: SharedDecoding | PlainDecoding, prompts: Sequence[Sequence[int]], group_size: int, places: int
    ) -> None:
        self.decoding, self.prompts, self.group_size, self.places = decoding, prompts, group_size, places
        self.rows, self.waits = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        self.logits = torch.empty(0, device=decoding.model.device)
        self.num_started = 0

    def refill(self) -> bool:
        """Start the responses to waiting prompts where there is room; return whether any are under way."""
        if waiting := len(self.prompts) - self.num_started:
            free = min(self.places - len(np.unique(self.rows // self.group_size)), waiting)
            # Several at a time: each prefill copies the caches.
            if not len(self.rows) or (self.decoding.refills and free >= max(1, min(self.places // 4, waiting))):
                first = self.decoding.prefill(self.prompts[self.num_started : self.num_started + free])
                self.logits = torch.cat([self.logits.reshape(-1, first.shape[-1]), first])
                started = np.arange(self.num_started * self.group_size, (self.num_started + free) * self.group_size)
                self.rows = np.concatenate([self.rows, started])
                self.waits = np.concatenate([self.waits, np.zeros(len(started), dtype=bool)])
                self.num_started += free
        return bool(len(self.rows))

    def live(self) -> np.ndarray:
        """Return the places of the rows that do not wait."""
        return np.flatnonzero(~self.waits)

    def logits_of(self, places: np.ndarray) -> Tensor:
        """Return the logits at some places."""
        return self.logits if len(places) == len(self.rows) else self.logits[self._on_device(places)]

    def wait(self, ended: np.ndarray, queue: TurnQueue, episodes: _Episodes) -> np.ndarray:
        """Let rows whose turn has ended wait for the env; return the places of those for which it is ready."""
        for row in self.rows[ended].tolist():
            queue.begin(row, episodes.turn(row))
        self.waits[ended] = True
        return np.flatnonzero(np.isin(self.rows, queue.ready(wait=bool(self.waits.all()))))

    def feed(
        self, live: np.ndarray, tokens: Tensor, ended: np.ndarray, written: dict[int, list[int]], waiting: _Episodes | None
    ) -> None:
        """Append tokens and what the env wrote, and drop the rows whose episode has ended.

        Args:
            live: places of the rows with a new token.
            tokens: these tokens.
            ended: places of the rows whose turn was taken.
            written: what the env wrote in those of them that go on.
            waiting: where rows wait for the env, the episodes: such a row has its last token appended with what the env wrote.
        """
        fed = None if waiting is None else ~self.waits
        self.waits[ended] = False
        if len(live) < len(self.rows):  # others get a token that is not kept
            table = torch.zeros(len(self.rows), dtype=torch.int64, device=self.logits.device)
            tokens = table.index_copy(0, self._on_device(live), tokens) if len(live) else table
        over = [row for row in self.rows[ended].tolist() if row not in written]
        if over:
            kept = np.flatnonzero(~np.isin(self.rows, over))
            self.rows, self.waits, fed = self.rows[kept], self.waits[kept], None if fed is None else fed[kept]
            tokens = tokens[self._on_device(kept)]
            if fed is not None and not fed.all():
                self.logits = self.logits[self._on_device(kept)]
            self.decoding.retain(torch.from_numpy(self.rows))
        if not len(self.rows):
            self.logits = self.logits[:0]
        elif waiting is None or fed is None:
            self.logits = _fed(self.decoding, self.rows.tolist(), tokens, written)
        else:
            added = {row: [waiting.last_token(row), *observation] for row, observation in written.items()}
            self.logits = _fed_some(self.decoding, self.rows, tokens, self.logits, fed, added)

    def _on_device(self, places: np.ndarray) -> Tensor:
        return torch.from_numpy(places).to(self.logits.device)


class _Episodes:
    """What was sampled in B rows, and where their open turns stand.

    Args:
        contexts: B lists of token ids before the open turn.
        limits: (B,) maximum length of a turn.
        most: tokens of the longest episode after the prompt.
        ends: the end tokens.
        vocab_size: V.

    Attributes:
        counts: (B,) number of sampled tokens.
        begins: (B,) index of the open turn's first token among them.
        room: (B,) tokens that the episode has left for the open turn and what follows.
    """

    def __init__(self, contexts: list[list[int]], limits: np.ndarray, most: int, ends: set[int], vocab_size: int) -> None:
        self.contexts, self._limits = contexts, limits
        self.counts, self.begins = np.zeros((2, len(contexts)), dtype=np.int64)
        self.room = np.full(len(contexts), most, dtype=np.int64)
        self._tokens = np.zeros((len(contexts), most), dtype=np.int64)
        self._logps = np.zeros((len(contexts), most), dtype=np.float32)
        self._is_end = np.isin(np.arange(vocab_size), list(ends))

    def turn(self, row: int | np.integer) -> list[int]:
        """Return the tokens of the open turn."""
        return self._tokens[row, self.begins[row] : self.counts[row]].tolist()

    def turn_logprobs(self, row: int) -> np.ndarray:
        """Return the log-probs of the open turn, float32."""
        return self._logps[row, self.begins[row] : self.counts[row]].copy()

    def append(self, rows: np.ndarray, tokens: np.ndarray, logps: np.ndarray, completes_stop: StopRule | None) -> np.ndarray:
        """Append a token to each of some rows; return (R,) bool, whether it ends the turn."""
        at, tokens = self.counts[rows], tokens.astype(np.int64)
        self._tokens[rows, at], self._logps[rows, at] = tokens, logps
        self.counts[rows] = at + 1
        lengths = at + 1 - self.begins[rows]
        ended = self._is_end[tokens] | (lengths >= np.minimum(self._limits[rows], self.room[rows]))
        if completes_stop is not None:
            for i in np.flatnonzero(~ended):
                ended[i] = completes_stop(self.turn(rows[i]))
        return ended

    def last_token(self, row: int) -> int:
        """Return the last sampled token."""
        return int(self._tokens[row, self.counts[row] - 1])

    def begin_turn(self, row: int, observation: list[int]) -> None:
        """Begin the next turn, after an observation."""
        turn = self.turn(row)
        self.contexts[row] = [*self.contexts[row], *turn, *observation]
        self.room[row] -= len(turn) + len(observation)
        self.begins[row] = self.counts[row]

    def tokens(self) -> list[list[int]]:
        """Return the sampled tokens of all turns."""
        return [row[:n].tolist() for row, n in zip(self._tokens, self.counts, strict=True)]

    def logprobs(self) -> list[np.ndarray]:
        """Return their log-probs in nats, float32."""
        return [row[:n].copy() for row, n in zip(self._logps, self.counts, strict=True)]


def _take_turns(episodes: _Episodes, ended: list[int], on_turns: OnTurns) -> dict[int, list[int]]:
    """Give the turns that have ended to the env; return what it wrote in the rows that go on."""
    if not ended:
        return {}
    turns = [episodes.turn(row) for row in ended]
    logps = [episodes.turn_logprobs(row) for row in ended]
    written = {}
    for row, observation in zip(ended, on_turns(ended, turns, logps), strict=True):
        if observation is not None:
            episodes.begin_turn(row, observation)
            written[row] = observation
    return written


def _fed(decoding: SharedDecoding | PlainDecoding, rows: list[int], tokens: Tensor, written: dict[int, list[int]]) -> Tensor:
    """Append the sampled tokens (R,), and what the env wrote after some; return the logits (R, V) of the next tokens."""
    added = {i: observation for i, row in enumerate(rows) if (observation := written.get(row))}
    if not added:
        return decoding(tokens)
    numbers = torch.tensor(rows, dtype=torch.int64)
    if len(added) == len(rows):  # one pass is enough
        return decoding.extend(numbers, [[token, *added[i]] for i, token in enumerate(tokens.tolist())])
    logits = decoding(tokens)
    at = torch.tensor(list(added))
    logits[at.to(logits.device)] = decoding.extend(numbers[at], list(added.values()))
    return logits


def _fed_some(
    decoding: SharedDecoding | PlainDecoding,
    rows: np.ndarray,
    tokens: Tensor,
    logits: Tensor,
    fed: np.ndarray,
    added: dict[int, list[int]],
) -> Tensor:
    """Append the tokens of some rows only, and `added` to others; return (R, V), next logits in these rows, else old ones."""
    numbers = torch.from_numpy(rows)
    if fed.any():
        logits = decoding(tokens, None if fed.all() else numbers[torch.from_numpy(fed)])
    if added:
        at = torch.from_numpy(np.flatnonzero(np.isin(rows, list(added))))
        new = decoding.extend(numbers[at], [added[row] for row in numbers[at].tolist()])
        logits = logits.index_copy(0, at.to(logits.device), new)
    return logits


def keeps_cache(model: PreTrainedModel, group_size: int, longest: int, prefix_sharing: PrefixSharing) -> bool:
    """Return whether a model's cache can be kept between turns: that of `SharedDecoding`, or one that may hold hidden slots.

    Args:
        model: a causal language model.
        group_size: G.
        longest: tokens of the longest prompt and episode together.
        prefix_sharing: see `sample_responses`.
    """
    from transformers.cache_utils import DynamicLayer

    if isinstance(_decoding(model, group_size, longest, prefix_sharing), SharedDecoding):
        return True
    return skips_hidden_slots(model) and all(type(layer) is DynamicLayer for layer in new_cache(model).layers)


def _decoding(
    model: PreTrainedModel, group_size: int, longest: int, prefix_sharing: PrefixSharing, compile_layers: bool = False
) -> SharedDecoding | PlainDecoding:
    """Choose how to decode prompts and responses of up to `longest` tokens together."""
    shares = prefix_sharing is not False and supports_sharing(model.base_model, longest) and decodes_shared(model)
    if prefix_sharing is True and not shares:
        raise ValueError(
            f"prefix_sharing=True, but {type(model).__name__} cannot decode several responses to one prompt of up to {longest} "
            "tokens together; set prefix_sharing='auto'"
        )
    return SharedDecoding(model, group_size, compile_layers=compile_layers) if shares else PlainDecoding(model, group_size)


def response_limits(max_new_tokens: int | Sequence[int], count: int) -> np.ndarray:
    """Return the length limit of the responses to each of `count` prompts, (count,) int64."""
    limits = np.asarray(max_new_tokens)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (count,)) or (limits < 1).any():
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be a whole number of at least 1, or one for each of the {count} prompts"
        )
    return np.broadcast_to(limits, (count,))


class PlainDecoding:
    """Decodes one row a response, over transformers' cache or without one; for any model, with `SharedDecoding`'s interface.

    Prompts of different lengths have separate caches if the model takes no left padding.

    Args:
        model: a causal language model.
        group_size: G.

    Attributes:
        num_started: responses so far; the next ones are numbered from here.
        slot_ids: numbers of the responses, one int64 tensor on the CPU a part.
        parts: rows with one cache each.
    """

    refills = False

    def __init__(self, model: PreTrainedModel, group_size: int) -> None:
        self.model, self.group_size, self.num_started = model, group_size, 0
        self.slot_ids: list[Tensor] = []
        self.parts: list[CachedRows | RecomputedRows] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Start the responses to n prompts once all others have ended; return the logits (n * G, V) of their first tokens."""
        kind = CachedRows if decodes_with_cache(self.model) else RecomputedRows
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        apart = kind is CachedRows and not takes_left_padding(self.model)
        keys = lengths if apart else torch.zeros_like(lengths)
        group = torch.arange(self.group_size)
        self.slot_ids, self.parts, logits = [], [], []
        for key in keys.unique():
            chosen = (keys == key).nonzero()[:, 0]
            self.parts.append(kind(self.model))
            self.slot_ids.append((self.num_started + chosen[:, None] * self.group_size + group).flatten())
            logits.append(self.parts[-1].prefill([prompts[i] for i in chosen], self.group_size))
        self.num_started += len(prompts) * self.group_size
        return self._in_order(logits)

    def __call__(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Append a token to each remaining response, or to some; see `SharedDecoding.__call__`."""
        if active is not None:
            (part,), (ids,) = self.parts, self.slot_ids
            assert isinstance(part, CachedRows)
            return part(tokens, torch.isin(ids, active))
        if len(self.parts) == 1:
            return self.parts[0](tokens)
        given = torch.empty_like(tokens)
        given[self._order()] = tokens
        split = given.split([len(slot_ids) for slot_ids in self.slot_ids])
        return self._in_order([part(new) for part, new in zip(self.parts, split, strict=True)])

    def extend(self, slot_ids: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append several tokens to each of some responses; see `SharedDecoding.extend`. All rows must be in one cache."""
        (part,), (ids,) = self.parts, self.slot_ids
        assert isinstance(part, CachedRows)
        return part.extend(torch.isin(ids, slot_ids).nonzero()[:, 0].to(part.mask.device), tokens)

    def _in_order(self, logits: list[Tensor]) -> Tensor:
        return logits[0] if len(logits) == 1 else torch.cat(logits)[self._order()]

    def _order(self) -> Tensor:
        return torch.cat(self.slot_ids).argsort().to(self.model.device)

    def retain(self, slot_ids: Tensor) -> None:
        """Drop all responses except these, (R,) int64 on the CPU in ascending order."""
        kept = [torch.isin(ids, slot_ids) for ids in self.slot_ids]
        self.slot_ids = [ids[rows] for ids, rows in zip(self.slot_ids, kept, strict=True) if rows.any()]
        for part, rows in zip(self.parts, kept, strict=True):
            if rows.any():
                part.retain(rows.nonzero()[:, 0].to(self.model.device))
        self.parts = [part for part, rows in zip(self.parts, kept, strict=True) if rows.any()]


class CachedRows:
    """Rows in one cache, padded on the left, or of one length if the model takes no left padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Start G rows for each of n prompts; return the logits (n * G, V) after them."""
        self.cache = new_cache(self.model)
        ids, mask = pad(prompts, "left", self.model.device)
        logits = _forward(self.model, ids, mask, self.cache).repeat_interleave(group_size, 0)
        self.mask = mask.repeat_interleave(group_size, 0)
        if group_size > 1:
            self.cache.batch_repeat_interleave(group_size)
        return logits

    def __call__(self, tokens: Tensor, active: Tensor | None = None) -> Tensor:
        """Append a token to each row, `tokens` (R,); return the logits (R, V) after it.

        Args:
            tokens: (R,).
            active: (R,) bool on the CPU, False at rows whose new slot is hidden; all are active by default.
        """
        new = self.mask.new_ones(len(self.mask), 1) if active is None else active[:, None].to(self.mask)
        self.mask = torch.cat([self.mask, new], 1)
        return _forward(self.model, tokens[:, None], self.mask, self.cache)

    def extend(self, rows: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Append several tokens to each of some rows, (R,) int64; return the logits (R, V) after them.

        The rows are computed in a cache of their own. Then all rows are moved so that each is without gaps.
        """
        from transformers import DynamicCache

        ids, added = pad(tokens, "left", self.model.device)
        mask = torch.cat([self.mask, self.mask.new_zeros(len(self.mask), ids.shape[1])], 1)
        mask[rows] = torch.cat([self.mask[rows], added], 1)
        part = DynamicCache()
        for layer, (keys, values) in enumerate(_layers_of(self.cache)):
            part.update(keys[rows], values[rows], layer)
        logits = _forward(self.model, ids, mask[rows], part)
        width = int(mask.sum(1).max())
        order = mask.argsort(dim=1, stable=True)[:, -width:]
        cache = new_cache(self.model)
        for layer, (old, new) in enumerate(zip(_layers_of(self.cache), _layers_of(part), strict=True)):
            moved = []
            for stored, computed in zip(old, new, strict=True):
                wide = torch.nn.functional.pad(stored, (0, 0, 0, ids.shape[1]))
                wide[rows] = computed
                moved.append(wide.gather(2, order[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[3])))
            cache.update(moved[0], moved[1], layer)
        self.cache, self.mask = cache, mask.gather(1, order)
        return logits

    def retain(self, rows: Tensor) -> None:
        """Drop all rows except these, (R,) int64."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class RecomputedRows:
    """Rows that are recomputed in full for each token: for state-space models and models with other caches."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prefill(self, prompts: Sequence[Sequence[int]], group_size: int) -> Tensor:
        """Start G rows for each of n prompts; return the logits (n * G, V) after them."""
        self.rows = [list(prompt) for prompt in prompts for _ in range(group_size)]
        return plain_logits(self.model, prompts).repeat_interleave(group_size, 0)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append a token to each row, `tokens` (R,); return the logits (R, V) after it."""
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return plain_logits(self.model, self.rows)

    def retain(self, rows: Tensor) -> None:
        """Drop all rows except these, (R,) int64."""
        self.rows = [self.rows[i] for i in rows.tolist()]


def _layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of each layer, (R, K, S, D) each."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Compute the logits (B, V) after new tokens `ids` (B, n); `mask` (B, S + n) covers the cache's S slots as well."""
    padded = takes_left_padding(model)
    return cached_logits(model, model_inputs(model, ids, mask) if padded else {"input_ids": ids}, cache)


@dataclass
class StepState:
    """The KV cache of a batch between two tokens: the recurrent state of `predict`.

    Attributes:
        cache: keys and values, S slots a row; None for a model whose cache cannot be used here.
        slots: (B, S) 0/1; padding and slots of an ended episode are 0, and masked from then on.
        rows: the token ids whose keys and values are in the cache, one list a row.
        version: of the weights that computed the cache; see `weights_version`.
        context_lengths: tokens of each row before the turn under way; a row that grew by several tokens begins a turn.
    """

    cache: DynamicCache | None
    slots: Tensor
    rows: list[list[int]]
    version: int
    context_lengths: list[int]

    def serves(self, batch_size: int, version: int) -> bool:
        """Return whether the cache can be continued: same batch size and weights, and no later state has appended to it."""
        current = self.cache is not None and self.cache.get_seq_length() == self.slots.shape[1]
        return len(self.rows) == batch_size and self.version == version and current


def weights_version(model: torch.nn.Module) -> int:
    """Return a number that changes whenever a weight is written to."""
    return sum(parameter._version for parameter in model.parameters())


@torch.no_grad()
def next_logits(
    model: PreTrainedModel, rows: list[list[int]], state: StepState | None, episode_start: Sequence[bool] | None = None
) -> tuple[Tensor, StepState]:
    """Compute the logits of the next token of each row, reusing the keys and values in the state.

    A row that does not continue its tokens in the state, or whose `episode_start` is True, starts anew: its slots are masked.

    Args:
        model: a causal language model.
        rows: B lists of token ids.
        state: the result of the last call; None for the first.
        episode_start: B bools, all False by default.

    Returns:
        The logits (B, V), and the state for the next call.
    """
    from transformers.cache_utils import DynamicLayer

    version = weights_version(model)
    starts = [False] * len(rows) if episode_start is None else list(episode_start)
    cached = [[]] * len(rows) if state is None or len(state.rows) != len(rows) else state.rows
    goes_on = [
        not start and 0 < len(old) < len(row) and row[: len(old)] == old
        for row, old, start in zip(rows, cached, starts, strict=True)
    ]
    lengths = [
        state.context_lengths[i] if state is not None and goes_on[i] and len(row) == len(cached[i]) + 1 else len(row)
        for i, row in enumerate(rows)
    ]
    if state is not None and not state.serves(len(rows), version):
        state = None
    known = [state.rows[i] if state is not None and goes_on[i] else [] for i in range(len(rows))]
    fresh, fresh_mask = pad([row[len(old) :] for row, old in zip(rows, known, strict=True)], "left", model.device)
    full = 2 * max(map(len, rows))
    has_gaps = not (all(known) and fresh_mask.all())  # masked slots in the middle of a row
    too_wide = state is not None and state.slots.shape[1] + fresh.shape[1] > full
    if state is None or not any(known) or too_wide or (has_gaps and not skips_hidden_slots(model)):
        ids, mask = pad(rows, "left", model.device)
        if not decodes_with_cache(model) or not (takes_left_padding(model) or mask.all()):
            return plain_logits(model, rows), StepState(None, mask, rows, version, lengths)
        cache = new_cache(model)
        logits = _forward(model, ids, mask, cache)
        # A sliding window counts slots, not positions: masked slots within it would shorten it.
        plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        return logits, StepState(cache if plain else None, mask, rows, version, lengths)
    continued = torch.tensor([bool(old) for old in known], device=model.device)
    slots = torch.cat([state.slots * continued[:, None], fresh_mask], 1)
    logits = _forward(model, fresh, slots, state.cache)
    return logits, StepState(state.cache, slots, rows, version, lengths)
