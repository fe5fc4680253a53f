"""Prompts computed once in scoring: the same numbers as one plain forward pass a response."""

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import llm_env.lm.scoring
import llm_env.lm.shared_prompt
import llm_env.lm.sharing
from agents.sampling.generate import sample_responses
from agents.sampling.sampler import Sampler
from examples.benchmarks.peak import peak_bytes
from llm_env.lm.scoring import head_of, response_states, score
from llm_env.lm.shared_prompt import group_states
from llm_env.lm.sharing import BatchShape, groups_of, sharing_mode, supports_sharing
from tests.conftest import FAMILIES
from tests.decoders import OTHERS, PROMPTS, SIZES, UNABLE, WINDOWS, V, batch, build, plain

WHOLE = ("cohere", "capped logits")  # what they do to logits has no name, so that they are computed as a whole
WAYS = [
    *((name, way) for name in (*FAMILIES, *OTHERS) if name not in WHOLE for way in ("split", "dense")),
    *((name, "dense") for name in WINDOWS if name not in WHOLE),
]


@pytest.fixture
def only(monkeypatch):
    """Leaves one way of sharing prompts."""
    original = llm_env.lm.sharing.supports_sharing

    def leave(chosen):
        monkeypatch.setattr(
            llm_env.lm.sharing, "supports_sharing", lambda base, n, way: way == chosen and original(base, n, way)
        )

    return leave


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *WINDOWS, *UNABLE])
def test_which_models_can_share_prompts(name):
    base = build(name).base_model
    expected = () if name in UNABLE else ("dense",) if name in WINDOWS else ("split", "dense")
    assert tuple(way for way in ("split", "dense") if supports_sharing(base, 20, way)) == expected
    if name in WINDOWS:  # beyond which nothing lies in six tokens
        assert supports_sharing(base, 6) and not supports_sharing(base, 7)
    if name in UNABLE:
        with pytest.raises(ValueError, match="cannot compute a prompt once"):
            score(build(name), *batch(), V, prefix_sharing=True)


@pytest.mark.parametrize(("name", "way"), [*WAYS, *((name, None) for name in (*WHOLE, *WINDOWS, *UNABLE))])
def test_scores_are_those_of_one_plain_forward_a_response(name, way, only):
    model, (prompts, responses) = build(name), batch()
    only(way)
    sharing = way is not None or "auto"
    scored = score(model, prompts, responses, V, 0.7, entropy=True, states=True, prefix_sharing=sharing)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logp, entropy, states = plain(model, prompt, response, 0.7)
        n = len(response)
        for got, expected in (
            (scored.logp[i, :n], logp),
            (scored.entropy[i, :n], entropy),
            (scored.states[i, : n + 1], states),
        ):
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert not scored.logp[i, n:].any() and scored.mask[i].tolist() == [1] * n + [0] * (len(scored.mask[i]) - n)


@pytest.mark.parametrize("chunk", [None, 7], ids=["at once", "in chunks"])
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_gradients_are_those_of_plain_forwards(name, way, chunk, monkeypatch, only):
    model, (prompts, responses) = build(name), batch()
    only(way)
    factors = torch.randn(len(prompts), 8, generator=torch.Generator().manual_seed(1))
    loss = 0.0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logp, entropy, states = plain(model, prompt, response)
        n = len(response)
        loss = loss + (factors[i, :n] * logp).sum() + 0.3 * entropy.sum() + (factors[i, : n + 1, None] * states).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    if chunk is not None:
        monkeypatch.setattr(llm_env.lm.scoring, "CHUNK_BYTES", chunk * 4 * V)
        monkeypatch.setattr(llm_env.lm.shared_prompt, "SCORES_BYTES", 4 * 3 * 4 * 2 * 6 * 15)  # of two of the four responses
    scored = score(model, prompts, responses, V, entropy=True, states=True, prefix_sharing=True)
    width = scored.logp.shape[1]
    inside = torch.cat([scored.mask.new_ones(len(prompts), 1), scored.mask], 1)[..., None]
    got = (factors[:, :width] * scored.logp).sum() + 0.3 * scored.entropy.sum()
    got = got + (factors[:, : width + 1, None] * scored.states * inside).sum()
    scale = max(gradient.norm() for gradient in expected)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * scale


def test_prompts_that_follow_each_other_make_a_group():
    assert groups_of([[1] * 9] * 4, [[1]] * 4) == ([[1] * 9], [[[1]] * 4])
    prompts, members = groups_of([[1] * 9, [2], [1] * 9], [[1], [2], [3]])  # what does not follow is not the same group
    assert prompts == [[1] * 9, [2], [1] * 9] and members == [[[1]], [[2]], [[3]]]


