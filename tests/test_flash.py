"""Attention over shared prompts by two calls of FlashAttention, with slow kernels in their place on a CPU."""

import pytest
import torch

from llm_env.lm import flash
from llm_env.lm.shared_prompt import PackedRows


def sequences(queries, keys):
    """Where each sequence begins and ends among the queries, and among the keys."""
    bounds = queries.bounds.tolist(), keys.bounds.tolist()
    return zip(bounds[0], bounds[0][1:], bounds[1], bounds[1][1:], strict=False)


def scores_of(query, key, causal):
    """Scores (H, S, S') of a sequence, -inf at later keys."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("shd,thd->hst", query, key)
    return scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf) if causal else scores


def slow_forward(query, key, value, queries, keys, causal):
    out, log_sum = torch.zeros_like(query), torch.zeros(query.shape[1], len(query), dtype=query.dtype)
    for a, b, c, d in sequences(queries, keys):
        scores = scores_of(query[a:b], key[c:d], causal)
        wide = value[c:d].repeat_interleave(query.shape[1] // key.shape[1], 1)
        out[a:b] = torch.einsum("hst,thd->shd", scores.softmax(-1), wide)
        log_sum[:, a:b] = scores.logsumexp(-1)
    return out, log_sum


def slow_backward(results, query, key, value, queries, keys, causal):
    """FlashAttention's backward pass (arXiv 2205.14135, algorithm 4), which takes result and log-sum as given."""
    of_out, out, log_sum = results
    of_query, of_key, of_value = map(torch.zeros_like, (query, key, value))
    times = query.shape[1] // key.shape[1]
    for a, b, c, d in sequences(queries, keys):
        p = (scores_of(query[a:b], key[c:d], causal) - log_sum[:, a:b, None]).exp()
        wide_key, wide_value = (x[c:d].repeat_interleave(times, 1) for x in (key, value))
        of_p = torch.einsum("shd,thd->hst", of_out[a:b], wide_value)
        of_scores = p * (of_p - (of_out[a:b] * out[a:b]).sum(-1).T[..., None])
        of_query[a:b] += torch.einsum("hst,thd->shd", of_scores, wide_key)
        of_key[c:d] += torch.einsum("hst,shd->thd", of_scores, query[a:b]).unflatten(1, (-1, times)).sum(2)
        of_value[c:d] += torch.einsum("hst,shd->thd", p, of_out[a:b]).unflatten(1, (-1, times)).sum(2)
    return of_query, of_key, of_value


@pytest.mark.parametrize("lengths", [[5, 3], [4, 4], [1]])
@pytest.mark.parametrize("group, new", [(3, 4), (1, 1), (0, 0)])
def test_two_calls_are_one_softmax(lengths, group, new, monkeypatch):
    """Result and gradient equal those of one softmax over all pairs of positions that see each other."""
    monkeypatch.setattr(flash, "forward", slow_forward)
    monkeypatch.setattr(flash, "backward", slow_backward)
    torch.manual_seed(0)
    width = max(lengths)
    visible = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    seen = torch.cat([visible, torch.ones(len(lengths), group * new, dtype=torch.bool)], 1)
    query = torch.randn(len(lengths), 4, width + group * new, 8, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, len(lengths), 2, width + group * new, 8, dtype=torch.float64)
    key, value = key.requires_grad_(), value.requires_grad_()
    weights = torch.randn_like(query) * seen[:, None, :, None]
    rows = PackedRows(visible, group, new)
    assert rows.lengths == lengths
    owner = torch.tensor([-1] * width + [j for j in range(group) for _ in range(new)])
    pairs = torch.ones(len(owner), len(owner)).tril().bool() & ((owner == -1) | (owner[:, None] == owner))
    wide_key, wide_value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = (query @ wide_key.mT).masked_fill(~(pairs & seen[:, None, None]), -1e30)
    results = [scores.softmax(-1) @ wide_value, rows.layout.attend(query, key, value)]
    expected, got = (torch.autograd.grad((out * weights).sum(), (query, key, value)) for out in results)
    expected_out, out = (out * seen[:, None, :, None] for out in results)
    torch.testing.assert_close(out, expected_out)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a * seen[:, None, :, None], b * seen[:, None, :, None])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernels_agree_with_the_slow_ones(monkeypatch):
    torch.manual_seed(0)
    lengths, group, new = [40, 7, 33], 3, 70
    layout = flash.SharedLayout(lengths, 40, group, new, torch.device("cuda"))
    query = torch.randn(3, 4, 40 + group * new, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    key, value = torch.randn(2, 3, 2, 40 + group * new, 64, device="cuda", dtype=torch.bfloat16)
    tensors = query, key.requires_grad_(), value.requires_grad_()
    assert flash.runs_on(query)
    out = layout.attend(*tensors)
    weights = torch.randn_like(out)
    got = torch.autograd.grad((out * weights).sum(), tensors)
    monkeypatch.setattr(flash, "forward", slow_forward)
    monkeypatch.setattr(flash, "backward", slow_backward)
    exact = [x.detach().cpu().double().requires_grad_() for x in tensors]
    slow = flash.SharedLayout(lengths, 40, group, new, torch.device("cpu")).attend(*exact)
    expected = torch.autograd.grad((slow * weights.cpu()).sum(), exact)
    for a, b in zip([out, *got], [slow, *expected], strict=True):
        assert (a.cpu().double() - b).norm() < 1e-2 * b.norm()
