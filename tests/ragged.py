"""Random batches, ragged as the references of `tests/slow.py` take them and padded as the project does."""

import math

import numpy as np
import torch

from agents.advantages import group_relative, group_relative_steps
from agents.losses import clipped_surrogate, token_weights, weighted_sum
from tests import slow

GROUP = 4
LENGTHS = [3, 1, 5, 2, 4, 6, 1, 1, 2, 5, 3, 4]
EXACT = {"abs": 1e-10, "rel": 0}
# Ratios at the middle, just inside and just outside the bounds that are used here, and far from them.
BANDS = [1.0, 0.97, 1.1, *(edge + side for edge in (0.8, 1.2, 1.28, 3.0) for side in (-1e-6, 1e-6)), 0.3, 0.6, 2.0, 4.0]
SEEDS = range(6)


def leaf(x):
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


class Batch:
    """Ragged rows: log-probs of three policies, advantages, and what was paid to three groups of four responses."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.lengths = list(LENGTHS)
        self.old, self.ref, self.noise = ([rng.normal(-1, 0.7, n).tolist() for n in self.lengths] for _ in range(3))
        self.logp = [[leaf(x + self.log_ratio(rng)) for x in row] for row in self.old]
        for row in range(0, len(self.lengths), 2):  # every other response has such a ratio as a whole
            self.move(row, self.log_ratio(rng))
        self.advantages = [[float(rng.choice([-1.3, -0.4, 0.0, 0.6, 2.0])) for _ in range(n)] for n in self.lengths]
        self.values, self.paid = ([rng.normal(size=n).tolist() for n in self.lengths] for _ in range(2))
        self.rewards = rng.normal(size=len(self.lengths)).tolist()
        self.rewards[4:8] = [0.3] * 4  # a group of equal rewards
        self.steps = [self.draw_steps(rng, n) for n in self.lengths]
        self.steps[2] = []  # a response without steps
        self.steps[0] = [(0, 0.25), (2, 0.0), (2, 0.5)]  # two that end at one token
        self.steps[3] = [(1, 0.0)]  # a step worth nothing is a step all the same

    @staticmethod
    def log_ratio(rng):
        return math.log(BANDS[rng.integers(len(BANDS))])

    @staticmethod
    def draw_steps(rng, n):
        return [(int(end), float(rng.choice([0.0, 1.0, -0.5]))) for end in sorted(rng.choice(n, rng.integers(0, n + 1), False))]

    def move(self, row, log_ratio):
        """Make the mean log ratio of a response this one."""
        with torch.no_grad():
            now = sum(new.item() - old for new, old in zip(self.logp[row], self.old[row], strict=True)) / self.lengths[row]
            for new in self.logp[row]:
                new += log_ratio - now

    @property
    def leaves(self):
        return [token for row in self.logp for token in row]

    def outcome(self, scale="std"):
        return slow.group_advantages(self.rewards, GROUP, scale)

    def process(self):
        return slow.step_advantages(self.steps, self.lengths, GROUP)


def padded(rows, extra=0, junk=0.0):
    """(B, T) float64 of ragged rows, T being `extra` more than the longest; the padding is full of `junk` of both signs."""
    table = torch.full((len(rows), max(map(len, rows)) + extra), junk, dtype=torch.float64)
    table[:, 1::2] *= -1
    for row, numbers in zip(table, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
    return table


class Padded:
    """The same batch as the project sees it."""

    def __init__(self, batch, extra=0, junk=1e6):
        self.mask = padded([[1.0] * n for n in batch.lengths], extra)
        self.logp = padded([[x.item() for x in row] for row in batch.logp], extra, junk).requires_grad_()
        self.old, self.ref = padded(batch.old, extra, -junk), padded(batch.ref, extra, -2 * junk)
        self.advantages, self.values = padded(batch.advantages, extra, junk), padded(batch.values, extra, junk)
        self.old_values, self.paid = padded(batch.noise, extra, junk), padded(batch.paid, extra, junk)
        self.rewards = torch.tensor(batch.rewards, dtype=torch.float64)
        self.step_rewards, self.step_ends = padded([[0.0] * n for n in batch.lengths], extra, junk), 0 * self.mask
        for i, row in enumerate(batch.steps):
            for end, reward in row:
                self.step_rewards[i, end] += reward
                self.step_ends[i, end] = 1.0

    def loss(self, advantages, *args, **kwargs):
        return clipped_surrogate(self.logp, self.old, advantages, self.mask, *args, **kwargs)

    def outcome(self, scale="std"):
        return group_relative(self.rewards, GROUP, scale)[:, None].expand_as(self.mask)

    def process(self):
        return group_relative_steps(self.step_rewards, self.step_ends, GROUP)

    def kl(self, estimator):
        return weighted_sum(estimator(self.logp, self.ref), token_weights(self.mask, "sequence"))

    def policy_gradient(self, advantages):
        return weighted_sum(-self.logp * advantages, token_weights(self.mask, "constant", 1))


def gradient(value, leaves):
    """Of the value by each leaf; 0 where it does not depend on it, as where all is clipped."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return [0.0] * len(leaves)
    return [0.0 if g is None else g.item() for g in torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)]
