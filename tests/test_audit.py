"""An audit passes clean agents, finds each planted bug on the bug's own line, and leaves the agent as it was."""

import copy
import random

import gymnasium as gym
import numpy as np
import peft
import pytest
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.monitor import Monitor

import agents.policy.language_policy
import agents.sampling.generate
import agents.sampling.shared_prefix
import agents.training.trainer
import llm_env
import llm_env.lm.scoring
import llm_env.lm.sharing
from agents import GRPO, PPO, REINFORCE, check_agent
from agents.diagnostics.check_agent import memory_row
from agents.policy import Evaluation
from agents.training.trainer import Trainer
from llm_env.reference import Reference
from tests.conftest import FAMILIES, make_model, make_tokenizer
from tests.probes import make_env

TOKENIZER = make_tokenizer("abcdefgh", pad=False)  # its padding is the end token, as many users have it
TOKENIZER.pad_token = TOKENIZER.eos_token
RATIO, TRAINER = "ratio on fresh data", "sampler against trainer"
SAMPLED, TRAINED = "sampler against a plain forward", "trainer against a plain forward"
END, ONLY = "end token in the loss", "only response tokens in the loss"
TURN, WORDS = "end of a turn", "tokenizer"
VALUES, DROPOUT, GROUPS = "values before each token", "dropout is off", "groups with equal rewards"
KL, ENV = "KL to the reference", "env left as it was"
ROWS = [RATIO, TRAINER, SAMPLED, TRAINED, END, WORDS, TURN, ONLY, VALUES, DROPOUT, GROUPS, KL, ENV, "memory"]


def lengths_and_letters(completions, **kwargs):
    """Scores that differ within a group."""
    return [len(c) / 4 + c.count("a") for c in completions]


def env_of(**kwargs):
    arguments = {"reward": lengths_and_letters, "prompts": ("a", "abcd", "bc"), "max_prompt_tokens": 4, **kwargs}
    return make_env(TOKENIZER, **arguments)


def make_agent(kind=GRPO, family="llama", env=None, model=None, **kwargs):
    defaults = {"group_size": 4} if kind is GRPO else {"baseline": "value"} if kind is REINFORCE else {}
    model = make_model(family, len(TOKENIZER)) if model is None else model
    settings = {"learning_rate": 1e-3, "n_envs": 16, "seed": 0, "temperature": 0.7, **defaults, **kwargs}
    return kind(model, env_of() if env is None else env, **settings)


def failures(agent, n=8):
    report = agent.audit(n=n, quiet=True)
    assert report.passed is not any(row.result == "FAILED" for row in report.rows)
    return {row.check: row.detail for row in report.rows if row.result == "FAILED"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [GRPO, PPO, REINFORCE])
def test_clean_agents_pass(kind, family, capsys):
    agent = make_agent(kind, family)
    report = agent.audit(n=8)
    assert report.passed and [row.check for row in report.rows] == ROWS, str(report)
    assert capsys.readouterr().out == f"{report}\n"
    results = {row.check: row.result for row in report.rows}
    without_groups = {GROUPS: "not applicable"} if kind is not GRPO else {VALUES: "not applicable"}
    assert results == {
        **dict.fromkeys(ROWS, "passed"),
        WORDS: "note",
        "memory": "note",
        TURN: "not applicable",
        KL: "not applicable",
        **without_groups,
    }, str(report)


def test_the_tokenizer_is_compared_with_the_one_beside_the_model():
    agent = make_agent()

    def row():
        return agent.audit(n=8, quiet=True)[WORDS]

    assert row().result == "note" and "is not known" in row().detail
    agent.policy.original_tokenizer = TOKENIZER
    assert row().result == "passed" and row().detail == f"the model's own, {len(TOKENIZER)} tokens"
    agent.policy.original_tokenizer = make_tokenizer("abcdefg", pad=False)
    assert row().result == "note" and row().detail == f"the model's own {len(TOKENIZER) - 1} tokens and 1 more"
    agent.policy.original_tokenizer = make_tokenizer("bacdefgh", pad=False)  # a and b have changed places
    assert row().result == "FAILED" and row().detail.startswith(f"2 of the model's {len(TOKENIZER)} tokens have other ids")


