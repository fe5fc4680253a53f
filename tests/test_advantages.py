"""Numbers worked out by hand, and slow loops in float64."""

import numpy as np
import pytest
import torch

from agents.advantages import (
    discounted_returns,
    equal_groups,
    gae,
    group_relative,
    group_relative_steps,
    leave_one_out,
    normalize,
)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_gae_by_hand():
    # gamma 0.5, lambda 0.5; deltas: 1 + .5*2 - 1 = 1, 0 + .5*3 - 2 = -.5, 2 + 0 - 3 = -1
    advantages, returns = gae(tensor([1, 0, 2]), tensor([1, 2, 3]), torch.ones(1, 3), 0.5, 0.5)
    assert advantages.tolist() == [[1 + 0.25 * -0.75, -0.5 + 0.25 * -1, -1]]
    assert returns.tolist() == [[1.8125, 1.25, 2.0]]


def test_gae_bootstraps_with_last_values():
    advantages, _ = gae(tensor([1, 0]), tensor([1, 2]), torch.ones(1, 2), 1.0, 1.0, torch.tensor([10.0], dtype=torch.float64))
    assert advantages.tolist() == [[10.0, 8.0]]  # deltas 1 + 2 - 1 = 2 and 0 + 10 - 2 = 8


def test_gae_skips_padding_and_tokens_that_the_env_wrote():
    mask = torch.tensor([[1.0, 0, 1, 0], [1, 1, 1, 1]])
    advantages, returns = gae(tensor([1, 99, 2, 99], [1, 0, 2, 0]), tensor([1, 99, 3, 99], [1, 2, 3, 4]), mask, 0.5, 0.5)
    alone, alone_returns = gae(tensor([1, 2]), tensor([1, 3]), torch.ones(1, 2), 0.5, 0.5)
    assert advantages[0].tolist() == [alone[0, 0].item(), 0, alone[0, 1].item(), 0]
    assert returns[0].tolist() == [alone_returns[0, 0].item(), 0, alone_returns[0, 1].item(), 0]


def test_gae_against_a_slow_loop():
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9))
    mask = rng.random((6, 9)) < 0.7
    last = rng.normal(size=6)
    advantages, returns = gae(*map(torch.tensor, (rewards, values, mask.astype(float))), 0.9, 0.8, torch.tensor(last))
    for b in range(6):
        steps = np.flatnonzero(mask[b])
        for k, t in enumerate(steps):
            expected, weight = 0.0, 1.0
            for j in range(k, len(steps)):
                following = values[b, steps[j + 1]] if j + 1 < len(steps) else last[b]
                expected += weight * (rewards[b, steps[j]] + 0.9 * following - values[b, steps[j]])
                weight *= 0.9 * 0.8
            assert advantages[b, t].item() == pytest.approx(expected)
            assert returns[b, t].item() == pytest.approx(expected + values[b, t])
    assert (advantages[~torch.tensor(mask)] == 0).all() and (returns[~torch.tensor(mask)] == 0).all()


def test_discounted_returns_by_hand():
    assert discounted_returns(tensor([1, 0, 4, 7]), torch.tensor([[1.0, 1, 1, 0]]), 0.5).tolist() == [[2.0, 2.0, 4.0, 0.0]]


def test_group_relative_by_hand():
    # group 1: mean 2, deviations -1 0 1, std with Bessel 1; group 2: mean 2, std sqrt(12)
    rewards = torch.tensor([1.0, 2, 3, 0, 0, 6], dtype=torch.float64)
    std2 = 12**0.5
    expected = [-1 / 1.0001, 0, 1 / 1.0001, -2 / (std2 + 1e-4), -2 / (std2 + 1e-4), 4 / (std2 + 1e-4)]
    assert group_relative(rewards, 3).tolist() == pytest.approx(expected)
    assert group_relative(rewards, 3, "none").tolist() == [-1, 0, 1, -2, -2, 4]
    batch = np.std(rewards.numpy(), ddof=1) + 1e-4
    assert group_relative(rewards, 3, "batch").tolist() == pytest.approx([x / batch for x in [-1, 0, 1, -2, -2, 4]])


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_equal_rewards_have_exactly_no_advantage(scale):
    rewards = torch.tensor([0.1] * 3 + [0.0, 1.0, 0.0])  # three times 0.1 has a float32 mean that is not 0.1
    advantages = group_relative(rewards, 3, scale)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0] and advantages[4] > 0
    assert equal_groups(rewards, 3).tolist() == [True, False]


def test_leave_one_out_by_hand():
    rewards = torch.tensor([1.0, 2, 6, 0.1, 0.1, 0.1])  # others' means: 4, 3.5, 1.5
    assert leave_one_out(rewards, 3).tolist() == pytest.approx([-3, -1.5, 4.5, 0, 0, 0])


def test_process_supervision_by_hand():
    """Two answers: steps of 1 and 0 ending at tokens 0 and 2, and one step of 0.5 at token 1. Mean 0.5, std 0.5."""
    rewards = tensor([1, 0, 0, 0], [0, 0.5, 0, 0])
    ends = tensor([1, 0, 1, 0], [0, 1, 0, 0])
    a = 0.5 / (0.5 + 1e-4)
    expected = [[a - a, -a, -a, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(group_relative_steps(rewards, ends, 2), tensor(*expected))
    assert group_relative_steps(rewards, ends, 2, "none").tolist() == [[0, -0.5, -0.5, 0], [0, 0, 0, 0]]


def test_process_supervision_of_equal_steps_and_of_none():
    rewards, ends = tensor([0.1, 0.1], [0, 0.1], [0, 0], [0, 0]), tensor([1, 1], [0, 1], [0, 0], [0, 0])
    for scale in ("std", "batch", "none"):
        assert (group_relative_steps(rewards, ends, 2, scale) == 0).all()


def test_process_supervision_with_one_step_at_the_end_is_outcome_supervision():
    scores = torch.tensor([1.0, 2, 6, 0, 0, 1])
    rewards, ends = torch.zeros(6, 4), torch.zeros(6, 4)
    for i, length in enumerate([1, 4, 2, 3, 3, 1]):
        rewards[i, length - 1], ends[i, length - 1] = scores[i], 1
    for scale in ("std", "batch", "none"):
        got = group_relative_steps(rewards, ends, 3, scale)
        torch.testing.assert_close(got[:, 0], group_relative(rewards.sum(1), 3, scale))
        assert (got[0, 1:] == 0).all() and got[1, 3] == got[1, 0]


def test_normalize_by_hand():
    advantages = normalize(tensor([1, 3, 50], [5, 50, 50]), tensor([1, 1, 0], [1, 0, 0]))
    assert advantages.flatten().tolist() == pytest.approx([-1, 0, 0, 1, 0, 0])  # mean 3, std 2 of 1, 3, 5
    assert normalize(tensor([7]), tensor([1])).tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("size", "scale", "message"), [(1, "std", "group_size=1"), (4, "std", "group_size=4"), (3, "x", "scale='x'")]
)
def test_bad_groups(size, scale, message):
    with pytest.raises(ValueError, match=message):
        group_relative(torch.zeros(6), size, scale)
