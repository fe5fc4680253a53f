"""Optimizer steps and episodes that leave an agent as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.distributed import ALONE
from agents.vec_env import all_rules

if TYPE_CHECKING:
    from agents.base import LanguageAgent


class _Still(torch.optim.SGD):
    """Takes the optimizer's place and moves nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Leave the weights as they are."""


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object for a while; those of a class, and the modules of a module, come to light again after."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


@contextmanager
def untouched(agent: LanguageAgent, seed: int) -> Iterator[None]:
    """Let an agent collect and take optimizer steps that move nothing, with random numbers of its own, and put all back.

    Put back are the agent's attributes, the gradients, the modes of the modules, the global random states and the seconds
    that the rewards took; nothing is recorded. Weights, the optimizer's state and the order of the prompts are not written to.
    """
    policy, rules = agent.policy, agent.rules
    attributes, seconds = dict(vars(agent)), rules.rewards.take_seconds()
    modes = [(module, module.training) for module in policy.modules()]
    gradients = [(parameter, parameter.grad) for parameter in policy.parameters()]
    states = random.getstate(), np.random.get_state()
    still = _Still([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=0.0)
    generator = torch.Generator(device=agent.device).manual_seed(seed)
    devices = [agent.device] if agent.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            replaced(policy, optimizer=still),
            _unrecorded(agent),
        ):
            agent._generator, agent.np_random, agent.max_grad_norm = generator, np.random.default_rng(seed), float("inf")
            agent.world = ALONE
            yield
    finally:
        vars(agent).clear()
        vars(agent).update(attributes)
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        rules.rewards._seconds = seconds


@contextmanager
def _unrecorded(agent: LanguageAgent) -> Iterator[None]:
    """The episodes that end here are not written to the env's record."""
    recorders = [(rules, rules.recorder) for rules in all_rules(agent.env)]
    for rules, _ in recorders:
        rules.recorder = None
    try:
        yield
    finally:
        for rules, recorder in recorders:
            rules.recorder = recorder
