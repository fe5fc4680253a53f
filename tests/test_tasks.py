"""Countdown and the reasoning-gym adapter: their rows, their splits, what pays and what does not."""

import ast
import itertools
import re
import subprocess
import sys
import time
from fractions import Fraction

import gymnasium as gym
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm_env
from llm_env.prompts import split_of
from llm_env.tasks.continuation import word_count
from llm_env.tasks.countdown import CountdownProblems, countdown, countdown_at_most_once, evaluate


def pays(answer, numbers=(2, 3, 5), target=16, reward=countdown):
    return reward(completions=[answer], numbers=[list(numbers)], target=[target]) == [1.0]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("(3+5)*2", True),
        (" ( 3 + 5 )\n* 2 ", True),
        ("2*(5+3) = 16", True),
        ("2*(5+3)=17", False),
        ("2*(5+3) = 16 = 16", False),
        ("<think>3*5+2 is 17</think><answer>(3+5)*2</answer>", True),
        ("<answer>3*5+2</answer> <answer>(3+5)*2 = 16</answer> done", True),
        ("<answer>(3+5)*2</answer><answer>16</answer>", False),
        ("<think>2*8</think>(3+5)*2", True),
        ("2*8?</think> <answer>(3+5)*2</answer>", True),
        ("<think><answer>(3+5)*2</answer>", False),
        ("<think><answer>(3+5)*2</answer></think>", False),
        ([{"role": "assistant", "content": "(3+5)*2"}], True),
        ([{"role": "assistant", "content": "16"}, {"role": "user", "content": "(3+5)*2"}], False),
        ([{"role": "tool", "content": "(3+5)*2"}], False),
        ("I say (3+5)*2", False),
        ("16", False),
        ("3*5+2-1", False),  # a number that is not given
        ("(3+5)*2+2-2", False),  # one used thrice
        ("3*5+1", False),
        ("3*5", False),
        ("(3+5)*02", False),
        ("(3+5)*2.0", False),
        ("(3+5)*2_", False),
        ("(3+5)**2", False),
        ("35//2", False),
        ("--(3+5)*2", False),
        ("+(3+5)*2", False),
        ("(3+5)(2)", False),
        ("3 5 2", False),
        ("(3+5)*2)", False),
        ("((3+5)*2", False),
        ("3+5)*(2", False),
        ("(3+5)\u00d72", False),
        ("(3+5)*\u0662", False),
        ("(3+5)*2\0", False),
        ("(3+5)*2#", False),
        ("", False),
        ("=16", False),
    ],
)
def test_countdown_pays_for_solutions_only(answer, expected):
    assert pays(answer) is expected


@pytest.mark.parametrize("reward", [countdown, countdown_at_most_once])
def test_countdown_with_other_think_tags_and_begun_thoughts(reward):
    row = {"numbers": [[2, 3, 5]], "target": [16]}
    completions = ["<plan>2*8</plan>(3+5)*2"]
    assert reward(completions=completions, **row) == [0.0]
    assert reward(completions=completions, **row, think_tags=("<plan>", "</plan>")) == [1.0]
    assert reward(completions=["(3+5)*2"], **row, prompts=["<think>\n"]) == [0.0]
    assert reward(completions=["2*8</think>(3+5)*2"], **row, prompts=["<think>\n"]) == [1.0]


def test_countdown_is_exact_and_may_pass_through_fractions():
    assert pays("8/(3-8/3)", (3, 3, 8, 8), 24)
    assert not pays("1/3*3", (1, 3, 3), 0) and pays("1/3*3", (1, 3, 3), 1)
    assert not pays("10000000/9999999", (10000000, 9999999), 1)  # within 1e-5 of it
    assert not pays("5/(2+3-5)", (2, 3, 5, 5), 16)


def test_a_number_given_twice_may_be_used_twice():
    assert pays("8+8", (8, 8), 16) and not pays("8+8", (8, 9), 16) and not pays("8", (8, 8), 8)


def test_at_most_once():
    assert pays("2*3", target=6, reward=countdown_at_most_once) and not pays("2*3", target=6)
    assert not pays("3+3", target=6, reward=countdown_at_most_once)
    assert not pays("6", target=6, reward=countdown_at_most_once)


def expected_value(text):
    """Python's own reading, where the text has none of what Python allows beyond arithmetic."""
    text = " ".join(text.split())
    if "**" in text or "//" in text or re.search(r"(?<![0-9])0[0-9]", text):
        return None
    try:
        tree = ast.parse(text, mode="eval")
        if any(isinstance(node, (ast.UnaryOp, ast.Call, ast.Tuple)) for node in ast.walk(tree)):
            return None
        return Fraction(eval(re.sub(r"[0-9]+", r"Fraction(\g<0>)", text)))
    except (SyntaxError, ZeroDivisionError):
        return None


