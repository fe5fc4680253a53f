"""How far a call of `learn` goes, and the callbacks that are called on the way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback

from agents.checks import agree_on_ends
from agents.records import episode_infos
from agents.vec_env import all_rules
from llm_env.reference import KLController

if TYPE_CHECKING:
    from agents.base import LanguageAgent
    from agents.rollout import Rollout


AT_BEST = "callback_on_new_best"  # what EvalCallback calls besides


def tokens_to_go(agent: LanguageAgent, asked: int, reset: bool) -> int:
    """How many tokens from `num_timesteps` on a call of `learn` is to go.

    Rollouts are whole, so that a call overshoots what it was asked for. Where counting goes on, what was overshot counts
    towards the next call; where that would leave it nothing to do, it counts from `num_timesteps`, as in SB3.

    Args:
        agent: has `num_timesteps` tokens behind it and was asked for `_total_timesteps` so far.
        asked: `total_timesteps` of the call.
        reset: counting begins anew.
    """
    overshot = 0 if reset else max(0, agent.num_timesteps - agent._total_timesteps)
    return asked - overshot if asked > overshot else asked


def feed_kl_controllers(controllers: Iterable[Any], rollout: Rollout) -> None:
    """Tell the controllers, those of them that are any, the mean KL of the rollout's episodes."""
    kls = [info["kl"] for info in rollout.infos if "kl" in info]
    for controller in controllers:
        if isinstance(controller, KLController) and kls:
            controller.update(float(np.mean(kls)), len(kls))


def watch_together(agent: LanguageAgent, callback: BaseCallback) -> None:
    """Let SB3's callbacks come to the same conclusions in all processes, and the main one write and print.

    Episodes of an `EvalCallback` end at the tokens at which those of training do.

    Every process calls its callbacks, with the infos of all episodes. What an `EvalCallback` saves depends on how its episodes
    went, so that its env needs the same seed in all.
    """
    for evaluation in all_callbacks(callback):
        if isinstance(evaluation, EvalCallback) and evaluation.eval_env.has_attr("rules"):
            agree_on_ends(agent.policy, evaluation.eval_env)
    if agent.world.size == 1:
        return
    for part in all_callbacks(callback):
        if isinstance(part, EvalCallback):
            part.eval_env.seed(agent.seed)
            if not agent.world.main and part.eval_env.has_attr("rules"):
                for rules in all_rules(part.eval_env):
                    rules.recorder = None  # all play the same episodes
            part.log_path = part.log_path if agent.world.main else None
        part.verbose = part.verbose if agent.world.main else 0


def all_callbacks(callback: BaseCallback | None) -> Iterator[BaseCallback]:
    """A callback and all that it calls."""
    if callback is None:
        return
    yield callback
    for part in (*getattr(callback, "callbacks", ()), getattr(callback, "callback", None), getattr(callback, AT_BEST, None)):
        yield from all_callbacks(part)


def call_back(agent: LanguageAgent, callback: BaseCallback, rollout: Rollout) -> bool:
    """Count the tokens of a rollout and call `on_step` once every `env.num_envs` of them; False where it asked to stop.

    Tokens left over from a rollout count towards the first call of the next.
    """
    assert agent.env is not None
    rows = agent.env.num_envs
    infos, rewards, dones = episode_infos(agent, rollout), rollout.scores.cpu().numpy(), np.ones(len(rollout), dtype=bool)
    agent._update_info_buffer(infos, dones)
    new = int(rollout.lengths.sum())
    calls = max(1, (agent._tokens_left_over + new) // rows)
    agent._tokens_left_over = max(0, agent._tokens_left_over + new - calls * rows)
    end = agent.num_timesteps + new

    def call_all() -> bool:
        goes_on = True
        for call in range(1, calls + 1):
            last = call == calls
            agent.num_timesteps = end if last else min(end, agent.num_timesteps + rows)
            callback.update_locals(
                {"dones": dones if last else ~dones, "infos": infos if last else [{}] * len(infos), "rewards": rewards}
            )
            goes_on = callback.on_step() and goes_on
            if not goes_on and agent.world.size == 1:  # else others may be at what all do together, in a callback's next call
                break
        return goes_on

    return all(agent.world.together(call_all))
