"""Returns and advantages: pure functions. B responses, T tokens; masks are 1 at action tokens, 0 elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("std", "batch", "none")
STD_EPSILON = 1e-4  # added to a standard deviation before dividing by it, as TRL does


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Compute discounted returns (reward to go) G_t = r_t + gamma * G_{t+1}, over action tokens only.

    `rewards`, `mask` and the result are (B, T); the result is 0 outside the mask.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1]


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    gae_lambda: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates (GAE) over action tokens.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lambda * A_{t+1}, where t+1 is the *next action token*.
    Tokens outside the mask (padding, or written by the env) are skipped. Source: Schulman et al. 2016, arXiv 1506.02438.

    Args:
        rewards: (B, T), one reward per action token.
        values: (B, T), V of the state before each action.
        mask: (B, T), 0/1.
        gamma: discount factor per action token.
        gae_lambda: lambda, the trade-off between bias and variance.
        last_values: (B,), V of the state after the last action. None means 0, for episodes that have ended.

    Returns:
        Advantages and returns (advantages + values), both (B, T) and 0 outside the mask.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0]) if last_values is None else last_values
    advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t].bool()
        delta = rewards[:, t] + gamma * following - values[:, t]
        advantage = torch.where(here, delta + gamma * gae_lambda * advantage, advantage)
        following = torch.where(here, values[:, t], following)
        advantages[:, t] = torch.where(here, advantage, 0.0)
    return advantages, torch.where(mask.bool(), advantages + values, 0.0)


def gae_turns(
    rewards: Tensor,
    values: Tensor,
    turn_ids: Tensor,
    gamma: float,
    gae_lambda: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute generalized advantage estimates (GAE) over turns: one decision per turn.

    R_k is the sum of the rewards of turn k, and V_k the value of the state before the turn's first token. delta_k = R_k +
    gamma * V_{k+1} - V_k and A_k = delta_k + gamma * lambda * A_{k+1}. With one turn, A = R - V(prompt). Other libraries
    average V over the turn's tokens. Source: `gae`, with turns as actions (ArCHer, arXiv 2402.19446, has critics over turns).

    Args:
        rewards: (B, T), one reward per action token.
        values: (B, T), V of the state before each action. Only those of the turns' first tokens are read.
        turn_ids: (B, T) int, the turn of each action token, from 0; -1 at observations and padding.
        gamma: discount factor per turn.
        gae_lambda: lambda, the trade-off between bias and variance.
        last_values: (B,), V of the state after the last turn. None means 0, for episodes that have ended.

    Returns:
        Advantages A_k and returns A_k + V_k, both (B, T): the same number at all tokens of a turn, and 0 elsewhere.
    """
    turns = one_hot_turns(turn_ids)
    table = torch.einsum("bt,btk->bk", rewards, turns.to(rewards.dtype))
    first = first_actions(turn_ids)
    first_values = torch.einsum("bt,btk->bk", torch.where(first, values, 0.0), turns.to(values.dtype))
    advantages, returns = gae(table, first_values, turns.any(1), gamma, gae_lambda, last_values)
    index, inside = turn_ids.clamp(min=0), turn_ids >= 0
    return torch.where(inside, advantages.gather(1, index), 0.0), torch.where(inside, returns.gather(1, index), 0.0)


def one_hot_turns(turn_ids: Tensor) -> Tensor:
    """Return (B, T, K) bool, True where a token belongs to turn k; K is the largest number of turns, at least 1."""
    return turn_ids[..., None] == torch.arange(max(1, int(turn_ids.max()) + 1), device=turn_ids.device)


def first_actions(turn_ids: Tensor) -> Tensor:
    """Return (B, T) bool, True at the first token of each turn."""
    before = torch.nn.functional.pad(turn_ids, (1, 0), value=-1)[:, :-1]
    return (turn_ids >= 0) & (turn_ids != before.cummax(1).values)


def group_relative(rewards: Tensor, group_size: int, scale: str = "std") -> Tensor:
    """Compute group-relative advantages A_i = (r_i - mean) / (std + 1e-4) over the responses to one prompt.

    The standard deviation has Bessel's correction. Groups of equal rewards get exactly 0. Source: DeepSeekMath (GRPO),
    arXiv 2402.03300, section 4.1.2.

    Args:
        rewards: (B,), groups of `group_size` consecutive responses.
        group_size: G, at least 2.
        scale: the divisor. `"std"`: the std of the group. `"batch"`: the std of all B rewards. `"none"`: no division
            (Dr. GRPO).

    Returns:
        (B,) advantages.
    """
    return _centred_and_scaled(_groups(rewards, group_size), torch.ones_like(rewards), scale).flatten()


