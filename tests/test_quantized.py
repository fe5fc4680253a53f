"""Quantized bases (QLoRA): they train as they are loaded, with an adapter, and are refused without one."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from agents import GRPO, PPO, LanguagePolicy
from agents.compatibility import default_learning_rate
from agents.policy.quantization import is_quantized
from agents.training.optimizers import check_sharding
from llm_env.reference import Reference
from tests.conftest import make_model, refused
from tests.probes import make_env
from tests.test_agents import TOKENIZER, Ratios, same

pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

PROMPTS, RESPONSES = [[3, 4, 5], [6]], [[7, 8, 0], [9]]
QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double, in bfloat16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "fp4, stored as bfloat16": {"load_in_4bit": True, "bnb_4bit_quant_storage": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}
ALL = pytest.mark.parametrize("kind", QUANTIZATIONS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model on the disk, in bfloat16 as models are."""
    folder = str(tmp_path_factory.mktemp("base"))
    # With AVX512-BF16, bitsandbytes needs 4-bit layers of at least 64 inputs.
    make_model("llama", len(TOKENIZER), scale=2.0, hidden_size=64).bfloat16().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def quantized(path, kind="nf4", dtype=torch.bfloat16):
    config = BitsAndBytesConfig(**QUANTIZATIONS[kind])
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=dtype, device_map={"": "cpu"})


def lora(**settings):
    return peft.LoraConfig(**{"r": 2, "target_modules": "all-linear", **settings})


def agent_of(model, algorithm=GRPO, config=None, env=None, **settings):
    groups = {"group_size": 4} if algorithm is GRPO else {}
    kwargs = {"tokenizer": TOKENIZER, **({} if config is False else {"peft_config": config or lora()})}
    settings = {"n_envs": 8, "learning_rate": 1e-2, "seed": 0, "preflight": False, **groups, **settings}
    env = make_env(TOKENIZER, reference="base") if env is None else env
    return algorithm(model, env, policy_kwargs=kwargs, **settings)


def bits(model):
    """What is quantized, byte by byte: bytes read as bfloat16 may be NaN, which equals nothing."""
    weights = model.state_dict().items()
    return {name: value.clone().reshape(-1).view(torch.uint8) for name, value in weights if "proj" in name}


def logp_of(policy):
    with torch.no_grad():
        return torch.cat(policy.log_probs(PROMPTS, RESPONSES))


@ALL
def test_only_the_adapter_is_trained_and_the_rest_is_float32(kind, path):
    model = quantized(path, kind)
    before, norm = bits(model), model.model.norm.weight.clone()
    agent = agent_of(model, kl_coef=0.1)
    assert agent.policy.adapter.quantized
    agent.learn(64)
    after = bits(agent.policy.adapter.base)
    assert before.keys() == after.keys() and same(before.values(), after.values())
    assert torch.equal(agent.policy.lm.model.norm.weight, norm.float())  # bfloat16 numbers, held in float32
    trained = {name: p for name, p in agent.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert any(p.any() for name, p in trained.items() if "lora_B" in name)  # which begins at zero
    plain = {p.dtype for name, p in agent.policy.named_parameters() if "base_layer" not in name}
    assert plain == {torch.float32}


@ALL
def test_sampler_and_trainer_agree_and_the_ratio_is_one(kind, path, monkeypatch):
    seen = Ratios(monkeypatch)
    agent = agent_of(quantized(path, kind))
    agent.learn(1)
    assert max(gap for _, gap in seen.deviations) < 1e-5
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    responses, sampled = agent.policy.sample(PROMPTS, 4, 8, generator=torch.Generator().manual_seed(0))
    trained = agent.policy.log_probs(prompts, responses)
    assert all(row.dtype == torch.float32 for row in trained)
    exact = "compute" not in str(QUANTIZATIONS[kind])  # bfloat16 has 8 bits
    for a, b in zip(sampled, trained, strict=True):
        np.testing.assert_allclose(a, b.detach(), atol=1e-4 if exact else 2e-2)


@ALL
@pytest.mark.parametrize("sharing", ["auto", True, False])
def test_bf16(kind, sharing, path):
    """Under autocast a quantizer's layers may give float32, of which scores in bfloat16 are made."""
    agent = agent_of(quantized(path, kind), bf16=True, prefix_sharing=sharing).learn(32)
    prompts, responses = [[3, 4, 5], [3, 4, 5], [6], [6]], [[7, 8, 0], [9], [5, 5], [4]]
    mixed = torch.cat(agent.policy.log_probs(prompts, responses))
    agent.policy.bf16, agent.policy.prefix_sharing = False, False
    exact = torch.cat(agent.policy.log_probs(prompts, responses))
    torch.testing.assert_close(mixed, exact, atol=0.05, rtol=0)  # bfloat16 has 8 bits


def test_log_probs_are_those_of_the_dequantized_weights(path):
    """By hand: the same Llama, with the weights that bitsandbytes says the packed ones mean."""
    import bitsandbytes

    model = quantized(path)
    plain = make_model("llama", len(TOKENIZER), hidden_size=64)
    weights = {name: p for name, p in model.named_parameters() if "proj" not in name}
    for name, module in model.named_modules():
        if "proj" in name:
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32  # in which it computes, for float32 comes in
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight, state)
    plain.load_state_dict({name: value.float() for name, value in weights.items()})
    expected = logp_of(LanguagePolicy(plain, TOKENIZER))
    torch.testing.assert_close(logp_of(LanguagePolicy(model, TOKENIZER, peft_config=lora())), expected, atol=1e-4, rtol=0)


