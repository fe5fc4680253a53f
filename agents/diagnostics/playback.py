"""Play one episode and show it: who said what, and every token with its mask, turn, reward, log-probs and advantage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agents.collection.collector import ResponseCollector, TokenCollector
from agents.diagnostics.dry_run import Agent, dry_run_copy, unrecorded
from agents.engines.base import PolicyEngine
from agents.rollout import Rollout
from agents.training.preserve import preserve_state
from agents.vec_env import as_vec_env, rules_of_vec_env, vector_env_of
from llm_env import TextGenerationVectorEnv
from llm_env.arguments import check_int
from llm_env.prompts import TaskTable
from llm_env.rules import Rules


@dataclass
class Playback:
    """One episode. As text (`print(playback)`) it is the transcript.

    Attributes:
        transcript: who said what, and the reward of each turn.
        score: the return.
        info: the last info.
        rows: one dict per token after the prompt, for `table`: `token` (text), `action` (bool, False for tokens that the env
            wrote), `turn` (from 1; None for tokens of the env), `reward`, `logp` and `ref_logp` (in nats; None without a
            reference) and `advantage`.
    """

    transcript: str
    score: float
    info: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        return f"{self.transcript}\nreturn: {self.score:g}"

    def table(self) -> str:
        """Return the tokens as a text table, a line per token."""
        columns = ["token", "action", "turn", "reward", "logp", "ref_logp", "advantage"]
        cells = [[_cell(row[column]) for column in columns] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        return "\n".join("  ".join(map(str.rjust, line, widths)) for line in [columns, *cells])


def play(agent: Agent, env: Any, seed: int | None, deterministic: bool, sampling_seed: int) -> Playback:
    """Play an episode; see `LanguageAgent.play`."""
    assert agent.env is not None
    vec_env = agent.env if env is None else as_vec_env(env, 1)
    rules = rules_of_vec_env(vec_env)
    index = _index_of(rules, seed)
    rng = np.random.default_rng(sampling_seed)
    generator = torch.Generator(device=agent.policy.device).manual_seed(sampling_seed)
    sampler = replace(agent.sampler(deterministic), generator=generator)
    with preserve_state(agent.policy, rng), unrecorded(vec_env):
        copied = dry_run_copy(agent, rng)
        if vector_env_of(vec_env) is None:
            collector = TokenCollector(copied.policy, as_vec_env(env, 1), sampler, agent.group_size)
            rollout = collector.collect([index] * agent.group_size)
        else:
            venv = TextGenerationVectorEnv.from_rules(rules, agent.group_size)
            engine = PolicyEngine(copied.policy)
            rollout = ResponseCollector(copied.policy, engine, venv, sampler, agent.group_size).collect([index])
            venv.close()
        trainer = copied.make_trainer()
        trainer.compute_old_logprobs(rollout)
        trainer.objective.compute_advantages(rollout)
    return _playback(rollout, rules)


def _index_of(rules: Rules, seed: int | None) -> int:
    """Return the prompt that a seed of the text env, or without one an index, means; the first by default."""
    if seed is None:
        return rules.prompts.indexes(1)[0]
    seed = check_int("seed", seed, 0)
    if rules.text_env is None:
        return rules.prompt_index(seed)
    assert isinstance(rules.prompts, TaskTable)
    index = rules.prompts.index_of_seed(seed)
    if index is None:
        raise ValueError(f"seed={seed} is not one of the env's seeds; they begin with {rules.text_env.first_seed}")
    return index


def _playback(rollout: Rollout, rules: Rules) -> Playback:
    """Return the first episode of a rollout with advantages."""
    info, turns = rollout.infos[0], rollout.turn_rows[0]
    assert rollout.advantages is not None and rollout.old_logp is not None
    rows = []
    for t, (token, turn) in enumerate(zip(rollout.responses[0], turns.tolist(), strict=True)):
        is_action = turn >= 0
        ref_logp = None if rollout.ref_logp is None else float(rollout.ref_logp[0, t])
        rows.append(
            {
                "token": rules.tokenizer.decode([token]),
                "action": is_action,
                "turn": turn + 1 if is_action else None,
                "reward": float(rollout.rewards[0, t]),
                "logp": float(rollout.old_logp[0, t]) if is_action else None,
                "ref_logp": ref_logp if is_action else None,
                "advantage": float(rollout.advantages[0, t]) if is_action else None,
            }
        )
    transcript = info.get("transcript", f"{info['prompt']}{info['completion']}")
    return Playback(transcript, float(rollout.scores[0]), info, rows)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)
