"""Issue warnings that point to the user's line of code."""

from __future__ import annotations

import sys
import warnings

LIBRARIES = ("llm_env", "agents", "stable_baselines3", "gymnasium", "contextlib", "functools")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning at the innermost stack frame outside `LIBRARIES`.

    Args:
        message: the text of the warning.
        category: class of the warning, default `UserWarning`.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in LIBRARIES:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
