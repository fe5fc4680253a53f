"""Report of `check_reward` and `check_agent`: a table with one row per check."""

from __future__ import annotations

from dataclasses import dataclass, field

PASSED, FAILED, NOTE, NOT_RUN, NOT_APPLICABLE = "passed", "FAILED", "note", "not run", "not applicable"


@dataclass
class CheckRow:
    """One row of the report: the check, its result, and details."""

    check: str
    result: str
    detail: str = ""


@dataclass
class Report:
    """Results of `check_reward` or `check_agent`.

    Attributes:
        rows: one row per check. `result` is "passed", "FAILED", "note", "not run" (another row has the reason) or "not
            applicable".
    """

    rows: list[CheckRow] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not any(row.result == FAILED for row in self.rows)

    def __getitem__(self, check: str) -> CheckRow:
        """Return the row of a check, by name."""
        return next(row for row in self.rows if row.check == check)

    def __str__(self) -> str:
        widths = [
            max(len(text) for text in column) for column in zip(*((row.check, row.result) for row in self.rows), strict=True)
        ]
        lines = [f"{row.check:<{widths[0]}}  {row.result:<{widths[1]}}  {row.detail}".rstrip() for row in self.rows]
        return "\n".join([*lines, f"=> {'passed' if self.passed else 'FAILED'}"])


def short(text: str, length: int = 70) -> str:
    """Shorten a text to `length` characters by replacing its middle with `...`."""
    return text if len(text) <= length else f"{text[: length - 23]}...{text[-20:]}"
