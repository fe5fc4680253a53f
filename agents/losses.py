"""Losses and KL estimators: pure functions on (B, T) tensors. B responses, T tokens; masks are 1 at action tokens.

Every loss is the sum of per-token terms times `token_weights`. The weights are computed over a whole optimizer step. So the
gradient does not depend on padding or on how the step is split into micro-batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from agents.advantages import first_actions, one_hot_turns

AGGREGATIONS = ("token", "sequence", "constant")
RATIO_LEVELS = ("token", "sequence", "turn")
SURROGATES = ("clip", "cispo")
LOG_RATIO_LIMIT = 20.0  # clamp before exp: clamping afterwards gives 0 * inf = NaN in the backward pass


def token_weights(mask: Tensor, aggregation: str = "token", length_limit: int | None = None) -> Tensor:
    """Compute the loss weight of every token in one optimizer step, (B, T); 0 outside the mask.

    Args:
        mask: (B, T), 0/1, over all responses of the step.
        aggregation: `"token"`: mean over all action tokens (DAPO, arXiv 2503.14476). `"sequence"`: mean over the tokens of
            each response, then mean over responses (GRPO, arXiv 2402.03300). `"constant"`: sum over all tokens divided by
            B * length_limit (Dr. GRPO, arXiv 2503.20783).
        length_limit: length in the divisor of `"constant"`, in tokens. Default: T.

    Raises:
        ValueError: If `aggregation` is none of these.
    """
    mask = mask if mask.is_floating_point() else mask.float()
    if aggregation == "token":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / len(mask)
    if aggregation == "constant":
        return mask / (len(mask) * (length_limit or mask.shape[1]))
    raise ValueError(f"aggregation={aggregation!r} must be 'token', 'sequence' or 'constant'")


def turn_weights(weights: Tensor, turn_ids: Tensor) -> Tensor:
    """Move the loss weights of each turn's tokens to the turn's first token, (B, T): for one value per turn.

    Args:
        weights: (B, T), see `token_weights`.
        turn_ids: (B, T) int, the turn of each action token, from 0; -1 at observations and padding.
    """
    turns = one_hot_turns(turn_ids).to(weights.dtype)
    totals = torch.einsum("bt,btk->bk", weights, turns).gather(1, turn_ids.clamp(min=0))
    return torch.where(first_actions(turn_ids), totals, 0.0)


def ratio(
    logp: Tensor, old_logp: Tensor, mask: Tensor | None = None, level: str = "token", turn_ids: Tensor | None = None
) -> Tensor:
    """Compute the probability ratio rho = pi / pi_old, (B, T).

    Args:
        logp: (B, T), log pi of the action tokens, in nats.
        old_logp: (B, T), log pi_old of the action tokens, in nats.
        mask: (B, T), 0/1; required for `"sequence"` and `"turn"`.
        level: `"token"`: one ratio per token. `"sequence"`: s_i, the geometric mean of the ratios of the response's tokens, at
            each of these tokens (GSPO, arXiv 2507.18071). The gradient is that of the paper's GSPO-token, s_i * grad log pi
            at each token. It sums to GSPO's gradient if all tokens of a response have the same advantage and weight.
            `"turn"`: the same with each turn as a sequence.
        turn_ids: (B, T) int, the turn of each action token; required for `"turn"`.

    Raises:
        ValueError: If `level` is none of these.
    """
    log_ratio = logp - old_logp
    if level in ("sequence", "turn"):
        assert mask is not None
        inside = torch.where(mask.bool(), log_ratio, 0.0).detach()
        if level == "sequence":
            mean = inside.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        else:
            assert turn_ids is not None
            turns = one_hot_turns(turn_ids).to(inside.dtype)
            means = torch.einsum("bt,btk->bk", inside, turns) / turns.sum(1).clamp(min=1)
            mean = means.gather(1, turn_ids.clamp(min=0))
        log_ratio = logp - logp.detach() + mean
    elif level != "token":
        raise ValueError(f"ratio_level={level!r} must be 'token', 'sequence' or 'turn'")
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def truncated_importance(old_logp: Tensor, sampled_logp: Tensor, cap: float) -> Tensor:
    """Compute truncated importance weights min(pi_old / pi_sampled, cap) per token, (B, T), without gradient.

    They correct for tokens that were sampled from a policy other than pi_old. pi_old is the policy before the update, as
    computed in training. pi_sampled is the policy that sampled the tokens: an engine with other kernels, or older weights.
    Truncated importance sampling: Ionides 2008, https://doi.org/10.1198/106186008X320456. Between training and sampling
    engines: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl.

    Args:
        old_logp: (B, T), log pi_old of the action tokens, in nats.
        sampled_logp: (B, T), log pi_sampled of the action tokens, in nats.
        cap: maximum weight. It bounds the variance, but adds a bias where weights are truncated.
    """
    return ratio(old_logp, sampled_logp).detach().clamp(max=cap)


def clipped_terms(
    rho: Tensor,
    advantages: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> Tensor:
    """Compute PPO's clipped loss -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A) per token, (B, T).

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7. With `dual_clip` = c and A < 0, the loss is
    -max(c A, min(...)), which is bounded even if rho is not (dual-clip PPO, Ye et al. 2020, arXiv 1912.09729).
    """
    clipped = rho.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    objective = torch.minimum(rho * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def cispo_terms(
    logp: Tensor, rho: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """Compute the CISPO loss -sg[clip(rho, 1 - eps, 1 + eps_high)] A log pi per token, (B, T).

    The importance weight is clipped and detached (sg), so that every token contributes a gradient. Source: MiniMax-M1,
    arXiv 2506.13585.
    """
    clipped = rho.clamp(1 - clip_range, 1 + (clip_range if clip_range_high is None else clip_range_high))
    return -clipped.detach() * advantages * logp


def check_dual_clip(dual_clip: float | None, surrogate: str) -> None:
    """Raise if `dual_clip` is set with `surrogate="cispo"`, which clips weights on both sides already."""
    if dual_clip is not None and surrogate == "cispo":
        raise ValueError(f"dual_clip={dual_clip} has no meaning for surrogate='cispo', whose weights are clipped on both sides")


def surrogate_terms(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    *,
    dual_clip: float | None = None,
    level: str = "token",
    surrogate: str = "clip",
    turn_ids: Tensor | None = None,
) -> Tensor:
    """Compute the policy loss per token, (B, T): `clipped_terms` or `cispo_terms`. See `clipped_surrogate`."""
    rho = ratio(logp, old_logp, mask, level, turn_ids)
    if surrogate == "clip":
        return clipped_terms(rho, advantages, clip_range, clip_range_high, dual_clip)
    if surrogate != "cispo":
        raise ValueError(f"surrogate={surrogate!r} must be 'clip' or 'cispo'")
    check_dual_clip(dual_clip, surrogate)
    return cispo_terms(logp, rho, advantages, clip_range, clip_range_high)


def clipped_surrogate(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    aggregation: str = "token",
    length_limit: int | None = None,
    **options: Any,
) -> Tensor:
    """Compute the policy loss, a scalar: the sum of `surrogate_terms` times `token_weights`.

    Args:
        logp: (B, T), log pi of the action tokens, in nats.
        old_logp: (B, T), log pi_old of the action tokens, in nats.
        advantages: (B, T).
        mask: (B, T), 0/1.
        clip_range: eps, clip range of the ratio.
        clip_range_high: eps of the upper bound ("clip-higher", DAPO). Default: `clip_range`.
        aggregation: `"token"`, `"sequence"` or `"constant"`; see `token_weights`.
        length_limit: length in the divisor of `"constant"`, in tokens; see `token_weights`.
        options: `dual_clip` (a number above 1, or None), `level` of the ratio (`"token"`, `"sequence"`, or `"turn"` with
            `turn_ids`) and `surrogate` (`"clip"` or `"cispo"`).
    """
    terms = surrogate_terms(logp, old_logp, advantages, mask, clip_range, clip_range_high, **options)
    return weighted_sum(terms, token_weights(mask, aggregation, length_limit))


def weighted_sum(terms: Tensor, weights: Tensor) -> Tensor:
    """Sum terms * weights over positive weights, so that NaN at padding has no effect."""
    return (torch.where(weights > 0, terms, 0.0) * weights).sum()


def value_terms(values: Tensor, old_values: Tensor, returns: Tensor, clip_range_vf: float | None) -> Tensor:
    """Compute the clipped value loss per token, (B, T).

    0.5 * max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), eps = `clip_range_vf`. Not clipped if `clip_range_vf` is
    None.
    """
    error = (values - returns) ** 2
    if clip_range_vf is not None:
        clipped = old_values + (values - old_values).clamp(-clip_range_vf, clip_range_vf)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate KL(pi, pi_ref) per token by k1 = -d, d = ref_logp - logp.

    Both inputs and the result are (B, T), in nats. Unbiased; may be negative. As a loss, its expected gradient is zero.
    http://joschu.net/blog/kl-approx.html
    """
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate KL(pi, pi_ref) per token by k2 = d^2 / 2, d = ref_logp - logp.

    Both inputs and the result are (B, T), in nats. Biased, but on-policy its gradient is that of the reverse KL.
    http://joschu.net/blog/kl-approx.html
    """
    return 0.5 * (ref_logp - logp) ** 2


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Estimate KL(pi, pi_ref) per token by k3 = exp(d) - d - 1, d = ref_logp - logp.

    Schulman's low-variance estimator. Both inputs and the result are (B, T), in nats; never negative. d is clamped to +-20
    before exp.
    http://joschu.net/blog/kl-approx.html
    """
    d = (ref_logp - logp).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(d) - d


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def ratio_statistics(
    logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    low: float,
    high: float,
    level: str = "token",
    turn_ids: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute `approx_kl` and `clip_fraction`, means over the action tokens.

    `approx_kl` is Schulman's k3 estimate of KL(pi_old, pi), from token ratios. `clip_fraction` is the share of ratios (of the
    given level) outside [1 - low, 1 + high].
    """
    with torch.no_grad():
        tokens, rho = ratio(logp, old_logp), ratio(logp, old_logp, mask, level, turn_ids)
        return {
            "approx_kl": masked_mean(tokens - 1 - tokens.log(), mask),
            "clip_fraction": masked_mean(((rho < 1 - low) | (rho > 1 + high)).float(), mask),
        }


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values (B, T) where `mask` (B, T) is 1; other values may be infinite or NaN.

    Selecting them by a boolean index would wait for a GPU to count them.
    """
    return torch.where(mask.bool(), values, 0.0).sum() / mask.sum()
