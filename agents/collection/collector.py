"""Collecting a rollout: whole responses from a vector env, or token by token from any VecEnv."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.distributed.communicator import SINGLE_PROCESS, Communicator
from agents.distributed.fsdp import full_params
from agents.engines.base import DecodingSpec, Engine
from agents.policy import LanguagePolicy
from agents.rollout import Rollout, concat, from_episodes
from agents.sampling.generate import OnTokens, StopRollout, ignore_tokens
from agents.sampling.sampler import Sampler
from agents.vec_env import rows_of, rules_of_vec_env
from llm_env import TextGenerationVectorEnv
from llm_env.observations import pick
from llm_env.rules import Rules
from llm_env.threads import Background


@dataclass
class CollectionRequest:
    """What a rollout of the response clock is generated from.

    Attributes:
        prompts: B lists of token ids, of all processes.
        rows: the rows of this process.
        decoding: how responses are generated.
    """

    prompts: list[list[int]]
    rows: range
    decoding: DecodingSpec


class ResponseCollector:
    """Collects one episode in every row of a vector env, on the response clock.

    Args:
        policy: its weights are gathered while the engine generates.
        engine: generates the responses.
        venv: is reset here, in groups of `group_size` rows with one prompt.
        sampler: temperature, truncation and the random numbers.
        group_size: G.
        communicator: the processes that share the work; each has the whole rollout in the end.
        on_tokens: called with the number of new tokens in every decoding step; an error in it ends the rollout.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        engine: Engine,
        venv: TextGenerationVectorEnv,
        sampler: Sampler,
        group_size: int = 1,
        communicator: Communicator = SINGLE_PROCESS,
        on_tokens: OnTokens = ignore_tokens,
    ) -> None:
        self.policy, self.engine, self.venv, self.sampler = policy, engine, venv, sampler
        self.group_size, self.communicator, self.on_tokens = group_size, communicator, on_tokens

    def collect(self, indexes: Sequence[int] | None = None) -> Rollout:
        """Collect `venv.num_envs` episodes.

        Args:
            indexes: the prompts, one a group; the env's next ones by default.
        """
        request = self.prepare(indexes)
        local, error = None, None
        with full_params(self.policy), full_params(reference_model(self.venv.rules)):
            try:
                local = self.collect_local(request)
            except Exception as raised:
                error = raised
            return gather_rollout(self.communicator, local, error, self.policy.device)

    def prepare(self, indexes: Sequence[int] | None = None) -> CollectionRequest:
        """Reset the env, and draw the random numbers: what the rollout depends on besides the weights."""
        venv, rules = self.venv, self.venv.rules
        venv.reset(options={"group_size": self.group_size, **({} if indexes is None else {"index": indexes})})
        prompts = [venv.episodes.prompt(row).tolist() for row in range(venv.num_envs)]
        rows, sampler, uniforms = self.communicator.split_rows(venv.num_envs, self.group_size), self.sampler, None
        if self.engine.takes_uniforms:
            uniforms = sampler.uniforms(venv.num_envs, rules.max_actions, rules.vocab_size, self.policy.device)
            uniforms = uniforms[rows.start : rows.stop]
        elif self.communicator.size > 1:
            sampler = sampler.spawn(self.communicator.rank)
        decoding = DecodingSpec(
            rules, sampler, rules.max_new_tokens, uniforms, self.on_tokens, max_episode_tokens=rules.max_episode_tokens
        )
        return CollectionRequest(prompts, rows, decoding)

    def collect_local(self, request: CollectionRequest) -> Rollout | None:
        """Generate the episodes of this process; None where it has none."""
        prompts, rows, venv = request.prompts, request.rows, self.venv
        if not len(rows):
            return None
        episodes = [_Episode(prompts[row]) for row in rows]

        def on_turns(numbers: Sequence[int], turns: list[list[int]], logprobs: list[np.ndarray]) -> list[list[int] | None]:
            observations, ended = venv.advance_turns([rows[i] for i in numbers], turns, logprobs)
            replies: list[list[int] | None] = []
            for i, turn, logp, written, is_over in zip(numbers, turns, logprobs, observations, ended, strict=True):
                observation = written.tolist()
                episodes[i].add_turn(turn, [0.0] * len(turn), logp)
                episodes[i].add_observation(observation)
                replies.append(None if is_over else observation)
            return replies

        seconds = venv.rules.rollout_timeout
        venv.episodes.deadline = None if seconds is None else time.monotonic() + seconds
        heads = [prompts[row] for row in rows[:: self.group_size]]
        queue = _BackgroundTurns(venv, rows) if venv.rules.async_envs else None
        try:
            self.engine.generate(heads, self.group_size, replace(request.decoding, queue=queue), on_turns)
        finally:
            if queue is not None:
                queue.close()
        step = venv.settle(list(rows))
        for i, episode in enumerate(episodes):
            episode.truncated, episode.info = bool(step.truncated[i]), step.infos[i]
            after = [0.0] * (len(episode.response) - len(step.rewards[i]))  # an observation after the last action
            episode.rewards = [*step.rewards[i].tolist(), *after]
            if step.ref_logprobs is not None:
                is_action = np.array(episode.turn_ids[: len(step.rewards[i])]) >= 0
                episode.ref_logprobs = [*np.where(is_action, step.ref_logprobs[i], 0.0).tolist(), *after]
        return rollout_of(episodes, self.group_size, self.policy.device, venv.rules.reference is not None)


