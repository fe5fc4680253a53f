"""LoRA: the adapter is trained and nothing else; with it off the policy is the reference; files are adapters."""

import copy
import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import EvalCallback
from transformers import AutoModelForCausalLM

import agents.generation as generation
import llm_env.scoring as scoring
from agents import GRPO, PPO, LanguagePolicy, TextVecEnv
from agents.decoding import SharedDecoding
from llm_env.reference import Reference
from tests.conftest import FAMILIES, make_model, refused
from tests.probes import make_env
from tests.test_agents import AGENTS, TOKENIZER, make_agent, same

peft = pytest.importorskip("peft")

PROMPTS = [[1, 2, 3], [1, 2, 3], [4], [4, 5]]
RESPONSES = [[6, 7], [8], [3, 3, 0], [5]]
CASES = {
    "GRPO": ("GRPO", {"kl_coef": 0.05}),
    "PPO": ("PPO", {"batch_size": 4, "n_epochs": 1}),
    "PPO with a critic of its own": ("PPO", {"separate_critic": True, "n_epochs": 2}),
    "REINFORCE with critic": ("REINFORCE with critic", {}),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:the env is stepped token by token"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft asks for it
]


def lora(**settings):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": "all-linear", **settings})


def model_of(family="llama", **settings):
    return make_model(family, len(TOKENIZER), **settings)


def kl_env(name, reference="base", **settings):
    in_reward = {} if name == "GRPO" else {"kl_coef": 0.05}
    return make_env(TOKENIZER, reference=reference, **in_reward, **settings)


def agent_of(case, env=None, family="llama", model=None, config=None, **changes):
    name, settings = CASES[case]
    env = kl_env(name) if env is None else env
    model = model_of(family) if model is None else model
    settings = {"n_envs": 8, "learning_rate": 1e-2, "preflight": False, **settings, **changes}
    return make_agent(name, env=env, model=model, policy_kwargs={"peft_config": config or lora()}, **settings)


def moved(policy, seed=0):
    """The policy, with an adapter that does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.lm.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def adapted(family="llama", config=None, model=None):
    return moved(LanguagePolicy(model_of(family) if model is None else model, TOKENIZER, peft_config=config or lora()))


def plainly(model, temperature=1.0):
    """Log-probs of RESPONSES, by a forward pass of anything that gives logits for each row alone."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(found)


def logp_of(policy):
    with torch.no_grad():
        return torch.cat(policy.log_probs(PROMPTS, RESPONSES))


# --- the forward pass ----------------------------------------------------------------------------------------------------


