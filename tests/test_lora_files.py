"""Adapters in files: the way there and back, for peft and transformers, by path; and what is refused."""

import copy
import json
import sys
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM

from agents import GRPO, LanguagePolicy
from llm_env.reference import Reference
from tests.conftest import FAMILIES, refused
from tests.probes import make_env
from tests.test_agents import AGENTS, TOKENIZER, same

pytest.importorskip("peft")

import peft

from tests.test_lora import (
    CASES,
    PROMPTS,
    RESPONSES,
    adapted,
    agent_of,
    kl_env,
    logp_of,
    lora,
    model_of,
    moved,
    plainly,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it


@pytest.fixture
def base_path(tmp_path):
    """A model on the disk with its tokenizer."""
    path = str(tmp_path / "base")
    model_of().save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


@pytest.mark.parametrize("case", ["GRPO", "PPO with a critic of its own"])
def test_going_on_from_a_file_is_never_having_stopped(case, base_path, tmp_path):
    tokens = 40
    whole = agent_of(case, model=base_path).learn(2 * tokens)
    first = agent_of(case, model=base_path).learn(tokens)
    first.save(tmp_path / "agent")
    again = AGENTS[CASES[case][0]][0].load(tmp_path / "agent", env=kl_env(CASES[case][0]))
    assert again.num_timesteps == first.num_timesteps < whole.num_timesteps
    again.learn(tokens, reset_num_timesteps=False)
    mine, theirs = again.policy.state_dict(), whole.policy.state_dict()
    assert mine.keys() == theirs.keys() and same(mine.values(), theirs.values())
    assert again._n_updates == whole._n_updates
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive, archive.open("policy.pth") as file:
        assert all("lora_" in name or name.startswith("value_head") for name in torch.load(file))  # no weight of the base


def test_a_file_finds_its_base_or_says_what_to_do(base_path, tmp_path):
    agent = agent_of("GRPO", model=base_path).learn(1)
    agent.save(tmp_path / "by_path")
    model = model_of()
    other = agent_of("GRPO", model=model).learn(1)
    other.save(tmp_path / "by_object")
    refused(GRPO.load, tmp_path / "by_object", match=r"which has no path to load it from; give it: load\(path, policy=")
    found = GRPO.load(tmp_path / "by_object", policy=model_of())
    assert torch.equal(logp_of(found.policy), logp_of(other.policy))
    refused(GRPO.load, tmp_path / "by_object", policy=model_of(seed=1), match="not those that the adapter was trained on")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    refused(GRPO.load, tmp_path / "by_path", match="cannot be loaded")
    moved_on = GRPO.load(tmp_path / "by_path", policy=str(tmp_path / "elsewhere"), env=kl_env("GRPO"))
    assert torch.equal(logp_of(moved_on.policy), logp_of(agent.policy))
    model_of(seed=1).save_pretrained(base_path)
    TOKENIZER.save_pretrained(base_path)
    refused(GRPO.load, tmp_path / "by_path", match="not those that the adapter was trained on")
    refused(GRPO.load, tmp_path / "by_object", policy=agent.policy, error=TypeError, match="policy is a LanguagePolicy")


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_the_adapter_and_transformers_what_is_merged(family, tmp_path):
    policy = adapted(family)
    state = {name: value.clone() for name, value in policy.state_dict().items()}
    here, before = plainly(policy.lm), copy.deepcopy(policy.adapter.base)
    assert (here - plainly(before)).abs().max() > 0.1
    policy.save_pretrained(tmp_path / "adapter")
    there = peft.PeftModel.from_pretrained(model_of(family), str(tmp_path / "adapter"))
    assert torch.equal(plainly(there), here)
    assert not list((tmp_path / "adapter").glob("model*"))
    policy.save_pretrained(tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not list((tmp_path / "merged").glob("adapter*"))
    torch.testing.assert_close(plainly(merged), here, atol=1e-5, rtol=0)
    torch.testing.assert_close(logp_of(LanguagePolicy(str(tmp_path / "merged"))), logp_of(policy), atol=1e-5, rtol=0)
    assert torch.equal(plainly(policy.lm), here) and same(policy.state_dict().values(), state.values())
    assert same(policy.adapter.base.state_dict().values(), before.state_dict().values())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]},
        {"target_modules": ["embed_tokens", "down_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    ids=str,
)
def test_kinds_of_lora(settings, tmp_path):
    """That of the base while it is on the disk, on the way there and back, and merged."""
    policy = LanguagePolicy(model_of(), TOKENIZER, peft_config=lora(**settings))
    assert torch.equal(logp_of(policy), torch.cat([torch.as_tensor(row) for row in reference_of(policy)]))
    here = logp_of(moved(policy))
    assert torch.equal(torch.cat([torch.as_tensor(row) for row in reference_of(policy)]), logp_of(LanguagePolicy(model_of())))
    policy.save_pretrained(tmp_path / "adapter")
    again = LanguagePolicy(model_of(), peft_config=str(tmp_path / "adapter"))
    assert torch.equal(logp_of(again), here)
    weights = again.adapter.base.state_dict()  # no copy of what is trained, which starts as what was saved
    assert weights.keys() == model_of().state_dict().keys() and same(weights.values(), model_of().state_dict().values())
    assert {p.data_ptr() for p in again.adapter.base.parameters()} <= {p.data_ptr() for p in again.parameters()}
    policy.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(logp_of(LanguagePolicy(str(tmp_path / "merged"))), here, atol=1e-5, rtol=0)


def reference_of(policy):
    reference = Reference(policy.adapter.base, copy_model=False)
    reference.check_vocabulary(policy.vocab_size)
    return reference.log_probs(PROMPTS, RESPONSES)


def test_a_merge_that_would_change_tied_weights_is_refused(tmp_path):
    policy = adapted("gpt2", lora(target_modules=["wte"]))
    refused(policy.save_pretrained, tmp_path / "merged", merge=True, match="tied")
    refused(LanguagePolicy(model_of()).save_pretrained, tmp_path / "merged", merge=True, match="no adapter")


@pytest.mark.parametrize("given", ["peft_config", "policy", "PeftModel"])
def test_adapters_by_path_are_trained_on(given, base_path, tmp_path):
    first = adapted(model=base_path)
    path, here = str(tmp_path / "adapter"), logp_of(first)
    first.save_pretrained(path)
    env, settings = kl_env("GRPO"), {"group_size": 4, "n_envs": 8, "learning_rate": 1e-2, "kl_coef": 0.1, "seed": 0}
    if given == "peft_config":
        agent = GRPO(base_path, env, policy_kwargs={"peft_config": path}, **settings)
    elif given == "policy":
        agent = GRPO(path, env, **settings)
        assert agent.policy.tokenizer.get_vocab() == TOKENIZER.get_vocab()
    else:
        agent = GRPO(peft.PeftModel.from_pretrained(model_of(), path), env, **settings)
    assert torch.equal(logp_of(agent.policy), here)
    agent.learn(1)
    assert not torch.equal(logp_of(agent.policy), here)
    assert same(agent.policy.adapter.base.state_dict().values(), model_of().state_dict().values())
    assert torch.equal(plainly(agent.rules.reference.model), plainly(model_of()))


def test_without_a_tokenizer_beside_it_an_adapter_has_its_bases(base_path, tmp_path):
    wrapper = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base_path), lora())
    wrapper.save_pretrained(tmp_path / "adapter")
    assert LanguagePolicy(tmp_path / "adapter").tokenizer.get_vocab() == TOKENIZER.get_vocab()


