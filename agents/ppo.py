"""PPO: a critic as baseline, and the ratio to the old policy clipped."""

from __future__ import annotations

from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from typing_extensions import Unpack

from agents.advantages import first_actions, gae, gae_turns, normalize
from agents.base import CommonArguments, LanguageAgent
from agents.losses import clipped_terms, ratio, ratio_statistics, turn_weights, value_terms, weighted_sum
from agents.policy import Evaluation
from agents.rollout import Rollout
from agents.training.objective import LossTerms, Statistics
from agents.validation import check_choice, check_numbers
from llm_env.rewards import ENV_REWARD

GAE_LEVELS = ("token", "turn")


class PPO(LanguageAgent):
    """Proximal policy optimization on tokens (Schulman et al. 2017, arXiv 1707.06347), with the settings of
    lm-human-preferences (https://iclr-blogposts.github.io/2024/blog/the-n-implementation-details-of-rlhf-with-ppo/).

    The KL to a reference, if wanted, is in the env's reward: make the env with `reference=` and `kl_coef=`.

    Args:
        policy, env, learning_rate: see `LanguageAgent`.
        n_epochs: passes over a rollout.
        gamma: discount factor per token, or per turn with `gae_level="turn"`.
        gae_lambda: lambda of the advantage estimate.
        gae_level: `"token"`: GAE over action tokens (observations are skipped). `"turn"`: GAE over turns. V is read and trained
            at the first action of each turn only, and all tokens of a turn have its advantage. See
            `agents.advantages.gae_turns`.
        clip_range: eps of the ratio, a number or an SB3 schedule.
        clip_range_vf: eps of the value, a number or an SB3 schedule; None for no clipping.
        normalize_advantage: normalize to mean 0 and standard deviation 1 over all action tokens of the rollout (over turns with
            `gae_level="turn"`). All 0 if every episode of the rollout had the same return.
        ent_coef: weight of an entropy bonus.
        vf_coef: weight of the value loss.
        separate_critic: V has a separate network, initialized as a copy of the policy's, instead of a head on the policy's.
            Where the policy is an adapter, V has a second adapter on the same base. The head is always trained in full.
        target_kl: stop a rollout's passes once approx_kl is over 1.5 times this; None for never.
        bootstrap_truncated: add gamma * V of the state after the last token to truncated episodes, as SB3 does. None (default)
            does so for episodes that a text env truncated; and with `gamma` below 1 for those that `max_turns` truncated, if no
            reward function was paid at their end. With `gamma=1` the latter would teach that playing on is as good as winning:
            the value of an episode that never ends would be its own target. Length limits are ends by default, because the
            score was paid. V is 0 where the last observation did not fit.
        aggregation: how token losses become one number; see `agents.losses.token_weights`.
        common: see `LanguageAgent`.
    """

    needs_values = True
    adam_epsilon = 1e-5

    def __init__(
        self,
        policy: Any,
        env: Any = None,
        learning_rate: float | Schedule | None = None,
        *,
        n_epochs: int = 4,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        gae_level: str = "token",
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = 0.2,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        separate_critic: bool = False,
        target_kl: float | None = None,
        bootstrap_truncated: bool | None = None,
        aggregation: str = "token",
        **common: Unpack[CommonArguments],
    ) -> None:
        check_numbers(0.0, gamma=gamma, gae_lambda=gae_lambda, clip_range=clip_range, clip_range_vf=clip_range_vf)
        check_numbers(0.0, vf_coef=vf_coef, target_kl=target_kl)
        check_numbers(ent_coef=ent_coef)
        check_choice("gae_level", gae_level, GAE_LEVELS)
        check_choice("bootstrap_truncated", bootstrap_truncated, (None, True, False))
        self.gae_level = gae_level
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.clip_range = FloatSchedule(clip_range)
        self.clip_range_vf = None if clip_range_vf is None else FloatSchedule(clip_range_vf)
        self.normalize_advantage = normalize_advantage
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        self.separate_critic = separate_critic
        self.target_kl = target_kl
        self.bootstrap_truncated = bootstrap_truncated
        super().__init__(policy, env, learning_rate, n_epochs=n_epochs, aggregation=aggregation, **common)

    def compute_advantages(self, rollout: Rollout) -> None:
        """Compute GAE over action tokens or turns. The values' targets are computed before advantages are normalized."""
        assert rollout.old_values is not None and rollout.last_values is not None
        last = torch.where(bootstraps(rollout, self.bootstrap_truncated, self.gamma), rollout.last_values, 0.0)
        counted = rollout.mask
        if self.gae_level == "token":
            advantages, rollout.returns = gae(
                rollout.rewards, rollout.old_values, rollout.mask, self.gamma, self.gae_lambda, last
            )
        else:
            advantages, rollout.returns = gae_turns(
                rollout.rewards, rollout.old_values, rollout.turn_ids, self.gamma, self.gae_lambda, last
            )
            counted = first_actions(rollout.turn_ids)
        if self.normalize_advantage:
            # Where all episodes earned the same, the advantages are the critic's errors alone. Blown up to a standard
            # deviation of 1 they undo what has been learned, so such a rollout trains the critic only.
            same = rollout.scores.amax() == rollout.scores.amin()
            advantages = torch.zeros_like(advantages) if same else normalize(advantages, rollout.mask, counted)
        rollout.advantages = advantages

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> tuple[LossTerms, Statistics]:
        """Compute the clipped surrogate, the clipped value loss and the entropy bonus."""
        assert batch.old_logp is not None and batch.advantages is not None
        assert evaluation.values is not None and batch.old_values is not None and batch.returns is not None
        clip = self.clip_range(self._current_progress_remaining)
        clip_vf = None if self.clip_range_vf is None else self.clip_range_vf(self._current_progress_remaining)
        errors = value_terms(evaluation.values[:, :-1], batch.old_values, batch.returns, clip_vf)
        value_weights = weights if self.gae_level == "token" else turn_weights(weights, batch.turn_ids)
        surrogate = clipped_terms(ratio(evaluation.logp, batch.old_logp), batch.advantages, clip)
        terms: LossTerms = {
            "policy_gradient_loss": (1.0, weighted_sum(surrogate, weights)),
            "value_loss": (self.vf_coef, weighted_sum(errors, value_weights)),
            "entropy_loss": (self.ent_coef, -weighted_sum(evaluation.entropy, weights)),
        }
        statistics = ratio_statistics(evaluation.logp, batch.old_logp, batch.mask, clip, clip)
        return terms, statistics | {"clip_range": torch.tensor(clip)}

    def should_stop(self, statistics: dict[str, float]) -> bool:
        """Return whether approx_kl is over 1.5 * target_kl."""
        return self.target_kl is not None and statistics["approx_kl"] > 1.5 * self.target_kl


def bootstraps(rollout: Rollout, bootstrap_truncated: bool | None, gamma: float) -> Tensor:
    """Return whether V of the state after the last token continues an episode's return, (B,) bool; see `PPO`.

    Args:
        rollout: the episodes, with their last infos.
        bootstrap_truncated: True for all truncated episodes, False for none. None for those that a text env or
            `rollout_timeout` truncated, and with `gamma` below 1 for those that `max_turns` truncated, if no reward function
            was paid at their end.
        gamma: discount factor.
    """
    wanted = []
    for info in rollout.infos:
        cause = info.get("truncated_by")
        is_paid_at_end = any(key.startswith("reward/") and key != f"reward/{ENV_REWARD}" for key in info)
        by_default = cause in ("env", "rollout_timeout") or (cause == "max_turns" and gamma < 1 and not is_paid_at_end)
        is_wanted = by_default if bootstrap_truncated is None else bootstrap_truncated
        wanted.append(is_wanted and info.get("final_observation_fits", True))
    return torch.tensor(wanted, device=rollout.truncated.device) & rollout.truncated