class _BackgroundTurns:
    """Steps the env in threads with turns that have ended: the `TurnQueue` of a vector env.

    Args:
        venv: its rules say how many threads there are.
        rows: its rows, by the numbers that the engine has.
    """

    def __init__(self, venv: TextGenerationVectorEnv, rows: Sequence[int]) -> None:
        self.venv, self.rows = venv, rows
        self._background = Background(venv.rules.reply_workers)

    def begin(self, row: int, turn: list[int]) -> None:
        """Begin to step the env; see `Episodes.turn_work`."""
        self._background.begin(row, self.venv.episodes.turn_work(self.rows[row], turn))

    def ready(self, wait: bool) -> list[int]:
        """Return the rows whose step is done; what is waited counts as seconds of the env."""
        begin = time.perf_counter()
        done = self._background.ready(wait)
        if wait and (replies := self.venv.rules.replies) is not None:
            replies.add_seconds(time.perf_counter() - begin)
        return done

    def close(self) -> None:
        """Wait for steps under way."""
        self._background.close()


class TokenCollector:
    """Collects episodes of any VecEnv over text envs, on the token clock: what its wrappers do is what is trained on.

    Args:
        policy: samples the tokens.
        vec_env: K envs; each is reset to its prompt before every K episodes.
        sampler: temperature, truncation and the random numbers.
        group_size: G.
        communicator: the processes that share the work; each has the whole rollout in the end.
        next_indexes: draws the prompts of a rollout, one index an episode.
        on_tokens: called with the number of new tokens in every step; an error in it ends the rollout.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        vec_env: VecEnv,
        sampler: Sampler,
        group_size: int = 1,
        communicator: Communicator = SINGLE_PROCESS,
        next_indexes: Callable[[], list[int]] | None = None,
        on_tokens: OnTokens = ignore_tokens,
    ) -> None:
        self.policy, self.vec_env, self.sampler, self.on_tokens = policy, vec_env, sampler, on_tokens
        self.group_size, self.communicator, self.next_indexes = group_size, communicator, next_indexes

    def collect(self, indexes: Sequence[int] | None = None) -> Rollout:
        """Collect one episode for each index.

        Args:
            indexes: B prompts, one an episode; those of `next_indexes` by default.

        Raises:
            ValueError: If a wrapper rewrites the tokens, so that the policy's context is not prompt plus actions.
        """
        if indexes is None:
            assert self.next_indexes is not None
            indexes = self.next_indexes()
        rules = rules_of_vec_env(self.vec_env)
        rows = self.communicator.split_rows(len(indexes), self.group_size)
        uniforms = self.sampler.uniforms(len(indexes), rules.max_actions, rules.vocab_size, self.policy.device)
        local, error = None, None
        with full_params(self.policy), full_params(reference_model(rules)):
            try:
                local = self._collect_local(rules, list(indexes), rows, uniforms) if len(rows) else None
            except Exception as raised:
                error = raised
            return gather_rollout(self.communicator, local, error, self.policy.device)

    def _collect_local(self, rules: Rules, indexes: list[int], rows: range, uniforms: Tensor) -> Rollout:
        episodes: list[_Episode] = []
        for begin in range(rows.start, rows.stop, self.vec_env.num_envs):
            end = min(begin + self.vec_env.num_envs, rows.stop)
            episodes += self._run_episodes(rules, indexes[begin:end], uniforms[begin:end])
        has_reference = rules.reference is not None
        if has_reference:
            ref_logprobs = rules.reference_log_probs(
                [episode.prompt for episode in episodes],
                [episode.response for episode in episodes],
                [0] * len(episodes),
                [np.array(episode.turn_ids) for episode in episodes],
            )
            for episode, ref_logp in zip(episodes, ref_logprobs, strict=True):
                episode.ref_logprobs = ref_logp.tolist()
        for episode in episodes:
            episode.info = _with_text(episode, rules)
        return rollout_of(episodes, self.group_size, self.policy.device, has_reference)

    def _run_episodes(self, rules: Rules, indexes: list[int], uniforms: Tensor) -> list[_Episode]:
        """Run one episode in each of the first len(indexes) envs; the other envs are stepped along and ignored."""
        vec_env = self.vec_env
        uniforms = nn.functional.pad(uniforms, (0, 0, 0, 0, 0, vec_env.num_envs - len(indexes)))
        vec_env.set_options([{"index": indexes[min(i, len(indexes) - 1)]} for i in range(vec_env.num_envs)])
        observation: Any = vec_env.reset()
        contexts = rows_of(observation)
        episodes = [_Episode(context) for context in contexts[: len(indexes)]]
        state, starts = None, [True] * vec_env.num_envs
        for step in count():  # actions so far of the episodes under way
            if all(episode.info is not None for episode in episodes):
                break
            masks = None if rules.constraint is None else np.stack(vec_env.env_method("action_masks"))
            tokens, logp, state = self.policy.next_tokens(
                rows_of(observation), state, self.sampler, starts, masks, uniforms[:, step]
            )
            if rules.reference is not None:
                for i, value in enumerate(logp.tolist()):
                    vec_env.env_method("set_action_logprob", value, indices=[i])
            observation, rewards, dones, infos = vec_env.step(tokens)
            starts = dones.tolist()
            self.on_tokens(sum(episode.info is None for episode in episodes))
            for i, episode in enumerate(episodes):
                if episode.info is not None:
                    continue
                episode.add_turn([int(tokens[i])], [float(rewards[i])], [float(logp[i])])
                if dones[i]:
                    episode.info = infos[i]
                    episode.truncated = bool(infos[i].get("TimeLimit.truncated", False))
                seen = pick(infos[i]["terminal_observation"], None) if dones[i] else pick(observation, [i])
                tokens_seen, known = rows_of(seen)[0], [*episode.prompt, *episode.response]
                if tokens_seen[: len(known)] != known or (not rules.has_replies and len(tokens_seen) > len(known)):
                    raise ValueError(
                        "a wrapper of the env rewrites input_ids: the policy would be trained on tokens it did not see"
                    )
                if rules.has_replies and episode.ends_turn(rules):
                    episode.add_observation(tokens_seen[len(known) :])
        return episodes


@dataclass
class _Episode:
    """One episode under way; one entry per token after the prompt, 0 and turn -1 at observations."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    turn_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    ref_logprobs: list[float] = field(default_factory=list)
    truncated: bool = False
    info: dict[str, Any] | None = None
    num_turns: int = 0  # that have ended
    turn_start: int = 0  # index after the prompt at which the open turn begins

    def add_turn(self, tokens: Sequence[int], rewards: Any, logprobs: Any) -> None:
        """Append action tokens of the open turn."""
        self.response += tokens
        self.turn_ids += [self.num_turns] * len(tokens)
        self.rewards += list(rewards)
        self.logprobs += list(logprobs)

    def add_observation(self, tokens: list[int]) -> None:
        """End the turn, and append what the env wrote after it."""
        self.num_turns += 1
        self.response += tokens
        self.turn_ids += [-1] * len(tokens)
        for column in (self.rewards, self.logprobs):
            column += [0.0] * len(tokens)
        self.turn_start = len(self.response)

    def ends_turn(self, rules: Rules) -> bool:
        """Return whether the last token ended a turn, by the rules of the env."""
        turn = self.response[self.turn_start :]
        limit = min(rules.max_new_tokens, rules.max_episode_tokens - self.turn_start)
        return len(turn) == limit or rules.closes(turn)


