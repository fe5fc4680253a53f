"""Agents that train causal language models on text envs, through the Stable-Baselines3 API."""

from agents.callbacks import TimeLimit
from agents.diagnostics import check_agent
from agents.extractors import TokenEmbeddingExtractor
from agents.grpo import GRPO
from agents.policy import LanguagePolicy
from agents.ppo import PPO
from agents.reinforce import REINFORCE
from agents.self_play import SelfPlay
from agents.vec_env import TextVecEnv

__all__ = [
    "GRPO",
    "PPO",
    "REINFORCE",
    "LanguagePolicy",
    "SelfPlay",
    "TextVecEnv",
    "TimeLimit",
    "TokenEmbeddingExtractor",
    "check_agent",
]
