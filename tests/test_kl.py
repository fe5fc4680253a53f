"""The KL estimators against the exact KL of small distributions, and the controller that steers a KL to its target."""

import math

import numpy as np
import pytest
import torch

from agents.losses import kl_k1, kl_k2, kl_k3
from llm_env.reference import AdaptiveKLController

SAMPLES = 100_000
REFERENCE = [0.4, 0.1, 0.3, 0.2]
NEAR, FAR = [0.45, 0.08, 0.3, 0.17], [0.01, 0.8, 0.1, 0.09]
ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def exact_kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def draw(p, seed=0):
    return torch.tensor(np.random.default_rng(seed).choice(len(p), SAMPLES, p=p))


def logs(p):
    return torch.tensor(p, dtype=torch.float64).log()


def estimates(estimator, p):
    """(SAMPLES,) estimates of KL(p, REFERENCE) from samples of p."""
    tokens = draw(p)
    return estimator(logs(p)[tokens], logs(REFERENCE)[tokens])


def off_by(samples, expected):
    """How many standard errors their mean is from the expected one."""
    error = samples.std(0) / math.sqrt(len(samples))
    return ((samples.mean(0) - torch.as_tensor(expected, dtype=torch.float64)) / error).abs()


@pytest.mark.parametrize("p", [NEAR, FAR], ids=["near", "far"])
def test_k1_and_k3_are_unbiased(p):
    for estimator in (kl_k1, kl_k3):
        assert off_by(estimates(estimator, p), exact_kl(p, REFERENCE)) < 4
        # the KL of the other direction is another number, which few samples tell apart where the policies are near
        assert p is NEAR or off_by(estimates(estimator, p), exact_kl(REFERENCE, p)) > 20


def test_k2_is_biased_but_little_where_the_policies_are_near():
    assert off_by(estimates(kl_k2, FAR), exact_kl(FAR, REFERENCE)) > 20
    assert estimates(kl_k2, NEAR).mean().item() == pytest.approx(exact_kl(NEAR, REFERENCE), rel=0.1)


def test_k3_varies_least_where_the_policies_are_near():
    spread = {name: estimates(estimator, NEAR).std().item() for name, estimator in ESTIMATORS.items()}
    assert spread["k3"] < 0.2 * spread["k1"]  # of first order in the difference against second


def gradients(estimator, p):
    """(SAMPLES, V) gradients of the estimator as a loss, by the logits of p, at samples of p."""
    logits = logs(p).requires_grad_()
    logp = logits.log_softmax(-1)
    values = estimator(logp, logs(REFERENCE))
    rows = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in values]
    return torch.stack(rows)[draw(p)]


def kl_gradient(first, second, p):
    """By finite differences of the exact KL, as the logits of p move; first and second pick its two arguments."""
    result, h = [], 1e-6
    for i in range(len(p)):
        values = []
        for step in (h, -h):
            moved = [x * math.exp(step) if k == i else x for k, x in enumerate(p)]
            q = {"policy": [x / sum(moved) for x in moved], "reference": REFERENCE}
            values.append(exact_kl(q[first], q[second]))
        result.append((values[0] - values[1]) / (2 * h))
    return result


@pytest.mark.parametrize("p", [NEAR, FAR], ids=["near", "far"])
def test_the_gradients_of_the_estimators_as_losses(p):
    """None in expectation of k1, of the reverse KL(pi, pi_ref) of k2, and of the forward KL(pi_ref, pi) of k3."""
    reverse, forward = kl_gradient("policy", "reference", p), kl_gradient("reference", "policy", p)
    assert off_by(gradients(kl_k1, p), [0.0] * 4).max() < 4
    assert off_by(gradients(kl_k2, p), reverse).max() < 4
    assert off_by(gradients(kl_k3, p), forward).max() < 4
    assert off_by(gradients(kl_k1, p), reverse).max() > 4
    assert p is NEAR or off_by(gradients(kl_k3, p), reverse).max() > 20


# --- the adaptive coefficient --------------------------------------------------------------------------------------------

TARGET, HORIZON, EPISODES = 0.3, 100.0, 20


def best_policy(beta):
    """What maximizes E[r] - beta KL(p, REFERENCE), r being the token's index: p ~ REFERENCE exp(r / beta)."""
    scores = [math.log(q) + i / beta for i, q in enumerate(REFERENCE)]
    weights = [math.exp(score - max(scores)) for score in scores]
    return [w / sum(weights) for w in weights]


def simulate(controller, updates=800, sign=1):
    """The KL and beta of every round: the policy goes a tenth of the way to the best one, in log beta, and is measured."""
    log_beta, kls, betas = math.log(controller.value), [], []
    for _ in range(updates):
        log_beta += 0.1 * (math.log(controller.value) - log_beta)
        kls.append(exact_kl(best_policy(math.exp(log_beta)), REFERENCE))
        controller.update(sign * kls[-1], EPISODES)
        betas.append(controller.value)
    return kls, betas


def test_a_larger_beta_shrinks_the_kl_of_the_simulation():
    kls = [exact_kl(best_policy(beta), REFERENCE) for beta in (0.1, 0.3, 1.0, 3.0, 10.0)]
    assert kls == sorted(kls, reverse=True) and kls[0] > 2 * TARGET and kls[-1] < TARGET / 2


@pytest.mark.parametrize("start", [0.05, 20.0], ids=["from far away", "from the reference"])
def test_the_adaptive_coefficient_brings_the_kl_to_its_target(start):
    controller = AdaptiveKLController(start, TARGET, HORIZON)
    kls, betas = simulate(controller)
    assert (kls[0] > 2 * TARGET) == (start < 1) and (kls[0] < TARGET / 2) == (start > 1)
    assert kls[-100:] == pytest.approx([TARGET] * 100, rel=0.05)
    most = 0.2 * EPISODES / HORIZON
    factors = [after / before - 1 for before, after in zip([start, *betas], betas, strict=False)]
    assert max(map(abs, factors)) <= most * (1 + 1e-9)
    assert factors[0] == pytest.approx(-most if start > 1 else most)  # the first error is beyond the clip
    assert abs(factors[-1]) < 0.1 * most


@pytest.mark.parametrize("start", [0.05, 20.0])
def test_a_kl_reward_in_the_place_of_the_kl_runs_away(start):
    controller = AdaptiveKLController(start, TARGET, HORIZON)
    kls, betas = simulate(controller, sign=-1)
    assert betas == sorted(betas, reverse=True) and betas[-1] < 1e-5 * start  # as if the KL were always too small
    assert kls[-1] > 3 * TARGET
