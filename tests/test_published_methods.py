"""Every published method against its paper's formula, written out token by token in `tests/slow.py`: values and gradients."""

import math

import pytest
import torch

from agents.advantages import discounted_returns, gae, leave_one_out
from agents.losses import clipped_terms, kl_k1, kl_k2, kl_k3
from tests import slow
from tests.ragged import EXACT, GROUP, SEEDS, Batch, Padded, gradient, leaf


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
    "GRPO with k1 and the std of the batch": (
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
    "GSPO-token with process supervision": (
        lambda b: slow.gspo_token(b.logp, b.old, b.process(), 0.2, 0.28),
        lambda p: p.loss(p.process(), 0.2, 0.28, aggregation="sequence", level="sequence"),
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
    tokens, responses = [], []  # (ratio, advantage) of both levels
    for batch in map(Batch, SEEDS):
        tokens += [((new - old).exp().item(), a) for new, old, a in slow.tokens(batch.logp, batch.old, batch.advantages)]
        for new, old, a in zip(batch.logp, batch.old, batch.outcome(), strict=True):
            responses.append((math.exp(slow.mean(x.item() - y for x, y in zip(new, old, strict=True))), a))
    for seen, edges in ((tokens, (0.8, 1.2, 1.28, 3.0)), (responses, (0.8, 1.28))):
        assert 0.0 in [a for _, a in seen] and any(0 < abs(rho - edge) < 1e-5 for rho, _ in seen for edge in edges)
        for edge in edges:
            for sign in (-1, 1):
                gaps = [rho - edge for rho, a in seen if a * sign > 0]
                assert min(gaps) < -0.05 and max(gaps) > 0.05


@pytest.mark.parametrize("method", ["RLOO", "PPO", "dual clip", "GRPO with process supervision", "GSPO"])
def test_the_gradients_of_the_references_by_finite_differences(method):
    batch, h = Batch(0), 1e-7  # smaller than the distance to a bound, where the objective has a kink
    objective_of = METHODS[method][0]

    def value(token, step):
        with torch.no_grad():
            token += step
            result = float(objective_of(batch))
            token -= step
        return result

    differences = [(value(token, h) - value(token, -h)) / (2 * h) for token in batch.leaves]
    assert gradient(objective_of(batch), batch.leaves) == pytest.approx(differences, abs=1e-6)


def tensors(*ratios):
    """Log-probs with these ratios to an old policy whose log-probs are 0."""
    return [leaf(math.log(rho)) for rho in ratios]


def test_the_objectives_of_the_references_by_hand():
    old = [[0.0, 0.0], [0.0]]
    new = [tensors(2, 0.5), tensors(4)]
    # PPO: min(2, 1.2) = 1.2; min(0.5, 0.8) = 0.5; A = -1: min(-4, -1.2) = -4, which dual clip with 3 makes -3
    advantages = [[1.0, 1.0], [-1.0]]
    assert slow.ppo(new, old, advantages, 0.2).item() == pytest.approx((1.2 + 0.5 - 4) / 3)
    assert slow.dual_clip_ppo(new, old, advantages, 0.2, 3).item() == pytest.approx((1.2 + 0.5 - 3) / 3)
    assert slow.dapo(new, old, advantages, 0.2, 0.3).item() == pytest.approx((1.3 + 0.5 - 4) / 3)
    assert slow.dr_grpo(new, old, advantages, 0.2, 10).item() == pytest.approx((1.2 + 0.5 - 4) / 20)
    # k3 with pi_ref / pi of 1/2, 2, 1/4: r - 1 - log r = log 2 - 1/2, 1 - log 2, log 4 - 3/4
    penalty = (1 / 2) / 2 + (math.log(4) - 3 / 4)
    assert slow.grpo(new, old, old, advantages, 0.2, 0.1).item() == pytest.approx(((1.2 + 0.5) / 2 - 4 - 0.1 * penalty) / 2)
    # s of the first is sqrt(2 / 2) = 1, inside the bounds though both tokens are outside; that of the second is 4
    sequence = slow.gspo(new, old, [1.0, 1.0], 0.2, 0.2)
    assert sequence.item() == pytest.approx((1 + 1.2) / 2)
    assert gradient(sequence, [*new[0], *new[1]]) == pytest.approx([1 / 2 / 2, 1 / 2 / 2, 0])
    # weights 1.28, 0.5, 1.28 times A log pi; the second factor alone has a gradient
    weighted = slow.cispo(new, old, advantages, 1.0, 0.28)
    assert weighted.item() == pytest.approx((1.28 * math.log(2) - 0.5 * math.log(2) - 1.28 * math.log(4)) / 3)
    assert gradient(weighted, [*new[0], *new[1]]) == pytest.approx([1.28 / 3, 0.5 / 3, -1.28 / 3])
    assert slow.rloo(new, [3.0, -1.0]).item() == pytest.approx((0 - math.log(4)) / 2)
    assert slow.reinforce(new, [[3.0, 1.0], [-1.0]]).item() == pytest.approx((2 * math.log(2) - math.log(4)) / 2, abs=1e-12)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_exactly_on_a_bound_the_gradient_is_between_its_two_sides(advantage):
    rho = torch.tensor([0.8, 1.2, 1.0], dtype=torch.float64).requires_grad_()
    terms = clipped_terms(rho, torch.full_like(rho, advantage), 0.2)
    terms.sum().backward()
    assert terms.tolist() == pytest.approx([-0.8 * advantage, -1.2 * advantage, -advantage], abs=1e-15)
    assert all(0 <= g / -advantage <= 1 for g in rho.grad.tolist()) and rho.grad[2] == -advantage
