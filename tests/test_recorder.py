"""Episodes as JSONL: every field against what was played, re-scored without a model, whole after a cut."""

import json

import numpy as np
import pytest

from llm_env import PooledReward, TextGenerationEnv, process_reward, rescore
from llm_env.rewards import numeric_answer
from tests.conftest import make_model, make_tokenizer
from tests.test_agents import make_agent

TOKENIZER = make_tokenizer("abc0123456789")
EOS = 0
ROWS = [{"prompt": "a", "answer": "12", "level": 3}, {"prompt": "bc", "answer": "7", "level": 4}]


def ids(text):
    return TOKENIZER(text)["input_ids"]


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def make(path, **kwargs):
    kwargs = {"max_prompt_tokens": 2, "max_new_tokens": 4, "success": "numeric_answer", **kwargs}
    return TextGenerationEnv(ROWS, [numeric_answer, length], TOKENIZER, reward_weights=[1.0, 0.5], record=path, **kwargs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_record_holds_the_episode(tmp_path):
    path = tmp_path / "runs" / "episodes.jsonl"
    model = make_model("llama", len(TOKENIZER))
    env = make(path, reference=model, kl_coef=0.1, missing_eos_penalty=2.0)
    venv = env.vectorize(2)
    venv.reset(seed=0, options={"index": [0, 1]})
    responses = [[*ids("12"), EOS], ids("abc1")]
    outcome = venv.step_responses(responses, [[-1.0, -0.5, -0.25], [-1.0] * 4])
    first, second = lines(path)
    assert first.pop("ref_logprobs") == pytest.approx(outcome.ref_logprobs[0].tolist())
    assert first == {
        "prompt_index": 0,
        "prompt": "a",
        "completion": "12",
        "prompt_ids": ids("a"),
        "completion_ids": responses[0],
        "columns": {"answer": "12", "level": 3},
        "components": {"numeric_answer": 1.0, "length": 2.0, "missing_eos": 0.0},
        "score": 1.0 + 0.5 * 2,  # the KL is not in it
        "terminated": True,
        "truncated": False,
        "logprobs": [-1.0, -0.5, -0.25],
        "is_success": True,
    }
    assert (second["score"], second["truncated"], second["completion"]) == (0.5 * 4 - 2.0, True, "abc1")
    env.reset(options={"index": 1})
    for token in [*ids("7"), EOS]:
        env.step(token)
    third = lines(path)[2]
    assert third["completion_ids"] == [*ids("7"), EOS] and third["logprobs"] is None and len(third["ref_logprobs"]) == 2


def test_rescoring_needs_no_model_and_uses_the_columns(tmp_path):
    path, out = tmp_path / "episodes.jsonl", tmp_path / "again.jsonl"
    venv = make(path).vectorize(2)
    venv.reset(seed=0, options={"index": [0, 1]})
    venv.step_responses([[*ids("12"), EOS], [*ids("b"), EOS]])

    def levels(completions, completion_ids, level, **kwargs):
        assert all(row[-1] == EOS for row in completion_ids)
        return [float(x) if c == "12" else None for c, x in zip(completions, level, strict=True)]

    again = rescore(path, [levels, length], [10.0, 1.0], out)
    assert [record["score"] for record in again] == [10.0 * 3 + 2, 1.0]
    assert again[1]["components"] == {"length": 1.0} and "is_success" not in again[0]
    assert lines(out) == again and lines(path)[0]["score"] == 2.0
    assert [r["score"] for r in rescore(path, PooledReward(numeric_answer, workers=2))] == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"'needs' needs \['colour'\]"):
        rescore(path, needs)
    (tmp_path / "other.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"other.jsonl:1 is no recorded episode: it has no \['columns', 'completion'"):
        rescore(tmp_path / "other.jsonl", length)


def needs(completions, colour):
    return [0.0]


def test_a_training_run_is_recorded_whole(tmp_path):
    path = tmp_path / "episodes.jsonl"
    tokenizer = make_tokenizer("abcdefgh")
    env = TextGenerationEnv(["a", "b"], length, tokenizer, max_prompt_tokens=1, max_new_tokens=3, record=path)
    agent = make_agent("GRPO", env=env, n_envs=8)
    agent.learn(40)
    records = lines(path)
    assert sum(len(record["completion_ids"]) for record in records) == agent.num_timesteps
    for record in records[:8]:  # of the first rollout, but the weights have moved since: a fresh agent knows them
        fresh = make_agent("GRPO", env=TextGenerationEnv(["a", "b"], length, tokenizer, max_prompt_tokens=1, max_new_tokens=3))
        logp = fresh.policy.log_probs([record["prompt_ids"]], [record["completion_ids"]])[0]
        np.testing.assert_allclose(record["logprobs"], logp.detach(), atol=1e-4)


def test_a_line_that_was_cut_off_is_taken_away_and_the_file_goes_on(tmp_path, caplog):
    path = tmp_path / "episodes.jsonl"
    for _ in range(2):
        venv = make(path).vectorize(1)
        venv.reset(seed=0)
        venv.step_responses([[EOS]])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    venv = make(path).vectorize(1)
    assert "ends in the middle of a line" in caplog.text
    venv.reset(seed=0)
    venv.step_responses([[EOS]])
    assert path.read_bytes() == whole


def test_a_cut_off_line_may_be_longer_than_what_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("llm_env.recorder.BLOCK", 7)
    for whole in (b"", b'{"prompt_index": 0}\n'):
        path = tmp_path / "episodes.jsonl"
        path.write_bytes(whole + b'{"prompt_index": 1, "prompt": "' + b"a" * 100)
        make(path)
        assert path.read_bytes() == whole


def test_columns_that_json_cannot_hold_are_refused_at_once(tmp_path):
    with pytest.raises(TypeError, match=r"in row 1 of the prompts a column holds .*complex.*, which JSON cannot"):
        TextGenerationEnv([{"prompt": "a", "z": 1}, {"prompt": "a", "z": 1j}], length, TOKENIZER, record=tmp_path / "e.jsonl")
    env = TextGenerationEnv(
        [{"prompt": "a", "z": np.arange(2)}], length, TOKENIZER, record=tmp_path / "e.jsonl", max_new_tokens=1
    )
    env.reset(seed=0)
    env.step(EOS)
    assert lines(tmp_path / "e.jsonl")[0]["columns"] == {"z": [0, 1]}


def test_a_file_that_is_no_record_stays_as_it_is(tmp_path):
    path = tmp_path / "notes.txt"
    for text in ("my only copy", '{"prompt": "a"}\n{"prompt": "b'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"notes.txt ends with .* which is no recorded episode; give record= another file"):
            make(path)
        assert path.read_text() == text


def test_a_last_line_without_a_line_break_is_kept(tmp_path):
    path = tmp_path / "episodes.jsonl"
    for _ in range(2):
        env = make(path)
        env.reset(seed=0)
        env.step(EOS)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
    make(path)
    assert path.read_bytes() == whole and len(lines(path)) == 2


def test_an_episode_that_cannot_be_written_is_not_over(tmp_path):
    @process_reward
    def steps(completion_ids, log_extra):
        log_extra("z", [{1, 2}] * len(completion_ids))
        return [[(0, 1.0)] for _ in completion_ids]

    env = TextGenerationEnv(["a"], steps, TOKENIZER, record=tmp_path / "e.jsonl", max_new_tokens=2)
    env.reset(seed=0)
    assert env.step(3)[1] == 1.0
    for _ in range(2):
        with pytest.raises(TypeError, match=r"a column holds \{1, 2\}"):
            env.step(EOS)
    env.rules.recorder = None
    assert env.step(EOS)[1:3] == (0.0, True)
