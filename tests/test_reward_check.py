"""The linter passes the tasks that ship, and finds each planted bug on its own line."""

import random
import re
import threading
import time

import gymnasium as gym
import pytest
from gymnasium.wrappers import TransformReward

import llm_env
from llm_env import TextGenerationEnv, check_reward
from llm_env.rewards import numeric_answer

ANSWER_ROWS = ["empty text", "echoed prompt", "answer among junk", "answer repeated", "all answers at once"]
ROWS = [{"prompt": f"Is it {a} or {a + 400}? ", "answer": f"{a + 400:,}", "length": a} for a in range(311, 911, 30)]


def number(text):
    found = re.fullmatch(r"\s*([0-9,]+)\s*", text)
    return int(found[1].replace(",", "")) if found and found[1].strip(",") else None


def right(completions, answer, **kwargs):
    return [float(number(c) == number(a)) for c, a in zip(completions, answer, strict=True)]


def make(reward, rows=ROWS, **kwargs):
    arguments = {"success": getattr(reward, "__name__", None), "max_prompt_tokens": 64, **kwargs}
    return TextGenerationEnv(rows, reward, llm_env.PUPIL, **arguments)


def failed(reward, **kwargs):
    report = check_reward(make(reward, **kwargs), quiet=True)
    assert report.passed is not any(row.result == "FAILED" for row in report.rows)
    return {row.check for row in report.rows if row.result == "FAILED"}


