"""The contract of an algorithm: what a `Trainer` asks of it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from agents.policy import Evaluation
from agents.rollout import Rollout
from llm_env.rules import Rules

LossTerms = dict[str, tuple[float, Tensor]]  # by name: a coefficient, and a weighted sum over tokens
Statistics = dict[str, Tensor]  # by name: a mean over the action tokens


class Objective(Protocol):
    """An algorithm: advantages and a loss, and how they are trained on.

    Every `LanguageAgent` is one. The components of this package see this Protocol only.

    Attributes:
        needs_old_logp: whether the loss reads `Rollout.old_logp`, log pi before the first update.
        needs_values: whether there is a value head (`Rollout.old_values`, `last_values` and `Evaluation.values`).
        group_size: G, responses to each prompt.
    """

    @property
    def needs_old_logp(self) -> bool: ...  # noqa: D102

    @property
    def needs_values(self) -> bool: ...  # noqa: D102

    @property
    def group_size(self) -> int: ...  # noqa: D102

    def check_env(self, rules: Rules) -> None:
        """Check that an env can serve the algorithm's arguments.

        Raises:
            ValueError: If it cannot.
        """

    def needs_more(self, rollouts: list[Rollout]) -> bool:
        """Return whether another rollout is to be collected before the update (dynamic sampling)."""

    def select_training_rows(self, rollout: Rollout) -> list[int] | None:
        """Return the episodes to train on; None for all."""

    def compute_advantages(self, rollout: Rollout) -> None:
        """Set `rollout.advantages`, and `rollout.returns` where there is a value head."""

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> tuple[LossTerms, Statistics]:
        """Compute the loss of one micro-batch.

        Args:
            batch: B episodes of the rollout.
            evaluation: log-probs, entropies and values of their tokens now, by the training path.
            weights: (B, T), the tokens' weights in the loss of the whole optimizer step.

        Returns:
            The terms of the loss by name, each a coefficient and a weighted sum over tokens; and statistics by name, means
            over the action tokens.
        """

    def should_stop(self, statistics: dict[str, float]) -> bool:
        """Return whether to end the passes over this rollout, given the statistics of the last optimizer step."""
