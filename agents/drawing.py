"""Who draws an agent's responses: its policy, or an engine that is given the weights and checked after it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from agents.engines import Engine, WeightsLost, as_engine, check_engine
from agents.generation import weights_version
from agents.inference import Inference
from agents.policy import LanguagePolicy
from agents.rollout import Respond, Responses, clock_of
from agents.sampler import Sampler
from llm_env.rules import Rules

PROBES, PROBE_TOKENS = 4, 16  # prompts and tokens of a response by which a push is verified
HOT = 2.0  # temperature of those tokens: a trained policy's own say little of its weights, see `measured_gap`


class Drawing(Inference):
    """What draws the responses in training; the attributes are arguments of `LanguageAgent`."""

    engine: Any = None
    engine_kwargs: dict[str, Any] | None = None
    _link: EngineLink | None = None
    _own_engine = False

    def set_engine(self, engine: Any, engine_kwargs: dict[str, Any] | None = None) -> None:
        """Draw with another engine from here on, or with the policy (None); one that the agent made itself is closed.

        Raises:
            ImportError: vLLM is to run in this process and is not installed.
            ValueError, TypeError: there is no such engine, or it does not fit the env.
        """
        made = as_engine(engine, engine_kwargs)
        if self.env is not None:
            check_engine(engine, self.rules, by_response=clock_of(self.env) is not None, sharded=self.world.sharded)
        if self._link is not None and not self._own_engine:
            self._link.engine.close()
        self.engine, self.engine_kwargs = engine, engine_kwargs
        self._own_engine = engine is not None and not isinstance(engine, str)
        self._link = None if made is None else EngineLink(made)

    def responder(self, ahead: bool = False) -> Respond | None:
        """What draws the responses in training in the policy's place; None where the policy does.

        With `ahead` the engine is given the weights now, and what is returned may be called while they are trained.

        Raises:
            ValueError: the agent was loaded from a file, and its engine, an object, was not in it.
            RuntimeError, ConnectionError: see `EngineLink.respond`.
        """
        if self.engine is None:
            if self._own_engine:
                raise ValueError(
                    "the agent was trained with an engine object, which is not in its file; call agent.set_engine(engine), "
                    "or agent.set_engine(None) to let the policy draw"
                )
            return None
        if self._link is None:  # the agent was loaded
            self.set_engine(self.engine, self.engine_kwargs)
            assert self._link is not None
        if not ahead:
            return partial(self._link.respond, self.policy, self._n_updates)
        self._link.bring_up_to_date(self.policy, self._n_updates, self.rules)
        return self._link.engine.respond

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_link", *(["engine"] if self._own_engine else [])]


class EngineLink:
    """An agent's hold on its engine: started at the first use, and given the weights whenever they have moved.

    Attributes:
        gap: the largest difference of log-probs, in nats, found after the last push.
        seconds: what the last push and its verification took.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.gap, self.seconds = float("nan"), 0.0
        self._rules: Rules | None = None
        self._pushed: tuple[int, int, int] | None = None

    def respond(
        self,
        policy: LanguagePolicy,
        updates: int,
        prompts: Sequence[Sequence[int]],
        rules: Rules,
        sampler: Sampler,
        group_size: int,
    ) -> Responses:
        """`Engine.respond` with the policy's weights as they are now, after so many updates.

        Raises:
            RuntimeError: a push did not arrive; the message says how far off the engine is.
            ConnectionError: the engine cannot be reached, or lost the weights twice.
        """
        try:
            self.bring_up_to_date(policy, updates, rules)
            return self.engine.respond(prompts, rules, sampler, group_size)
        except WeightsLost:
            self._pushed = self._rules = None
            self.bring_up_to_date(policy, updates, rules)
            return self.engine.respond(prompts, rules, sampler, group_size)

    def bring_up_to_date(self, policy: LanguagePolicy, updates: int, rules: Rules) -> None:
        """Start the engine, and give it the weights, where that is due; see `respond`."""
        if rules is not self._rules:
            self._rules = self._pushed = None
            self.engine.start(policy, rules)
            self._rules = rules
        weights = id(policy.lm), weights_version(policy.lm), updates
        if weights == self._pushed:
            return
        began, self._pushed = time.perf_counter(), None
        self._push(policy, rules)
        self._pushed, self.seconds = weights, time.perf_counter() - began

    def _push(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Push and verify; once more where the engine still draws with other weights."""
        tolerance = self.engine.tolerance
        for _ in range(2):
            self.engine.push(policy)
            self.gap = measured_gap(self.engine, policy, rules)
            if self.gap <= tolerance:  # a NaN is not
                return
        raise RuntimeError(
            f"the engine's log-probs are {self.gap:.3g} nats off the policy's after its weights were pushed twice, more than "
            f"the tolerance of {tolerance:g}: it draws with other weights. Start it anew (agent.set_engine); where a lower "
            "precision or other kernels explain the gap, raise the tolerance. The agent is as it was before this rollout"
        )


@torch.no_grad()
def measured_gap(engine: Engine, policy: LanguagePolicy, rules: Rules) -> float:
    """The largest difference of log-probs, in nats, between engine and training path on tokens that the engine draws.

    At a temperature of 2. At 1 the pupil draws tokens that it is sure of, and an engine one step of 3e-4 behind it is off by
    0.001 nats on them; at 2 by 0.02, where a push that arrived leaves 3e-7. The agent's random numbers are not touched.
    """
    prompts = [[int(token) for token in ids] for ids in rules.prompts.ids[:PROBES]]
    sampler = Sampler(HOT, generator=torch.Generator(policy.device).manual_seed(0))
    responses, logps = engine.respond(prompts, rules, sampler, 1, min(PROBE_TOKENS, rules.max_new_tokens))
    expected = policy.log_probs(prompts, responses, HOT)
    gaps = [np.abs(theirs - ours.float().cpu().numpy()) for theirs, ours in zip(logps, expected, strict=True)]
    return float(np.concatenate(gaps).max())