def test_the_forward_pass_is_that_of_the_formula():
    """With one linear layer, the last: logits = W h + (alpha / r) B A h."""
    model = model_of()
    weight, body = model.lm_head.weight.detach().clone(), copy.deepcopy(model.model).eval()
    policy = adapted(model=model, config=lora(target_modules=["lm_head"]))
    (a, b) = [parameter.detach() for parameter in policy.lm.parameters() if parameter.requires_grad]
    assert a.shape == (2, 32) and b.shape == (len(TOKENIZER), 2)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        with torch.no_grad():
            states = body(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        for t, token in enumerate(response):
            h = states[len(prompt) - 1 + t]
            logits = weight @ h + 6 / 2 * (b @ (a @ h))
            expected.append((logits[token].exp() / logits.exp().sum()).log())
    torch.testing.assert_close(logp_of(policy), torch.stack(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_shared_as_without_an_adapter(family, monkeypatch):
    calls = {"update": [], "sampling": []}

    def counted(name, function):
        def count(model, *args, **kwargs):
            calls[name].append(model)
            return function(model, *args, **kwargs)

        return count

    monkeypatch.setattr(scoring, "group_states", counted("update", scoring.group_states))
    monkeypatch.setattr(generation, "SharedDecoding", counted("sampling", SharedDecoding))
    agent = agent_of("GRPO", family=family, prefix_sharing=True, n_envs=8)
    moved(agent.policy)
    agent.learn(1)
    policy = agent.policy
    assert calls == {"sampling": [policy.lm], "update": [policy.adapter.base.base_model, policy.lm.base_model]}
    plain = moved(LanguagePolicy(model_of(family), TOKENIZER, peft_config=lora()), seed=1)
    plain.prefix_sharing = False
    shared = moved(LanguagePolicy(model_of(family), TOKENIZER, peft_config=lora()), seed=1)
    shared.load_state_dict(plain.state_dict())
    shared.prefix_sharing = True
    torch.testing.assert_close(logp_of(shared), logp_of(plain), atol=1e-5, rtol=0)
    assert calls["update"][2:] == [shared.lm.base_model]
    torch.testing.assert_close(logp_of(plain), plainly(plain.lm), atol=1e-5, rtol=0)


# --- the base and the reference ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "family"), [*((case, "llama") for case in CASES), ("GRPO", "qwen2"), ("GRPO", "gpt2"), ("PPO", "gpt2")]
)
def test_training_moves_the_adapter_and_no_bit_of_the_base(case, family):
    model = model_of(family)
    before = copy.deepcopy(model).eval()
    agent = agent_of(case, family=family, model=model)
    start = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    agent.learn(2 * 8 * 4)
    base, now = agent.policy.adapter.base, agent.policy.state_dict()
    assert base.state_dict().keys() == before.state_dict().keys()
    assert same(base.state_dict().values(), before.state_dict().values())
    torch.testing.assert_close(plainly(base), plainly(before), atol=0, rtol=0)
    assert agent.policy.lm is model and type(base) is type(model)
    changed = {name.partition(".")[0] for name, value in now.items() if not torch.equal(value, start[name])}
    expected = {"GRPO": {"lm"}, "PPO with a critic of its own": {"lm", "critic", "value_head"}}
    assert changed == expected.get(case, {"lm", "value_head"})
    assert all("lora_" in name or name.startswith("value_head") for name in now)


def test_base_reference_and_critic_are_held_once():
    agent = agent_of("PPO with a critic of its own")
    policy, reference = agent.policy, agent.rules.reference
    frozen = {p.data_ptr() for p in policy.parameters() if not p.requires_grad}
    count = len(list(model_of().parameters()))
    assert len(frozen) == count == sum(not p.requires_grad for p in policy.parameters())
    assert {p.data_ptr() for p in reference.model.parameters()} == frozen
    assert {p.data_ptr() for p in policy.critic.parameters() if not p.requires_grad} < frozen
    of_critic, of_policy = ({id(p) for p in part.parameters() if p.requires_grad} for part in (policy.critic, policy.lm))
    assert of_critic and not of_critic & of_policy
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert trained == of_critic | of_policy | {id(p) for p in policy.value_head.parameters()}


class KLs:
    """Notes (updates so far, the largest difference between log pi and log pi_ref) of every forward pass of the update."""

    def __init__(self, agent):
        self.seen, original = [], agent.loss

        def loss(part, result, weights):
            self.seen.append((agent._n_updates, ((result.logp - part.ref_logp) * part.mask).abs().max().item()))
            return original(part, result, weights)

        agent.loss = loss


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *((family, {}) for family in FAMILIES),
        *((family, {"bf16": True}) for family in FAMILIES),
        ("llama", {"micro_batch_size": 6}),
        ("llama", {"clock": "token"}),
        ("llama", {"dora": True}),
        ("llama", {"prefix_sharing": False}),
        ("gpt2", {"prefix_sharing": True}),
    ],
    ids=str,
)
def test_the_kl_of_the_first_update_is_exactly_0(family, changes):
    changes = {"temperature": 0.8, "n_epochs": 2, **changes}
    env = kl_env("GRPO", prompts=("a", "ab", "b"), max_new_tokens=6)
    if changes.pop("clock", None):
        env = TransformReward(env, lambda reward: 2 * reward)
    agent = agent_of("GRPO", env, family, config=lora(use_dora=changes.pop("dora", False)), n_envs=24, **changes)
    seen = KLs(agent)
    agent.learn(1, log_interval=None)
    first = [gap for updates, gap in seen.seen if updates == 0]
    assert first and max(first) == 0
    assert min(gap for updates, gap in seen.seen if updates == 1) > 1e-4
    assert (
        0 < agent.logger.name_to_value["train/kl_ref"] < (1e-3 if changes.get("bf16") else 1e-6)
    )  # by the sampler's log-probs


