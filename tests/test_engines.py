"""Engines in the policy's place, made here; servers are in test_engine_server.py, the real vLLM in test_vllm.py."""

import copy
import itertools
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

import agents.engines.vllm.local
import agents.engines.vllm.server
import llm_env
from agents import GRPO, PPO, LanguagePolicy
from agents.distributed.communicator import Communicator
from agents.engines.base import Completions, DecodingSpec, PolicyEngine, StaleWeightsError, end_episodes
from agents.engines.vllm.engine import VLLMEngine, chunks_of, own_url
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import make_env

TOKENIZER = make_tokenizer("abcdefgh")
V = len(TOKENIZER)


class CopyEngine:
    """A copy of the policy draws; `arrives` says which of the pushes do."""

    tolerance, takes_uniforms = 1e-3, False

    def __init__(self, arrives=lambda push: True):
        self.arrives, self.starts, self.pushes, self.loses, self.closed = arrives, 0, 0, 0, False

    def start(self, policy, rules):
        self.starts += 1
        self.copy = LanguagePolicy(copy.deepcopy(policy.lm), policy.tokenizer)

    def update_weights(self, policy):
        self.pushes += 1
        if self.arrives(self.pushes):
            self.copy.lm.load_state_dict(policy.lm.state_dict())

    def generate(self, prompts, group_size, decoding, on_turns=end_episodes):
        if on_turns is not end_episodes and self.loses:
            self.loses -= 1
            raise StaleWeightsError("gone")
        return PolicyEngine(self.copy).generate(prompts, group_size, decoding, on_turns)

    def close(self):
        self.closed = True


def agent_for(engine, kind=GRPO, env=None, **settings):
    settings = {"n_envs": 16, "learning_rate": 3e-3, "seed": 0, "policy_kwargs": {"tokenizer": TOKENIZER}, **settings}
    return kind(make_model("llama", V), make_env(TOKENIZER) if env is None else env, engine=engine, **settings)


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_an_engine_of_the_same_policy_changes_nothing(kind):
    engine = CopyEngine()
    plain, other = agent_for(None, kind), agent_for(engine, kind)
    for agent in (plain, other):
        agent.learn(300)
    assert engine.pushes == other._n_updates / other.n_epochs and engine.starts == 1
    for mine, theirs in zip(plain.policy.parameters(), other.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_weights_are_pushed_when_they_have_moved_and_only_then():
    engine = CopyEngine()
    agent = agent_for(engine)
    for _ in range(3):
        agent.sample_rollout()
    assert engine.pushes == 1
    with torch.no_grad():
        next(agent.policy.lm.parameters()).mul_(1.5)
    agent.sample_rollout()
    assert engine.pushes == 2 and agent.engine.gap < 1e-5
    agent.set_env(make_env(TOKENIZER))
    agent.sample_rollout()
    assert engine.starts == 2 and engine.pushes == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_old_weights_that_stay_are_an_error_and_the_agent_is_as_before(tmp_path, temperature):
    engine = CopyEngine()
    agent, twin = (agent_for(e, learning_rate=1e-2, temperature=temperature) for e in (engine, CopyEngine()))
    twin.learn(200)
    agent.learn(100)
    steps, pushes, engine.arrives = agent.num_timesteps, engine.pushes, lambda push: False
    refused(agent.learn, 100, reset_num_timesteps=False, error=RuntimeError, match=r"0\.\d+ nats off the policy's after")
    assert agent.num_timesteps == steps and engine.pushes == pushes + 2
    agent.save(tmp_path / "agent")
    engine.arrives = lambda push: push != engine.pushes or push % 2 == 0
    agent.learn(twin.num_timesteps - steps, reset_num_timesteps=False)
    loaded = GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER), engine=CopyEngine())
    loaded.learn(twin.num_timesteps - steps, reset_num_timesteps=False)
    for mine, its, theirs in zip(*(a.policy.parameters() for a in (agent, loaded, twin)), strict=True):
        assert torch.equal(mine, theirs) and torch.equal(its, theirs)


def test_one_step_behind_is_noticed_where_the_policy_is_sure_of_its_tokens():
    engine = CopyEngine()
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", n_envs=64, seed=0, learning_rate=3e-4, engine=engine)
    agent.learn(64)
    engine.arrives = lambda push: False
    refused(agent.learn, 64, reset_num_timesteps=False, error=RuntimeError, match="nats off the policy's")


