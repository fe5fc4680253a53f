"""Episodes and optimizer steps that leave an agent as it was: what an audit looks at."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from agents.audit.gaps import active_dropout
from agents.batches import micro_batches
from agents.policy import Evaluation
from agents.rollout import Rollout, clock_of, collect, collect_by_tokens
from agents.untouched import replaced
from agents.update import optimize
from agents.vec_env import all_rules, rules_of_vec_env
from llm_env import TextGenerationVectorEnv

if TYPE_CHECKING:
    from agents.base import LanguageAgent


def fresh_episodes(agent: LanguageAgent, n: int) -> tuple[Rollout, str]:
    """About `n` episodes in whole groups, the longest and the shortest prompt of the env among them.

    On the response clock they are played in a vector env of their own, on the token clock in a copy of the agent's.

    Returns:
        The episodes, and why the agent's own env had to be stepped, empty where it had not.
    """
    assert agent.env is not None
    rules, group_size = agent.rules, agent.group_size
    groups = min(max(2, n // group_size), max(1, agent.n_envs // group_size))
    lengths = [len(ids) for ids in rules.prompts.ids]
    indexes = agent.np_random.choice(len(lengths), groups, replace=groups > len(lengths))
    indexes[-1], indexes[0] = np.argmin(lengths), np.argmax(lengths)
    if clock_of(agent.env) is not None:
        venv = TextGenerationVectorEnv.from_rules(rules, groups * group_size)
        return collect(agent.policy, venv, group_size, agent.sampler(), {"index": indexes}), ""
    env, obstacle = _copy_of(agent.env)
    rows = np.repeat(indexes, group_size).tolist()
    with replaced(agent.env, _seeds=list(agent.env._seeds), _options=list(agent.env._options)):
        return collect_by_tokens(agent.policy, env, rows, group_size, agent.sampler()), obstacle


def _copy_of(env: VecEnv) -> tuple[VecEnv, str]:
    """A copy that shares the rules, or the env itself and why it cannot be copied."""
    try:
        copied = copy.deepcopy(env, {id(rules): rules for rules in all_rules(env)})
        rules_of_vec_env(copied)
    except Exception as error:
        return env, f"{type(error).__name__}: {error}"
    return copied, ""


@dataclass
class Step:
    """What one optimizer step was made of. B episodes in the order of `rows`, n_i tokens in response i.

    Attributes:
        rows: (B,) numbers of the episodes.
        logp: B tensors (n_i,), log pi as the loss saw it, in nats.
        old_logp: B tensors (n_i,), log pi_old as the loss saw it.
        weights: B tensors (T,), of all positions that the loss was given, beyond the response too.
        padded: B bools, whether the prompt was padded.
        dropping: the names of the modules that dropped something out.
    """

    rows: np.ndarray
    logp: list[Tensor]
    old_logp: list[Tensor]
    weights: list[Tensor]
    padded: list[bool]
    dropping: list[str]


def take_step(agent: LanguageAgent, rollout: Rollout, rows: np.ndarray) -> Step:
    """Run an optimizer step that changes no weights by the agent's own update, and return what its loss was given.

    Args:
        agent: within `untouched`.
        rollout: with advantages and log-probs of pi_old; it is not changed.
        rows: the order of the episodes.
    """
    original = agent.loss
    step = Step(rows, [], [], [], [], [])

    def loss(batch: Rollout, result: Evaluation, weights: Tensor) -> Any:
        terms, statistics = original(batch, result, weights)
        longest = max(map(len, batch.prompts))
        for i, n in enumerate(batch.lengths.tolist()):
            step.logp.append(result.logp.detach()[i, :n].cpu())
            step.old_logp.append((result.logp.detach() if batch.old_logp is None else batch.old_logp)[i, :n].cpu())
            step.weights.append(weights[i])
            step.padded.append(len(batch.prompts[i]) < longest)
        return terms, statistics

    with replaced(agent, loss=loss):
        optimize(agent, rollout.take(range(len(rollout))), step.rows, fresh=False)
    seen = [row for part in micro_batches(agent, rollout, step.rows) for row in part]
    places = [seen.index(row) for row in step.rows.tolist()]
    for entries in (step.logp, step.old_logp, step.weights):
        entries[:] = [entries[place] for place in places]
    step.padded = [step.padded[place] for place in places]
    step.dropping = active_dropout(agent.policy)
    return step
