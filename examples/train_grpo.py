"""The main job: GRPO makes the packaged pupil carry, from nothing but "right" and "wrong".

    python examples/train_grpo.py --seed 0

prints the accuracy on held-out problems before and after and some answers, and leaves TensorBoard logs in `runs` and the
trained model in `outputs/grpo_addition`.
"""

from typing import Any

from school import teach
from stable_baselines3.common.utils import LinearSchedule

import llm_env
from agents import GRPO


def make_agent(env: Any, **settings: Any) -> GRPO:
    """32 problems a rollout, 8 answers to each, one optimizer step; the learning rate falls to 0."""
    rate = LinearSchedule(3e-4, 0.0, 1.0)
    return GRPO(llm_env.PUPIL, env, learning_rate=rate, group_size=8, n_envs=256, **settings)


if __name__ == "__main__":
    teach(make_agent, "grpo_addition", timesteps=70_000, description=__doc__)
