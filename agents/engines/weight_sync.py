"""An external engine that follows the policy: started, given the weights when they have moved, and verified."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from agents.engines.base import Completions, DecodingSpec, Engine, OnTurns, StaleWeightsError, end_episodes
from agents.policy import LanguagePolicy
from agents.sampling.generate import weights_version
from agents.sampling.sampler import Sampler
from llm_env.rules import Rules

PROBES, PROBE_TOKENS = 4, 16  # prompts, and tokens of a response, by which an update of the weights is verified
PROBE_TEMPERATURE = 2.0  # at lower ones the tokens of a trained policy tell little of its weights; see `logprob_gap`


@runtime_checkable
class ExternalEngine(Engine, Protocol):
    """An engine with its own copy of the weights.

    Attributes:
        tolerance: how far, in nats, its log-prob of a token may be from the policy's after an update of its weights.
    """

    tolerance: float

    def start(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Get ready for a policy under an env's rules; called again for another env.

        Raises:
            ValueError: If the engine cannot serve them.
        """


class SyncedEngine:
    """Wraps an external engine: starts it at the first use, and updates its weights whenever the policy's have moved.

    Args:
        engine: the external engine.

    Attributes:
        policy: whose weights it gets; see `update_weights`.
        gap: the largest difference of log-probs, in nats, found after the last update of the weights.
        seconds: duration of the last update of the weights and its verification.
    """

    takes_uniforms = False

    policy: LanguagePolicy

    def __init__(self, engine: ExternalEngine) -> None:
        self.engine = engine
        self.gap, self.seconds = float("nan"), 0.0
        self._rules: Rules | None = None
        self._version: tuple[int, int, int] | None = None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        decoding: DecodingSpec,
        on_turns: OnTurns = end_episodes,
    ) -> Completions:
        """Generate with the policy's weights as they are now; see `Engine.generate`. Stale weights are updated once.

        Raises:
            RuntimeError: If the weights did not arrive; the message says by how much the log-probs differ.
            ConnectionError: If the engine cannot be reached, or lost the weights twice.
        """
        try:
            self.sync_weights(decoding.rules)
            return self.engine.generate(prompts, group_size, decoding, on_turns)
        except StaleWeightsError:
            self._version = self._rules = None
            self.sync_weights(decoding.rules)
            return self.engine.generate(prompts, group_size, decoding, on_turns)

    def update_weights(self, policy: LanguagePolicy) -> None:
        """Follow another policy from here on."""
        self.policy = policy

    def sync_weights(self, rules: Rules) -> None:
        """Start the engine, and give it the policy's weights, where that is due; see `generate`."""
        if rules is not self._rules:
            self._rules = self._version = None
            self.engine.start(self.policy, rules)
            self._rules = rules
        version = id(self.policy.lm), weights_version(self.policy.lm), self.policy.num_steps
        if version == self._version:
            return
        began, self._version = time.perf_counter(), None
        self._update_and_verify(rules)
        self._version, self.seconds = version, time.perf_counter() - began

    def _update_and_verify(self, rules: Rules) -> None:
        """Update the weights and verify; once more where the engine still has other weights."""
        tolerance = self.engine.tolerance
        for _ in range(2):
            self.engine.update_weights(self.policy)
            self.gap = logprob_gap(self.engine, self.policy, rules)
            if self.gap <= tolerance:  # a NaN is not
                return
        raise RuntimeError(
            f"the engine's log-probs are {self.gap:.3g} nats off the policy's after its weights were updated twice, more than "
            f"the tolerance of {tolerance:g}: it generates with other weights. Restart it (agent.set_engine); where a lower "
            "precision or other kernels explain the gap, raise the tolerance. The agent is as it was before this rollout"
        )

    def snapshot(self, rules: Rules) -> Engine:
        """Return the external engine with the policy's weights as they are now, whatever is trained meanwhile."""
        self.sync_weights(rules)
        return self.engine

    def close(self) -> None:
        """Close the external engine."""
        self.engine.close()


@torch.no_grad()
def logprob_gap(engine: Engine, policy: LanguagePolicy, rules: Rules) -> float:
    """Measure the largest difference of log-probs, in nats, between engine and training path on tokens of the engine.

    At a temperature of 2. At 1 the pupil samples tokens that it is sure of, and an engine one step of 3e-4 behind it is off by
    0.001 nats on them; at 2 by 0.02, where weights that arrived leave 3e-7. The agent's random numbers are not touched.
    """
    prompts = [rules.prompts.ids[i].tolist() for i in rules.prompts.indexes(PROBES)]
    sampler = Sampler(PROBE_TEMPERATURE, generator=torch.Generator(policy.device).manual_seed(0))
    decoding = DecodingSpec(rules, sampler, min(PROBE_TOKENS, rules.max_new_tokens))
    responses, logprobs = engine.generate(prompts, 1, decoding)
    expected = policy.log_probs(prompts, responses, PROBE_TEMPERATURE)
    gaps = [np.abs(theirs - ours.float().cpu().numpy()) for theirs, ours in zip(logprobs, expected, strict=True)]
    return float(np.concatenate(gaps).max())
