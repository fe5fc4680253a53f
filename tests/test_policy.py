"""The sampling path, the training path and predict's cache against each other and against plain forward passes."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from agents import LanguagePolicy
from agents.sampling.generate import next_logits, weights_version
from agents.sampling.sampler import Sampler
from tests.conftest import make_model, make_tokenizer

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]


def slow_log_probs(model, prompt, response, temperature=1.0):
    """One unpadded forward pass a token."""
    result = []
    for t, token in enumerate(response):
        logits = model(torch.tensor([[*prompt, *response[:t]]])).logits[0, -1] / temperature
        result.append(logits.log_softmax(-1)[token].item())
    return result


def observations(rows, length=24):
    ids, mask = np.ones((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=np.int8)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def policy(model, tokenizer):
    return LanguagePolicy(model, tokenizer)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_are_those_of_training_and_of_a_plain_forward(policy, temperature):
    responses, logps = policy.sample(PROMPTS, 2, 8, temperature, generator=generator())
    assert len(responses) == 6 and len({len(r) for r in responses}) > 1  # some end early
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    trained = policy.log_probs(prompts, responses, temperature)
    for prompt, response, sampled, row in zip(prompts, responses, logps, trained, strict=True):
        assert response.index(0) == len(response) - 1 if 0 in response else len(response) == 8
        assert sampled.dtype == np.float32 and row.dtype == torch.float32 and len(sampled) == len(row) == len(response)
        np.testing.assert_allclose(sampled, row.detach().numpy(), atol=1e-4)
        np.testing.assert_allclose(sampled, slow_log_probs(policy.lm, prompt, response, temperature), atol=1e-4)


def test_padding_changes_neither_log_probs_nor_gradients(policy):
    responses = [[3, 4, 0], [5, 0], [6]]

    def gradients(rows):
        policy.zero_grad()
        logps = []
        for group in rows:
            part = policy.log_probs([PROMPTS[i] for i in group], [responses[i] for i in group])
            sum(row.sum() for row in part).backward()
            logps += part
        return torch.cat(logps).detach(), [p.grad.clone() for p in policy.parameters()]

    together, gradients_together = gradients([[0, 1, 2]])
    alone, gradients_alone = gradients([[0], [1], [2]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    for a, b in zip(gradients_together, gradients_alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_greedy_sampling_is_the_argmax_of_a_plain_forward(policy):
    responses, _ = policy.sample(PROMPTS, max_new_tokens=6, deterministic=True)
    for prompt, response in zip(PROMPTS, responses, strict=True):
        context = list(prompt)
        for token in response:
            assert token == policy.lm(torch.tensor([context])).logits[0, -1].argmax().item()
            context.append(token)


def test_sampling_follows_the_distribution(tokenizer):
    policy = LanguagePolicy(make_model("llama", len(tokenizer), scale=2.0), tokenizer)
    draws, _ = policy.sample([[3, 4]], 4000, 1, generator=generator())
    expected = policy.lm(torch.tensor([[3, 4]])).logits[0, -1].softmax(-1)
    counts = np.bincount([d[0] for d in draws], minlength=len(tokenizer)) / 4000
    assert np.abs(counts - expected.detach().numpy()).max() < 5 * (0.25 / 4000) ** 0.5


def test_top_k_and_top_p_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(2000, 1)
    for kwargs, allowed in [({"top_k": 2}, {0, 1}), ({"top_p": 0.7}, {0, 1}), ({"top_p": 0.3}, {0}), ({}, {0, 1, 2, 3})]:
        tokens, logp = Sampler(generator=generator(), **kwargs)(logits)
        assert set(tokens.tolist()) == allowed
        torch.testing.assert_close(logp, logits[0, tokens])  # of the whole distribution, as in training


def test_predict_with_its_cache_writes_what_a_full_forward_writes(policy):
    """Rows begin anew at different times, and the state is carried through all of it."""
    contexts, ends, state = [list(p) for p in PROMPTS], [4, 3, 6], None
    for step in range(12):
        tokens, state = policy.predict(observations(contexts), state, deterministic=True)
        for i, context in enumerate(contexts):
            assert tokens[i] == policy.lm(torch.tensor([context])).logits[0, -1].argmax().item(), (step, i)
            context.append(int(tokens[i]))
            if (step + 1) % ends[i] == 0:
                contexts[i] = list(PROMPTS[(i + step) % 3])


def test_the_cache_is_used_and_dies_with_the_weights(policy):
    state = None
    context = [3, 4, 5]
    _, state = next_logits(policy.lm, [context], state)
    lengths = []
    forward = policy.lm.forward
    policy.lm.forward = lambda **kwargs: lengths.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)
    policy.lm.forward.__signature__ = __import__("inspect").signature(forward)
    _, state = next_logits(policy.lm, [[*context, 6]], state)
    before = weights_version(policy.lm)
    torch.optim.AdamW(policy.lm.parameters(), lr=0.1).step()  # no gradients yet: nothing moves
    policy.lm(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
    torch.optim.AdamW(policy.lm.parameters(), lr=0.1).step()
    assert weights_version(policy.lm) > before
    logits, _ = next_logits(policy.lm, [[*context, 6, 7]], state)
    assert lengths == [1, 2, 5]
    policy.lm.forward = forward
    torch.testing.assert_close(logits, policy.lm(torch.tensor([[*context, 6, 7]])).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_an_old_state_is_not_mistaken_for_the_present_one(policy):
    _, first = next_logits(policy.lm, [[3, 4]], None)
    next_logits(policy.lm, [[3, 4, 5]], first)
    again, _ = next_logits(policy.lm, [[3, 4, 6]], first)  # a second branch from the same state
    torch.testing.assert_close(again, policy.lm(torch.tensor([[3, 4, 6]])).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_predict_takes_single_observations(policy):
    single = {key: value[0] for key, value in observations([[3, 4]]).items()}
    action, state = policy.predict(single, deterministic=True)
    assert action.shape == () and state is not None
    with pytest.raises(ValueError, match="row 0 of the observation holds no token"):
        policy.predict(observations([[]]))
    with pytest.raises(ValueError, match="must be a dict with 'input_ids'"):
        policy.predict({"input_ids": np.ones((1, 3))})


def test_ids_beyond_the_tokenizer_are_no_actions(tokenizer):
    model = make_model("llama", len(tokenizer) + 40)
    policy = LanguagePolicy(model, tokenizer)
    responses, logps = policy.sample(PROMPTS, 20, 4, generator=generator())
    assert max(max(r) for r in responses) < len(tokenizer)
    row = model(torch.tensor([PROMPTS[0]])).logits[0, -1, : len(tokenizer)].log_softmax(-1)
    assert logps[0][0] == pytest.approx(row[responses[0][0]].item(), abs=1e-4)


def test_a_small_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"vocabulary has 5 tokens, fewer than the tokenizer's {len(tokenizer)}"):
        LanguagePolicy(make_model("llama", 5), tokenizer)


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="policy is a int"):
        LanguagePolicy(3)


def test_half_precision_weights_become_single_with_a_warning(tokenizer):
    with pytest.warns(UserWarning, match="converted to float32"):
        policy = LanguagePolicy(make_model("llama", len(tokenizer)).bfloat16(), tokenizer)
    assert all(p.dtype == torch.float32 for p in policy.parameters())


def test_dropout_is_off_in_every_mode(tokenizer):
    model = make_model("gpt2", len(tokenizer), attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    policy = LanguagePolicy(model.train(), tokenizer)
    policy.set_training_mode(True)
    first, second = (policy.log_probs([[3]], [[4, 5]])[0] for _ in range(2))
    assert torch.equal(first, second)


def test_save_pretrained_is_plain_transformers(policy, tmp_path):
    policy.add_value_head()
    policy.save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([[3, 4, 5]])
    torch.testing.assert_close(model(ids).logits, policy.lm(ids).logits)
    assert tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_sb3s_policy_save_and_load(policy, tmp_path):
    policy.add_value_head()
    torch.nn.init.normal_(policy.value_head.weight)
    policy.save(tmp_path / "policy")
    loaded = LanguagePolicy.load(tmp_path / "policy")
    for (name, a), (_, b) in zip(policy.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert loaded.tokenizer.get_vocab() == policy.tokenizer.get_vocab()


def test_values_are_read_before_each_token_and_after_the_last(tokenizer):
    policy = LanguagePolicy(make_model("llama", len(tokenizer)), tokenizer, value_head=True)
    assert policy.evaluate_actions([[3]], [[4, 5]]).values.tolist() == [[0.0, 0.0, 0.0]]  # zero at the beginning
    torch.nn.init.normal_(policy.value_head.weight)
    prompts, responses = [[3, 4], [5]], [[6, 7], [8, 9, 10]]
    values = policy.evaluate_actions(prompts, responses).values
    for row, prompt, response in zip(values, prompts, responses, strict=True):
        hidden = policy.lm(torch.tensor([[*prompt, *response]]), output_hidden_states=True).hidden_states[-1][0]
        expected = policy.value_head(hidden)[len(prompt) - 1 :, 0]
        torch.testing.assert_close(row[: len(response) + 1], expected, atol=1e-4, rtol=1e-4)


def test_stop_rules_end_a_response(policy):
    responses, _ = policy.sample(PROMPTS, 3, 8, eos_id=-1, completes_stop=lambda ids: len(ids) == 2, generator=generator())
    assert {len(r) for r in responses} == {2}


def test_bad_sampling_arguments(policy):
    for kwargs, message in [
        ({"temperature": 0.0}, "temperature=0.0 must be positive; for greedy"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            policy.sample([[3]], **kwargs)
    with pytest.raises(ValueError, match="at least one token"):
        policy.sample([[]])
    policy.lm.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no end token is known"):
        LanguagePolicy(policy.lm).sample([[3]])


def test_the_real_stories_model(stories):
    policy = LanguagePolicy(stories)
    prompts = [policy.tokenizer(text)["input_ids"] for text in ("Once upon a time", "The dog")]
    responses, logps = policy.sample(prompts, 2, 24, generator=generator())
    for i, (response, logp) in enumerate(zip(responses, logps, strict=True)):
        np.testing.assert_allclose(logp, slow_log_probs(policy.lm, prompts[i // 2], response), atol=1e-4)


def test_pad_as_end_token_keeps_the_end_token():
    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    policy = LanguagePolicy(make_model("gpt2", len(tokenizer)), tokenizer)
    (row,) = policy.log_probs([[3, 4]], [[5, 0]])
    np.testing.assert_allclose(row.detach(), slow_log_probs(policy.lm, [3, 4], [5, 0]), atol=1e-4)


def test_bfloat16_is_used_for_matrix_products_and_for_nothing_else(model, tokenizer):
    """Log-probs move by what bfloat16 rounds, weights and gradients stay float32, sampling and training agree as before."""
    policy = LanguagePolicy(model, tokenizer, value_head=True)
    responses, _ = policy.sample(PROMPTS, 3, 12, generator=generator())
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    exact = torch.cat(policy.log_probs(prompts, responses))
    policy.bf16 = True
    rounded = policy.evaluate_actions(prompts, responses)
    assert rounded.logp.dtype == rounded.entropy.dtype == rounded.values.dtype == torch.float32
    gaps = (rounded.logp[rounded.mask.bool()] - exact).abs()
    assert 1e-5 < gaps.max() < 0.05
    (rounded.logp.sum() + rounded.values.sum()).backward()
    assert (
        {p.dtype for p in policy.parameters()}
        == {p.grad.dtype for p in policy.parameters() if p.grad is not None}
        == {torch.float32}
    )
    drawn, logps = policy.sample(PROMPTS, 3, 12, generator=generator())
    for logp, again in zip(logps, policy.log_probs(prompts, drawn), strict=True):
        np.testing.assert_allclose(logp, again.detach(), atol=0.05)
