"""The Triton kernels, against slow computations in float64: on a GPU, or on a CPU by Triton's interpreter.

pip install --no-deps --target .triton triton
TRITON_INTERPRET=1 PYTHONPATH=.triton python -m pytest tests/test_kernels.py
"""

import os

import pytest
import torch

pytest.importorskip("triton")

from agents.sampling import decode_kernel, sample_kernel, sampler
from agents.sampling.sampler import Sampler
from llm_env.lm import logprob_kernel
from llm_env.lm.logprob_kernel import FusedLogProbs

if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def slow_attention(query, key, value, caches, lengths, counts, cap):
    """Attend by one softmax for each response and head, over exactly the tokens that it has."""
    prompt_keys, prompt_values, responses = caches
    out = torch.zeros(query.shape, dtype=torch.float64)
    groups, width = query.shape[1] // key.shape[1], prompt_values.shape[2]
    for i in range(query.shape[0]):
        for head in range(query.shape[1]):
            for j in range(query.shape[2]):
                k, begin, count = head // groups, width - int(lengths[i]), int(counts[i, j])
                keys = [prompt_keys[i, k, :, begin:].T, responses[0, i, k, j, :count], key[i, k, j][None]]
                values = [prompt_values[i, k, begin:], responses[1, i, k, j, :count], value[i, k, j][None]]
                scores = torch.cat(keys).cpu().double() @ query[i, head, j].cpu().double()
                scores = scores if cap is None else cap * torch.tanh(scores / cap)
                out[i, head, j] = scores.softmax(0) @ torch.cat(values).cpu().double()
    return out


@pytest.mark.parametrize(
    "heads, kv_heads, group, d, prompt, width, cap, splits",
    [
        (4, 2, 3, 16, 70, 40, None, None),
        (7, 1, 2, 20, 5, 130, None, 1),  # heads that are no power of two
        (14, 2, 2, 64, 200, 300, 30.0, 3),
        (2, 2, 2, 8, 66, 70, None, 4),  # fewer tokens than parts
        (3, 3, 1, 16, 1, 1, 5.0, 2),
    ],
)
def test_attention_of_a_new_token(heads, kv_heads, group, d, prompt, width, cap, splits):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(DEVICE)

    query, key, value = (random(2, group, size, d).transpose(1, 2) for size in (heads, kv_heads, kv_heads))
    caches = random(2, kv_heads, prompt, d).mT, random(2, kv_heads, prompt, d), random(2, 2, kv_heads, group, width, d)
    lengths = torch.randint(1, prompt + 1, (2,), generator=generator).to(DEVICE)
    counts = torch.randint(0, width, (2, group), generator=generator).to(DEVICE)
    counts[0, 0] = 0
    before, expected = caches[2].clone(), slow_attention(query, key, value, caches, lengths, counts, cap)
    out = decode_kernel.attend_slots(query, key, value, caches, lengths, counts, cap, splits)
    torch.testing.assert_close(out.cpu().double(), expected, atol=2e-5, rtol=1e-5)
    for i in range(2):  # the new keys and values are stored, and nothing else is written
        for j in range(group):
            before[0, i, :, j, counts[i, j]], before[1, i, :, j, counts[i, j]] = key[i, :, j], value[i, :, j]
    assert torch.equal(caches[2], before)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [64, 4096])
def test_log_probs_and_entropies(temperature, block, monkeypatch):
    monkeypatch.setattr(logprob_kernel, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(9, 300, generator=generator) * 5
    table[0, :100] = -1e9  # forbidden tokens
    tokens = torch.randint(100, 257, (9,), generator=generator)
    weights = torch.randn(2, 9, generator=generator)
    of_table, table = table.double().requires_grad_(), table.to(DEVICE).requires_grad_()
    found = FusedLogProbs.apply(table[:, :257], tokens.to(DEVICE), temperature)  # rows that do not lie together
    log_p = (of_table[:, :257] / temperature).log_softmax(-1)
    expected = log_p.gather(1, tokens[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    for result, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(result.cpu().double(), exact, atol=1e-5, rtol=1e-5)
    (torch.stack(found) * weights.to(DEVICE)).sum().backward()
    (torch.stack(expected) * weights).sum().backward()
    torch.testing.assert_close(table.grad.cpu().double(), of_table.grad, atol=1e-5, rtol=1e-5)


def test_a_loss_without_entropies_has_the_gradient_of_the_log_probs():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    tokens = torch.tensor([4, 5, 6], device=DEVICE)
    FusedLogProbs.apply(logits, tokens, 1.0)[0].sum().backward()
    expected = torch.nn.functional.one_hot(tokens, 50) - logits.detach().softmax(-1)
    torch.testing.assert_close(logits.grad, expected)


@pytest.mark.parametrize("vocabulary", [5000, 4096, 9001])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_of_a_large_vocabulary(vocabulary, temperature, monkeypatch):
    """The same tokens as by the table of probabilities, which `tests/test_decoding.py` compares with the distribution."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, vocabulary, generator=generator) * 4
    logits[:, : vocabulary // 2] = -1e9
    numbers = torch.rand(40, 2, generator=generator)
    expected, expected_logp = Sampler(temperature)(logits, numbers)  # on the CPU, in PyTorch
    monkeypatch.setattr(sampler, "runs_on", lambda device: True)
    tokens, logp = Sampler(temperature)(logits.to(DEVICE), numbers.to(DEVICE))
    assert tokens.tolist() == expected.tolist() and len(set(tokens.tolist())) > 10
    torch.testing.assert_close(logp.cpu(), expected_logp, atol=1e-5, rtol=1e-5)


def test_blocks_beyond_the_vocabulary_have_no_weight():
    sums, top = sample_kernel.block_sums(torch.zeros(2, 70, device=DEVICE), 1.0, 64)
    assert sums.shape == (2, 64) and sums[:, :3].tolist() == [[64, 6, 0]] * 2 and top.tolist() == [[0.0]] * 2
