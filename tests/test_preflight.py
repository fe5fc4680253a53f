"""The longest pass is tried before the first rollout, and a pass that runs out of memory names a smaller token budget."""

import random
import re
from contextlib import contextmanager
from itertools import islice, permutations

import numpy as np
import pytest
import torch

import agents.training.preflight
import llm_env.lm.scoring
from agents import GRPO, PPO, REINFORCE
from agents.policy import LanguagePolicy
from agents.training.preflight import WorstCaseStep
from agents.training.preserve import preserve_state
from tests.conftest import make_model, make_tokenizer
from tests.probes import make_env
from tests.test_resume import standing

TOKENIZER = make_tokenizer("abcdefgh")
PROMPTS = (*("".join(letters) for letters in islice(permutations("abcdefgh"), 48)), "cd")
LONGEST, NEW, EPISODES, GROUP = 8, 6, 16, 4
CALLS = []


def letters(completions, **kwargs):
    CALLS.append(len(completions))
    return [c.count("a") + 0.3 * len(c) for c in completions]


def make_agent(kind=GRPO, env=None, **kwargs):
    if env is None:
        env = make_env(TOKENIZER, letters, PROMPTS, max_prompt_tokens=LONGEST, max_new_tokens=NEW)
    group = {"group_size": GROUP} if issubclass(kind, GRPO) else {}
    settings = {"learning_rate": 1e-2, "n_envs": EPISODES, "seed": 0, **group, **kwargs}
    return kind(make_model("llama", len(TOKENIZER)), env, **settings)


def everything(agent):
    """All that training goes on from, and what a trial might leave behind."""
    gradients = [None if p.grad is None else p.grad.clone() for p in agent.policy.parameters()]
    states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    return standing(agent), repr(gradients), states, agent.policy.constraint, agent.policy.optimizer


@contextmanager
def longest_pass(agent):
    trainer = agent.make_trainer()
    with preserve_state(agent.policy, trainer.rng):
        yield WorstCaseStep(trainer, agent.rules, agent.n_envs)


@pytest.fixture
def tried(monkeypatch):
    """Let the CPU stand in for a GPU."""
    monkeypatch.setattr(agents.training.preflight, "DEVICES", ("cpu",))


@pytest.fixture
def limit(tried, monkeypatch):
    """A device, played by the CPU, on which a pass of more than so many positions, prompts computed every time, has no room."""
    original, passes, most = LanguagePolicy.evaluate_actions, [], [10**9]

    def evaluate(self, prompts, responses, *args):
        passes.append(len(prompts) * (max(map(len, prompts)) + max(map(len, responses))))
        if passes[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, prompts, responses, *args)

    monkeypatch.setattr(LanguagePolicy, "evaluate_actions", evaluate)
    monkeypatch.setattr(llm_env.lm.sharing, "SAVES", 0.0)

    def set_limit(positions):
        most[0] = positions
        return passes

    return set_limit


def refusal(agent):
    """The message; nothing was drawn and the agent is what it was."""
    before = everything(agent)
    CALLS.clear()
    with pytest.raises(MemoryError) as caught:
        agent.learn(1)
    assert not CALLS and everything(agent) == before
    return str(caught.value)


def goes_on(agent, message, path):
    """Under the budget that the message names; also from a file that is written in between."""
    budget = int(re.search(r"set max_tokens_per_batch=(\d+)$", message)[1])
    assert budget >= LONGEST + NEW
    agent.save(path)
    again = type(agent).load(path, env=make_env(TOKENIZER, letters, PROMPTS, max_prompt_tokens=LONGEST, max_new_tokens=NEW))
    for other in (agent, again):
        other.max_tokens_per_batch = budget
        other.learn(1)
        assert other._n_updates > 0 and other.num_timesteps > 0
    never_refused = make_agent(type(agent), batch_size=agent.batch_size, max_tokens_per_batch=budget, preflight=False).learn(1)
    assert standing(agent)["digest"] == standing(never_refused)["digest"]
    return budget


@pytest.mark.parametrize("kind", [GRPO, PPO, REINFORCE])
@pytest.mark.parametrize("positions", [14, 60, 150])
def test_a_pass_that_ran_out_of_memory_names_a_budget_that_does_not(kind, positions, limit, tmp_path):
    passes, agent = limit(positions), make_agent(kind, batch_size=12)
    message = refusal(agent)
    assert "the longest pass of the update, 12 episodes of 14 tokens, does not fit into the memory of cpu; set" in message
    assert passes[0] == 12 * 14
    passes.clear()
    budget = goes_on(agent, message, tmp_path / "agent")
    assert 0.7 * positions < budget <= positions
    assert len(passes) > 4 and max(passes) <= positions


def test_not_even_one_episode_fits(limit):
    limit(13)
    assert refusal(make_agent()).endswith(
        "not even one of 14 tokens fits: lower max_new_tokens, shorten the prompts or take a smaller model"
    )