@pytest.mark.parametrize("kind", [GRPO, PPO])
@pytest.mark.parametrize(
    "arguments",
    [
        {"allowed_tokens": [0, 2, 3, 4], "min_new_tokens": 2},
        {"allowed_tokens": lambda prompt, response: [0, 2 + len(response)]},
    ],
    ids=["fixed", "function"],
)
def test_constrained_agents_pass(kind, arguments):
    assert not failures(make_agent(kind, "gpt2", env_of(**arguments)))


@pytest.mark.filterwarnings("ignore:the env is stepped token by token")
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_a_wrapped_env_is_audited_by_what_its_wrapper_pays(kind):
    env = TransformReward(env_of(), lambda reward: reward + 100)
    report = make_agent(kind, "gpt2", env, micro_batch_size=3).audit(n=8, quiet=True)
    assert report.passed and report[ENV].result == "passed", str(report)
    assert float(report[GROUPS].detail.split("mean ")[1].split(",")[0]) > 100


# --- planted bugs ----------------------------------------------------------------------------------------------------------


def without_positions(model, input_ids, attention_mask):
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def test_positions_that_padding_shifts_in_training(monkeypatch):
    monkeypatch.setattr(llm_env.lm.scoring, "model_inputs", without_positions)
    monkeypatch.setattr(llm_env.lm.sharing, "SAVES", 0.0)  # plain rows, which are the ones that are padded
    found = failures(make_agent(family="gpt2"))
    assert {TRAINER, TRAINED} <= found.keys() and SAMPLED not in found and RATIO not in found
    assert "Only rows whose prompt was padded on the left are wrong" in found[TRAINED]


def test_positions_that_padding_shifts_in_sampling_and_training_alike(monkeypatch):
    monkeypatch.setattr(llm_env.lm.scoring, "model_inputs", without_positions)
    monkeypatch.setattr(agents.sampling.generate, "model_inputs", without_positions)
    monkeypatch.setattr(llm_env.lm.sharing, "SAVES", 0.0)
    monkeypatch.setattr(agents.sampling.generate, "supports_sharing", lambda base, length: False)
    found = failures(make_agent(family="gpt2"))
    assert {SAMPLED, TRAINED} <= found.keys() and TRAINER not in found  # the two agree, both wrong
    assert "position_ids" in found[SAMPLED] and "position_ids" in found[TRAINED]


def test_padding_that_is_attended_to(monkeypatch):
    original = llm_env.lm.scoring.model_inputs

    def attending(model, input_ids, attention_mask):
        return {**original(model, input_ids, attention_mask), "attention_mask": torch.ones_like(attention_mask)}

    monkeypatch.setattr(llm_env.lm.scoring, "model_inputs", attending)
    monkeypatch.setattr(llm_env.lm.sharing, "SAVES", 0.0)
    found = failures(make_agent())
    assert {TRAINER, TRAINED} <= found.keys() and SAMPLED not in found
    assert "padding is attended to" in found[TRAINED]


def test_an_end_token_without_weight(monkeypatch):
    original = agents.training.trainer.token_weights

    def headless(mask, *args):
        return torch.cat([torch.zeros(len(mask), 1), original(mask, *args)[:, 1:]], 1)

    class Masked(GRPO):
        def compute_advantages(self, rollout):
            super().compute_advantages(rollout)
            for i, response in enumerate(rollout.responses):
                for t, token in enumerate(response):
                    rollout.mask[i, t] = token != TOKENIZER.pad_token_id

    found = failures(make_agent(Masked, group_size=4))
    assert found.keys() == {END} and "pad_token_id=0" in found[END]
    monkeypatch.setattr(agents.training.trainer, "token_weights", headless)
    found = failures(make_agent())
    assert ONLY in found and "response token 0 of episode 0 has no weight in the loss" in found[ONLY]


