"""Sampling and learning at once: the next rollout is drawn, by older weights, while the last one is learned from."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from agents.adapters import with_frozen_in_common
from agents.policy import LanguagePolicy
from agents.rollout import Rollout, clock_of, from_all, prepared

if TYPE_CHECKING:
    from agents.base import LanguageAgent

DRAWN = ("torch", "env", "seeds", "cursor")  # what of an agent's position a rollout draws from when it begins

_copies: WeakKeyDictionary[LanguagePolicy, PreTrainedModel] = WeakKeyDictionary()


class Ahead:
    """A rollout under way in a thread, by the policy as it was when this was made: a copy of it, or an engine.

    It is drawn by weights that are one rollout older than those that learn from it: off-policy by one step, for which
    importance weights correct (`agents.losses.truncated_importance`). Which prompts and random numbers it takes is settled
    here, so that what comes out does not depend on which of the two is faster. Callbacks are called, and files written, while
    nothing is under way; a reward function runs beside the update.

    A file has what went before: who goes on from it draws the rollout again, by the weights in the file, so that a run that
    was stopped is on-policy for one rollout where the unbroken one was not.

    Attributes:
        began: what of the agent's position the rollout was drawn from.
    """

    def __init__(self, agent: LanguageAgent) -> None:
        assert agent.env is not None
        venv, self._agent = clock_of(agent.env), agent
        assert venv is not None
        here = agent._here()
        self.began: dict[str, Any] = {name: here[name] for name in DRAWN}
        respond, sampler = agent.responder(ahead=True), agent.sampler()
        if respond is not None:
            sampler = sampler.spawn(0)
        self._rules, self._rows = venv.rules, len(agent.world.part(venv.num_envs, agent.group_size))
        behind = _copy_of(agent.policy) if respond is None else agent.policy
        own = prepared(behind, venv, agent.group_size, sampler, {}, agent.world, respond)
        executor = ThreadPoolExecutor(1, "sampling")
        self._future = executor.submit(own)
        executor.shutdown(wait=False)

    def wait(self) -> None:
        """Until the rollout is there, or has failed."""
        wait([self._future])

    def rollout(self) -> Rollout:
        """The episodes, of all processes; where the call is broken off, it ends when no env is stepped any more."""
        try:
            return from_all(self._agent.world, self._future.result, self._agent.policy, self._rules, self._rows)
        except BaseException:
            self.wait()
            raise


@torch.no_grad()
def _copy_of(policy: LanguagePolicy) -> LanguagePolicy:
    """The policy without its critic, with weights of its own where they are trained; its room is kept for the next time."""
    if policy not in _copies:
        _copies[policy] = with_frozen_in_common(policy.lm).requires_grad_(False)
    copied = copy.copy(policy)
    copied._modules = {"lm": _copies[policy], "value_head": None, "critic": None}
    for own, current in zip(copied.lm.parameters(), policy.lm.parameters(), strict=True):
        own.copy_(current)
    return copied


def check_overlap(agent: LanguageAgent) -> None:
    """Refuse to draw ahead where that is not possible.

    Raises:
        ValueError: the env is stepped token by token, or the weights are sharded.
    """
    if not agent.overlap:
        return
    if agent.env is not None and clock_of(agent.env) is None:
        raise ValueError(
            "overlap=True draws whole responses beside the update, but this env is stepped token by token; leave out its "
            "wrappers, or set overlap=False"
        )
    if agent.world.sharded:
        raise ValueError(
            "overlap=True needs a copy of the whole weights in every process, but they are sharded; set overlap=False"
        )
