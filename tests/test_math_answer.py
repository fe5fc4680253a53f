"""`math_answer`: what Math-Verify finds equal, a time-out that ends the work, in any thread."""

import copy
import functools
import multiprocessing
import pickle
import sys
import threading

import pytest

from llm_env import PUPIL, TextGenerationEnv
from llm_env.rewards import math_answer
from llm_env.rewards.math_verifier import math_gold, math_verifier

CASES = [  # completion, reference, score
    (r"So $x = \boxed{\sqrt{12}}$.", r"2\sqrt{3}", 1.0),
    (r"\boxed{2\sqrt{3}}", r"$2\sqrt{3}$", 1.0),
    (r"\boxed{2}", r"2\sqrt{3}", 0.0),
    (r"\boxed{\frac{1}{2}}", 0.5, 1.0),
    (r"\boxed{0.00001}", 1e-05, 1.0),
    (r"\boxed{5}", 1e-05, 0.0),
    (r"The answer is $\{2, 1\}$", r"\{1,2\}", 1.0),
    (r"\boxed{(1,2)}", "(1,2)", 1.0),
    (r"\boxed{[1,2]}", "(1,2)", 0.0),
    (r"\boxed{1+x^2}", "x^2+1", 1.0),
    (r"\boxed{x^2-1}", "x^2+1", 0.0),
    ("18", "She makes 9 * 2 = $<<9*2=18>>18.\n#### 18", 1.0),
    (r"\boxed{18\text{ dollars}}", "#### 18", 1.0),
    (r"\boxed{1,072}", "1,072 clips", 1.0),
    ("no idea", "18", 0.0),
    ("", "18", 0.0),
    (r"\boxed{\frac{", "18", 0.0),
    (r"<think>\boxed{17}</think>\boxed{18}", "18", 1.0),
    (r"<think>\boxed{18}", "18", 0.0),
    ([{"role": "assistant", "content": r"\boxed{18}"}], "18", 1.0),
    ([{"role": "assistant", "content": r"\boxed{17}"}, {"role": "user", "content": r"\boxed{18}"}], "18", 0.0),
]


def test_golds_are_given_to_math_verify_whole():
    assert math_gold(r"\frac{1}{3}") == "$1/3$" and math_gold(r"$\frac{1}{3}$") == r"$\frac{1}{3}$"
    assert math_gold("x") == "$x$" and math_gold("Monday") == "Monday" and math_gold("") == ""
    assert math_gold("50%") == "$50%$"  # Math-Verify has a reading of its own
    assert math_gold(r"So it is \boxed{x^2}") == r"So it is \boxed{x^2}"
    assert math_gold("<think>7</think> #### $18") == "$18"
    assert math_gold("<plan>7</plan>8", ("<plan>", "</plan>")) == "$8$"


def test_without_the_package(monkeypatch):
    math_verifier.cache_clear()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r'pip install "llm-env\[math\]"'):
        math_answer(completions=["1"], answer=["1"])


@pytest.fixture(scope="module")
def reward():
    """The pool of a time-out of its own, whose processes end with these tests."""
    pytest.importorskip("math_verify")
    yield functools.partial(math_answer, timeout=8.0)
    math_verifier(8.0).close()


def test_scores(reward):
    completions, answers, expected = zip(*CASES, strict=True)
    assert reward(completions=list(completions), answer=list(answers)) == list(expected)
    begun = ["<think>\n"] * 2
    assert reward(completions=[r"\boxed{18}", r"17</think>\boxed{18}"], answer=[18, 18], prompts=begun) == [0.0, 1.0]


def test_a_gold_that_parses_to_nothing_is_named(reward):
    for gold in ("no mathematics", ""):
        with pytest.raises(ValueError, match=f"holds {gold!r}, in which math-verify finds no mathematical expression"):
            reward(completions=["1", "1"], answer=["1", gold])


def test_the_timeout_ends_the_work_outside_the_main_thread(reward):
    reward(completions=["1", "1"], answer=["1", "1"])
    before = {process.pid for process in multiprocessing.active_children()}
    scores = []
    completions = [r"$9^{9^{9^{9^{9}}}}$", r"\boxed{5}"]
    thread = threading.Thread(target=lambda: scores.extend(reward(completions=completions, answer=["5", "5"])))
    thread.start()
    thread.join()
    assert scores == [0.0, 1.0]
    assert len(before - {process.pid for process in multiprocessing.active_children()}) == 1  # the process was killed


def test_it_is_a_reward_of_an_env_and_can_be_copied(reward):
    assert pickle.loads(pickle.dumps(math_answer)) is copy.deepcopy(math_answer) is math_answer
    for function in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        env = TextGenerationEnv([{"prompt": "1+1=", "answer": "2"}], function, PUPIL, max_new_tokens=2, success="math_answer")
        env.reset(seed=0)
        env.step(env.rules.tokenizer("2")["input_ids"][0])
        assert env.step(env.rules.eos_id)[1] == 1.0


@pytest.mark.parametrize(
    ("gold", "right", "wrong"),
    [
        ("x=1, y=2", r"\boxed{x=1, y=2}", r"\boxed{2}"),
        ("1+i", r"\boxed{1+i}", r"\boxed{1}"),
        (r"- \frac{1}{2}", r"\boxed{-\frac{1}{2}}", r"\boxed{\frac{1}{2}}"),
        (r"x \in [1,2]", r"\boxed{[1,2]}", r"\boxed{2}"),
        ("(a,b)=(1,2)", r"\boxed{(a,b)=(1,2)}", r"\boxed{2}"),
        (r"x=1 \text{ or } x=2", r"\boxed{x=1 \text{ or } x=2}", r"\boxed{2}"),
        (r"\mathbb{R}\setminus\{5\}", r"\boxed{\mathbb{R}\setminus\{5\}}", r"\boxed{5}"),
        ("- 5", r"\boxed{-5}", r"\boxed{5}"),
        ("5", r"\boxed{5.0}", r"\boxed{6}"),
    ],
)
def test_it_says_what_math_verify_says_of_the_whole_gold(reward, gold, right, wrong):
    from math_verify import parse, verify

    expected = [float(verify(parse(f"${gold}$"), parse(completion))) for completion in (right, wrong)]
    assert expected == [1.0, 0.0]  # of the package itself, in this process
    assert reward(completions=[right, wrong], answer=[gold] * 2) == expected
