"""Compute policy gradients as flat vectors; estimate their signal and noise."""

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
    """Evaluate a rollout with the forward pass that training uses."""
    return agent.policy.evaluate_actions(rollout.prompts, rollout.responses, agent.temperature)


def with_advantages(agent: LanguageAgent, rollout: Rollout, values: Tensor | None) -> Rollout:
    """Return a copy of a new rollout with advantages computed by the agent.

    Args:
        agent: agent whose `compute_advantages` is called.
        rollout: rollout without advantages. It is not modified.
        values: value estimates before each token and after the last, (B, T + 1). None for agents without a critic.
    """
    rollout = replace(rollout)
    if values is not None:
        rollout.old_values = values[:, :-1].detach() * rollout.mask
        rollout.last_values = values.detach()[torch.arange(len(rollout)), torch.as_tensor(rollout.lengths)]
    agent.compute_advantages(rollout)
    return rollout


def policy_gradient(agent: LanguageAgent, rollout: Rollout, result: Evaluation) -> Tensor:
    """Compute the gradient of the agent's `policy_gradient_loss` on new episodes.

    The probability ratio is 1. Other terms of the loss are left out.

    Args:
        agent: agent whose loss is used.
        rollout: rollout with advantages.
        result: result of `evaluate`, at the weights that sampled the episodes. Its graph is retained for further gradients.

    Returns:
        Gradient with respect to all weights of the language model, (N,), float64.
    """
    weights = token_weights(rollout.mask, agent.aggregation, agent.rules.max_new_tokens)
    terms, _ = agent.loss(replace(rollout, old_logp=result.logp.detach()), result, weights)
    _, loss = terms["policy_gradient_loss"]
    gradients = torch.autograd.grad(loss, list(agent.policy.lm.parameters()), retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients]).double()


def halves(agent: LanguageAgent, rollout: Rollout) -> tuple[float, float]:
    """Estimate gradient signal ||E g||^2 and noise E||g - E g||^2 from one rollout.

    g is the mean of g1 and g2, the gradients of the two halves of the rollout. The halves are independent, except where
    advantages are normalized over the whole rollout. Therefore E[g1 . g2] = ||E g||^2 and
    E||g1 - g2||^2 / 4 = E||g - E g||^2, so both estimates are unbiased. The estimate of the signal may be negative.
    """
    with torch.no_grad():
        values = evaluate(agent, rollout).values if agent.needs_values else None
    rollout = with_advantages(agent, rollout, values)
    middle = len(rollout) // 2
    parts = [rollout.select(list(rows)) for rows in (range(middle), range(middle, len(rollout)))]
    first, second = (policy_gradient(agent, part, evaluate(agent, part)) for part in parts)
    return float(first @ second), float((first - second).square().sum() / 4)


class Moments:
    """Running moments of the gradients of several estimators over K rounds.

    Args:
        estimators: number of estimators.
        size: number of elements of a gradient, N.
    """

    def __init__(self, estimators: int, size: int) -> None:
        self.count = 0
        self.sums = torch.zeros(estimators, size, dtype=torch.float64)
        self.products = torch.zeros(estimators, estimators, dtype=torch.float64)

    def add(self, gradients: Tensor) -> None:
        """Add one round: one gradient per estimator, (estimators, N)."""
        self.count += 1
        self.sums += gradients
        self.products += gradients @ gradients.T

    @property
    def signal(self) -> np.ndarray:
        """Unbiased estimates of E g_i . E g_j, (estimators, estimators).

        Two gradients of the same round share their noise. Their products are therefore subtracted:
        (S_i . S_j - sum_k g_ik . g_jk) / (K (K - 1)). Noise may make the estimate of a square negative.
        """
        return ((self.sums @ self.sums.T - self.products) / (self.count * (self.count - 1))).numpy()

    @property
    def noise(self) -> np.ndarray:
        """Unbiased estimates of E||g - E g||^2, (estimators,)."""
        means = self.sums.square().sum(1) / self.count
        return ((self.products.diagonal() - means) / (self.count - 1)).numpy()
