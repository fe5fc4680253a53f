"""Collect episodes and take optimizer steps that leave an agent unchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.collection.collector import ResponseCollector, TokenCollector
from agents.diagnostics.compare import active_dropout
from agents.distributed.communicator import SINGLE_PROCESS
from agents.engines.base import PolicyEngine
from agents.policy import Evaluation, LanguagePolicy
from agents.rollout import Rollout
from agents.sampling.sampler import Sampler
from agents.training.objective import Objective
from agents.training.preserve import NoOpOptimizer
from agents.training.trainer import Trainer
from agents.vec_env import rules_of_vec_env, unique_rules, vector_env_of
from llm_env import TextGenerationVectorEnv
from llm_env.patching import patched
from llm_env.prompts import PromptCursor
from llm_env.rules import Rules


class Agent(Protocol):
    """The part of an agent that a check uses."""

    @property
    def env(self) -> VecEnv | None: ...  # noqa: D102

    @property
    def policy(self) -> LanguagePolicy: ...  # noqa: D102

    @property
    def rules(self) -> Rules: ...  # noqa: D102

    @property
    def n_envs(self) -> int: ...  # noqa: D102

    @property
    def group_size(self) -> int: ...  # noqa: D102

    def make_trainer(self) -> Trainer: ...  # noqa: D102

    def sampler(self, deterministic: bool = False) -> Sampler: ...  # noqa: D102


@contextmanager
def unrecorded(env: VecEnv) -> Iterator[None]:
    """Write no episodes to the env's records within the block, and do not count the time of its reward functions."""
    rewards, recorders = rules_of_vec_env(env).rewards, [(rules, rules.recorder) for rules in unique_rules(env)]
    seconds = rewards.take_seconds()
    try:
        for rules, _ in recorders:
            rules.recorder = None
        yield
    finally:
        for rules, recorder in recorders:
            rules.recorder = recorder
        rewards._seconds = seconds


def dry_run_copy(agent: Any, rng: np.random.Generator) -> Any:
    """Return a shallow copy of an agent in one process: what its methods assign to attributes stays in the copy.

    The copied policy shares all modules. Its optimizer steps nothing.

    Args:
        agent: a `LanguageAgent`.
        rng: draws the copy's minibatches.
    """
    copied, policy = copy.copy(agent), copy.copy(agent.policy)
    policy._modules = dict(policy._modules)
    policy.optimizer = NoOpOptimizer(policy)
    vars(copied).update(policy=policy, np_random=rng, communicator=SINGLE_PROCESS, max_grad_norm=float("inf"))
    return copied


def collect_episodes(agent: Agent, n: int, sampler: Sampler, rng: np.random.Generator) -> tuple[Rollout, str]:
    """Collect about `n` episodes in whole groups, with the env's longest and shortest prompt among them.

    On the response clock a new vector env is stepped, on the token clock a copy of the agent's env.

    Args:
        agent: with an env.
        n: number of episodes.
        sampler: samples the tokens.
        rng: draws the prompts.

    Returns:
        The episodes, and why the agent's own env had to be stepped, "" if it was not.
    """
    assert agent.env is not None
    rules, group_size = agent.rules, agent.group_size
    groups = min(max(2, n // group_size), max(1, agent.n_envs // group_size))
    if rules.text_env is None:
        lengths = [len(rules.prompts.ids[i]) for i in range(len(rules.prompts))]
        indexes = rng.choice(len(lengths), groups, replace=groups > len(lengths))
        indexes[-1], indexes[0] = np.argmin(lengths), np.argmax(lengths)
    else:
        cursor = PromptCursor.over(rules.prompts, lambda: rng)
        indexes = np.array([cursor.next() for _ in range(groups)])
    if vector_env_of(agent.env) is not None:
        venv = TextGenerationVectorEnv.from_rules(rules, groups * group_size)
        collector = ResponseCollector(agent.policy, PolicyEngine(agent.policy), venv, sampler, group_size)
        return collector.collect(indexes.tolist()), ""
    env, obstacle = _copy_env(agent.env)
    rows = np.repeat(indexes, group_size).tolist()
    with patched(agent.env, _seeds=list(agent.env._seeds), _options=list(agent.env._options)):
        return TokenCollector(agent.policy, env, sampler, group_size).collect(rows), obstacle


def _copy_env(env: VecEnv) -> tuple[VecEnv, str]:
    """Return a copy that shares the rules and "", or the env itself and why it cannot be copied."""
    try:
        copied = copy.deepcopy(env, {id(rules): rules for rules in unique_rules(env)})
        rules_of_vec_env(copied)
    except Exception as error:
        return env, f"{type(error).__name__}: {error}"
    return copied, ""


@dataclass
class DryStep:
    """The inputs of the loss in one optimizer step. B episodes in the order of the rollout, n_i tokens in response i.

    Attributes:
        logp: B tensors (n_i,), log pi, in nats.
        old_logp: B tensors (n_i,), log pi of the old policy.
        weights: B tensors (T,), the weights of all positions, padding included.
        padded: B bools, whether the prompt was padded.
        dropping: names of the modules whose dropout was on.
    """

    logp: list[Tensor] = field(default_factory=list)
    old_logp: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    padded: list[bool] = field(default_factory=list)
    dropping: list[str] = field(default_factory=list)


class _RecordingObjective:
    """An objective that records the inputs of another one's loss."""

    def __init__(self, objective: Objective, step: DryStep) -> None:
        self._objective, self._step = objective, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def loss(self, batch: Rollout, evaluation: Evaluation, weights: Tensor) -> Any:
        """Compute the loss and record its inputs."""
        result, step = self._objective.loss(batch, evaluation, weights), self._step
        longest, logp = max(map(len, batch.prompts)), evaluation.logp.detach()
        old_logp = logp if batch.old_logp is None else batch.old_logp
        for i, n in enumerate(batch.lengths.tolist()):
            step.logp.append(logp[i, :n].cpu())
            step.old_logp.append(old_logp[i, :n].cpu())
            step.weights.append(weights[i].cpu())
            step.padded.append(len(batch.prompts[i]) < longest)
        return result


def take_dry_step(trainer: Trainer, rollout: Rollout, rows: np.ndarray) -> DryStep:
    """Take an optimizer step that changes nothing, and return the inputs of its loss.

    Args:
        trainer: with a `NoOpOptimizer`.
        rollout: with advantages and log-probs of the old policy; it is not changed.
        rows: (B,), all episodes in the order in which a minibatch has them.
    """
    step = DryStep()
    recorder: Any = _RecordingObjective(trainer.objective, step)
    replace(trainer, objective=recorder).step(rollout, rows)
    order = [row for part in trainer.micro_batches(rollout, rows) for row in part]
    for column in (step.logp, step.old_logp, step.weights, step.padded):
        column[:] = [column[i] for i in np.argsort(order)]
    step.dropping = active_dropout(trainer.policy)
    return step
