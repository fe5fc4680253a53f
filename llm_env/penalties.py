"""What the end of an episode does to its score: length stops, soft overlong penalty, missing end token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_env.arguments import check_int


@dataclass(frozen=True)
class EndPenalties:
    """What an episode's end means. All lengths are those of the completion, in tokens; the prompt never counts.

    Attributes:
        max_new_tokens: the length limit.
        length_stop: `"score"`: a response cut off by the limit is paid its score like any other; `"zero"`: it is paid 0 in
            the score's place (steps of a process reward stay paid) and is no success.
        overlong_buffer: length of the zone before the limit in which a penalty grows from 0 to `overlong_penalty`, in tokens;
            0 for none. DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) has `overlong_penalty=1`.
        overlong_penalty: the penalty at the limit.
        missing_eos_penalty: what is taken off where neither an end token nor a stop string ended the response.
    """

    max_new_tokens: int
    length_stop: str = "score"
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.length_stop not in ("score", "zero"):
            raise ValueError(f"length_stop={self.length_stop!r} must be 'score' or 'zero'")
        check_int("overlong_buffer", self.overlong_buffer, 0, self.max_new_tokens)
        for name in ("overlong_penalty", "missing_eos_penalty"):
            value = getattr(self, name)
            if not isinstance(value, (int, float, np.number)) or not np.isfinite(value) or value < 0:
                raise ValueError(f"{name}={value!r} must be a finite number of at least 0: it is taken off the score")

    @property
    def names(self) -> list[str]:
        """The penalties in use."""
        in_use = {"overlong": self.overlong_buffer, "missing_eos": self.missing_eos_penalty}
        return [name for name, value in in_use.items() if value]

    def apply(self, scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Scores as they are paid.

        Args:
            scores: (R,) float64.
            lengths: (R,) tokens of the completions.
            truncated: (R,) bool, ended by the length limit.

        Returns:
            (R,) float64, and the penalties in use by name, (R,) float64, 0 or less.
        """
        if self.length_stop == "zero":
            scores = np.where(truncated, 0.0, scores)
        penalties: dict[str, np.ndarray] = {}
        if self.overlong_buffer:
            over = np.clip(lengths - (self.max_new_tokens - self.overlong_buffer), 0, None) / self.overlong_buffer
            penalties["overlong"] = 0.0 - self.overlong_penalty * over
        if self.missing_eos_penalty:
            penalties["missing_eos"] = 0.0 - self.missing_eos_penalty * truncated
        return sum(penalties.values(), start=scores), penalties
