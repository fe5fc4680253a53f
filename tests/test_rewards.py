import copy
import functools
import pickle
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from llm_env.rewards import RewardSum, exact_match, numeric_answer, parse_number


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def is_a(completions):
    return [1.0 if c == "a" else None for c in completions]


def score(reward, completions=("a", "bb"), **columns):
    prompts = ["p"] * len(completions)
    scores = reward(prompts, list(completions), [[1]] * len(completions), {k: list(v) for k, v in columns.items()})
    return scores.total, scores.components


def test_weighted_sum_and_components():
    total, components = score(RewardSum([length, is_a], [0.5, 10.0]))
    assert total.tolist() == [0.5 * 1 + 10 * 1, 0.5 * 2]  # None is left out of the sum
    assert components["length"].tolist() == [1.0, 2.0]
    assert components["is_a"][0] == 1.0 and np.isnan(components["is_a"][1])


def test_functions_get_what_their_signature_names():
    seen = {}

    def everything(prompts, completions, **kwargs):
        seen.update(kwargs)
        return [0.0] * len(prompts)

    def some(completions, answer, tolerance=0.5):
        return [float(a) for a in answer]

    total, _ = score(RewardSum([everything, some], columns=["answer", "level"]), answer=[3, 4], level=[0, 1])
    assert total.tolist() == [3.0, 4.0]
    lists = {key: seen.pop(key) for key in ("completion_ids", "answer", "level")}
    assert lists == {"completion_ids": [[1], [1]], "answer": [3, 4], "level": [0, 1]}
    assert set(seen) == {"trainer_state", "log_extra", "log_metric"}  # as in TRL


def test_a_column_cannot_take_the_place_of_what_the_model_wrote():
    reward = RewardSum(length, columns=["completions"])
    scores = reward(["p", "p"], ["a", "bb"], [[1], [1]], {"completions": ["gold gold", "gold gold"]})
    assert scores.total.tolist() == [1.0, 2.0]


def test_a_column_that_a_row_lacks_is_noticed_at_construction(tokenizer):
    from llm_env import TextGenerationEnv

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b"}]
    with pytest.raises(ValueError, match="'exact_match' needs the column 'answer', but row 1 of the prompts has none"):
        TextGenerationEnv(rows, exact_match, tokenizer)


def test_names_are_unique_and_fit_a_log_key():
    def a_very_long_name_of_a_reward_function_one(completions):
        return [0.0]

    def a_very_long_name_of_a_reward_function_two(completions):
        return [0.0]

    class Judge:
        def __call__(self, completions):
            return [0.0]

    names = RewardSum(
        [
            a_very_long_name_of_a_reward_function_one,
            a_very_long_name_of_a_reward_function_two,
            lambda completions: [0.0],
            Judge(),
            Judge(),
        ]
    ).names
    assert RewardSum(functools.partial(exact_match, think_tags=()), columns=["answer"]).names == ["exact_match"]
    assert names == ["a_very_long_name_of_a_re", "a_very_long_name_of_a__2", "lambda", "Judge", "Judge_2"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda completions: 1 / 0, "'lambda' raised ZeroDivisionError: division by zero on a batch of 2 completions.*'p'"),
        (lambda completions: [1.0], "returned 1 values for 2 completions"),
        (lambda completions: [1.0, float("nan")], "returned nan for row 1 of 2"),
        (lambda completions: [float("inf"), 1.0], "returned inf for row 0 of 2"),
        (lambda completions: None, "returned None for all 2"),
        (lambda completions: [1.0, None], r"no reward function of \['lambda'\] scored row 1.*'bb'"),
        (lambda completions: ["good", "bad"], "must return one number a completion, but returned"),
        (lambda completions: 3.0, "must return one number a completion, but returned 3.0"),
    ],
)
def test_a_bad_reward_is_named(function, message):
    with pytest.raises(ValueError, match=message):
        score(RewardSum(function))


@pytest.mark.parametrize(
    ("functions", "weights", "error", "message"),
    [
        ([], None, ValueError, "empty list"),
        ([length, 3], None, TypeError, "reward 3 is a int"),
        ([length], [1.0, 2.0], ValueError, "2 numbers for 1 reward functions"),
        ([length], [float("nan")], ValueError, "must be finite"),
        ([exact_match], None, ValueError, r"'exact_match' needs \['answer'\].*only the columns \[\]"),
    ],
)
def test_bad_arguments_are_refused_at_construction(functions, weights, error, message):
    with pytest.raises(error, match=message):
        RewardSum(functions, weights)


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("so the answer is 72.", "... #### 72", 1.0),
        ("A: 72", "72", 1.0),
        ("#### 72", "#### 72", 1.0),
        (r"thus \boxed{72}", "72", 1.0),
        (r"\boxed{\frac{3}{4}}", "0.75", 1.0),
        ("The answer is $1,072.00 in all", "#### 1,072", 1.0),
        ("she has -5 dollars", "#### -5", 1.0),
        ("12 - 7 = 5", "5", 1.0),
        ("10-7", "-7", 0.0),  # a minus between numbers is no sign
        ("7.50", "7.5", 1.0),
        ("50%", "50", 1.0),
        ("The answer is 72 because 3 * 24 = 72 and not 71", "72", 1.0),
        ("I read 72 somewhere but I say 71", "72", 0.0),
        ("", "72", 0.0),
        ("no idea", "72", 0.0),
        ("3/0", "3", 0.0),
        ("The answer is 3+4=7", "7", 1.0),
        ("Answer: 12 apples - 5 apples = 7 apples", "7", 1.0),
        ("9" * 5000, "3", 0.0),
    ],
)
def test_numeric_answer(completion, answer, expected):
    assert numeric_answer(completions=[completion], answer=[answer]) == [expected]