@pytest.mark.parametrize(
    ("kind", "batch_size", "rows", "width"),
    [
        (GRPO, None, 4, LONGEST + GROUP * (NEW - 1)),
        (GRPO, 8, 2, LONGEST + GROUP * (NEW - 1)),
        (REINFORCE, 4, 4, LONGEST + NEW - 1),
    ],
)
def test_the_rows_are_the_longest_and_share_prompts_as_those_of_the_update_do(kind, batch_size, rows, width):
    agent = make_agent(kind, batch_size=batch_size)
    shapes = []
    with longest_pass(agent) as longest:
        longest.run(longest.rows_at_once(None), NEW)
        agent.policy.lm.base_model.register_forward_pre_hook(
            lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
        )
        longest.run(longest.rows_at_once(None), NEW)
    assert shapes == [(rows, width)]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (GRPO, {"kl_coef": 0.1, "batch_size": 8}),
        (PPO, {"separate_critic": True}),
        (REINFORCE, {"baseline": "value", "mask_truncated": True}),
    ],
)
@pytest.mark.usefixtures("tried")
def test_it_leaves_no_trace(kind, arguments):
    def env():
        reference = make_model("llama", len(TOKENIZER), seed=1)
        return make_env(TOKENIZER, letters, PROMPTS, max_prompt_tokens=LONGEST, max_new_tokens=NEW, reference=reference)

    class Noisy(kind):
        def loss(self, *args):
            random.random(), np.random.random(), torch.rand(1), self.np_random.random()
            return super().loss(*args)

    agent, other = (make_agent(Noisy, env(), preflight=wanted, **arguments) for wanted in (True, False))
    for _ in range(2):  # once more with gradients, with the optimizer's state and under another limit
        before = everything(agent)
        agent._preflighted = None
        agent._run_preflight()
        assert everything(agent) == before
        for each in (agent, other):
            each.learn(1)
            each.micro_batch_size = 8
    a, b = (standing(each.learn(100)) for each in (agent, other))
    assert a.pop("preflight") != b.pop("preflight") and a.keys() == b.keys()
    assert [key for key in a if a[key] != b[key]] == []


@pytest.mark.usefixtures("tried")
def test_it_is_done_once_for_the_same_limits_and_not_at_all_if_not_wanted(monkeypatch):
    made, original = [], WorstCaseStep.__init__
    monkeypatch.setattr(WorstCaseStep, "__init__", lambda self, *args: (made.append(1), original(self, *args))[1])
    agent = make_agent()
    for _ in range(2):
        agent.learn(1)
    assert len(made) == 1
    agent.micro_batch_size = 2
    agent.learn(1)
    longer = make_env(TOKENIZER, letters, PROMPTS, max_prompt_tokens=LONGEST, max_new_tokens=NEW + 1)
    agent = make_agent(env=longer)
    agent.learn(1)
    assert len(made) == 3
    make_agent(preflight=False).learn(1)
    monkeypatch.setattr(agents.training.preflight, "DEVICES", ("cuda",))
    make_agent().learn(1)
    assert len(made) == 3


@pytest.mark.usefixtures("tried")
def test_a_loss_that_made_up_episodes_do_not_serve_is_a_warning():
    class Own(GRPO):
        def loss(self, batch, result, weights):
            assert all("is_success" in info or "reward/letters" in info for info in batch.infos)
            return super().loss(batch, result, weights)

    agent = make_agent(Own, group_size=4)
    with pytest.warns(UserWarning, match=r"preflight could not try the longest pass \(AssertionError"):
        agent.learn(1)
    assert agent._n_updates == 1


# --- out of memory in a training step ------------------------------------------------------------------------------------


CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), RuntimeError(CPU_ERROR)]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu"])
@pytest.mark.parametrize("kind", [GRPO, PPO])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_runs_out_of_memory_names_half_the_tokens(kind, error, where, monkeypatch):
    agent, text = make_agent(kind, preflight=False, prefix_sharing=False), str(error)
    before, original, sizes = everything(agent)[0]["digest"], LanguagePolicy.evaluate_actions, []

    def fail(*args):
        error.args = (text,)
        raise error

    def evaluate(self, prompts, responses, *args):
        result = original(self, prompts, responses, *args)
        sizes.append(len(prompts) * (max(map(len, prompts)) + max(map(len, responses))))
        if sizes[-1] > 60 and where == "forward":
            fail()
        if sizes[-1] > 60 and result.logp.requires_grad:
            result.logp.register_hook(fail)
        return result

    monkeypatch.setattr(LanguagePolicy, "evaluate_actions", evaluate)
    with pytest.raises(type(error)) as caught:
        agent.learn(1)
    assert type(caught.value) is type(error) and str(caught.value).endswith(f". {text}")
    budget = sizes[-1] // 2
    assert f"a pass over 16 episodes, {sizes[-1]} tokens with padding, ran out of memory" in str(caught.value)
    assert f"has changed no weights. Set max_tokens_per_batch={budget}. " in str(caught.value) and budget > LONGEST + NEW
    assert everything(agent)[0]["digest"] == before and all(p.grad is None for p in agent.policy.parameters())
    for _ in range(3):
        agent.max_tokens_per_batch = budget
        sizes.clear()
        try:
            agent.learn(1)
        except type(error) as again:
            budget = int(re.search(r"max_tokens_per_batch=(\d+)", str(again))[1])
    assert max(sizes) <= budget <= 60 and agent._n_updates > 0


@pytest.mark.parametrize(
    ("limit_at", "remedy"), [(20, "Set max_tokens_per_batch=14. "), (0, "Lower max_new_tokens, shorten the prompts or set")]
)
def test_no_budget_below_the_longest_episode_is_named(limit_at, remedy, limit, monkeypatch):
    """Two episodes of 14 tokens are a pass, and then one."""
    monkeypatch.setattr(llm_env.lm.sharing, "SAVES", 0.0)
    env = make_env(TOKENIZER, letters, PROMPTS[:1], max_prompt_tokens=LONGEST, max_new_tokens=NEW, min_new_tokens=NEW)
    rows = 2 if limit_at else 1
    agent = make_agent(REINFORCE, env, n_envs=2, preflight=False, micro_batch_size=rows)
    limit(limit_at)
    with pytest.raises(torch.OutOfMemoryError, match=remedy):
        agent.learn(1)


def test_other_errors_of_a_step_stay_as_they_are(monkeypatch):
    agent = make_agent(preflight=False)

    def fail(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(agent, "loss", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        agent.learn(1)
