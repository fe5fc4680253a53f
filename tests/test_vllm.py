"""vLLM as an engine, the real one, in this process. `.ci/vllm` makes the environment that these tests need."""

import gymnasium as gym
import numpy as np
import pytest
import torch

import llm_env
from agents import GRPO, LanguagePolicy
from agents.engines.base import DecodingSpec
from agents.engines.vllm.engine import VLLMEngine
from agents.engines.weight_sync import logprob_gap
from agents.sampling.sampler import Sampler
from tests.conftest import refused
from tests.vllm_models import PADDING, PIECES, make_llama, make_pieces, make_text_env

pytest.importorskip("vllm")

V = len(PIECES)
SMALL = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 26, "block_size": 32, "max_model_len": 256}


@pytest.fixture(scope="module")
def engine():
    engine = VLLMEngine(**SMALL)
    yield engine
    engine.close()


def begin(engine, seed=0, tie=False, **settings):
    """A policy, rules, and the engine with its weights."""
    rules = make_text_env(**settings).rules
    policy = LanguagePolicy(make_llama(seed, tie_word_embeddings=tie), rules.tokenizer)
    policy.vocab_size, policy.constraint = rules.vocab_size, rules.constraint
    engine.start(policy, rules)
    engine.update_weights(policy)
    return policy, rules


def respond(engine, prompts, rules, sampler, group_size):
    return engine.generate(prompts, group_size, DecodingSpec(rules, sampler, rules.max_new_tokens))


def sampler(seed=0, temperature=0.7, **settings):
    return Sampler(temperature, generator=torch.Generator().manual_seed(seed), **settings)


def gap(policy, prompts, responses, logps, temperature):
    expected = policy.log_probs(prompts, responses, temperature)
    return max(np.abs(theirs - ours.detach().numpy()).max() for theirs, ours in zip(logps, expected, strict=True))


def move(policy, by=0.1):
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            parameter.add_(by * parameter.std().nan_to_num() * torch.randn_like(parameter))


def test_adapters_are_merged_into_what_is_pushed(engine):
    peft = pytest.importorskip("peft")
    rules = make_text_env().rules
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    policy = LanguagePolicy(make_llama(0), rules.tokenizer, peft_config=config)
    policy.vocab_size = rules.vocab_size
    engine.start(policy, rules)
    engine.update_weights(policy)
    responses, logps = respond(engine, rules.prompts.ids, rules, sampler(), 2)
    prompts = [ids for ids in rules.prompts.ids for _ in range(2)]
    assert gap(policy, prompts, responses, logps, 0.7) < 2e-5


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("tie", [True, False], ids=["tied head", "head of its own"])
def test_log_probs_are_those_of_a_plain_forward(engine, temperature, tie):
    policy, rules = begin(engine, tie=tie)
    responses, logps = respond(engine, rules.prompts.ids, rules, sampler(temperature=temperature), 8)
    prompts = [ids for ids in rules.prompts.ids for _ in range(8)]
    assert gap(policy, prompts, responses, logps, temperature) < 2e-5
    assert gap(policy, prompts, responses, logps, 2.0) > 0.1  # the test sees the temperature
    assert len({tuple(response) for response in responses[:8]}) > 1
    policy.vocab_size = V + PADDING
    assert gap(policy, prompts, responses, logps, temperature) > 0.1  # and that ids beyond the vocabulary have no share