expressions = st.recursive(
    st.integers(0, 20).map(str),
    lambda parts: (
        st.builds("{}{}{}".format, parts, st.sampled_from(["+", "-", "*", "/", " - ", " / "]), parts) | parts.map("({})".format)
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore:.*is not callable:SyntaxWarning")
@settings(max_examples=400, deadline=None)
@given(expressions | st.text("12 0+-*/()", max_size=12))
def test_values_are_those_of_python(text):
    if re.search(r"(?<![0-9])0[0-9]", text):  # no row has such a number; it is refused before
        return
    assert evaluate(text) == expected_value(text)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789+-*/()= .\n<answer>_", max_size=60), st.booleans())
def test_any_text_gets_a_score(text, at_most_once):
    reward = countdown_at_most_once if at_most_once else countdown
    assert reward(completions=[text], numbers=[[2, 3, 5]], target=[16])[0] in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["(", ")", "2+", "-", "2", "(3+5)*2", "<answer>", "</answer>", "=", " ", "\0", "9" * 5000 + "*"]
)
def test_hostile_answers_are_quick_and_worth_nothing(piece):
    text = piece * (2_000_000 // len(piece))
    start = time.process_time()
    assert not pays(text) and not pays(f"<answer>{text}</answer>") and not pays(text[:999])
    assert time.process_time() - start < 1
    assert not pays("(" * 600 + "(3+5)*2" + ")" * 600)  # more than anyone needs
    assert not pays("(" * 190 + "(3+5)*2" + ")" * 189) and pays("(" * 190 + "(3+5)*2" + ")" * 190)
    for depth in (200, 400):
        assert not pays("(" * depth + "(3+5)*2" + ")" * depth)  # more than Python nests


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
def test_what_python_cannot_parse_is_no_answer(error, monkeypatch):
    def fails(*args, **kwargs):
        raise error

    assert pays("(3+5)*2")
    monkeypatch.setattr(ast, "parse", fails)
    assert not pays("(3+5)*2")


def test_the_length_of_an_expression_is_limited():
    assert evaluate("1" + "+1" * 490) == 491
    assert evaluate("1" + "+1" * 500) is None


def solvable(numbers, target):
    """By trying everything: every pair, every sign, until one number is left."""
    if len(numbers) == 1:
        return numbers[0] == target
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        a, b = numbers[i], numbers[j]
        if any(solvable([*rest, c], target) for c in (a + b, a - b, a * b, *([Fraction(a, b)] if b else []))):
            return True
    return False


def test_every_row_is_solvable_and_its_own():
    problems = CountdownProblems(size=300, largest=20, largest_target=50)
    rows = list(problems)  # ends with an IndexError at 300
    assert rows == [CountdownProblems(size=300, largest=20, largest_target=50)[i] for i in range(300)]
    assert rows != [CountdownProblems(size=300, largest=20, largest_target=50, seed=1)[i] for i in range(300)]
    for row in rows:
        assert pays(row["solution"], row["numbers"], row["target"])
        assert row["numbers"] == sorted(row["numbers"])  # one problem, one text
        assert 1 <= row["target"] <= 50 and all(1 <= n <= 20 for n in row["numbers"]) and len(row["numbers"]) in (3, 4)
        assert [int(n) for n in re.findall("[0-9]+", row["prompt"])] == [*row["numbers"], row["target"]]
    assert all(solvable(row["numbers"], row["target"]) for row in rows[:40])
    assert 100 < sum(len(row["numbers"]) == 3 for row in rows) < 200
    assert all(sum(sign in row["solution"] for row in rows) > 20 for sign in "+-*/")


def test_rows_are_the_same_in_another_process():
    script = (
        "from llm_env.tasks.countdown import CountdownProblems as C; p = C(seed=5); print([p[i]['solution'] for i in range(9)])"
    )
    problems = CountdownProblems(seed=5)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == str([problems[i]["solution"] for i in range(9)]), done.stderr


def test_countdown_env():
    train, test = (gym.make("llm_env/Countdown-v0", split=split, size=300).unwrapped for split in ("train", "test"))
    texts = [set(env.rules.prompts.texts) for env in (train, test)]
    assert not texts[0] & texts[1] and 10 < len(texts[1]) < 60
    tokenizer = train.rules.tokenizer
    assert all(tokenizer.unk_token_id not in ids for ids in test.rules.prompts.ids)
    test.reset(options={"index": 0})
    (solution,) = test.rules.prompts.column("solution", [0])
    for token in tokenizer(solution)["input_ids"]:
        test.step(token)
    reward, terminated, _, info = test.step(test.rules.eos_id)[1:]
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)
    easy = gym.make("llm_env/Countdown-v0", count=6, at_most_once=True, largest_target=999, size=40).unwrapped
    assert "at most once" in easy.rules.prompts.texts[0] and easy.rules.rewards.names == ["countdown_at_most_once"]
    assert {len(numbers) for numbers in easy.rules.prompts.column("numbers", range(9))} == {6}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 1}, "count=1 must be"),
        ({"count": (4, 3)}, r"count=\(4, 3\) must be"),
        ({"smallest": -1}, "smallest=-1 must be"),
        ({"size": 0}, "size=0"),
        ({"count": 2, "smallest": 60, "largest": 60, "largest_target": 200, "seed": 1, "size": 1}, None),
        ({"count": 3, "smallest": 90, "largest": 90, "largest_target": 1}, "hardly any 3 numbers from 90 to 90"),
    ],
)
def test_bad_countdown_arguments(arguments, message):
    if message is None:
        assert CountdownProblems(**arguments)[0]["target"] in (1, 120)  # 60/60, 60+60; 0 and 3600 are no targets
        return
    with pytest.raises(ValueError, match=message):
        CountdownProblems(**arguments)


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gymnastics():
    return pytest.importorskip("reasoning_gym")


