"""Record episodes as JSON Lines, and rescore them with other reward functions."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm_env.prompts import read_jsonl
from llm_env.rewards import ENV_REWARD, RewardFunction, RewardSum

logger = logging.getLogger("llm_env")

BATCH = 1024
BLOCK = 1 << 16  # bytes per read when the last line is searched from the end of the file
BEGINNING = b'{"prompt_index": '  # every record begins with this


class Recorder:
    """Append each finished episode to a file, as one JSON object per line.

    Use a separate env for evaluation; otherwise evaluation episodes are recorded in the same file.

    Every object has these keys:

    - `prompt_index`: the index of the prompt.
    - `prompt`, `completion`: in the form that reward functions receive.
    - `prompt_text`: the prompt's text; a chat as rendered by the chat template.
    - `prompt_ids`, `completion_ids`: token ids.
    - `columns`: the columns of the prompt's row.
    - `components`: the reward components by name, before weighting.
    - `score`: rewards plus end penalties, without a KL penalty.
    - `terminated`, `truncated`: how the episode ended.
    - `logprobs`, `ref_logprobs`: one value per completion token, in nats; null if not known.

    With a text env, `completion` is a list of messages, `completion_ids` has turns and observations up to the last action,
    `turn_ids` has the turn of each of them (-1 for tokens of the env), and log-probs are those of actions.

    The keys `is_success`, `reward_error`, `metric/<name>` and `extra/<column>` are added if the episode's last info has them.

    Args:
        path: the file; it and its folders are created if missing. An incomplete last line is removed.
        rows: the columns of all prompts. They are checked at construction, before the first episode ends.

    Raises:
        TypeError: If a prompt's column has a value that JSON cannot represent.
        ValueError: If a prompt's column has a circular reference, or the file ends with an incomplete line that is not part
            of a record.
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
        """Return a recorder for the file `<stem>.<name><suffix>` in the same folder.

        Returns this recorder if its file already has that name.
        """
        if self.path.stem.endswith(f".{name}"):
            return self
        return Recorder(self.path.with_suffix(f".{name}{self.path.suffix}"))

    def _mend(self, last: bytes) -> None:
        """Add a missing line break at the end, or remove an incomplete last record."""
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
            OSError: If writing fails, for example because the disk is full. The file is restored to its previous size.
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
        except OSError as error:  # the error of a full disk has no file name: add it
            text = f"{error.strerror or error}; the episodes were not recorded"
            raise OSError(error.errno, text, error.filename or str(self.path)) from error


def _unfinished_line(path: Path) -> bytes:
    """Return the bytes after the last line break; read only the end of the file."""
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
    raise TypeError(
        f"a column holds {value!r} ({type(value).__name__}), which JSON cannot store; use text or numbers, or drop the column"
    )


def rescore(
    path: str | Path,
    reward: RewardFunction | Sequence[RewardFunction],
    reward_weights: Sequence[float] | None = None,
    out: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Score recorded episodes with other reward functions.

    Args:
        path: a file written by `Recorder`.
        reward: a reward function or a list of them. They receive the same arguments as during recording.
        reward_weights: one weight per function; default all 1.
        out: the file for the new records; an existing file is replaced. None, the default, writes no file.

    Returns:
        The records with new `components` and `score`. Rewards of a text env (the component `env`) are kept. End penalties are
        not applied. `is_success` and the `reward_error` of
        the recorded reward are removed.

    Raises:
        ValueError: If the file has lines that are not recorded episodes, or a reward function fails. The message has the
            line or the row.

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
            score = float(scores.total[i])
            if ENV_REWARD in record["components"] and "turn_ids" in record:  # of a text env
                components[ENV_REWARD] = record["components"][ENV_REWARD]
                score += components[ENV_REWARD]
            new = {**record, "components": components, "score": score}
            new.pop("reward_error", None)
            new.pop("is_success", None)
            scored.append({**new, "reward_error": scores.errors[i]} if i in scores.errors else new)
    if out is not None:
        Path(out).unlink(missing_ok=True)
        Recorder(out).write(scored)
    return scored
