"""Agents on episodes of several turns: both clocks, resume, adapters, constraints, references, evaluation, logs, records."""

import json

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward
from peft import LoraConfig
from stable_baselines3.common.logger import KVWriter, Logger

from agents import GRPO, PPO, REINFORCE
from agents.collection.evaluation import standard_error
from agents.engines.base import Lockstep
from llm_env import TextGenerationEnv, check_reward, rescore
from llm_env.rewards.answers import completion_text
from tests.chats import make_chat_tokenizer
from tests.conftest import make_model, make_tokenizer
from tests.rollouts import collect
from tests.test_turns import Talk
from tests.text_envs import GuessNumber, Letters

TOKENIZER = make_tokenizer("abcdefgh")
A, H = TOKENIZER.convert_tokens_to_ids(["a", "h"])
LIMITS = {"max_prompt_tokens": 4, "max_new_tokens": 3, "max_turns": 3, "max_observation_tokens": 4}


def make(kind=Letters, tokenizer=TOKENIZER, **kwargs):
    return TextGenerationEnv.from_text_env(kind, tokenizer, **{**LIMITS, **kwargs})


def make_agent(kind=GRPO, env=None, family="llama", **kwargs):
    defaults = {"n_envs": 8, "seed": 0, "learning_rate": 1e-2, **({"group_size": 4} if kind is GRPO else {})}
    model = make_model(family, len(TOKENIZER if env is None else env.unwrapped.rules.tokenizer), scale=1.5)
    return kind(model, make() if env is None else env, **{**defaults, **kwargs})


def learned(agent, monkeypatch, tokens=150):
    """The texts of all rollouts and the weights after learning on."""
    texts, original = [], type(agent).train

    def train(self, rollout):
        texts.append([info["completion"] for info in rollout.infos])
        original(self, rollout)

    with monkeypatch.context() as patch:
        patch.setattr(type(agent), "train", train)
        agent.learn(tokens, reset_num_timesteps=False)
    return texts, {name: value.clone() for name, value in agent.get_parameters()["policy"].items()}


def same(a, b, **tolerances):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerances)


SETTINGS = {
    "GRPO": (GRPO, {}),
    "GRPO by turns": (GRPO, {"ratio_level": "turn", "supervision": "process", "n_epochs": 2, "batch_size": 4}),
    "PPO by turns": (PPO, {"gae_level": "turn", "batch_size": 4, "n_epochs": 2}),
    "REINFORCE": (REINFORCE, {"baseline": "value"}),
}


