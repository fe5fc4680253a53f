"""Reading final answers: the forms seen in the output of language models, and the forms that must not pay."""

import time
from fractions import Fraction

import pytest

from llm_env.rewards import exact_match, numeric_answer
from llm_env.rewards.answers import (
    THINK_TAGS,
    answer_text,
    answer_texts,
    completion_text,
    final_answer,
    parse_number,
    strip_thoughts,
    tagged_answer,
)


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
        "72\n\\frac{1}{2}",
        "1 2 3 4 72",
        "71, 72",
        "71 or 72",
        "$71 / $72; $72",
        "#### 71 72",
        "#### 72, 73, 74",
        "#### 72 or 73",
        r"\boxed{71, 72}",
        "The answer is 72, 73 or 74.",
        "#### 70 #### 71 #### 72",
        "The answer is 71. The answer is 73. The answer is 72.",
        r"\boxed{71} \boxed{72} \boxed{71} \boxed{72}",
        r"\boxed{72} \boxed{71} \boxed{72}",
        r"\boxed{72}" * 11,  # no solution any more
        "<answer>71</answer><answer>72</answer><answer>73</answer>",
        "The answer is 72 or 73 clips.",
        "The answer is x = 72 or x = 73.",
        r"\boxed{x = 71, y = 72}",
        r"\boxed{72 \text{ or } 73}",
        r"\boxed{70 \pm 2}",
        "The answer is 70 to 72 clips.",
        "between 71 and 72",
        "A: 71\nA: 70\nA: 72",
    ],
)
def test_several_answers_are_no_answer(spam):
    assert parse_number(spam) is None
    assert numeric_answer(completions=[spam], answer=["72"]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{72}" * 3,
        r"So \boxed{72}. Check: \boxed{72.0}." + "\n" + r"**Final Answer** \boxed{\frac{144}{2}}",
        "#### 72\n" * 10,
        "<answer>72</answer> <answer>72.0</answer> <answer>$72</answer>",
        "The answer is 72. Yes, the answer is 72. So the answer: 72",
        "A: 71\nNo. A: 71 was wrong.\nA: 72\nA: 72",  # two answers; the last counts
        "The answer is 72 or 72.0 clips",
    ],
)
def test_repeats_of_an_equal_answer_are_one_answer(text):
    assert parse_number(text) == 72


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


# --- numbers ----------------------------------------------------------------------------------------------------------

TEN = 10**8
READ = [
    # scientific notation and powers
    ("1e-05", Fraction(1, 100_000)),
    ("2e3", 2000),
    ("1.5E+10", 15 * 10**9),
    ("-1e-3", Fraction(-1, 1000)),
    ("1e16", 10**16),
    ("0.00001", Fraction(1, 100_000)),
    (r"3 \times 10^8", 3 * TEN),
    (r"3\cdot10^{8}", 3 * TEN),
    ("3 × 10^{-4}", Fraction(3, 10_000)),
    ("3 × 10⁸", 3 * TEN),
    ("3 x 10^8 m/s", 3 * TEN),
    ("3*10**8", 3 * TEN),
    ("10^6", 10**6),
    ("10^{-3}", Fraction(1, 1000)),
    ("2^10", 1024),
    ("5 million", 5 * 10**6),
    ("$1.5 billion", 1_500_000_000),
    # LaTeX fractions
    (r"\frac12", Fraction(1, 2)),
    (r"\tfrac 1 2", Fraction(1, 2)),
    (r"\dfrac{1}{2}", Fraction(1, 2)),
    (r"\frac{1}2", Fraction(1, 2)),
    (r"\frac1{12}", Fraction(1, 12)),
    (r"-\frac{3}{4}", Fraction(-3, 4)),
    (r"\frac{-3}{4}", Fraction(-3, 4)),
    (r"3\frac12", Fraction(7, 2)),
    ("⅔", Fraction(2, 3)),
    ("2⅔ cups", Fraction(8, 3)),
    # units and words
    ("72 clips", 72),
    ("72clips", 72),
    ("18 dollars", 18),
    ("5 km/h", 5),
    ("$5/hour", 5),
    ("5kg", 5),
    ("5 m", 5),
    ("20 cm^2", 20),
    ("20 cm²", 20),
    (r"20\text{ cm}^2", 20),
    (r"20\,\mathrm{cm}^{2}", 20),
    ("5 square feet", 5),
    ("5 x-rays", 5),
    ("3 tan dogs", 3),
    ("5 e-mails", 5),
    (r"72 \frac{\text{km}}{\text{h}}", 72),
    (r"\displaystyle\frac{1}{2}", Fraction(1, 2)),
    (r"72\quad\text{clips}", 72),
    ("5 times", 5),
    ("5-day trip", 5),
    ("90°", 90),
    (r"90^\circ", 90),
    ("25 °C", 25),
    ("50 percent", 50),
    ("7:00 pm", 7),
    (r"\left(72\right)", 72),
    # signs
    ("\u20135", -5),
    ("\u22125", -5),
    ("\u20105", -5),
    ("\u20115", -5),
    ("negative 5", -5),
    ("(-5)", -5),
    ("$-5$", -5),
    ("-3 1/2", Fraction(-7, 2)),
    # explanations
    ("18 (3 + 4 = 7)", 18),
    ("18 [9 * 2 = 18]", 18),
    ("3+4 = 7", 7),
    ("5! = 120", 120),
    ("x = 72", 72),
]
EXPLAINED = [
    ("The answer is 18 (3 + 4 = 7).", 18),
    ("The answer is 18: 9 * 3 = 27 was too much.", 18),
    ("The answer is 18 as 20 - 2 = 18, not 17.", 18),
    ("The answer is 12 when x = 3.", 12),
    ("The answer is 12 for x = 3", 12),
    ("The answer is eighteen (18).", 18),
    ("Answer: **72** (seventy-two, or 70 + 2)", 72),
    ("It is 18 (3+4=7).", 18),
    ("Answer (in dollars): 72", 72),
    ("The CO2 saved is 72 kg", 72),
    ("The answer is 22/7 ≈ 3.14", Fraction(22, 7)),
    (r"\boxed{2\sqrt{3} \approx 3.46}", Fraction(346, 100)),
    ("f(3) = 7", 7),
    ("log 100 = 2", 2),
]