def rollout_of(episodes: Sequence[_Episode], group_size: int, device: torch.device, has_reference: bool) -> Rollout:
    """Build a rollout from episodes that have ended."""
    return from_episodes(
        [e.prompt for e in episodes],
        [e.response for e in episodes],
        [e.rewards for e in episodes],
        [e.logprobs for e in episodes],
        [e.ref_logprobs for e in episodes] if has_reference else None,
        [e.truncated for e in episodes],
        [e.info or {} for e in episodes],
        group_size,
        device,
        [e.turn_ids for e in episodes],
    )


def _with_text(episode: _Episode, rules: Rules) -> dict[str, Any]:
    """Return the last info; prompt and completion are added where a wrapper cut the episode short."""
    info = episode.info or {}
    if "completion" in info:
        return info
    prompt, completion = rules.decode([episode.prompt, episode.response])
    return {**info, "prompt": prompt, "completion": completion}


def reference_model(rules: Rules) -> nn.Module | None:
    """Return the reference's model, None without a reference."""
    return None if rules.reference is None else rules.reference.model


def gather_rollout(communicator: Communicator, local: Rollout | None, error: Exception | None, device: torch.device) -> Rollout:
    """Gather the episodes of all processes into one rollout; raise an error of one process in all.

    Args:
        communicator: the processes.
        local: the episodes of this process; None if it has none.
        error: the error that ended collection in this process, or None.
        device: device of the result.

    Raises:
        StopRollout: If a callback asked to stop in any process.
    """
    if communicator.size > 1 and local is not None:
        local = local.to(torch.device("cpu"))
    stop = error if isinstance(error, StopRollout) else None
    gathered = communicator.gather_or_raise((local, stop is not None), None if stop is not None else error)
    if any(stopped for _, stopped in gathered):
        raise stop or StopRollout("a callback of another process asked to stop")
    parts = [part for part, _ in gathered if part is not None]
    return parts[0] if communicator.size == 1 else concat(parts).to(device)