def group_relative_steps(rewards: Tensor, step_ends: Tensor, group_size: int, scale: str = "std") -> Tensor:
    """Compute group-relative advantages from step rewards (process supervision).

    The step rewards of all responses of a group are normalized together, (r - mean) / (std + 1e-4), as in `group_relative`.
    A_{i,t} is the sum of the normalized rewards of the steps of response i that end at token t or later. Steps of reward 0
    are included. Steps that end at the same token count as one. Groups of equal step rewards get exactly 0. Source:
    DeepSeekMath, arXiv 2402.03300, section 4.1.3.

    Args:
        rewards: (B, T), reward at each token, groups of `group_size` consecutive responses.
        step_ends: (B, T), 1 at the last token of each step, 0 elsewhere. Rewards at other tokens are ignored.
        group_size: G, at least 2.
        scale: the divisor. `"std"`: the std of the group's step rewards. `"batch"`: the std of all step rewards. `"none"`: no
            division.

    Returns:
        (B, T) advantages; 0 after the last step of a response.
    """
    groups, ends = _groups(rewards, group_size), step_ends.to(rewards.dtype)
    steps = _centred_and_scaled(groups, ends.view_as(groups), scale).view_as(rewards)
    return steps.flip(1).cumsum(1).flip(1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """Compute leave-one-out advantages (RLOO): A_i = r_i - mean of the group's other rewards.

    This equals G / (G - 1) times the difference to the group's mean. Unlike that difference, it is unbiased: the baseline
    does not depend on the response itself. Source: arXiv 2402.14740.

    Args:
        rewards: (B,), groups of `group_size` consecutive responses.
        group_size: G, at least 2.

    Returns:
        (B,) advantages; 0 in groups of equal rewards.
    """
    return group_relative(rewards, group_size, "none") * group_size / (group_size - 1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size={group_size} must be at least 2 and divide the number of rewards, {len(rewards)}")
    return rewards.reshape(len(rewards) // group_size, -1)


def _centred_and_scaled(groups: Tensor, chosen: Tensor, scale: str) -> Tensor:
    """Center the chosen entries of each row of `groups` and divide them by the scale.

    Args:
        groups: (N, K).
        chosen: N * K entries in any shape, 1 at entries that count, 0 elsewhere.
        scale: `"std"` of the row, `"batch"` for the std of all chosen entries, `"none"`.

    Returns:
        (N, K); 0 at entries that are not chosen, and in rows of equal entries.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} must be 'std', 'batch' or 'none'")
    here = chosen.view_as(groups).bool()
    counts = here.sum(1, keepdim=True)
    mean = torch.where(here, groups, 0.0).sum(1, keepdim=True) / counts.clamp(min=1)
    centred = torch.where(here & ~_equal(groups, here)[:, None], groups - mean, 0.0)
    if scale == "none":
        return centred
    std = ((centred**2).sum(1, keepdim=True) / (counts - 1).clamp(min=1)).sqrt() if scale == "std" else _std(groups[here])
    return centred / (std + STD_EPSILON)


def _std(values: Tensor) -> Tensor:
    return values.std() if values.numel() > 1 else values.new_zeros(())


def _equal(groups: Tensor, here: Tensor) -> Tensor:
    """Return (N,) bool, True for rows whose chosen entries are all equal, or that have none."""
    return torch.where(here, groups, -torch.inf).amax(1) <= torch.where(here, groups, torch.inf).amin(1)


def equal_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Return (B / G,) bool, True for groups of equal rewards, which give no gradient."""
    groups = rewards.view(-1, group_size)
    return _equal(groups, torch.ones_like(groups).bool())


def normalize(advantages: Tensor, mask: Tensor, counted: Tensor | None = None) -> Tensor:
    """Normalize advantages (B, T) to mean 0 and std 1 over the action tokens of the batch; 0 outside the mask.

    With fewer than two numbers, the mean is subtracted without division by a std.

    Args:
        advantages: (B, T).
        mask: (B, T), 0/1.
        counted: (B, T), 1 where an advantage counts in mean and std, for example at the first token of each turn. Default:
            `mask`.
    """
    chosen = advantages[(mask if counted is None else counted).bool()]
    std = chosen.std() if chosen.numel() > 1 else torch.ones_like(chosen.sum())
    return (advantages - chosen.mean()) / (std + 1e-8) * mask
