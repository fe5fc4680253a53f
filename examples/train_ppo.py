"""PPO on the same job: a critic instead of the group.

    python examples/train_ppo.py --seed 0

prints the accuracy on held-out problems before and after and some answers, and leaves TensorBoard logs in `runs` and the
trained model in `outputs/ppo_addition`.
"""

from typing import Any

from school import teach
from stable_baselines3.common.utils import LinearSchedule

import llm_env
from agents import PPO


def make_agent(env: Any, **settings: Any) -> PPO:
    """256 problems a rollout, one pass over it in four optimizer steps; the learning rate falls to 0."""
    rate = LinearSchedule(3e-4, 0.0, 1.0)
    return PPO(llm_env.PUPIL, env, learning_rate=rate, n_envs=256, batch_size=64, n_epochs=1, **settings)


if __name__ == "__main__":
    teach(make_agent, "ppo_addition", timesteps=60_000, description=__doc__)
