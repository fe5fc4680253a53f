"""Prompts computed once, in scoring and in sampling: the same numbers as one plain forward pass a response."""

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import agents.decoding
import agents.generation
import llm_env.scoring
from agents.generation import Sampler, sample_responses
from agents.memory import LiveBytes
from llm_env.scoring import groups_of, head_of, response_states, score
from llm_env.shared_prompt import shares_prompts
from tests.conftest import FAMILIES, make_model

V = 60
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
OTHERS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(vocab_size=64, num_key_value_heads=1, head_dim=8, **SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=64, logit_scale=0.3, eos_token_id=1, **SIZES)),
}
UNABLE = {
    "a sliding window": lambda: MistralForCausalLM(
        MistralConfig(vocab_size=64, sliding_window=4, num_key_value_heads=2, **SIZES)
    ),
    "windows in some layers": lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, sliding_window=4, **SIZES)),
    "attention of its own": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "a state space": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
}
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8] * 9]
GROUPS = [4, 3, 4]


def build(name):
    torch.manual_seed(0)
    model = make_model(name, 64) if name in FAMILIES else {**OTHERS, **UNABLE}[name]()
    for parameter in model.parameters():
        parameter.data *= 1 if name in FAMILIES else 2
    return model.eval()


def batch(seed=0):
    rng = np.random.default_rng(seed)
    prompts = [prompt for prompt, count in zip(PROMPTS, GROUPS, strict=True) for _ in range(count)]
    return prompts, [rng.integers(0, V, rng.integers(1, 7)).tolist() for _ in prompts]


def plain(model, prompt, response, temperature=1.0):
    """Log-probs and entropies (n,) and hidden states (n + 1, H), from one forward pass alone."""
    outputs = model(torch.tensor([prompt + response]), use_cache=False, output_hidden_states=True)
    at = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
    logp = (outputs.logits[0, at, :V].float() / temperature).log_softmax(-1)
    states = outputs.hidden_states[-1][0, len(prompt) - 1 :]
    return logp[range(len(response)), response], -(logp.exp() * logp).sum(-1), states


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *UNABLE])
def test_scores_are_those_of_one_plain_forward_a_response(name):
    model, (prompts, responses) = build(name), batch()
    assert shares_prompts(model.base_model) == (name not in UNABLE)
    assert groups_of(prompts, responses) is not None  # it would pay
    scored = score(model, prompts, responses, V, 0.7, entropy=True, states=True)
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
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_gradients_are_those_of_plain_forwards(name, chunk, monkeypatch):
    model, (prompts, responses) = build(name), batch()
    factors = torch.randn(len(prompts), 8, generator=torch.Generator().manual_seed(1))
    loss = 0.0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        logp, entropy, states = plain(model, prompt, response)
        n = len(response)
        loss = loss + (factors[i, :n] * logp).sum() + 0.3 * entropy.sum() + (factors[i, : n + 1, None] * states).sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    if chunk is not None:
        monkeypatch.setattr(llm_env.scoring, "CHUNK_BYTES", chunk * 4 * V)
    scored = score(model, prompts, responses, V, entropy=True, states=True)
    width = scored.logp.shape[1]
    inside = torch.cat([scored.mask.new_ones(len(prompts), 1), scored.mask], 1)[..., None]
    got = (factors[:, :width] * scored.logp).sum() + 0.3 * scored.entropy.sum()
    got = got + (factors[:, : width + 1, None] * scored.states * inside).sum()
    scale = max(gradient.norm() for gradient in expected)
    for a, b in zip(torch.autograd.grad(got, list(model.parameters())), expected, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6 * scale


def test_a_prompt_alone_or_without_a_saving_takes_plain_rows():
    assert groups_of([[1, 2], [3]], [[1], [2]]) is None
    assert groups_of([[1]] * 2 + [[2]] * 1, [[1] * 9] * 3) is None  # four rows of nine for three
    assert groups_of([[1] * 9] * 4, [[1]] * 4) == ([[1] * 9], [[[1]] * 4])
    assert groups_of([[1] * 9, [2], [1] * 9], [[1]] * 3) is None  # what does not follow is not the same group


def test_states_without_the_last_token():
    model, (prompts, responses) = build("llama"), batch()
    whole = response_states(model.base_model, prompts, responses)
    torch.testing.assert_close(
        response_states(model.base_model, prompts, responses, with_last=False)[0, : len(responses[0])],
        whole[0, : len(responses[0])],
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "cohere", "windows in some layers"])
def test_a_head_that_does_more_than_multiply_is_noticed(name):
    """Cohere scales its logits, Gemma 2 caps them."""
    assert (head_of(build(name)) is None) == (name in ("cohere", "windows in some layers"))


