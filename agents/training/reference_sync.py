"""Iterative GRPO: after some rollouts the policy becomes the reference (DeepSeekMath, arXiv 2402.03300, algorithm 1)."""

from __future__ import annotations

from typing import Any

from agents.distributed.fsdp import full_params, shard_state_dict
from agents.policy import LanguagePolicy
from agents.rollout import Rollout
from llm_env.reference import BaseReference, Reference


class ReferenceSync:
    """Counts rollouts, and copies the policy's weights to the reference after every `every` of them.

    Attributes:
        has_moved: whether the reference has other weights than the env was made with.
    """

    def __init__(self) -> None:
        self.has_moved = False
        self._num_rollouts = 0
        self._rollouts: list[Rollout] = []

    def after_update(
        self, policy: LanguagePolicy, reference: Reference | None, every: int | None, rollout: Rollout, keep: bool
    ) -> list[Rollout] | None:
        """Count a rollout; after the last one of an iteration, copy the policy's weights to the reference.

        Args:
            policy: has been updated.
            reference: the env's.
            every: rollouts in an iteration; None for never.
            rollout: what the policy was updated on.
            keep: whether to keep the iteration's rollouts.

        Returns:
            The rollouts of the iteration that ended, where they were kept; None where none ended.
        """
        if every is None:
            return None
        assert reference is not None
        self._num_rollouts += 1
        if keep:
            self._rollouts.append(rollout)
        if self._num_rollouts < every:
            return None
        with full_params(policy if policy.adapter is not None else None):  # an adapter is merged with the whole base
            weights = shard_state_dict(dict(policy.weights()), reference.model.state_dict())
        reference.model.load_state_dict(weights)
        self.has_moved = True
        rollouts, self._rollouts, self._num_rollouts = self._rollouts, [], 0
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, and the rollouts that are kept for the end of the iteration."""
        return {"has_moved": self.has_moved, "num_rollouts": self._num_rollouts, "rollouts": list(self._rollouts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.has_moved, self._num_rollouts = state["has_moved"], state["num_rollouts"]
        self._rollouts = list(state["rollouts"])


def check_reference_sync(policy: LanguagePolicy, reference: Reference | None, every: int | None) -> None:
    """Check that the policy can become the reference.

    Raises:
        ValueError: If there is no reference, it is the policy's base, its weights have other shapes, or the policy's adapter
            cannot be merged.
    """
    if every is None:
        return
    if reference is None:
        raise ValueError(
            f"reference_every={every} needs a reference that can follow the policy; make the env with reference=<path or model>"
        )
    if isinstance(reference, BaseReference):
        raise ValueError(
            f"reference_every={every} makes the policy the reference, but the env's reference='base' is the adapter's base, "
            "which cannot move; drop reference_every, or make the env with reference=<path or model>"
        )
    if policy.adapter is not None and policy.adapter.quantized:
        raise ValueError(
            f"reference_every={every} makes the policy the reference, but its base is quantized, and the adapter cannot be "
            "merged into it; drop reference_every"
        )
    of_policy, of_reference = (
        {name: tuple(value.shape) for name, value in model.state_dict().items()} for model in (policy.base, reference.model)
    )
    if of_policy != of_reference:
        differing = sorted(set(of_policy.items()) ^ set(of_reference.items()))[:2]
        raise ValueError(
            f"reference_every={every} makes the policy the reference, but their weights have different shapes, for instance "
            f"{differing}; make the env with a reference of the policy's architecture"
        )
    if reference.model is policy.base:
        raise ValueError("the env's reference is the policy itself, so that their KL is always 0; use Reference(model), a copy")