@ALL
def test_files_know_how_the_base_was_quantized(kind, path, tmp_path):
    whole = agent_of(quantized(path, kind)).learn(64)
    first = agent_of(quantized(path, kind)).learn(32)
    first.save(tmp_path / "agent")
    for policy in (None, path, quantized(path, kind)):
        again = GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER, reference="base"), policy=policy)
        assert torch.equal(logp_of(again.policy), logp_of(first.policy))
        again.learn(32, reset_num_timesteps=False)
        mine, theirs = again.policy.state_dict(), whole.policy.state_dict()
        assert mine.keys() == theirs.keys() and same(mine.values(), theirs.values())
    unquantized = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    refused(GRPO.load, tmp_path / "agent", policy=unquantized, match="LlamaForCausalLM|bitsandbytes|not those")


def test_what_is_exported_is_the_adapter_alone(path, tmp_path):
    policy = agent_of(quantized(path)).learn(32).policy
    policy.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and not list((tmp_path / "adapter").glob("model*"))
    again = LanguagePolicy(quantized(path), TOKENIZER, peft_config=str(tmp_path / "adapter"))
    assert torch.equal(logp_of(again), logp_of(policy))
    refused(policy.save_pretrained, tmp_path / "merged", merge=True, error=ValueError, match="base is quantized")
    assert not (tmp_path / "merged").exists()
    refused(lambda: dict(policy.weights()), error=ValueError, match="base is quantized")
    env = make_env(TOKENIZER, reference=quantized(path))
    refused(agent_of, quantized(path), env=env, reference_every=1, kl_coef=0.1, match="reference_every=1 .* base is quantized")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_model_prepared_by_peft(kind, path):
    """As tutorials do: prepare_model_for_kbit_training, then get_peft_model; its adapter may be in bfloat16."""
    model = peft.prepare_model_for_kbit_training(quantized(path, kind), use_gradient_checkpointing=False)
    wrapper = peft.get_peft_model(model, lora(task_type="CAUSAL_LM"))
    expected = logp_of(LanguagePolicy(quantized(path, kind), TOKENIZER, peft_config=lora()))
    agent = agent_of(wrapper, config=False)
    assert torch.equal(logp_of(agent.policy), expected)  # the adapter does nothing yet
    before = bits(agent.policy.adapter.base)
    agent.learn(32)
    assert same(before.values(), bits(agent.policy.adapter.base).values())
    wrapper = peft.get_peft_model(quantized(path, kind), lora(task_type="CAUSAL_LM"))
    for name, parameter in wrapper.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    policy = LanguagePolicy(wrapper, TOKENIZER)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_critic_of_its_own_has_the_quantized_weights_in_common(kind, path, tmp_path):
    agent = agent_of(quantized(path, kind), PPO, separate_critic=True).learn(32)
    mine, theirs = agent.policy.lm.model.layers[0].mlp.up_proj, agent.policy.critic.layers[0].mlp.up_proj
    assert mine.base_layer is theirs.base_layer and mine.lora_A is not theirs.lora_A
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=make_env(TOKENIZER, reference="base"))
    assert same(again.policy.state_dict().values(), agent.policy.state_dict().values())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_references(kind, path):
    """The base with the adapter off, a quantized object of its own, and the model without an adapter are one."""
    model = quantized(path, kind)
    agent = agent_of(model)
    agent.learn(32)
    reference = Reference(quantized(path, kind))
    for other in (agent.rules.reference, reference):
        other.check_vocabulary(len(TOKENIZER))
    rows = [np.concatenate(r.log_probs(PROMPTS, RESPONSES)) for r in (agent.rules.reference, reference)]
    np.testing.assert_allclose(*rows, atol=2e-2)  # one computes in float32, the other as it was loaded, in bfloat16


