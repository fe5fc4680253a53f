"""A rollout: the record of a batch of episodes that travels through training, and the two ways to collect one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from agents.distributed import ALONE, World
from agents.policy import LanguagePolicy
from agents.sampler import Sampler
from agents.sharded import whole
from agents.vec_env import TextVecEnv, rows_of, rules_of_vec_env
from llm_env import TextGenerationVectorEnv
from llm_env.observations import pick
from llm_env.rules import Rules

Responses = tuple[list[list[int]], list[np.ndarray]]
Respond = Callable[..., Responses]  # of prompts, rules, a sampler and the group size, as `LanguagePolicy.respond`


@dataclass
class Rollout:
    """B episodes with responses of up to T tokens, padded on the right; rows iG..iG+G-1 answer one prompt.

    Attributes:
        prompts: B lists of token ids.
        responses: B lists of token ids, the end token included.
        mask: (B, T) float32, 1 at action tokens (the end token is one, padding is not).
        rewards: (B, T) float32, what the env paid for each action token.
        sampled_logp: (B, T) float32, log pi by the sampling path, in nats.
        ref_logp: (B, T) float32, log pi_ref, in nats; None without a reference.
        step_ends: (B, T) float32, 1 at the last token of each step that was rewarded; where the env tells of no steps,
            at the last token and where something was paid.
        truncated: (B,) bool, ended by the length limit.
        infos: B dicts, the last info of each episode.
        group_size: G.
        old_logp: (B, T) float32, log pi by the training path before the first update, in nats; None until computed.
        old_values: (B, T) float32, V by the training path before the first update; None without a value head.
        last_values: (B,) float32, V of the state after the last token; None without a value head.
        advantages: (B, T) float32; None until computed.
        returns: (B, T) float32, targets of the values; None without a value head.
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    mask: Tensor
    rewards: Tensor
    sampled_logp: Tensor
    ref_logp: Tensor | None
    step_ends: Tensor
    truncated: Tensor
    infos: list[dict[str, Any]]
    group_size: int = 1
    old_logp: Tensor | None = None
    old_values: Tensor | None = None
    last_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64, action tokens of each episode."""
        return np.array([len(response) for response in self.responses])

    @property
    def scores(self) -> Tensor:
        """(B,) float32, each episode's return without discount: the sum of its rewards."""
        return self.rewards.sum(1)

    def to(self, device: torch.device) -> Rollout:
        """The same, with all tensors on a device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def take(self, rows: Sequence[int]) -> Rollout:
        """Some of the rows, cut to the longest response among them."""
        width = max(len(self.responses[row]) for row in rows)
        index = torch.as_tensor(rows, device=self.mask.device)
        chosen: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                chosen[name] = value[index][:, :width] if value.ndim == 2 else value[index]
            elif isinstance(value, list):
                chosen[name] = [value[row] for row in rows]
        return replace(self, **chosen)


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """The episodes of several rollouts that have not been trained on yet, padded to the longest."""
    width = max(rollout.mask.shape[1] for rollout in rollouts)
    joined: dict[str, Any] = {}
    for name, value in vars(rollouts[0]).items():
        parts = [getattr(rollout, name) for rollout in rollouts]
        if isinstance(value, Tensor):
            wide = [nn.functional.pad(part, (0, width - part.shape[1])) if part.ndim == 2 else part for part in parts]
            joined[name] = torch.cat(wide)
        elif isinstance(value, list):
            joined[name] = [entry for part in parts for entry in part]
    return replace(rollouts[0], **joined)


def _padded(rows: Sequence[Any], device: torch.device) -> Tensor:
    table = torch.zeros(len(rows), max(map(len, rows)))
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.as_tensor(np.asarray(row, dtype=np.float32))
    return table.to(device)


def _assemble(
    prompts: list[list[int]],
    responses: list[list[int]],
    rewards: Sequence[Any],
    logps: Sequence[Any],
    ref_logps: Sequence[Any] | None,
    truncated: Sequence[bool] | np.ndarray,
    infos: list[dict[str, Any]],
    group_size: int,
    device: torch.device,
) -> Rollout:
    return Rollout(
        prompts=prompts,
        responses=responses,
        mask=_padded([np.ones(len(response)) for response in responses], device),
        rewards=_padded(rewards, device),
        sampled_logp=_padded(logps, device),
        ref_logp=None if ref_logps is None else _padded(ref_logps, device),
        step_ends=_padded([_step_ends(row, info) for row, info in zip(rewards, infos, strict=True)], device),
        truncated=torch.as_tensor(np.asarray(truncated), device=device),
        infos=infos,
        group_size=group_size,
    )


def _step_ends(rewards: Any, info: dict[str, Any]) -> np.ndarray:
    ends = np.asarray(rewards) != 0
    ends[list(info.get("step_ends", [len(ends) - 1]))] = True
    return ends


def collect(
    policy: LanguagePolicy,
    venv: TextGenerationVectorEnv,
    group_size: int,
    sampler: Sampler,
    options: dict[str, Any],
    world: World = ALONE,
    respond: Respond | None = None,
) -> Rollout:
    """One episode in every row of a vector env, on the response clock.

    Args:
        policy: draws the responses, unless `respond` does.
        venv: is reset here, in groups of `group_size` rows with one prompt.
        group_size: G.
        sampler: draws a token.
        options: further reset options.
        world: the processes that share the work; each has the whole rollout in the end.
        respond: an engine's way to draw responses, in the place of `policy.respond`.
    """
    own = prepared(policy, venv, group_size, sampler, options, world, respond)
    return from_all(world, own, policy, venv.rules, len(world.part(venv.num_envs, group_size)))


def prepared(
    policy: LanguagePolicy,
    venv: TextGenerationVectorEnv,
    group_size: int,
    sampler: Sampler,
    options: dict[str, Any],
    world: World = ALONE,
    respond: Respond | None = None,
) -> Callable[[], Rollout]:
    """What `collect` has yet to do in this process once prompts and random numbers are drawn: its own episodes."""
    venv.reset(options={"group_size": group_size, **options})
    prompts = [venv.episodes.prompt(row).tolist() for row in range(venv.num_envs)]
    rules, rows = venv.rules, world.part(venv.num_envs, group_size)
    if respond is None:
        numbers = sampler.numbers(venv.num_envs, rules.max_new_tokens, rules.vocab_size, policy.device)[rows.start : rows.stop]
        respond = partial(policy.respond, numbers=numbers)
    else:
        sampler = sampler if world.size == 1 else sampler.spawn(world.rank)

    def own() -> Rollout:
        heads = [prompts[row] for row in rows[::group_size]]
        responses, logps = respond(heads, rules, sampler, group_size)
        outcome = venv.step_responses(_among(rows, responses, venv.num_envs), _among(rows, logps, venv.num_envs))
        ref_logps = outcome.ref_logprobs
        return _assemble(
            [prompts[row] for row in rows],
            responses,
            [outcome.rewards[row] for row in rows],
            logps,
            None if ref_logps is None else [ref_logps[row] for row in rows],
            outcome.truncated[rows],
            [outcome.infos[row] for row in rows],
            group_size,
            policy.device,
        )

    return own


def _among(rows: range, values: Sequence[Any], count: int) -> list[Any]:
    """One value a row, those of `rows` and nothing for the others, whose episodes are another process's."""
    return [[]] * rows.start + list(values) + [[]] * (count - rows.stop)


