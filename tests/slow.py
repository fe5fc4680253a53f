"""The published methods as their papers write them: response by response and token by token, in float64.

No masks and no padding: a batch is a ragged list with one row a response and one entry a token. `logp` holds scalar float64
tensors, so that autograd can follow every one of them; all other entries are floats. Objectives are to be maximized.
"""

import math
import statistics


def clip(x, low, high):
    return low if x < low else high if x > high else x


def mean(terms):
    terms = list(terms)
    return sum(terms) / len(terms)


def spread(per_response, lengths):
    """One number a response becomes one a token."""
    return [[x] * n for x, n in zip(per_response, lengths, strict=True)]


def tokens(*batches):
    """The tokens of all responses, one after the other, as tuples."""
    for rows in zip(*batches, strict=True):
        yield from zip(*rows, strict=True)


# --- the objective of one token ------------------------------------------------------------------------------------------


def clipped(rho, advantage, low, high):
    """min(rho A, clip(rho, 1 - low, 1 + high) A): PPO, arXiv 1707.06347, equation 7."""
    return min(rho * advantage, clip(rho, 1 - low, 1 + high) * advantage)


def dual_clipped(rho, advantage, low, high, bound):
    """PPO's term, and max(that, c A) where A < 0: arXiv 1912.09729."""
    term = clipped(rho, advantage, low, high)
    return max(term, bound * advantage) if advantage < 0 else term


def k1(logp, ref):
    """Estimators of KL(pi, pi_ref) by a sample of pi: http://joschu.net/blog/kl-approx.html, with r = pi_ref / pi."""
    return logp - ref


def k2(logp, ref):
    return (ref - logp) ** 2 / 2


def k3(logp, ref):
    return (ref - logp).exp() - 1 - (ref - logp)


# --- the objective of a batch --------------------------------------------------------------------------------------------


def ppo(logp, old, advantages, eps):
    """E_t of the clipped term: arXiv 1707.06347, equation 7, the expectation being over all tokens of the batch."""
    return mean(clipped((new - before).exp(), a, eps, eps) for new, before, a in tokens(logp, old, advantages))


def dual_clip_ppo(logp, old, advantages, eps, bound):
    return mean(dual_clipped((new - before).exp(), a, eps, eps, bound) for new, before, a in tokens(logp, old, advantages))


def grpo(logp, old, ref, advantages, eps, beta, kl=k3):
    """1/G sum_i 1/|o_i| sum_t {clipped term - beta k3}: DeepSeekMath, arXiv 2402.03300, equations 3 and 4."""
    responses = []
    for row in zip(logp, old, ref, advantages, strict=True):
        total = 0.0
        for new, before, reference, a in zip(*row, strict=True):
            total = total + clipped((new - before).exp(), a, eps, eps) - beta * kl(new, reference)
        responses.append(total / len(row[0]))
    return sum(responses) / len(responses)


def dapo(logp, old, advantages, low, high):
    """1/(sum_i |o_i|) sum_i sum_t of the term with the upper bound raised: arXiv 2503.14476, equation 8."""
    total, count = 0.0, 0
    for new, before, a in tokens(logp, old, advantages):
        total, count = total + clipped((new - before).exp(), a, low, high), count + 1
    return total / count


def dr_grpo(logp, old, advantages, eps, limit):
    """1/G sum_i sum_t of the term, over a constant, the longest length: arXiv 2503.20783."""
    total = 0.0
    for new, before, a in tokens(logp, old, advantages):
        total = total + clipped((new - before).exp(), a, eps, eps)
    return total / len(logp) / limit


def gspo(logp, old, advantages, low, high):
    """1/G sum_i of the term of s_i = (pi(y_i) / pi_old(y_i))^(1/|y_i|), one number a response: arXiv 2507.18071."""
    objective = 0.0
    for new, before, a in zip(logp, old, advantages, strict=True):
        s = ((sum(new) - sum(before)) / len(new)).exp()
        objective = objective + clipped(s, a, low, high)
    return objective / len(logp)


def gspo_token(logp, old, advantages, low, high):
    """1/G sum_i 1/|y_i| sum_t of the term of s_{i,t} = sg[s_i] pi_t / sg[pi_t], token by token: the same paper's GSPO-token."""
    responses = []
    for new, before, a in zip(logp, old, advantages, strict=True):
        s = math.exp(mean(x.item() - y for x, y in zip(new, before, strict=True)))
        responses.append(mean(clipped(s * (x - x.item()).exp(), each, low, high) for x, each in zip(new, a, strict=True)))
    return mean(responses)


