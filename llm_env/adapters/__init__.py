"""Environments of other projects as text environments, imported when they are asked for."""

from llm_env.adapters.base import Adapter, GlobalGenerators
from llm_env.adapters.gem import GEMEnv
from llm_env.adapters.gymnasium import GymnasiumTextEnv
from llm_env.adapters.others import OpenEnvEnv, SkyRLEnv
from llm_env.adapters.textarena import TextArenaEnv
from llm_env.adapters.trl import TRLEnv, as_text_env, as_trl_environment

__all__ = [
    "Adapter",
    "GEMEnv",
    "GlobalGenerators",
    "GymnasiumTextEnv",
    "OpenEnvEnv",
    "SkyRLEnv",
    "TRLEnv",
    "TextArenaEnv",
    "as_text_env",
    "as_trl_environment",
]
