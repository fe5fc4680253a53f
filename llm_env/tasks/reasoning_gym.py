"""Any data set of reasoning-gym (github.com/open-thought/reasoning-gym) as an env: puzzles with their own scorers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from llm_env.prompts import PromptSource, Row, check_split, split_of
from llm_env.pupil import PUPIL
from llm_env.rewards.answers import THINK_TAGS, Texts, ThinkTags, answer_texts, tagged_answer
from llm_env.rules import TaskOptions

TEMPLATE = "{question}\nGive the final answer between <answer> and </answer>.\n"


class ReasoningGymProblems(PromptSource):
    """The questions of a reasoning-gym data set, each once, made at construction and kept.

    Most of its data sets draw question i from the generator seeded with `seed + i`: the sets of neighbouring seeds are
    shifted copies of each other, so that another seed is no other set. The splits are therefore by a hash of the question
    (`llm_env.prompts.split_of`), disjoint whatever seeds and sizes they are made with. A few data sets (`list_functions`) make
    other questions each time, whatever their seed.

    Columns: `answer` (text, or None where a question has many answers), `entry` (what reasoning-gym's scorer needs).

    Args:
        dataset: a data set of reasoning-gym.
        split: `"train"`, `"test"` or None for all.
        template: the prompt; `{question}` stands for the question.

    Attributes:
        dropped: how many questions had been there before.

    Raises:
        ValueError: If the split is unknown, or no question falls into it.
    """

    def __init__(self, dataset: Any, split: str | None = None, template: str = TEMPLATE) -> None:
        check_split(split)
        entries = [dataset[i] for i in range(len(dataset))]
        unique = {entry["question"]: entry for entry in reversed(entries)}
        self.dropped = len(entries) - len(unique)
        self._rows = [
            {"prompt": template.replace("{question}", question), "answer": entry["answer"], "entry": entry}
            for question, entry in reversed(unique.items())
            if split in (None, split_of(question))
        ]
        if not self._rows:
            raise ValueError(f"none of the {len(unique)} different questions is in split={split!r}; raise size={len(entries)}")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return self._rows[index]


class ReasoningGymScore:
    """The scorer of a data set as a reward function.

    The answer is what stands in the last `<answer>...</answer>`, as in reasoning-gym's own examples, or the whole completion
    where there are no tags, without thoughts. What a scorer raises (some do, on an answer that they cannot read) is raised.

    Args:
        dataset: a data set of reasoning-gym.
        strict: pay 1.0 for a full score and 0.0 for anything less. The default scorer of reasoning-gym pays for an answer
            that merely contains the right one, by their lengths, and others pay for the form; False passes that on.
        think_tags: (opening, closing) tag, or several such pairs; see `llm_env.rewards.answers.strip_thoughts`.
    """

    __name__ = "reasoning_gym"

    def __init__(self, dataset: Any, strict: bool = True, think_tags: ThinkTags = THINK_TAGS) -> None:
        self.dataset = dataset
        self.strict = strict
        self.think_tags = think_tags

    def __call__(
        self,
        completions: Texts,
        entry: list[dict[str, Any]],
        prompts: Texts | None = None,
        prompt_texts: Sequence[str] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return the scores, each from 0 to 1, of B texts or lists of chat messages."""
        texts = answer_texts(completions, prompts, self.think_tags, prompt_texts)
        scores = [
            float(self.dataset.score_answer(tagged_answer(text, ()), row)) for text, row in zip(texts, entry, strict=True)
        ]
        return [float(score >= 1) for score in scores] if self.strict else scores


def create_dataset(dataset: str, size: int, seed: int, config: dict[str, Any] | None) -> Any:
    """Return a data set of reasoning-gym.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such data set, or it does not take the configuration.
    """
    try:
        package = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise ImportError("llm_env/ReasoningGym-v0 needs reasoning-gym: pip install llm-env[reasoning-gym]") from error
    known = sorted(importlib.import_module("reasoning_gym.factory").DATASETS)
    if dataset not in known:
        raise ValueError(f"dataset={dataset!r} is none of reasoning-gym's: {', '.join(known)}")
    try:
        return package.create_dataset(dataset, size=size, seed=seed, **(config or {}))
    except (AssertionError, TypeError) as error:
        raise ValueError(f"reasoning-gym's {dataset!r} refuses size={size}, seed={seed}, config={config}: {error}") from error


def reasoning_gym(
    dataset: str = "leg_counting",
    split: str | None = "train",
    size: int = 500,
    seed: int = 0,
    config: dict[str, Any] | None = None,
    strict: bool = True,
    template: str = TEMPLATE,
    **overrides: Unpack[TaskOptions],
) -> dict[str, Any]:
    """Return arguments of `TextGenerationEnv` for `llm_env/ReasoningGym-v0`.

    Args:
        dataset: the name of the data set.
        split: `"train"`, `"test"` (a tenth of the questions, by a hash of their text) or None for all.
        size: how many questions to make, both splits together; those that come twice are left out.
        seed: of the data set; see `ReasoningGymProblems` for what it is not good for.
        config: further arguments of the data set, such as `{"max_animals": 4}`.
        strict: pay for full scores only; see `ReasoningGymScore`.
        template: the prompt; `{question}` stands for the question.
        overrides: arguments of `TextGenerationEnv` that replace the ones set here; `tokenizer` is the one to set.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such data set, or it does not take the configuration.
    """
    source = create_dataset(dataset, size, seed, config)
    defaults: dict[str, Any] = {
        "prompts": ReasoningGymProblems(source, split, template),
        "reward": ReasoningGymScore(source, strict),
        "tokenizer": PUPIL,
        "success": "reasoning_gym",
        "max_prompt_tokens": 1024,
        "max_new_tokens": 512,
    }
    return {**defaults, **overrides}
