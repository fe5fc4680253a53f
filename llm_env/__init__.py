"""A Gymnasium environment whose actions are tokens."""

import warnings
from importlib import metadata
from typing import TYPE_CHECKING

from llm_env.dialogue.check_text_env import check_text_env
from llm_env.dialogue.text_env import TextEnv, TextEnvTasks
from llm_env.env import TextGenerationEnv
from llm_env.lazy import lazy_names
from llm_env.prompts import PromptSource
from llm_env.pupil import PUPIL
from llm_env.recorder import rescore
from llm_env.rewards import process_reward
from llm_env.rewards.pool import PooledReward
from llm_env.rewards.reward_check import check_reward
from llm_env.tasks import register_tasks
from llm_env.vector_env import TextGenerationVectorEnv

__version__ = "0.1.0"
__all__ = [
    "PUPIL",
    "PooledReward",
    "PromptSource",
    "RewardModel",
    "TextEnv",
    "TextEnvTasks",
    "TextGenerationEnv",
    "TextGenerationVectorEnv",
    "check_reward",
    "check_text_env",
    "process_reward",
    "register_tasks",
    "rescore",
]

if TYPE_CHECKING:  # what type checkers and editors see of names that are imported when they are used
    from llm_env import adapters as adapters
    from llm_env import reference as reference
    from llm_env.rewards.reward_models import RewardModel
else:
    __getattr__, __dir__ = lazy_names(__name__, {"RewardModel": "llm_env.rewards.reward_models"})

register_tasks()


def _warn_of_name_collision() -> None:
    """Warn where another distribution has installed a package of the name `agents`, too."""
    try:
        metadata.distribution("openai-agents")
    except metadata.PackageNotFoundError:
        return
    warnings.warn(
        "the distribution openai-agents is installed, too. It and llm-env both have a top-level package `agents`, and one has "
        "overwritten files of the other: use a separate virtual environment for each (python -m venv), and reinstall llm-env",
        stacklevel=3,
    )


_warn_of_name_collision()
