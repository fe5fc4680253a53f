"""Bad input to agents: refused before any work, and the agent goes on as if nothing had been said."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import GRPO, PPO, REINFORCE
from agents.vec_env import as_vec_env
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env

TOKENIZER = make_tokenizer("abc")
V, A, LIMIT = len(TOKENIZER), 3, 128  # positions of the tests' models
NOT_WHOLE = [0, -1, 2.5, True, "3", float("nan"), [3]]
NOT_FINITE = ["x", float("nan"), float("inf"), [1.0], 1j]


def make_agent(name=GRPO, family="gpt2", **kwargs):
    groups = {"group_size": 2} if name is GRPO and "group_size" not in kwargs else {}
    return name(make_model(family, V), make_env(TOKENIZER), **{"n_envs": 4, "seed": 0, **groups, **kwargs})


AGENT = make_agent()
OBSERVATION = {"input_ids": np.array([[A, 4, 1]] * 2), "attention_mask": np.array([[1, 1, 0]] * 2, dtype=np.int8)}


@pytest.fixture(autouse=True)
def nothing_changes():
    def state():
        sums = [p.detach().double().sum().item() for p in AGENT.policy.parameters()]
        return sums, AGENT.num_timesteps, AGENT._generator.get_state().tolist(), str(AGENT.np_random.bit_generator.state)

    before, texts = state(), AGENT.generate(["a", "b"], deterministic=True)
    yield
    assert state() == before and AGENT.generate(["a", "b"], deterministic=True) == texts


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        ("a", TypeError, "prompts is a str; give a list"),
        (None, TypeError, "prompts is a NoneType"),
        (3, TypeError, "prompts is a int"),
        ({"a": 1}, TypeError, "prompts is a dict"),
        ((x for x in "ab"), TypeError, "prompts is a generator"),
        (["a", 3], TypeError, "prompt 1 is a int"),
        (["a", None], TypeError, "prompt 1 is a NoneType"),
        ([b"a"], TypeError, "prompt 0 is a bytes"),
        ([["a"]], TypeError, "prompt 0 is a list"),
        ([{"role": "user", "content": "a"}], TypeError, "prompt 0 is a dict"),
        (["a", "a\ud800"], ValueError, "prompt 1 is no valid text: character 1"),
        (["a", ""], ValueError, "prompt 1 is empty"),
        (
            ["a", "a" * LIMIT],
            ValueError,
            "longest prompt, of 128 tokens, .* need 132 positions, the model has 128",
        ),
    ],
)
def test_prompts_of_generate(prompts, error, message):
    refused(AGENT.generate, prompts, error=error, match=message)


def test_limits_of_generate():
    for limit in NOT_WHOLE:
        refused(AGENT.generate, ["a"], max_new_tokens=limit, error=ValueError, match="max_new_tokens=")
    refused(
        AGENT.generate,
        ["a"],
        max_new_tokens=LIMIT,
        match="need 129 positions, the model has 128; lower .* to 127",
    )
    assert AGENT.generate([]) == []
    assert len(AGENT.generate(np.array(["a", "b"]), deterministic=True)) == 2


bad_ids = st.integers(-(2**62), -1) | st.integers(V, 2**62)


@settings(max_examples=60, deadline=None)
@given(row=st.integers(0, 1), column=st.integers(0, 1), token=bad_ids, flat=st.booleans())
def test_ids_of_an_observation(row, column, token, flat):
    ids = OBSERVATION["input_ids"].copy()
    ids[row, column] = token
    if flat and token != -1:  # -1 is its padding
        refused(AGENT.predict, np.where(OBSERVATION["attention_mask"] == 1, ids, -1), match=f"token {token} in row {row}")
    refused(AGENT.predict, {**OBSERVATION, "input_ids": ids}, error=ValueError, match=f"token {token} in row {row} is not")


@pytest.mark.parametrize(
    "observation",
    [
        None,
        "a",
        3,
        {"input_ids": OBSERVATION["input_ids"]},
        {**OBSERVATION, "input_ids": OBSERVATION["input_ids"] + 0.5},
        {**OBSERVATION, "attention_mask": np.full((2, 3), np.nan)},
        {**OBSERVATION, "attention_mask": np.full((2, 3), 2)},
        {**OBSERVATION, "attention_mask": np.ones((2, 2))},
        {key: value[None] for key, value in OBSERVATION.items()},
        {"input_ids": np.array(3), "attention_mask": np.array(1)},
        {**OBSERVATION, "attention_mask": np.zeros((2, 3))},
        np.zeros((0, 3), dtype=int),
        np.array([], dtype=int),
        np.array([3.0]),
        np.array([True, False]),
        np.full(LIMIT + 1, A),
    ],
)
def test_observations_that_are_none(observation):
    refused(AGENT.predict, observation, error=ValueError)


def test_masks_states_and_starts():
    masks = [np.zeros(V, bool), np.ones((2, V - 1), bool), np.array([3]), np.full((2, V), np.nan), np.ones((3, V), bool), "a"]
    nothing_in_row_1 = np.array([[True] * V, [False] * V])
    for mask in [*masks, nothing_in_row_1, np.ones((2, V)) * 2]:
        refused(AGENT.predict, OBSERVATION, action_masks=mask, error=ValueError, match="action_masks")
    for state in (3, "a", (1,), np.array([1])):
        refused(AGENT.predict, OBSERVATION, state, error=TypeError, match="state is a")
    for starts in (True, [True], [True] * 3):
        refused(AGENT.predict, OBSERVATION, None, starts, error=ValueError, match="episode_start has")
    only = np.arange(V) == 4
    assert AGENT.predict(OBSERVATION, deterministic=True, action_masks=np.stack([only, only]))[0].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((True,), {}, "True is no text env"),
        (([],), {}, "is no text env"),
        ((float("nan"),), {}, "total_timesteps=nan"),
        ((float("inf"),), {}, "total_timesteps=inf"),
        ((-1,), {}, "total_timesteps=-1"),
        ((), {"total_timesteps": "100"}, "total_timesteps='100'"),
        ((100,), {"total_timesteps": 100}, "total_timesteps was given twice: 100 and 100"),
        ((None, 100), {"total_timesteps": 100}, "total_timesteps was given twice"),
        ((make_env(TOKENIZER),), {"env": make_env(TOKENIZER)}, "env was given twice"),
        ((100,), {"env": 3}, "3 is no text env"),
        *[((100,), {"log_interval": interval}, "log_interval=") for interval in NOT_WHOLE],
    ],
)
def test_learn(args, kwargs, message):
    refused(AGENT.learn, *args, **kwargs, match=message)


@pytest.mark.parametrize(
    ("algorithm", "name", "values"),
    [
        (GRPO, "group_size", [0, 1, -2, 3, 2.0, True, "2"]),
        *[(GRPO, name, NOT_WHOLE) for name in ("n_envs", "n_epochs", "batch_size", "stats_window_size")],
        *[(GRPO, name, NOT_WHOLE) for name in ("micro_batch_size", "max_tokens_per_batch")],
        (GRPO, "max_num_seqs", [*NOT_WHOLE, 1]),
        (PPO, "prefix_sharing", ["yes", None, 2, "True", [True]]),
        (REINFORCE, "min_p", [-0.1, 1.1, "0.5", None, float("nan")]),
        (PPO, "bf16", ["yes", None, 2, 1.0]),
        *[(REINFORCE, name, [-1, 2**32, 1.5, "a", True]) for name in ("seed",)],
        *[(GRPO, name, [*NOT_FINITE, -1.0]) for name in ("kl_coef", "clip_range", "clip_range_high", "max_grad_norm")],
        *[(PPO, name, [*NOT_FINITE, -1.0]) for name in ("gamma", "gae_lambda", "clip_range_vf", "vf_coef", "target_kl")],
        *[(algorithm, "ent_coef", NOT_FINITE) for algorithm in (GRPO, PPO, REINFORCE)],
        (REINFORCE, "temperature", [0, -1.0, "1", None, float("nan")]),
        (REINFORCE, "top_k", [-1, 1.5, "2", True]),
    ],
)
def test_arguments_of_agents(algorithm, name, values):
    for value in values:
        refused(make_agent, algorithm, **{name: value}, error=ValueError, match=name)


def test_actions_of_the_sb3_face():
    one, other = as_vec_env(make_env(TOKENIZER), 2), DummyVecEnv([lambda: make_env(TOKENIZER)] * 2)
    for vec_env in (one, other):
        vec_env.seed(0)
        vec_env.reset()
    bad = [[A], [A] * 3, [1.5, 2.5], [True, True], [[A, A], [A, A]], None, "ab", np.array([[A], [A + 0.5]])]
    for actions in bad:
        refused(one.step, actions, error=ValueError, match="actions must be 2 integers")
    refused(one.step, [A, V], match=f"action {V} in row 1")
    steps = [vec_env.step(np.array([A, 4])) for vec_env in (one, other)]
    (ids, paid), (same_ids, same_paid) = ((step[0]["input_ids"], step[1]) for step in steps)
    assert ids.tolist() == same_ids.tolist() and paid.tolist() == same_paid.tolist()
    assert one.step(np.array([[A], [4]]))[0]["input_ids"].tolist() == other.step(np.array([A, 4]))[0]["input_ids"].tolist()


def test_a_reward_that_fails_in_the_middle_of_learning_leaves_an_agent_that_learns_on():
    calls = [0]

    def fails_once(completions):
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("no network")
        return [float(c.count("a")) for c in completions]

    torch.manual_seed(0)
    agent = GRPO(make_model("llama", V), make_env(TOKENIZER, fails_once), group_size=2, n_envs=4, seed=0)
    with pytest.raises(ValueError, match="'fails_once' raised OSError: no network"):
        agent.learn(10**6)
    done = agent.num_timesteps
    assert 4 <= done <= 16  # the first rollout
    agent.learn(1, reset_num_timesteps=False)
    assert calls[0] == 3 and agent.num_timesteps > done
