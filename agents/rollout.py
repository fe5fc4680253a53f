"""The rollout buffer: a batch of episodes with all data that training needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LOGGED_TURNS = 4


@dataclass
class Rollout:
    """A batch of B episodes with responses of up to T tokens, padded on the right.

    Rows iG..iG+G-1 are the responses to one prompt. A response has all tokens after the prompt: the turns of the policy, and
    between them the observations that the env wrote.

    Attributes:
        prompts: B lists of token ids.
        responses: B lists of token ids, including end tokens and observations.
        mask: (B, T) float32, 1 at action tokens (an end token is an action; observations and padding are not).
        rewards: (B, T) float32, reward of each action token.
        sampled_logp: (B, T) float32, log pi as computed while sampling, in nats.
        ref_logp: (B, T) float32, log pi_ref, in nats; None without a reference model.
        step_ends: (B, T) float32, 1 at the last token of each rewarded step, and at every token with a nonzero reward. If the
            env reports no steps, also 1 at the last token of the response.
        truncated: (B,) bool, True if a limit ended the episode, or the text env cut it off.
        infos: B dicts, the last info of each episode.
        group_size: number of consecutive responses to one prompt, G.
        old_logp: (B, T) float32, log pi as computed in training, before the first update, in nats; None until computed.
        old_values: (B, T) float32, V as computed in training, before the first update; None without a value head.
        last_values: (B,) float32, V of the state after the last token; None without a value head.
        advantages: (B, T) float32; None until computed.
        returns: (B, T) float32, regression targets of the values; None without a value head.
        turn_ids: (B, T) int64, the turn of each action token, from 0; -1 at observations and padding. By default each response
            is one turn.
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
    turn_ids: Tensor = None  # type: ignore[assignment] # set below

    def __post_init__(self) -> None:
        if self.turn_ids is None:
            self.turn_ids = self.mask.long() - 1

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens after the prompt of each episode, observations included, (B,) int64."""
        return np.array([len(response) for response in self.responses])

    @property
    def num_actions(self) -> np.ndarray:
        """Number of action tokens of each episode, (B,) int64."""
        return (self.turn_ids >= 0).sum(1).cpu().numpy()

    @property
    def turn_rows(self) -> list[np.ndarray]:
        """The turn of each response token, B int64 arrays, -1 at observations."""
        return [row[:n] for row, n in zip(self.turn_ids.cpu().numpy(), self.lengths, strict=True)]

    @property
    def turn_lists(self) -> list[np.ndarray] | None:
        """`turn_rows`; None if every token is an action of turn 0."""
        rows = self.turn_rows
        return rows if any(row.any() for row in rows) else None

    @property
    def scores(self) -> Tensor:
        """Undiscounted return of each episode, (B,) float32: the sum of its rewards."""
        return self.rewards.sum(1)

    def to(self, device: torch.device) -> Rollout:
        """Return a copy with all tensors on the device."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def select(self, rows: Sequence[int]) -> Rollout:
        """Return a rollout of some rows, padded to the longest response among them."""
        width = max(len(self.responses[row]) for row in rows)
        index = torch.as_tensor(rows, device=self.mask.device)
        chosen: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                chosen[name] = value[index][:, :width] if value.ndim == 2 else value[index]
            elif isinstance(value, list):
                chosen[name] = [value[row] for row in rows]
        return replace(self, **chosen)


def logged_turns(rollout: Rollout) -> range:
    """Return the first turns, whose statistics are logged one by one; empty if no episode has several turns."""
    count = int(rollout.turn_ids.max()) + 1
    return range(0 if count == 1 else min(count, LOGGED_TURNS))


def concat(rollouts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts, padded to the longest response."""
    width = max(rollout.mask.shape[1] for rollout in rollouts)
    columns: dict[str, Any] = {}
    for name, value in vars(rollouts[0]).items():
        parts = [getattr(rollout, name) for rollout in rollouts]
        if isinstance(value, Tensor):
            empty = -1 if name == "turn_ids" else 0
            wide = [
                nn.functional.pad(part, (0, width - part.shape[1]), value=empty) if part.ndim == 2 else part for part in parts
            ]
            columns[name] = torch.cat(wide)
        elif isinstance(value, list):
            columns[name] = [entry for part in parts for entry in part]
    return replace(rollouts[0], **columns)


def _padded(rows: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.float32, empty: int = 0) -> Tensor:
    table = torch.full((len(rows), max(map(len, rows))), empty, dtype=dtype)
    for i, row in enumerate(rows):
        table[i, : len(row)] = torch.as_tensor(np.asarray(row)).to(dtype)
    return table.to(device)


def from_episodes(
    prompts: list[list[int]],
    responses: list[list[int]],
    rewards: Sequence[Any],
    logprobs: Sequence[Any],
    ref_logprobs: Sequence[Any] | None,
    truncated: Sequence[bool] | np.ndarray,
    infos: list[dict[str, Any]],
    group_size: int,
    device: torch.device,
    turn_ids: Sequence[Any] | None = None,
) -> Rollout:
    """Build a rollout from B episodes, with padding on the right.

    Args:
        prompts: B lists of token ids.
        responses: B lists of token ids.
        rewards: B rows with one reward per response token, 0 at observations.
        logprobs: B rows with log pi of the response tokens as computed while sampling, in nats; 0 at observations.
        ref_logprobs: B rows with log pi_ref of the response tokens, in nats, 0 at observations; None without a reference model.
        truncated: B bools, True if a limit ended the episode, or the text env cut it off.
        infos: B dicts, the last info of each episode. The optional entry `step_ends` lists the token indices at which rewarded
            steps end.
        group_size: number of consecutive responses to one prompt, G.
        device: device of the tensors.
        turn_ids: B rows with the turn of each response token, -1 at observations. By default each response is one turn.
    """
    turns = [np.zeros(len(response), int) for response in responses] if turn_ids is None else list(map(np.asarray, turn_ids))
    return Rollout(
        prompts=prompts,
        responses=responses,
        mask=_padded([row >= 0 for row in turns], device),
        rewards=_padded(rewards, device),
        sampled_logp=_padded(logprobs, device),
        ref_logp=None if ref_logprobs is None else _padded(ref_logprobs, device),
        step_ends=_padded([_step_ends(*row) for row in zip(rewards, infos, turns, strict=True)], device),
        truncated=torch.as_tensor(np.asarray(truncated), device=device),
        infos=infos,
        group_size=group_size,
        turn_ids=_padded(turns, device, torch.int64, -1),
    )


def _step_ends(rewards: Any, info: dict[str, Any], turns: np.ndarray) -> np.ndarray:
    ends = np.asarray(rewards) != 0
    ends[list(info.get("step_ends", np.flatnonzero(turns >= 0)[-1:]))] = True
    return ends
