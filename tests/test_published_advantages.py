"""Advantages and the value loss against their formulas, written out token by token in `tests/slow.py`."""

import math

import numpy as np
import pytest
import torch

from agents.advantages import discounted_returns, gae, group_relative, group_relative_steps, leave_one_out
from agents.losses import clipped_surrogate, token_weights, value_terms, weighted_sum
from tests import slow
from tests.ragged import EXACT, GROUP, LENGTHS, SEEDS, Batch, Padded, gradient, leaf


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_group_advantages(scale):
    for seed in SEEDS:
        batch = Batch(seed)
        got = group_relative(Padded(batch).rewards, GROUP, scale).tolist()
        assert got == pytest.approx(batch.outcome(scale), **EXACT)
        assert got[4:8] == [0.0] * 4  # exactly: the rewards of this group are equal


def test_leave_one_out():
    for seed in SEEDS:
        batch = Batch(seed)
        got = leave_one_out(Padded(batch).rewards, GROUP).tolist()
        assert got == pytest.approx(slow.leave_one_out(batch.rewards, GROUP), **EXACT)
        assert got == pytest.approx([a * GROUP / (GROUP - 1) for a in batch.outcome("none")], **EXACT)


@pytest.mark.parametrize("scale", ["std", "batch", "none"])
def test_step_advantages(scale):
    for seed in SEEDS:
        batch = Batch(seed)
        table = Padded(batch, extra=seed)
        got = group_relative_steps(table.step_rewards, table.step_ends, GROUP, scale)
        for row, expected in zip(got, slow.step_advantages(batch.steps, LENGTHS, GROUP, scale), strict=True):
            assert row[: len(expected)].tolist() == pytest.approx(expected, **EXACT)
        assert (got[2] == 0).all()  # a response without steps


@pytest.mark.parametrize("steps", [[], [(1, 0.1)], [(0, 0.1), (1, 0.1), (3, 0.1)]], ids=["none", "one", "equal"])
def test_a_group_whose_steps_are_all_equal_has_no_advantages(steps):
    batch = Batch(0)
    batch.steps[4:8] = [steps, [], [], []]
    assert batch.process()[4] == [0.0] * 4 and (Padded(batch).process()[4:8] == 0).all()


def test_one_step_at_the_end_of_each_response_is_outcome_supervision():
    batch = Batch(0)
    batch.steps = [[(n - 1, reward)] for n, reward in zip(batch.lengths, batch.rewards, strict=True)]
    table = Padded(batch)
    assert batch.process() == [pytest.approx(row) for row in slow.spread(batch.outcome(), batch.lengths)]
    torch.testing.assert_close(table.process() * table.mask, table.outcome() * table.mask)


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.7, 0.0), (1.0, 1.0)])
def test_gae_and_returns(gamma, gae_lambda):
    for seed in SEEDS:
        batch = Batch(seed)
        table, last = Padded(batch, 2), np.random.default_rng(seed).normal(size=len(LENGTHS))
        advantages, targets = gae(table.paid, table.values, table.mask, gamma, gae_lambda, torch.tensor(last))
        summed = discounted_returns(table.paid, table.mask, gamma)
        for i, n in enumerate(LENGTHS):
            expected = slow.gae(batch.paid[i], batch.values[i], gamma, gae_lambda, last[i])
            assert advantages[i, :n].tolist() == pytest.approx(expected, **EXACT)
            aims = [a + v for a, v in zip(expected, batch.values[i], strict=True)]
            assert targets[i, :n].tolist() == pytest.approx(aims, **EXACT)
            assert summed[i, :n].tolist() == pytest.approx(slow.returns(batch.paid[i], gamma), **EXACT)


@pytest.mark.parametrize("eps", [0.2, 1.0, None])
def test_value_loss_and_its_gradient(eps):
    for seed in SEEDS:
        batch = Batch(seed)
        table = Padded(batch, 2, junk=1e3)
        leaves = [[leaf(v) for v in row] for row in batch.values]
        expected = slow.value_loss(leaves, batch.noise, batch.paid, eps)
        values = table.values.requires_grad_()
        loss = weighted_sum(value_terms(values, table.old_values, table.paid, eps), token_weights(table.mask))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), **EXACT)
        got = values.grad[table.mask == 1].tolist()
        assert got == pytest.approx(gradient(expected, [v for row in leaves for v in row]), **EXACT)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_process_supervision_by_hand():
    # Two responses of 5 and 3 tokens. Their steps end at tokens 1 and 3 with rewards 0 and 2, and at 0 and 2 with 0 and 0.
    # The four rewards 0 2 0 0 have the mean 0.5 and the deviations -0.5 1.5 -0.5 -0.5, whose squares sum to 0.25 + 2.25 +
    # 0.25 + 0.25 = 3: variance 3 / (4 - 1) = 1, std 1, divisor 1.0001. A token's advantage is the sum at and after it:
    #   first:  token 0, 1: -0.5 + 1.5 = 1;   token 2, 3: 1.5;      token 4: nothing, 0
    #   second: token 0: -0.5 - 0.5 = -1;     token 1, 2: -0.5
    first, second = [x / 1.0001 for x in (1, 1, 1.5, 1.5, 0)], [x / 1.0001 for x in (-1, -0.5, -0.5)]
    expected = slow.step_advantages([[(1, 0.0), (3, 2.0)], [(0, 0.0), (2, 0.0)]], [5, 3], 2)
    assert expected == [pytest.approx(first), pytest.approx(second)]
    rewards, ends = tensor([0, 0, 0, 2, 0], [0, 0, 0, 7, 7]), tensor([0, 1, 0, 1, 0], [1, 0, 1, 0, 0])
    advantages = group_relative_steps(rewards, ends, 2)
    assert advantages[0].tolist() == pytest.approx(first) and advantages[1, :3].tolist() == pytest.approx(second)
    # The objective, where the ratio is 1.5 at token 2 of the first and token 0 of the second, else 1:
    #   first: (1 + 1 + 1.2 * 1.5 + 1.5 + 0) / 5 = 5.3 / 5;   second: (1.5 * -1 - 0.5 - 0.5) / 3 = -2.5 / 3
    logp, mask = tensor([1, 1, 1.5, 1, 1], [1.5, 1, 1, 9, 9]).log(), tensor([1, 1, 1, 1, 1], [1, 1, 1, 0, 0])
    loss = clipped_surrogate(logp, torch.zeros(2, 5), advantages, mask, 0.2, aggregation="sequence")
    assert loss.item() == pytest.approx(-(5.3 / 5 - 2.5 / 3) / 2 / 1.0001)


def test_the_advantages_of_the_references_by_hand():
    # mean 2; squares of the deviations -2 0 0 2 sum to 8, over 4 - 1; the others' means are 8/3, 2, 2, 4/3
    std = math.sqrt(8 / 3) + 1e-4
    assert slow.group_advantages([0, 2, 2, 4, 5, 5, 5, 5], 4) == pytest.approx([-2 / std, 0, 0, 2 / std, 0, 0, 0, 0])
    assert slow.leave_one_out([0, 2, 2, 4], 4) == pytest.approx([-8 / 3, 0, 0, 8 / 3])
    # gamma lambda = 1/4; deltas 1 + 2/2 - 1 = 1 and 3 + 4/2 - 2 = 3
    assert slow.gae([1, 3], [1, 2], 0.5, 0.5, last=4) == [1 + 3 / 4, 3]
    assert slow.returns([1, 3], 0.5) == [2.5, 3]
