"""Rollouts and single steps outside of `learn`, for tests."""

from agents.collection.collector import ResponseCollector, TokenCollector
from agents.engines.base import PolicyEngine


def collect(policy, venv, group_size, sampler, indexes=None):
    """One episode in every row of a vector env, on the response clock."""
    return ResponseCollector(policy, PolicyEngine(policy), venv, sampler, group_size).collect(indexes)


def collect_by_tokens(policy, vec_env, indexes, group_size, sampler):
    """Episodes of a VecEnv on the token clock."""
    return TokenCollector(policy, vec_env, sampler, group_size).collect(indexes)
