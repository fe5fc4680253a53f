"""Which episodes make an optimizer step and which a forward pass: the first is drawn, the second changes no number."""

from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stable_baselines3.common.logger import Logger
from transformers import BloomConfig, BloomForCausalLM

import agents.sampling.shared_prefix
import llm_env
from agents import GRPO, PPO, REINFORCE
from agents.distributed.communicator import SINGLE_PROCESS
from agents.training.trainer import Trainer
from llm_env.lm.micro_batches import DEFAULT_TOKENS_CPU
from llm_env.lm.scoring import head_of
from llm_env.lm.sharing import supports_sharing
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env
from tests.rollouts import collect

TOKENIZER = make_tokenizer("abcdefgh")
PROMPTS = ("abcdefgh", "bcdef", "cd", "hgfedcba", "ba")
LONGEST, NEW, EPISODES, GROUP = 8, 6, 16, 4
NO_BOUND = 10**6


@llm_env.process_reward
def steps(completions, **kwargs):
    return [[(i, float(c == "a")) for i, c in enumerate(completion)] for completion in completions]


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


CASES = {
    "GRPO": (GRPO, {"kl_coef": 0.1, "ent_coef": 0.01}, {}),
    "GRPO, sequence ratio": (GRPO, {"ratio_level": "sequence", "aggregation": "token"}, {}),
    "GRPO, process supervision": (GRPO, {"supervision": "process"}, {"reward": steps}),
    "GRPO, truncated left out": (GRPO, {"mask_truncated": True, "aggregation": "constant"}, {}),
    "GRPO, constrained": (GRPO, {}, {"allowed_tokens": lambda prompt, response: [0, 3 + len(response), 4, 5]}),
    "PPO": (PPO, {"n_epochs": 1}, {}),
    "PPO with a critic of its own": (PPO, {"n_epochs": 1, "separate_critic": True}, {}),
    "REINFORCE": (REINFORCE, {}, {}),
    "REINFORCE with critic": (REINFORCE, {"baseline": "value"}, {"min_new_tokens": 2}),
}
# One row a pass; groups cut; one group a pass; one and more; three of four.
BUDGETS = [LONGEST + NEW, LONGEST + 2 * NEW + 3, LONGEST + GROUP * NEW, 70, 100]


def make_agent(kind=GRPO, env=None, model=None, scale=2.0, **kwargs):
    if env is None or isinstance(env, dict):
        reference = make_model("llama", len(TOKENIZER), seed=1, scale=scale)
        arguments = {"reward": letters, "max_prompt_tokens": LONGEST, "max_new_tokens": NEW, **(env or {})}
        env = make_env(TOKENIZER, prompts=PROMPTS, reference=reference, **arguments)
    group = {"group_size": GROUP} if kind is GRPO else {}
    settings = {"learning_rate": 1e-2, "n_envs": EPISODES, "seed": 0, "max_grad_norm": 1e9, **group, **kwargs}
    return kind(make_model("llama", len(TOKENIZER), scale=scale) if model is None else model, env, **settings)


def prepared(agent):
    rollout = collect(agent.policy, agent.env.venv, agent.group_size, agent.sampler())
    if agent.needs_values:
        torch.nn.init.normal_(agent.policy.value_head.weight, std=0.3)
        agent.make_trainer().compute_old_logprobs(rollout)
    agent.compute_advantages(rollout)
    assert rollout.advantages.any()
    agent.set_logger(Logger(None, []))
    return rollout


