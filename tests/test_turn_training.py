"""Training on episodes of several turns: losses and gradients of action tokens only, against slow references."""

import numpy as np
import pytest
import torch

from agents import GRPO, PPO, REINFORCE
from agents.advantages import gae, gae_turns, normalize
from agents.losses import ratio, turn_weights
from agents.ppo import bootstraps
from agents.rollout import from_episodes
from llm_env import TextGenerationEnv
from tests import slow
from tests.conftest import make_model, make_tokenizer
from tests.rollouts import collect
from tests.test_published_agents import disturbed
from tests.text_envs import Letters, worth

TOKENIZER = make_tokenizer("abcdefgh")
A, H, G = TOKENIZER.convert_tokens_to_ids(["a", "h", "g"])
GROUP, EPISODES, GAMMA, LAMBDA = 4, 12, 0.9, 0.8
LIMITS = {"max_prompt_tokens": 4, "max_new_tokens": 3, "max_turns": 3, "max_observation_tokens": 4}


def make(kind=Letters, **kwargs):
    return TextGenerationEnv.from_text_env(kind, TOKENIZER, **{**LIMITS, **kwargs})


class Plain:
    """What the references need of a rollout: one row an episode, one entry an action token. Rewards are worked out here."""

    def __init__(self, agent, rollout, reference):
        self.logp, self.ref, self.values, self.last = [], [], [], []
        self.turns, self.paid, self.terminated, self.by_env, self.fits = [], [], [], [], []
        self.old = [row[turns >= 0].double().tolist() for row, turns in zip(rollout.old_logp, rollout.turn_ids, strict=True)]
        if rollout.old_values is not None:
            pairs = zip(rollout.old_values, rollout.turn_ids, strict=True)
            self.old_values = [row[turns >= 0].double().tolist() for row, turns in pairs]
        for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
            context, first = torch.tensor([[*prompt, *response]]), len(prompt) - 1
            actions = self.split(rollout, i)
            self.logp.append(self.chosen(agent.policy.lm, context, first, actions))
            self.ref.append([x.item() for x in self.chosen(reference, context, first, actions)])
            if agent.policy.value_head is not None:
                body = agent.policy.critic or agent.policy.lm.base_model
                values = agent.policy.value_head(body(context).last_hidden_state[0]).double()[first:, 0]
                self.values.append([values[t] for t in actions])
                self.last.append(values[-1].item())

    def split(self, rollout, i):
        """The positions of actions, from the texts of the turns alone."""
        response, actions, start = rollout.responses[i], [], 0
        turns, paid = [], []
        while start < len(response):
            end = next(n for n in range(start + 1, len(response) + 1) if response[n - 1] == 0 or n - start == 3)
            text = TOKENIZER.decode(response[start:end], skip_special_tokens=True)
            turns += [len(set(turns))] * (end - start)
            paid += [0.0] * (end - start - 1) + [worth(text)]
            actions += range(start, end)
            start = end + len("bc" * (len(text) % 3) + "d")
        self.turns.append(turns)
        self.paid.append(paid)
        self.terminated.append("h" in text)
        self.by_env.append("g" in text and "h" not in text)
        return actions

    @staticmethod
    def chosen(model, context, first, actions):
        logp = model(context).logits[0].double().log_softmax(-1)
        return [logp[first + t, context[0, first + t + 1]] for t in actions]

    @property
    def lengths(self):
        return [len(row) for row in self.paid]

    @property
    def scores(self):
        return [sum(row) for row in self.paid]

    def outcome(self, scale="std"):
        return slow.group_advantages(self.scores, GROUP, scale)

    def spread(self, per_response):
        return slow.spread(per_response, self.lengths)

    def process(self):
        ends = [[t for t in range(len(row)) if t + 1 == len(row) or row[t + 1] != row[t]] for row in self.turns]
        steps = [[(t, paid[t]) for t in row] for row, paid in zip(ends, self.paid, strict=True)]
        return slow.step_advantages(steps, self.lengths, GROUP)

    def returns(self):
        return [slow.returns(row, GAMMA) for row in self.paid]

    def bootstrapped(self):
        return [0.0 if end else value for end, value in zip(self.terminated, self.last, strict=True)]

    def gae(self):
        rows = zip(self.paid, self.old_values, self.bootstrapped(), strict=True)
        return [slow.gae(paid, values, GAMMA, LAMBDA, last) for paid, values, last in rows]

    def by_turn(self):
        """For each episode its turns' sizes, rewards, and old and new values at their first actions."""
        rows = []
        for i, turns in enumerate(self.turns):
            first = [turns.index(k) for k in range(turns[-1] + 1)]
            sizes = [turns.count(k) for k in range(turns[-1] + 1)]
            rewards = [sum(p for p, t in zip(self.paid[i], turns, strict=True) if t == k) for k in range(turns[-1] + 1)]
            rows.append((sizes, rewards, [self.old_values[i][t] for t in first], [self.values[i][t] for t in first]))
        return rows