@pytest.mark.parametrize(
    ("case", "clock"),
    [("GRPO", "response"), ("PPO", "token"), ("PPO with a critic of its own", "response")],
)
def test_it_is_the_training_with_a_second_model_for_a_reference(case, clock):
    """Bit for bit: KL in the loss or in the reward, whole responses or tokens."""

    def train(reference):
        env = kl_env(CASES[case][0], reference)
        agent = agent_of(case, TransformReward(env, lambda reward: -reward) if clock == "token" else env)
        agent.learn(2 * 8 * 4, log_interval=None)
        return agent

    a, b = train("base"), train(Reference(model_of()))
    assert same(a.policy.state_dict().values(), b.policy.state_dict().values())
    assert a.logger.name_to_value["train/kl_ref"] == b.logger.name_to_value["train/kl_ref"] > 1e-4


def test_an_env_knows_no_base_of_its_own():
    env = kl_env("GRPO")
    env.reset(seed=0)
    refused(env.step, 0, match="no agent with one has been given this env")
    refused(GRPO, model_of(), env, group_size=4, n_envs=8, match="all of this policy's weights are trained")
    agent = agent_of("GRPO", env)
    env.reset(seed=0)
    assert np.isfinite(env.step(0)[-1]["ref_logprob"])
    refused(agent_of, "GRPO", kl_env("GRPO"), reference_every=2, match="cannot move")
    other = agent_of("GRPO", env, family="qwen2", model=model_of("qwen2"))
    assert env.rules.reference.model is other.policy.adapter.base
    agent.learn(1)
    assert env.rules.reference.model is agent.policy.adapter.base  # whoever trains


def test_a_moving_reference_takes_the_merged_weights():
    reference = Reference(model_of(seed=1))
    agent = agent_of("GRPO", kl_env("GRPO", reference), reference_every=1).learn(1)
    torch.testing.assert_close(plainly(reference.model), plainly(agent.policy.lm), atol=1e-5, rtol=0)


# --- files ---------------------------------------------------------------------------------------------------------------


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
    make_agent("GRPO").save(tmp_path / "full")
    refused(GRPO.load, tmp_path / "full", policy=model_of(), match="leave it out")


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
    refused(LanguagePolicy, model, match="has an adapter in it already")
    refused(LanguagePolicy, model, peft_config=lora(), match="has an adapter in it already")
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


# --- the rest of an agent ------------------------------------------------------------------------------------------------


def test_the_seed_decides_the_adapter():
    def start(seed):
        torch.manual_seed(np.random.randint(1000))
        return agent_of("PPO with a critic of its own", seed=seed).policy.state_dict().values()

    assert same(start(0), start(0)) and not same(start(0), start(1))


def test_the_default_rate_is_ten_times_that_of_all_weights():
    full, adapter = PPO(model_of(), make_env(TOKENIZER)), agent_of("PPO", learning_rate=None, n_epochs=4)
    assert adapter.learning_rate == pytest.approx(10 * full.learning_rate)


@pytest.mark.parametrize("case", ["GRPO", "PPO with a critic of its own"])
def test_everything_else_works_as_for_all_weights(case, tmp_path):
    env = kl_env(CASES[case][0])
    agent = agent_of(case, env)
    report = agent.audit(n=8, quiet=True)
    assert report.passed, report
    row = report["KL to the reference"]
    assert row.result == "passed" and "weights are the policy's" in row.detail
    exam = kl_env(CASES[case][0], prompts=("a", "b"))
    callback = EvalCallback(TextVecEnv(make_env(TOKENIZER).vectorize(2)), n_eval_episodes=2, eval_freq=4, verbose=0)
    agent.learn(2 * 8 * 4, callback=callback)
    assert callback.last_mean_reward >= 0 and agent.evaluate(exam)["length"] >= 1
    assert len(agent.generate(["a", "b"])) == 2
    observation, _ = env.reset(seed=0)
    assert 0 <= agent.predict(observation)[0] < len(TOKENIZER)
    report = agent.audit(n=8, quiet=True)
    assert report.passed and "14 of 21 weight tensors differ" in str(report)


def test_it_learns():
    agent = make_agent("GRPO", learning_rate=1e-2, n_envs=64, policy_kwargs={"peft_config": lora(r=4, lora_alpha=8)})
    before = agent.evaluate(make_env(TOKENIZER), deterministic=False)["reward"]
    agent.learn(64 * 4 * 25)
    assert before < 0.5 and agent.evaluate(make_env(TOKENIZER))["reward"] > 0.9
