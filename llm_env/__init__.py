"""A Gymnasium environment whose actions are tokens."""

from llm_env.env import TextGenerationEnv
from llm_env.prompts import PromptSource
from llm_env.pupil import PUPIL
from llm_env.reward_check import check_reward
from llm_env.tasks import register_tasks
from llm_env.vector_env import TextGenerationVectorEnv

__version__ = "0.1.0"
__all__ = ["PUPIL", "PromptSource", "TextGenerationEnv", "TextGenerationVectorEnv", "check_reward", "register_tasks"]

register_tasks()