def test_a_push_that_arrives_at_the_second_try_is_none():
    engine = CopyEngine(arrives=lambda push: push % 2 == 0)
    agent_for(engine, learning_rate=1e-2).learn(200)
    assert engine.pushes >= 6 and engine.pushes % 2 == 0


def test_an_engine_whose_log_probs_are_nan_is_an_error():
    engine = CopyEngine()
    agent = agent_for(engine)
    generate = engine.generate

    def generate_nan(*args):
        completions = generate(*args)
        return Completions(completions.token_ids, [np.full_like(row, np.nan) for row in completions.logprobs])

    engine.generate = generate_nan
    refused(agent.learn, 10, error=RuntimeError, match="nan nats off")


def test_an_engine_that_lost_the_weights_gets_them_again_and_draws_anew():
    engine = CopyEngine()
    agent = agent_for(engine)
    agent.sample_rollout()
    engine.loses = 1
    agent.sample_rollout()
    assert engine.starts == 2 and engine.pushes == 2
    engine.loses = 2
    with pytest.raises(StaleWeightsError):
        agent.sample_rollout()


def test_importance_weights_are_on_with_an_engine_unless_told_otherwise():
    caps = [agent_for(e, importance_cap=c).importance for e, c in [(None, None), (CopyEngine(), None), (CopyEngine(), 5.0)]]
    assert caps == [None, 2.0, 5.0]
    agent = agent_for(CopyEngine())
    logged = {}

    class Look(BaseCallback):
        def _on_step(self):
            return True

        def _on_training_end(self):
            logged.update(self.logger.name_to_value)

    agent.learn(64, callback=Look(), log_interval=None)
    assert logged["train/importance"] == pytest.approx(1.0, abs=1e-4)
    assert 0 < logged["rollout/push_gap"] < 1e-3 and logged["time/push"] > 0


def test_the_engine_is_not_in_the_file(tmp_path):
    agent = agent_for(CopyEngine())
    agent.learn(64)
    agent.save(tmp_path / "agent")
    loaded = GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER))
    refused(loaded.learn, 64, error=ValueError, match=r"call agent\.set_engine")
    loaded.set_engine(None)
    loaded.learn(64)
    assert loaded.importance is None
    kwargs = {"base_url": "http://127.0.0.1:1", "attempts": 1}
    agent.set_engine("vllm", kwargs)
    agent.save(tmp_path / "agent")
    loaded = GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER))
    assert (loaded._engine_setting, loaded.engine_kwargs, loaded.importance) == ("vllm", kwargs, 2.0)
    refused(loaded.learn, 64, error=ConnectionError, match="http://127.0.0.1:1/v1/models gave no answer in 1 attempts")


def test_an_engine_that_the_agent_made_is_closed_when_another_takes_its_place(monkeypatch):
    closed = []
    monkeypatch.setattr(agents.engines.vllm.server.VLLMServer, "close", lambda self: closed.append(self.url))
    agent = agent_for("vllm", engine_kwargs={"base_url": "http://127.0.0.1:1/v1/"})
    own = CopyEngine()
    agent.set_engine(own)
    agent.set_engine(None)
    assert closed == ["http://127.0.0.1:1"] and not own.closed


