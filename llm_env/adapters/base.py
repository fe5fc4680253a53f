"""Base class of the adapters: text conversion of observations and actions, and separate random states per instance."""

from __future__ import annotations

import importlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from llm_env.dialogue.text_env import Text

Prompt = str | Callable[[str], str] | None
ToText = Callable[[Any], str] | None
ToAction = Callable[[str], Any] | None
Step = tuple[Text, float, bool, bool, dict[str, Any]]

_LOCK = threading.RLock()  # one for the process, as the generators are


class GlobalGenerators:
    """States of `random`'s and `numpy.random`'s global generators that belong to one instance of an environment.

    Environments that draw from the global generators disturb each other, and no seed repeats an episode. Within `own`, the
    generators have this instance's states, and afterwards those from before. One lock for the whole process is held meanwhile,
    so that such environments are stepped one at a time.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, Any] | None = None

    @contextmanager
    def own(self, seed: int | None = None) -> Iterator[None]:
        """Context in which the global generators are this instance's.

        Args:
            seed: seeds them first; None goes on from where they were, or from 0.
        """
        with _LOCK:
            outer = random.getstate(), np.random.get_state()
            if seed is not None or self._states is None:
                random.seed(seed or 0)
                np.random.seed((seed or 0) % 2**32)
            else:
                random.setstate(self._states[0])
                np.random.set_state(self._states[1])
            try:
                yield
            finally:
                self._states = random.getstate(), np.random.get_state()
                random.setstate(outer[0])
                np.random.set_state(outer[1])


class Adapter:
    """A foreign environment as a `llm_env.TextEnv`.

    Args:
        prompt: the first observation: a text in its place (`{observation}` in it stands for the environment's own), or a
            function of the environment's own. None leaves it as it is. Long rules can so be put shortly.
        observation_to_text: converts an observation of the environment to text.
        text_to_action: converts a turn to an action of the environment; a `ValueError` is shown to the model, counted in the
            info as `illegal_actions`, and costs `illegal_reward`.
        illegal_reward: reward of a turn that is no action.
    """

    def __init__(
        self,
        prompt: Prompt = None,
        observation_to_text: ToText = None,
        text_to_action: ToAction = None,
        illegal_reward: float = 0.0,
    ) -> None:
        self._prompt, self._to_text, self._to_action = prompt, observation_to_text, text_to_action
        self.illegal_reward, self.illegal_actions = illegal_reward, 0

    def _first(self, text: str) -> str:
        """Return the first observation."""
        self.illegal_actions = 0
        return self._with_prompt(text)

    def _with_prompt(self, text: str) -> str:
        """Return a first observation as `prompt` has it."""
        if self._prompt is None:
            return text
        return self._prompt(text) if callable(self._prompt) else self._prompt.replace("{observation}", text)

    def _text(self, observation: Any, default: Callable[[Any], str] = str) -> str:
        """Convert an observation to text."""
        return default(observation) if self._to_text is None else self._to_text(observation)

    def step(self, action: str) -> Step:
        """Take a turn. A text that is no action is answered; nothing else happens then."""
        try:
            parsed = self._parsed(action)
        except ValueError as error:
            self.illegal_actions += 1
            return f"{error}\n", self.illegal_reward, False, False, {"illegal_actions": self.illegal_actions}
        return self._advance(parsed)

    def _parsed(self, text: str) -> Any:
        return self._parse(text) if self._to_action is None else self._to_action(text)

    def _parse(self, text: str) -> Any:
        """Convert a turn to an action, without `text_to_action`; raise a `ValueError` if it is none."""
        return text

    def _advance(self, action: Any) -> Step:
        """Step the environment with an action."""
        raise NotImplementedError


def import_package(name: str, distribution: str, user: str) -> Any:
    """Import a package, or raise an ImportError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{user} needs the package {distribution}: pip install {distribution}") from error


def numbers(info: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an info that are numbers or bools."""
    return {str(key): value for key, value in info.items() if isinstance(value, (bool, int, float, np.integer, np.floating))}


def last_of(choices: list[str], text: str) -> str | None:
    """Return the choice that a text ends up with: the text itself, or the last one in it that stands alone as a word."""
    stripped = text.strip().lower()
    lowered = {choice.lower(): choice for choice in choices}
    if stripped in lowered:
        return lowered[stripped]
    pattern = "|".join(re.escape(choice) for choice in sorted(lowered, key=len, reverse=True))
    found = re.findall(rf"(?<![\w-])({pattern})(?!\w|\.\d)", stripped) if pattern else []
    return lowered[found[-1]] if found else None
