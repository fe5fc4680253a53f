"""Define and train five agents; record accuracy, gradient noise and update size."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

import llm_env
from agents import GRPO, PPO, REINFORCE
from agents.base import LanguageAgent
from agents.losses import ratio_statistics
from agents.rollout import Rollout
from ladder_parts.gradients import halves
from llm_env import TextGenerationEnv
from llm_env.rules import Rules
from llm_env.tasks.addition import addition
from llm_env.tokenization import encode_texts

EPISODES = 64  # per rollout, about four tokens each
GROUP = 8  # answers per problem, for GRPO
EXAM = 256  # held-out problems
EXAM_EVERY = 500  # tokens between exams
HALVES_EVERY = 4  # rollouts between measurements of gradient noise

Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """Step of the ladder: agent class with its arguments, and env arguments.

    `rules` holds env arguments in addition to those of `addition()`.
    """

    name: str
    kind: type[LanguageAgent]
    settings: dict[str, Any]
    rules: dict[str, Any] = field(default_factory=dict)


# Each learning rate is the best of four, about a factor of 3 apart, by the accuracy after 8000 tokens of one run with seed 100.
# "reference" uses the learning rate of "clipping", because both are PPO.
STEPS = [
    Step("naive reward", REINFORCE, {"learning_rate": 3e-4}),
    Step("critic", REINFORCE, {"learning_rate": 3e-4, "baseline": "value"}),
    Step("clipping", PPO, {"learning_rate": 1e-4}),
    Step("reference", PPO, {"learning_rate": 1e-4}, {"reference": llm_env.PUPIL, "kl_coef": 0.05}),
    Step("group", GRPO, {"learning_rate": 3e-4, "group_size": GROUP}),
]


@dataclass
class Run:
    """Measurements of a training run.

    Attributes:
        curves: lists of (tokens, number), by name.
            accuracy: expected share of the exam's problems that are solved, with answers sampled as in training.
            update_kl: KL(pi_old, pi_new) per token of a whole update, in nats. (`train/approx_kl` is a mean over its steps.)
            signal, noise: unbiased estimates of ||E g||^2 and E||g - E g||^2, where g is the gradient of a rollout.
            reward/<name>, kl: means over the episodes of a rollout.
        seconds: CPU time, including measurements.
    """

    curves: dict[str, Curve] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, tokens: int, **numbers: float) -> None:
        """Append a point to each of the named curves."""
        for name, number in numbers.items():
            self.curves.setdefault(name, []).append((tokens, number))

    def values(self, name: str) -> np.ndarray:
        """Return the numbers of a curve, without tokens."""
        return np.array([number for _, number in self.curves[name]])

    def tokens_to(self, accuracy: float) -> float:
        """Return the tokens until an exam reaches `accuracy`; infinity if none does."""
        return next((float(tokens) for tokens, share in self.curves["accuracy"] if share >= accuracy), float("inf"))


class Exam:
    """Exam on held-out problems, the same for every agent.

    The accuracy is the expected share of problems that are solved by answers sampled as in training: the mean probability of
    the correct answer with its end token. Nothing is sampled, so the exam has no noise and does not change training.

    Args:
        problems: number of held-out problems. Default `EXAM`.
    """

    def __init__(self, problems: int = EXAM) -> None:
        rules = Rules(**addition(split="test"))
        indexes = np.random.default_rng(0).permutation(len(rules.prompts))[:problems].tolist()
        self.prompts = [rules.prompts.ids[i].tolist() for i in indexes]
        texts = [rules.prompts.row(i)["answer"] for i in indexes]
        self.answers = [[*ids, rules.eos_id] for ids in encode_texts(rules.tokenizer, texts, special=False)]

    def __call__(self, agent: LanguageAgent) -> float:
        """Return the expected share of problems solved."""
        with torch.no_grad():
            logp = agent.policy.evaluate_actions(self.prompts, self.answers, agent.temperature).logp
        written = torch.arange(logp.shape[1]) < torch.tensor([len(answer) for answer in self.answers])[:, None]
        return float((logp.double() * written).sum(1).exp().mean())


class Rewards(BaseCallback):
    """Callback that records the mean rewards of every rollout in a run."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        infos = self.locals["infos"]
        names = [name for name in infos[0] if name == "kl" or name.startswith("reward/")]
        self.run.note(self.num_timesteps, **{name: float(np.mean([info[name] for info in infos])) for name in names})


class Watch(Rewards):
    """Callback that records the rewards of every rollout and the exam accuracy.

    The exam is held before training, about every `EXAM_EVERY` tokens, and after training.
    """

    def __init__(self, run: Run, exam: Exam) -> None:
        super().__init__(run)
        self.exam, self.due = exam, 0

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps >= self.due:
            self.examine()

    def _on_training_end(self) -> None:
        self.examine()

    def examine(self) -> None:
        """Record the held-out accuracy in the run and in the logger."""
        accuracy = self.exam(self.model)
        self.run.note(self.model.num_timesteps, accuracy=accuracy)
        self.logger.record("ladder/held_out_accuracy", accuracy)
        self.due = self.model.num_timesteps + EXAM_EVERY


class Watched(LanguageAgent):
    """Mixin for agents that measures gradient noise and the KL of updates."""

    run: Run
    updates = 0

    def train(self, rollout: Rollout) -> None:
        """Update the agent; measure gradient noise before and the KL after the update."""
        record, tokens = self.logger.record, self.num_timesteps
        if self.updates % HALVES_EVERY == 0:
            signal, noise = halves(self, rollout)
            self.run.note(tokens, signal=signal, noise=noise)
            record("ladder/gradient_signal", signal)
            record("ladder/gradient_noise", noise)
        self.updates += 1
        super().train(rollout)
        with torch.no_grad():
            new = self.policy.evaluate_actions(rollout.prompts, rollout.responses, self.temperature)
        kl = ratio_statistics(new.logp, rollout.old_logp, rollout.mask, 0.0, 0.0)["approx_kl"].item()
        self.run.note(tokens, update_kl=kl)
        record("ladder/update_kl", kl)


def make_env(**rules: Any) -> TextGenerationEnv:
    """Create the Addition env with additional arguments."""
    return TextGenerationEnv(**addition(**rules))


def train(step: Step, seed: int, timesteps: int, exam: Exam, logs: str | None) -> Run:
    """Train the agent of a step for `timesteps` tokens; return the measurements."""
    kind = type(f"Watched{step.kind.__name__}", (Watched, step.kind), {})
    agent = kind(llm_env.PUPIL, make_env(**step.rules), n_envs=EPISODES, seed=seed, tensorboard_log=logs, **step.settings)
    agent.run = run = Run()
    start = time.process_time()
    agent.learn(timesteps, callback=Watch(run, exam), tb_log_name=f"{step.name}_{seed}".replace(" ", "_"))
    run.seconds = time.process_time() - start
    return run
