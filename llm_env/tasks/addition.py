"""Addition task: the prompt `12+34=` has the answer `46`."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from llm_env.arguments import check_int
from llm_env.prompts import PromptSource, Row
from llm_env.pupil import PUPIL
from llm_env.rewards import exact_match
from llm_env.rules import TaskOptions


class AdditionProblems(PromptSource):
    """Prompts `a+b=` for all a and b from 0 to `largest`.

    The sum is in the column `answer`. The row of `a+b=` is `a * (largest + 1) + b`.

    Args:
        largest: the largest summand, default 99.
    """

    def __init__(self, largest: int = 99) -> None:
        self.largest = check_int("largest", largest, 0)

    def __len__(self) -> int:
        return (self.largest + 1) ** 2

    def __getitem__(self, index: int) -> Row:
        a, b = divmod(index, self.largest + 1)
        return {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def addition(split: str | None = "train", largest: int = 99, **overrides: Unpack[TaskOptions]) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/Addition-v0`.

    Args:
        split: `"train"`, `"test"` (about 10% of the problems, chosen by a hash of their text) or None for all problems.
        largest: the largest summand, default 99.
        overrides: arguments of `TextGenerationEnv` that override those of the task.
    """
    problems = AdditionProblems(largest)
    digits = len(str(2 * largest))
    defaults: dict[str, Any] = {
        "prompts": problems,
        "reward": exact_match,
        "tokenizer": PUPIL,
        "split": split,
        "success": "exact_match",
        "max_prompt_tokens": 2 * len(str(largest)) + 2,
        "max_new_tokens": digits + 1,
    }
    return {**defaults, **overrides}
