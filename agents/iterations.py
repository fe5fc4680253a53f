"""Iterative GRPO: after some rollouts the policy becomes the reference (DeepSeekMath, arXiv 2402.03300, algorithm 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from agents.base import LanguageAgent
from agents.rollout import Rollout
from agents.sharded import scattered, whole
from llm_env.reference import BaseReference
from llm_env.rules import Rules

Hook = Callable[[Any, list[Rollout]], None]


class Iterations(LanguageAgent):
    """Counts rollouts and, every `reference_every` of them, moves the reference and calls `on_iteration`."""

    reference_every: int | None
    on_iteration: Hook | None

    def _begin_iterations(self, reference_every: int | None, on_iteration: Hook | None) -> None:
        if on_iteration is not None and not callable(on_iteration):
            raise TypeError(f"on_iteration={on_iteration!r} must be callable, as on_iteration(agent, rollouts)")
        if on_iteration is not None and reference_every is None:
            raise ValueError("on_iteration is called every `reference_every` rollouts, which is None; say how often")
        self.reference_every, self.on_iteration = reference_every, on_iteration
        self._had_hook = on_iteration is not None
        self._rollouts_since = 0
        self._rollouts: list[Rollout] = []

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "on_iteration"]

    def _check_reference(self, rules: Rules) -> None:
        if self.reference_every is None:
            return
        if rules.reference is None:
            raise ValueError(
                f"reference_every={self.reference_every} needs a reference that can follow the policy: make the env with "
                "reference=<path or model>"
            )
        if isinstance(rules.reference, BaseReference):
            raise ValueError(
                f"reference_every={self.reference_every} makes the policy the reference, but the env's reference='base' is the "
                "adapter's base, which cannot move; drop reference_every, or give the env reference=<path or model>"
            )
        if self.policy.adapter is not None and self.policy.adapter.quantized:
            raise ValueError(
                f"reference_every={self.reference_every} makes the policy the reference, but its base is quantized, and the "
                "adapter cannot be merged into it; drop reference_every"
            )
        mine, theirs = (
            {name: tuple(value.shape) for name, value in model.state_dict().items()}
            for model in (self.policy.base, rules.reference.model)
        )
        if mine != theirs:
            differing = sorted(set(mine.items()) ^ set(theirs.items()))[:2]
            raise ValueError(
                f"reference_every={self.reference_every} makes the policy the reference, but they are models of different "
                f"shapes, for instance {differing}; give the env a reference of the policy's kind"
            )
        if rules.reference.model is self.policy.base:
            raise ValueError("the env's reference is the policy itself, so that their KL is always 0; let Reference copy it")

    def train(self, rollout: Rollout) -> None:
        """The update, and after the last rollout of an iteration the policy becomes the reference."""
        super().train(rollout)
        if self.reference_every is None:
            return
        if self._had_hook and self.on_iteration is None:
            self._had_hook = False
            warnings.warn(
                "this agent was saved with an on_iteration hook, which is not in the file: it is not called any more. Give it "
                f"again with {type(self).__name__}.load(path, env=env, on_iteration=hook)",
                stacklevel=2,
            )
        self._rollouts_since += 1
        if self.on_iteration is not None:
            self._rollouts.append(rollout)
        if self._rollouts_since < self.reference_every:
            return
        if self._ahead is not None:
            self._ahead.wait()  # it asks this reference
        reference = self.rules.reference
        assert reference is not None
        with whole(self.policy if self.policy.adapter is not None else None):  # an adapter is merged with the whole base
            weights = scattered(dict(self.policy.weights()), reference.model.state_dict())
        reference.model.load_state_dict(weights)
        self._reference_moved = True
        rollouts, self._rollouts, self._rollouts_since = self._rollouts, [], 0
        if self.on_iteration is not None:
            self.on_iteration(self, rollouts)
