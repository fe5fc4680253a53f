"""Policy gradients as flat vectors, and unbiased estimates of how much of one is signal and how much is noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from agents.base import LanguageAgent
from agents.losses import token_weights
from agents.policy import Evaluation
from agents.rollout import Rollout


def evaluate(agent: LanguageAgent, rollout: Rollout) -> Evaluation:
    """Return what the training path says of a rollout."""
    return agent.policy.evaluate_actions(rollout.prompts, rollout.responses, agent.temperature)


def with_advantages(agent: LanguageAgent, rollout: Rollout, values: Tensor | None) -> Rollout:
    """Return a copy of a fresh rollout with the agent's advantages of its tokens.

    Args:
        agent: says what an advantage is.
        rollout: stays as it is.
        values: (B, T + 1), V before each token and after the last; None for agents without a critic.
    """
    rollout = replace(rollout)
    if values is not None:
        rollout.old_values = values[:, :-1].detach() * rollout.mask
        rollout.last_values = values.detach()[torch.arange(len(rollout)), torch.as_tensor(rollout.lengths)]
    agent.compute_advantages(rollout)
    return rollout


def policy_gradient(agent: LanguageAgent, rollout: Rollout, result: Evaluation) -> Tensor:
    """Gradient of the agent's `policy_gradient_loss` on fresh episodes (the ratio is 1), without the other terms of its loss.

    Args:
        agent: gives the loss.
        rollout: with advantages.
        result: of `evaluate`, at the weights that the episodes were drawn with; its graph is kept for another gradient.

    Returns:
        (N,) float64, over all weights of the language model.
    """
    weights = token_weights(rollout.mask, agent.aggregation, agent.rules.max_new_tokens)
    terms, _ = agent.loss(replace(rollout, old_logp=result.logp.detach()), result, weights)
    _, loss = terms["policy_gradient_loss"]
    gradients = torch.autograd.grad(loss, list(agent.policy.lm.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def halves(agent: LanguageAgent, rollout: Rollout) -> tuple[float, float]:
    """Unbiased estimates of ||E g||^2 and of E||g - E g||^2 from one rollout, g being the mean of its halves' gradients.

    The halves g1, g2 are independent draws (but for what normalizing over the whole rollout couples), so that
    E[g1 . g2] = ||E g||^2 and E||g1 - g2||^2 / 4 = E||g - E g||^2. The first may come out negative.
    """
    with torch.no_grad():
        values = evaluate(agent, rollout).values if agent.needs_values else None
    rollout = with_advantages(agent, rollout, values)
    middle = len(rollout) // 2
    parts = [rollout.select(list(rows)) for rows in (range(middle), range(middle, len(rollout)))]
    first, second = (policy_gradient(agent, part, evaluate(agent, part)) for part in parts)
    return float(first @ second), float((first - second).square().sum() / 4)


class Moments:
    """Running first and second moments of K gradients of each of several estimators, drawn in the same K rounds.

    Args:
        estimators: how many.
        size: N, numbers in a gradient.
    """

    def __init__(self, estimators: int, size: int) -> None:
        self.count = 0
        self.sums = torch.zeros(estimators, size, dtype=torch.float64)
        self.products = torch.zeros(estimators, estimators, dtype=torch.float64)

    def add(self, gradients: Tensor) -> None:
        """Take note of one gradient of each estimator, (estimators, N)."""
        self.count += 1
        self.sums += gradients
        self.products += gradients @ gradients.T

    @property
    def signal(self) -> np.ndarray:
        """(estimators, estimators), unbiased estimates of the products of the mean gradients, E g_i . E g_j: noise may make
        the estimate of a square negative.

        Products of one round, whose noise is common to both, are left out: (S_i . S_j - sum_k g_ik . g_jk) / (K (K - 1)).
        """
        return ((self.sums @ self.sums.T - self.products) / (self.count * (self.count - 1))).numpy()

    @property
    def noise(self) -> np.ndarray:
        """(estimators,), unbiased estimates of E||g - E g||^2."""
        means = self.sums.square().sum(1) / self.count
        return ((self.products.diagonal() - means) / (self.count - 1)).numpy()
