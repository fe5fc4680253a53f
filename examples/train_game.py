"""Train the packaged pupil on a guessing game of several turns, with GRPO or PPO.

    python examples/train_game.py --algorithm GRPO --seed 0

The game: guess a number from 1 to 7 in three turns. After a wrong guess the reply is "+" (higher) or "-" (lower). The reward is
1 for the right guess. Guessing at random succeeds in 0.37 of the games, guessing three different numbers in 0.43. Both hints
are needed for 1.0: a first guess of 4, then 2 or 6, then the number that is left.

The script prints two games before and after training, and the success rate on seeds that were not trained on. It writes
TensorBoard logs to `runs`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from transformers import AutoTokenizer
from transformers.utils import logging

import llm_env
from agents import GRPO, PPO
from agents.base import LanguageAgent

LARGEST, TURNS = 7, 3
ENTROPY = 0.2  # weight of the entropy bonus at the start of training
HELD_OUT = 1_000_000  # first seed of the games for evaluation


class GuessNumber:
    """A text environment: guess a number from 1 to `LARGEST` in `TURNS` turns.

    The game ends itself after the last guess. If it were cut off by `max_turns`, agents that bootstrap truncated episodes (such
    as SB3's PPO) would learn that guessing on is as good as winning.
    """

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Think of a number."""
        self.number = int(np.random.default_rng(seed).integers(1, LARGEST + 1))
        self.left = TURNS
        return "guess=", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Compare a guess with the number."""
        guess = int(action)  # `allowed_tokens` permits digits only
        self.left -= 1
        success = guess == self.number
        return "+" if guess < self.number else "-", float(success), success or not self.left, False, {"is_success": success}


def make_env(first_seed: int = 0, **settings: Any) -> llm_env.TextGenerationEnv:
    """Make the token env: a turn is one digit."""
    tokenizer = AutoTokenizer.from_pretrained(llm_env.PUPIL)
    digits = tokenizer.convert_tokens_to_ids([str(number) for number in range(1, LARGEST + 1)])
    return llm_env.TextGenerationEnv.from_text_env(
        GuessNumber,
        tokenizer,
        first_seed=first_seed,
        max_turns=TURNS,
        max_new_tokens=1,
        max_prompt_tokens=8,
        max_observation_tokens=1,
        allowed_tokens=digits,
        **settings,
    )


def make_agent(algorithm: str, env: Any, **settings: Any) -> LanguageAgent:
    """Create an agent for the pupil. Its learning rate falls from 1e-3 to 1e-4."""
    rate = LinearSchedule(1e-3, 1e-4, end_fraction=1.0)
    settings = {"n_envs": 256, "n_epochs": 1, "learning_rate": rate, "ent_coef": ENTROPY, **settings}
    if algorithm == "GRPO":
        return GRPO(llm_env.PUPIL, env, group_size=8, **settings)
    return PPO(llm_env.PUPIL, env, gae_lambda=1.0, separate_critic=True, **settings)


class LessEntropy(BaseCallback):
    """Callback that lowers the weight of the entropy bonus from `ENTROPY` to 0.

    The bonus keeps the agent trying other guesses. Without it, agents settle on a first guess of 3, with which 6 of the 7
    numbers can be found.
    """

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.model.ent_coef = ENTROPY * max(0.0, 1 - self.model.num_timesteps / self.locals["total_timesteps"])


def main() -> None:
    """Train and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", choices=["GRPO", "PPO"], default="GRPO")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timesteps", type=int, default=150_000, help="training budget, in action tokens (default 150000)")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard logs (default runs)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()

    agent = make_agent(arguments.algorithm, make_env(), seed=arguments.seed, tensorboard_log=str(arguments.logs))
    test = make_env(HELD_OUT, num_tasks=700)
    before = agent.evaluate(test, deterministic=False)["success_rate"]
    games = [str(agent.play(test, HELD_OUT + i)) for i in range(2)]
    print(f"success rate before training: {before:.3f}. Training ...")
    start = time.monotonic()
    agent.learn(arguments.timesteps, callback=LessEntropy())
    seconds = time.monotonic() - start
    for i, game in enumerate(games):
        print(f"\n--- a game before training\n{game}\n--- the same game after training\n{agent.play(test, HELD_OUT + i)}")
    sampled, greedy = (agent.evaluate(test, deterministic=flag)["success_rate"] for flag in (False, True))
    print(
        f"\n{arguments.algorithm}, seed {arguments.seed}: success rate {before:.3f} before, {sampled:.3f} after (greedy "
        f"{greedy:.3f}), {seconds:.0f} s on {agent.num_timesteps} tokens"
    )


if __name__ == "__main__":
    main()
