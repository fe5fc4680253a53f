"""Every published method against its paper's formula, written out token by token in `tests/slow.py`: values and gradients."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from agents.advantages import (
    discounted_returns,
    gae,
    group_relative,
    group_relative_steps,
    leave_one_out,
)
from agents.losses import (
    cispo_terms,
    clipped_surrogate,
    clipped_terms,
    kl_k1,
    kl_k2,
    kl_k3,
    ratio,
    token_weights,
    value_terms,
    weighted_sum,
)
from tests import slow

GROUP = 4
LENGTHS = [3, 1, 5, 2, 4, 6, 1, 1, 2, 5, 3, 4]
EXACT = {"abs": 1e-10, "rel": 0}
# Ratios at the middle, just inside and just outside the bounds that are used here, and far from them.
BANDS = [1.0, 0.97, 1.1, *(edge + side for edge in (0.8, 1.2, 1.28, 3.0) for side in (-1e-6, 1e-6)), 0.3, 0.6, 2.0, 4.0]
SEEDS = range(6)


@dataclass
class Batch:
    """Ragged rows: log-probs of three policies, advantages, and what was paid to three groups of four responses."""

    seed: int
    lengths: list = field(default_factory=lambda: list(LENGTHS))

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.old, self.ref, self.noise = ([rng.normal(-1, 0.7, n).tolist() for n in self.lengths] for _ in range(3))
        self.logp = [[torch.tensor(x + self.log_ratio(rng), dtype=torch.float64, requires_grad=True) for x in r] for r in self.old]
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


def spread(batch, per_response):
    return slow.spread(per_response, batch.lengths)


def group_mean(batch):
    return slow.group_advantages(batch.rewards, GROUP, "none")


# The objective of the paper, and the loss of the project.
METHODS = {
    "REINFORCE": (
        lambda b: slow.reinforce(b.logp, [slow.returns(row, 0.9) for row in b.paid]),
        lambda p: p.policy_gradient(discounted_returns(p.paid, p.mask, 0.9)),
    ),
    "RLOO": (
        lambda b: slow.rloo(b.logp, slow.leave_one_out(b.rewards, GROUP)),
        lambda p: p.policy_gradient(leave_one_out(p.rewards, GROUP)[:, None]),
    ),
    "PPO": (
        lambda b: slow.ppo(b.logp, b.old, b.advantages, 0.2),
        lambda p: p.loss(p.advantages, 0.2),
    ),
    "PPO with GAE": (
        lambda b: slow.ppo(b.logp, b.old, [slow.gae(r, v, 0.99, 0.9) for r, v in zip(b.paid, b.values, strict=True)], 0.2),
        lambda p: p.loss(gae(p.paid, p.values, p.mask, 0.99, 0.9)[0], 0.2),
    ),
    "dual clip": (
        lambda b: slow.dual_clip_ppo(b.logp, b.old, b.advantages, 0.2, 3.0),
        lambda p: p.loss(p.advantages, 0.2, dual_clip=3.0),
    ),
    "GRPO": (
        lambda b: slow.grpo(b.logp, b.old, b.ref, spread(b, b.outcome()), 0.2, 0.04),
        lambda p: p.loss(p.outcome(), 0.2, aggregation="sequence") + 0.04 * p.kl(kl_k3),
    ),
    "GRPO with k2": (
        lambda b: slow.grpo(b.logp, b.old, b.ref, spread(b, b.outcome()), 0.2, 0.04, slow.k2),
        lambda p: p.loss(p.outcome(), 0.2, aggregation="sequence") + 0.04 * p.kl(kl_k2),
    ),
    "GRPO with k1": (
        lambda b: slow.grpo(b.logp, b.old, b.ref, spread(b, b.outcome("batch")), 0.2, 0.04, slow.k1),
        lambda p: p.loss(p.outcome("batch"), 0.2, aggregation="sequence") + 0.04 * p.kl(kl_k1),
    ),
    "GRPO with process supervision": (
        lambda b: slow.grpo(b.logp, b.old, b.ref, b.process(), 0.2, 0.04),
        lambda p: p.loss(p.process(), 0.2, aggregation="sequence") + 0.04 * p.kl(kl_k3),
    ),
    "DAPO": (
        lambda b: slow.dapo(b.logp, b.old, spread(b, b.outcome()), 0.2, 0.28),
        lambda p: p.loss(p.outcome(), 0.2, 0.28, aggregation="token"),
    ),
    "Dr. GRPO": (
        lambda b: slow.dr_grpo(b.logp, b.old, spread(b, group_mean(b)), 0.2, 9),
        lambda p: p.loss(p.outcome("none"), 0.2, aggregation="constant", length_limit=9),
    ),
    "GSPO": (
        lambda b: slow.gspo(b.logp, b.old, b.outcome(), 0.2, 0.28),
        lambda p: p.loss(p.outcome(), 0.2, 0.28, aggregation="sequence", level="sequence"),
    ),
    "CISPO": (
        lambda b: slow.cispo(b.logp, b.old, spread(b, b.outcome()), 1.0, 0.28),  # the paper has no lower bound
        lambda p: p.loss(p.outcome(), 1.0, 0.28, aggregation="token", surrogate="cispo"),
    ),
    "CISPO with a lower bound": (
        lambda b: slow.cispo(b.logp, b.old, b.advantages, 0.2, 0.28),
        lambda p: p.loss(p.advantages, 0.2, 0.28, aggregation="token", surrogate="cispo"),
    ),
}


def gradient(value, leaves):
    """Of the value by each leaf; 0 where it does not depend on it, as where all is clipped."""
    if not isinstance(value, torch.Tensor) or not value.requires_grad:
        return [0.0] * len(leaves)
    return [0.0 if g is None else g.item() for g in torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)]


@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient(method):
    objective_of, loss_of = METHODS[method]
    for seed in SEEDS:
        batch = Batch(seed)
        table = Padded(batch, extra=seed)
        objective, loss = objective_of(batch), loss_of(table)
        loss.backward()
        assert loss.item() == pytest.approx(-objective.item(), **EXACT)
        got = [x for row, n in zip(table.logp.grad.tolist(), batch.lengths, strict=True) for x in row[:n]]
        assert got == pytest.approx([-g for g in gradient(objective, batch.leaves)], **EXACT)
        assert max(map(abs, got)) > 1e-3 and (table.logp.grad[table.mask == 0] == 0).all()


def test_the_batches_reach_every_side_of_every_bound():
    ratios = []  # of tokens with token advantages, of responses with their group's
    for seed in SEEDS:
        b = Batch(seed)
        ratios.append([(math.exp(new.item() - old), a) for new, old, a in slow.tokens(b.logp, b.old, b.advantages)])
        means = [sum(x.item() - y for x, y in zip(*row, strict=True)) / len(row[0]) for row in zip(b.logp, b.old, strict=True)]
        ratios.append(list(zip(map(math.exp, means), b.outcome(), strict=True)))
    for seen, edges in ((sum(ratios[::2], []), (0.8, 1.2, 1.28, 3.0)), (sum(ratios[1::2], []), (0.8, 1.28))):
        for edge in edges:
            for sign in (-1, 1):
                gaps = [rho - edge for rho, a in seen if a * sign > 0]
                assert min(gaps) < -0.05 and max(gaps) > 0.05
        assert 0.0 in [a for _, a in seen]
        assert any(0 < abs(rho - edge) < 1e-5 for rho, _ in seen for edge in edges)


@pytest.mark.parametrize("method", ["RLOO", "PPO", "dual clip", "GRPO with process supervision", "GSPO"])
def test_the_gradients_of_the_references_by_finite_differences(method):
    batch, h = Batch(0), 1e-7  # smaller than the distance to a bound, where the objective has a kink
    objective_of = METHODS[method][0]

    def value(leaf, step):
        with torch.no_grad():
            leaf += step
            result = float(objective_of(batch))
            leaf -= step
        return result

    differences = [(value(leaf, h) - value(leaf, -h)) / (2 * h) for leaf in batch.leaves]
    assert gradient(objective_of(batch), batch.leaves) == pytest.approx(differences, abs=1e-6)


# --- advantages ----------------------------------------------------------------------------------------------------------


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
        assert got == pytest.approx([a * GROUP / (GROUP - 1) for a in group_mean(batch)], **EXACT)


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("extra", [0, 4])
def test_step_advantages(scale, extra):
    for seed in SEEDS:
        batch = Batch(seed)
        table = Padded(batch, extra)
        got = group_relative_steps(table.step_rewards, table.step_ends, GROUP, scale)
        for row, n, expected in zip(got, batch.lengths, slow.step_advantages(batch.steps, batch.lengths, GROUP, scale), strict=True):
            assert row[:n].tolist() == pytest.approx(expected, **EXACT)
        assert (got[2] == 0).all()  # a response without steps


def test_one_step_at_the_end_of_each_response_is_outcome_supervision():
    batch = Batch(0)
    batch.steps = [[(n - 1, reward)] for n, reward in zip(batch.lengths, batch.rewards, strict=True)]
    table = Padded(batch)
    assert batch.process() == [pytest.approx(row) for row in spread(batch, batch.outcome())]
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
            assert targets[i, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, batch.values[i], strict=True)], **EXACT)
            assert summed[i, :n].tolist() == pytest.approx(slow.returns(batch.paid[i], gamma), **EXACT)


@pytest.mark.parametrize("eps", [0.2, 1.0, None])
def test_value_loss_and_its_gradient(eps):
    for seed in SEEDS:
        batch = Batch(seed)
        table = Padded(batch, 2, junk=1e3)
        leaves = [[torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in row] for row in batch.values]
        expected = slow.value_loss(leaves, batch.noise, batch.paid, eps)
        values = table.values.requires_grad_()
        loss = weighted_sum(value_terms(values, table.old_values, table.paid, eps), token_weights(table.mask))
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), **EXACT)
        got = values.grad[table.mask == 1].tolist()
        assert got == pytest.approx(gradient(expected, [v for row in leaves for v in row]), **EXACT)


# --- by hand -------------------------------------------------------------------------------------------------------------


def table(*rows):
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
    rewards, ends = table([0, 0, 0, 2, 0], [0, 0, 0, 7, 7]), table([0, 1, 0, 1, 0], [1, 0, 1, 0, 0])
    advantages = group_relative_steps(rewards, ends, 2)
    assert advantages[0].tolist() == pytest.approx(first) and advantages[1, :3].tolist() == pytest.approx(second)
    # The objective, where the ratio is 1.5 at token 2 of the first and token 0 of the second, else 1:
    #   first: (1 + 1 + 1.2 * 1.5 + 1.5 + 0) / 5 = 5.3 / 5;   second: (1.5 * -1 - 0.5 - 0.5) / 3 = -2.5 / 3
    logp, mask = table([1, 1, 1.5, 1, 1], [1.5, 1, 1, 9, 9]).log(), table([1, 1, 1, 1, 1], [1, 1, 1, 0, 0])
    loss = clipped_surrogate(logp, torch.zeros(2, 5), advantages, mask, 0.2, aggregation="sequence")
    assert loss.item() == pytest.approx(-(5.3 / 5 - 2.5 / 3) / 2 / 1.0001)


def test_leave_one_out_by_hand():
    # 1 - (0 + 0 + 3)/3, 0 - (1 + 0 + 3)/3 twice, 3 - (1 + 0 + 0)/3
    expected = [0, -4 / 3, -4 / 3, 8 / 3]
    assert leave_one_out(table(1, 0, 0, 3), 4).tolist() == pytest.approx(expected)
    assert slow.leave_one_out([1, 0, 0, 3], 4) == pytest.approx(expected)


def test_sequence_ratio_by_hand():
    # Ratios 2 and 1/2: s = sqrt(2 * 1/2) = 1, though both tokens are beyond a bound. Ratios 4 and 1: s = 2, clipped to 1.2.
    logp, mask = table([2, 0.5, 9], [4, 1, 9]).log().requires_grad_(), table([1, 1, 0], [1, 1, 0])
    rho = ratio(logp, torch.zeros(2, 3), mask, "sequence")
    assert rho[mask == 1].tolist() == pytest.approx([1, 1, 2, 2])
    loss = clipped_surrogate(logp, torch.zeros(2, 3), torch.ones(2, 3), mask, 0.2, aggregation="sequence", level="sequence")
    loss.backward()
    assert loss.item() == pytest.approx(-(1 + 1.2) / 2)
    assert logp.grad.tolist() == [pytest.approx([-0.25, -0.25, 0]), [0, 0, 0]]  # s A / |y| / G, or nothing


def test_dual_clip_by_hand():
    # A = -1: -2 below the bound of 3; -5 becomes -3, without a gradient. A = 1 is PPO's: min(5, 1.2).
    rho = table(2, 5, 5).requires_grad_()
    terms = clipped_terms(rho, table(-1, -1, 1), 0.2, dual_clip=3.0)
    terms.sum().backward()
    assert terms.tolist() == pytest.approx([2, 3, -1.2]) and rho.grad.tolist() == [1, 0, 0]


def test_cispo_by_hand():
    # The weight is clipped, not the gradient: -1.28 * 2 where PPO has none, -0.5 and +1.28 elsewhere.
    logp = table(2, 0.5, 4).log().requires_grad_()
    terms = cispo_terms(logp, logp.exp(), table(2, 1, -1), 1.0, 0.28)
    terms.sum().backward()
    assert terms.tolist() == pytest.approx([-2.56 * math.log(2), 0.5 * math.log(2), 1.28 * math.log(4)])
    assert logp.grad.tolist() == pytest.approx([-2.56, -0.5, 1.28])


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_exactly_on_a_bound_the_gradient_is_between_its_two_sides(advantage):
    rho = table(0.8, 1.2, 1.0).requires_grad_()
    terms = clipped_terms(rho, torch.full((3,), advantage), 0.2)
    terms.sum().backward()
    assert terms.tolist() == pytest.approx([-0.8 * advantage, -1.2 * advantage, -advantage], abs=1e-15)
    assert all(0 <= g / -advantage <= 1 for g in rho.grad.tolist()) and rho.grad[2] == -advantage
