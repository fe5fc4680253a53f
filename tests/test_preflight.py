"""Before the first rollout: whether the longest pass of the update has room, and what does where it has not."""

import random
import re
from contextlib import contextmanager
from itertools import islice, permutations

import numpy as np
import pytest
import torch

import agents.preflight
import llm_env.lm.scoring
from agents import GRPO, PPO, REINFORCE
from agents.memory import peak_bytes
from agents.policy import LanguagePolicy
from agents.preflight import USABLE, LongestPass
from agents.untouched import untouched
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
    optimizer = agent.policy.optimizer
    with untouched(agent, 0):
        yield LongestPass(agent, optimizer)


def room_for(agent, rows, monkeypatch):
    """As many bytes are free as `rows` of the longest episodes need, and a part of what one more needs."""
    with longest_pass(agent) as longest:
        few, more = (peak_bytes(lambda n=n: longest.run(n, NEW), agent.device) for n in (rows, rows + 1))
    assert few < more
    monkeypatch.setattr(agents.preflight, "free_bytes", lambda device: (few + 0.3 * (more - few)) / USABLE)


@pytest.fixture
def limit(monkeypatch):
    """A device, played by the CPU, on which a pass of more than so many positions, prompts computed every time, has no room."""
    original, passes, most = LanguagePolicy.evaluate, [], [10**9]

    def evaluate(self, prompts, responses, *args):
        passes.append(len(prompts) * (max(map(len, prompts)) + max(map(len, responses))))
        if passes[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, prompts, responses, *args)

    monkeypatch.setattr(agents.preflight, "UNTRIED", ())
    monkeypatch.setattr(LanguagePolicy, "evaluate", evaluate)
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


@pytest.mark.parametrize(("kind", "rows"), [(GRPO, 8), (GRPO, 3), (PPO, 5), (REINFORCE, 3)])
def test_on_a_cpu_it_is_reckoned_from_a_few_rows(kind, rows, monkeypatch, tmp_path):
    agent = make_agent(kind)
    room_for(agent, rows, monkeypatch)
    monkeypatch.setattr(agents.preflight, "UNTRIED", ("cpu",))
    run, sizes = LongestPass.run, []
    monkeypatch.setattr(LongestPass, "run", lambda self, n, new: (sizes.append(n), run(self, n, new)))
    message = refusal(agent)
    assert re.search(
        r"16 episodes of 14 tokens, takes [\d.]+ [KM]iB, [\d.]+ KiB for the optimizer's state included; [\d.]+ ", message
    )
    assert max(sizes) <= 2 * GROUP if kind is GRPO else max(sizes) <= 2
    budget = goes_on(agent, message, tmp_path / "agent")
    assert budget < (rows + GROUP) * (LONGEST + NEW)
    monkeypatch.setattr(agents.preflight, "free_bytes", lambda device: 10)
    other = make_agent(kind)
    assert "not even one of 14 tokens fits" in refusal(other)
    monkeypatch.setattr(agents.preflight, "free_bytes", lambda device: None)
    assert other.learn(1)._n_updates > 0


@pytest.mark.parametrize(("kind", "batch_size"), [(GRPO, None), (GRPO, 6), (PPO, None)])
def test_what_is_reckoned_is_what_is_taken(kind, batch_size):
    agent = make_agent(kind, batch_size=batch_size, n_envs=48)
    with longest_pass(agent) as longest:
        assert longest.rows_at_once(None) == (batch_size or 48)
        reckoned = longest.bytes_of(None)
        assert sorted(longest._measured) == ([1, 4, 8] if longest.unit == 4 else [1, 2])
        taken = peak_bytes(lambda: longest.run(batch_size or 48, NEW), agent.device)
    assert 0.97 * taken <= reckoned <= 1.15 * taken


def test_logits_of_more_than_a_chunk_are_not_reckoned_for_every_row(monkeypatch):
    """A vocabulary so large that logits are most of it: they are made for 4 rows at a time, whatever the rows."""
    for module in (llm_env.lm.scoring, agents.preflight):
        monkeypatch.setattr(module, "CHUNK_BYTES", 4 * len(TOKENIZER) * NEW * 4)
    agent = make_agent(PPO, n_envs=48)
    with longest_pass(agent) as longest:
        reckoned = longest.bytes_of(None)
        assert sorted(longest._measured) == [1, 4, 8]
        taken = peak_bytes(lambda: longest.run(48, NEW), agent.device)
    assert 0.97 * taken <= reckoned <= 1.15 * taken


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


@pytest.mark.parametrize("tried", [True, False], ids=["tried", "reckoned"])
@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (GRPO, {"kl_coef": 0.1, "batch_size": 8}),
        (PPO, {"separate_critic": True}),
        (REINFORCE, {"baseline": "value", "mask_truncated": True}),
    ],
)
def test_it_leaves_no_trace(kind, arguments, tried, monkeypatch):
    def env():
        reference = make_model("llama", len(TOKENIZER), seed=1)
        return make_env(TOKENIZER, letters, PROMPTS, max_prompt_tokens=LONGEST, max_new_tokens=NEW, reference=reference)

    if tried:
        monkeypatch.setattr(agents.preflight, "UNTRIED", ())

    class Noisy(kind):
        calls = 0

        def loss(self, *args):
            self.calls += 1
            random.random(), np.random.random(), torch.rand(1), self.np_random.random()
            return super().loss(*args)

    agent, other = (make_agent(Noisy, env(), preflight=wanted, **arguments) for wanted in (True, False))
    for _ in range(2):  # once more with gradients, with the optimizer's state and under another limit
        before = everything(agent)
        agents.preflight.preflight(agent)
        assert everything(agent) == before
        for each in (agent, other):
            each.learn(1)
            each.micro_batch_size = 8
    a, b = (standing(each.learn(100)) for each in (agent, other))
    assert a.pop("preflight") != b.pop("preflight") and a.keys() == b.keys()
    assert [key for key in a if a[key] != b[key]] == []


def test_it_is_done_once_for_the_same_limits_and_not_at_all_if_not_wanted(monkeypatch):
    made, original = [], LongestPass.__init__
    monkeypatch.setattr(LongestPass, "__init__", lambda self, *args: (made.append(1), original(self, *args))[1])
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
    assert len(made) == 3


def test_a_loss_that_made_up_episodes_do_not_serve_is_a_warning():
    class Own(GRPO):
        def loss(self, batch, result, weights):
            assert all("is_success" in info or "reward/letters" in info for info in batch.infos)
            return super().loss(batch, result, weights)

    agent = make_agent(Own, group_size=4)
    with pytest.warns(UserWarning, match=r"preflight could not try the longest pass \(AssertionError"):
        agent.learn(1)
    assert agent._n_updates == 1