def test_bad_arguments(monkeypatch):
    refused(agent_for, "sglang", error=ValueError, match="engine='sglang' must be one of 'vllm'")
    refused(agent_for, object(), error=TypeError, match="must have tolerance, takes_uniforms, start, update_weights")
    refused(agent_for, CopyEngine, error=TypeError, match="must have tolerance, takes_uniforms, start, update_weights")
    refused(agent_for, "vllm", engine_kwargs="http://x", error=TypeError, match="engine_kwargs='http://x' must be a dict")
    refused(agent_for, "vllm", engine_kwargs={"base_url": 8000}, error=ValueError, match="base_url=8000 must be the address")
    refused(agent_for, None, engine_kwargs={"base_url": "http://x"}, error=ValueError, match="without an engine")
    refused(agent_for, CopyEngine(), engine_kwargs={"a": 1}, error=ValueError, match="set up your CopyEngine itself")
    server = {"base_url": "http://127.0.0.1:1"}
    refused(agent_for, "vllm", engine_kwargs={**server, "dtype": "float32"}, error=ValueError, match="the server's command")
    refused(agent_for, "vllm", engine_kwargs={**server, "timeout": 0}, error=ValueError, match="timeout=0 must be a number")
    refused(agent_for, "vllm", engine_kwargs={**server, "attempts": 0}, error=ValueError, match="attempts")
    refused(agent_for, "vllm", engine_kwargs={"base_url": "localhost:8000"}, error=ValueError, match="http://localhost")
    function = make_env(TOKENIZER, allowed_tokens=lambda prompt, response: [0, 2])
    refused(agent_for, CopyEngine(), env=function, error=ValueError, match="cannot call the function allowed_tokens")
    wrapped = gym.wrappers.TransformReward(make_env(TOKENIZER), lambda reward: reward)
    refused(agent_for, CopyEngine(), env=wrapped, error=ValueError, match="one token at a time")
    monkeypatch.setattr(agents.engines.vllm.local, "find_spec", lambda name: None)
    refused(agent_for, "vllm", error=ImportError, match=r'pip install "llm-env\[vllm\]"')
    monkeypatch.setattr(agents.engines.vllm.local, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(__version__="0.9.1"))
    refused(agent_for("vllm").learn, 10, error=ImportError, match=r"0\.32 or newer, found 0\.9\.1")


# --- vLLM's answers, made up -----------------------------------------------------------------------------------------


class MadeUp:
    """Draws any tokens; stops after one to five of them, or at the limit, whatever the rules say."""

    def __init__(self):
        self.requests, self.rng, self.version = [], np.random.default_rng(0), None

    def call(self, method, *args):
        return [{"version": self.version}]

    def complete(self, requests):
        self.requests += requests
        return [[self.response(request) for _ in range(request["n"])] for request in requests]

    def response(self, request):
        tokens = self.rng.integers(0, V, min(request["max_tokens"], self.rng.integers(1, 6))).tolist()
        return tokens, [-float(token) for token in tokens]