def test_numeric_answer_takes_numbers_and_refuses_a_column_without():
    assert numeric_answer(completions=["3.0"], answer=[3]) == [1.0]
    with pytest.raises(ValueError, match="'none', which ends in no number"):
        numeric_answer(completions=["3"], answer=["none"])


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        (1e-05, "0.00001", "5"),
        (1e16, "10000000000000000", "16"),
        (1e22, "1e22", "22"),
        (0.1, "1/10", "0.1000000000000000055511151231257827"),
        (-0.5, r"\boxed{-\frac12}", "0.5"),
        (np.float32(1e-05), "1e-5", "5"),
        (np.float64(2.5), "2.5", "2"),
        (np.int64(72), "72", "71"),
        (Fraction(1, 3), "1/3", "0.3333333333333333"),
        (Decimal("1E+10"), "10^10", "10"),
        (Decimal("0.10"), "0.1", "0.2"),
        (10**30, "1" + "0" * 30, "1e31"),
        ("2e3", "2000", "3"),
        ("<think>2</think> #### 3", "3", "2"),
    ],
)
def test_golds_are_exact(gold, right, wrong):
    assert numeric_answer(completions=[right, wrong], answer=[gold, gold]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "gold",
    [float("nan"), float("inf"), -np.inf, np.float32("nan"), Decimal("NaN"), True, None, 3j, r"2\sqrt{3}", "x^2+1", "3–5"],
)
def test_golds_that_are_no_numbers_are_refused(gold):
    with pytest.raises(
        ValueError, match=r"the column 'answer' holds .*, which ends in no number; try math_answer or exact_match"
    ):
        numeric_answer(completions=["3"], answer=[gold])


def test_exact_match():
    answers = ["46", "46", "x #### 46", "46"]
    assert exact_match(completions=["46", " 46\n", "46", "46."], answer=answers) == [1.0, 1.0, 1.0, 0.0]


CHATS = [
    "46",
    [{"role": "assistant", "content": "46"}],
    [{"role": "assistant", "content": [{"type": "text", "text": "46"}]}],
    [{"role": "assistant", "content": "<think>So 45?</think>\n46"}],
    [{"role": "assistant", "content": "45"}, {"role": "user", "content": "46"}],
    [{"role": "tool", "content": "46"}],
    [{"role": "assistant", "content": None}],
    "<think>46",
    "46</think>",
]
PAID = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("reward", [exact_match, numeric_answer])
def test_chats_and_thoughts(reward):
    assert reward(completions=CHATS, answer=["46"] * len(CHATS)) == PAID
    asked = [[{"role": "user", "content": "12+34= #### 46"}]] * len(CHATS)
    assert reward(completions=CHATS, answer=["46"] * len(CHATS), prompts=asked) == PAID
    begun = ["assistant\n<think>\n"] * 3  # the template opens the thought
    assert reward(completions=["46", "45</think>46", "46</think>"], answer=["46"] * 3, prompts=begun) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("reward", [exact_match, numeric_answer])
def test_think_tags_are_bound_with_partial(reward):
    bound = functools.partial(reward, think_tags=("<plan>", "</plan>"))
    for function in (bound, copy.deepcopy(bound), pickle.loads(pickle.dumps(bound))):
        total, components = score(RewardSum(function, columns=["answer"]), ["<plan>7</plan>8", "<plan>8"], answer=["8", "8"])
        assert total.tolist() == [1.0, 0.0] and list(components) == [reward.__name__]


def test_every_gold_answer_of_gsm8k_is_worth_one(gsm8k):
    from llm_env.prompts import read_jsonl

    answers = [row["answer"] for name in ("train", "test") for row in read_jsonl(gsm8k / f"{name}.jsonl")]
    assert len(answers) == 7473 + 1319
    assert numeric_answer(completions=answers, answer=answers) == [1.0] * len(answers)
    bare = [answer.split("####")[1] for answer in answers]
    assert numeric_answer(completions=bare, answer=answers) == [1.0] * len(answers)
    marked = [
        text
        for answer in answers[::4]
        for body, number in [answer.split("\n#### ")]
        for text in (f"{body}\nA: {number}", f"<think>{body} The answer is 1.</think>{number}", rf"{body} \boxed{{{number}.0}}")
    ]
    assert numeric_answer(completions=marked, answer=[a for a in answers[::4] for _ in range(3)]) == [1.0] * len(marked)
    off_by_one = [str(parse_number(answer) + 1) for answer in answers]
    assert sum(numeric_answer(completions=off_by_one, answer=answers)) == 0


def test_numbers_are_exact():
    assert parse_number("0.1") == Fraction(1, 10)
