"""Sampling with a copy of the weights in bfloat16, as on a GPU."""

import copy
import gc
import weakref

import pytest
import torch

import agents.policy.language_policy
import llm_env
from agents import GRPO
from agents.policy import LanguagePolicy
from agents.sampling.bf16_copy import bf16_copy
from llm_env.lm.capabilities import original_of
from tests.decoders import build as make_model


@pytest.fixture
def on_this_device(monkeypatch):
    monkeypatch.setattr(agents.policy.language_policy, "BF16_COPY_DEVICES", ("cpu",))


def make_agent(**settings):
    return GRPO(llm_env.PUPIL, "llm_env/Addition-v0", 1e-3, group_size=4, n_envs=16, seed=0, device="cpu", **settings)


def test_the_copy_has_the_rounded_weights_and_follows_them():
    model = make_model("llama")
    copied = bf16_copy(model, 0)
    assert original_of(copied) is model and original_of(copied.base_model) is model.base_model
    for a, b in zip(copied.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.bfloat16 and not a.requires_grad and torch.equal(a, b.to(torch.bfloat16))
    inverse = [name for name, _ in model.named_buffers() if "inv_freq" in name]
    assert inverse and all(dict(copied.named_buffers())[name].dtype == torch.float32 for name in inverse)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert bf16_copy(model, 0) is copied and not torch.equal(next(copied.parameters()).float(), next(model.parameters()))
    bf16_copy(model, 1)
    assert all(torch.equal(a, b.to(torch.bfloat16)) for a, b in zip(copied.parameters(), model.parameters(), strict=True))


def test_tied_weights_stay_tied():
    model = make_model("gpt2")
    copied = bf16_copy(model, 0)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert copied.lm_head.weight is copied.transformer.wte.weight


def test_the_copy_goes_with_the_model():
    model = make_model("llama")
    copied = weakref.ref(bf16_copy(model, 0))
    del model
    gc.collect()
    assert copied() is None


def test_an_agent_samples_with_it(on_this_device):
    """Log-probs of sampling are those of the copy, with the weights after the last update."""
    agent = make_agent(bf16=True).learn(200)
    assert agent.policy.samples_in_bf16 and agent.importance == 2 and make_agent().importance is None
    rollout = agent.sample_rollout()
    exact = copy.deepcopy(agent.policy.lm).to(torch.bfloat16)
    for prompt, response, sampled in zip(rollout.prompts, rollout.responses, rollout.sampled_logp, strict=True):
        with torch.no_grad():
            logits = exact(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(sampled[: len(response)], expected, atol=0.15, rtol=0)
    gaps = [
        (row - score[: len(row)]).abs().mean()
        for row, score in zip(agent.policy.log_probs(rollout.prompts, rollout.responses), rollout.sampled_logp, strict=True)
    ]
    assert 0 < torch.stack(gaps).mean() < 0.05  # rounded, and of the same weights


def test_it_learns_and_resumes_bit_for_bit(on_this_device, tmp_path):
    whole, half = (make_agent(bf16=True, kl_coef=0.0) for _ in range(2))
    whole.learn(2000)
    half.learn(1000).save(tmp_path / "agent")
    again = GRPO.load(tmp_path / "agent", env="llm_env/Addition-v0", device="cpu")
    again.learn(2000 - again.num_timesteps, reset_num_timesteps=False)
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_cannot_be_rounded_are_sampled_as_they_are(on_this_device):
    policy = LanguagePolicy(make_model("llama"))
    assert not policy.samples_in_bf16  # without bf16
    policy.bf16 = True
    assert policy.samples_in_bf16
    policy.lm.is_quantized = True
    assert not policy.samples_in_bf16


def test_on_a_cpu_sampling_uses_autocast():
    assert not make_agent(bf16=True).policy.samples_in_bf16
