"""The contract of an engine, and the policy as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from agents.policy import LanguagePolicy
from agents.policy.lora import copy_sharing_frozen
from agents.sampling.generate import (
    OnTokens,
    OnTurns,
    TurnQueue,
    end_episodes,
    ignore_tokens,
    keeps_cache,
    sample_responses,
)
from agents.sampling.sampler import Sampler
from llm_env.rules import Rules

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Completions(NamedTuple):
    """Generated responses, those to prompt i in rows i*G..i*G+G-1.

    Attributes:
        token_ids: N * G lists of token ids, each up to and including the token that ended it.
        logprobs: N * G float32 arrays, log pi of these tokens under the whole tempered distribution, in nats.
    """

    token_ids: list[list[int]]
    logprobs: list[np.ndarray]


@dataclass(frozen=True)
class DecodingSpec:
    """How responses are generated.

    Attributes:
        rules: end tokens, stop strings, allowed tokens and vocabulary.
        sampler: temperature, truncation and, for an engine without `takes_uniforms`, the generator of all randomness.
        max_new_tokens: limit of a turn, in tokens.
        uniforms: (N * G, most actions of an episode, 1 or 2) uniform random numbers to sample by, see `Sampler.uniforms`.
            Action t of a row uses entry t. None for an engine that does not take them.
        on_tokens: called with the number of new tokens now and then while sampling; an error in it ends the generation.
            External engines may leave it out.
        max_episode_tokens: limit of the tokens after the prompt, turns and observations together; None for no limit.
        queue: steps the env while other rows are decoded; None to step it in `on_turns`. Engines that generate turns in
            lockstep do not use it.
    """

    rules: Rules
    sampler: Sampler
    max_new_tokens: int
    uniforms: Tensor | None = None
    on_tokens: OnTokens = ignore_tokens
    max_episode_tokens: int | None = None
    queue: TurnQueue | None = None


class Lockstep:
    """Turns in lockstep: every row samples a turn, the env replies to all, and the rows that continue sample the next.

    An engine samples `group_size` turns for each of `contexts`, and gives them to `reply`, until `rows` is empty. Contexts are
    computed again in every turn.

    Args:
        prompts: N lists of token ids.
        group_size: G, the number of responses to each prompt.
        decoding: how turns are generated.
        on_turns: see `Engine.generate`.

    Attributes:
        rows: numbers of the rows under way, those of a context next to each other.
        contexts: token ids before the turn; the prompts at first, later one context a row.
        group_size: number of turns to sample for each context; G at first, later 1.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], group_size: int, decoding: DecodingSpec, on_turns: OnTurns) -> None:
        self._decoding, self._on_turns = decoding, on_turns
        self.contexts, self.group_size = [list(prompt) for prompt in prompts], group_size
        self.rows = list(range(len(prompts) * group_size))
        limit = decoding.max_new_tokens if decoding.max_episode_tokens is None else decoding.max_episode_tokens
        self._room = [limit] * len(self.rows)
        self._token_ids: list[list[int]] = [[] for _ in self.rows]
        self._logprobs: list[np.ndarray] = [np.empty(0, np.float32) for _ in self.rows]

    @property
    def limits(self) -> list[int]:
        """The maximum length of a turn for each context, in tokens."""
        return [min(self._decoding.max_new_tokens, self._room[row]) for row in self.rows[:: self.group_size]]

    @property
    def uniforms(self) -> Tensor | None:
        """The uniform random numbers of the turns, (rows, longest limit, 1 or 2); None for an engine that takes none."""
        uniforms = self._decoding.uniforms
        if uniforms is None:
            return None
        used = torch.tensor([len(self._token_ids[row]) for row in self.rows])
        at = used[:, None] + torch.arange(max(self.limits))
        rows = torch.tensor(self.rows)[:, None]
        return uniforms[rows, at.clamp(max=uniforms.shape[1] - 1)]  # what is beyond the last action is never used

    def reply(self, turns: list[list[int]], logprobs: list[np.ndarray]) -> None:
        """Take one turn of every row to the env, and make up the contexts of those that continue."""
        replies = self._on_turns(self.rows, turns, logprobs)
        rows: list[int] = []
        contexts: list[list[int]] = []
        for i, (row, turn, logp, observation) in enumerate(zip(self.rows, turns, logprobs, replies, strict=True)):
            self._token_ids[row] = self._token_ids[row] + turn
            self._logprobs[row] = np.concatenate([self._logprobs[row], logp])
            if observation is not None:
                rows.append(row)
                contexts.append([*self.contexts[i // self.group_size], *turn, *observation])
                self._room[row] -= len(turn) + len(observation)
        self.rows, self.contexts, self.group_size = rows, contexts, 1

    def completions(self) -> Completions:
        """Return the action tokens of all rows."""
        return Completions(self._token_ids, self._logprobs)


@runtime_checkable
class Engine(Protocol):
    """Generates responses.

    Attributes:
        takes_uniforms: whether a row's tokens depend on its own `DecodingSpec.uniforms` only, not on batch, order or process.
    """

    takes_uniforms: bool

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        decoding: DecodingSpec,
        on_turns: OnTurns = end_episodes,
    ) -> Completions:
        """Generate `group_size` responses to each prompt.

        Args:
            prompts: N lists of token ids.
            group_size: G.
            decoding: how.
            on_turns: called with the rows whose turn has ended, their new tokens and log-probs; returns what the env writes
                after each turn, None where the episode has ended. An engine may call it when all rows have taken a turn, or
                for some rows at a time.

        Raises:
            StaleWeightsError: If the weights are no longer those of the last `update_weights`.
            ConnectionError: If the engine cannot be reached.
        """

    def update_weights(self, policy: LanguagePolicy) -> None:
        """Take over the policy's weights, and forget whatever was computed with older ones."""

    def close(self) -> None:
        """Release what the engine holds. It can be used again."""


class StaleWeightsError(ConnectionError):
    """The engine has other weights than it was last given: it was restarted, or another run updated them."""


class PolicyEngine:
    """The policy generates its own responses.

    Args:
        policy: the model.
    """

    takes_uniforms = True

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy = policy
        self._frozen_lm: PreTrainedModel | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        decoding: DecodingSpec,
        on_turns: OnTurns = end_episodes,
    ) -> Completions:
        """Generate `group_size` responses to each prompt; see `Engine.generate`.

        Raises:
            ValueError: If a prompt and its longest response have more tokens than the model has positions.
        """
        policy, settings = self.policy, self._settings(decoding)
        if self._keeps_cache(prompts, group_size, decoding):
            with policy.sampling(prompts, decoding.max_new_tokens) as lm:
                sampled = sample_responses(
                    lm,
                    prompts,
                    max_new_tokens=decoding.max_new_tokens,
                    group_size=group_size,
                    uniforms=decoding.uniforms,
                    on_turns=on_turns,
                    max_episode_tokens=decoding.max_episode_tokens,
                    queue=decoding.queue,
                    **settings,
                )
            return Completions(*sampled)
        turns = Lockstep(prompts, group_size, decoding, on_turns)
        while turns.rows:
            with policy.sampling(turns.contexts, turns.limits) as lm:
                sampled = sample_responses(
                    lm,
                    turns.contexts,
                    max_new_tokens=turns.limits,
                    group_size=turns.group_size,
                    uniforms=turns.uniforms,
                    **settings,
                )
            turns.reply(*sampled)
        return turns.completions()

    def _keeps_cache(self, prompts: Sequence[Sequence[int]], group_size: int, decoding: DecodingSpec) -> bool:
        """Whether to keep the cache between turns. Otherwise, contexts are computed again in every turn."""
        if not decoding.rules.has_replies or decoding.max_episode_tokens is None or not len(prompts):
            return False
        longest = max(map(len, prompts)) + decoding.max_episode_tokens
        return keeps_cache(self.policy.lm, group_size, longest, self.policy.prefix_sharing)

    def _settings(self, decoding: DecodingSpec) -> dict[str, Any]:
        """Return the arguments of `sample_responses` that are the same for every turn."""
        rules = decoding.rules
        return {
            "sampler": decoding.sampler,
            "vocab_size": rules.vocab_size,
            "eos_id": rules.eos_ids,
            "completes_stop": rules.completes_stop if rules.stop else None,
            "constraint": rules.constraint,
            "max_num_seqs": self.policy.max_num_seqs,
            "prefix_sharing": self.policy.prefix_sharing,
            "on_tokens": decoding.on_tokens,
            "compile_layers": self.policy.compiles,
        }

    def update_weights(self, policy: LanguagePolicy) -> None:
        """Generate with another policy from here on."""
        self.policy = policy

    def close(self) -> None:
        """Do nothing."""

    @torch.no_grad()
    def snapshot(self, rules: Rules) -> PolicyEngine:
        """Return an engine that generates with the weights as they are now, while the policy is trained.

        Frozen weights are shared. The memory of the copied ones is kept for the next snapshot.
        """
        if self._frozen_lm is None:
            self._frozen_lm = copy_sharing_frozen(self.policy.lm).requires_grad_(False)
        frozen = copy.copy(self.policy)
        frozen._modules = {"lm": self._frozen_lm, "value_head": None, "critic": None}
        for copied, current in zip(self._frozen_lm.parameters(), self.policy.lm.parameters(), strict=True):
            copied.copy_(current)
        return PolicyEngine(frozen)
