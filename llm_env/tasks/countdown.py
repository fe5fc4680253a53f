"""Countdown task: reach a target number with + - * / and parentheses."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import Any

from typing_extensions import Unpack

from llm_env.arguments import as_int, check_int
from llm_env.prompts import PromptSource, Row
from llm_env.pupil import PUPIL
from llm_env.rewards.answers import THINK_TAGS, Texts, ThinkTags, answer_texts, tagged_answer
from llm_env.rules import TaskOptions

TEMPLATE = "Use each of {numbers} exactly once, with + - * / and parentheses, to make {target}.\n"
TEMPLATE_AT_MOST_ONCE = "Use any of {numbers}, each at most once, with + - * / and parentheses, to make {target}.\n"
LONGEST_ANSWER = 1000  # characters; an expression over ten numbers has about 100

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_NODES: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_EXPRESSION = re.compile(r"[-0-9+*/()\s]*")


class CountdownProblems(PromptSource):
    """Countdown problems, each with at least one solution.

    The target of a row is the value of a random expression over all of its numbers. All intermediate results of this expression
    are integers; those of an answer may be fractions. Row `i` depends only on `seed` and `i`. The numbers are in ascending
    order, so a problem has only one text and cannot be in both splits.

    Columns: `numbers` (list of int), `target` (int), `solution` (an expression).

    Args:
        size: number of rows, default 2000.
        count: how many numbers a row has: an int, or the minimum and maximum.
        smallest, largest: range of the numbers, inclusive.
        largest_target: the largest target; the smallest is 1.
        seed: seed of the problems.
        template: template of the prompt; `{numbers}` and `{target}` are replaced by the row's values.

    Raises:
        ValueError: If an argument is out of range, or no random expression in 100,000 reaches a valid target.
    """

    def __init__(
        self,
        size: int = 2_000,
        count: int | Sequence[int] = (3, 4),
        smallest: int = 1,
        largest: int = 99,
        largest_target: int = 100,
        seed: int = 0,
        template: str = TEMPLATE,
    ) -> None:
        counts = [as_int(n) or 0 for n in (count if isinstance(count, (list, tuple)) else [count, count])]
        if len(counts) != 2 or not 2 <= counts[0] <= counts[1]:
            raise ValueError(f"count={count!r} must be at least 2, or two such numbers, the least and the most")
        self.least, self.most = counts
        self.smallest = check_int("smallest", smallest, 0)
        self.largest = check_int("largest", largest, self.smallest)
        self.largest_target = check_int("largest_target", largest_target, 1)
        self.size, self.seed, self.template = check_int("size", size, 1), seed, template
        self._rows: dict[int, Row] = {}
        self[0]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.size:
            raise IndexError(f"row {index} of {self.size}")
        if index not in self._rows:
            self._rows[index] = self._make(index)
        return self._rows[index]

    def _make(self, index: int) -> Row:
        random = Random(f"countdown {self.seed} {index}")
        count = random.randint(self.least, self.most)
        for _ in range(100_000):
            numbers = sorted(random.randint(self.smallest, self.largest) for _ in range(count))
            target, solution = _random_expression(numbers, random)
            if target is not None and 1 <= target <= self.largest_target:
                prompt = self.prompt(numbers, target)
                return {"prompt": prompt, "numbers": numbers, "target": target, "solution": solution}
        raise ValueError(
            f"hardly any {count} numbers from {self.smallest} to {self.largest} make a target of at most "
            f"{self.largest_target}; raise largest_target, or widen the range of the numbers"
        )

    def prompt(self, numbers: Sequence[int], target: int) -> str:
        """Return the text of the prompt."""
        return self.template.replace("{numbers}", ", ".join(map(str, numbers))).replace("{target}", str(target))


def _random_expression(numbers: Sequence[int], random: Random) -> tuple[int | None, str]:
    """Return the value and the text of a random expression over all numbers.

    The value is None if a division in the expression is not exact.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        (left, left_text), (right, right_text) = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        sign = random.choice("+-*/")
        if sign == "/" and (right == 0 or left % right):
            return None, ""
        value = left // right if sign == "/" else _OPERATIONS[sign](left, right)
        text = f"{left_text}{sign}{right_text}"
        parts.append((value, f"({text})" if parts else text))
    return parts[0]