@pytest.mark.parametrize(("text", "value"), READ)
def test_a_number_is_read_alone_behind_a_mark_and_in_a_box(text, value):
    for completion in (text, f"The answer is {text}.", f"#### {text}", rf"So \boxed{{{text}}} it is."):
        assert parse_number(completion) == value, completion


@pytest.mark.parametrize(("text", "value"), EXPLAINED)
def test_what_explains_a_number_does_not_replace_it(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        r"2\sqrt{3}", r"2\sqrt3", r"2 \sqrt{3}", "2√3", "√2", r"\sqrt{16}", "sqrt(16)",
        r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{3}}{2}",
        r"3\pi", r"3 \pi", "3π", "3 pi", "3pi", r"\frac{\pi}{2}", r"\frac{3\pi}{4}", "3/4π", r"\frac{10}{3}\pi",
        "x^2+1", "x² + 1", "2x", "2x + 3", "y = 2x + 3",
        "3n", "3a", "3xy", "x/2", "5/x", "x - 5", "2^n", "n^2 + 3", r"\frac{x}{2}",
        "5! ", "log 5", r"\log_{10} 5", r"\ln 2", r"3\ln 2", r"\sin 30^\circ", "log(5)", "f(5)", r"\binom{5}{2}",
        "2e", "e^2", "2e^3",
        "3+4", "3 + 4", "3 * 4", "3 × 4", r"3 \times 4", "3 x 4", "3 times 4", "3 plus 4", "7 minus 5", "12 - 5",
        "2(3+4)", "(3)(4)",
        "5 apples + 3 apples", "3+2i", "5i", "(-2)^3", "101_2", r"0.\overline{3}", "5 mod 7", r"5 \pmod 7",
        "3 log x", "3 tan(x)", "5 choose 2",
        "10\u201315", "10\u201315 dollars", "10-15", "10 - 15 dollars", "3:30", "3:1", "1,2", "12,34", "3.4.5",
        "2024-11-25", "1/2/3",
        "±5", r"\pm 5", "|-5|", "x > 5", "x < 5", "x>5", r"x \ge 5", "(5, 6)", r"[5, \infty)", r"(-\infty, 5]",
        r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        "nan", "inf", "Infinity", "1e999999999", "1e-99999", "10^999999", "99999999999^999", "9" * 5000,
        "1e5x", "3/0", "2 40/4",
    ],
)  # fmt: skip
def test_a_text_that_contains_a_number_is_not_that_number(text):
    sentence = f"The answer is {text}" + ("ways" if text == "5! " else "")  # "The answer is 5!" is a sentence
    for completion in (text, sentence, f"#### {text}", rf"So \boxed{{{text}}} it is."):
        assert parse_number(completion) is None, completion
    with pytest.raises(ValueError, match="ends in no number"):
        numeric_answer(completions=["5"], answer=[text])


