"""End penalties: truncation, soft overlong penalty, missing end token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_env.arguments import check_int


@dataclass(frozen=True)
class EndPenalties:
    """Penalties on the score for how an episode ends.

    All lengths are completion lengths in tokens; prompt tokens do not count.

    Attributes:
        max_new_tokens: the maximum completion length, in tokens.
        length_stop: the score of a response truncated by the limit. `"score"` keeps its score. `"zero"` replaces the score
            by 0, and the response does not count as a success; step rewards of a process reward are kept.
        overlong_buffer: length in tokens of the zone before the limit in which the overlong penalty grows linearly from 0 to
            `overlong_penalty`; 0 for no penalty. `overlong_penalty=1` gives DAPO's soft overlong punishment (arXiv
            2503.14476, eq. 13).
        overlong_penalty: the penalty at the limit.
        missing_eos_penalty: the penalty for a truncated response, one without an end token or a stop string.
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
        """Names of the penalties that are not 0."""
        in_use = {"overlong": self.overlong_buffer, "missing_eos": self.missing_eos_penalty}
        return [name for name, value in in_use.items() if value]

    def apply(self, scores: np.ndarray, lengths: np.ndarray, truncated: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Apply the end penalties to scores.

        Args:
            scores: (R,) float64.
            lengths: (R,) completion lengths, in tokens.
            truncated: (R,) bool, whether the length limit ended the response.

        Returns:
            The penalized scores, (R,) float64, and the penalties by name, each (R,) float64 and at most 0.
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