@pytest.mark.filterwarnings("ignore:supervision='process', but")
@pytest.mark.parametrize("name", SETTINGS)
def test_an_agent_saved_in_the_middle_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    kind, settings = SETTINGS[name]
    env = {"num_tasks": None, "split": "train"}
    whole = make_agent(kind, make(**env), **settings)
    texts, _ = learned(whole, monkeypatch)
    whole.save(tmp_path / "agent")
    more, weights = learned(whole, monkeypatch)
    again = kind.load(tmp_path / "agent", env=make(**env))
    texts_again, weights_again = learned(again, monkeypatch)
    assert len(texts) > 2 and len({text for row in texts + more for text in row}) > 20
    assert more == texts_again
    same(weights, weights_again, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_both_clocks_train_the_same(kind, monkeypatch):
    """The wrapper changes nothing, but the env is stepped token by token through it."""
    plain = make_agent(kind)
    with pytest.warns(UserWarning, match="stepped token by token to honour TransformReward"):
        wrapped = make_agent(kind, TransformReward(make(), float))
    texts, weights = learned(plain, monkeypatch)
    texts_by_token, weights_by_token = learned(wrapped, monkeypatch)
    assert texts == texts_by_token
    same(weights, weights_by_token, atol=1e-5, rtol=1e-4)


def no_letter_twice(context_ids, turn_ids):
    """Depends on the turn under way alone: the letters a to h that it does not hold yet, and the end token after two."""
    return [*([0] if len(turn_ids) > 1 else []), *(set(range(A, H + 1)) - set(turn_ids))]


AUDITED = {
    "plain": (GRPO, {}, {}),
    "PPO with a critic and a KL in the reward": (PPO, {}, {"kl_coef": 0.1, "reference": "model"}),
    "constraint per turn": (GRPO, {}, {"allowed_tokens": no_letter_twice}),
    "minimum per turn": (REINFORCE, {"temperature": 0.7}, {"min_new_tokens": 2}),
    "adapter, its base as reference": (
        GRPO,
        {"policy_kwargs": {"peft_config": LoraConfig(r=2, target_modules="all-linear")}, "kl_coef": 0.1},
        {"reference": "base"},
    ),
    "absolute positions": (GRPO, {"family": "gpt2"}, {"stop": ["ab"]}),
}


@pytest.mark.parametrize("name", AUDITED)
def test_the_audit_passes(name):
    kind, settings, env = AUDITED[name]
    if env.get("reference") == "model":
        env = {**env, "reference": make_model("llama", len(TOKENIZER), scale=1.5)}
    agent = make_agent(kind, make(**env), **settings)
    report = agent.audit(n=16, quiet=True)
    assert report.passed, str(report)
    agent.learn(40)
    report = agent.audit(n=16, quiet=True)
    assert report.passed, str(report)
    gaps = ("ratio on fresh data", "sampler against a plain forward", "trainer against a plain forward")
    assert [report[check].result for check in gaps] == ["passed"] * 3


def test_the_audit_finds_a_weight_on_a_token_of_the_env(monkeypatch):
    agent = make_agent()
    original = type(agent.make_trainer())._token_weights

    def wrong(self, rollout, rows):
        weights = original(self, rollout, rows)
        weights[:, 1:] = torch.where(rollout.turn_ids[:, 1:] == -1, weights[:, :-1], weights[:, 1:])
        return weights

    monkeypatch.setattr(type(agent.make_trainer()), "_token_weights", wrong)
    row = agent.audit(n=16, quiet=True)["only response tokens in the loss"]
    assert row.result == "FAILED" and "that the env wrote" in row.detail


def test_the_constraint_holds_in_every_turn():
    agent = make_agent(env=make(allowed_tokens=no_letter_twice))
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    for response, turns in zip(rollout.responses, rollout.turn_rows, strict=True):
        for turn in range(turns.max() + 1):
            ids = [token for token, t in zip(response, turns, strict=True) if t == turn]
            assert len(ids) == 3 and len(set(ids)) == 3


def test_the_kl_in_the_reward_is_of_action_tokens_only():
    beta = 0.3
    reference = make_model("llama", len(TOKENIZER), seed=1, scale=1.5)
    agent = make_agent(PPO, make(reference=reference, kl_coef=beta))
    rollout = collect(agent.policy, agent.env.venv, 1, agent.sampler())
    plain = collect(agent.policy, make_agent(PPO).env.venv, 1, make_agent(PPO).sampler())
    for i, (prompt, response, turns) in enumerate(zip(rollout.prompts, rollout.responses, rollout.turn_rows, strict=True)):
        assert response == plain.responses[i]
        ids, is_action = torch.tensor([[*prompt, *response]]), torch.as_tensor(turns >= 0)
        with torch.no_grad():
            logp, ref = (
                model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)[torch.arange(len(response)), torch.tensor(response)]
                for model in (agent.policy.lm, reference)
            )
        expected = plain.rewards[i, : len(response)] - beta * (logp - ref) * is_action
        torch.testing.assert_close(rollout.rewards[i, : len(response)], expected, atol=1e-5, rtol=1e-4)
        assert rollout.infos[i]["kl"] == pytest.approx(float((logp - ref)[is_action].sum()), abs=1e-4)


def test_a_group_starts_with_one_seed_and_overlap_and_preflight_work():
    agent = make_agent(GRPO, make(num_tasks=None), overlap=True, preflight=True)
    agent.learn(100)
    rollout = agent.sample_rollout()
    for begin in (0, 4):
        assert len({info["prompt_index"] for info in rollout.infos[begin : begin + 4]}) == 1
        assert len({tuple(prompt) for prompt in rollout.prompts[begin : begin + 4]}) == 1


