"""GRPO: the mean of a group of responses to one prompt replaces the critic; and the methods that were built on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import FloatSchedule
from torch import Tensor
from typing_extensions import Unpack

from agents.advantages import SCALES, equal_groups, group_relative, group_relative_steps
from agents.base import DEFAULT_GROUP_SIZE, CommonArguments, LanguageAgent
from agents.losses import (
    KL_ESTIMATORS,
    RATIO_LEVELS,
    SURROGATES,
    check_dual_clip,
    cispo_terms,
    clipped_terms,
    ratio,
    ratio_statistics,
    weighted_sum,
)
from agents.policy import Evaluation
from agents.rollout import Rollout
from agents.training.objective import LossTerms, Statistics
from agents.validation import check_choice, check_counts, check_numbers, check_process_supervision
from llm_env.arguments import check_int
from llm_env.reference import KLController, coefficient
from llm_env.rules import Rules
from llm_env.warn import warn

SUPERVISION = ("outcome", "process")


class GRPO(LanguageAgent):
    """Group relative policy optimization (DeepSeekMath, arXiv 2402.03300, section 4.1) and the methods that grew from it.

    Every token of answer i has the advantage A_i = (r_i - mean) / (std + 1e-4) over its group; the loss is the clipped
    surrogate plus `kl_coef` times k3, averaged over a response's tokens and then over responses. The defaults are the
    paper's form; arguments that differ from them make the other published methods:

    | method | arguments | source |
    | --- | --- | --- |
    | GRPO, outcome supervision | `kl_coef=0.04` | DeepSeekMath 4.1.2, arXiv 2402.03300 |
    | GRPO, process supervision | `supervision="process"` | DeepSeekMath 4.1.3 |
    | iterative GRPO | `reference_every=k`, `on_iteration=hook` | DeepSeekMath, algorithm 1 |
    | Dr. GRPO | `aggregation="constant"`, `scale="none"` | arXiv 2503.20783 |
    | DAPO | `aggregation="token"`, `clip_range_high=0.28`, `max_resamples=10`, the env's `overlong_buffer` | arXiv 2503.14476 |
    | overlong filtering | `mask_truncated=True` | DAPO, section 3.4 |
    | GSPO | `ratio_level="sequence"`, `clip_range=3e-4`, `clip_range_high=4e-4` | arXiv 2507.18071 |
    | CISPO | `surrogate="cispo"`, `clip_range=1.0`, `clip_range_high` tuned, `aggregation="token"` | arXiv 2506.13585 |
    | dual clip | `dual_clip=3.0` | arXiv 1912.09729 |
    | DeepSeek-V3.2's KL | `kl_coef`, `unbiased_kl=True` (TRL's default) | arXiv 2512.02556 |
    | turn-level ratio (GSPO with a turn as the sequence) | `ratio_level="turn"` | arXiv 2507.18071 |
    | step rewards of turns, pooled over the group | `supervision="process"`, a text env that pays turns | DeepSeekMath 4.1.3 |
    | MT-GRPO (turn and outcome advantages, normalized apart) | not available; the row above pools both | arXiv 2505.11821 |
    | GiGPO (groups of equal states within episodes) | not available | arXiv 2505.10978 |
    | REINFORCE++ with a group baseline | `scale="batch"`, `aggregation="token"`, `kl_estimator="k2"` | arXiv 2501.03262 |

    RLOO, without ratio and clipping, is `REINFORCE(baseline="leave_one_out")`. A penalty by k1 belongs into the reward: that
    is the env's `kl_coef`.

    Args:
        policy, env, learning_rate: see `LanguageAgent`.
        group_size: G, answers per prompt, at least 2; divides `n_envs`.
        n_epochs: passes over a rollout (mu of the paper).
        kl_coef: beta of the KL to the env's reference, in the loss: a number, or a controller from `llm_env.reference`; with
            0 no reference is needed.
        kl_estimator: which estimate of the KL is in the loss: `"k3"` (the paper) or `"k2"` (on-policy its gradient is that
            of the reverse KL). `"k1"` is possible, warns, and moves nothing on-policy: its expected gradient is 0.
        unbiased_kl: multiply the estimate by the token's ratio, which makes k3 and its gradient unbiased for the reverse KL, on
            other policies' tokens too. On-policy that is the gradient of `"k2"`.
        clip_range: eps of the ratio, a number or an SB3 schedule.
        clip_range_high: eps of the upper bound ("clip-higher"); `clip_range` by default.
        dual_clip: c > 1, a bound on the loss of a negative advantage; None for none.
        ratio_level: `"token"`; or `"sequence"` for one ratio per response, the geometric mean of its tokens' ratios; or
            `"turn"` for one ratio per turn.
        surrogate: `"clip"`, min(rho A, clip(rho) A), or `"cispo"`, clip(rho) A log pi with no gradient through the ratio.
        scale: what the advantages are divided by: `"std"` of the group, std of the `"batch"`, or `"none"`.
        aggregation: `"sequence"` (the paper), `"token"` (DAPO) or `"constant"` (Dr. GRPO: `max_new_tokens` per response).
        supervision: `"outcome"`, one score an answer, or `"process"`: the rewards of the steps that a reward function returns
            are normalized over the group, and a token has the sum of those that end at it or after it. A plain score is a step
            that ends at the last token. With a text env every turn is a step, also one that pays 0.
        max_resamples: how many more batches may be sampled to fill up the groups whose rewards are all equal (dynamic
            sampling, DAPO section 3.2); where they do not suffice, such groups stay in the rollout. All that is sampled is
            counted and logged.
        reference_every: rollouts after which the policy becomes the reference; None for never.
        on_iteration: called as `on_iteration(agent, rollouts)` every `reference_every` rollouts, after that, with the rollouts
            since the last time: the place to train a reward model on. It is not saved with the agent.
        ent_coef: weight of an entropy bonus.
        common: see `LanguageAgent`.
    """

    def __init__(
        self,
        policy: Any,
        env: Any = None,
        learning_rate: float | Schedule | None = None,
        *,
        group_size: int = DEFAULT_GROUP_SIZE,
        n_epochs: int = 1,
        kl_coef: float | KLController = 0.0,
        kl_estimator: str = "k3",
        unbiased_kl: bool = False,
        clip_range: float | Schedule = 0.2,
        clip_range_high: float | Schedule | None = None,
        dual_clip: float | None = None,
        ratio_level: str = "token",
        surrogate: str = "clip",
        scale: str = "std",
        aggregation: str = "sequence",
        supervision: str = "outcome",
        max_resamples: int = 0,
        reference_every: int | None = None,
        on_iteration: Callable[[Any, list[Rollout]], None] | None = None,
        ent_coef: float = 0.0,
        **common: Unpack[CommonArguments],
    ) -> None:
        check_choice("scale", scale, SCALES)
        check_choice("ratio_level", ratio_level, RATIO_LEVELS)
        check_choice("surrogate", surrogate, SURROGATES)
        check_dual_clip(dual_clip, surrogate)
        check_choice("supervision", supervision, SUPERVISION)
        check_choice("kl_estimator", kl_estimator, sorted(KL_ESTIMATORS))
        group_size = check_int("group_size", group_size, 2)  # a group is its own baseline
        check_numbers(0.0, kl_coef=coefficient(kl_coef), clip_range=clip_range, clip_range_high=clip_range_high)
        check_numbers(1.0, dual_clip=dual_clip)
        check_numbers(ent_coef=ent_coef)
        check_counts(reference_every=reference_every)
        if kl_estimator == "k1" and coefficient(kl_coef) and not unbiased_kl:
            warn(
                "kl_estimator='k1' in the loss has an expected gradient of 0 on-policy: it holds the policy nowhere. Take 'k3' "
                "or 'k2', or put k1 into the reward with the env's kl_coef"
            )
        self.group_size = group_size
        self.kl_coef = kl_coef
        self.kl_estimator = kl_estimator
        self.unbiased_kl = unbiased_kl
        self.clip_range = FloatSchedule(clip_range)
        self.clip_range_high = None if clip_range_high is None else FloatSchedule(clip_range_high)
        self.dual_clip = dual_clip
        self.ratio_level = ratio_level
        self.surrogate = surrogate
        self.scale = scale
        self.supervision = supervision
        self._warned_of_unpaid_steps = False
        self.max_resamples = check_int("max_resamples", max_resamples, 0)
        self.ent_coef = ent_coef
        if on_iteration is not None and not callable(on_iteration):
            raise TypeError(f"on_iteration={on_iteration!r} must be callable, as on_iteration(agent, rollouts)")
        if on_iteration is not None and reference_every is None:
            raise ValueError("on_iteration is called every `reference_every` rollouts, which is None; say how often")
        self.reference_every, self.on_iteration = reference_every, on_iteration
        super().__init__(policy, env, learning_rate, n_epochs=n_epochs, aggregation=aggregation, **common)

    def check_env(self, rules: Rules) -> None:
        """Check that an env's rewards can serve the supervision."""
        if self.supervision == "process":
            check_process_supervision(rules)

    def needs_more(self, rollouts: list[Rollout]) -> bool:
        """Return whether too few groups have rewards that differ, and `max_resamples` allows another rollout."""
        useful = sum(int((~equal_groups(rollout.scores, self.group_size)).sum()) for rollout in rollouts)
        return len(rollouts) <= self.max_resamples and useful < len(rollouts[0]) // self.group_size

    def select_training_rows(self, rollout: Rollout) -> list[int] | None:
        """Return the first groups whose rewards differ, filled up with others to the size of one rollout."""
        if len(rollout) == self.n_envs:
            return None
        equal = equal_groups(rollout.scores, self.group_size).cpu()
        groups = equal.to(torch.int8).sort(stable=True).indices[: self.n_envs // self.group_size].sort().values
        return [row for group in groups.tolist() for row in range(group * self.group_size, (group + 1) * self.group_size)]

    def compute_advantages(self, rollout: Rollout) -> None:
        """Give each token the group-relative score of its response, or of the response's steps from the token on."""
        if self.supervision == "process":
            self._check_steps(rollout)
            steps = group_relative_steps(rollout.rewards, rollout.step_ends, self.group_size, self.scale)
            rollout.advantages = steps * rollout.mask
        else:
            rollout.advantages = group_relative(rollout.scores, self.group_size, self.scale)[:, None] * rollout.mask

    def _check_steps(self, rollout: Rollout) -> None:
        """Warn once if most turns of a text env pay 0: longer episodes that succeed then score lower than short ones."""
        ends = rollout.step_ends.bool()
        unpaid = float((rollout.rewards[ends] == 0).float().mean())
        if int(rollout.turn_ids.max()) > 0 and unpaid > 0.5 and not self._warned_of_unpaid_steps:
            self._warned_of_unpaid_steps = True
            warn(
                f"supervision='process', but {unpaid:.0%} of the steps pay 0. Steps of a group are normalized together, so "
                "every such step gets a negative share, and long episodes that succeed score lower than short ones. Use "
                "supervision='outcome', or pay every turn"
            )

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> tuple[LossTerms, Statistics]:
        """Compute the surrogate, the KL to the reference and the entropy bonus."""
        assert batch.old_logp is not None and batch.advantages is not None
        low = self.clip_range(self._current_progress_remaining)
        high = low if self.clip_range_high is None else self.clip_range_high(self._current_progress_remaining)
        rho = ratio(evaluation.logp, batch.old_logp, batch.mask, self.ratio_level, batch.turn_ids)
        if self.surrogate == "clip":
            surrogate = clipped_terms(rho, batch.advantages, low, high, self.dual_clip)
        else:
            surrogate = cispo_terms(evaluation.logp, rho, batch.advantages, low, high)
        terms: LossTerms = {
            "policy_gradient_loss": (1.0, weighted_sum(surrogate, weights)),
            "entropy_loss": (self.ent_coef, -weighted_sum(evaluation.entropy, weights)),
        }
        if self.kl_coef:
            assert batch.ref_logp is not None
            kl = KL_ESTIMATORS[self.kl_estimator](evaluation.logp, batch.ref_logp)
            if self.unbiased_kl:
                kl = kl * ratio(evaluation.logp, batch.old_logp)
            terms["kl_loss"] = (coefficient(self.kl_coef), weighted_sum(kl, weights))
        statistics = ratio_statistics(evaluation.logp, batch.old_logp, batch.mask, low, high, self.ratio_level, batch.turn_ids)
        return terms, statistics | {"clip_range": torch.tensor(low)}
