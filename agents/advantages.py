"""Returns and advantages: pure functions. B responses, T tokens; masks are 1 at action tokens, 0 elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

SCALES = ("std", "batch", "none")
STD_EPSILON = 1e-4  # added to a standard deviation before dividing by it, as TRL does


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Reward to go: G_t = r_t + gamma * G_{t+1}, over action tokens only.

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
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438) over action tokens.

    delta_t = r_t + gamma * V_{t+1} - V_t and A_t = delta_t + gamma * lambda * A_{t+1}, where t+1 is the *next action token*:
    tokens outside the mask, padding or written by the env, are skipped.

    Args:
        rewards: (B, T), one number per action token.
        values: (B, T), V of the state before each action.
        mask: (B, T), 0/1.
        gamma: discount per action token.
        gae_lambda: lambda.
        last_values: (B,), V of the state after the last action; None means 0, the end of an episode.

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


def group_relative(rewards: Tensor, group_size: int, scale: str = "std") -> Tensor:
    """A_i = (r_i - mean) / (std + 1e-4) over the answers to one prompt (DeepSeekMath, arXiv 2402.03300, section 4.1.2).

    The standard deviation has Bessel's correction. A group of equal rewards gets exactly 0.

    Args:
        rewards: (B,), groups of `group_size` consecutive responses.
        group_size: G, at least 2.
        scale: `"std"` of the group, `"batch"` for the std of all B rewards, `"none"` for no division (Dr. GRPO).

    Returns:
        (B,) advantages.
    """
    return _centred_and_scaled(_groups(rewards, group_size), torch.ones_like(rewards), scale).flatten()


def group_relative_steps(rewards: Tensor, step_ends: Tensor, group_size: int, scale: str = "std") -> Tensor:
    """Process supervision (DeepSeekMath, arXiv 2402.03300, section 4.1.3).

    The rewards of all steps of all answers of a group are normalized together, (r - mean) / (std + 1e-4), as in
    `group_relative`; then A_{i,t} is the sum of the normalized rewards of the steps of answer i that end at token t or after.
    Steps of reward 0 count, and steps that end at one token count as one. A group of equal step rewards gets exactly 0.

    Args:
        rewards: (B, T), what was paid at each token, groups of `group_size` consecutive responses.
        step_ends: (B, T), 1 at the last token of each step, 0 elsewhere; rewards elsewhere do not count.
        group_size: G, at least 2.
        scale: what is divided by: `"std"` of the group's step rewards, `"batch"` for that of all, `"none"`.

    Returns:
        (B, T) advantages; after the last step of an answer they are 0.
    """
    groups, ends = _groups(rewards, group_size), step_ends.to(rewards.dtype)
    steps = _centred_and_scaled(groups, ends.view_as(groups), scale).view_as(rewards)
    return steps.flip(1).cumsum(1).flip(1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """A_i = r_i - mean of the other answers' rewards (RLOO, arXiv 2402.14740), (B,) -> (B,); 0 where all are equal.

    It is G / (G - 1) times the distance to the group's mean, and, unlike that, without bias: what is taken off does not
    depend on the answer itself.
    """
    return group_relative(rewards, group_size, "none") * group_size / (group_size - 1)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size={group_size} must be at least 2 and divide the number of rewards, {len(rewards)}")
    return rewards.reshape(len(rewards) // group_size, -1)


def _centred_and_scaled(groups: Tensor, chosen: Tensor, scale: str) -> Tensor:
    """Distances to the mean of each row of `groups`, (N, K), over the chosen (1) entries; 0 at the others."""
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
    """(N,) bool: rows whose chosen entries are all equal, or of which there are none."""
    return torch.where(here, groups, -torch.inf).amax(1) <= torch.where(here, groups, torch.inf).amin(1)


def equal_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(B / G,) bool: the groups whose rewards are all equal and from which nothing can be learned."""
    groups = rewards.view(-1, group_size)
    return _equal(groups, torch.ones_like(groups).bool())


def normalize(advantages: Tensor, mask: Tensor) -> Tensor:
    """Advantages (B, T) with mean 0 and standard deviation 1 over all action tokens of the batch; 0 outside the mask.

    With fewer than two action tokens there is no spread to divide by, and only the mean is taken off.
    """
    chosen = advantages[mask.bool()]
    std = chosen.std() if chosen.numel() > 1 else torch.ones_like(chosen.sum())
    return (advantages - chosen.mean()) / (std + 1e-8) * mask