def test_no_response_that_ended_is_said():
    agent = make_agent(env=env_of(allowed_tokens=[2, 3]))
    assert agent.audit(n=8, quiet=True)[END].result == "not run"


def test_a_temperature_that_training_leaves_out(monkeypatch):
    original = llm_env.lm.scoring.log_probs_and_entropies
    monkeypatch.setattr(
        llm_env.lm.scoring,
        "log_probs_and_entropies",
        lambda logits, tokens, temperature, *rest: original(logits, tokens, 1.0, *rest),
    )
    found = failures(make_agent())
    assert found.keys() == {TRAINER, TRAINED}
    assert "at temperature 1, not at the agent's 0.7" in found[TRAINED]
    assert not failures(make_agent(temperature=1.0))


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_dropout_that_is_on(kind, monkeypatch):
    original = agents.policy.LanguagePolicy.evaluate_actions

    def training(self, *args, **kwargs):
        self.lm.train()
        return original(self, *args, **kwargs)

    model = make_model("gpt2", len(TOKENIZER), attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1)
    agent = make_agent(kind, model=model)
    assert not failures(agent)
    monkeypatch.setattr(agents.policy.LanguagePolicy, "evaluate_actions", training)
    found = failures(agent)
    assert {DROPOUT, RATIO} <= found.keys() and SAMPLED not in found
    assert "lm.transformer.drop" in found[DROPOUT] and "Dropout is on" in found[TRAINED]
    assert not any(module.training for module in agent.policy.lm.modules())  # put back


def test_a_mask_that_begins_one_token_early(monkeypatch):
    """Log-probs of the last prompt token up to the last but one of the response."""
    original = agents.policy.language_policy.score

    def early(model, prompts, responses, *args, **kwargs):
        cut = [([*p[:-1]], [p[-1], *r[:-1]]) if len(p) > 1 else (p, r) for p, r in zip(prompts, responses, strict=True)]
        return original(model, [p for p, _ in cut], [r for _, r in cut], *args, **kwargs)

    env = env_of(prompts=("ab", "abcd", "bcd"))
    assert not failures(make_agent(env=env))
    monkeypatch.setattr(agents.policy.language_policy, "score", early)
    found = failures(make_agent(env=env))
    assert found.keys() == {TRAINER, TRAINED}
    assert "off-by-one" in found[TRAINED]


@pytest.mark.parametrize("where", ["in the loss", "before the update"])
@pytest.mark.parametrize("kind", [PPO, REINFORCE])
def test_values_of_the_state_after_the_token(kind, where, monkeypatch):
    evaluate, score = agents.policy.LanguagePolicy.evaluate_actions, Trainer.compute_old_logprobs

    def shifted(self, *args, **kwargs):
        result = evaluate(self, *args, **kwargs)
        values = torch.cat([result.values[:, 1:], result.values[:, -1:]], 1)
        return Evaluation(result.logp, result.mask, result.entropy, values)

    def shifted_store(self, rollout):
        score(self, rollout)
        rollout.old_values = rollout.old_values.roll(-1, 1)

    if where == "in the loss":
        monkeypatch.setattr(agents.policy.LanguagePolicy, "evaluate_actions", shifted)
    else:
        monkeypatch.setattr(Trainer, "compute_old_logprobs", shifted_store)
    agent = make_agent(kind)
    found = failures(agent)
    assert found.keys() == {VALUES}
    assert not agent.policy.value_head.weight.any()  # the random head is gone
    if where == "in the loss":
        assert "V of the state after the token" in found[VALUES]


def test_old_log_probs_of_other_weights(monkeypatch):
    original = Trainer.compute_old_logprobs

    def stale(self, rollout):
        original(self, rollout)
        rollout.old_logp = rollout.old_logp + 0.05 * rollout.mask

    monkeypatch.setattr(Trainer, "compute_old_logprobs", stale)
    found = failures(make_agent())
    assert found.keys() == {RATIO} and "max |ratio - 1| is 0.049" in found[RATIO]


