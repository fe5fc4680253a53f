"""The agents with the arguments of each published method: one step's loss and gradient against the slow references.

The references see the model through plain forward passes, one response at a time, and the rewards through the tokens.
"""

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE
from llm_env.reference import AdaptiveKLController
from tests import slow
from tests.conftest import make_model, make_tokenizer
from tests.probes import always_a, make_env
from tests.rollouts import collect

TOKENIZER = make_tokenizer("abcdefgh")
A, B, C = TOKENIZER.convert_tokens_to_ids(["a", "b", "c"])
WORTH = {A: 1.0, B: 0.0, C: -0.5}  # of the steps that these tokens end; b's is worth nothing and counts as a step
GROUP, EPISODES, LIMIT, GAMMA, LAMBDA = 4, 12, 4, 0.9, 0.8


def steps_of(ids):
    return [(t, WORTH[token]) for t, token in enumerate(ids) if token in WORTH]


def steps(completion_ids, **kwargs):
    return [steps_of(ids) for ids in completion_ids]


class Plain:
    """What the references need of a rollout: ragged rows, without a look at how the project computes them."""

    def __init__(self, agent, rollout, reference):
        self.responses, self.lengths = rollout.responses, [len(response) for response in rollout.responses]
        self.logp, self.ref, self.values = [], [], []
        self.old, self.old_values = self.ragged(rollout.old_logp), self.ragged(rollout.old_values)
        self.truncated = [response[-1] != 0 for response in self.responses]
        for prompt, response in zip(rollout.prompts, self.responses, strict=True):
            context, first = torch.tensor([[*prompt, *response]]), len(prompt) - 1
            self.logp.append(self.chosen(agent.policy.lm, context, first))
            self.ref.append([x.item() for x in self.chosen(reference, context, first)])
            if agent.policy.value_head is not None:
                body = agent.policy.critic or agent.policy.lm.base_model
                values = agent.policy.value_head(body(context).last_hidden_state[0]).double()
                self.values.append(list(values[first:-1, 0]))

    def ragged(self, table):
        return None if table is None else [row[:n].double().tolist() for row, n in zip(table, self.lengths, strict=True)]

    @staticmethod
    def chosen(model, context, first):
        logp = model(context).logits[0].double().log_softmax(-1)
        return [logp[t, context[0, t + 1]] for t in range(first, context.shape[1] - 1)]

    @property
    def rewards(self):
        return [response.count(A) / 4 for response in self.responses]

    @property
    def paid(self):
        return [[0.0] * (n - 1) + [reward] for n, reward in zip(self.lengths, self.rewards, strict=True)]

    def outcome(self, scale="std"):
        return slow.group_advantages(self.rewards, GROUP, scale)

    def spread(self, per_response):
        return slow.spread(per_response, self.lengths)

    def process(self, scale="std"):
        rows = zip(self.responses, self.rewards, self.lengths, strict=True)
        both = [[*steps_of(ids), (n - 1, 0.3 * reward)] for ids, reward, n in rows]  # the plain score ends at the last token
        return slow.step_advantages(both, self.lengths, GROUP, scale)

    def returns(self, baseline=0.0):
        return [[g - baseline for g in slow.returns(row, GAMMA)] for row in self.paid]

    def gae(self):
        return [slow.gae(paid, values, GAMMA, LAMBDA) for paid, values in zip(self.paid, self.old_values, strict=True)]

    def value_loss(self, advantages, eps):
        rows = zip(advantages, self.old_values, strict=True)
        return slow.value_loss(self.values, self.old_values, [[a + v for a, v in zip(*row, strict=True)] for row in rows], eps)

    def kept(self, rows):
        return [row for row, cut in zip(rows, self.truncated, strict=True) if not cut]


def grpo(x, advantages, kl=slow.k3):
    return slow.grpo(x.logp, x.old, x.ref, advantages, 0.2, 0.5, kl)


def token_mean(x, advantages):
    return slow.mean(a * new for new, a in slow.tokens(x.logp, advantages))