def token_mean(x, advantages):
    return slow.mean(a * new for new, a in slow.tokens(x.logp, advantages))


def grpo(x, advantages):
    return slow.grpo(x.logp, x.old, x.ref, advantages, 0.2, 0.5)


def ppo(x):
    advantages = x.gae()
    rows = zip(advantages, x.old_values, strict=True)
    targets = [[a + v for a, v in zip(*row, strict=True)] for row in rows]
    return slow.ppo(x.logp, x.old, slow.whitened(advantages), 0.2) - 0.3 * slow.value_loss(x.values, x.old_values, targets, 0.2)


def ppo_by_turn(x):
    """Advantages normalized over turns; the value loss of a turn weighs as much as its tokens do."""
    rows = x.by_turn()
    advantages = [slow.gae(r, v, GAMMA, LAMBDA, last) for (_, r, v, _), last in zip(rows, x.bootstrapped(), strict=True)]
    tokens = [
        [a for a, size in zip(row, sizes, strict=True) for _ in range(size)]
        for row, (sizes, *_) in zip(slow.whitened(advantages), rows, strict=True)
    ]
    loss, count = 0.0, 0
    for row, (sizes, _, old, new) in zip(advantages, rows, strict=True):
        for a, size, v_old, v in zip(row, sizes, old, new, strict=True):
            near = slow.clip(v, v_old - 0.2, v_old + 0.2)
            loss = loss + size * max((v - a - v_old) ** 2, (near - a - v_old) ** 2) / 2
            count += size
    return slow.ppo(x.logp, x.old, tokens, 0.2) - 0.3 * loss / count


def turn_ratio(x):
    """GSPO-token with each turn as a sequence: sg[s_k] pi_t / sg[pi_t], the mean over each response's tokens."""
    per_response = []
    for new, old, turns, advantage in zip(x.logp, x.old, x.turns, x.outcome(), strict=True):
        terms = []
        for k in range(turns[-1] + 1):
            at = [t for t, turn in enumerate(turns) if turn == k]
            s = np.exp(slow.mean(new[t].item() - old[t] for t in at))
            terms += [slow.clipped(s * (new[t] - new[t].item()).exp(), advantage, 0.1, 0.15) for t in at]
        per_response.append(slow.mean(terms))
    return slow.mean(per_response)


def kept(x, rows):
    return [row for row, end in zip(rows, x.terminated, strict=True) if end]


LIMIT = 9  # action tokens: three turns of three
CRITIC = {"gamma": GAMMA, "vf_coef": 0.3, "gae_lambda": LAMBDA}
METHODS = {
    "GRPO": (GRPO, {"kl_coef": 0.5}, lambda x: grpo(x, x.spread(x.outcome()))),
    "process supervision": (GRPO, {"kl_coef": 0.5, "supervision": "process"}, lambda x: grpo(x, x.process())),
    "Dr. GRPO": (
        GRPO,
        {"aggregation": "constant", "scale": "none"},
        lambda x: slow.dr_grpo(x.logp, x.old, x.spread(x.outcome("none")), 0.2, LIMIT),
    ),
    "DAPO": (
        GRPO,
        {"aggregation": "token", "clip_range_high": 0.28},
        lambda x: slow.dapo(x.logp, x.old, x.spread(x.outcome()), 0.2, 0.28),
    ),
    "overlong filtering": (
        GRPO,
        {"aggregation": "token", "mask_truncated": True},
        lambda x: slow.dapo(kept(x, x.logp), kept(x, x.old), kept(x, x.spread(x.outcome())), 0.2, 0.2),
    ),
    "GSPO": (
        GRPO,
        {"ratio_level": "sequence", "clip_range": 0.1, "clip_range_high": 0.15},
        lambda x: slow.gspo(x.logp, x.old, x.outcome(), 0.1, 0.15),
    ),
    "ratios of turns": (GRPO, {"ratio_level": "turn", "clip_range": 0.1, "clip_range_high": 0.15}, turn_ratio),
    "REINFORCE": (REINFORCE, {"gamma": GAMMA}, lambda x: token_mean(x, x.returns())),
    "PPO": (PPO, CRITIC, ppo),
    "PPO with a separate critic": (PPO, CRITIC | {"separate_critic": True}, ppo),
    "PPO by turns": (PPO, CRITIC | {"gae_level": "turn"}, ppo_by_turn),
}