def test_tokens_are_drawn_with_their_probabilities_and_none_beyond_the_vocabulary(engine):
    policy, rules = begin(engine, seed=1, max_new_tokens=1)
    many = 4000
    responses, _ = respond(engine, rules.prompts.ids[:1], rules, sampler(), many)
    counts = np.bincount([response[0] for response in responses], minlength=V)
    logits = policy.lm(torch.tensor([rules.prompts.ids[0]])).logits[0, -1]
    assert logits[V:].exp().sum() > 0.01 * logits.exp().sum()
    expected = (logits[:V] / 0.7).softmax(-1).detach().numpy()
    assert len(counts) == V
    assert (np.abs(counts / many - expected) < 5 * np.sqrt(expected * (1 - expected) / many) + 1e-3).all()


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}, {"deterministic": True}], ids=str)
def test_restricted_sampling(engine, settings):
    policy, rules = begin(engine)
    draw = sampler(**settings)
    responses, logps = respond(engine, rules.prompts.ids, rules, draw, 4)
    prompts = [ids for ids in rules.prompts.ids for _ in range(4)]
    assert gap(policy, prompts, responses, logps, 0.7) < 2e-5  # of the whole distribution
    for prompt, response in zip(prompts, responses, strict=True):
        with torch.no_grad():
            logits = policy.lm(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :V] / 0.7
        if draw.deterministic:
            assert response == logits.argmax(-1).tolist()
        else:
            assert draw._restrict(logits)[range(len(response)), response].isfinite().all()


@pytest.mark.parametrize("stop", ["bc", ["ca.", "aa"], "abc", " "], ids=str)
def test_responses_end_where_the_rules_say(engine, stop):
    _, rules = begin(engine, stop=stop, max_new_tokens=24)
    responses, logps = respond(engine, rules.prompts.ids, rules, sampler(temperature=1.5), 16)
    ended = []
    for response, logp in zip(responses, logps, strict=True):
        ends = [t == rules.eos_id or rules.completes_stop(response[: i + 1]) for i, t in enumerate(response)]
        assert not any(ends[:-1]) and (ends[-1] or len(response) == 24) and len(logp) == len(response)
        ended.append(response[-1] != rules.eos_id and ends[-1])
    assert any(ended)


def test_allowed_tokens_and_a_least_length(engine):
    policy, rules = begin(engine, allowed_tokens=[0, 2, 3, 6], min_new_tokens=5)
    responses, logps = respond(engine, rules.prompts.ids, rules, sampler(temperature=1.5), 16)
    assert {token for response in responses for token in response} == {0, 2, 3, 6} and min(map(len, responses)) > 5
    prompts = [ids for ids in rules.prompts.ids for _ in range(16)]
    assert gap(policy, prompts, responses, logps, 1.5) < 2e-5


def test_the_generator_decides(engine):
    _, rules = begin(engine)
    first, again, other = (respond(engine, rules.prompts.ids, rules, sampler(seed), 4)[0] for seed in (3, 3, 4))
    assert first == again != other
    assert len({tuple(r) for r in respond(engine, [rules.prompts.ids[0]] * 8, rules, sampler(5), 1)[0]}) > 1


def test_every_push_arrives(engine):
    policy, rules = begin(engine)
    for _ in range(3):
        assert logprob_gap(engine, policy, rules) < 2e-5
        move(policy)
        assert logprob_gap(engine, policy, rules) > 0.05
        engine.update_weights(policy)


def test_what_was_computed_with_older_weights_is_forgotten(engine, monkeypatch):
    policy, rules = begin(engine)
    long = [ids for ids in rules.prompts.ids if len(ids) > 64]
    assert long

    def off():
        responses, logps = respond(engine, long, rules, sampler(), 4)
        return gap(policy, long * 4, responses, logps, 0.7)

    assert off() < 2e-5
    move(policy)
    with monkeypatch.context() as patch:
        patch.setattr(engine.vllm, "forget_prefixes", lambda: None)
        engine.update_weights(policy)
        assert off() > 0.01  # new weights, old keys and values
        assert logprob_gap(engine, policy, rules) > engine.tolerance
    engine.update_weights(policy)
    assert off() < 2e-5


def agent_for(engine, kind=GRPO, **settings):
    env = make_text_env()
    settings = {"group_size": 4, "n_envs": 16, "learning_rate": 1e-3, "seed": 0, "engine": engine, **settings}
    model = make_llama()
    return kind(model, env, policy_kwargs={"tokenizer": env.rules.tokenizer}, **settings)