def test_a_cache_whose_positions_stand_still(monkeypatch):
    """Every token after the first is sampled as if it stood where the first does."""
    original = agents.sampling.shared_prefix.SharedDecoding.__call__

    def standing(self, tokens):
        self.lengths = self.lengths - int(self.max_generated > 0)
        return original(self, tokens)

    monkeypatch.setattr(agents.sampling.shared_prefix.SharedDecoding, "__call__", standing)
    monkeypatch.setattr(agents.sampling.generate, "decodes_shared", lambda model: True)  # whose trial would find it
    found = failures(make_agent())
    assert found.keys() == {TRAINER, SAMPLED} and "cache of keys and values" in found[SAMPLED]


def test_groups_whose_rewards_are_equal():
    report = make_agent(env=env_of(reward=lambda completions: [0.5] * len(completions))).audit(n=8, quiet=True)
    assert report[GROUPS].result == "note" and "2 of 2 groups of 4" in report[GROUPS].detail
    rare = env_of(
        reward=lambda prompts, completions: [c.count("a") * (p == "a") for p, c in zip(prompts, completions, strict=True)]
    )
    report = make_agent(env=rare).audit(n=8, quiet=True)
    assert report.passed and report[GROUPS].result == "note" and "1 of 2 groups" in report[GROUPS].detail


def test_the_kl_to_a_reference():
    model = make_model("llama", len(TOKENIZER))
    same = make_agent(env=env_of(reference=Reference(model)), model=copy.deepcopy(model), kl_coef=0.1)
    assert same.audit(n=8, quiet=True)[KL].result == "passed"
    other = make_agent(env=env_of(reference=make_model("llama", len(TOKENIZER), seed=1)), kl_coef=0.1)
    row = other.audit(n=8, quiet=True)[KL]
    assert row.result == "note" and "the reference is not the policy" in row.detail and float(row.detail.split()[0]) > 0.1
    same.rules.reference.temperature = 1.0  # the same weights, asked otherwise
    found = failures(same)
    assert found.keys() == {KL} and "the agent's is 0.7, the reference's 1" in found[KL]


# --- nothing is left behind ------------------------------------------------------------------------------------------------


def states(agent):
    """Everything that training depends on."""
    states = agent._state.snapshot()
    states["counts"] = {k: v for k, v in states["counts"].items() if isinstance(v, int)}  # episodes' seconds differ
    env = agent.env if states["env"]["venv"] is None else None
    inner = None if env is None else [e.unwrapped for e in env.envs]
    return {
        "weights": [p.clone() for p in agent.policy.parameters()],
        "optimizer": copy.deepcopy(agent.policy.optimizer.state_dict()),
        "agent": {k: v for k, v in vars(agent).items() if isinstance(v, (int, float, str, type(None)))},
        "random": {**states, "torch": states["torch"][1]},
        "global": [torch.get_rng_state(), np.random.get_state()[1], random.getstate()],
        "env": inner and [(e.np_random.bit_generator.state, e._cursor.state_dict()) for e in inner],
        "seeds": list(agent.env._seeds),
        "logged": dict(agent.logger.name_to_value) if hasattr(agent, "_logger") else None,
        "modes": [m.training for m in agent.policy.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in agent.policy.parameters()],
        "versions": [p._version for p in agent.policy.parameters()],
        "seconds": dict(agent.rules.rewards._seconds),
    }


def bits(tree):
    """The same with the bytes of every tensor and array in its place, to be compared by ==."""
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [bits(value) for value in tree]
    return np.asarray(torch.as_tensor(tree).detach()).tobytes() if isinstance(tree, (torch.Tensor, np.ndarray)) else tree