def make_agent(kind, env=None, **kwargs):
    defaults = {"n_envs": EPISODES, "seed": 0, "max_grad_norm": 1e9, "micro_batch_size": 5}
    defaults |= {"group_size": GROUP} if kind is GRPO else {}
    model = make_model("llama", len(TOKENIZER), scale=1.5)
    with torch.no_grad():
        model.lm_head.weight[A] += 0.1
    return kind(model, make() if env is None else env, **{**defaults, **kwargs})


@pytest.mark.parametrize("method", METHODS)
def test_one_step_of_an_agent(method, monkeypatch):
    kind, kwargs, objective_of = METHODS[method]
    reference = make_model("llama", len(TOKENIZER), seed=1, scale=1.5)
    agent = make_agent(kind, make(reference=reference), **kwargs)
    if agent.needs_values:
        torch.nn.init.normal_(agent.policy.value_head.weight, std=0.3)
    rollout = collect(agent.policy, agent.env.venv, agent.group_size, agent.sampler())
    agent.make_trainer().compute_old_logprobs(rollout)
    rollout.old_logp = disturbed(rollout.old_logp, 0.3, 0)
    if agent.needs_values:
        rollout.old_values = disturbed(rollout.old_values, 0.3, 1)
    agent.compute_advantages(rollout)
    x = Plain(agent, rollout, reference)
    counts = {max(turns) + 1 for turns in x.turns}
    assert counts == {1, 2, 3} and any(x.by_env) and any(x.terminated) and not all(x.terminated)
    objective = objective_of(x)
    parameters = list(agent.policy.parameters())
    expected = torch.autograd.grad(-objective, parameters, allow_unused=True)
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)
    statistics = agent.make_trainer().step(rollout, np.arange(EPISODES), is_first_pass=False)
    assert statistics["loss"] == pytest.approx(-objective.item(), abs=2e-6)
    assert max(p.grad.abs().max() for p in parameters if p.grad is not None) > 1e-3
    for p, gradient in zip(parameters, expected, strict=True):
        got, wanted = (torch.zeros_like(p) if g is None else g for g in (p.grad, gradient))
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=1e-4)
    entropies = [-sum(p * np.log(p) for p in row) for row in _distributions(agent, rollout)]
    assert statistics["entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)


def _distributions(agent, rollout):
    """pi before every action token."""
    for prompt, response, turns in zip(rollout.prompts, rollout.responses, rollout.turn_rows, strict=True):
        logits = agent.policy.lm(torch.tensor([[*prompt, *response]])).logits[0].double()
        for t in np.flatnonzero(turns >= 0):
            yield logits[len(prompt) - 1 + t].softmax(-1).tolist()


# --- credit, by hand -------------------------------------------------------------------------------------------------------


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


TURNS = torch.tensor([[0, 0, -1, -1, 1, -1, 2, 2], [0, -1, 1, 1, -1, -1, -1, -1], [0, 0, 0, -1, -1, -1, -1, -1]])


def test_gae_over_turns_by_hand():
    """gamma 0.5, lambda 0.5. R = 1, 2, 4 with V = 1, 2, 8 in the first row: delta 1, 4, -4; A_2 = -4, A_1 = 3, A_0 = 1.75."""
    rewards = tensor([0.5, 0.5, 0, 0, 2, 0, 1, 3], [1, 0, -1, 0, 0, 0, 0, 0], [0, 0, 3, 0, 0, 0, 0, 0])
    values = tensor([1, 99, 99, 99, 2, 99, 8, 99], [2, 99, 4, 99, 99, 99, 99, 99], [5, 99, 99, 99, 99, 99, 99, 99])
    last = tensor(0, 6, 0).flatten()  # the second row goes on: delta_1 = -1 + 3 - 4 = -2, delta_0 = 1 + 2 - 2 = 1
    advantages, returns = gae_turns(rewards, values, TURNS, 0.5, 0.5, last)
    expected = [[1.75, 1.75, 0, 0, 3, 0, -4, -4], [0.5, 0, -2, -2, 0, 0, 0, 0], [-2, -2, -2, 0, 0, 0, 0, 0]]
    assert advantages.tolist() == expected
    assert returns.tolist() == [[2.75, 2.75, 0, 0, 5, 0, 4, 4], [2.5, 0, 2, 2, 0, 0, 0, 0], [3, 3, 3, 0, 0, 0, 0, 0]]
    one_turn, _ = gae_turns(rewards[2:], values[2:], TURNS[2:], 0.9, 0.3)
    assert one_turn.tolist() == [[-2, -2, -2, 0, 0, 0, 0, 0]]  # A = R - V(prompt)


def test_turns_of_one_token_are_tokens():
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=rng)
    turns = torch.tensor([[0, -1, 1, -1, 2, -1], [0, 1, -1, -1, -1, -1], [0, 1, 2, 3, 4, 5]])
    mask = (turns >= 0).float()
    for got, expected in zip(
        gae_turns(rewards * mask, values, turns, 0.9, 0.7), gae(rewards * mask, values, mask, 0.9, 0.7), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_weights_move_to_the_first_action_of_a_turn():
    weights = (TURNS >= 0).double() / 10
    moved = turn_weights(weights, TURNS)
    torch.testing.assert_close(moved, tensor([2, 0, 0, 0, 1, 0, 2, 0], [1, 0, 2, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]) / 10)
    assert normalize(
        tensor([1, 1, 1, 0], [3, 0, 0, 0]), tensor([1, 1, 1, 0], [1, 0, 0, 0]), tensor([1, 0, 0, 0], [1, 0, 0, 0])
    )[:, 0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])  # mean 2, std 2 ** 0.5: every turn counts once


