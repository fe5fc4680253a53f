"""REINFORCE: naive reward, or a baseline taken off: a running mean, the group's other answers, a critic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor
from typing_extensions import Unpack

from agents.advantages import discounted_returns, group_relative, leave_one_out
from agents.base import DEFAULT_GROUP_SIZE, CommonArguments, LanguageAgent
from agents.losses import value_terms, weighted_sum
from agents.policy import Evaluation
from agents.rollout import Rollout
from agents.training.objective import LossTerms, Statistics
from agents.validation import check_choice, check_numbers
from llm_env.arguments import check_int

GROUP_BASELINES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "group_mean": partial(group_relative, scale="none"),
    "leave_one_out": leave_one_out,
}
BASELINES = (None, "running_mean", *GROUP_BASELINES, "value")
SLOWEST_SHARE = 0.1  # of a rollout's mean return in the running mean


class REINFORCE(LanguageAgent):
    """grad E[r] = E[sum_t grad log pi(a_t) A_t] (Williams 1992), one optimizer step per minibatch of fresh episodes.

    | method | arguments | source |
    | --- | --- | --- |
    | naive reward | `baseline=None` | Williams 1992 |
    | reinforcement baseline | `baseline="running_mean"` | Williams 1992, section 6 |
    | RLOO | `baseline="leave_one_out"`, `group_size=G` | arXiv 2402.14740 |
    | mean of the group | `baseline="group_mean"`, `group_size=G` | Dr. GRPO's advantage, arXiv 2503.20783 |
    | actor-critic, Monte Carlo returns | `baseline="value"` | Sutton and Barto 2018, section 13.4 |

    Args:
        policy, env, learning_rate: see `LanguageAgent`.
        baseline: what is taken off the reward to go G_t. None: nothing. `"running_mean"`: the mean return of earlier rollouts
            (0 in the first; it moves by a tenth a rollout, and by more in the first ten). `"value"`: V(s_t), learned.
            `"group_mean"` and `"leave_one_out"` take the whole response for one action: each of its tokens has its return
            less the mean return of its group, or of the other answers to the prompt.
        group_size: G, answers per prompt; 8 by default for the last two, which need at least 2, else 1.
        gamma: discount per token.
        ent_coef: weight of an entropy bonus.
        vf_coef: weight of the value loss.
        separate_critic: V has a separate network, initialized as a copy of the policy's, instead of a head on it; for
            adapters see `PPO`.
        n_epochs: passes over a rollout.
        aggregation: how token losses become one number; see `agents.losses.token_weights`.
        common: see `LanguageAgent`.
    """

    needs_old_logp = False
    state_attributes = ("running_mean", "_rollouts_averaged")

    def __init__(
        self,
        policy: Any,
        env: Any = None,
        learning_rate: float | Schedule | None = None,
        *,
        baseline: str | None = None,
        group_size: int | None = None,
        gamma: float = 1.0,
        ent_coef: float = 0.0,
        vf_coef: float = 0.1,
        separate_critic: bool = False,
        n_epochs: int = 1,
        aggregation: str = "token",
        **common: Unpack[CommonArguments],
    ) -> None:
        check_choice("baseline", baseline, BASELINES)
        grouped = baseline in GROUP_BASELINES
        default = DEFAULT_GROUP_SIZE if grouped else 1
        self.group_size = check_int("group_size", default if group_size is None else group_size, 2 if grouped else 1)
        if separate_critic and baseline != "value":
            raise ValueError(f"separate_critic=True, but baseline={baseline!r} has no critic; take baseline='value'")
        check_numbers(0.0, gamma=gamma, vf_coef=vf_coef)
        check_numbers(ent_coef=ent_coef)
        self.baseline = baseline
        self.gamma = gamma
        self.ent_coef = ent_coef
        self.vf_coef = vf_coef
        self.separate_critic = separate_critic
        self.running_mean, self._rollouts_averaged = 0.0, 0
        super().__init__(policy, env, learning_rate, n_epochs=n_epochs, aggregation=aggregation, **common)

    @property
    def needs_values(self) -> bool:  # type: ignore[override]
        """Return whether there is a critic."""
        return self.baseline == "value"

    def compute_advantages(self, rollout: Rollout) -> None:
        """Set A_t = G_t minus the baseline."""
        returns = discounted_returns(rollout.rewards, rollout.mask, self.gamma)
        whole_returns = returns[:, 0]  # of whole responses: a mask begins with an action token
        if self.baseline == "value":
            assert rollout.old_values is not None
            rollout.advantages, rollout.returns = returns - rollout.old_values, returns
        elif self.baseline == "running_mean":
            rollout.advantages = (returns - self.running_mean) * rollout.mask
            self._rollouts_averaged += 1
            share = max(1 / self._rollouts_averaged, SLOWEST_SHARE)
            self.running_mean += share * (whole_returns.mean().item() - self.running_mean)
        elif self.baseline is None:
            rollout.advantages = returns
        else:
            relative = GROUP_BASELINES[self.baseline](whole_returns, self.group_size)
            rollout.advantages = relative[:, None] * rollout.mask

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> tuple[LossTerms, Statistics]:
        """Compute -A log pi, the entropy bonus and the value loss."""
        assert batch.advantages is not None
        terms: LossTerms = {
            "policy_gradient_loss": (1.0, weighted_sum(-evaluation.logp * batch.advantages, weights)),
            "entropy_loss": (self.ent_coef, -weighted_sum(evaluation.entropy, weights)),
        }
        if evaluation.values is not None and batch.returns is not None and batch.old_values is not None:
            errors = value_terms(evaluation.values[:, :-1], batch.old_values, batch.returns, None)
            terms["value_loss"] = (self.vf_coef, weighted_sum(errors, weights))
        return terms, {}
