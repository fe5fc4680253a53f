"""Numbers worked out by hand, slow loops in float64, and exact KLs of small distributions."""

import math

import numpy as np
import pytest
import torch

from agents.losses import (
    cispo_terms,
    clipped_surrogate,
    clipped_terms,
    kl_k1,
    kl_k2,
    kl_k3,
    ratio,
    ratio_statistics,
    token_weights,
    value_terms,
    weighted_sum,
)
from llm_env.lm.scoring import log_probs_and_entropies


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


ONE = torch.zeros(1, 4, dtype=torch.float64)
RHO = logs([1.5, 1.5, 0.5, 0.5])
ADV = torch.tensor([[2.0, -2.0, 2.0, -2.0]], dtype=torch.float64)


def test_clipping_by_hand():
    # min(3, 2.4) = 2.4; min(-3, -2.4) = -3; min(1, 1.6) = 1; min(-1, -1.6) = -1.6
    rho = ratio(RHO, ONE)
    assert clipped_terms(rho, ADV, 0.2).tolist()[0] == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    assert clipped_terms(rho, ADV, 0.2, 0.4).tolist()[0] == pytest.approx([-2.8, 3.0, -1.0, 1.6])


def test_dual_clip_by_hand():
    # at most 1.2 * 2 for a negative advantage of -2, and only there: min(-3, -2.4) = -3 -> -2.4; -1.6 stays
    assert clipped_terms(ratio(RHO, ONE), ADV, 0.2, dual_clip=1.2).tolist()[0] == pytest.approx([-2.4, 2.4, -1.0, 1.6])


def test_sequence_ratio_by_hand():
    # token ratios 1.5 1.5 0.5 of three tokens: their geometric mean; the fourth is padding
    mask = torch.tensor([[1.0, 1, 1, 0]])
    logp = RHO.clone().requires_grad_()
    rho = ratio(logp, ONE, mask, "sequence")
    mean = (1.5 * 1.5 * 0.5) ** (1 / 3)
    assert rho.tolist()[0][:3] == pytest.approx([mean] * 3)
    rho[:, 1].sum().backward()
    assert logp.grad.tolist()[0] == pytest.approx([0, mean, 0, 0])