def test_ratios_of_turns_by_hand():
    logp = torch.log(tensor([0.2, 0.8, 1, 1, 0.5, 1, 0.9, 0.1], [0.5, 1, 0.5, 0.5, 1, 1, 1, 1], [0.1, 0.1, 0.8, 1, 1, 1, 1, 1]))
    old = torch.full_like(logp, np.log(0.4))
    got = ratio(logp, old, (TURNS >= 0).double(), "turn", TURNS)[TURNS >= 0]
    geometric = [1, 1, 1.25, 0.75, 0.75, 1.25, 1.25, 1.25, 0.5, 0.5, 0.5]  # sqrt(.5 * 2), 1.25, sqrt(2.25 * .25); ...
    assert got.tolist() == pytest.approx(geometric)
    sequence = ratio(logp[2:], old[2:], (TURNS[2:] >= 0).double(), "sequence")[TURNS[2:] >= 0]
    assert sequence.tolist() == pytest.approx([0.5] * 3)  # one turn is a sequence


def episode(turns, rewards, info, observation=1):
    """An episode of turns of two tokens, each paid at its second one."""
    turn_ids = [i for k in range(turns) for i in ([k, k] + [-1] * observation)][: None if observation == 0 else -observation]
    paid = [0.0] * len(turn_ids)
    for k, reward in enumerate(rewards):
        paid[k * (2 + observation) + 1] = reward
    ends = [k * (2 + observation) + 1 for k in range(turns)]
    return turn_ids, paid, {"step_ends": ends, **info}


def rollout_of(*episodes, group_size=1, truncated=None):
    turn_ids, rewards, infos = zip(*episodes, strict=True)
    responses = [[3] * len(row) for row in turn_ids]
    zeros = [[0.0] * len(row) for row in turn_ids]
    truncated = [False] * len(responses) if truncated is None else truncated
    return from_episodes(
        [[3]] * len(responses), responses, rewards, zeros, None, truncated, list(infos), group_size, "cpu", turn_ids
    )


