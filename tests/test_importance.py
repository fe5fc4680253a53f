"""Truncated importance weights: what makes tokens that another policy drew count as the policy's own."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE
from agents.losses import truncated_importance
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env
from tests.rollouts import collect

TOKENIZER = make_tokenizer("abcdefgh")
V = len(TOKENIZER)
CASES = {
    "GRPO": (GRPO, {"group_size": 4}),
    "GRPO, CISPO": (GRPO, {"group_size": 4, "surrogate": "cispo"}),
    "GRPO, dual clip": (GRPO, {"group_size": 4, "dual_clip": 3.0}),
    "PPO": (PPO, {}),
    "REINFORCE": (REINFORCE, {}),
}


def test_by_hand():
    old, sampled = torch.tensor([[0.6, 0.8, 0.1]]).log(), torch.tensor([[0.4, 0.2, 0.2]]).log()
    old.requires_grad_()
    weights = truncated_importance(old, sampled, 2.0)
    assert weights.tolist()[0] == pytest.approx([1.5, 2.0, 0.5]) and not weights.requires_grad


def gradient(agent, rollout):
    if agent.needs_values:
        agent.make_trainer().compute_old_logprobs(rollout)
    agent.compute_advantages(rollout)
    statistics = agent.make_trainer().step(rollout, np.arange(len(rollout)), is_first_pass=True)
    return [p.grad.clone() for p in agent.policy.parameters() if p.grad is not None], statistics


@pytest.mark.parametrize("case", CASES)
def test_every_surrogate_is_weighed_by_it(case, monkeypatch):
    """The gradient is the one of advantages that were multiplied by hand, and the value loss is left alone."""
    kind, settings = CASES[case]
    env = make_env(TOKENIZER, max_new_tokens=5)
    agent = kind(
        make_model("llama", V), env, n_envs=8, seed=0, preflight=False, importance_cap=1.5, max_grad_norm=1e9, **settings
    )
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)
    rollout = collect(agent.policy, agent.env.venv, agent.group_size, agent.sampler())
    own = rollout.sampled_logp
    noise = 0.5 * torch.randn(own.shape, generator=torch.Generator().manual_seed(0)) * rollout.mask
    found, statistics = gradient(agent, replace(rollout, sampled_logp=own + noise, infos=rollout.infos))
    weights = (-noise).exp().clamp(max=1.5)
    original = type(agent).compute_advantages

    def multiplied(self, rollout):
        original(self, rollout)
        rollout.advantages = rollout.advantages * weights

    monkeypatch.setattr(type(agent), "compute_advantages", multiplied)
    agent.importance_cap = None
    expected, _ = gradient(agent, replace(rollout, infos=rollout.infos))
    assert any(g.abs().max() > 1e-3 for g in expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)
    inside = rollout.mask.bool()
    assert statistics["importance"] == pytest.approx(weights[inside].mean().item(), abs=1e-3)
    assert statistics["importance_capped"] == pytest.approx((weights[inside] >= 1.5).float().mean().item())


def test_the_gradient_is_that_of_ones_own_tokens():
    """All one-token answers, each as often as another policy draws it: what counts is how often one would have oneself."""
    env = make_env(TOKENIZER, max_new_tokens=1, prompts=["a"], reward=lambda completions: [float(len(c)) for c in completions])
    agent = REINFORCE(make_model("llama", V), env, n_envs=1000, seed=0, preflight=False, max_grad_norm=1e9, importance_cap=1e6)
    other = torch.arange(1.0, V + 1) / sum(range(1, V + 1))  # pi_sampled
    counts = (other * 1000).round().to(torch.int64)
    counts[-1] += 1000 - counts.sum()
    rollout = collect(agent.policy, agent.env.venv, 1, agent.sampler())
    tokens = [token for token, n in enumerate(counts.tolist()) for _ in range(n)]
    rewards = torch.tensor([[float(token % 3)] for token in tokens])
    sampled = (counts / 1000).log()[tokens][:, None]
    drawn = replace(rollout, responses=[[token] for token in tokens], rewards=rewards, sampled_logp=sampled)
    agent.policy.optimizer.step = lambda: None
    gradient(agent, drawn)
    weight = agent.policy.lm.lm_head.weight
    found = weight.grad.clone()
    weight.grad = None
    logits = agent.policy.lm(torch.tensor([rollout.prompts[0]])).logits[0, -1]
    expected_reward = (logits.softmax(-1) * torch.tensor([float(token % 3) for token in range(V)])).sum()
    (-expected_reward).backward()
    assert weight.grad.abs().max() > 1e-3 and torch.allclose(found, weight.grad, atol=1e-5)


def test_several_steps_weigh_by_the_policy_before_the_first():
    """REINFORCE, which needs no old log-probs, makes them for this; a rollout of its own has weights of 1."""
    env = make_env(TOKENIZER, max_new_tokens=4)
    agent = REINFORCE(make_model("llama", V), env, n_envs=8, batch_size=4, n_epochs=2, seed=0, importance_cap=2.0)
    agent.learn(32)
    assert agent.logger.name_to_value == {}  # dumped
    rollout = agent.sample_rollout()
    agent.train(rollout)
    assert agent.logger.name_to_value["train/importance"] == pytest.approx(1.0, abs=1e-4)
    assert agent.logger.name_to_value["train/importance_capped"] == 0


def test_caps_that_make_no_sense_are_refused():
    refused(GRPO, make_model("llama", V), importance_cap=0.5, match="importance_cap=0.5 must be a finite number of at least 1")