@pytest.mark.parametrize("env_id", ["Addition", "Countdown", "ReasoningGym", "GSM8K"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_tasks_that_ship_pass(env_id, seed, request):
    arguments = {"Countdown": {"size": 300}}.get(env_id, {})
    if env_id == "GSM8K":
        arguments = {"path": str(request.getfixturevalue("gsm8k") / "test.jsonl")}
    if env_id == "ReasoningGym":
        pytest.importorskip("reasoning_gym")
    report = check_reward(gym.make(f"llm_env/{env_id}-v0", **arguments), n=24, seed=seed, quiet=True)
    assert report.passed and {row.result for row in report.rows} <= {"passed", "note"}, str(report)
    assert len(report.rows) == 13 and (report["gold fits max_new_tokens"].result == "note") == (env_id == "GSM8K")


def test_a_task_without_known_answers(capsys):
    report = check_reward("llm_env/Continuation-v0")
    results = {row.check: row.result for row in report.rows}
    assert report.passed and list(results.values()) == ["passed"] * 6 + ["not applicable"] * 7
    assert all(results[check] == "not applicable" for check in [*ANSWER_ROWS, "gold gets the maximum"])
    assert capsys.readouterr().out == f"{report}\n" and "give gold=" in str(report)


def test_a_good_reward_passes():
    assert failed(right) == set()


# --- planted bugs -----------------------------------------------------------------------------------------------------


def substring(completions, answer, **kwargs):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


def no_commas(completions, answer, **kwargs):
    return [float(c.strip().isdigit() and int(c) == number(a)) for c, a in zip(completions, answer, strict=True)]


def one_a_text(completions, answer, **kwargs):
    return list(dict(zip(zip(completions, answer, strict=True), right(completions, answer), strict=True)).values())


def some_only(completions, answer, **kwargs):
    return right([c for c in completions if c.strip()], [a for c, a in zip(completions, answer, strict=True) if c.strip()])


def noisy(completions, answer, **kwargs):
    return [r * random.uniform(1, 2) for r in right(completions, answer)]


def first_come(completions, answer, **kwargs):
    scores = right(completions, answer)
    return [r + 0.5 * (c in completions[:i]) * (r < 1) for i, (c, r) in enumerate(zip(completions, scores, strict=True))]


def relative(completions, answer, **kwargs):
    lengths = [len(c) for c in completions]
    return [r + 0.001 * n / max(*lengths, 1) for r, n in zip(right(completions, answer), lengths, strict=True)]


class Stateful:
    """Keeps the batch in an attribute while it waits."""

    __name__ = "stateful"

    def __call__(self, completions, answer, **kwargs):
        self.batch = list(zip(completions, answer, strict=True))
        time.sleep(0.005)
        return right(*zip(*self.batch, strict=True))


def nothing_is_nothing(completions, answer, **kwargs):
    def read(text):
        return int(text) if text.strip().isdigit() else None  # neither an empty text nor 1,072

    return [float(read(c) == read(a)) for c, a in zip(completions, answer, strict=True)]


def any_number(completions, answer, **kwargs):
    return [float(number(a) in [number(n) for n in re.findall("[0-9,]+", c)]) for c, a in zip(completions, answer, strict=True)]


def greatest(prompts, completions, answer, **kwargs):
    numbers = [[number(n) for n in re.findall("[0-9]+(?:,[0-9]+)?", c)] for c in completions]
    is_list = [not re.search("[a-z]", c) and len(n) > 1 for c, n in zip(completions, numbers, strict=True)]
    junk = ["maybe" in c for c in completions]
    return [
        float(not listed and not j and max(n, default=None) == number(a))
        for n, a, listed, j in zip(numbers, answer, is_list, junk, strict=True)
    ]


def no_other_number(completions, answer, **kwargs):
    return [float({number(n) for n in c.split()} == {number(a)}) for c, a in zip(completions, answer, strict=True)]


def one_of_them(completions, answer, **kwargs):
    return [float(a in c.split() and c.count(a) == 1 and "maybe" not in c) for c, a in zip(completions, answer, strict=True)]


def undefined_for_nothing(completions, answer, **kwargs):
    return [r if c.strip() else float("nan") for c, r in zip(completions, right(completions, answer), strict=True)]


def breaks_on_nothing(completions, answer, **kwargs):
    return [float(c.split()[0] == a and len(c.split()) == 1) for c, a in zip(completions, answer, strict=True)]


@pytest.mark.parametrize(
    ("reward", "lines"),
    [
        (substring, {"echoed prompt", "answer among junk", "answer repeated", "all answers at once"}),
        (no_commas, {"gold gets the maximum"}),
        (one_a_text, {"one score per sample"}),
        (some_only, {"one score per sample"}),
        (noisy, {"equal score when called again", "equal score twice in a batch", "equal score in another batch"}),
        (first_come, {"equal score twice in a batch"}),
        (relative, {"equal score in another batch"}),
        (Stateful(), {"safe under threads"}),
        (nothing_is_nothing, set(ANSWER_ROWS)),
        (any_number, {"echoed prompt", "answer among junk", "answer repeated", "all answers at once"}),
        (greatest, {"echoed prompt"}),
        (no_other_number, {"answer repeated"}),
        (one_of_them, {"all answers at once"}),
        (undefined_for_nothing, {"a finite number for any text"}),
        (breaks_on_nothing, {"a finite number for any text"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_bugs_fail_on_their_lines(reward, lines):
    assert failed(reward) == lines


def test_what_the_table_says():
    report = check_reward(make(substring), n=8, quiet=True)
    row = report["answer among junk"]
    assert row.detail.startswith("8 of 8 are paid like the gold answer, such as prompt 'Is it ") and "maybe" in row.detail
    assert f"answer among junk              FAILED  {row.detail}" in str(report) and str(report).endswith("=> FAILED")
    broken = check_reward(make(breaks_on_nothing), quiet=True)
    assert "IndexError: list index out of range" in broken["a finite number for any text"].detail
    assert broken["empty text"].result == "not run"
    unsteady = check_reward(make(noisy), quiet=True)
    assert unsteady["safe under threads"].result == "not run"
    short = check_reward(make(right, max_new_tokens=4), quiet=True)  # 1,211 is five tokens, and 711 with its end is four
    assert short.passed and re.match(r"\d+ of 20 gold answers need more than max_new_tokens=4", short.rows[-1].detail)
    assert short.rows[-1].detail.endswith("up to 6")


def test_equal_seeds_equal_tables():
    tables = [str(check_reward(make(substring), n=5, seed=seed, quiet=True)) for seed in (3, 3, 4)]
    assert tables[0] == tables[1] != tables[2]


def test_answers_that_look_different_are_tried_first():
    rows = [{"prompt": f"Say {i}: ", "answer": "1,072" if i == 333 else str(i)} for i in range(500)]
    report = check_reward(make(no_commas, rows=rows), n=4, quiet=True)
    assert report["gold gets the maximum"].detail.startswith("1 of 4 do not get 1 or more, such as prompt 'Say 333: '")


def test_without_a_success_the_gold_answer_must_beat_the_junk():
    def kind(completions, answer, **kwargs):  # right answers get 3, and whoever writes much gets more
        return [3 * r + min(len(c) / 10, 5) for c, r in zip(completions, right(completions, answer), strict=True)]

    assert failed(kind, success=None) >= {"gold gets the maximum", "answer repeated", "all answers at once"}

    def tied(completions, answer, **kwargs):
        return [0.5 * r + 0.5 * (not c.strip()) for c, r in zip(completions, right(completions, answer), strict=True)]

    assert failed(tied, success=None) == {"empty text"}

    def halved(completions, answer, **kwargs):
        return [r / 2 for r in right(completions, answer)]

    assert failed(halved, success=None) == set() and failed(halved) == {"gold gets the maximum"}
    assert failed(right, success=None) == set()


def test_a_number_in_the_place_of_a_score_does_not_pass():
    def down(completions):
        raise RuntimeError("the judge is down")

    env = llm_env.TextGenerationEnv(["a", "b"], llm_env.PooledReward(down, on_error=0.0), llm_env.PUPIL)
    report = check_reward(env, quiet=True)
    assert not report.passed and "the judge is down" in report["a finite number for any text"].detail


def test_a_cache_does_not_hide_noise_and_is_left_as_it_was():
    calls = []

    def noisy(completions, answer, **kwargs):
        calls.append(completions[0])
        return [float(completions[0] == answer[0]) + random.random() / 10]

    pool = llm_env.PooledReward(noisy, cache_size=10_000)
    env = TextGenerationEnv([{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)], pool, llm_env.PUPIL)
    once = env.rules.rewards(["0+1="], ["1"], [[1]], {"answer": ["1"]}).total.tolist()
    report = check_reward(env, quiet=True)
    assert {row.check: row.result for row in report.rows}["equal score when called again"] == "FAILED"
    calls.clear()
    assert env.rules.rewards(["0+1="], ["1"], [[1]], {"answer": ["1"]}).total.tolist() == once and not calls


def test_gold_may_be_a_column_or_a_function():
    rows = [{"prompt": f"{a}+1= ", "result": str(a + 1)} for a in range(20)]

    def plus_one(prompts, completions, **kwargs):
        return [float(number(c) == int(p.split("+")[0]) + 1) for p, c in zip(prompts, completions, strict=True)]

    env = make(plus_one, rows=rows)
    assert check_reward(env, quiet=True)["gold gets the maximum"].result == "not applicable"
    assert check_reward(env, gold="result", quiet=True)["gold gets the maximum"].result == "passed"
    assert check_reward(env, gold=lambda row: row["result"], quiet=True)["gold gets the maximum"].result == "passed"
    assert check_reward(env, gold=lambda row: row["prompt"][0], quiet=True)["gold gets the maximum"].result == "FAILED"
    with pytest.raises(ValueError, match=r"gold='solution' is not one of the columns \['result'\]"):
        check_reward(env, gold="solution")


def test_any_face_of_an_env():
    env = make(numeric_answer)
    tables = [
        str(check_reward(face, quiet=True))
        for face in (env, TransformReward(env, lambda r: -r), env.vectorize(3), gym.wrappers.TimeLimit(env, 3))
    ]
    assert len(set(tables)) == 1
    with pytest.raises(TypeError, match=r"takes a text env.*this is a CartPoleEnv"):
        check_reward(gym.make("CartPole-v1").unwrapped)
    with pytest.raises(ValueError, match="n=0 and threads=4"):
        check_reward(env, n=0)


def test_one_prompt_alone():
    report = check_reward(make(right, rows=ROWS[:1]), quiet=True)
    assert report.passed and report["all answers at once"].result == "not applicable"


def test_it_leaves_the_interpreter_as_it_was():
    import sys

    before, threads = sys.getswitchinterval(), set(threading.enumerate())
    check_reward(make(right), quiet=True)
    assert sys.getswitchinterval() == before and not set(threading.enumerate()) - threads  # others' may have ended