def test_a_push_that_does_not_arrive_is_an_error(engine, tmp_path, monkeypatch):
    agent = agent_for(engine)
    agent.learn(100)
    steps, weights = agent.num_timesteps, [p.clone() for p in agent.policy.parameters()]
    with monkeypatch.context() as patch:
        call = engine.vllm.call
        patch.setattr(engine.vllm, "take", lambda tensors: call("llm_env_take", [(n, 0.97 * t) for n, t in tensors]))
        refused(agent.learn, 100, reset_num_timesteps=False, error=RuntimeError, match=r"nats off the policy's after .* twice")
    assert agent.num_timesteps == steps and all(map(torch.equal, weights, agent.policy.parameters()))
    agent.save(tmp_path / "agent")
    agent.learn(100, reset_num_timesteps=False)
    again = GRPO.load(tmp_path / "agent", env=make_text_env(), engine=engine)
    again.learn(100, reset_num_timesteps=False)
    assert all(map(torch.equal, again.policy.parameters(), agent.policy.parameters()))


def test_half_a_push_is_an_error(engine, monkeypatch):
    policy, _ = begin(engine)
    call = engine.vllm.call
    monkeypatch.setattr(engine.vllm, "take", lambda tensors: call("llm_env_take", tensors[:-3]))
    refused(engine.update_weights, policy, error=ValueError, match="parameters got no weights")


def test_resumed_is_uninterrupted(engine, tmp_path):
    whole, first = agent_for(engine), agent_for(engine)
    whole.learn(600)
    first.learn(300)
    first.save(tmp_path / "agent")
    second = GRPO.load(tmp_path / "agent", env=make_text_env())
    second.set_engine(engine)
    second.learn(300, reset_num_timesteps=False)
    assert second.num_timesteps == whole.num_timesteps
    assert all(map(torch.equal, second.policy.parameters(), whole.policy.parameters()))
    assert second.importance == 2.0


def test_learning_is_that_of_the_policys_own_sampling(engine):
    scores, logps = {}, {}
    for name in ("vllm", "policy"):
        agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", seed=1, n_envs=128, engine=engine if name == "vllm" else None)
        rollouts = [agent.sample_rollout() for _ in range(4)]
        logps[name] = torch.cat([r.sampled_logp[r.mask.bool()] for r in rollouts])
        agent.learn(12_000)
        scores[name] = agent.evaluate(gym.make("llm_env/Addition-v0", split="test"))["success_rate"]
    a, b = logps.values()
    spread = (a.var() / len(a) + b.var() / len(b)).sqrt()
    assert abs(a.mean() - b.mean()) < 4 * spread and abs(len(a) / len(b) - 1) < 0.05
    assert min(scores.values()) > 0.8 and abs(scores["vllm"] - scores["policy"]) < 0.08, scores


class Replies:
    """Answers a turn with as many letters as it has tokens of its own, and ends with a full stop or after four turns."""

    def reset(self, *, seed=None):
        self.turns = 0
        return "bcab"[: 1 + seed % 4], {}

    def step(self, action):
        self.turns += 1
        return "d" * (1 + len(action) % 3) + "a", float("a" in action), "." in action or self.turns == 4, False, {}


def conversation_agent(engine, **settings):
    """A GRPO agent whose turns end with one of two end tokens, or at four tokens."""
    env = llm_env.TextGenerationEnv.from_text_env(
        Replies,
        make_pieces(),
        max_turns=4,
        max_new_tokens=4,
        max_prompt_tokens=8,
        max_observation_tokens=4,
        eos_token_ids=[0, PIECES.index("c")],
        num_tasks=8,
    )
    settings = {"group_size": 4, "n_envs": 16, "learning_rate": 1e-3, "seed": 0, "engine": engine, **settings}
    return GRPO(make_llama(), env, policy_kwargs={"tokenizer": env.rules.tokenizer}, **settings)


