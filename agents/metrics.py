"""Log entries. The README's table explains every key."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance, safe_mean

from agents.advantages import equal_groups
from agents.engines.base import Engine
from agents.engines.weight_sync import SyncedEngine
from agents.losses import kl_k3
from agents.rollout import Rollout, logged_turns
from llm_env.rewards import METRIC
from llm_env.rules import Rules
from llm_env.tools.toolset import TOOL_COUNTS

SAMPLES, PRINTED_SAMPLES = 8, 3  # episodes in the logs, and on the console
LONGEST_CELL, LONGEST_PRINTED = 500, 200  # characters
TEXT_ONLY_FOR_TENSORBOARD = ("stdout", "log", "json", "csv")


def record_rollout(
    logger: Logger,
    rollout: Rollout,
    rules: Rules,
    *,
    episodes: Iterable[dict[str, Any]],
    successes: Iterable[float],
    kl_in_loss: float,
    resamples: int | None,
    engine: Engine,
) -> None:
    """Record `rollout/` entries: what the policy did and what it earned.

    Args:
        logger: SB3's.
        rollout: the episodes of this rollout.
        rules: the env's.
        episodes: of the last episodes, over several rollouts maybe, what SB3's `Monitor` adds to their infos.
        successes: of the last episodes whether they succeeded, empty where that is not defined.
        kl_in_loss: the coefficient of the KL in the loss.
        resamples: rollouts that were collected besides the first one; None where there are none by the settings.
        engine: generated the responses.
    """
    record = logger.record
    record("rollout/ep_rew_mean", safe_mean([episode["r"] for episode in episodes]))
    record("rollout/ep_len_mean", safe_mean([episode["l"] for episode in episodes]))
    if successes:
        record("rollout/success_rate", safe_mean(list(successes)))
    scores = rollout.scores
    record("rollout/reward_std", scores.std(correction=0).item())
    record("rollout/truncated", rollout.truncated.float().mean().item())
    if rollout.group_size > 1:
        record("rollout/zero_std_groups", equal_groups(scores, rollout.group_size).float().mean().item())
    if resamples is not None:
        record("rollout/resamples", resamples)
    for key in sorted({key for info in rollout.infos for key in info if key.startswith(("reward/", METRIC))}):
        record(f"rollout/{key.removeprefix(METRIC)}", safe_mean([info[key] for info in rollout.infos if key in info]))
    if rules.rewards.replaces_errors:
        record("rollout/reward_errors", float(np.mean(["reward_error" in info for info in rollout.infos])))
    for name, seconds in rules.rewards.take_seconds().items():
        record(f"time/reward/{name}", seconds)
    if rules.has_replies:
        _record_turns(logger, rollout, rules)
    _record_kl(logger, rollout, rules, kl_in_loss)
    if isinstance(engine, SyncedEngine):
        record("rollout/push_gap", engine.gap)
        record("time/push", engine.seconds)
    record("rollout/samples", samples_table(samples_of(rollout, rules)), exclude=TEXT_ONLY_FOR_TENSORBOARD)


def _record_kl(logger: Logger, rollout: Rollout, rules: Rules, kl_in_loss: float) -> None:
    """Record the KL of the episodes and its coefficient, where there are any."""
    kls = [info["kl"] for info in rollout.infos if "kl" in info]
    if kls:
        logger.record("rollout/kl", safe_mean(kls))
    if rules.kl is not None or kl_in_loss:
        logger.record("rollout/kl_coef", kl_in_loss if rules.kl is None else rules.kl.value)


def _record_turns(logger: Logger, rollout: Rollout, rules: Rules) -> None:
    """Record what concerns episodes of several turns."""
    infos = [info for info in rollout.infos if "turns" in info]  # not those that a wrapper ended
    turns = sum(info["turns"] for info in infos)
    if turns:
        logger.record("rollout/turns", turns / len(infos))
        logger.record("rollout/turn_truncated", sum(info["turns_truncated"] for info in infos) / turns)
        overflows = [info.get("truncated_by") == "max_episode_tokens" for info in infos]
        logger.record("rollout/overflow", float(np.mean(overflows)))
        if rules.rollout_timeout is not None:
            late = [info.get("truncated_by") == "rollout_timeout" for info in infos]
            logger.record("rollout/timed_out", float(np.mean(late)))
        if rules.text_env is not None and rules.text_env.on_error != "raise":
            logger.record("rollout/env_errors", float(np.mean(["env_error" in info for info in infos])))
        logger.record("rollout/observation_tokens", safe_mean([info["observation_tokens"] for info in infos]))
    for key in sorted({key for info in infos for key in info if key.startswith("env/")}):
        logger.record(f"rollout/{key}", safe_mean([info[key] for info in infos if key in info]))
    for key in TOOL_COUNTS:
        if counts := [info[key] for info in infos if key in info]:
            logger.record(f"rollout/{key}", safe_mean(counts))
    logger.record("time/env", 0.0 if rules.replies is None else rules.replies.take_seconds())


def samples_of(rollout: Rollout, rules: Rules, count: int = SAMPLES) -> list[dict[str, str]]:
    """Return some episodes from all over a rollout (not of one group): prompt, completion, answer, return and components.

    Args:
        rollout: the episodes.
        rules: the env's; its column `answer`, where the prompts have one, is the reference answer.
        count: how many episodes.
    """
    rows = []
    episodes = list(zip(rollout.infos, rollout.scores.tolist(), strict=True))
    for info, score in episodes[:: -(-len(episodes) // count)]:
        row = {"prompt": info["prompt"], "completion": info["completion"]}
        if rules.has_replies and "transcript" in info:
            row = {"transcript": info["transcript"]}
        columns = rules.prompts.row(info["prompt_index"]) if "prompt_index" in info else {}
        if "answer" in columns:
            row["answer"] = str(columns["answer"])
        row["return"] = f"{score:.3g}"
        row |= {key: f"{info[key]:.3g}" for key in info if key.startswith("reward/")}
        rows.append(row)
    return rows


def samples_table(rows: list[dict[str, str]]) -> str:
    """Return samples as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
    lines += [f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(text: str) -> str:
    shown = text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + " ..."
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>") or "(empty)"


def print_samples(rows: Sequence[dict[str, str]]) -> None:
    """Print samples to the console, as a table where rich is installed."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column, "")[:LONGEST_PRINTED] for column in columns] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for values in cells:
            print(" | ".join(f"{column}: {value!r}" for column, value in zip(columns, values, strict=True)))
        return
    table = Table(*columns)
    for values in cells:
        table.add_row(*map(Text, values))
    Console().print(table)


def record_update(logger: Logger, rollout: Rollout, statistics: dict[str, float], num_updates: int) -> None:
    """Record `train/` entries.

    Args:
        logger: SB3's.
        rollout: what was trained on.
        statistics: means over the optimizer steps of the update.
        num_updates: optimizer steps so far.
    """
    record = logger.record
    for key, value in statistics.items():
        record(f"train/{key}", value)
    record("train/n_updates", num_updates, exclude="tensorboard")
    if rollout.ref_logp is not None:  # as sampled: off-policy, after some steps, a few tokens dominate k3
        kl = kl_k3(rollout.sampled_logp, rollout.ref_logp)
        record("train/kl_ref", kl[rollout.mask.bool()].mean().item())
        for turn in logged_turns(rollout):
            record(f"train/kl_ref/turn_{turn + 1}", kl[rollout.turn_ids == turn].mean().item())
    if rollout.old_logp is not None:
        gap = (rollout.old_logp - rollout.sampled_logp).abs() * rollout.mask
        record("train/logp_gap", gap.max().item())
    if rollout.old_values is not None and rollout.returns is not None:
        actions = rollout.mask.bool()
        values, returns = rollout.old_values[actions].cpu().numpy(), rollout.returns[actions].cpu().numpy()
        record("train/explained_variance", float(explained_variance(values, returns)))


def record_time(logger: Logger, iteration: int, timesteps: int, new_timesteps: int, start_time: float) -> None:
    """Record `time/` entries.

    Args:
        logger: SB3's.
        iteration: rollouts of this call of `learn`.
        timesteps: action tokens so far.
        new_timesteps: action tokens of this call of `learn`.
        start_time: when it began, in nanoseconds since the epoch.
    """
    elapsed = max((time.time_ns() - start_time) / 1e9, 1e-9)
    if iteration > 0:
        logger.record("time/iterations", iteration, exclude="tensorboard")
    logger.record("time/fps", int(new_timesteps / elapsed))
    logger.record("time/time_elapsed", int(elapsed), exclude="tensorboard")
    logger.record("time/total_timesteps", timesteps, exclude="tensorboard")


def episode_infos(rollout: Rollout, start_time: float) -> list[dict[str, Any]]:
    """Return the last infos with what SB3's `Monitor` adds, for its callbacks; `start_time` is in nanoseconds."""
    seconds = round((time.time_ns() - start_time) / 1e9, 6)
    returns, lengths = rollout.scores.tolist(), rollout.num_actions
    return [{"episode": {"r": returns[i], "l": int(lengths[i]), "t": seconds}, **info} for i, info in enumerate(rollout.infos)]
