"""Losses and KL estimators: pure functions on (B, T) tensors. B responses, T tokens; masks are 1 at action tokens.

Every loss is a sum of per-token terms times `token_weights`. The weights are taken over a whole optimizer step, so that
the gradient is the same however the step is cut into micro-batches or padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # clamped before exp: clamping after it gives 0 * inf = NaN in the backward pass


def token_weights(mask: Tensor, aggregation: str = "token", length_limit: int | None = None) -> Tensor:
    """The weight of every token in the loss of one optimizer step, (B, T); 0 outside the mask.

    Args:
        mask: (B, T), 0/1, of all responses of the step.
        aggregation: `"token"`, the mean over all action tokens (DAPO, arXiv 2503.14476); `"sequence"`, the mean over each
            response's tokens and then over responses (GRPO, arXiv 2402.03300); `"constant"`, the sum divided by
            B * length_limit (Dr. GRPO, arXiv 2503.20783).
        length_limit: the constant of `"constant"`, in tokens; T by default.
    """
    mask = mask.float()
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if aggregation == "constant":
        return mask / (len(mask) * (length_limit or mask.shape[1]))
    raise ValueError(f"aggregation={aggregation!r} must be 'token', 'sequence' or 'constant'")


def ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """Rho = pi / pi_old per token, from log-probs in nats."""
    return (logp - old_logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def clipped_terms(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) per token, (B, T) (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
    rho = ratio(logp, old_logp)
    clipped = rho.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return -torch.minimum(rho * advantages, clipped * advantages)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    aggregation: str = "token",
    length_limit: int | None = None,
) -> Tensor:
    """PPO's clipped objective as a loss, a scalar: `clipped_terms` summed with `token_weights`.

    Args:
        logp: (B, T), log pi of the action tokens, in nats.
        old_logp: (B, T), log pi_old of them.
        advantages: (B, T).
        mask: (B, T), 0/1.
        clip_range: eps.
        clip_range_high: eps of the upper bound ("clip-higher", DAPO); `clip_range` by default.
        aggregation: see `token_weights`.
        length_limit: see `token_weights`.
    """
    terms = clipped_terms(logp, old_logp, advantages, clip_range, clip_range_high)
    return weighted_sum(terms, token_weights(mask, aggregation, length_limit))


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """Sum of terms * weights where the weight is not 0: what stands at padding, even a NaN, does not count."""
    return (torch.where(weights > 0, terms, 0.0) * weights).sum()


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip_range_vf: float | None) -> Tensor:
    """0.5 * max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2) per token, (B, T); unclipped with None."""
    error = (values - returns) ** 2
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error


def entropy_of(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), (..., V) -> (...), in nats and float32."""
    logp = (logits.float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """The plain estimate of KL(pi, pi_ref) per token: -d, d = ref_logp - logp.

    Both inputs and the result are (B, T), in nats. Unbiased, of either sign; as a loss its expected gradient is zero.
    http://joschu.net/blog/kl-approx.html
    """
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """d^2 / 2, d = ref_logp - logp, per token: biased, but on-policy its gradient is that of the reverse KL.

    Both inputs and the result are (B, T), in nats. http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * (ref_logp - logp) ** 2


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Schulman's low-variance estimate of KL(pi, pi_ref) per token: exp(d) - d - 1, d = ref_logp - logp.

    Both inputs and the result are (B, T), in nats; never negative. d is clamped to +-20 before exp.
    http://joschu.net/blog/kl-approx.html
    """
    d = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


def ratio_statistics(logp: Tensor, old_logp: Tensor, mask: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Means over the action tokens: `approx_kl`, Schulman's estimate of KL(pi_old, pi), and `clip_fraction`, the share of
    ratios outside [1 - low, 1 + high].
    """
    with torch.no_grad():
        here = mask.bool()
        rho = ratio(logp, old_logp)[here]
        return {
            "approx_kl": (rho - 1 - rho.log()).mean(),
            "clip_fraction": ((rho < 1 - low) | (rho > 1 + high)).float().mean(),
        }