@pytest.mark.parametrize("text", ["The answer is 5!", "**The answer is 5!**", "The answer is 5! Well done.", "Answer: 5!!"])
def test_a_sentence_may_end_with_an_exclamation_mark(text):
    assert parse_number(text) == 5


# --- thoughts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "value"),
    [
        ("<think>So the answer is 7? No, 3+5=8.</think>\n\n8", 8),
        ("<think>Perhaps the answer is 5. Or the answer is 6. Then the answer is 7.</think>\n\\boxed{8}", 8),
        ("Perhaps \\boxed{7}, or \\boxed{6}, or \\boxed{5}.</think>It is 8", 8),  # the template opened the thought
        ("<think>7</think>6<think>5</think>8", 8),
        ("<think>outer <think>7</think> 6</think> 8", 8),
        ("<think>\\boxed{8}", None),
        ("<think>\\boxed{8}</think>", None),
        ("<think>7</think> Hm. <think>\\boxed{8}", None),
        ("It is 8. <think>Or the answer is 7", 8),
        ("8</think>", None),
    ],
)
def test_thoughts_are_no_answers(completion, value):
    assert parse_number(completion) == value
    for opening, closing in THINK_TAGS:
        assert parse_number(completion.replace("<think>", opening).replace("</think>", closing)) == value


def test_think_tags_are_configurable():
    text = "<plan>7</plan>8"
    assert strip_thoughts(text) == text and strip_thoughts("<think>7</think>8", ()) == "<think>7</think>8"
    for tags in (("<plan>", "</plan>"), ["<plan>", "</plan>"], [("<think>", "</think>"), ("<plan>", "</plan>")]):
        assert strip_thoughts(text, tags) == tagged_answer(text, tags) == final_answer(text, tags) == "8"
        assert parse_number(text, tags) == 8
    always = ("", "</think>")  # the prompt opens the thought
    assert strip_thoughts("7</think>8", always) == "8" and strip_thoughts("It is 8", always) == ""
    for tags in (("<plan>",), ("<plan>", ""), ("a", "b", "c"), "<plan>", [("<plan>", None)], ["<plan>", ("a", "b")]):
        with pytest.raises(ValueError, match=r"think_tags=.* must be \(opening, closing\) tag"):
            strip_thoughts(text, tags)


def test_a_prompt_that_opens_a_thought():
    for prompt in ("<think>", "<|im_start|>assistant\n<think>\n", [{"role": "assistant", "content": "<think>\n"}]):
        assert answer_text("It is 8", prompt) == "" and answer_text("7</think>8", prompt) == "8"
    for prompt in (None, "", "Use <think> and </think>.", [], [{"role": "user", "content": "End with <think>"}]):
        assert answer_text("It is 8", prompt) == "It is 8"
    assert answer_texts(["7", "8"], ["<think>", ""]) == ["", "8"] and answer_texts(["7", "8"]) == ["7", "8"]
    with pytest.raises(ValueError, match="zip"):
        answer_texts(["7", "8"], ["<think>"])


# --- chats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "assistant", "content": "72"}], "72"),
        ([{"content": "72"}], "72"),
        (
            [{"role": "assistant", "content": "71"}, {"role": "tool", "content": "73"}, {"role": "assistant", "content": "72"}],
            "72",
        ),
        ([{"role": "assistant", "content": "71"}, {"role": "tool", "content": "72"}], "71"),
        ([{"role": "user", "content": "72"}], ""),
        ([], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant"}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "7"}, {"type": "image"}, "2"]}], "72"),
    ],
)
def test_of_a_chat_the_last_assistant_message_counts(messages, text):
    assert completion_text(messages) == completion_text(tuple(messages)) == text


def test_what_is_neither_text_nor_a_chat_is_refused():
    for completion in (72, None, {"role": "assistant", "content": "72"}, ["72"]):
        with pytest.raises(TypeError, match="must be a str or a list of messages"):
            completion_text(completion)
    with pytest.raises(TypeError, match="message content 72 must be"):
        completion_text([{"role": "assistant", "content": 72}])