def test_prompts_are_shared_where_that_is_less_work():
    """Work by hand: 12 a position and 2/32 a pair of positions, for hidden states of 32."""
    base = build("llama").base_model
    long_prompt, long_answers = BatchShape(8, 2, 4, 50, 3), BatchShape(8, 2, 4, 3, 50)
    assert (long_prompt.positions(True), long_prompt.positions(False)) == (2 * (50 + 12), 8 * 53)
    assert long_prompt.flops("split", 32) == 12 * 124 + (2 * (50**2 + 4 * 3 * 53)) / 16
    assert long_prompt.flops("dense", 32) == 12 * 124 + (2 * 62**2) / 16
    assert long_prompt.flops(None, 32) == 12 * 424 + 8 * 53**2 / 16
    assert sharing_mode(base, long_prompt) == "split"
    assert sharing_mode(base, long_prompt, False) is None
    assert sharing_mode(base, long_answers) is None  # 406 positions in the place of 424
    assert sharing_mode(base, long_answers, True) == "split"
    assert sharing_mode(base, BatchShape(3, 3, 1, 50, 3), True) is None  # nothing to share
    windows = build("a sliding window").base_model
    assert sharing_mode(windows, long_prompt) == "dense"
    assert sharing_mode(windows, BatchShape(8, 2, 4, 20, 40)) is None  # 360 positions for 480, but 64,800 pairs for 28,800


def test_responses_of_one_token():
    """Of which nothing is fed but the prompts."""
    model, prompts, responses = build("llama"), [[1, 2, 3]] * 3 + [[4] * 5] * 2, [[1], [2], [3], [4], [5]]
    scored = score(model, prompts, responses, V, prefix_sharing=True)
    for logp, prompt, response in zip(scored.logp, prompts, responses, strict=True):
        torch.testing.assert_close(logp, plain(model, prompt, response)[0], atol=1e-4, rtol=1e-4)


def test_states_without_the_last_token():
    model, (prompts, responses) = build("llama"), batch()
    whole = response_states(model.base_model, prompts, responses)
    torch.testing.assert_close(
        response_states(model.base_model, prompts, responses, with_last=False)[0, : len(responses[0])],
        whole[0, : len(responses[0])],
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "capped logits"])
def test_a_head_that_does_more_than_multiply_is_noticed(name):
    """Cohere scales its logits, Gemma 2 caps them."""
    assert (head_of(build(name)) is None) == (name in WHOLE)
    if name in WHOLE:
        with pytest.raises(ValueError, match="computed as a whole"):
            score(build(name), *batch(), V, prefix_sharing=True)


def test_memory_does_not_grow_with_the_vocabulary_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(llm_env.lm.scoring, "CHUNK_BYTES", 2**24)
    prompts, responses = [[1] * 4] * 16, [[2] * 64] * 16  # 1024 tokens

    def peak(vocabulary):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **SIZES))
        score(model, prompts[:1], responses[:1], vocabulary)  # the trials
        found = peak_bytes(
            lambda: score(model, prompts, responses, vocabulary, entropy=True).logp.sum().backward(), model.device
        )
        return found - sum(p.nbytes for p in model.parameters())  # the gradients

    small, large = peak(1_000), peak(128_000)
    assert large - small < 8 * 2**24 < 1024 * 128_000 * 4 / 3  # some copies of a chunk, not one of all logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_flex_attention_sees_what_plain_rows_see(name, monkeypatch):
    """Forward and not compiled, which is what a CPU can show of it."""
    monkeypatch.setattr(llm_env.lm.shared_prompt, "flex", lambda: flex_attention)
    model, (prompts, responses) = build(name), batch()
    with torch.no_grad():
        got = group_states(model.base_model, *groups_of(prompts, responses), "flex")
        for states, prompt, response in zip(got, prompts, responses, strict=True):
            torch.testing.assert_close(states[: len(response) + 1], plain(model, prompt, response)[2], atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_on_a_gpu(name):
    """The training path with its gradients, and decoding by CUDA graphs, against plain forwards on the CPU."""
    model, (prompts, responses) = build(name), batch()
    expected = score(model, prompts, responses, V, prefix_sharing=False).logp
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    model = model.cuda()
    assert sharing_mode(model.base_model, BatchShape.of(*groups_of(prompts, responses)), True) == "split"
    got = score(model, prompts, responses, V, prefix_sharing=True).logp
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)
    for a, b in zip(torch.autograd.grad(got.sum(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-2, rtol=1e-2)
    sampler = Sampler(generator=torch.Generator("cuda").manual_seed(0))
    drawn, logps = sample_responses(model, PROMPTS, sampler, vocab_size=V, eos_id=3, max_new_tokens=70, group_size=4)
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    again = score(model.cpu(), repeated, drawn, V, prefix_sharing=False)
    for row, logp in zip(again.logp, logps, strict=True):
        np.testing.assert_allclose(row[: len(logp)].detach(), logp, atol=1e-3)
