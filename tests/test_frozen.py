"""Parameters with requires_grad=False stay as they are: in training, through files, in a critic; the rest is trained."""

import copy

import pytest
import torch

from agents import GRPO, PPO, LanguagePolicy
from agents.compatibility import default_learning_rate
from llm_env.reference import Reference
from tests.conftest import FAMILIES, make_model, refused
from tests.probes import make_env
from tests.test_agents import TOKENIZER, same

CASES = {
    "GRPO": (GRPO, {"group_size": 4}),
    "PPO": (PPO, {"n_epochs": 2}),
    "PPO with a critic of its own": (PPO, {"separate_critic": True, "n_epochs": 2}),
    "GRPO, layers computed again": (GRPO, {"group_size": 4, "gradient_checkpointing": True}),
}


def model_of(family="llama", frozen=("wte", "wpe", "embed_tokens", "layers.0.", ".h.0.")):
    """A model whose embeddings and first layer are frozen; GPT-2's embeddings are its head as well."""
    model = make_model(family, len(TOKENIZER))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    return model


def agent_of(case, model=None, env=None, **changes):
    kind, settings = CASES[case]
    settings = {"n_envs": 8, "learning_rate": 1e-2, "seed": 0, "preflight": False, **settings, **changes}
    model, env = model_of() if model is None else model, make_env(TOKENIZER) if env is None else env
    return kind(model, env, policy_kwargs={} if isinstance(model, LanguagePolicy) else {"tokenizer": TOKENIZER}, **settings)


def flags(policy):
    return {name: p.requires_grad for name, p in policy.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("given", ["model", "LanguagePolicy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_stays_and_the_rest_moves(family, given):
    model = model_of(family)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    assert {trains for trains, _ in before.values()} == {True, False}
    agent = agent_of("GRPO", model if given == "model" else LanguagePolicy(model, TOKENIZER)).learn(40)
    for name, parameter in agent.policy.lm.named_parameters():
        trains, value = before[name]
        assert parameter.requires_grad == trains and torch.equal(parameter, value) == (not trains), name
    stepped = {id(p) for group in agent.policy.optimizer.param_groups for p in group["params"]}
    assert stepped == {id(p) for p in agent.policy.parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_going_on_from_a_file_is_never_having_stopped(case, tmp_path):
    whole, first = agent_of(case).learn(80), agent_of(case).learn(40)
    first.save(tmp_path / "agent")
    again = CASES[case][0].load(tmp_path / "agent", env=make_env(TOKENIZER))
    assert flags(again.policy) == flags(first.policy) and not all(flags(again.policy).values())
    again.learn(40, reset_num_timesteps=False)
    mine, theirs = again.policy.state_dict(), whole.policy.state_dict()
    assert mine.keys() == theirs.keys() and same(mine.values(), theirs.values())
    start = dict(model_of().named_parameters())
    assert all(torch.equal(p, start[name]) for name, p in again.policy.lm.named_parameters() if not p.requires_grad)


def test_a_critic_has_frozen_weights_in_common_also_after_loading(tmp_path):
    agent = agent_of("PPO with a critic of its own")
    agent.save(tmp_path / "agent")
    for policy in (agent.policy, PPO.load(tmp_path / "agent").policy):
        pairs = zip(policy.critic.named_parameters(), policy.lm.model.named_parameters(), strict=True)
        assert all((a is b) == (not b.requires_grad) for (_, a), (_, b) in pairs)


def test_a_critic_may_be_frozen_otherwise_than_its_policy(tmp_path):
    """Frozen in the policy after the critic was made: then the critic has weights of its own there, which go on."""
    policy = LanguagePolicy(make_model("llama", len(TOKENIZER)), TOKENIZER, value_head=True, separate_critic=True)
    policy.lm.model.embed_tokens.requires_grad_(False)
    policy.critic.norm.requires_grad_(False)
    agent = agent_of("PPO with a critic of its own", policy).learn(40)
    mine, critics = agent.policy.lm.model.embed_tokens.weight, agent.policy.critic.embed_tokens.weight
    assert not torch.equal(mine, critics)
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=make_env(TOKENIZER))
    assert flags(again.policy) == flags(agent.policy)
    assert same(again.policy.state_dict().values(), agent.policy.state_dict().values())
    assert same(
        again.learn(40, reset_num_timesteps=False).policy.state_dict().values(),
        agent.learn(40, reset_num_timesteps=False).policy.state_dict().values(),
    )


def test_sb3s_policy_files_know_it(tmp_path):
    policy = LanguagePolicy(model_of(), TOKENIZER)
    policy.save(tmp_path / "policy")
    assert flags(LanguagePolicy.load(tmp_path / "policy")) == flags(policy)


def test_a_file_says_what_trains_not_the_model_that_is_given_to_load(tmp_path):
    agent = agent_of("GRPO")
    agent.save(tmp_path / "agent")
    other = make_model("llama", len(TOKENIZER), seed=1)
    again = GRPO.load(tmp_path / "agent", policy=other)
    assert flags(again.policy) == flags(agent.policy)
    assert same(again.policy.state_dict().values(), agent.policy.state_dict().values())


def test_a_model_from_a_path_is_trained_whole(tmp_path):
    model_of().save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    assert all(flags(LanguagePolicy(str(tmp_path))).values())


def test_a_copy_as_reference_freezes_nothing_and_is_frozen():
    model = model_of()
    before = [p.requires_grad for p in model.parameters()]
    for copied in (True, False):
        reference = Reference(model, copy_model=copied)
        assert [p.requires_grad for p in model.parameters()] == before
    assert reference.model is model
    assert not any(p.requires_grad for p in Reference(model).model.parameters())


def test_the_default_learning_rate_is_that_of_the_whole_model():
    """3e-4 * (1e6 / n) ** 0.826 for n parameters, however many of them are frozen."""
    model = make_model("llama", 33_000)
    count = sum(p.numel() for p in model.parameters())
    whole, part = copy.deepcopy(model), model
    part.model.embed_tokens.requires_grad_(False)
    rates = [default_learning_rate(LanguagePolicy(each), 1) for each in (whole, part)]
    assert rates == pytest.approx([3e-4 * (1e6 / count) ** 0.826] * 2) and count > 2_000_000


# --- refused -----------------------------------------------------------------------------------------------------------------


def test_a_model_of_which_nothing_trains_is_refused():
    for family in FAMILIES:
        model = make_model(family, len(TOKENIZER)).requires_grad_(False)
        for given in (model, LanguagePolicy(model, TOKENIZER)):
            refused(agent_of, "GRPO", given, match=r"all parameters of the .* call model.requires_grad_\(True\)")
    responses, _ = LanguagePolicy(model, TOKENIZER).sample([[3]], 1, 2)  # to sample it need not train
    assert responses
    agent_of("PPO", model.requires_grad_(True))


@pytest.mark.parametrize("frozen", [True, False])
def test_what_was_changed_after_the_agent_was_made_is_refused(frozen, tmp_path):
    agent = agent_of("GRPO")
    name = "lm_head" if frozen else "model.embed_tokens"
    agent.policy.lm.get_submodule(name).requires_grad_(not frozen)
    message = rf"lm.{name}.weight.requires_grad was set to {not frozen} after the agent was made"
    refused(agent.learn, 8, match=message)
    refused(agent.save, tmp_path / "agent", match=message)
    again = agent_of("GRPO", agent.policy).learn(8)
    assert again.policy.lm.get_submodule(name).weight.requires_grad == (not frozen)
