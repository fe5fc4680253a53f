"""Passes and random numbers that leave no trace in a training."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from agents.policy import LanguagePolicy


@contextmanager
def preserve_state(policy: LanguagePolicy, rng: np.random.Generator) -> Iterator[None]:
    """Restore after the block what passes of a policy change besides weights.

    Restored are the gradients, the modes of the modules, the random states of Python, numpy and torch, and that of `rng`.
    Within the block gradients are enabled.
    """
    modes = [(module, module.training) for module in policy.modules()]
    gradients = [(parameter, parameter.grad) for parameter in policy.parameters()]
    states = random.getstate(), np.random.get_state(), rng.bit_generator.state
    try:
        with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        random.setstate(states[0])
        np.random.set_state(states[1])
        rng.bit_generator.state = states[2]


class NoOpOptimizer(torch.optim.SGD):
    """An optimizer that leaves the weights as they are."""

    def __init__(self, policy: LanguagePolicy) -> None:
        super().__init__([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing."""
