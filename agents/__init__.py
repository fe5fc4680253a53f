"""Agents that train causal language models on text envs, through the Stable-Baselines3 API."""

from typing import TYPE_CHECKING

from llm_env.lazy import lazy_names

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

if TYPE_CHECKING:  # what type checkers and editors see; the table below says the same
    from agents.callbacks import TimeLimit
    from agents.diagnostics import check_agent
    from agents.extractors import TokenEmbeddingExtractor
    from agents.grpo import GRPO
    from agents.policy import LanguagePolicy
    from agents.ppo import PPO
    from agents.reinforce import REINFORCE
    from agents.self_play import SelfPlay
    from agents.vec_env import TextVecEnv
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "GRPO": "agents.grpo",
            "LanguagePolicy": "agents.policy",
            "PPO": "agents.ppo",
            "REINFORCE": "agents.reinforce",
            "SelfPlay": "agents.self_play",
            "TextVecEnv": "agents.vec_env",
            "TimeLimit": "agents.callbacks",
            "TokenEmbeddingExtractor": "agents.extractors",
            "check_agent": "agents.diagnostics",
        },
    )