# --- hostile text -----------------------------------------------------------------------------------------------------


def work(text):
    """Seconds of the processor, the least of two."""
    times = []
    for _ in range(2):
        start = time.process_time()
        parse_number(text), parse_number(f"answer:{text}")
        final_answer(text), tagged_answer(text)
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(
    "piece",
    ["1", "1,", ",111", "1 ", "1/", "1.", "-", "#", "#### ", "####\n", r"\boxed{", r"\boxed{1", "{", "answer: ", "answer:\n",
     "answer to ", "answer*", "A:\n", "<answer>", "<answer>1", "</answer>", r"\frac{", r"\text{1", "\n", " ", "$", "*",
     "<think>", "</think>", "<think>1</think>", "1e", "1^", "9^999 ", "1e1", "\\", "\\\\ ", "(", " (1", " (a) 1", "1 or ",
     "=1", "1 ≈ ", "1 when ", "when ", "x = ", "log ", "1 a ", "1a+", "√", "²", "}", "][", "[THINK]", "1:", "1 - ",
     "\\left", "1 million ", "#### 1\n"],
)  # fmt: skip
def test_hostile_text_is_read_in_linear_time(piece):
    short, long = (work(piece * (length // len(piece))) for length in (2_000, 20_000))
    assert long < 30 * short + 0.05  # ten times the text: 10 when linear, 100 when quadratic


def test_nested_boxes_are_read_in_linear_time():
    short, long = (work(r"\boxed{" * n + "1" + "}" * n) for n in (400, 4_000))
    assert long < 30 * short + 0.05
    assert parse_number(r"\boxed{\boxed{72}}") == 72


# --- signs, lines and what is more than a number ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{- 5}", -5),
        (r"\boxed{x = - 5}", -5),
        ("3 - 8 = - 5", -5),
        ("#### - 5", -5),
        (r"\boxed{- \frac{1}{2}}", Fraction(-1, 2)),
        (r"\boxed{-(5)}", -5),
        (r"\boxed{-{5}}", -5),
        (r"\boxed{-\left(5\right)}", -5),
        (r"\boxed{-\ 5}", -5),
        ("-½", Fraction(-1, 2)),
        (r"\boxed{-½}", Fraction(-1, 2)),
        ("<answer>- 7</answer>", -7),
        ("The answer is - 7.", -7),
        ("8 - 3 = 5", 5),
        ("We need 8 - 5 = 3 more.", 3),
        ("Therefore\n42", 42),
        ("Final Answer\n42", 42),
        ("### Answer\n8", 8),
        ("Total\n72", 72),
        ("Step 2:\n8", 8),
        ("sum +\n8", 8),
        (r"\boxed{1.5 \text{ million}}", 1_500_000),
        ("1.5 Million", 1_500_000),
    ],
)
def test_signs_and_lines(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "1+i", "x=1, y=2", "AB = 5, BC = 6", "> 5", "x in {1,2}", "2 hours 30 minutes",
        r"\boxed{\text{No solution for } x = 5}", r"\boxed{\mathbb{R} \setminus \{5\}}", r"\boxed{x \in \{1, 2\}}",
        r"\boxed{5\text{i}}",
    ],
)  # fmt: skip
def test_what_only_contains_a_number_answers_with_none(text):
    assert parse_number(text) is None
    with pytest.raises(ValueError, match="ends in no number"):
        numeric_answer(completions=["5"], answer=[text])


def test_a_denied_answer_answers_nothing():
    assert parse_number("The answer is not 8.") is None


def test_golds_of_thousands_of_digits():
    big = 10**5000
    assert numeric_answer(completions=["5"], answer=[10**4000]) == [0.0]
    with pytest.raises(ValueError, match="digits"):
        exact_match(completions=["5"], answer=[big])


@pytest.mark.parametrize("verifier", [numeric_answer, exact_match])
def test_a_thought_that_the_template_opens_is_known_from_the_rendered_prompt(verifier):
    chat = [[{"role": "user", "content": "2+6"}]] * 3
    said = [[{"role": "assistant", "content": text}] for text in ("8", "7?</think>8", "8")]
    texts = ["...assistant\n<think>\n"] * 2 + ["...assistant\n"]
    assert verifier(completions=said, answer=["8"] * 3, prompts=chat, prompt_texts=texts) == [0.0, 1.0, 1.0]
