"""The contract of an engine, and the policy as one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.policy import LanguagePolicy
from agents.policy.lora import copy_sharing_frozen
from agents.sampling.generate import OnTokens, ignore_tokens, sample_responses
from agents.sampling.sampler import Sampler
from llm_env.rules import Rules

OnTurns = Callable[[Sequence[int], list[list[int]], list[np.ndarray]], "list[list[int] | None]"]


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
        max_new_tokens: limit of a response, in tokens.
        uniforms: (N * G, max_new_tokens, 1 or 2) uniform random numbers to sample by, see `Sampler.uniforms`; None for an
            engine that does not take them.
        on_tokens: called with the number of new tokens now and then while sampling; an error in it ends the generation.
            External engines may leave it out.
    """

    rules: Rules
    sampler: Sampler
    max_new_tokens: int
    uniforms: Tensor | None = None
    on_tokens: OnTokens = ignore_tokens


def end_episodes(rows: Sequence[int], turns: list[list[int]], logprobs: list[np.ndarray]) -> list[list[int] | None]:
    """Let every episode end with its first turn: the `on_turns` of a generation without an env."""
    return [None] * len(rows)


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
                after each turn, None where the episode has ended. With one turn it is called once, with all rows.

        Raises:
            StaleWeightsError: If the weights are no longer those of the last `update_weights`.
            ConnectionError: If the engine cannot be reached.
        """

    def update_weights(self, policy: LanguagePolicy) -> None:
        """Take over the policy's weights, and forget whatever was computed with older ones."""

    def close(self) -> None:
        """Release what the engine holds. It can be used again."""


class StaleWeightsError(ConnectionError):
    """The engine has other weights than it was last given: it was restarted, or another run gave it its own."""


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
        policy, rules = self.policy, decoding.rules
        with policy.sampling(prompts, decoding.max_new_tokens):
            token_ids, logprobs = sample_responses(
                policy.lm,
                prompts,
                decoding.sampler,
                vocab_size=rules.vocab_size,
                eos_id=rules.eos_ids,
                max_new_tokens=decoding.max_new_tokens,
                group_size=group_size,
                completes_stop=rules.completes_stop if rules.stop else None,
                constraint=rules.constraint,
                max_num_seqs=policy.max_num_seqs,
                prefix_sharing=policy.prefix_sharing,
                uniforms=decoding.uniforms,
                on_tokens=decoding.on_tokens,
            )
        on_turns(range(len(token_ids)), token_ids, logprobs)
        return Completions(token_ids, logprobs)

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