def test_cispo_by_hand():
    # weights clip(1.5, 1.5, 0.5, 0.5) to [0.8, 1.4]: the gradient is minus weight times advantage, everywhere
    logp = RHO.clone().requires_grad_()
    terms = cispo_terms(logp, ratio(logp, ONE), ADV, 0.2, 0.4)
    expected = [-1.4 * 2 * math.log(1.5), 1.4 * 2 * math.log(1.5), -0.8 * 2 * math.log(0.5), 0.8 * 2 * math.log(0.5)]
    assert terms.tolist()[0] == pytest.approx(expected)
    terms.sum().backward()
    assert logp.grad.tolist()[0] == pytest.approx([-2.8, 2.8, -1.6, 1.6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "word"}, "ratio_level='word' must be"),
        ({"surrogate": "x"}, "surrogate='x' must be"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip=3.0 has no meaning"),
    ],
)
def test_unknown_surrogates(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(RHO, ONE, ADV, torch.ones(1, 4), 0.2, **options)


def test_the_gradient_is_cut_where_the_clip_bites():
    logp = RHO.clone().requires_grad_()
    clipped_terms(ratio(logp, ONE), ADV, 0.2).sum().backward()
    assert logp.grad.tolist()[0] == pytest.approx([0, 3.0, -1.0, 0])  # -A * rho, or nothing


MASK = torch.tensor([[1.0, 1, 1, 1], [1, 0, 0, 0]])
TERMS = torch.tensor([[1.0, 2, 3, 4], [10, 99, 99, 99]])


@pytest.mark.parametrize(
    ("aggregation", "limit", "expected"),
    [("token", None, 20 / 5), ("sequence", None, (2.5 + 10) / 2), ("constant", None, 20 / 8), ("constant", 5, 20 / 10)],
)
def test_aggregations_by_hand(aggregation, limit, expected):
    assert weighted_sum(TERMS, token_weights(MASK, aggregation, limit)).item() == pytest.approx(expected)
    loss = clipped_surrogate(
        torch.zeros(2, 4), torch.zeros(2, 4), -TERMS, MASK, 0.2, aggregation=aggregation, length_limit=limit
    )
    assert loss.item() == pytest.approx(expected)


def test_padding_counts_for_nothing_even_where_it_is_not_a_number():
    terms = TERMS.clone().requires_grad_()
    poisoned = torch.where(MASK.bool(), terms, torch.nan)
    weighted_sum(poisoned, token_weights(MASK)).backward()
    assert terms.grad.isfinite().all()


def test_an_unknown_aggregation():
    with pytest.raises(ValueError, match="aggregation='mean' must be"):
        token_weights(MASK, "mean")


def test_value_loss_by_hand():
    values, old, returns = (torch.tensor([x]) for x in ([1.0, 1.0, 0.1], [0.0, 0.0, 0.0], [2.0, 0.0, 1.0]))
    # clipped values: 0.2, 0.2, 0.1; errors max(1, 3.24), max(1, 0.04), 0.81
    assert value_terms(values, old, returns, 0.2).tolist()[0] == pytest.approx([1.62, 0.5, 0.405])
    assert value_terms(values, old, returns, None).tolist()[0] == pytest.approx([0.5, 0.5, 0.405])


def test_kl_estimators_by_hand():
    logp, ref = torch.tensor([-1.0]), torch.tensor([-1.5])  # d = -0.5
    assert kl_k1(logp, ref).item() == pytest.approx(0.5)
    assert kl_k2(logp, ref).item() == pytest.approx(0.125)
    assert kl_k3(logp, ref).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_kl_estimators_against_the_exact_kl():
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in (kl_k1, kl_k3):  # both are unbiased
        assert (p * estimator(p.log(), q.log())).sum().item() == pytest.approx(exact.item())
    assert (kl_k3(p.log(), q.log()) >= 0).all()


def test_gradients_of_the_estimators_as_losses():
    # On-policy k1 has no expected gradient, k2 that of the reverse KL.
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64).log()

    def gradient(loss):
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    logp = logits.log_softmax(-1)
    p = logp.exp().detach()
    reverse_kl = gradient((logp.exp() * (logp - ref)).sum())
    torch.testing.assert_close(gradient((p * kl_k1(logp, ref)).sum()), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(gradient((p * kl_k2(logp, ref)).sum()), reverse_kl)


def test_extreme_log_ratios_have_finite_gradients():
    logp = torch.tensor([[-200.0, -1.0]], requires_grad=True)
    other = torch.tensor([[-1.0, -200.0]])
    (kl_k3(logp, other).sum() + clipped_terms(ratio(logp, other), torch.ones(1, 2), 0.2).sum()).backward()
    assert logp.grad.isfinite().all()


def test_ratio_statistics_by_hand():
    mask = torch.tensor([[1.0, 1, 1, 0]])
    statistics = ratio_statistics(logs([1.0, 1.3, 0.9, 5.0]), ONE, mask, 0.2, 0.2)
    expected = np.mean([0, 0.3 - math.log(1.3), -0.1 - math.log(0.9)])
    assert statistics["approx_kl"].item() == pytest.approx(expected)
    assert statistics["clip_fraction"].item() == pytest.approx(1 / 3)


def test_entropy_and_log_probs_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2)  # probabilities 1/4, 3/4; at temperature 1/2: 1/10, 9/10
    logp, entropy = log_probs_and_entropies(logits, torch.tensor([1, 0]))
    np.testing.assert_allclose(logp, [math.log(0.75), math.log(0.25)], rtol=1e-6)
    np.testing.assert_allclose(entropy, [-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))] * 2, rtol=1e-6)
    assert log_probs_and_entropies(logits, torch.tensor([0, 0]), 0.5)[0][0].item() == pytest.approx(math.log(0.1))


@pytest.mark.parametrize("factors", [(1.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_gradients_of_log_probs_and_entropies_are_those_of_torch(factors):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator).mul_(3).requires_grad_()
    tokens, weights = torch.tensor([0, 6, 3, 3, 1]), torch.randn(2, 5, generator=generator)
    table = (logits / 0.7).log_softmax(-1)
    expected = table[range(5), tokens], -(table.exp() * table).sum(-1)
    got = log_probs_and_entropies(logits, tokens, 0.7)
    torch.testing.assert_close(got, expected)
    losses = [sum(f * (w * x).sum() for f, w, x in zip(factors, weights, pair, strict=True) if f) for pair in (got, expected)]
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["token", "sequence", "constant"])
def test_surrogate_and_its_gradient_against_a_slow_loop(aggregation):
    generator = torch.Generator().manual_seed(0)
    logp, old, advantages = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(3))
    lengths = [7, 1, 4, 2, 6]
    mask = torch.tensor([[1.0] * n + [0.0] * (7 - n) for n in lengths])
    logp.requires_grad_()
    loss = clipped_surrogate(logp, old, advantages, mask, 0.2, 0.3, aggregation, length_limit=9)
    loss.backward()
    expected, gradient = 0.0, np.zeros((5, 7))
    for b, n in enumerate(lengths):
        for t in range(n):
            weight = {"token": 1 / sum(lengths), "sequence": 1 / n / 5, "constant": 1 / (5 * 9)}[aggregation]
            rho, a = math.exp((logp[b, t] - old[b, t]).item()), advantages[b, t].item()
            plain, clipped = rho * a, min(max(rho, 0.8), 1.3) * a
            expected -= weight * min(plain, clipped)
            if plain <= clipped:
                gradient[b, t] = -weight * plain
    assert loss.item() == pytest.approx(expected)
    np.testing.assert_allclose(logp.grad.numpy(), gradient, atol=1e-12)
