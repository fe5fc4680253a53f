"""Evaluation: one episode for every prompt of an env."""

from __future__ import annotations

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from agents.collection.collector import ResponseCollector, TokenCollector
from agents.distributed.communicator import Communicator
from agents.engines.base import PolicyEngine
from agents.policy import LanguagePolicy
from agents.sampling.sampler import Sampler
from agents.vec_env import rules_of_vec_env, vector_env_of
from llm_env import TextGenerationVectorEnv


def evaluate(
    policy: LanguagePolicy,
    vec_env: VecEnv,
    sampler: Sampler,
    batch_size: int,
    communicator: Communicator,
    n_prompts: int | None = None,
    repeats: int = 1,
) -> dict[str, float]:
    """Run `repeats` episodes for every prompt of an env; see `LanguageAgent.evaluate`.

    Args:
        policy: the model.
        vec_env: text envs.
        sampler: temperature, or greedy decoding.
        batch_size: episodes at a time.
        communicator: the processes that share the work.
        n_prompts: number of prompts, from the first on; all by default.
        repeats: episodes per prompt.

    Returns:
        Means over the prompts, and with `repeats` above 1 their standard errors.
    """
    rules = rules_of_vec_env(vec_env)
    indexes = [index for index in rules.prompts.indexes(n_prompts) for _ in range(repeats)]
    rows: list[dict[str, float]] = []
    for begin in range(0, len(indexes), batch_size):
        rows += _run_episodes(policy, vec_env, sampler, communicator, indexes[begin : begin + batch_size])
    columns: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
    means = {key: float(np.mean(values)) for key, values in columns.items()}
    if repeats > 1:
        for key in ("reward", "success_rate"):
            if len(values := columns.get(key, [])) == len(rows):
                means[f"{key}_stderr"] = standard_error(np.array(values).reshape(-1, repeats))
    return means


def _run_episodes(
    policy: LanguagePolicy, vec_env: VecEnv, sampler: Sampler, communicator: Communicator, indexes: list[int]
) -> list[dict[str, float]]:
    """Run one episode for each index; return what is averaged."""
    if vector_env_of(vec_env) is None:
        rollout = TokenCollector(policy, vec_env, sampler, communicator=communicator).collect(indexes)
    else:
        venv = TextGenerationVectorEnv.from_rules(rules_of_vec_env(vec_env), len(indexes))
        rollout = ResponseCollector(policy, PolicyEngine(policy), venv, sampler, communicator=communicator).collect(indexes)
        venv.close()
    rows = []
    for info, score, length in zip(rollout.infos, rollout.scores.tolist(), rollout.num_actions, strict=True):
        row = {"reward": score, "length": float(length), **{k: info[k] for k in info if k.startswith("reward/")}}
        if "is_success" in info:
            row["success_rate"] = float(info["is_success"])
        if "observation_tokens" in info:
            row["turns"] = float(info["turns"])
        rows.append(row)
    return rows


def standard_error(values: np.ndarray) -> float:
    """Compute the standard error of the mean of episodes, where the episodes of a prompt are not independent.

    Args:
        values: (N, R), R episodes for each of N prompts.

    Returns:
        The standard deviation of the N means over sqrt(N); with one prompt, that of its R episodes over sqrt(R).
    """
    means = values.mean(1) if len(values) > 1 else values[0]
    return float(means.std(ddof=1) / np.sqrt(len(means)))
