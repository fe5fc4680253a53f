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
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import agents.decoding
import agents.generation
import llm_env.scoring
import llm_env.sharing
from agents.audit.memory import LiveBytes
from agents.generation import Sampler, sample_responses
from llm_env.scoring import head_of, response_states, score
from llm_env.shared_prompt import shares_prompts
from llm_env.sharing import Extent, groups_of, way_to_share
from tests.conftest import FAMILIES, make_model

V = 60
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128)
OTHERS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(vocab_size=64, num_key_value_heads=2, head_dim=8, **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(vocab_size=64, num_key_value_heads=1, head_dim=8, **SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(vocab_size=64, logit_scale=0.3, eos_token_id=1, **SIZES)),
}
WINDOWS = {
    "a sliding window": lambda: MistralForCausalLM(
        MistralConfig(vocab_size=64, sliding_window=6, num_key_value_heads=2, **SIZES)
    ),
    "windows in some layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=64, use_sliding_window=True, sliding_window=6, max_window_layers=1, num_key_value_heads=2, **SIZES
        )
    ),
    "capped logits": lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=64, head_dim=8, sliding_window=6, **SIZES)),
}
UNABLE = {
    "attention of its own": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    "a state space": lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2)),
}
WAYS = [
    *((name, way) for name in (*FAMILIES, *OTHERS) for way in ("split", "dense")),
    *((name, "dense") for name in WINDOWS if name != "capped logits"),  # its head stands not alone
]
PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8] * 9]
GROUPS = [4, 3, 4]


def build(name):
    torch.manual_seed(0)
    model = make_model(name, 64) if name in FAMILIES else {**OTHERS, **WINDOWS, **UNABLE}[name]()
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


@pytest.fixture
def only(monkeypatch):
    """Leaves one way of sharing prompts."""
    original = llm_env.sharing.shares_prompts

    def leave(chosen):
        monkeypatch.setattr(llm_env.sharing, "shares_prompts", lambda base, n, way: way == chosen and original(base, n, way))

    return leave


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *WINDOWS, *UNABLE])
def test_which_models_can_share_prompts(name):
    base = build(name).base_model
    expected = () if name in UNABLE else ("dense",) if name in WINDOWS else ("split", "dense")
    assert tuple(way for way in ("split", "dense") if shares_prompts(base, 20, way)) == expected
    if name in WINDOWS:  # beyond which nothing lies in six tokens
        assert shares_prompts(base, 6) and not shares_prompts(base, 7)
    if name in UNABLE:
        with pytest.raises(ValueError, match="cannot compute a prompt once"):
            score(build(name), *batch(), V, prefix_sharing=True)