def make(**arguments):
    return gym.make("llm_env/ReasoningGym-v0", **arguments).unwrapped


def scores(env, completions, index=0):
    table = env.rules.prompts
    columns = {name: table.column(name, [index] * len(completions)) for name in table.columns}
    return list(env.rules.rewards.functions[0](completions=completions, **columns))


def test_only_full_scores_pay_unless_told_otherwise(gymnastics):
    env, lax = make(), make(strict=False)
    (answer,) = env.rules.prompts.column("answer", [0])
    completions = [
        answer,
        f" {answer}\n",
        f"So <answer>{answer}</answer>",
        f"I say {answer}",
        f"<answer>1{answer}</answer>",
        "",
    ]
    assert scores(env, completions) == [1, 1, 1, 0, 0, 0]
    chat = [{"role": "assistant", "content": f"<think>No <answer>1</answer></think><answer>{answer}</answer>"}]
    asked = [{"role": "user", "content": answer}]
    assert scores(env, [chat, asked, [*chat, *asked], f"<think>{answer}", f"{answer}</think>"]) == [1, 0, 1, 0, 0]
    assert scores(lax, completions)[:3] == [1, 1, 1] and 0 < scores(lax, completions)[3] < 1  # a substring


def test_the_rows_are_the_data_sets_own(gymnastics):
    env = make(split=None, size=20, seed=3, config={"max_animals": 3})
    expected = gymnastics.create_dataset("leg_counting", size=20, seed=3, max_animals=3)
    for i, text in enumerate(env.rules.prompts.texts):
        assert text.startswith(expected[i]["question"]) and text.endswith("</answer>.\n")
    assert env.rules.prompts.column("answer", range(20)) == [entry["answer"] for entry in expected]
    assert make(split=None, size=20, seed=3, config={"max_animals": 3}).rules.prompts.texts == env.rules.prompts.texts


def test_splits_are_disjoint_although_neighbouring_seeds_share_their_questions(gymnastics):
    train, test = make(seed=0, size=200), make(seed=1, size=200, split="test")
    whole = [make(seed=seed, size=200, split=None) for seed in (0, 1)]
    texts = [set(env.rules.prompts.texts) for env in (train, test, *whole)]
    assert len(texts[2] & texts[3]) > 190  # what the hash is for
    assert not texts[0] & texts[1] and len(texts[1]) > 5
    questions = [entry["question"] for entry in test.rules.prompts.column("entry", range(len(texts[1])))]
    assert {split_of(question) for question in questions} == {"test"}
    other = make(seed=1, size=200, split="test", template="Q: {question}")
    assert [e["question"] for e in other.rules.prompts.column("entry", range(len(texts[1])))] == questions


def test_a_question_comes_once(gymnastics):
    from llm_env.tasks.reasoning_gym import ReasoningGymProblems, create_dataset

    problems = ReasoningGymProblems(create_dataset("coin_flip", 200, 0, {"min_trials": 3, "max_trials": 3}))
    prompts = [problems[i]["prompt"] for i in range(len(problems))]
    assert len(set(prompts)) == len(prompts) == 200 - problems.dropped < 200


def test_reasoning_gym_errors(gymnastics, monkeypatch):
    with pytest.raises(ValueError, match=r"dataset='legs' is none of reasoning-gym's: .*leg_counting"):
        make(dataset="legs")
    with pytest.raises(ValueError, match=r"refuses .*max_legs"):
        make(config={"max_legs": 3})
    with pytest.raises(ValueError, match=r"refuses .*min_animals must be positive"):
        make(config={"min_animals": 0})
    with pytest.raises(ValueError, match="split='dev' must be"):
        make(split="dev")
    with pytest.raises(ValueError, match="in split='test'; raise size=1"):
        make(size=1, split="test")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install llm-env\[reasoning-gym\]"):
        make()


def test_words_of_a_chat_are_the_assistants():
    chat = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "one two"}]
    assert word_count(completions=[chat, "one"]) == [2.0, 1.0]


def test_the_ids_are_registered():
    assert {"llm_env/Countdown-v0", "llm_env/ReasoningGym-v0"} <= set(gym.registry) and llm_env.PUPIL
