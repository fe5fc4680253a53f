"""What must not matter: padding, the order of groups and of rows, the micro-batches, shift and scale of the rewards."""

import copy

import numpy as np
import pytest
import torch

from agents.advantages import group_relative, group_relative_steps, leave_one_out
from agents.losses import cispo_terms, clipped_surrogate, clipped_terms, ratio, token_weights, weighted_sum
from tests.ragged import GROUP, LENGTHS, Batch, Padded
from tests.test_published_methods import METHODS

SAME = {"abs": 1e-12, "rel": 1e-12}


def loss_and_gradient(method, batch, *padding):
    """The loss, and the gradient of each response's tokens as one list a response."""
    seen = Padded(batch, *padding)
    loss = METHODS[method][1](seen)
    loss.backward()
    return loss.item(), [row[:n].tolist() for row, n in zip(seen.logp.grad, batch.lengths, strict=True)]


@pytest.mark.parametrize("method", METHODS)
def test_padding(method):
    batch = Batch(0)
    loss, gradient = loss_and_gradient(method, batch, 0, 0.0)
    for extra, junk in [(0, 1e4), (1, -1e4), (20, 7.0)]:
        other, other_gradient = loss_and_gradient(method, batch, extra, junk)
        assert other == pytest.approx(loss, **SAME)
        assert other_gradient == [pytest.approx(row, **SAME) for row in gradient]


def reordered(batch, order):
    other = copy.copy(batch)
    for name, rows in vars(batch).items():
        if isinstance(rows, list):
            setattr(other, name, [rows[i] for i in order])
    return other


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_groups_and_of_rows_within_a_group(method):
    batch, order = Batch(1), [10, 8, 9, 11, 3, 0, 2, 1, 4, 7, 5, 6]
    loss, gradient = loss_and_gradient(method, batch)
    other, other_gradient = loss_and_gradient(method, reordered(batch, order))
    assert other == pytest.approx(loss, **SAME)
    assert other_gradient == [pytest.approx(gradient[i], **SAME) for i in order]


def test_an_order_across_groups_does_matter():
    batch = Batch(1)
    order = np.arange(len(LENGTHS)).reshape(-1, GROUP).T.ravel()  # each new group has rows of all old ones
    assert loss_and_gradient("GRPO", reordered(batch, order))[0] != pytest.approx(loss_and_gradient("GRPO", batch)[0], rel=1e-3)


@pytest.mark.parametrize("cuts", [[6], [1, 2, 7, 11], list(range(1, 12))], ids=["halves", "uneven", "one by one"])
@pytest.mark.parametrize("surrogate", ["clip", "cispo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_micro_batches(aggregation, level, surrogate, cuts):
    """Parts cut to their own width, with the weights of the whole, add up to the whole: the loss and its gradient."""
    seen = Padded(Batch(2), 2)
    advantages = seen.outcome() + 0.1
    options = {"aggregation": aggregation, "length_limit": 8, "level": level, "surrogate": surrogate}
    whole = clipped_surrogate(seen.logp, seen.old, advantages, seen.mask, 0.2, 0.3, **options)
    (gradient,) = torch.autograd.grad(whole, seen.logp)
    weights, total = token_weights(seen.mask, aggregation, 8), 0.0
    for rows in np.split(np.arange(len(LENGTHS)), cuts):
        part = (rows, slice(max(LENGTHS[i] for i in rows)))
        rho = ratio(seen.logp[part], seen.old[part], seen.mask[part], level)
        if surrogate == "clip":
            terms = clipped_terms(rho, advantages[part], 0.2, 0.3)
        else:
            terms = cispo_terms(seen.logp[part], rho, advantages[part], 0.2, 0.3)
        loss = weighted_sum(terms, weights[part])
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), **SAME)
    torch.testing.assert_close(seen.logp.grad, gradient, atol=1e-12, rtol=1e-12)
    assert gradient.abs().max() > 1e-3


def normalizations():
    """Functions of (B, T) step rewards, all of whose rows have a step; the outcome is paid in the first column."""
    ends = torch.zeros(8, 5, dtype=torch.float64)
    ends[:, [0, 3]] = 1
    ends[::2, 1] = 1
    return {
        "outcome": lambda rewards, scale: group_relative(rewards[:, 0], 4, scale),
        "process": lambda rewards, scale: group_relative_steps(rewards, ends, 4, scale),
    }


REWARDS = torch.tensor(np.random.default_rng(0).normal(size=(8, 5)))


@pytest.mark.parametrize("supervision", normalizations())
def test_a_shift_of_the_rewards_changes_no_advantage(supervision):
    normalize = normalizations()[supervision]
    for scale in ("std", "none"):
        torch.testing.assert_close(normalize(REWARDS + 5, scale), normalize(REWARDS, scale), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(leave_one_out(REWARDS[:, 0] + 5, 4), leave_one_out(REWARDS[:, 0], 4), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("supervision", normalizations())
@pytest.mark.parametrize("factor", [0.1, 10.0, 1000.0])
def test_a_scale_of_the_rewards_changes_no_advantage_but_for_the_epsilon(supervision, factor):
    normalize = normalizations()[supervision]
    plain, before, after = normalize(REWARDS, "none"), normalize(REWARDS, "std"), normalize(factor * REWARDS, "std")
    torch.testing.assert_close(after, before, rtol=1e-4 * abs(1 - 1 / factor) / 0.4, atol=0)  # the smallest std is 0.4
    # x / (s + e) for x / s: s + e is x over the first, and c x / (c s + e) is x / (s + e / c)
    moved = torch.where(plain == 0, 0.0, plain / (plain / before - 1e-4 + 1e-4 / factor))
    torch.testing.assert_close(after, moved, rtol=1e-10, atol=0)
    torch.testing.assert_close(normalize(factor * REWARDS, "none"), factor * plain)