@pytest.mark.parametrize(("name", "way"), [*WAYS, *((name, None) for name in (*WINDOWS, *UNABLE))])
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
        monkeypatch.setattr(llm_env.scoring, "CHUNK_BYTES", chunk * 4 * V)
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
    long_prompt, long_answers = Extent(8, 2, 4, 50, 3), Extent(8, 2, 4, 3, 50)
    assert (long_prompt.positions(True), long_prompt.positions(False)) == (2 * (50 + 12), 8 * 53)
    assert long_prompt.work("split", 32) == 12 * 124 + (2 * (50**2 + 4 * 3 * 53)) / 16
    assert long_prompt.work("dense", 32) == 12 * 124 + (2 * 62**2) / 16
    assert long_prompt.work(None, 32) == 12 * 424 + 8 * 53**2 / 16
    assert way_to_share(base, long_prompt) == "split"
    assert way_to_share(base, long_prompt, False) is None
    assert way_to_share(base, long_answers) is None  # 406 positions in the place of 424
    assert way_to_share(base, long_answers, True) == "split"
    assert way_to_share(base, Extent(3, 3, 1, 50, 3), True) is None  # nothing to share
    windows = build("a sliding window").base_model
    assert way_to_share(windows, long_prompt) == "dense"
    assert way_to_share(windows, Extent(8, 2, 4, 20, 40)) is None  # 360 positions for 480, but 64,800 pairs for 28,800


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
    assert (head_of(build(name)) is None) == (name in ("cohere", "capped logits"))


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


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *WINDOWS, *UNABLE])
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "a sliding window"])
def test_waiting_prompts_take_the_places_of_responses_that_have_ended(name, monkeypatch):
    """At most six responses are under way; those that begin later have the log-probs of plain forwards all the same."""
    batches = []
    kind = agents.generation.PlainDecoding if name in WINDOWS else agents.decoding.SharedDecoding
    original = kind.__call__

    def spy(self, tokens):
        ages = self.ages[self.rows >= 0] if name not in WINDOWS else torch.zeros(1)
        batches.append((len(tokens), len(ages.unique())))
        return original(self, tokens)

    monkeypatch.setattr(kind, "__call__", spy)
    model, prompts = build(name), [[1, 2, 3], [4] * 7, [5], [6, 7], [8] * 9, [9, 1], [2] * 4]
    responses, logps = sample_responses(
        model,
        prompts,
        Sampler(generator=torch.Generator().manual_seed(1)),
        vocab_size=V,
        eos_id=3,
        max_new_tokens=[70, 9, 1, 70, 20, 70, 70],
        group_size=2,
        completes_stop=lambda ids: ids[-1] in (5, 6),
        max_num_seqs=7,
    )
    assert max(rows for rows, _ in batches) <= 6 and len(responses) == 14
    assert (max(ages for _, ages in batches) > 1) == (name not in WINDOWS)
    assert list(map(len, responses[4:6])) == [1, 1] and max(map(len, responses[2:4])) <= 9
    for i, (response, logp) in enumerate(zip(responses, logps, strict=True)):
        assert not {3, 5, 6} & set(response[:-1])
        assert len(response) == [70, 9, 1, 70, 20, 70, 70][i // 2] or response[-1] in (3, 5, 6)
        with torch.no_grad():
            np.testing.assert_allclose(logp, plain(model, prompts[i // 2], response)[0].numpy(), atol=1e-4)


def test_limits_that_cannot_be_kept_are_refused():
    arguments = dict(vocab_size=V, eos_id=3, group_size=4)
    with pytest.raises(ValueError, match="max_num_seqs=3 has no room for a group of 4"):
        sample_responses(build("llama"), PROMPTS, Sampler(), max_new_tokens=2, max_num_seqs=3, **arguments)
    for wrong in (0, [1, 2], 1.5, [1, 2, 0]):
        with pytest.raises(ValueError, match=r"max_new_tokens=.* one for each of the 3 prompts"):
            sample_responses(build("llama"), PROMPTS, Sampler(), max_new_tokens=wrong, **arguments)


def test_min_p_draws_tokens_that_are_likely_enough():
    """Of 0.5, 0.3, 0.15, 0.05 with min_p=0.3 those of at least 0.15 stay; log-probs are of the whole distribution."""
    logits = torch.tensor([0.5, 0.3, 0.1501, 0.0499]).log().expand(20_000, 4)
    tokens, logp = Sampler(generator=torch.Generator().manual_seed(0), min_p=0.3)(logits)
    share = np.bincount(tokens, minlength=4) / 20_000
    assert share[3] == 0 and np.abs(share[:3] - np.array([0.5, 0.3, 0.1501]) / 0.9501).max() < 0.015
    np.testing.assert_allclose(logp, logits[0][tokens], atol=1e-6)
    with pytest.raises(ValueError, match=r"min_p=1\.5"):
        Sampler(min_p=1.5)


@pytest.mark.parametrize("size", [5, 64, 200])
def test_the_share_of_every_token_is_its_probability(size):
    """By a chi-square test, below, at and above the size of the blocks in which probabilities are summed."""
    logits = torch.randn(size, generator=torch.Generator().manual_seed(1))
    logits[size // 2] = -1e9
    tokens, logp = Sampler(generator=torch.Generator().manual_seed(2))(logits.expand(100_000, size))
    expected = logits.double().softmax(-1).numpy() * 100_000
    counts = np.bincount(tokens, minlength=size)
    assert counts[size // 2] == 0
    drawn = expected > 0
    chi_square = ((counts - expected)[drawn] ** 2 / expected[drawn]).sum()
    assert abs(chi_square - (size - 2)) < 4 * (2 * (size - 2)) ** 0.5
    np.testing.assert_allclose(logp, logits.log_softmax(-1)[tokens], atol=1e-5)


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
