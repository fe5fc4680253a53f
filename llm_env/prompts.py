"""Prompts from lists, `.jsonl` files, datasets, procedural sources and text envs; splits, and the order of sampling."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import nlargest
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.dialogue.chat import Messages, PromptFormat
from llm_env.dialogue.text_env import ENDLESS, Text, TextEnvTasks, as_messages, close

logger = logging.getLogger("llm_env")

Row = dict[str, Any]
SPLITS = ("train", "test")
CACHED_TASKS = 65536
ENDLESS_SAMPLE = 256  # tasks that stand for all, if there is no end of them


class PromptSource(ABC):
    """Rows that are made on demand. Row `i` must be the same at every call."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Return row `index`: a dict with `prompt` (a str) or `messages` (a chat), and columns for the reward functions."""

    def __iter__(self) -> Iterator[Row]:
        """Iterate over all rows. `__getitem__` need not raise an `IndexError` at the end."""
        return (self[index] for index in range(len(self)))


def split_of(text: str) -> str:
    """Return the split of a text: `"test"` for a tenth of all texts, else `"train"`, by its sha256 hash."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def check_split(split: str | None) -> None:
    """Raise if `split` is neither a split nor None."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train', 'test' or None")


def read_jsonl(path: str | Path) -> list[Row]:
    """Read a file with one JSON object per line.

    Raises:
        ValueError: If a line is empty, is not JSON or is not an object; the message names file and line.
        FileNotFoundError: If there is no such file.
    """
    rows = []
    lines = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    for number, encoded in enumerate(lines, start=1):
        try:
            line = encoded.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number} is not UTF-8 ({error}); save the file as UTF-8") from error
        if not line.strip():
            raise ValueError(f"{path}:{number} is empty: every line must hold one JSON object; delete the line")
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not valid JSON ({error}); the line reads {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number} holds a {type(row).__name__}; every line must hold one JSON object")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no rows: give at least one prompt")
    return rows


def as_rows(prompts: Any) -> Sequence[Row]:
    """Convert prompts to a sequence of dicts.

    Args:
        prompts: a list of str, a list of dict, a `PromptSource`, the path of a `.jsonl` file, or anything with `len()` and
            integer indexing that returns str or dict (a Hugging Face `Dataset` or one of its columns).

    Raises:
        TypeError, ValueError: If `prompts` is none of these, or empty.
    """
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Path)):
        if not str(prompts).endswith((".jsonl", ".json")):
            raise ValueError(
                f"prompts={str(prompts)!r} is neither a list nor the path of a .jsonl file; for a single prompt write "
                f"prompts=[{str(prompts)!r}]"
            )
        return read_jsonl(prompts)
    if callable(getattr(prompts, "reset", None)) and callable(getattr(prompts, "step", None)):
        raise TypeError(
            f"prompts={prompts!r} has reset and step: it is an environment; for one over text use "
            "TextGenerationEnv.from_text_env(make, tokenizer=...)"
        )
    if not (hasattr(prompts, "__len__") and hasattr(prompts, "__getitem__")) or isinstance(prompts, (dict, bytes)):
        raise TypeError(
            f"prompts is a {type(prompts).__name__}{_why_no_rows(prompts)}; give a list of str, a list of dict with a 'prompt' "
            "key, a PromptSource, a dataset or the path of a .jsonl file"
        )
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one prompt")
    try:
        first = prompts[0]
    except (KeyError, IndexError) as error:
        raise TypeError(
            f"prompts is a {type(prompts).__name__} whose item 0 raises {type(error).__name__}: {error}; give a list of dict, "
            "as pandas makes one with to_dict('records')"
        ) from error
    if isinstance(prompts, (list, tuple)) or isinstance(first, str):
        rows = (prompts[i] for i in range(len(prompts)))
        return [{"prompt": row} if isinstance(row, str) else row for row in rows]
    return prompts


def _why_no_rows(prompts: Any) -> str:
    """Return why a value is not a sequence of rows, with the remedy, if that is known; else an empty text."""
    if isinstance(prompts, dict) and prompts and all(hasattr(split, "column_names") for split in prompts.values()):
        return f" of the splits {list(prompts)}: pick one, prompts=dataset[{next(iter(prompts))!r}]"
    if hasattr(prompts, "__iter__") and not hasattr(prompts, "__len__"):
        return ", which has no length: take as many rows as you want, prompts=list(itertools.islice(dataset, 10_000))"
    return ""


