"""Self-play: an agent against its own snapshots, in games of two that are text environments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents.engines.base import DecodingSpec, PolicyEngine
from agents.policy.prompt_encoding import encode_prompts
from agents.sampling.sampler import Sampler
from llm_env.dialogue.text_env import Text, as_messages
from llm_env.rules import Rules

OPPONENTS = ("all", "last")
SEEDS_REMEMBERED = 200_000
AT_RANDOM = -1  # in the place of a snapshot's number


class SelfPlay(BaseCallback):
    """Lets an agent play against snapshots of itself: an opponent for a game, and a callback for `learn`.

    A snapshot is taken when training begins and before every `every`-th rollout after that. An episode has one opponent, bound
    to its seed, so that all episodes of a group and a repeated `reset` meet the same one. It samples its moves from the
    snapshot, in the context of training: with the env's limits, allowed tokens and chat template, at the agent's temperature.

    Use fresh seeds without end (`num_tasks=None`): a seed keeps the opponent that it has first met. Seeds that are met before
    training begins (the env checks two and draws the first prompts) have an opponent that moves at random. Snapshots are not
    saved with the agent.

    With policy gradients the last policy of self-play tends to cycle; the average over snapshots is what approaches an
    equilibrium. `opponents="all"` and an entropy bonus or a KL to a reference make it approach sooner.

    Args:
        every: rollouts between two snapshots.
        opponents: `"all"` draws one of the snapshots for each seed, `"last"` takes the newest.
        max_snapshots: maximum number that are kept, in memory as large as the trained weights each; the oldest is dropped.
            None for no limit. With `"last"` one is kept.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> from functools import partial
        >>> from agents import SelfPlay
        >>> from llm_env.adapters import TextArenaEnv
        >>> self_play = SelfPlay(every=10)
        >>> make = partial(TextArenaEnv, "KuhnPoker-v0", seat="parity", opponent=self_play)
        >>> # env = llm_env.TextGenerationEnv.from_text_env(make, tokenizer, num_tasks=None)
        >>> # GRPO(model, env).learn(100_000, callback=self_play)
    """

    def __init__(self, every: int = 1, opponents: str = "all", max_snapshots: int | None = 100) -> None:
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} must be a number of rollouts of at least 1")
        if opponents not in OPPONENTS:
            raise ValueError(f"opponents={opponents!r} must be one of {OPPONENTS}")
        if max_snapshots is not None and (not isinstance(max_snapshots, int) or max_snapshots < 1):
            raise ValueError(f"max_snapshots={max_snapshots!r} must be at least 1, or None for no limit")
        self.every, self.opponents, self.max_snapshots = every, opponents, max_snapshots
        self.snapshots: dict[int, PolicyEngine] = {}  # by number, oldest first
        self.taken = self.rollouts = 0
        self._met: dict[int, int] = {}  # the number of the opponent by seed
        self._rules: Rules | None = None
        self._temperature = 1.0

    def _init_callback(self) -> None:
        agent: Any = self.model
        self._rules, self._temperature = agent.rules, agent.temperature
        if not self.snapshots:
            self.take(agent.policy)

    def _on_rollout_start(self) -> None:
        agent: Any = self.model
        if self.rollouts and self.rollouts % self.every == 0:
            self.take(agent.policy)
        self.rollouts += 1

    def _on_step(self) -> bool:
        return True

    def take(self, policy: Any) -> None:
        """Take a snapshot of a policy, a `LanguagePolicy`."""
        assert self._rules is not None
        self.snapshots[self.taken] = PolicyEngine(policy).snapshot(self._rules)
        self.taken += 1
        most = 1 if self.opponents == "last" else self.max_snapshots
        while most is not None and len(self.snapshots) > most:
            del self.snapshots[next(iter(self.snapshots))]

    def begin(self, seed: int) -> Callable[[Text], str] | None:
        """Return the opponent in the episode of a seed: a function of what it newly sees, which returns its turn.

        None stands for moves at random.
        """
        if seed not in self._met or (self._met[seed] != AT_RANDOM and self._met[seed] not in self.snapshots):
            while len(self._met) >= SEEDS_REMEMBERED:
                del self._met[next(iter(self._met))]
            self._met[seed] = self._draw(seed)
        if self._met[seed] == AT_RANDOM:
            return None
        assert self._rules is not None
        return _Player(self.snapshots[self._met[seed]], self._rules, self._temperature, seed)

    def _draw(self, seed: int) -> int:
        """Return the number of the snapshot that a seed meets."""
        if not self.snapshots:
            return AT_RANDOM
        numbers = list(self.snapshots)
        drawn = int(np.random.default_rng([seed, 11]).integers(len(numbers)))
        return numbers[-1] if self.opponents == "last" else numbers[drawn]


class _Player:
    """A snapshot in one episode: keeps its token context, as training builds it."""

    def __init__(self, engine: PolicyEngine, rules: Rules, temperature: float, seed: int) -> None:
        self._engine, self._rules = engine, rules
        generator = torch.Generator(engine.policy.device).manual_seed(seed + 1)
        self._sampler = Sampler(temperature, generator=generator)
        self._context: list[int] = []
        self._turn: list[int] = []

    def __call__(self, text: Text) -> str:
        """Take a turn after an observation: the first one, or what is new since the last turn."""
        rules = self._rules
        if not self._context:
            prompt = as_messages(text) if rules.chat else text
            (self._context,) = encode_prompts([prompt], rules.prompts.format, rules)
        else:
            self._context = [*self._context, *rules.observation_ids(self._turn, text)]
        spec = DecodingSpec(rules, self._sampler, rules.max_new_tokens)
        (self._turn,), _ = self._engine.generate([self._context], 1, spec)
        self._context = [*self._context, *self._turn]
        return rules.turn_text(self._turn)
