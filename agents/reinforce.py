"""REINFORCE: naive reward, or a critic as baseline."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agents.advantages import discounted_returns
from agents.base import LanguageAgent, LossTerms
from agents.checks import check_numbers
from agents.losses import value_terms, weighted_sum
from agents.policy import Evaluation
from agents.rollout import Rollout


class REINFORCE(LanguageAgent):
    """grad E[r] = E[sum_t grad log pi(a_t) A_t] (Williams 1992), one optimizer step per minibatch of fresh episodes.

    Args:
        policy, env, learning_rate: see `LanguageAgent`.
        baseline: None for the naive A_t = G_t, the reward to go; `"value"` for A_t = G_t - V(s_t) with a learned V.
        gamma: discount per token.
        ent_coef: weight of an entropy bonus.
        vf_coef: weight of the value loss.
        common: see `LanguageAgent`.
    """

    needs_old_logp = False

    def __init__(
        self,
        policy: Any,
        env: Any = None,
        learning_rate: Any = None,
        *,
        baseline: str | None = None,
        gamma: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        **common: Any,
    ) -> None:
        if baseline not in (None, "value"):
            raise ValueError(f"baseline={baseline!r} must be None or 'value'")
        check_numbers(0.0, gamma=gamma, vf_coef=vf_coef)
        check_numbers(ent_coef=ent_coef)
        self.baseline = baseline
        self.gamma = gamma
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        super().__init__(policy, env, learning_rate, **common)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        """Whether there is a critic."""
        return self.baseline == "value"

    def compute_advantages(self, rollout: Rollout) -> None:
        """A_t = G_t, less V(s_t) where there is a critic."""
        returns = discounted_returns(rollout.rewards, rollout.mask, self.gamma)
        if rollout.old_values is None:
            rollout.advantages = returns
        else:
            rollout.advantages, rollout.returns = returns - rollout.old_values, returns

    def loss(self, batch: Rollout, result: Evaluation, weights: Tensor) -> tuple[LossTerms, dict[str, Tensor]]:
        """-A log pi, the entropy bonus and the value loss."""
        assert batch.advantages is not None
        terms: LossTerms = {
            "policy_gradient_loss": (1.0, weighted_sum(-result.logp * batch.advantages, weights)),
            "entropy_loss": (self.ent_coef, -weighted_sum(result.entropy, weights)),
        }
        if result.values is not None and batch.returns is not None and batch.old_values is not None:
            errors = value_terms(result.values[:, :-1], batch.old_values, batch.returns, None)
            terms["value_loss"] = (self.vf_coef, weighted_sum(errors, weights))
        return terms, {}