def inputs_of(agent):
    """The shapes of what the networks are given from here on, (rows, positions) a forward pass."""
    shapes = []
    for model in (agent.policy.lm.base_model, agent.policy.critic):
        if model is not None:
            supports_sharing(model, 9)  # tries the model, once
            model.register_forward_pre_hook(lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    head_of(agent.policy.lm)
    shapes.clear()
    return shapes


@pytest.mark.parametrize("case", CASES)
def test_passes_change_no_step(case, monkeypatch):
    """Loss, gradient, statistics and old log-probs are those of one pass, whatever the budget, which no pass exceeds."""
    kind, arguments, env = CASES[case]
    agent = make_agent(kind, env, preflight=False, **arguments)
    rollout = prepared(agent)
    assert len(set(rollout.lengths.tolist())) > 1
    monkeypatch.setattr(agent.policy.optimizer, "step", lambda: None)
    shapes = inputs_of(agent)

    def step(budget, size=None):
        agent.max_tokens_per_batch, agent.micro_batch_size = budget, size
        shapes.clear()
        part = rollout.select(range(EPISODES))
        if agent.needs_values:
            agent.make_trainer().compute_old_logprobs(part)
        statistics = agent.make_trainer().step(part, np.arange(EPISODES)[::-1].copy(), is_first_pass=True)
        gradient = [None if p.grad is None else p.grad.clone() for p in agent.policy.parameters()]
        return gradient, statistics, part

    whole, statistics, scored = step(NO_BOUND)
    passes = len(shapes)
    assert passes == (2 if agent.needs_values else 1) * (1 if agent.policy.critic is None else 2)
    assert max(g.abs().max() for g in whole if g is not None) > 1e-3
    for budget, size in [*((budget, None) for budget in BUDGETS), (BUDGETS[3], 3), (NO_BOUND, 5)]:
        gradient, again, part = step(budget, size)
        assert len(shapes) >= passes and max(n * width for n, width in shapes) <= budget
        assert budget == NO_BOUND or len(shapes) > passes
        for name in ("old_logp", "old_values", "last_values"):
            if getattr(scored, name) is not None:
                torch.testing.assert_close(getattr(part, name), getattr(scored, name), atol=1e-5, rtol=1e-5)
        for a, b in zip(gradient, whole, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-4)
        assert again == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in statistics.items()}


@pytest.mark.parametrize("kind", [GRPO, PPO, REINFORCE])
def test_a_training_under_a_budget_is_the_same_training(kind):
    """Weights, random numbers and logs after two rollouts of two passes, in minibatches and in one step."""
    sgd = {"optimizer_class": torch.optim.SGD}

    def train(**kwargs):
        agent = make_agent(kind, scale=1.0, n_epochs=2, policy_kwargs=sgd, **kwargs)
        before = [p.detach().clone() for p in agent.policy.parameters()]
        for _ in range(2):
            agent.learn(1, reset_num_timesteps=False)
        return agent, before

    for batch_size in (8, None):
        (a, start), (b, _) = (
            train(batch_size=batch_size, max_tokens_per_batch=budget) for budget in (NO_BOUND, LONGEST + 2 * NEW)
        )
        assert a._n_updates == b._n_updates == (8 if batch_size else 4)
        assert a.np_random.bit_generator.state == b.np_random.bit_generator.state
        assert torch.equal(a._generator.get_state(), b._generator.get_state()) and a.num_timesteps == b.num_timesteps
        for p, q in zip(a.policy.parameters(), b.policy.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
        assert max((p - first).abs().max() for p, first in zip(a.policy.parameters(), start, strict=True)) > 1e-3


# --- passes by hand ----------------------------------------------------------------------------------------------------------


def planned(prompts, lengths, budget=None, size=None, shares=True):
    """The passes of episodes with prompts of one number, repeated, and responses of these lengths."""
    lm = make_model("llama", 16) if shares else BloomForCausalLM(BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2))
    policy = SimpleNamespace(prefix_sharing="auto", lm=lm)
    trainer = Trainer(
        policy,
        None,
        SINGLE_PROCESS,
        None,
        None,
        SimpleNamespace(text_env=None),
        micro_batch_size=size,
        max_tokens_per_batch=budget or NO_BOUND,
    )
    rollout = SimpleNamespace(prompts=prompts, lengths=np.array(lengths))
    parts = trainer.micro_batches(rollout, np.arange(len(prompts)))
    assert sorted(row for part in parts for row in part) == list(range(len(prompts)))
    return parts


def test_long_responses_stand_beside_long_ones():
    """In the order in which they come there would be four passes of 2 * (1 + 8) positions, 72 and 28 of them padding."""
    prompts, lengths = [[i] for i in range(8)], [1, 8] * 4
    assert planned(prompts, lengths, 18) == [[1, 3], [5, 7], [0, 2, 4, 6]]  # 18 + 18 + 8
    assert planned(prompts, lengths) == [list(range(8))]


