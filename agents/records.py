"""The one place where numbers become log entries. The README's table explains every key."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.utils import explained_variance, safe_mean

from agents.advantages import equal_groups
from agents.losses import kl_k3
from llm_env.reference import coefficient
from llm_env.rewards import METRIC

if TYPE_CHECKING:
    from agents.base import LanguageAgent
    from agents.rollout import Rollout

SAMPLES = 8
TEXT_ONLY_FOR_TENSORBOARD = ("stdout", "log", "json", "csv")


def record_rollout(agent: LanguageAgent, rollout: Rollout) -> None:
    """`rollout/` entries: what the policy did and what it earned."""
    record = agent.logger.record
    assert agent.ep_info_buffer is not None and agent.ep_success_buffer is not None
    record("rollout/ep_rew_mean", safe_mean([info["r"] for info in agent.ep_info_buffer]))
    record("rollout/ep_len_mean", safe_mean([info["l"] for info in agent.ep_info_buffer]))
    if agent.ep_success_buffer:
        record("rollout/success_rate", safe_mean(agent.ep_success_buffer))
    scores = rollout.scores
    record("rollout/reward_std", scores.std(correction=0).item())
    record("rollout/truncated", rollout.truncated.float().mean().item())
    if rollout.group_size > 1:
        record("rollout/zero_std_groups", equal_groups(scores, rollout.group_size).float().mean().item())
    if getattr(agent, "max_resamples", 0):
        record("rollout/resamples", len(rollout) // agent.n_envs - 1)
    for key in sorted({key for info in rollout.infos for key in info if key.startswith(("reward/", METRIC))}):
        record(f"rollout/{key.removeprefix(METRIC)}", safe_mean([info[key] for info in rollout.infos if key in info]))
    if agent.rules.rewards.replaces_errors:
        record("rollout/reward_errors", float(np.mean(["reward_error" in info for info in rollout.infos])))
    for name, seconds in agent.rules.rewards.take_seconds().items():
        record(f"time/reward/{name}", seconds)
    kls = [info["kl"] for info in rollout.infos if "kl" in info]
    if kls:
        record("rollout/kl", safe_mean(kls))
    in_loss = coefficient(agent.kl_coef)
    if agent.rules.kl is not None or in_loss:
        record("rollout/kl_coef", in_loss if agent.rules.kl is None else agent.rules.kl.value)
    if agent._link is not None:
        record("rollout/push_gap", agent._link.gap)
        record("time/push", agent._link.seconds)
    record("rollout/samples", samples_table(rollout), exclude=TEXT_ONLY_FOR_TENSORBOARD)


def episode_infos(agent: LanguageAgent, rollout: Rollout) -> list[dict[str, Any]]:
    """The last infos with what SB3's `Monitor` adds, for its callbacks."""
    seconds = round((time.time_ns() - agent.start_time) / 1e9, 6)
    returns = rollout.scores.tolist()
    return [
        {"episode": {"r": returns[i], "l": len(rollout.responses[i]), "t": seconds}, **info}
        for i, info in enumerate(rollout.infos)
    ]


def samples_table(rollout: Rollout) -> str:
    """Prompts and completions from all over a rollout (not of one group) with their returns, as a Markdown table."""
    lines = ["| prompt | completion | return |", "| --- | --- | --- |"]
    episodes = list(zip(rollout.infos, rollout.scores.tolist(), strict=True))
    for info, score in episodes[:: -(-len(episodes) // SAMPLES)]:
        lines.append(f"| {_cell(info['prompt'])} | {_cell(info['completion'])} | {score:.3g} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    shown = text if len(text) <= 500 else text[:500] + " ..."
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>") or "(empty)"


def record_training(agent: LanguageAgent, rollout: Rollout, totals: dict[str, list[float]]) -> None:
    """`train/` entries: means over the optimizer steps of one rollout."""
    record = agent.logger.record
    for key, steps in totals.items():
        record(f"train/{key}", float(np.mean(steps)))
    record("train/n_updates", agent._n_updates, exclude="tensorboard")
    if rollout.ref_logp is not None:  # as sampled: off-policy, after some steps, k3 is ruled by a few tokens
        record("train/kl_ref", kl_k3(rollout.sampled_logp, rollout.ref_logp)[rollout.mask.bool()].mean().item())
    if rollout.old_logp is not None:
        gap = (rollout.old_logp - rollout.sampled_logp).abs() * rollout.mask
        record("train/logp_gap", gap.max().item())
    if rollout.old_values is not None and rollout.returns is not None:
        here = rollout.mask.bool()
        values, returns = rollout.old_values[here].cpu().numpy(), rollout.returns[here].cpu().numpy()
        record("train/explained_variance", float(explained_variance(values, returns)))


def record_time(agent: LanguageAgent, iteration: int) -> None:
    """`time/` entries; a timestep is an action token."""
    elapsed = max((time.time_ns() - agent.start_time) / 1e9, 1e-9)
    tokens: Any = agent.num_timesteps - agent._num_timesteps_at_start
    if iteration > 0:
        agent.logger.record("time/iterations", iteration, exclude="tensorboard")
    agent.logger.record("time/fps", int(tokens / elapsed))
    agent.logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
    agent.logger.record("time/total_timesteps", agent.num_timesteps, exclude="tensorboard")
