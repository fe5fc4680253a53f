"""Reasoning Gym task: puzzles with scorers, from any reasoning-gym data set.

Source: github.com/open-thought/reasoning-gym.
"""

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
    """Unique questions of a reasoning-gym data set.

    All questions are generated at construction and kept in memory.

    Most reasoning-gym data sets generate question i with the seed `seed + i`. Data sets with neighboring seeds are therefore
    shifted copies of each other, and a different seed does not give an independent test set. For this reason the split depends
    on a hash of the question (`llm_env.prompts.split_of`): train and test are disjoint for all seeds and sizes. A few data sets
    (e.g. `list_functions`) ignore their seed and generate different questions each time.

    Columns: `answer` (text, or None if a question has many answers), `entry` (the data for reasoning-gym's scorer).

    Args:
        dataset: a reasoning-gym data set.
        split: `"train"`, `"test"` or None for all questions.
        template: template of the prompt; `{question}` is replaced by the question.

    Attributes:
        dropped: number of duplicate questions that were removed.

    Raises:
        ValueError: If the split is unknown, or no question is in it.
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
    """Reward function that calls the scorer of a reasoning-gym data set.

    The answer is the content of the last `<answer>...</answer>`, as in reasoning-gym's examples, or the whole completion if
    there are no tags. Thoughts are removed first. Exceptions of a scorer are not caught; some scorers raise if they cannot
    parse an answer.

    Args:
        dataset: a reasoning-gym data set.
        strict: whether to return 1.0 for a full score and 0.0 for any lower score. With False, the scorer's value is returned.
            reasoning-gym's default scorer gives partial scores to answers that contain the correct one, depending on their
            lengths; other scorers give partial scores for the format. Default True.
        think_tags: a pair of opening and closing tag, or several pairs; see `llm_env.rewards.answers.strip_thoughts`.
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
        """Score B completions (texts or lists of chat messages), each from 0 to 1."""
        texts = answer_texts(completions, prompts, self.think_tags, prompt_texts)
        scores = [
            float(self.dataset.score_answer(tagged_answer(text, ()), row)) for text, row in zip(texts, entry, strict=True)
        ]
        return [float(score >= 1) for score in scores] if self.strict else scores


def create_dataset(dataset: str, size: int, seed: int, config: dict[str, Any] | None) -> Any:
    """Create a reasoning-gym data set.

    Args:
        dataset: name of the data set.
        size: number of questions.
        seed: seed of the data set.
        config: further arguments of the data set; None for none.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the data set does not exist or rejects the configuration.
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
        dataset: name of the data set.
        split: `"train"`, `"test"` (about 10% of the questions, chosen by a hash of their text) or None for all questions.
        size: number of questions to generate for both splits together, default 500. Duplicates are removed.
        seed: seed of the data set. A different seed does not give an independent test set; see `ReasoningGymProblems`.
        config: further arguments of the data set, such as `{"max_animals": 4}`.
        strict: whether only full scores get a reward, default True; see `ReasoningGymScore`.
        template: template of the prompt; `{question}` is replaced by the question.
        overrides: arguments of `TextGenerationEnv` that override those of the task. Set at least `tokenizer`.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If the data set does not exist or rejects the configuration.
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
