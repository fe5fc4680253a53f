"""Reward functions that compare completions with the column `answer`.

All of them read a completion, text or chat messages, with `llm_env.rewards.answers.answer_text`, which removes thoughts. To use
other think tags, write `functools.partial(exact_match, think_tags=("<plan>", "</plan>"))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_env.rewards.answers import (
    THINK_TAGS,
    Texts,
    ThinkTags,
    answer_texts,
    final_answer,
    parse_gold,
    parse_number,
    reference_text,
)
from llm_env.rewards.math_verifier import math_gold, math_verifier


def exact_match(
    completions: Texts,
    answer: list[Any],
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    prompt_texts: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """Return 1.0 if a completion is exactly the reference's final answer, else 0.0.

    Thoughts and leading and trailing white space of the completion are ignored.

    Args:
        completions: B texts or lists of chat messages.
        answer: B references; their final answer (see `llm_env.rewards.answers.final_answer`) is compared as text.
        prompts: B prompts. If one ends with an opening think tag, its completion begins inside a thought.
        think_tags: (opening, closing) tag, or several such pairs; see `llm_env.rewards.answers.strip_thoughts`.
        prompt_texts: B prompts as the model reads them. If given, they are used instead of `prompts`.

    >>> exact_match(completions=["<think>40+6</think>46", "<think>46"], answer=["46", "46"])
    [1.0, 0.0]
    """
    golds = [final_answer(reference_text(reference), think_tags) for reference in answer]
    texts = answer_texts(completions, prompts, think_tags, prompt_texts)
    return [float(text.strip() == gold) for text, gold in zip(texts, golds, strict=True)]


def numeric_answer(
    completions: Texts,
    answer: list[Any],
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    prompt_texts: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    r"""Return 1.0 if a completion's numeric answer equals the reference's number, else 0.0.

    Values are compared exactly. `llm_env.rewards.answers.parse_number` describes which number of a text is its answer and which
    forms of numbers are accepted.

    Args:
        completions: B texts or lists of chat messages.
        answer: B numbers (int, float, NumPy, Fraction, Decimal), or texts whose answer is a number, such as solutions in
            GSM8K's form (`... #### 72`). A float stands for the decimal number that it prints as.
        prompts: B prompts. If one ends with an opening think tag, its completion begins inside a thought.
        think_tags: (opening, closing) tag, or several such pairs; see `llm_env.rewards.answers.strip_thoughts`.
        prompt_texts: B prompts as the model reads them. If given, they are used instead of `prompts`.

    Raises:
        ValueError: If a reference is not a number (a word, `2\sqrt{3}`, NaN, infinity), or has more digits than Python converts
            to text.

    >>> numeric_answer(completions=["She sold 1,072.00 clips.", "<think>5?</think> 0.00001"], answer=["... #### 1072", 1e-05])
    [1.0, 1.0]
    """
    golds = [parse_gold(reference, think_tags) for reference in answer]
    for reference, gold in zip(answer, golds, strict=True):
        if gold is None:
            raise ValueError(
                f"the column 'answer' holds {reference!r}, which ends in no number; try math_answer or exact_match"
            )
    texts = answer_texts(completions, prompts, think_tags, prompt_texts)
    return [float(parse_number(text, ()) == gold) for text, gold in zip(texts, golds, strict=True)]


def math_answer(
    completions: Texts,
    answer: list[Any],
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    timeout: float = 10.0,
    prompt_texts: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    r"""Return 1.0 if Math-Verify finds a completion equal to the reference, else 0.0.

    Use it for mathematical answers other than plain numbers: fractions, roots, sets, intervals, equations
    (github.com/huggingface/Math-Verify). Math-Verify extracts the answer from a completion: LaTeX in `$...$`, `\[...\]` or
    `\boxed{...}`, or a plain expression. A completion without an answer scores 0.0. So does one whose comparison exceeds the
    timeout.

    The comparison runs in worker processes, which are killed at the timeout, so it works in any thread. A script that uses
    this function must start its work under `if __name__ == "__main__":`.

    Args:
        completions: B texts or lists of chat messages.
        answer: B references: numbers, LaTeX with or without `$...$`, or solutions; see
            `llm_env.rewards.math_verifier.math_gold`.
        prompts: B prompts. If one ends with an opening think tag, its completion begins inside a thought.
        think_tags: (opening, closing) tag, or several such pairs; see `llm_env.rewards.answers.strip_thoughts`.
        timeout: seconds for one completion.
        prompt_texts: B prompts as the model reads them. If given, they are used instead of `prompts`.

    Raises:
        ImportError: If math-verify is not installed.
        ValueError: If math-verify finds no expression in a reference, or no worker process can be started.
    """
    texts = answer_texts(completions, prompts, think_tags, prompt_texts)
    golds = [math_gold(reference, think_tags) for reference in answer]
    scores = math_verifier(timeout)(completions=texts, golds=golds)
    for reference, score in zip(answer, scores, strict=True):
        if score is None:
            raise ValueError(f"the column 'answer' holds {reference!r}, in which math-verify finds no mathematical expression")
    return scores  # type: ignore[return-value]