@pytest.mark.parametrize("kind", ["nf4", "fp4, stored as bfloat16"])
def test_the_audit_knows_that_the_adapter_does_nothing_yet(kind, path):
    agent = agent_of(quantized(path, kind), kl_coef=0.1)
    report = agent.audit(n=4, quiet=True)
    assert report["KL to the reference"].result == "passed"
    agent.learn(32)
    assert agent.audit(n=4, quiet=True)["KL to the reference"].result == "note"


def test_weights_are_not_packed_anew_for_the_cpu(path):
    """As bitsandbytes does in evaluation mode on CPUs with AVX512-BF16, where no gradient would come through them."""
    model = quantized(path)
    layers = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = bits(model)
    policy = LanguagePolicy(model, TOKENIZER, peft_config=lora())
    logp_of(policy)
    assert same(
        [layer.weight.data.reshape(-1) for layer in layers], [v for k, v in before.items() if k.endswith("proj.weight")]
    )


@ALL
def test_the_default_learning_rate_is_that_of_the_unquantized_model(kind, path):
    config = lora()
    policies = [LanguagePolicy(model, TOKENIZER, peft_config=config) for model in (path, quantized(path, kind))]
    wide = make_model("llama", 40_000)  # more than a million weights, from where on the rate falls
    for policy in policies:
        policy.adapter.base.model.embed_tokens = wide.model.embed_tokens
    assert default_learning_rate(policies[0], 1) == default_learning_rate(policies[1], 1) < 3e-3


def test_quantized_weights_are_not_sharded():
    refused(check_sharding, True, "adamw_torch", True, error=ValueError, match="the model is quantized.*without sharding")
    check_sharding(False, "adamw_torch", True)


# --- without an adapter ------------------------------------------------------------------------------------------------------


@ALL
def test_without_an_adapter_it_is_refused_at_once(kind, path, tmp_path):
    model = quantized(path, kind)
    before = bits(model)
    for make in (LanguagePolicy, lambda m: agent_of(m, config=False)):
        refused(make, model, error=ValueError, match=r"is quantized.*policy_kwargs=\{'peft_config': peft.LoraConfig")
    assert same(before.values(), bits(model).values()) and {p.dtype for p in model.model.norm.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "quantized")
    TOKENIZER.save_pretrained(tmp_path / "quantized")
    refused(LanguagePolicy, str(tmp_path / "quantized"), error=ValueError, match="is quantized")
    policy = LanguagePolicy(str(tmp_path / "quantized"), peft_config=lora())
    torch.testing.assert_close(
        logp_of(policy), logp_of(LanguagePolicy(model, TOKENIZER, peft_config=lora())), atol=1e-2, rtol=0
    )


class Packed(torch.nn.Module):
    """A layer as GPTQ's and AWQ's are: integers and scales in buffers."""

    def __init__(self, linear):
        super().__init__()
        scales = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (linear.weight / scales).round().to(torch.int32))
        self.register_buffer("scales", scales.detach().half())

    def forward(self, x):
        return x @ (self.qweight.float() * self.scales.float()).T.to(x.dtype)


def by_buffers(model):
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    model.hf_quantizer = object()  # by which transformers says that a model is quantized
    return model


def by_8_bit_floats(model):
    for layer in model.model.layers:
        weight = layer.mlp.up_proj.weight
        weight.requires_grad_(False)
        weight.data = weight.data.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize("quantize", [by_buffers, by_8_bit_floats])
def test_other_quantizers_fall_under_the_same_rule(quantize):
    """By what the model says of itself, or by what its weights are."""
    model = quantize(make_model("llama", len(TOKENIZER)).bfloat16())
    assert is_quantized(model) and not is_quantized(make_model("llama", len(TOKENIZER)).bfloat16())
    if quantize is by_8_bit_floats:  # nothing computes with those here
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x
    before = copy.deepcopy(model.state_dict())
    refused(LanguagePolicy, model, TOKENIZER, error=ValueError, match="the LlamaForCausalLM is quantized")
    policy = LanguagePolicy(model, TOKENIZER, peft_config=lora(target_modules=["q_proj"]))
    state = policy.adapter.base.state_dict()
    for name, value in before.items():
        if "up_proj" in name:
            assert state[name].dtype == value.dtype and torch.equal(state[name].view(torch.uint8), value.view(torch.uint8))
        else:
            assert state[name].dtype == torch.float32 and torch.equal(state[name], value.float())
    assert isinstance(policy.lm, LlamaForCausalLM) and logp_of(policy).isfinite().all()
