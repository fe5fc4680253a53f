"""GRPO: the mean of a group of answers to one prompt takes the critic's place."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor

from agents.advantages import group_relative
from agents.base import LanguageAgent, LossTerms
from agents.checks import check_numbers
from agents.losses import clipped_terms, kl_k3, ratio_statistics, weighted_sum
from agents.policy import Evaluation
from agents.rollout import Rollout
from llm_env.arguments import whole


class GRPO(LanguageAgent):
    """Group relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1) with outcome supervision.

    Every token of answer i has the advantage A_i = (r_i - mean) / (std + 1e-4) over its group; the loss is the clipped
    surrogate plus `kl_coef` times k3, averaged over a response's tokens and then over responses (`aggregation="sequence"`).

    Args:
        policy, env, learning_rate: see `LanguageAgent`.
        group_size: G, answers per prompt, at least 2; divides `n_envs`.
        n_epochs: passes over a rollout (mu of the paper).
        kl_coef: beta of the KL to the env's reference, in the loss; with 0 no reference is needed.
        clip_range: eps of the ratio, a number or an SB3 schedule.
        clip_range_high: eps of the upper bound; `clip_range` by default.
        scale: what the advantages are divided by: `"std"` of the group, std of the `"batch"`, or `"none"`.
        aggregation: `"sequence"` (the paper), `"token"` (DAPO) or `"constant"` (Dr. GRPO).
        ent_coef: weight of an entropy bonus.
        common: see `LanguageAgent`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any = None,
        learning_rate: float | Schedule | None = None,
        *,
        group_size: int = 8,
        n_epochs: int = 1,
        kl_coef: float = 0.0,
        clip_range: float | Schedule = 0.2,
        clip_range_high: float | Schedule | None = None,
        scale: str = "std",
        aggregation: str = "sequence",
        ent_coef: float = 0.0,
        **common: Any,
    ) -> None:
        group_relative(torch.zeros(2), 2, scale)
        group_size = whole("group_size", group_size, 2)  # a group is its own baseline
        check_numbers(0.0, kl_coef=kl_coef, clip_range=clip_range, clip_range_high=clip_range_high)
        check_numbers(ent_coef=ent_coef)
        self.group_size = group_size
        self.kl_coef = kl_coef
        self.clip_range = FloatSchedule(clip_range)
        self.clip_range_high = None if clip_range_high is None else FloatSchedule(clip_range_high)
        self.scale = scale
        self.ent_coef = ent_coef
        super().__init__(policy, env, learning_rate, n_epochs=n_epochs, aggregation=aggregation, **common)

    def compute_advantages(self, rollout: Rollout) -> None:
        """The group-relative score of an answer is the advantage of each of its tokens."""
        scores = group_relative(rollout.scores, self.group_size, self.scale)
        rollout.advantages = scores[:, None] * rollout.mask

    def loss(self, batch: Rollout, result: Evaluation, weights: Tensor) -> tuple[LossTerms, dict[str, Tensor]]:
        """The clipped surrogate, the KL to the reference and the entropy bonus."""
        assert batch.old_logp is not None and batch.advantages is not None
        low = self.clip_range(self._current_progress_remaining)
        high = low if self.clip_range_high is None else self.clip_range_high(self._current_progress_remaining)
        surrogate = clipped_terms(result.logp, batch.old_logp, batch.advantages, low, high)
        terms: LossTerms = {
            "policy_gradient_loss": (1.0, weighted_sum(surrogate, weights)),
            "entropy_loss": (self.ent_coef, -weighted_sum(result.entropy, weights)),
        }
        if self.kl_coef:
            assert batch.ref_logp is not None
            terms["kl_loss"] = (self.kl_coef, weighted_sum(kl_k3(result.logp, batch.ref_logp), weights))
        return terms, ratio_statistics(result.logp, batch.old_logp, batch.mask, low, high) | {"clip_range": torch.tensor(low)}
