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
    policy: LanguagePolicy, vec_env: VecEnv, sampler: Sampler, batch_size: int, communicator: Communicator
) -> dict[str, float]:
    """Run one episode for every prompt of an env.

    Args:
        policy: the model.
        vec_env: text envs.
        sampler: temperature, or greedy decoding.
        batch_size: prompts at a time.
        communicator: the processes that share the work.

    Returns:
        Means over the prompts: `reward` (the return), `length` in tokens, `success_rate` where the env defines success, and
        `reward/<name>` for every component.
    """
    rules = rules_of_vec_env(vec_env)
    columns: dict[str, list[float]] = {}
    for begin in range(0, len(rules.prompts), batch_size):
        indexes = list(range(begin, min(begin + batch_size, len(rules.prompts))))
        collector: ResponseCollector | TokenCollector
        if vector_env_of(vec_env) is None:
            collector = TokenCollector(policy, vec_env, sampler, communicator=communicator)
        else:
            venv = TextGenerationVectorEnv.from_rules(rules, len(indexes))
            collector = ResponseCollector(policy, PolicyEngine(policy), venv, sampler, communicator=communicator)
        rollout = collector.collect(indexes)
        for info, score, length in zip(rollout.infos, rollout.scores.tolist(), rollout.lengths, strict=True):
            row = {"reward": score, "length": float(length), **{k: info[k] for k in info if k.startswith("reward/")}}
            if "is_success" in info:
                row["success_rate"] = float(info["is_success"])
            for key, value in row.items():
                columns.setdefault(key, []).append(value)
    return {key: float(np.mean(values)) for key, values in columns.items()}
