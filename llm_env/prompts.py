"""Where prompts come from: lists, `.jsonl` files, datasets and procedural sources, in a seeded order and disjoint splits."""

from __future__ import annotations

import codecs
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.dialogue.chat import Messages, PromptFormat

logger = logging.getLogger("llm_env")

Row = dict[str, Any]
SPLITS = ("train", "test")


class PromptSource(ABC):
    """Rows made on demand: row `i` is the same at every call, so that a split and a cursor can refer to it by its index."""

    @abstractmethod
    def __len__(self) -> int:
        """Return how many rows there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Row:
        """Row `index`: a dict with `prompt` (a str) or `messages` (a chat), and any columns for the reward functions."""

    def __iter__(self) -> Iterator[Row]:
        """All rows; a source need not raise at the end, which is what Python's own way through a sequence relies on."""
        return (self[index] for index in range(len(self)))


def split_of(text: str) -> str:
    """`"test"` for a tenth of all texts, else `"train"`: a property of the text (sha256), so the splits never overlap."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return "test" if int.from_bytes(digest[:8], "big") % 10 == 0 else "train"


def check_split(split: str | None) -> None:
    """Refuse what is neither a split nor None."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split={split!r} must be 'train', 'test' or None")


def read_jsonl(path: str | Path) -> list[Row]:
    """Return one JSON object a line.

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
    """Normalize what a user may call prompts into a sequence of dict rows.

    Args:
        prompts: list of str, list of dict, `PromptSource`, path of a `.jsonl` file, or anything with `len()` and integer
            indexing that yields either (a Hugging Face `Dataset` or one of its columns).

    Raises:
        TypeError, ValueError: If it is none of these, or empty.
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
    """Return what is wrong with something that is no sequence of rows, and the remedy, where that is known."""
    if isinstance(prompts, dict) and prompts and all(hasattr(split, "column_names") for split in prompts.values()):
        return f" of the splits {list(prompts)}: pick one, prompts=dataset[{next(iter(prompts))!r}]"
    if hasattr(prompts, "__iter__") and not hasattr(prompts, "__len__"):
        return ", which has no length: take as many rows as you want, prompts=list(itertools.islice(dataset, 10_000))"
    return ""


class PromptTable:
    """Every prompt as the token ids the model will see, with its text and its columns.

    Args:
        prompts: see `as_rows`.
        format: how rows become text and token ids; a tokenizer makes one with its own chat template.
        max_prompt_tokens: the longest prompt allowed, in tokens.
        split: `"train"` or `"test"` keeps the rows whose prompt `split_of` assigns there; None keeps all.
        long_prompts: `"error"` refuses a longer prompt, `"drop"` leaves it out, counts it in `dropped` and logs it.

    Attributes:
        format: how rows become text and token ids.
        ids: one int64 array a prompt.
        texts: the prompts as text (chats as their template renders them).
        messages: the chats as lists of messages; None where a prompt is text.
        dropped: how many prompts were left out for their length.
        columns: names of the columns, "prompt" aside, that any row has.
        incomplete: for each column that some row lacks, the first such row.
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

    def reward_inputs(
        self, indexes: Sequence[int], completions: Sequence[str]
    ) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """Return prompts, completions and columns as reward functions get them, in TRL's convention.

        Text stays text. Of a chat the prompt is its messages, and the completion one message of the assistant's.

        Args:
            indexes: B indexes of prompts.
            completions: B texts.
        """
        prompts: list[Any] = []
        answers: list[Any] = []
        for i, completion in zip(indexes, completions, strict=True):
            messages = self.messages[i]
            prompts.append(self.texts[i] if messages is None else messages)
            answers.append(completion if messages is None else [{"role": "assistant", "content": completion}])
        return prompts, answers, {name: self.column(name, indexes) for name in self.columns}

    def ids_of_text(self, text: str) -> list[int] | None:
        """Return the ids of the chat that its template writes as `text`; None where no prompt is that chat."""
        if self._chats is None:
            self._chats = {self.texts[i]: i for i, messages in enumerate(self.messages) if messages is not None}
        index = self._chats.get(text)
        return None if index is None else self.ids[index].tolist()

    def row(self, index: int) -> Row:
        """Return the columns of prompt `index` that it has, "prompt" aside."""
        return {name: value for name, value in self._rows[self._kept[index]].items() if name != "prompt"}

    def _survey(self) -> tuple[list[str], dict[str, int]]:
        rows = {i: set(self._rows[i]) - {"prompt"} for i in self._kept}
        columns = sorted(set().union(*rows.values()))
        lacking = {name: next((i for i, row in rows.items() if name not in row), None) for name in columns}
        return columns, {name: i for name, i in lacking.items() if i is not None}


class PromptCursor:
    """Indexes 0..n-1 in an endlessly reshuffled order: each once before any comes again.

    A Fisher-Yates shuffle that remembers only what it has moved, so that a cursor over a million prompts costs nothing
    until it is used.

    Args:
        size: n, how many prompts there are.
        rng: gives the current generator of the env that owns the cursor; the order is a function of its stream alone.
    """

    def __init__(self, size: int, rng: Callable[[], np.random.Generator]) -> None:
        self._size = size
        self._rng = rng
        self.restart()

    def restart(self) -> None:
        """Forget what was drawn: the next index begins a new shuffle."""
        self._drawn = 0
        self._moved: dict[int, int] = {}

    def next(self) -> int:
        """Return the next index."""
        if self._drawn == self._size:
            self.restart()
        chosen = int(self._rng().integers(self._drawn, self._size))
        index = self._moved.get(chosen, chosen)
        self._moved[chosen] = self._moved.pop(self._drawn, self._drawn)
        self._drawn += 1
        return index

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the order, for `load_state_dict`; the env keeps the generator's state."""
        return {"size": self._size, "drawn": self._drawn, "moved": dict(self._moved)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ValueError: If the state belongs to another number of prompts.
        """
        if state["size"] != self._size:
            raise ValueError(f"the saved cursor runs over {state['size']} prompts, this env has {self._size}")
        self._drawn = state["drawn"]
        self._moved = {int(key): index for key, index in state["moved"].items()}  # JSON makes str of the keys