def test_process_supervision_of_episodes_of_one_two_and_three_turns_by_hand():
    """Six steps, pooled: 1 | 0, 1 | 0, 0, 1. Mean 0.5, std (Bessel) 0.5477: a step of 1 is +0.9127, of 0 is -0.9127.

    An episode's first token has their sum: 0.9127, 0 and -0.9127. All three succeed, and longer ones score lower.
    """
    agent = make_agent(GRPO, supervision="process", group_size=3)
    rollout = rollout_of(episode(1, [1.0], {}), episode(2, [0.0, 1.0], {}), episode(3, [0.0, 0.0, 1.0], {}), group_size=3)
    agent.compute_advantages(rollout)
    one = 0.5 / (0.3**0.5 + 1e-4)
    expected = [
        [one, one, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, one, one, 0, 0, 0],
        [-one, -one, 0, 0, 0, 0, one, one],
    ]
    torch.testing.assert_close(rollout.advantages.double(), tensor(*expected))
    mostly_unpaid = [episode(3, [0.0, 0.0, 1.0], {}), episode(2, [0.0, 1.0], {}), episode(1, [0.0], {})]
    with pytest.warns(UserWarning, match="67% of the steps pay 0"):
        agent.compute_advantages(rollout_of(*mostly_unpaid, group_size=3))


CAUSES = ["env", "max_turns", "max_episode_tokens", "turn_limit"]


@pytest.mark.parametrize(
    ("setting", "has_reward", "gamma", "expected"),
    [
        (None, False, 0.9, [True, True, False, False]),
        (None, False, 1.0, [True, False, False, False]),
        (None, True, 0.9, [True, False, False, False]),
        (True, False, 1.0, [True] * 4),
        (False, False, 0.9, [False] * 4),
    ],
)
def test_which_truncations_are_bootstrapped(setting, has_reward, gamma, expected):
    extra = {"reward/env": 0.0} | ({"reward/mine": 0.0} if has_reward else {})
    episodes = [episode(1, [0.0], {"truncated_by": cause, "final_observation_fits": True, **extra}) for cause in CAUSES]
    unfit = [episode(1, [0.0], {"truncated_by": "env", "final_observation_fits": False, **extra})]
    rollout = rollout_of(*episodes, *unfit, episode(1, [0.0], extra), truncated=[True] * 5 + [False])
    assert bootstraps(rollout, setting, gamma).tolist() == [*expected, False, False]


@pytest.mark.parametrize("level", ["token", "turn"])
def test_bootstrap_after_a_truncation_by_hand(level):
    """gamma 0.5, lambda 0: the last turn's last decision has 1 + 0.5 * V(after) - V, V(after) = 4."""
    agent = make_agent(PPO, gamma=0.5, gae_lambda=0.0, gae_level=level, normalize_advantage=False)
    info = {"truncated_by": "env", "final_observation_fits": True}
    rollout = rollout_of(
        episode(2, [0.0, 1.0], info), episode(2, [0.0, 1.0], {**info, "final_observation_fits": False}), truncated=[True, True]
    )
    rollout.old_values = torch.tensor([[1.0, 2.0, 9.0, 3.0, 5.0]] * 2)
    rollout.last_values = torch.tensor([4.0, 4.0])
    agent.compute_advantages(rollout)
    # by token: 0.5 * 2 - 1, 0.5 * 3 - 2, 0.5 * 5 - 3, 1 + 0.5 * 4 - 5; by turn: 0.5 * 3 - 1, 1 + 0.5 * 4 - 3
    expected = {"token": [0.0, -0.5, 0.0, -0.5, -2.0], "turn": [0.5, 0.5, 0.0, 0.0, 0.0]}[level]
    unfit = {"token": [0.0, -0.5, 0.0, -0.5, -4.0], "turn": [0.5, 0.5, 0.0, -2.0, -2.0]}[level]
    assert rollout.advantages.tolist() == [expected, unfit]


def test_the_head_is_computed_for_action_tokens_only():
    agent, rows = make_agent(GRPO), []
    rollout = collect(agent.policy, agent.env.venv, GROUP, agent.sampler())
    hook = agent.policy.lm.lm_head.register_forward_hook(lambda head, inputs, output: rows.append(output.shape[:-1].numel()))
    with torch.no_grad():
        agent.policy.evaluate_actions(rollout.prompts, rollout.responses, 1.0, rollout.turn_lists)
    hook.remove()
    assert sum(rows) == (rollout.turn_ids >= 0).sum() < sum(map(len, rollout.responses))