# --- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "peft_config is a dict; give a peft.LoraConfig"),
        (peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PREFIX_TUNING"),
        (peft.AdaLoraConfig(total_step=10, target_modules="all-linear"), "ADALORA"),
        (lora(target_modules=["no_such_layer"]), "no_such_layer"),
        (lora(bias="all"), "bias='all'"),
        (lora(alora_invocation_tokens=[4], target_modules=["q_proj"], task_type="CAUSAL_LM"), "alora_invocation_tokens"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (lora(layer_replication=[[0, 2], [0, 2]]), "layer_replication"),
        ("no/such/adapter", "no adapter can be read from 'no/such/adapter'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_lora_is_refused_and_the_model_is_as_it_was(config, words):
    model = model_of()
    before = copy.deepcopy(model)
    refused(GRPO, model, make_env(TOKENIZER), group_size=4, policy_kwargs={"peft_config": config}, match=words)
    assert same(model.state_dict().values(), before.state_dict().values())
    GRPO(model, make_env(TOKENIZER), group_size=4, policy_kwargs={"peft_config": lora()})


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    adapted().save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    refused(LanguagePolicy, path, match="which has no path to load it from")
    refused(LanguagePolicy, model_of("gpt2"), peft_config=path, match="does not fit the model, a GPT2LMHeadModel")
    adapted(config=lora(target_modules=["q_proj", "v_proj"])).save_pretrained(tmp_path / "other")
    config = tmp_path / "other" / "adapter_config.json"
    for targets, words in ((["q_proj", "v_proj", "k_proj"], "has no weights for 4 places"), (["q_proj"], "has no place for")):
        config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": targets}))
        refused(LanguagePolicy, model_of(), peft_config=str(tmp_path / "other"), match=words)
    config.write_text(json.dumps({**json.loads(config.read_text()), "target_modules": ["q_proj", "v_proj"], "r": 3}))
    refused(LanguagePolicy, model_of(), peft_config=str(tmp_path / "other"), match="size mismatch")
    refused(LanguagePolicy, path, peft_config=lora(), match="has an adapter already")
    model = model_of()
    policy = LanguagePolicy(model, peft_config=lora())
    refused(LanguagePolicy, model, match="has an adapter already")
    refused(LanguagePolicy, model, peft_config=lora(), match="has an adapter already")
    refused(GRPO, policy, policy_kwargs={"peft_config": lora()}, match="give it the peft_config")
    wrapper = peft.get_peft_model(model_of(), lora())
    wrapper.merge_adapter()
    refused(LanguagePolicy, wrapper, match="merged")
    wrapper = peft.get_peft_model(model_of(), lora())
    wrapper.get_base_model().lm_head.requires_grad_(True)
    refused(LanguagePolicy, wrapper, match="1 of the base's parameters would be trained")
    refused(LanguagePolicy, peft.get_peft_model(model_of(), lora(), "mine"), match=r"\['mine'\]")
    refused(policy.load_state_dict, LanguagePolicy(model_of(), peft_config=lora(target_modules=["q_proj"])).state_dict())


def test_without_peft_the_extra_is_named(monkeypatch):
    config = lora()
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(LanguagePolicy, model_of(), peft_config=config, error=ImportError, match=r'pip install "llm-env\[peft\]"')
    LanguagePolicy(model_of())


def test_what_has_no_effect_or_costs_memory_is_told(base_path):
    with pytest.warns(UserWarning, match=r"lora_dropout=0.1 has no effect"):
        policy = LanguagePolicy(model_of(), peft_config=lora(lora_dropout=0.1))
    assert torch.equal(logp_of(moved(policy.train())), logp_of(policy))
    with pytest.warns(UserWarning, match="second copy"):
        agent_of("GRPO", kl_env("GRPO", base_path), model=base_path)