@pytest.mark.parametrize(
    ("budget", "size", "expected"),
    [
        (51, None, [3 * 4]),  # 9 + 4 * 2 is a group's
        (50, None, [8, 4]),
        (17, None, [4, 4, 4]),
        (16, None, [3, 1, 3, 1, 3, 1]),  # 9 + 3 * 2; beside one row there is no room for another prompt
        (13, None, [2] * 6),
        (11, None, [1] * 12),
        (None, 8, [8, 4]),
        (None, 5, [4, 4, 4]),
        (None, 3, [3, 3, 3, 3]),
        (17, 8, [4, 4, 4]),
        (51, 2, [2] * 6),
    ],
)
def test_groups_stay_together_where_they_fit(budget, size, expected):
    prompts = [[i] * 9 for i in range(3) for _ in range(4)]
    parts = planned(prompts, [2] * 12, budget, size)
    assert [len(part) for part in parts] == expected
    if expected[0] >= 4:
        assert all(len({tuple(prompts[row]) for row in part}) * 4 == len(part) for part in parts)


def test_answers_much_shorter_than_the_longest_of_their_group_leave_it():
    """Two groups of 4 * (1 + 10) positions; or the two long answers with two short ones, and four short ones, 44 + 8."""
    prompts, lengths = [[1]] * 4 + [[2]] * 4, [10, 1, 1, 1] * 2
    assert planned(prompts, lengths, 44) == [[0, 1, 2, 4], [3, 5, 6, 7]]  # and in each of them the rows of a prompt together


def test_a_model_that_computes_every_prompt_again_is_counted_so():
    prompts = [[i] * 9 for i in range(3) for _ in range(4)]
    assert [len(part) for part in planned(prompts, [2] * 12, 51, shares=False)] == [4, 4, 4]  # 4 * (9 + 2)


def test_equal_prompts_stand_together_wherever_they_come():
    assert planned([[1], [2], [1], [3], [2], [1]], [1] * 6) == [[0, 2, 5, 1, 4, 3]]


def test_on_a_cpu_there_is_a_budget_by_default(monkeypatch):
    agent = make_agent(preflight=False)
    shapes = inputs_of(agent)
    monkeypatch.setattr("llm_env.lm.micro_batches.DEFAULT_TOKENS_CPU", 40)
    agent.train(prepared(agent))
    assert DEFAULT_TOKENS_CPU > 1000 and len(shapes) > 2 and max(n * width for n, width in shapes[-4:]) <= 40


# --- optimizer steps ---------------------------------------------------------------------------------------------------------


def steps_of(agent, monkeypatch):
    """The episodes of the optimizer steps from here on, and the prompts of their forward passes."""
    found, original, evaluate = [], Trainer.step, agent.policy.evaluate_actions

    def step(trainer, rollout, rows, is_first_pass):
        found.append((rows.tolist(), []))
        return original(trainer, rollout, rows, is_first_pass)

    def spy(prompts, *args):
        if found:
            found[-1][1].append([tuple(prompt) for prompt in prompts])
        return evaluate(prompts, *args)

    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(agent.policy, "evaluate_actions", spy)
    return found