def evaluate(expression: str) -> Fraction | None:
    """Evaluate an expression of integers, + - * / and parentheses exactly.

    Returns None for any other expression and for a division by 0. Signs before a number, powers and decimals are not allowed.
    Neither are more than `LONGEST_ANSWER` characters or 200 nested parentheses (the limit of Python's parser).

    >>> evaluate("(1 + 2) * 3 / 2"), evaluate("-1"), evaluate("2**3"), evaluate("1/0")
    (Fraction(9, 2), None, None, None)
    """
    if len(expression) > LONGEST_ANSWER or not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(" ".join(expression.split()), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
        left, right = _value(node.left), _value(node.right)
        return None if left is None or right is None else _OPERATIONS[_NODES[type(node.op)]](left, right)
    return None


def _scores(texts: list[str], numbers: list[list[int]], target: list[int], at_most_once: bool) -> list[float]:
    return [float(_solves(*row, at_most_once)) for row in zip(texts, numbers, target, strict=True)]


def _solves(text: str, numbers: Sequence[int], target: int, at_most_once: bool) -> bool:
    answer = tagged_answer(text, ())
    if len(answer) > LONGEST_ANSWER:
        return False
    expression, equals, right = answer.partition("=")
    if equals and right.strip() != str(target):
        return False
    # Compare numbers as text: 07 is not 7, and numbers of 1000 digits are never converted to int.
    used, given = Counter(re.findall(r"[0-9]+", expression)), Counter(map(str, numbers))
    if not (used <= given if at_most_once else used == given):
        return False
    return evaluate(expression) == target


def countdown(
    completions: Texts,
    numbers: list[list[int]],
    target: list[int],
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    prompt_texts: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """Return 1.0 for an expression that uses all numbers and equals the target.

    All other answers get 0.0. Every number must be used exactly once. The answer is the content of the last
    `<answer>...</answer>`, or the whole completion if there are no tags. Thoughts are removed first. The expression may be
    followed by `= target`.

    The rules are stricter than TinyZero's (github.com/Jiayi-Pan/TinyZero):

    - The expression is parsed, not evaluated by Python.
    - The value must be exact; TinyZero allows a difference of 1e-5.
    - Powers, decimals and signs are not allowed.
    - There is no reward for the format alone.

    Args:
        completions: B texts or lists of chat messages.
        numbers: B lists of the numbers to use.
        target: B targets.
        prompts: B prompts. If a prompt ends with an opening think tag, its completion begins inside the thought.
        think_tags: a pair of opening and closing tag, or several pairs; see `llm_env.rewards.answers.strip_thoughts`.
        prompt_texts: B rendered prompts, as the model reads them; used instead of `prompts` if given.

    Returns:
        B rewards.

    >>> countdown(completions=["(3+5)*2", "(3+5)*2 = 16", "3+5+8"], numbers=[[2, 3, 5]] * 3, target=[16] * 3)
    [1.0, 1.0, 0.0]
    """
    return _scores(answer_texts(completions, prompts, think_tags, prompt_texts), numbers, target, at_most_once=False)


def countdown_at_most_once(
    completions: Texts,
    numbers: list[list[int]],
    target: list[int],
    prompts: Texts | None = None,
    think_tags: ThinkTags = THINK_TAGS,
    prompt_texts: Sequence[str] | None = None,
    **_: Any,
) -> list[float]:
    """Return 1.0 for an expression that equals the target; numbers may be unused.

    Every number may be used at most once. The other rules are those of `countdown`.

    >>> countdown_at_most_once(completions=["3+5", "3+5+3"], numbers=[[2, 3, 5], [2, 3, 5]], target=[8, 11])
    [1.0, 0.0]
    """
    return _scores(answer_texts(completions, prompts, think_tags, prompt_texts), numbers, target, at_most_once=True)


def countdown_task(
    split: str | None = "train",
    size: int = 2_000,
    count: int | Sequence[int] = (3, 4),
    smallest: int = 1,
    largest: int = 99,
    largest_target: int = 100,
    seed: int = 0,
    at_most_once: bool = False,
    template: str | None = None,
    **overrides: Unpack[TaskOptions],
) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/Countdown-v0`.

    Args:
        split: `"train"`, `"test"` (about 10% of the problems, chosen by a hash of their text) or None for all problems.
        size: number of problems in both splits together, default 2000.
        count: how many numbers a problem has: an int, or the minimum and maximum.
        smallest: the smallest number.
        largest: the largest number.
        largest_target: the largest target; the smallest is 1.
        seed: seed of the problems.
        at_most_once: whether numbers may be unused. The default prompt then says so.
        template: template of the prompt; `{numbers}` and `{target}` are replaced. None uses the default prompt.
        overrides: arguments of `TextGenerationEnv` that override those of the task.
    """
    text = template or (TEMPLATE_AT_MOST_ONCE if at_most_once else TEMPLATE)
    problems = CountdownProblems(size, count, smallest, largest, largest_target, seed, text)
    reward = countdown_at_most_once if at_most_once else countdown
    defaults: dict[str, Any] = {
        "prompts": problems,
        "reward": reward,
        "tokenizer": PUPIL,
        "split": split,
        "success": reward.__name__,
        "max_prompt_tokens": len(problems.prompt([largest] * problems.most, largest_target)),  # at most 1 token per character
        "max_new_tokens": max(64, (len(str(largest)) + 3) * problems.most),
    }
    return {**defaults, **overrides}
