"""Train the packaged pupil on addition with PPO and a 0/1 correctness reward.

    python examples/train_ppo.py --seed 0

The task is that of `train_grpo.py`, with a critic instead of groups. The script prints sample answers and the accuracy on
held-out problems, before and after training. It writes TensorBoard logs to `runs` and the trained model to
`outputs/ppo_addition`.
"""

from typing import Any

from school import teach
from stable_baselines3.common.utils import LinearSchedule

import llm_env
from agents import PPO


def make_agent(env: Any, **settings: Any) -> PPO:
    """Create a PPO agent for the pupil.

    A rollout has 256 problems and is used for one epoch of four optimizer steps. The learning rate decreases to 0.
    """
    rate = LinearSchedule(3e-4, 0.0, 1.0)
    return PPO(llm_env.PUPIL, env, learning_rate=rate, n_envs=256, batch_size=64, n_epochs=1, **settings)


if __name__ == "__main__":
    teach(make_agent, "ppo_addition", timesteps=60_000, description=__doc__)