def ppo(x):
    return slow.ppo(x.logp, x.old, slow.whitened(x.gae()), 0.2) - 0.3 * x.value_loss(x.gae(), 0.2)


def actor_critic(x):
    advantages = [[g - v for g, v in zip(*row, strict=True)] for row in zip(x.returns(), x.old_values, strict=True)]
    return token_mean(x, advantages) - 0.3 * x.value_loss(advantages, None)


KL, TOKEN, CONSTANT = {"kl_coef": 0.5}, {"aggregation": "token"}, {"aggregation": "constant"}
CRITIC = {"gamma": GAMMA, "vf_coef": 0.3}
GROUPED = {"group_size": GROUP}
METHODS = {
    "GRPO": (GRPO, KL, lambda x: grpo(x, x.spread(x.outcome()))),
    "GRPO with process supervision": (GRPO, KL | {"supervision": "process"}, lambda x: grpo(x, x.process())),
    "the same without division": (GRPO, KL | {"supervision": "process", "scale": "none"}, lambda x: grpo(x, x.process("none"))),
    "GRPO with k2": (GRPO, KL | {"kl_estimator": "k2"}, lambda x: grpo(x, x.spread(x.outcome()), slow.k2)),
    "GRPO with a controller": (GRPO, {"kl_coef": AdaptiveKLController(0.5)}, lambda x: grpo(x, x.spread(x.outcome()))),
    "Dr. GRPO": (
        GRPO,
        CONSTANT | {"scale": "none"},
        lambda x: slow.dr_grpo(x.logp, x.old, x.spread(x.outcome("none")), 0.2, LIMIT),
    ),
    "DAPO": (GRPO, TOKEN | {"clip_range_high": 0.28}, lambda x: slow.dapo(x.logp, x.old, x.spread(x.outcome()), 0.2, 0.28)),
    "overlong filtering": (
        GRPO,
        TOKEN | {"mask_truncated": True},
        lambda x: slow.dapo(x.kept(x.logp), x.kept(x.old), x.kept(x.spread(x.outcome())), 0.2, 0.2),
    ),
    "GSPO": (
        GRPO,
        {"ratio_level": "sequence", "clip_range": 0.1, "clip_range_high": 0.15},
        lambda x: slow.gspo(x.logp, x.old, x.outcome(), 0.1, 0.15),
    ),
    "CISPO": (
        GRPO,
        TOKEN | {"surrogate": "cispo", "clip_range": 1.0, "clip_range_high": 0.28},
        lambda x: slow.cispo(x.logp, x.old, x.spread(x.outcome()), 1.0, 0.28),
    ),
    "dual clip": (
        GRPO,
        TOKEN | {"dual_clip": 1.3},
        lambda x: slow.dual_clip_ppo(x.logp, x.old, x.spread(x.outcome()), 0.2, 1.3),
    ),
    "REINFORCE++ with a group baseline": (
        GRPO,
        KL | TOKEN | {"scale": "batch", "kl_estimator": "k2"},
        lambda x: (
            slow.dapo(x.logp, x.old, x.spread(x.outcome("batch")), 0.2, 0.2)
            - 0.5 * slow.mean(slow.k2(new, ref) for new, ref in slow.tokens(x.logp, x.ref))
        ),
    ),
    "REINFORCE": (REINFORCE, CONSTANT | {"gamma": GAMMA}, lambda x: slow.reinforce(x.logp, x.returns()) / LIMIT),
    "REINFORCE, mean over tokens": (REINFORCE, {"gamma": GAMMA}, lambda x: token_mean(x, x.returns())),
    "REINFORCE with the group's mean": (
        REINFORCE,
        CONSTANT | GROUPED | {"baseline": "group_mean"},
        lambda x: slow.rloo(x.logp, x.outcome("none")) / LIMIT,
    ),
    "RLOO": (
        REINFORCE,
        CONSTANT | GROUPED | {"baseline": "leave_one_out"},
        lambda x: slow.rloo(x.logp, slow.leave_one_out(x.rewards, GROUP)) / LIMIT,
    ),
    "actor-critic": (REINFORCE, CRITIC | {"baseline": "value"}, actor_critic),
    "PPO": (PPO, CRITIC | {"gae_lambda": LAMBDA}, ppo),
    "PPO with a separate critic": (PPO, CRITIC | {"gae_lambda": LAMBDA, "separate_critic": True}, ppo),
}


