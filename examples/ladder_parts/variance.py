"""Measure the variance of the policy gradient at fixed weights, per baseline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from stable_baselines3.common.utils import explained_variance
from torch import Tensor

import llm_env
from agents import GRPO, PPO, REINFORCE, LanguagePolicy
from agents.advantages import discounted_returns
from agents.base import LanguageAgent
from agents.rollout import Rollout
from agents.sampling.sampler import Sampler
from ladder_parts.gradients import Moments, evaluate, policy_gradient, with_advantages
from ladder_parts.runs import EPISODES, GROUP, STEPS, Exam, make_env
from llm_env import TextGenerationVectorEnv
from llm_env.lm.scoring import response_states
from tests.rollouts import collect

SHIFTED, IN_GROUPS = "naive, rewards + 1", "naive, in groups"
CRITIC_EPISODES = 100  # per round: as many to fit the critic, and as many to evaluate it

WARM_UP = 10  # rollouts that initialize the running mean

ESTIMATORS: dict[str, tuple[type[LanguageAgent], dict[str, Any]]] = {
    "naive": (REINFORCE, {}),
    SHIFTED: (REINFORCE, {}),
    "running mean": (REINFORCE, {"baseline": "running_mean"}),
    "critic": (REINFORCE, {"baseline": "value"}),
    "critic, GAE, normalized (PPO)": (PPO, {}),
    IN_GROUPS: (REINFORCE, {"group_size": GROUP}),
    "leave one out (RLOO)": (REINFORCE, {"baseline": "leave_one_out", "group_size": GROUP}),
    "group mean and std (GRPO)": (GRPO, {"group_size": GROUP}),
}


def measure(seed: int, rounds: int, checkpoints: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measure the gradient noise of every estimator at checkpoints of naive training.

    Every round samples two rollouts of `EPISODES` episodes: one with a different problem per episode, and one with `GROUP`
    answers per problem. Estimators with the same group size share a rollout. The weights of the language model are fixed;
    the critic is fitted to them.

    Args:
        seed: random seed.
        rounds: gradients per estimator and checkpoint.
        checkpoints: tokens of naive training at each checkpoint, ascending.

    Returns:
        One dict per checkpoint with `tokens`, `accuracy` (share of the exam's problems solved), `explained_variance` (of the
        critic on new episodes) and `estimators`. The latter maps names to unbiased estimates of ||E g||^2,
        E g . E g_naive and E||g - E g||^2.
    """
    student = REINFORCE(llm_env.PUPIL, make_env(), n_envs=EPISODES, seed=seed, **STEPS[0].settings)
    exam, results = Exam(), []
    for tokens in checkpoints:
        if tokens:
            student.learn(max(0, tokens - student.num_timesteps), reset_num_timesteps=False)
        policy = copy.deepcopy(student.policy)
        generator = torch.Generator().manual_seed(seed)
        numbers = {"tokens": tokens, "accuracy": exam(student)}
        results.append({**numbers, **_at_fixed_weights(policy, rounds, seed, generator)})
    return results


def _at_fixed_weights(policy: LanguagePolicy, rounds: int, seed: int, generator: torch.Generator) -> dict[str, Any]:
    env = make_env()
    agents = {name: kind(policy, env, n_envs=EPISODES, seed=seed, **more) for name, (kind, more) in ESTIMATORS.items()}
    sampler = Sampler(generator=generator)
    explained = fit_critic(policy, sampler, seed, CRITIC_EPISODES * rounds)
    venv = TextGenerationVectorEnv.from_rules(env.rules, EPISODES)
    venv.reset(seed=seed)
    for _ in range(WARM_UP):
        with_advantages(agents["running mean"], collect(policy, venv, 1, sampler), None)
    moments = Moments(len(agents), sum(p.numel() for p in policy.lm.parameters()))
    for _ in range(rounds):
        gradients: dict[str, Tensor] = {}
        for size in (1, GROUP):
            rollout = collect(policy, venv, size, sampler)
            result = evaluate(agents["naive"], rollout)
            for name, agent in agents.items():
                if agent.group_size == size:
                    own = with_advantages(agent, rollout, result.values if agent.needs_values else None)
                    if name == SHIFTED:
                        own.advantages = own.advantages + own.mask
                    gradients[name] = policy_gradient(agent, own, result)
        moments.add(torch.stack([gradients[name] for name in agents]))
    squares, products, noise = moments.signal.diagonal(), moments.signal[0], moments.noise
    estimates = zip(squares.tolist(), products.tolist(), noise.tolist(), strict=True)
    return {"explained_variance": explained, "estimators": dict(zip(agents, estimates, strict=True))}


@torch.no_grad()
def fit_critic(policy: LanguagePolicy, sampler: Sampler, seed: int, episodes: int) -> float:
    """Fit the value head by least squares to the returns of separate episodes.

    The language model is not changed.

    Returns:
        Explained variance of the per-token returns of new episodes.
    """
    venv = TextGenerationVectorEnv.from_rules(make_env().rules, episodes)
    venv.reset(seed=seed)
    hidden, returns = _states_and_returns(policy, collect(policy, venv, 1, sampler))
    inputs = torch.cat([hidden, torch.ones(len(hidden), 1)], 1).double()
    weights = torch.linalg.lstsq(inputs, returns[:, None].double()).solution[:, 0].float()
    assert policy.value_head is not None
    policy.value_head.weight.copy_(weights[None, :-1])
    policy.value_head.bias.copy_(weights[-1:])
    hidden, returns = _states_and_returns(policy, collect(policy, venv, 1, sampler))
    return float(explained_variance(policy.value_head(hidden)[:, 0].numpy(), returns.numpy()))


def _states_and_returns(policy: LanguagePolicy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return hidden states before each token, (tokens, H), and returns, (tokens,)."""
    hidden = response_states(policy.lm.base_model, rollout.prompts, rollout.responses)
    assert hidden is not None
    here = rollout.mask.bool()
    return hidden[:, :-1][here], discounted_returns(rollout.rewards, rollout.mask, 1.0)[here]