@pytest.mark.parametrize("stop", [None, "ab", ["c", "dd"]], ids=str)
def test_responses_end_where_the_rules_say_wherever_vllm_stopped(stop):
    rules = make_env(TOKENIZER, stop=stop, max_new_tokens=20, min_new_tokens=3).rules
    engine = VLLMEngine("http://127.0.0.1:1")
    engine.vllm = vllm = MadeUp()
    prompts = [[2], [3], [4]]
    decoding = DecodingSpec(rules, agent_for(None).sampler(), rules.max_new_tokens)
    responses, logps = engine.generate(prompts, 5, decoding)
    ends = [[t == rules.eos_id or rules.completes_stop(r[: i + 1]) for i, t in enumerate(r)] for r in responses]
    assert len(responses) == 15 and not any(any(row[:-1]) for row in ends)
    assert all(row[-1] or len(row) == 20 for row in ends) and any(row[-1] for row in ends)
    assert all(logp.tolist() == [-float(t) for t in r] for r, logp in zip(responses, logps, strict=True))
    assert [request["n"] for request in vllm.requests[:3]] == [5, 5, 5] and len(vllm.requests) > 10
    contexts = {(*prompts[row // 5], *r[:n]) for row, r in enumerate(responses) for n in range(len(r))}
    for request in vllm.requests:
        assert tuple(request["prompt"]) in contexts
        assert request["max_tokens"] == 21 - len(request["prompt"])
        assert request["min_tokens"] == max(0, 4 - len(request["prompt"]))
    assert len({request["seed"] for request in vllm.requests}) == len(vllm.requests)


def test_answers_that_are_none():
    rules = make_env(TOKENIZER).rules
    decoding = DecodingSpec(rules, agent_for(None).sampler(), rules.max_new_tokens)
    engine = VLLMEngine("http://127.0.0.1:1")
    engine.vllm = vllm = MadeUp()
    vllm.response = lambda request: ([], [])
    refused(engine.generate, [[2]], 1, decoding, error=RuntimeError, match="added no token")
    vllm.response = lambda request: ([3], [float("nan")])
    refused(engine.generate, [[2]], 1, decoding, error=ValueError, match="not finite")
    vllm.response, vllm.version = (lambda request: ([rules.eos_id], [-1.0])), "somebody's"
    with pytest.raises(StaleWeightsError, match="other weights than those of the last update"):
        engine.generate([[2]], 1, decoding)
    hot = DecodingSpec(rules, agent_for(None, temperature=3.0).sampler(), rules.max_new_tokens)
    refused(engine.generate, [[2]], 1, hot, error=ValueError, match=r"takes 0\.01 to 2")


def test_adapters_are_pushed_merged_in():
    """The weights alone, in a model without an adapter, compute what the policy with its adapter does."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    policy = agent_for(None, policy_kwargs={"tokenizer": TOKENIZER, "peft_config": config}).policy
    plain = make_model("llama", V)
    before = LanguagePolicy(copy.deepcopy(plain), TOKENIZER).log_probs([[3, 4]], [[5, 6, 7]])[0]
    plain.load_state_dict(dict(pair for chunk in chunks_of(policy, torch.float32) for pair in chunk))
    expected = policy.log_probs([[3, 4]], [[5, 6, 7]])[0]
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(LanguagePolicy(plain, TOKENIZER).log_probs([[3, 4]], [[5, 6, 7]])[0], expected)


def test_every_process_has_a_server_of_its_own():
    """Two processes would overwrite each other's weights."""
    world = Communicator()
    world.rank, world.size = 1, 2
    assert own_url(["http://a", "http://b"], world) == "http://b" and own_url("http://a", Communicator()) == "http://a"
    refused(own_url, "http://a", world, match="names 1 servers for 2 processes")


def test_an_engine_draws_ahead_by_the_weights_that_it_was_given(monkeypatch):
    """While these are trained on: one step behind, as the policy's copy does without an engine."""
    seen, original = [], GRPO.train

    def train(self, rollout):
        seen.append((rollout, copy.deepcopy(self.policy.lm.state_dict())))
        original(self, rollout)

    monkeypatch.setattr(GRPO, "train", train)
    engine = CopyEngine()
    agent_for(engine, overlap=True, learning_rate=1e-2).learn(250)
    assert len(seen) > 3 and engine.pushes == len(seen) - 1  # the second is drawn by the weights of the first
    policy = agent_for(None).policy
    for (_, weights), (rollout, _) in itertools.pairwise(seen):
        policy.lm.load_state_dict(weights)
        for row, expected in enumerate(policy.log_probs(rollout.prompts, rollout.responses)):
            torch.testing.assert_close(rollout.sampled_logp[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_push_that_fails_loses_no_rollout(overlap, monkeypatch):
    """With overlap the next rollout is begun before the last one is learned from, which then has not happened either."""
    seen, original = [], GRPO.train

    def train(self, rollout):
        seen.append(rollout.prompts)
        original(self, rollout)

    def fails_at_the_third(push):
        if push == 3 and failing:
            raise ConnectionError("the server is gone")
        return True

    monkeypatch.setattr(GRPO, "train", train)
    runs = {}
    for failing in (True, False):
        seen.clear()
        agent = agent_for(
            CopyEngine(fails_at_the_third), env=make_env(TOKENIZER, prompts=tuple("abcdefgh")), overlap=overlap, group_size=4
        )
        if failing:
            with pytest.raises(ConnectionError):
                agent.learn(1000)
            tokens, failing = agent.num_timesteps, False
        while agent._n_updates < 5:
            agent.learn(1, reset_num_timesteps=False)
        runs[len(runs)] = [agent._n_updates, *seen]
    assert runs[0] == runs[1] and tokens > 0


def test_chunks_hold_all_weights(monkeypatch):
    monkeypatch.setattr("agents.engines.vllm.engine.CHUNK", 5000)
    policy = agent_for(None).policy
    chunks = list(chunks_of(policy, torch.bfloat16))
    assert len(chunks) > 3 and all(len(c) == 1 or sum(t.nbytes for _, t in c) <= 5000 for c in chunks)
    weights = policy.lm.state_dict()
    assert {name: t.float() for c in chunks for name, t in c}.keys() == weights.keys()
    assert all(torch.equal(t, weights[name].bfloat16()) for c in chunks for name, t in c)