def test_256_episodes_of_one_prompt_stay_within_the_budget_of_a_pass():
    """Their first observations are equal: kept together by prompt they would be one group of 256."""
    agent = make_agent(GRPO, make(GuessNumber, make_tokenizer("gues17-=+ "), max_prompt_tokens=10), n_envs=256)
    rollout = collect(agent.policy, agent.env.venv, 4, agent.sampler())
    assert len({tuple(prompt) for prompt in rollout.prompts}) == 1
    for budget in (None, 300):
        trainer = agent.make_trainer()
        trainer.max_tokens_per_batch = budget
        parts = trainer.micro_batches(rollout, np.arange(256))
        assert sorted(row for part in parts for row in part) == list(range(256)) and len(parts) > 1
        for part in parts:
            assert {row // 4 for row in part} == set(range(part[0] // 4, part[0] // 4 + len(part) // 4)) or len(part) < 256
            positions = len(rollout.prompts[0]) + len(part) * int(rollout.lengths[part].max())  # the prompt once
            assert positions <= (budget or 2048)


def test_uniform_numbers_are_indexed_by_action():
    """Row 1 takes numbers 0 and 1 in its first turn, and goes on with number 2 whatever the others did."""

    class Decoding:
        max_new_tokens, max_episode_tokens = 3, 9
        uniforms = torch.arange(12.0).reshape(2, 6, 1) / 12

    turns = Lockstep([[3], [4]], 1, Decoding(), lambda rows, *_: [[9], [9, 9]][: len(rows)] if len(rows) > 1 else [None])
    assert turns.limits == [3, 3]
    torch.testing.assert_close(turns.uniforms[:, :, 0], torch.tensor([[0.0, 1, 2], [6, 7, 8]]) / 12)
    turns.reply([[5, 5, 5], [6]], [np.zeros(3), np.zeros(1)])
    assert turns.contexts == [[3, 5, 5, 5, 9], [4, 6, 9, 9]] and turns.limits == [3, 3]
    torch.testing.assert_close(turns.uniforms[:, :, 0], torch.tensor([[3.0, 4, 5], [7, 8, 9]]) / 12)


# --- evaluation, prediction, playback ---------------------------------------------------------------------------------------


def test_predict_plays_what_evaluate_measures():
    settings = {"num_tasks": 12, "min_new_tokens": 2, "allowed_tokens": [0, *range(A, H - 1)]}
    agent, env = make_agent(env=make(**settings)), make(**settings)
    returns, lengths, turns = [], [], []
    for index in range(12):
        observation, _ = env.reset(options={"index": index})
        state, start, total, n, done = None, True, 0.0, 0, False
        while not done:
            action, state = agent.predict(observation, state, episode_start=np.array([start]), deterministic=True)
            observation, reward, terminated, truncated, info = env.step(action)
            start, done, total, n = False, terminated or truncated, total + reward, n + 1
        returns.append(total), lengths.append(n), turns.append(info["turns"])
    found = agent.evaluate(env)
    assert found["reward"] == pytest.approx(np.mean(returns)) and found["length"] == np.mean(lengths)
    assert found["turns"] == np.mean(turns) and max(turns) > 1


def test_repeated_seeds_have_a_standard_error():
    assert standard_error(np.array([[1.0, 3.0], [5.0, 7.0]])) == pytest.approx(2.0)  # means 2, 6: std 8 ** 0.5, over 2 ** 0.5
    assert standard_error(np.array([[1.0, 3.0]])) == pytest.approx(1.0)
    agent = make_agent()
    once, repeated = agent.evaluate(make(num_tasks=5)), agent.evaluate(make(num_tasks=5), repeats=3)
    assert once["reward"] == pytest.approx(repeated["reward"]) and "reward_stderr" not in once  # greedy
    env = make(num_tasks=None)
    sampled = agent.evaluate(env, deterministic=False, n_prompts=6, repeats=4)
    assert sampled["reward_stderr"] > 0 and 0 <= sampled["success_rate"] <= 1 and "success_rate_stderr" in sampled
    with pytest.raises(ValueError, match="repeats=0"):
        agent.evaluate(env, repeats=0)


def test_play_shows_a_transcript_and_a_table():
    env = make(GuessNumber, make_tokenizer("0123456789gues-=+ "), max_prompt_tokens=10, max_new_tokens=1, first_seed=40)
    agent = GRPO(make_model("llama", 21), env, n_envs=8, group_size=4, seed=0)
    before = agent.get_parameters()["policy"]["lm.model.embed_tokens.weight"].clone()
    playback = agent.play(seed=43)
    assert playback.info["prompt_index"] == 3 and str(agent.play(seed=43)) == str(playback)
    lines = str(playback).splitlines()
    assert lines[0] == "env:    'guess 1-7='" and lines[1].startswith("policy: ") and lines[1].endswith("[cut]  [reward 0]")
    assert lines[-1] == f"return: {playback.score:g}"
    actions = [row for row in playback.rows if row["action"]]
    assert [row["turn"] for row in actions] == [1, 2, 3] and len(playback.rows) == 3 + playback.info["observation_tokens"]
    assert all(row["logp"] < 0 and row["advantage"] is not None for row in actions)
    assert all(row["logp"] is None and row["turn"] is None for row in playback.rows if not row["action"])
    assert len(playback.table().splitlines()) == 1 + len(playback.rows)
    assert torch.equal(agent.get_parameters()["policy"]["lm.model.embed_tokens.weight"], before)
    with pytest.raises(ValueError, match="seed=39 is not one of the env's seeds; they begin with 40"):
        agent.play(seed=39)


def test_a_game_that_is_a_chat():
    tokenizer = make_chat_tokenizer()
    env = TextGenerationEnv.from_text_env(
        Talk, tokenizer, max_prompt_tokens=30, max_new_tokens=4, max_turns=2, max_observation_tokens=40, eos_token_ids=[0, 4]
    )
    agent = GRPO(make_model("llama", len(tokenizer)), env, n_envs=8, group_size=4, seed=0)
    agent.learn(40)
    assert agent.audit(n=8, quiet=True).passed
    (info, *_) = agent.sample_rollout().infos
    assert info["turns"] == 2 and "you said" in info["completion"]


# --- logs and records -------------------------------------------------------------------------------------------------------


class Kept(KVWriter):
    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def test_logs(monkeypatch):
    kept, rollouts = Kept(), []
    agent = make_agent(GRPO, make(reference=make_model("llama", len(TOKENIZER), seed=1)))
    agent.set_logger(Logger(None, [kept]))
    original = GRPO.train
    monkeypatch.setattr(GRPO, "train", lambda self, rollout: (rollouts.append(rollout), original(self, rollout))[1])
    agent.learn(60)
    row, rollout = kept.rows[0], rollouts[0]
    turns = [t.max() + 1 for t in rollout.turn_rows]
    assert row["rollout/turns"] == np.mean(turns)
    cut = [
        sum(token != 0 for token, end in zip(response, np.diff(t, append=-2) != 0, strict=True) if end and token is not None)
        for response, t in zip(rollout.responses, rollout.turn_rows, strict=True)
    ]
    assert 0 < row["rollout/turn_truncated"] <= sum(cut) / sum(turns)
    assert row["rollout/observation_tokens"] == np.mean([(t == -1).sum() for t in rollout.turn_rows])
    assert row["rollout/env/is_success"] == row["rollout/success_rate"]
    assert row["rollout/env/length"] > 0 and "rollout/env/note" not in row and row["time/env"] > 0
    weights = [float((rollout.turn_ids == k).sum()) for k in range(3)]
    for key in ("train/entropy", "train/kl_ref"):
        parts = [row[f"{key}/turn_{k + 1}"] for k in range(3)]
        assert row[key] == pytest.approx(np.average(parts, weights=weights), rel=1e-4) and len(set(parts)) == 3
    assert "transcript" in row["rollout/samples"] and "policy:" in row["rollout/samples"]


def many_a(completions, **kwargs):
    return [completion_text(completion).count("a") for completion in completions]


def test_records_are_complete_and_can_be_rescored(tmp_path):
    path = tmp_path / "episodes.jsonl"
    agent = make_agent(env=make(record=path, reward=many_a, reference=make_model("llama", len(TOKENIZER), seed=1)))
    rollout = agent.sample_rollout()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(records) == 8
    by_ids = {tuple(record["completion_ids"]): record for record in records}
    for response, turns, info, score in zip(
        rollout.responses, rollout.turn_rows, rollout.infos, rollout.scores.tolist(), strict=True
    ):
        end = np.flatnonzero(turns >= 0)[-1] + 1
        record = by_ids[tuple(response[:end])]
        assert record["turn_ids"] == turns[:end].tolist() and record["score"] == pytest.approx(score)
        assert len(record["logprobs"]) == len(record["ref_logprobs"]) == (turns >= 0).sum()
        roles = [message["role"] for message in record["completion"]]
        assert roles[::2] == ["assistant"] * info["turns"] and set(roles[1::2]) <= {"user"}
        assert record["components"] == {"many_a": info["reward/many_a"], "env": info["reward/env"]}
    for old, new in zip(records, rescore(path, lambda completions: [1.0] * len(completions)), strict=True):
        assert new["score"] == pytest.approx(1.0 + old["components"]["env"])
    with pytest.raises(ValueError, match="text env pays its own turns"):
        check_reward(make())


def test_shipped_rewards_read_the_last_turn_only():
    """An observation that gives the answer away pays nothing."""
    chat = [
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "it is 7"},
        {"role": "assistant", "content": "6"},
    ]
    assert completion_text(chat) == "6" and completion_text(chat[:2]) == "5"
