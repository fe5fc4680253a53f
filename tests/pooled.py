"""Reward functions for worker processes, in a module that is quickly imported."""

import os
import time


def letters(completions, **kwargs):
    return [float(len(c)) for c in completions]


def picky(completions):
    """Fails on b, sleeps on c, dies on d."""
    if "b" in completions[0]:
        raise RuntimeError(f"cannot read {completions[0]!r}")
    if "c" in completions[0]:
        time.sleep(30)
    if "d" in completions[0]:
        os._exit(7)
    return [float(len(completions[0]))]


def pids(completions):
    return [float(os.getpid()) for _ in completions]


def odd(completions, **kwargs):
    """Exits on x, returns text for a."""
    if "x" in completions[0]:
        raise SystemExit("enough")
    return completions


class Unreadable:
    """An object that is pickled and cannot be unpickled."""

    def __reduce__(self):
        return int, ("no number",)
