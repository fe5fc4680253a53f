"""SB3's callbacks in one process or several, and how far a call of `learn` goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from agents.compatibility import agree_on_ends
from agents.distributed.communicator import Communicator
from agents.policy import LanguagePolicy
from agents.rollout import Rollout
from agents.vec_env import unique_rules
from llm_env.reference import KLController

ON_NEW_BEST = "callback_on_new_best"  # the callback that EvalCallback calls after a new best evaluation


def remaining_timesteps(requested: int, done: int, requested_before: int, is_reset: bool) -> int:
    """Return how many action tokens a call of `learn` is to train from now on.

    Rollouts are whole, so that a call overshoots what was requested. Where counting goes on, the overshoot of the last call
    counts towards the next one; where that would leave it nothing to do, it counts from now, as in SB3.

    Args:
        requested: `total_timesteps` of the call.
        done: action tokens so far.
        requested_before: action tokens requested by all calls before.
        is_reset: whether counting starts at 0.
    """
    overshoot = 0 if is_reset else max(0, done - requested_before)
    return requested - overshoot if requested > overshoot else requested


def update_kl_controllers(controllers: Iterable[Any], rollout: Rollout) -> None:
    """Give the mean KL of the rollout's episodes to those of the values that are controllers."""
    kls = [info["kl"] for info in rollout.infos if "kl" in info]
    for controller in controllers:
        if isinstance(controller, KLController) and kls:
            controller.update(float(np.mean(kls)), len(kls))


def sync_callbacks(callback: BaseCallback, policy: LanguagePolicy, communicator: Communicator, seed: int | None) -> None:
    """Let SB3's callbacks come to the same conclusions in all processes, and the main one write and print.

    Episodes of an `EvalCallback` end at the end tokens of training. Every process calls its callbacks, with the infos of all
    episodes. What an `EvalCallback` saves depends on how its episodes went: its env needs the same seed in all processes.
    """
    for evaluation in all_callbacks(callback):
        if isinstance(evaluation, EvalCallback) and evaluation.eval_env.has_attr("rules"):
            agree_on_ends(policy, evaluation.eval_env)
    if communicator.size == 1:
        return
    for part in all_callbacks(callback):
        if isinstance(part, EvalCallback):
            part.eval_env.seed(seed)
            if not communicator.is_main_process and part.eval_env.has_attr("rules"):
                for rules in unique_rules(part.eval_env):
                    rules.recorder = None  # all run the same episodes
            part.log_path = part.log_path if communicator.is_main_process else None
        part.verbose = part.verbose if communicator.is_main_process else 0


def all_callbacks(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """Yield a callback and all that it calls."""
    if callback is None:
        return
    yield callback
    for part in (
        *getattr(callback, "callbacks", ()),
        getattr(callback, "callback", None),
        getattr(callback, ON_NEW_BEST, None),
    ):
        yield from all_callbacks(part)
