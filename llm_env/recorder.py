"""Episodes as lines of JSON: written as they end, and scored again later by other rewards, without a model."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.prompts import read_jsonl
from llm_env.rewards import RewardFunction, RewardSum

logger = logging.getLogger("llm_env")

BATCH = 1024
BLOCK = 1 << 16  # bytes read at a time, from the end
BEGINNING = b'{"prompt_index": '  # of every record


class Recorder:
    """Appends one JSON object an episode to a file; give evaluation a separate env, or its episodes are recorded, too.

    Every object has `prompt_index`, `prompt` and `completion` as reward functions get them, `prompt_text` (of a chat, as it is
    rendered), `prompt_ids`, `completion_ids`, `columns` (the prompt's), `components` (by name, before weighting), `score` (what
    rewards and ends paid, without a KL), `terminated`, `truncated`, `logprobs` and `ref_logprobs` (one a completion token, in
    nats; null where not known), and `is_success`, `reward_error` and what rewards logged (`metric/<name>`, `extra/<column>`)
    where the last info has them.

    Args:
        path: the file; made with its folders if it is not there. A last line that was cut off is taken away.
        rows: the columns of all prompts, to see before any episode has ended that they can be written.

    Raises:
        TypeError: If a prompt's column holds what JSON cannot.
        ValueError: If the file ends in the middle of a line that is no record.
    """

    def __init__(self, path: str | Path, rows: Iterable[dict[str, Any]] = ()) -> None:
        for i, columns in enumerate(rows):
            try:
                json.dumps(columns, default=_plain)
            except (TypeError, ValueError) as error:
                raise type(error)(f"record={str(path)!r} is not possible: in row {i} of the prompts {error}") from error
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        if last := _unfinished_line(self.path):
            self._mend(last)

    def beside(self, name: str) -> Recorder:
        """Return a recorder that writes to `<file>.<name>.<ending>` beside this one's file; this one, if it does already."""
        if self.path.stem.endswith(f".{name}"):
            return self
        return Recorder(self.path.with_suffix(f".{name}{self.path.suffix}"))

    def _mend(self, last: bytes) -> None:
        """Make the last line whole, or take it away; but only where it is a record that was cut off."""
        try:
            json.loads(last)
        except ValueError:
            if not (last.startswith(BEGINNING) or BEGINNING.startswith(last)):
                raise ValueError(
                    f"{self.path} ends with {last[:60]!r}, which is no recorded episode; give record= another file"
                ) from None
            logger.warning("%s ends in the middle of a line: its last %d bytes are cut", self.path, len(last))
            os.truncate(self.path, self.path.stat().st_size - len(last))
        else:
            with self.path.open("ab") as file:
                file.write(b"\n")

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records.

        Raises:
            OSError: If they cannot be written, for instance because the disk is full. The file is then as before.
        """
        lines = memoryview("".join(json.dumps(record, default=_plain) + "\n" for record in records).encode())
        try:
            with self.path.open("ab", buffering=0) as file:
                size = file.tell()
                try:
                    while lines:  # an unbuffered write may be partial
                        lines = lines[file.write(lines) :]
                except OSError:
                    file.truncate(size)
                    raise
        except OSError as error:  # a full disk does not name the file
            text = f"{error.strerror or error}; the episodes were not recorded"
            raise OSError(error.errno, text, error.filename or str(self.path)) from error


def _unfinished_line(path: Path) -> bytes:
    """Return what stands after the last line break of a file, of which no more is read than is needed."""
    last = b""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0 and b"\n" not in last:
            begin = max(0, end - BLOCK)
            file.seek(begin)
            last, end = file.read(end - begin) + last, begin
    return last.rpartition(b"\n")[2]


def _plain(value: Any) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    raise TypeError(f"a column holds {value!r} ({type(value).__name__}), which JSON cannot; give text or numbers, or drop it")


def rescore(
    path: str | Path,
    reward: RewardFunction | Sequence[RewardFunction],
    reward_weights: Sequence[float] | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Score recorded episodes with other reward functions.

    Args:
        path: a file that a `Recorder` wrote.
        reward: a reward function or several; they are given what the recorded ones were given.
        reward_weights: one weight a function; all 1 by default.
        out: a file to write the new records to.

    Returns:
        The records with new `components` and `score` (the ends' penalties are not applied again); a `reward_error` of the
        old reward is gone.

    Raises:
        ValueError: If the file is no record of episodes, or a function fails; the message says where.

    Examples:
        >>> import tempfile, llm_env
        >>> path = tempfile.mkdtemp() + "/episodes.jsonl"
        >>> env = llm_env.TextGenerationEnv(["2+3="], lambda completions: [0.0], llm_env.PUPIL, record=path)
        >>> _ = env.reset()
        >>> for token in env.rules.tokenizer.convert_tokens_to_ids(["5", "<eos>"]):
        ...     _ = env.step(token)
        >>> [record["score"] for record in rescore(path, lambda completions: [float(c == "5") for c in completions])]
        [1.0]
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if missing := {"prompt", "completion", "completion_ids", "columns"} - record.keys():
            raise ValueError(f"{path}:{number} is no recorded episode: it has no {sorted(missing)}")
    names = sorted(set().union(*(record["columns"] for record in records)))
    lacking = {name: next((i for i, r in enumerate(records) if name not in r["columns"]), None) for name in names}
    incomplete = {name: row for name, row in lacking.items() if row is not None}
    rewards = RewardSum(reward, reward_weights, names, incomplete)
    scored: list[dict[str, Any]] = []
    for begin in range(0, len(records), BATCH):
        batch = records[begin : begin + BATCH]
        prompts, completions, ids = ([r[key] for r in batch] for key in ("prompt", "completion", "completion_ids"))
        columns = {name: [r["columns"].get(name) for r in batch] for name in names}
        scores = rewards(prompts, completions, ids, columns, [str(r.get("prompt_text", r["prompt"])) for r in batch])
        for i, record in enumerate(batch):
            components = {name: float(v[i]) for name, v in scores.components.items() if np.isfinite(v[i])}
            new = {**record, "components": components, "score": float(scores.total[i])}
            new.pop("reward_error", None)
            new.pop("is_success", None)
            scored.append({**new, "reward_error": scores.errors[i]} if i in scores.errors else new)
    if out is not None:
        Path(out).unlink(missing_ok=True)
        Recorder(out).write(scored)
    return scored