def from_all(world: World, own: Callable[[], Rollout], policy: LanguagePolicy, rules: Rules, count: int) -> Rollout:
    """The rollout of all processes from `own()` of each, that has `count` episodes."""
    reference = None if rules.reference is None else rules.reference.model
    with whole(policy), whole(reference):
        if world.size == 1:
            return own()
        parts = world.together(lambda: own().to(torch.device("cpu")) if count else None)
    return join([part for part in parts if part is not None]).to(policy.device)


def collect_by_tokens(
    policy: LanguagePolicy, vec_env: VecEnv, indexes: list[int], group_size: int, sampler: Sampler, world: World = ALONE
) -> Rollout:
    """Episodes of any VecEnv over text envs, on the token clock: what its wrappers do is what is trained on.

    Args:
        policy: draws the tokens.
        vec_env: K envs; each is reset to its prompt before every K episodes.
        indexes: B indexes of prompts, one an episode.
        group_size: G; divides B.
        sampler: draws a token.
        world: the processes that share the work; each has the whole rollout in the end.

    Raises:
        ValueError: a wrapper rewrites the tokens, so that the policy's context is not prompt plus actions.
    """
    rules, rows = rules_of_vec_env(vec_env), world.part(len(indexes), group_size)
    numbers = sampler.numbers(len(indexes), rules.max_new_tokens, rules.vocab_size, policy.device)

    def own() -> Rollout:
        episodes: list[_Episode] = []
        for begin in range(rows.start, rows.stop, vec_env.num_envs):
            end = min(begin + vec_env.num_envs, rows.stop)
            episodes += _play(policy, vec_env, rules, indexes[begin:end], sampler, numbers[begin:end])
        prompts, responses = [e.prompt for e in episodes], [e.response for e in episodes]
        ref_logps = rules.reference_log_probs(prompts, responses, [0] * len(prompts)) if rules.reference is not None else None
        return _assemble(
            prompts,
            responses,
            [e.rewards for e in episodes],
            [e.logps for e in episodes],
            ref_logps,
            [e.truncated for e in episodes],
            [_with_text(e, rules) for e in episodes],
            group_size,
            policy.device,
        )

    return from_all(world, own, policy, rules, len(rows))


