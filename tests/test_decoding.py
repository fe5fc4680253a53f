"""Sampling with prompts computed once, and how a token is drawn."""

from functools import partial

import numpy as np
import pytest
import torch

import agents.sampling.generate
import agents.sampling.shared_prefix
from agents.sampling.generate import sample_responses
from agents.sampling.sampler import Sampler
from tests.conftest import FAMILIES, make_model
from tests.decoders import OTHERS, PROMPTS, UNABLE, WINDOWS, V, build, plain


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
    """A step computes no prompt whose responses have all ended, and the longest outgrow the first block of room."""
    sizes, model = [], build("llama")
    assert agents.sampling.shared_prefix.decodes_shared(model)  # the trial decodes, too
    original = agents.sampling.shared_prefix.SharedDecoding.__call__

    def spy(self, tokens):
        sizes.append(self.slot_ids.numel())
        return original(self, tokens)

    monkeypatch.setattr(agents.sampling.shared_prefix.SharedDecoding, "__call__", spy)
    monkeypatch.setattr(agents.sampling.shared_prefix, "BLOCK", 16)
    sampler = Sampler(generator=torch.Generator().manual_seed(0))
    responses, _ = sample_responses(
        model,
        PROMPTS * 2,
        sampler,
        vocab_size=V,
        eos_id=3,
        max_new_tokens=70,
        group_size=4,
        completes_stop=lambda ids: ids[-1] % 30 == 0,
    )
    assert len(sizes) + 1 == max(map(len, responses)) > agents.sampling.shared_prefix.BLOCK
    for drawn, size in enumerate(sizes, start=1):
        left = [sum(len(row) > drawn for row in responses[i : i + 4]) for i in range(0, 24, 4)]
        assert sum(left) <= size <= 4 * sum(map(bool, left))
    assert sizes[0] == 24 and sizes[-1] < 12


@pytest.mark.parametrize("size", [60, 2000])
def test_what_a_row_draws_does_not_depend_on_the_rows_beside_it(size):
    """One random number a token for few tokens, two for many: a row alone, and rows that wait, draw the same."""
    model, arguments = make_model("llama", size), {"vocab_size": size, "eos_id": 3, "max_new_tokens": 12}

    def draw(**settings):
        sampler = Sampler(generator=torch.Generator().manual_seed(0))
        return sample_responses(model, PROMPTS, sampler, group_size=4, **arguments, **settings)[0]

    together = draw()
    assert draw(max_num_seqs=4) == together
    numbers = Sampler(generator=torch.Generator().manual_seed(0)).uniforms(12, 12, size, torch.device("cpu"))
    alone = [
        sample_responses(model, [PROMPTS[row // 4]], Sampler(), uniforms=numbers[row : row + 1], **arguments)[0][0]
        for row in range(12)
    ]
    assert alone == together and len(set(map(tuple, together))) > 6


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma", "a sliding window"])
def test_waiting_prompts_take_the_places_of_responses_that_have_ended(name, monkeypatch):
    """At most six responses are under way; those that begin later have the log-probs of plain forwards all the same."""
    batches = []
    kind = agents.sampling.generate.PlainDecoding if name in WINDOWS else agents.sampling.shared_prefix.SharedDecoding
    original = kind.__call__

    def spy(self, tokens):
        ages = self.num_generated[self.slot_ids >= 0] if name not in WINDOWS else torch.zeros(1)
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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
def test_static_shapes_give_the_same_tokens(name, monkeypatch):
    """What CUDA graphs need: every step looks at all the room there is, under a mask."""
    model = build(name)

    def draw(static):
        monkeypatch.setattr(
            agents.sampling.generate, "SharedDecoding", partial(agents.sampling.shared_prefix.SharedDecoding, static=static)
        )
        sampler = Sampler(generator=torch.Generator().manual_seed(0))
        return sample_responses(model, PROMPTS, sampler, vocab_size=V, eos_id=3, max_new_tokens=70, group_size=4)

    (responses, logps), (static_responses, static_logps) = draw(False), draw(True)
    assert static_responses == responses and max(map(len, responses)) > 64
    for a, b in zip(logps, static_logps, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_a_place_is_free_when_all_responses_to_its_prompt_have_ended(monkeypatch):
    """One of eight responses to each prompt goes on and on: there is room for three prompts all the same, not for more."""
    slots, original = [], agents.sampling.shared_prefix.SharedDecoding.__call__

    def spy(self, tokens):
        slots.append(self.slot_ids.numel())
        return original(self, tokens)

    monkeypatch.setattr(agents.sampling.shared_prefix.SharedDecoding, "__call__", spy)
    ends = iter([*[False, *[True] * 7] * 3, *[False] * 10_000])
    arguments = dict(vocab_size=V, eos_id=-1, max_new_tokens=20, group_size=8, completes_stop=lambda ids: next(ends))
    responses, _ = sample_responses(build("llama"), PROMPTS * 3, Sampler(), max_num_seqs=24, **arguments)
    assert max(slots) == 24 and len(responses) == 72
    assert list(map(len, responses[:24])) == [20, *[1] * 7] * 3


def test_logits_that_are_not_finite_are_an_error():
    model = build("llama")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        sample_responses(model, PROMPTS, Sampler(), vocab_size=V, eos_id=3, max_new_tokens=2)


def test_rare_tokens_of_a_large_vocabulary_are_drawn():
    """0.7% of the probability is spread over 131,071 tokens, each rarer than 2**-24, the step of a float32 below 1."""
    logits = torch.full((1, 131_072), 7e-3 / 131_071).log()
    logits[0, 0] = np.log(0.993)
    sampler = Sampler(generator=torch.Generator().manual_seed(0))
    drawn = torch.cat([sampler(logits.expand(32, -1))[0] for _ in range(457)])
    rare = drawn[drawn > 0]
    assert abs(len(rare) - 102.4) < 4 * 102.4**0.5
    assert len(set((rare % 64).tolist())) > 32  # anywhere in a block


def test_limits_that_cannot_be_kept_are_refused():
    arguments = dict(vocab_size=V, eos_id=3, group_size=4)
    with pytest.raises(ValueError, match="max_num_seqs=3 must hold a group of 4"):
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


@pytest.mark.parametrize("size", [5, 1024, 1100])
def test_the_share_of_every_token_is_its_probability(size):
    """By a chi-square test, of probabilities that are summed at once, and in blocks, of which the last is not full."""
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