def test_turns_in_lockstep(engine, monkeypatch):
    """Contexts are the episodes' own token ids, all end tokens are given, and log-probs lie at action tokens alone."""
    agent, asked = conversation_agent(engine), []
    complete = engine.vllm.complete
    monkeypatch.setattr(engine.vllm, "complete", lambda requests: asked.append(requests) or complete(requests))
    agent.engine.sync_weights(agent.rules)
    asked.clear()
    rollout = agent.sample_rollout()
    turns = [int(row.max()) + 1 for row in rollout.turn_rows]
    assert len(set(turns)) > 1 and max(turns) >= 3
    ends = sorted(agent.rules.eos_ids)
    assert len(ends) == 2
    begun = set()  # every context is a prompt and an episode up to the beginning of one of its turns
    for prompt, response, row in zip(rollout.prompts, rollout.responses, rollout.turn_rows, strict=True):
        for turn in range(int(row.max()) + 1):
            begun.add((*prompt, *response[: int(np.flatnonzero(row == turn)[0])]))
    for requests in asked:
        for request in requests:
            assert (
                request["stop_token_ids"] == ends and request["ignore_eos"] and all(type(t) is int for t in request["prompt"])
            )
    assert {tuple(request["prompt"]) for requests in asked for request in requests} >= begun
    waves = [{len(request["prompt"]) for request in requests} for requests in asked if requests[0]["max_tokens"] == 4]
    assert len(waves) >= max(turns)  # one call of the engine a turn, for all rows that go on
    closing = {
        response[int(np.flatnonzero(row == 0)[-1])] for response, row in zip(rollout.responses, rollout.turn_rows, strict=True)
    }
    assert {0, PIECES.index("c")} <= closing
    evaluation = agent.policy.evaluate_actions(rollout.prompts, rollout.responses, 1.0, rollout.turn_lists)
    is_action = rollout.turn_ids >= 0
    gaps = (evaluation.logp.detach() - rollout.sampled_logp)[is_action].abs()
    assert gaps.max() < 1e-4 and (rollout.sampled_logp[~is_action] == 0).all()
    assert (rollout.sampled_logp[is_action] < 0).any()


def test_an_agent_learns_conversations(engine):
    agent = conversation_agent(engine, n_envs=64)
    before = agent.evaluate(agent.env.envs[0] if hasattr(agent.env, "envs") else agent.env, deterministic=False)["reward"]
    agent.learn(6000)
    after = agent.evaluate(agent.env.envs[0] if hasattr(agent.env, "envs") else agent.env, deterministic=False)["reward"]
    assert after > before + 0.5 and agent.logger.name_to_value.get("rollout/push_gap", 0) < 1e-3


def test_models_that_vllm_does_not_run():
    env = make_text_env()
    narrow = make_llama(head_dim=16)
    agent = GRPO(narrow, env, policy_kwargs={"tokenizer": env.rules.tokenizer}, engine="vllm", engine_kwargs=SMALL)
    refused(agent.learn, 10, error=ValueError, match="vLLM refuses the LlamaForCausalLM")


def test_the_process_is_left_as_it_was(engine):
    policy, rules = begin(engine)
    fresh = VLLMEngine(**{**SMALL, "max_model_len": 50})
    torch.manual_seed(5)
    np.random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), torch.set_num_threads
    refused(fresh.start, policy, rules, error=ValueError, match="max_model_len=50")
    fresh.close()
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert torch.set_num_threads is states[2]


def test_it_draws_beside_the_update():
    agent = GRPO(make_llama(0), make_text_env(), n_envs=16, seed=0, overlap=True, engine="vllm", engine_kwargs=SMALL)
    agent.learn(400, log_interval=None)
    assert agent._n_updates > 3 and agent.logger.name_to_value["rollout/push_gap"] < 1e-3
    assert 0.5 < agent.logger.name_to_value["train/importance"] < 1.5
    agent.set_engine(None)