class PromptTable:
    """All prompts: token ids, text and columns.

    Args:
        prompts: see `as_rows`.
        format: converts rows to text and token ids; or a tokenizer, whose chat template is used.
        max_prompt_tokens: maximum length of a prompt, in tokens.
        split: `"train"` or `"test"` keeps the rows that `split_of` assigns there; None keeps all.
        long_prompts: `"error"` raises an error for longer prompts; `"drop"` drops and logs them.

    Attributes:
        format: converts rows to text and token ids.
        ids: one int64 array per prompt.
        texts: the prompts as text; chats as rendered by their template.
        messages: for each prompt, the messages of a chat, or None for text.
        dropped: number of prompts that were dropped for their length.
        columns: names of all columns except "prompt".
        incomplete: for each column that is missing in some row, the first such row.
    """

    def __init__(
        self,
        prompts: Any,
        format: PromptFormat | Any,
        max_prompt_tokens: int,
        split: str | None = None,
        long_prompts: str = "error",
    ) -> None:
        check_split(split)
        if long_prompts not in ("error", "drop"):
            raise ValueError(f"long_prompts={long_prompts!r} must be 'error' or 'drop'")
        self.format = format if isinstance(format, PromptFormat) else PromptFormat(format)
        self._rows = as_rows(prompts)
        self._kept: list[int] = []
        self.texts: list[str] = []
        self.messages: list[Messages | None] = []
        self.ids: list[np.ndarray] = []
        self.dropped = 0
        rendered = [self.format.render(self._rows[i], i) for i in range(len(self._rows))]
        kept = [i for i, prompt in enumerate(rendered) if split is None or split_of(prompt.text) == split]
        for i, ids in zip(kept, self.format.encode([rendered[i] for i in kept]), strict=True):
            text, messages = rendered[i]
            if len(ids) == 0:
                raise ValueError(f"row {i} of the prompts is empty ({text!r} has no tokens); a model needs at least one")
            if len(ids) > max_prompt_tokens:
                if long_prompts == "error":
                    raise ValueError(
                        f"row {i} of the prompts has {len(ids)} tokens, more than max_prompt_tokens={max_prompt_tokens}; set "
                        f"max_prompt_tokens={len(ids)} or more, or long_prompts='drop' to leave such rows out"
                    )
                self.dropped += 1
                continue
            self._kept.append(i)
            self.texts.append(text)
            self.messages.append(messages)
            self.ids.append(np.asarray(ids, dtype=np.int64))
        if self.dropped:
            logger.warning("dropped %d of %d prompts longer than %d tokens", self.dropped, len(kept), max_prompt_tokens)
        if not self.ids:
            raise ValueError(
                f"no prompt is left of {len(rendered)}: {len(rendered) - len(kept)} are not in split={split!r}, {self.dropped} "
                f"have more than max_prompt_tokens={max_prompt_tokens} tokens"
            )
        self.columns, self.incomplete = self._survey()
        self._chats: dict[str, int] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str, indexes: Sequence[int]) -> list[Any]:
        """Return the values of column `name` in the prompts `indexes`."""
        return [self._rows[self._kept[i]].get(name) for i in indexes]

    def contains(self, index: int) -> bool:
        """Return True: every index of a table has a prompt."""
        return True

    def longest(self, count: int = 1) -> list[list[int]]:
        """Return the token ids of the `count` longest prompts, or of all if there are fewer."""
        return [ids.tolist() for ids in nlargest(count, self.ids, key=len)]

    def indexes(self, count: int | None = None) -> list[int]:
        """Return the indexes of the first `count` prompts, or of all."""
        return list(range(len(self) if count is None else min(count, len(self))))

    @property
    def has_chats(self) -> bool:
        """Whether a prompt is a chat."""
        return any(messages is not None for messages in self.messages)

    def rows(self) -> Iterator[Row]:
        """Yield the columns of every prompt."""
        return map(self.row, range(len(self)))

    def prompts_of(self, indexes: Sequence[int]) -> tuple[list[Any], dict[str, list[Any]]]:
        """Return B prompts and their columns as reward functions get them: a text, or the messages of a chat."""
        prompts = [self.texts[i] if self.messages[i] is None else self.messages[i] for i in indexes]
        return prompts, {name: self.column(name, indexes) for name in self.columns}

    def reward_inputs(
        self, indexes: Sequence[int], completions: Sequence[str]
    ) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """Return prompts, completions and columns as reward functions get them, in TRL's convention.

        A text prompt and its completion are str. For a chat, the prompt is a list of messages, and the completion is a list
        with one assistant message; so it is with tools.

        Args:
            indexes: B indexes of prompts.
            completions: B texts.
        """
        prompts, columns = self.prompts_of(indexes)
        answers = [
            [{"role": "assistant", "content": completion}]
            if self.format.has_tools or self.messages[i] is not None
            else completion
            for i, completion in zip(indexes, completions, strict=True)
        ]
        return prompts, answers, columns

    def ids_of_text(self, text: str) -> list[int] | None:
        """Return the token ids of the chat that is rendered as `text`; None if no prompt is that chat."""
        if self._chats is None:
            self._chats = {self.texts[i]: i for i, messages in enumerate(self.messages) if messages is not None}
        index = self._chats.get(text)
        return None if index is None else self.ids[index].tolist()

    def close(self) -> None:
        """Do nothing: a table holds no resources."""

    def row(self, index: int) -> Row:
        """Return the columns of prompt `index`, except "prompt"."""
        return {name: value for name, value in self._rows[self._kept[index]].items() if name != "prompt"}

    def _survey(self) -> tuple[list[str], dict[str, int]]:
        rows = {i: set(self._rows[i]) - {"prompt"} for i in self._kept}
        columns = sorted(set().union(*rows.values()))
        lacking = {name: next((i for i, row in rows.items() if name not in row), None) for name in columns}
        return columns, {name: i for name, i in lacking.items() if i is not None}


