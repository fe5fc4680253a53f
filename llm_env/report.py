"""The table that a check prints: one row a question, with what was seen."""

from __future__ import annotations

from dataclasses import dataclass, field

PASSED, FAILED, NOTE, NOT_RUN, NOT_APPLICABLE = "passed", "FAILED", "note", "not run", "not applicable"


@dataclass
class CheckRow:
    """One line of the table: what was checked, its result, and what was seen."""

    check: str
    result: str
    detail: str = ""


@dataclass
class Report:
    """What `check_reward` or `check_agent` found.

    Attributes:
        rows: one a check; `result` is "passed", "FAILED", "note", "not run" (another line says why) or "not applicable".
    """

    rows: list[CheckRow] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no row has failed."""
        return not any(row.result == FAILED for row in self.rows)

    def __getitem__(self, check: str) -> CheckRow:
        """Return the row of that name."""
        return next(row for row in self.rows if row.check == check)

    def __str__(self) -> str:
        widths = [
            max(len(text) for text in column) for column in zip(*((row.check, row.result) for row in self.rows), strict=True)
        ]
        lines = [f"{row.check:<{widths[0]}}  {row.result:<{widths[1]}}  {row.detail}".rstrip() for row in self.rows]
        return "\n".join([*lines, f"=> {'passed' if self.passed else 'FAILED'}"])


def short(text: str, length: int = 70) -> str:
    """`text`, with its middle left out where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 23]}...{text[-20:]}"