@pytest.mark.filterwarnings("ignore:the env is stepped token by token")
@pytest.mark.parametrize("wrapped", [False, True], ids=["vector", "wrapped"])
@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_an_audited_agent_trains_to_the_same_bits(kind, wrapped, tmp_path):
    when = 0 if kind is GRPO else 1  # before the first step, or between two

    def trained(audited):
        env = env_of(reference=make_model("llama", len(TOKENIZER), seed=1), record=tmp_path / f"{audited}.jsonl")
        agent = make_agent(kind, env=TransformReward(env, lambda reward: 2 * reward) if wrapped else env, n_envs=8)
        assert env.rules.recorder is not None
        for time in range(2):
            if audited and time == when:
                before = bits(states(agent))
                assert agent.audit(n=4, seed=5, quiet=True).passed
                assert bits(states(agent)) == before
            agent.learn(1, reset_num_timesteps=False)
        return agent, states(agent)

    (plain, expected), (audited, got) = trained(False), trained(True)
    expected.pop("seconds"), got.pop("seconds"), expected.pop("logged"), got.pop("logged")
    for left in (expected, got):
        left["agent"].pop("start_time")
    assert bits(got) == bits(expected)
    assert audited._n_updates == plain._n_updates > 0
    assert (tmp_path / "True.jsonl").read_bytes() == (tmp_path / "False.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore:the env is stepped token by token")
def test_an_env_that_cannot_be_copied_is_said(tmp_path):
    agent = make_agent(env=Monitor(env_of(), str(tmp_path / "log")), n_envs=8)
    report = agent.audit(n=8, quiet=True)
    assert report.passed and report[ENV].result == "note" and "TextIOWrapper" in report[ENV].detail


def test_the_same_seed_sees_the_same_and_another_another():
    agent = make_agent()
    first, again, other = (str(check_agent(agent, n=8, seed=seed, quiet=True)[GROUPS]) for seed in (0, 0, 1))
    assert first == again != other


def test_bad_arguments():
    with pytest.raises(ValueError, match="n=0 must be a whole number of at least 1"):
        make_agent().audit(n=0)
    with pytest.raises(ValueError, match="the agent has no env yet"):
        GRPO(make_model("llama", len(TOKENIZER))).audit()


def test_memory_counts_what_is_held(monkeypatch):
    """By hand: float32 weights, as many gradients, two moments, a reference of the same size, two bytes a weight for a copy."""
    agent = GRPO(llm_env.PUPIL, gym.make("llm_env/Addition-v0", reference=llm_env.PUPIL), group_size=4, n_envs=16, kl_coef=0.1)
    size = 4 * sum(p.numel() for p in agent.policy.parameters()) / 1e6
    expected = f"weights {size:.1f}, gradients {size:.1f}, optimizer state {2 * size:.1f}, reference {size:.1f}"
    for _ in range(2):  # before there is any state, and after
        assert agent.audit(n=8, quiet=True)["memory"].detail == f"{5 * size:.1f} MB are held: {expected}"
        agent.learn(1)
    monkeypatch.setattr(agents.policy.language_policy, "BF16_COPY_DEVICES", ("cpu",))
    agent.policy.bf16 = True
    assert memory_row(agent.policy, agent.rules).detail.endswith(f", copy to sample with {size / 2:.1f}")
    adapter = GRPO(
        llm_env.PUPIL,
        gym.make("llm_env/Addition-v0", reference="base"),
        group_size=4,
        n_envs=16,
        policy_kwargs={"peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])},
    )
    trained = 4 * sum(p.numel() for p in adapter.policy.parameters() if p.requires_grad) / 1e6
    detail = adapter.audit(n=8, quiet=True)["memory"].detail
    assert f"gradients {trained:.1f}" in detail and "reference" not in detail


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_rounding_to_bfloat16_is_no_fault(kind):
    agent = make_agent(kind, bf16=True)
    report = agent.audit(n=8, quiet=True)
    assert report.passed, str(report)
    assert float(report[TRAINED].detail.split()[2]) > 1e-3
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", group_size=4, n_envs=16, bf16=True)
    assert agent.audit(n=16, quiet=True).passed