def make_agent(kind, kwargs, env):
    defaults = {"n_envs": EPISODES, "seed": 0, "max_grad_norm": 1e9, "micro_batch_size": 5, **(GROUPED if kind is GRPO else {})}
    return kind(make_model("llama", len(TOKENIZER), scale=1.5), env, **{**defaults, **kwargs})


def disturbed(table, scale, seed):
    return table + scale * torch.randn(table.shape, generator=torch.Generator().manual_seed(seed))


def prepared(agent):
    """A rollout of theirs as if the policy had moved since: old log-probs and values are other numbers than the new ones."""
    if agent.needs_values:
        torch.nn.init.normal_(agent.policy.value_head.weight, std=0.3)
    rollout = collect(agent.policy, agent.env.venv, agent.group_size, agent.sampler())
    assert len(set(rollout.lengths.tolist())) > 2 and 0 < rollout.truncated.sum() < EPISODES
    agent.make_trainer().compute_old_logprobs(rollout)
    rollout.old_logp = disturbed(rollout.old_logp, 0.3, 0)
    if agent.needs_values:
        rollout.old_values = disturbed(rollout.old_values, 0.3, 1)
    agent.compute_advantages(rollout)
    return rollout


@pytest.mark.parametrize("method", METHODS)
def test_one_step_of_an_agent(method, monkeypatch):
    kind, kwargs, objective_of = METHODS[method]
    process = kwargs.get("supervision") == "process"
    rewards = {"reward": [steps, always_a], "reward_weights": [1.0, 0.3]} if process else {}
    reference = make_model("llama", len(TOKENIZER), seed=1, scale=1.5)
    agent = make_agent(kind, kwargs, make_env(TOKENIZER, reference=reference, **rewards))
    rollout = prepared(agent)
    parameters = list(agent.policy.parameters())
    objective = objective_of(Plain(agent, rollout, reference))
    expected = torch.autograd.grad(-objective, parameters, allow_unused=True)
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)
    statistics = agent.make_trainer().step(rollout, np.arange(EPISODES), is_first_pass=False)
    assert statistics["loss"] == pytest.approx(-objective.item(), abs=2e-6)
    assert max(p.grad.abs().max() for p in parameters if p.grad is not None) > 1e-3
    for p, gradient in zip(parameters, expected, strict=True):
        got, wanted = (torch.zeros_like(p) if g is None else g for g in (p.grad, gradient))
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-4)
    if kind is not REINFORCE:
        assert 0 < statistics["clip_fraction"] < 1


def test_the_running_mean_of_earlier_rollouts():
    """Nothing is taken off in the first rollout, then the mean of the earlier ones; from ten on it moves by a tenth."""
    agent = make_agent(REINFORCE, {"baseline": "running_mean", "gamma": GAMMA, "n_envs": 16}, make_env(TOKENIZER))
    means, expected = [], 0.0
    for rollouts in range(1, 13):
        rollout = collect(agent.policy, agent.env.venv, 1, agent.sampler())
        agent.compute_advantages(rollout)
        x = Plain(agent, rollout, agent.policy.lm)
        assert x.ragged(rollout.advantages) == [pytest.approx(row, abs=1e-6) for row in x.returns(expected)]
        assert (rollout.advantages[rollout.mask == 0] == 0).all()
        means.append(slow.mean(row[0] for row in x.returns()))
        expected = slow.mean(means) if rollouts <= 10 else 0.9 * expected + 0.1 * means[-1]
    assert len(set(means)) > 3