class TaskTable:
    """The first observations of a text env as prompts, read when they are needed; same interface as `PromptTable`.

    Args:
        tasks: the tasks.
        format: how observations become text and token ids.
        max_prompt_tokens: maximum length of a first observation, in tokens.
        as_messages: whether a str is a user message.
        split: `"train"` or `"test"` keeps the tasks whose seed `split_of` assigns there; None keeps all.

    Attributes:
        columns: names of the entries of the first task's info.
    """

    dropped = 0

    def __init__(
        self, tasks: TextEnvTasks, format: PromptFormat, max_prompt_tokens: int, as_messages: bool, split: str | None = None
    ) -> None:
        check_split(split)
        self.tasks, self.format, self.split = tasks, format, split
        self._max_prompt_tokens, self._as_messages = max_prompt_tokens, as_messages
        self._kept: Sequence[int] = range(tasks.num_tasks)
        if split is not None and not tasks.endless:
            self._kept = [i for i in range(tasks.num_tasks) if self._in_split(i)]
            if not self._kept:
                raise ValueError(f"none of the {tasks.num_tasks} seeds is in split={split!r}; raise num_tasks")
        self._env: Any = None
        self._cache: dict[int, _Task] = {}
        self.ids, self.texts, self.messages = (_Column(self, name) for name in ("ids", "text", "messages"))
        first = self.indexes(1)[0]
        self.columns, self.incomplete = sorted(self.task(first).columns), dict[str, int]()

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_env": None}  # text envs need not be picklable

    def contains(self, index: int) -> bool:
        """Return whether a task is in the split; with a finite number of tasks, all indexes are."""
        return not self.tasks.endless or self._in_split(index)

    def _in_split(self, index: int) -> bool:
        return self.split is None or split_of(str(self.tasks.first_seed + index)) == self.split

    def seed(self, index: int) -> int:
        """Return the seed of task `index`."""
        return self.tasks.first_seed + self._kept[index]

    def index_of_seed(self, seed: int) -> int | None:
        """Return the index of the task with a seed; None if there is none."""
        number = seed - self.tasks.first_seed
        if not 0 <= number < self.tasks.num_tasks or not self._in_split(number):
            return None
        return number if self.tasks.endless else self._kept.index(number)

    def task(self, index: int) -> _Task:
        """Return task `index`; the text env is reset at the first call, and the result is cached.

        Raises:
            ValueError: If the first observation is unusable, empty or too long.
        """
        found = self._cache.get(index)
        if found is None:
            if len(self._cache) >= CACHED_TASKS:
                self._cache.pop(next(iter(self._cache)))
            found = self._cache[index] = self._read(index)
        return found

    def _read(self, index: int) -> _Task:
        if self._env is None:
            self._env = self.tasks.new()
        seed = self.seed(index)
        observation, info = self.tasks.reset(self._env, seed)
        if other := [key for key in info if not isinstance(key, str)]:
            raise TypeError(f"{self.tasks.name}.reset(seed={seed}) returned an info with a key that is not a str: {other[0]!r}")
        content = as_messages(observation) if self._as_messages else observation
        rendered = self.format.render({**_template_columns(info), "prompt": content}, seed, kind="the prompt of seed")
        (ids,) = self.format.encode([rendered])
        if not len(ids):
            raise ValueError(f"{self.tasks.name}.reset(seed={seed}) returned an empty observation; a model needs a token")
        if len(ids) > self._max_prompt_tokens:
            raise ValueError(
                f"the first observation of seed {seed} has {len(ids)} tokens, more than "
                f"max_prompt_tokens={self._max_prompt_tokens}; set max_prompt_tokens={len(ids)} or more"
            )
        return _Task(seed, observation, np.asarray(ids, dtype=np.int64), rendered.text, rendered.messages, info)

    def longest(self, count: int = 1) -> list[list[int]]:
        """Return `count` prompts of the maximum length, made up of the first task's tokens: for measurements of memory."""
        ids = self.task(self.indexes(1)[0]).ids.tolist()
        return [(ids * self._max_prompt_tokens)[: self._max_prompt_tokens]] * count

    def indexes(self, count: int | None = None) -> list[int]:
        """Return the indexes of the first `count` tasks, or of all; with `num_tasks=None`, `ENDLESS_SAMPLE` by default."""
        if count is None:
            count = ENDLESS_SAMPLE if self.tasks.endless else len(self)
        return list(islice((i for i in range(len(self)) if self.contains(i)), count))

    def column(self, name: str, indexes: Sequence[int]) -> list[Any]:
        """Return the values of an entry of the tasks' infos; None where a task has none."""
        return [self.task(i).columns.get(name) for i in indexes]

    def row(self, index: int) -> Row:
        """Return the info of task `index`."""
        return dict(self.task(index).columns)

    def prompts_of(self, indexes: Sequence[int]) -> tuple[list[Any], dict[str, list[Any]]]:
        """Return prompts and columns as reward functions get them."""
        prompts = [task.text if task.messages is None else task.messages for task in map(self.task, indexes)]
        return prompts, {name: self.column(name, indexes) for name in self.columns}

    def ids_of_text(self, text: str) -> list[int] | None:
        """Return None: prompts are tokenized as any text is."""
        return None

    def rows(self) -> Iterator[Row]:
        """Yield the info of the first task: other tasks are not read in advance."""
        yield self.row(self.indexes(1)[0])

    @property
    def has_chats(self) -> bool:
        """Whether prompts are chats."""
        return self.task(self.indexes(1)[0]).messages is not None

    def close(self) -> None:
        """Close the instance that reads prompts."""
        close(self._env)
        self._env = None