def test_memory_does_not_grow_with_the_vocabulary_beyond_a_chunk(monkeypatch):
    monkeypatch.setattr(llm_env.scoring, "CHUNK_BYTES", 2**24)
    prompts, responses = [[1] * 4] * 16, [[2] * 64] * 16  # 1024 tokens

    def peak(vocabulary):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, **SIZES))
        score(model, prompts[:1], responses[:1], vocabulary)  # the trials
        with LiveBytes() as live:
            score(model, prompts, responses, vocabulary, entropy=True).logp.sum().backward()
        return live.peak - sum(p.nbytes for p in model.parameters())  # the gradients

    small, large = peak(1_000), peak(128_000)
    assert large - small < 8 * 2**24 < 1024 * 128_000 * 4 / 3  # some copies of a chunk, not one of all logits


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *UNABLE])
def test_sampled_log_probs_are_those_of_a_plain_forward(name):
    model = build(name)
    responses, logps = sample_responses(
        model,
        PROMPTS,
        Sampler(0.9, generator=torch.Generator().manual_seed(0)),
        vocab_size=V,
        eos_id=3,
        max_new_tokens=70,
        group_size=5,
        completes_stop=lambda ids: ids[-1] in (5, 6),
    )
    lengths = [len(response) for response in responses]
    assert len(set(lengths)) > 4 and len(responses) == 15
    for i, (response, logp) in enumerate(zip(responses, logps, strict=True)):
        with torch.no_grad():
            expected = plain(model, PROMPTS[i // 5], response, 0.9)[0]
        np.testing.assert_allclose(logp, expected.numpy(), atol=1e-4)


def test_rows_that_have_ended_leave_and_room_grows(monkeypatch):
    """The largest batch a step computes shrinks as responses end, and 70 tokens do not fit into the first block."""
    sizes = []
    original = agents.decoding.SharedDecoding.__call__

    def spy(self, tokens):
        sizes.append(self.rows.numel())
        return original(self, tokens)

    monkeypatch.setattr(agents.decoding.SharedDecoding, "__call__", spy)
    sampler = Sampler(generator=torch.Generator().manual_seed(0))
    responses, _ = sample_responses(
        build("llama"), PROMPTS * 2, sampler, vocab_size=V, eos_id=3, max_new_tokens=70, group_size=4
    )
    assert sizes[0] == 24 and sizes[-1] < 12 and max(map(len, responses)) > agents.decoding.BLOCK


def test_drawn_tokens_have_the_probabilities_of_their_logits():
    logits = torch.tensor([0.5, 0.3, 0.2, 0.0]).log().expand(100_000, 4)
    tokens, logp = Sampler(generator=torch.Generator().manual_seed(0))(logits)
    share = np.bincount(tokens, minlength=4) / 100_000
    assert share[3] == 0 and np.abs(share - [0.5, 0.3, 0.2, 0]).max() < 4 * (0.25 / 100_000) ** 0.5
    np.testing.assert_allclose(logp, np.log([0.5, 0.3, 0.2])[tokens], atol=1e-6)


def test_a_random_number_rounded_up_to_the_sum_takes_a_token_that_is_allowed(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.ones(*size))
    tokens, _ = Sampler()(torch.tensor([[0.0, 1.0, -1e9]]))
    assert tokens.tolist() == [1]
