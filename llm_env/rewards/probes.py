"""Build test completions for reward functions: gold answers, and completions that must score lower."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_env.prompts import PromptTable, Row
from llm_env.rewards.answers import final_answer

Gold = str | Callable[[Row], Any] | None
GOLD_COLUMNS = ("solution", "answer")
REPEATS = 20  # repetitions in the check "answer repeated"
MANY = 64  # maximum number of answers in the check "all answers at once"


@dataclass
class Sample:
    """Completions and their prompts: entry i is a completion of prompt `indexes[i]` in the table."""

    indexes: list[int]
    completions: list[str]

    def take(self, order: Sequence[int]) -> Sample:
        """Return the entries `order`, in that order."""
        return Sample([self.indexes[i] for i in order], [self.completions[i] for i in order])


def known_answers(table: PromptTable, gold: Gold) -> dict[int, str]:
    """Return the gold completions, by prompt index, for all prompts that have one.

    Args:
        table: the env's prompts.
        gold: the name of a column, a function from a row to the completion, or None for the first existing column of
            `GOLD_COLUMNS`.

    Raises:
        ValueError: If there is no column `gold`.
    """
    everything = range(len(table))
    if callable(gold):
        values = [
            gold({**{name: table.column(name, [i])[0] for name in table.columns}, "prompt": table.texts[i]}) for i in everything
        ]
    else:
        name = gold or next((name for name in GOLD_COLUMNS if name in table.columns), None)
        if name is None:
            return {}
        if name not in table.columns:
            raise ValueError(f"gold={gold!r} is not one of the columns {table.columns}; name one, or give a function of a row")
        values = table.column(name, everything)
    return {i: str(value) for i, value in zip(everything, values, strict=True) if value is not None}


def choose_prompts(table: PromptTable, golds: dict[int, str], n: int, rng: np.random.Generator) -> list[int]:
    """Choose up to n prompts at random; return their indexes.

    The first half covers as many different answer formats ("0", "0,0", "-0", "a 0.0") as possible.
    """
    order = rng.permutation(sorted(golds) if golds else len(table)).tolist()
    looks: dict[str, int] = {}
    for i in order if golds else []:
        looks.setdefault(re.sub(r"[0-9]+", "0", re.sub(r"[^\W\d_]+", "a", final_answer(golds[i]))), i)
    first = list(looks.values())[: n - n // 2]
    return [*first, *(i for i in order if i not in set(first))][:n]


def make_probes(table: PromptTable, golds: dict[int, str], indexes: list[int], rng: np.random.Generator) -> dict[str, Sample]:
    """Build the completions that must score low, by check name, and the gold answers under "gold"."""
    texts = table.texts
    known = [i for i in indexes if i in golds]
    bare = {i: final_answer(golds[i]) for i in known}
    found: dict[str, list[tuple[int, str]]] = {
        "gold": [(i, golds[i]) for i in known],
        "empty text": [(i, text) for i in indexes for text in ("", " \n")],
        "echoed prompt": [(i, texts[i]) for i in indexes],
        "answer among junk": [(i, _junk(bare[i], rng)) for i in known],
        "answer repeated": [
            (i, mark.join([text] * REPEATS)) for i in known for text in (bare[i], golds[i]) for mark in (" ", "\n")
        ],
        "all answers at once": [],
    }
    answers = sorted(set(bare.values()))
    if len(answers) > 1:
        for i in known:
            rest = [answer for answer in rng.permutation(answers).tolist() if answer != bare[i]][: MANY - 1]
            half = len(rest) // 2
            for row in ([*rest[:half], bare[i], *rest[half:]], [bare[i], *rest], [*rest, bare[i]]):
                found["all answers at once"] += [(i, mark.join(row)) for mark in (" ", "\n")]
    return {
        check: Sample([i for i, _ in pairs], [text for _, text in pairs])
        for check, pairs in (
            (check, [p for p in pairs if check == "gold" or p[1] != golds.get(p[0])]) for check, pairs in found.items()
        )
    }


def _junk(answer: str, rng: np.random.Generator) -> str:
    numbers: list[str] = []
    while len(numbers) < 4:
        number = str(rng.integers(11, 9999))
        if number not in answer and answer not in number:
            numbers.append(number)
    a, b, c, d = numbers
    return f"maybe {a} or so, some say {b} and {answer} and then {c} but who knows, there were {d} more"
