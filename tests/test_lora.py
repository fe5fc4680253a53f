"""LoRA: the adapter is trained and nothing else; with it off the policy is the reference; files are adapters."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import EvalCallback

import agents.sampling.generate as generation
import llm_env.lm.scoring as scoring
from agents import GRPO, PPO, LanguagePolicy, TextVecEnv
from agents.sampling.shared_prefix import SharedDecoding
from llm_env.reference import Reference
from tests.conftest import FAMILIES, make_model, refused
from tests.probes import make_env
from tests.test_agents import TOKENIZER, make_agent, same

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