@dataclass(frozen=True)
class _Task:
    seed: int
    observation: Text
    ids: np.ndarray
    text: str
    messages: Messages | None
    columns: dict[str, Any]


@dataclass
class _Column:
    """One attribute of all tasks, by index."""

    table: TaskTable
    name: str

    def __getitem__(self, index: int) -> Any:
        return getattr(self.table.task(int(index)), self.name)


def _template_columns(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in ("tools", "chat_template_kwargs") if key in info}


class PromptCursor:
    """Draws indexes of prompts in shuffled order: each once before any is repeated.

    A Fisher-Yates shuffle that stores only the indexes that were moved. With `ENDLESS` prompts or more, indexes are drawn
    independently.

    Args:
        size: n, the number of prompts.
        rng: returns the current random generator of the env that owns the cursor.
        contains: whether an index has a prompt; others are skipped. Needed for `ENDLESS` indexes only.
    """

    def __init__(
        self, size: int, rng: Callable[[], np.random.Generator], contains: Callable[[int], bool] | None = None
    ) -> None:
        self._size = size
        self._rng = rng
        self._contains = contains
        self.restart()

    @classmethod
    def over(cls, prompts: Any, rng: Callable[[], np.random.Generator]) -> PromptCursor:
        """Return a cursor over a `PromptTable` or a `llm_env.dialogue.text_env.TaskTable`."""
        return cls(len(prompts), rng, prompts.contains)

    def restart(self) -> None:
        """Start a new shuffle with the next index."""
        self._drawn = 0
        self._moved: dict[int, int] = {}

    def next(self) -> int:
        """Return the next index."""
        if self._size >= ENDLESS:
            index = int(self._rng().integers(self._size))
            while self._contains is not None and not self._contains(index):
                index = int(self._rng().integers(self._size))
            return index
        if self._drawn == self._size:
            self.restart()
        chosen = int(self._rng().integers(self._drawn, self._size))
        index = self._moved.get(chosen, chosen)
        self._moved[chosen] = self._moved.pop(self._drawn, self._drawn)
        self._drawn += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the shuffle, for `load_state_dict`. The state of the generator is not included."""
        return {"size": self._size, "drawn": self._drawn, "moved": dict(self._moved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was called.

        Raises:
            ValueError: If the state is of another number of prompts.
        """
        if state["size"] != self._size:
            raise ValueError(f"the saved cursor runs over {state['size']} prompts, this env has {self._size}")
        self._drawn = state["drawn"]
        self._moved = {int(key): index for key, index in state["moved"].items()}  # JSON makes str of the keys