@pytest.mark.parametrize(("batch_size", "unit"), [(8, GROUP), (12, GROUP), (6, 1), (2, 1)])
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_minibatches_hold_whole_groups_and_every_episode_once_a_pass(kind, batch_size, unit, monkeypatch):
    agent = make_agent(kind, n_epochs=2, batch_size=batch_size)
    rollout, unit = prepared(agent), unit if kind is GRPO else 1
    found = steps_of(agent, monkeypatch)
    stream = np.random.default_rng()
    stream.bit_generator.state = agent.np_random.bit_generator.state
    agent.train(rollout)
    steps = -(-EPISODES // batch_size)
    assert len(found) == 2 * steps
    for epoch in range(2):
        rows = [row for step, _ in found[epoch * steps : (epoch + 1) * steps] for row in step]
        order = stream.permutation(EPISODES // unit)
        assert rows == [unit * i + k for i in order for k in range(unit)] and sorted(rows) == list(range(EPISODES))
    for rows, passes in found:
        prompts = [prompt for part in passes for prompt in part]
        assert sorted(prompts) == sorted(tuple(rollout.prompts[row]) for row in rows)
        for part in passes:
            assert len(list(groupby(part))) == len(set(part))  # equal prompts follow each other
    assert stream.bit_generator.state == agent.np_random.bit_generator.state


def test_a_minibatch_computes_a_prompt_once():
    """Two groups of four answers, of which nobody is fed the last of 6 tokens: 2 * (8 + 4 * 5) positions, not 8 * (8 + 5)."""
    env = make_env(TOKENIZER, letters, ["aaaabbbb", "abababab", "ccccdddd", "cdcdcdcd"], max_prompt_tokens=8, max_new_tokens=6)
    agent = make_agent(GRPO, env, batch_size=8, n_epochs=2)
    rollout = prepared(agent)
    rollout.responses = [[5] * 6 for _ in rollout.responses]
    ones = torch.ones(EPISODES, 6)
    rollout.mask, rollout.rewards = ones, ones * torch.arange(EPISODES)[:, None]
    rollout.sampled_logp = rollout.step_ends = ones
    assert len({tuple(prompt) for prompt in rollout.prompts}) == 4
    shapes = inputs_of(agent)
    agent.train(rollout)
    assert shapes == [(2, 8 + 4 * 5)] * 6  # two that score and two of each pass over the rollout


# --- the argument ------------------------------------------------------------------------------------------------------------


def test_a_budget_that_does_not_hold_the_longest_episode_is_refused():
    message = r"max_tokens_per_batch=13 does not hold the longest prompt, of 8 tokens, and max_new_tokens=6; raise it to 14"
    refused(make_agent, max_tokens_per_batch=13, error=ValueError, match=message)
    agent = make_agent(max_tokens_per_batch=14)
    agent.max_tokens_per_batch = 13
    refused(agent.learn, 1, error=ValueError, match=message)
    assert agent.num_timesteps == 0
    agent.max_tokens_per_batch = 14
    assert agent.learn(1)._n_updates == 1


def test_a_file_carries_the_budget_and_one_from_before_there_was_any_loads(tmp_path):
    agent = make_agent(max_tokens_per_batch=20, preflight=False)
    agent.save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent", env=agent.env)
    assert again.max_tokens_per_batch == 20 and again.preflight is False
    agent.save(tmp_path / "older", exclude=["max_tokens_per_batch", "preflight"])
    older = GRPO.load(tmp_path / "older", env=agent.env)
    assert older.max_tokens_per_batch is None and older.preflight is True
    assert older.learn(1)._n_updates == 1


# --- how passes are computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_sharing_prompts_changes_no_training(kind):
    """The same tokens are drawn and the same weights learned, by several optimizer steps, with prompts shared and not."""

    def trained(prefix_sharing):
        agent = make_agent(kind, prefix_sharing=prefix_sharing, batch_size=8, learning_rate=1e-3)
        agent.learn(3 * EPISODES * 2)
        assert agent._n_updates >= 4 and agent.rules.reference.prefix_sharing == prefix_sharing
        return agent.num_timesteps, list(agent.policy.parameters())

    (tokens, plain), (shared_tokens, shared) = trained(False), trained(True)
    assert tokens == shared_tokens
    for a, b in zip(plain, shared, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_a_bound_on_responses_under_way_is_kept_while_learning(monkeypatch):
    largest, original = [], agents.sampling.shared_prefix.SharedDecoding.__call__

    def spy(self, tokens):
        largest.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(agents.sampling.shared_prefix.SharedDecoding, "__call__", spy)
    agent = make_agent(max_num_seqs=2 * GROUP)
    agent.learn(3 * EPISODES)
    assert 0 < max(largest) <= 2 * GROUP and agent._n_updates >= 1


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_bfloat16_moves_log_probs_a_little_and_leaves_weights_in_float32(kind):
    agent = make_agent(kind, bf16=True)
    exact = make_agent(kind)
    prompts, responses = [[3, 4, 5]] * 4, [[3, 4], [5, 6, 7], [3], [4, 4]]
    gaps = torch.cat(agent.policy.log_probs(prompts, responses)) - torch.cat(exact.policy.log_probs(prompts, responses))
    assert 1e-6 < gaps.abs().max() < 0.1
    agent.learn(3 * EPISODES)
    assert agent.rules.reference.bf16 and agent._n_updates >= 1
    states = agent.policy.optimizer.state_dict()["state"].values()
    floats = [*agent.policy.parameters(), *(value for state in states for value in state.values())]
    assert {value.dtype for value in floats} == {torch.float32}