def cispo(logp, old, advantages, low, high):
    """1/(sum_i |o_i|) sum_i sum_t sg[clip(rho)] A log pi: MiniMax-M1, arXiv 2506.13585, equations 4 and 5."""
    return mean(
        clip(math.exp(new.item() - before), 1 - low, 1 + high) * a * new for new, before, a in tokens(logp, old, advantages)
    )


def rloo(logp, advantages):
    """1/k sum_i A_i log pi(y_i), log pi of the whole response: arXiv 2402.14740."""
    return mean(a * sum(row) for row, a in zip(logp, advantages, strict=True))


def reinforce(logp, advantages):
    """Mean over episodes of sum_t A_t log pi(a_t): Williams 1992."""
    return mean(sum(new * a for new, a in zip(*row, strict=True)) for row in zip(logp, advantages, strict=True))


def value_loss(values, old_values, returns, eps):
    """Mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2), to be minimized."""
    errors = []
    for v, old, target in tokens(values, old_values, returns):
        near = v if eps is None else clip(v, old - eps, old + eps)
        errors.append(max((v - target) ** 2, (near - target) ** 2) / 2)
    return mean(errors)


# --- advantages ----------------------------------------------------------------------------------------------------------


def group_advantages(rewards, size, scale="std"):
    """(r - mean) / (std + 1e-4) in each group of `size`: arXiv 2402.03300, section 4.1.2; std with Bessel's correction.

    `scale="batch"`: std of all rewards; `"none"`: no division. Exactly 0 where all rewards of a group are one number.
    """
    result = []
    for begin in range(0, len(rewards), size):
        group = rewards[begin : begin + size]
        result += _standardized(group, rewards, scale)
    return result


def _standardized(group, batch, scale):
    if len(set(group)) < 2:
        return [0.0] * len(group)
    divisor = {
        "std": lambda: statistics.stdev(group) + 1e-4,
        "batch": lambda: statistics.stdev(batch) + 1e-4,
        "none": lambda: 1.0,
    }
    return [(x - statistics.fmean(group)) / divisor[scale]() for x in group]


def leave_one_out(rewards, size):
    """r_i less the mean of the others of its group: arXiv 2402.14740."""
    result = []
    for i, reward in enumerate(rewards):
        first = i - i % size
        others = [rewards[j] for j in range(first, first + size) if j != i]
        result.append(reward - sum(others) / len(others))
    return result


def merged(steps):
    """The steps (end, reward) of one response with those of one end made one, since one token is paid one number."""
    return sorted((end, sum(reward for other, reward in steps if other == end)) for end in {end for end, _ in steps})


def step_advantages(steps, lengths, size, scale="std"):
    """Process supervision, arXiv 2402.03300, section 4.1.3.

    All step rewards of a group are normalized together; A_{i,t} is the sum of those of response i that end at or after t.

    Args:
        steps: for each response a list of (index of the step's last token, reward).
        lengths: tokens of each response.
        size: responses of a group.
        scale: see `group_advantages`.
    """
    result = []
    everything = [reward for row in steps for _, reward in merged(row)]
    for begin in range(0, len(steps), size):
        rows = [merged(row) for row in steps[begin : begin + size]]
        pool = [reward for row in rows for _, reward in row]
        normalized = iter(_standardized(pool, everything, scale))
        for row, n in zip(rows, lengths[begin : begin + size], strict=True):
            row = [(end, next(normalized)) for end, _ in row]
            result.append([sum(reward for end, reward in row if end >= t) for t in range(n)])
    return result


def gae(rewards, values, gamma, gae_lambda, last=0.0):
    """A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), of one episode: arXiv 1506.02438, equation 16."""
    n = len(rewards)
    following = [*values[1:], last]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def returns(rewards, gamma):
    """G_t = sum_k gamma^k r_{t+k} of one episode."""
    return [sum(gamma ** (k - t) * rewards[k] for k in range(t, len(rewards))) for t in range(len(rewards))]


def whitened(advantages):
    """Less the mean, over the standard deviation (Bessel), of all tokens of the batch."""
    flat = [a for row in advantages for a in row]
    center, deviation = statistics.fmean(flat), statistics.stdev(flat)
    return [[(a - center) / deviation for a in row] for row in advantages]