@dataclass
class _Episode:
    """One episode under way on the token clock."""

    prompt: list[int]
    response: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    truncated: bool = False
    info: dict[str, Any] | None = None


def _with_text(episode: _Episode, rules: Rules) -> dict[str, Any]:
    """The last info; prompt and completion are added where a wrapper cut the episode short."""
    info = episode.info or {}
    if "completion" in info:
        return info
    prompt, completion = rules.decode([episode.prompt, episode.response])
    return {**info, "prompt": prompt, "completion": completion}


def _play(
    policy: LanguagePolicy, vec_env: VecEnv, rules: Rules, indexes: list[int], sampler: Sampler, numbers: Tensor
) -> list[_Episode]:
    """One episode in each of the first len(indexes) envs; the others are stepped along and not looked at.

    `numbers` (len(indexes), max_new_tokens, 1 or 2) are those by which the tokens are drawn; see `Sampler.numbers`.
    """
    numbers = nn.functional.pad(numbers, (0, 0, 0, 0, 0, vec_env.num_envs - len(indexes)))
    vec_env.set_options([{"index": indexes[min(i, len(indexes) - 1)]} for i in range(vec_env.num_envs)])
    observation: Any = vec_env.reset()
    contexts = rows_of(observation)
    episodes = [_Episode(context) for context in contexts[: len(indexes)]]
    state, starts = None, [True] * vec_env.num_envs
    while any(episode.info is None for episode in episodes):
        step = max(len(episode.response) for episode in episodes)
        masks = None if rules.constraint is None else np.stack(vec_env.env_method("action_masks"))
        tokens, logp, state = policy.next_tokens(rows_of(observation), state, sampler, starts, masks, numbers[:, step])
        if rules.reference is not None:
            for i, value in enumerate(logp.tolist()):
                vec_env.env_method("tell_logprob", value, indices=[i])
        observation, rewards, dones, infos = vec_env.step(tokens)
        starts = dones.tolist()
        for i, episode in enumerate(episodes):
            if episode.info is not None:
                continue
            episode.response.append(int(tokens[i]))
            episode.logps.append(float(logp[i]))
            episode.rewards.append(float(rewards[i]))
            if dones[i]:
                episode.info = infos[i]
                episode.truncated = bool(infos[i].get("TimeLimit.truncated", False))
            seen = pick(infos[i]["terminal_observation"], None) if dones[i] else pick(observation, [i])
            if rows_of(seen)[0] != [*episode.prompt, *episode.response]:
                raise ValueError(
                    "a wrapper of the env rewrites input_ids: the policy would be trained on tokens it did not see"
                )
    return episodes


def clock_of(vec_env: VecEnv) -> TextGenerationVectorEnv | None:
    """The vector env to collect from on the response clock, or None where only the token clock will do."""
    return vec_env.venv if isinstance(vec_env, TextVecEnv) else None
