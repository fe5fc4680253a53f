"""Reading final answers: the forms seen in the output of language models, and the forms that must not pay."""

import time
from fractions import Fraction

import pytest

from llm_env.answers import final_answer, parse_number, tagged_answer
from llm_env.rewards import numeric_answer


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        # the marks
        ("So she makes 9 * 2 = $<<9*2=18>>18 a day\nA: 18", "18"),
        ("It is 980 kilometers.\nA: 990", "990"),
        ("6 + 1 = 7\nA: **7**", "7"),
        ("**Answer:** 72", "72"),
        ("**Answer**: 72 clips", "72"),
        ("3. We add them up.\n4. Answer: 72", "72"),
        ("Answer:\n\n**72**", "72"),
        ("ANSWER: $28.00", "28"),
        ("The final answer is: $72$", "72"),
        ("The answer to the question is 72.", "72"),
        ("The correct answer would be 72 clips.", "72"),
        ("This is not the correct answer. We try again: 3 * 24 = 72", "72"),
        ("The answer is not 71, so we count again and find 72", "72"),
        ("The answer is \\boxed{72}.", "72"),
        ("The answer is:\n\\[ \\boxed{72} \\]\nas 3 * 24 is.", "72"),
        ("<answer> 72 </answer> as 3 * 24 is", "72"),
        ("#### 71\nI was wrong. #### 72", "72"),
        ("A: 71\nI was wrong.\n#### 72", "72"),
        ("\\boxed{71} is wrong\n#### 72", "72"),
        ("#### 71\nI was wrong.\nA: 72", "72"),
        ("Answer: 72\n\nThis answer is correct because I counted 3 times.", "72"),
        ("**Answer:** 2 \n\nShe eats 42 of them, so 42 / 3 = 14 do.", "2"),
        ("#### Step 1: count\n48/2 = 24\n#### Step 2: add\n48+24 = 72\n#### Step 3: say so\nShe sold 72.", "72"),
        ("#### 1. Count\n24\n#### 2. Add\n48+24 = 72 clips", "72"),
        ("Step 1. She sold **72** clips", "72"),
        # the number
        ("72 km", "72"),
        ("72 km^2", "72"),
        ("#### 72 clips in 2 months", "72"),
        ("#### $1,234.50", "1234.5"),
        (r"\boxed{\$1{,}072}", "1072"),
        (r"\boxed{1\,072}", "1072"),
        (r"\boxed{72\%}", "72"),
        (r"\boxed{72 \text{ km}^2}", "72"),
        (r"\boxed{\text{72 clips}}", "72"),
        (r"\boxed{-\frac{3}{4}}", "-0.75"),
        (r"\boxed{3\frac{1}{2}}", "3.5"),
        ("costs \\$72", "72"),
        ("It costs $.20", "0.2"),
        ("A: -$5", "-5"),
        ("A: $-5", "-5"),
        ("A: \u22125", "-5"),
        ("it fell to -5 degrees", "-5"),
        ("- 72 clips", "72"),  # a bullet, no sign
        ("12 - 5", None),
        ("She has 12 and gives 5 away: 12 -5 = 7", "7"),
        ("3 1/2 cups", "3.5"),
        ("-3 1/2", "-3.5"),
        ("3½", "3.5"),
        ("1/2 of it", "0.5"),
        ("2 40/4 = 10", "10"),
        ("72.00.", "72"),
        ("007", "7"),
        ("=72", "72"),
        ("x = 72 is the answer", "72"),
        ("The answer is 3 * 24 = 72 clips, 2 more than 70", "72"),
        # no number
        ("**Answer:** *Unknown.*", None),
        ("The 3 of them: the answer is unknown", None),
        ("It has 72 of them. End with `#### ` and the answer.", None),  # a prompt, said back
        ("3/0", None),
        ("", None),
        ("\u0667\u0662", None),  # Python would read these digits, too
    ],
)
def test_forms(completion, value):
    assert parse_number(completion) == (None if value is None else Fraction(value))


@pytest.mark.parametrize(
    "spam",
    [
        "72 72 72",
        "72\n72",
        "1 2 3 4 72",
        "71, 72",
        "71 or 72",
        "$71 / $72; $72",
        "#### 71 72",
        "#### 72, 73, 74",
        "#### 72 or 73",
        r"\boxed{71, 72}",
        "The answer is 72, 73 or 74.",
        "#### 72\n#### 72\n#### 72",
        "#### 70 #### 71 #### 72",
        r"\boxed{72}" * 3,
        "The answer is 71. The answer is 73. The answer is 72.",
        "A: 71\nA: 70\nA: 72",
        "<answer>72</answer>" * 3,
    ],
)
def test_several_answers_are_no_answer(spam):
    assert parse_number(spam) is None
    assert numeric_answer(completions=[spam], answer=["72"]) == [0.0]


@pytest.mark.parametrize(
    "solution", ["48/2 = 24\n48 + 24 = 72", "48 in April, 24 in May: 72", "48/2 → 24\n48+24 → 72", "#### 71\n#### 72"]
)
def test_a_worked_solution_is_no_spam(solution):
    assert parse_number(solution) == 72


def test_final_answers_are_text():
    assert final_answer("It rains.\n#### blue whale ") == "blue whale"
    assert final_answer("So the answer is: **green**") == "green**"
    assert final_answer("<answer>green</answer>") == "green"
    assert final_answer("A: 1\nB: 2") == "1"
    assert final_answer("The Answer: The answer is no") == "no"


def test_tags():
    assert tagged_answer("<answer>1</answer> or <answer> 2 < 3 </answer>.") == "2 < 3"
    assert tagged_answer(" 1 </answer>") == "1 </answer>" and tagged_answer("<answer> 1") == "<answer> 1"


@pytest.mark.parametrize(
    "piece",
    ["1", "1,", ",111", "1 ", "1/", "1.", "-", "#", "#### ", "####\n", r"\boxed{", r"\boxed{1", "{", "answer: ", "answer:\n",
     "answer to ", "answer*", "A:\n", "<answer>", "<answer>1", "</answer>", r"\frac{", r"\text{1", "\n", " ", "$", "*"],
)  # fmt: skip
def test_hostile_text_is_read_in_linear_time(piece):
    text = piece * (100_000 // len(piece))
    start = time.process_time()
    parse_number(text), parse_number(f"answer:{text}"), final_answer(text), tagged_answer(text)
    assert time.process_time() - start < 2
