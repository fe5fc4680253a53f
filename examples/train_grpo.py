"""Train the packaged pupil on addition with GRPO and a 0/1 correctness reward.

    python examples/train_grpo.py --seed 0

The script prints sample answers and the accuracy on held-out problems, before and after training. It writes TensorBoard logs
to `runs` and the trained model to `outputs/grpo_addition`.
"""

from typing import Any

from school import teach
from stable_baselines3.common.utils import LinearSchedule

import llm_env
from agents import GRPO


def make_agent(env: Any, **settings: Any) -> GRPO:
    """Create a GRPO agent for the pupil.

    A rollout has 32 problems with 8 answers each and is used for one optimizer step. The learning rate decreases to 0.
    """
    rate = LinearSchedule(3e-4, 0.0, 1.0)
    return GRPO(llm_env.PUPIL, env, learning_rate=rate, group_size=8, n_envs=256, **settings)


if __name__ == "__main__":
    teach(make_agent, "grpo_addition", timesteps=70_000, description=__doc__)
