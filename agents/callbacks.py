"""SB3's callbacks in one process or several, and how far a call of `learn` goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback, EvalCallback, ProgressBarCallback

from agents.compatibility import agree_on_ends
from agents.distributed.communicator import Communicator
from agents.policy import LanguagePolicy
from agents.rollout import Rollout
from agents.sampling.generate import StopRollout
from agents.vec_env import unique_rules
from llm_env.reference import KLController

ON_NEW_BEST = "callback_on_new_best"  # the callback that EvalCallback calls after a new best evaluation


def remaining_timesteps(requested: int, done: int, requested_before: int, is_reset: bool) -> int:
    """Return how many action tokens a call of `learn` is to train from now on.

    Rollouts are whole, so that a call overshoots what was requested. Where counting continues, the overshoot of the last call
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


class TimeLimit(BaseCallback):
    """Stop training after some seconds, also in the middle of a rollout, which is then not counted.

    A callback with a method `should_stop() -> bool` is asked at every decoding step. With several processes, every process
    asks its own callbacks, and all stop if one does.

    Args:
        seconds: time limit of one call of `learn`, in seconds.
        clock: returns the time in seconds.

    Raises:
        ValueError: If `seconds` is not positive.

    Examples:
        >>> import llm_env
        >>> from agents import GRPO
        >>> agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", group_size=4, n_envs=16)
        >>> agent.learn(10**9, TimeLimit(0.1)).num_timesteps < 10**6
        True
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        if not seconds > 0:
            raise ValueError(f"seconds={seconds!r} must be positive")
        self.seconds, self._clock, self._end = seconds, clock, float("inf")

    def _on_training_start(self) -> None:
        self._end = self._clock() + self.seconds

    def should_stop(self) -> bool:
        """Return whether the time is up."""
        return self._clock() >= self._end

    def _on_step(self) -> bool:
        return not self.should_stop()


class TokenProgressBar(ProgressBarCallback):
    """SB3's progress bar, which also moves while responses are sampled."""

    _ahead = 0  # tokens that are shown and not counted yet

    def on_tokens(self, count: int) -> None:
        """Show new tokens of the rollout that is being sampled."""
        self.pbar.update(count)
        self._ahead += count

    def _on_step(self) -> bool:
        rows = self.training_env.num_envs
        shown = min(self._ahead, rows)
        self._ahead -= shown
        self.pbar.update(rows - shown)
        return True


def with_progress_bar(callback: Any) -> list[BaseCallback]:
    """Return what SB3 takes as `callback`, with a `TokenProgressBar` behind it."""
    if callback is None:
        callback = []
    elif not isinstance(callback, (list, BaseCallback)):
        callback = ConvertCallback(callback)
    return [*(callback if isinstance(callback, list) else [callback]), TokenProgressBar()]


def watch_sampling(callback: BaseCallback) -> Callable[[int], None]:
    """Return a function that updates progress bars and asks callbacks to stop at every decoding step.

    It takes the number of new tokens of this process.

    Raises:
        StopRollout: If a callback's `should_stop()` is true.
    """
    parts = list(all_callbacks(callback))
    bars = [part for part in parts if isinstance(part, TokenProgressBar)]
    asked = [(part, stop) for part in parts if callable(stop := getattr(part, "should_stop", None))]

    def on_tokens(count: int) -> None:
        for bar in bars:
            bar.on_tokens(count)
        for part, stop in asked:
            if stop():
                raise StopRollout(f"{type(part).__name__} asked to stop")

    return on_tokens
