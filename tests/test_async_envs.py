"""`async_envs=True`: the env is stepped in threads while other rows are sampled, and the episodes stay the same."""

import threading

import numpy as np
import pytest
import torch

from agents import GRPO, PPO
from agents.sampling.generate import sample_responses
from agents.sampling.sampler import Sampler
from llm_env import TextGenerationEnv
from llm_env.threads import Background
from tests.decoders import V, build
from tests.test_slow_envs import LIMITS, TOKENIZER, Sometimes, make, make_model
from tests.test_tools import LETTERS, short
from tests.text_envs import Letters, Scripted


class FakeClock:
    """A decoder and env workers on one clock: a decoding step takes 0.02 s, a step of the env 0.2 s on one of 8 workers."""

    def __init__(self, workers=8, decoding=0.02, stepping=0.2):
        self.now = self.busy = 0.0
        self.free, self.done = [0.0] * workers, {}
        self.decoding, self.stepping = decoding, stepping

    def on_tokens(self, count):
        self.now += self.decoding
        self.busy += self.decoding

    def begin(self, row, turn):
        worker = int(np.argmin(self.free))
        self.done[row] = self.free[worker] = max(self.now, self.free[worker]) + self.stepping

    def ready(self, wait):
        if wait:
            self.now = max(self.now, min(self.done.values()))
        rows = sorted(row for row, at in self.done.items() if at <= self.now)
        for row in rows:
            del self.done[row]
        return rows


def play(model, queue=None, group=4, prompts=16, turns=3, limit=16, **arguments):
    """Sample episodes whose env writes as many tokens as the row's number modulo 5; the turn's last token decides the end."""
    taken = [0] * (prompts * group)

    def on_turns(rows, new, logprobs):
        replies = []
        for row, turn in zip(rows, new, strict=True):
            taken[row] += 1
            over = taken[row] == turns or turn[-1] % 7 == 1
            replies.append(None if over else [(row + taken[row] + i) % V for i in range(row % 5)])
        return replies

    return sample_responses(
        model,
        [[1 + i, 2, 3, *[4] * (i % 3)] for i in range(prompts)],
        Sampler(generator=torch.Generator().manual_seed(0)),
        vocab_size=V,
        eos_id=-1,
        max_new_tokens=limit,
        group_size=group,
        on_turns=on_turns,
        on_tokens=(lambda count: None) if queue is None else queue.on_tokens,
        max_episode_tokens=3 * (limit + 5),
        queue=queue,
        **arguments,
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("arguments", [{}, {"prefix_sharing": False}, {"max_num_seqs": 24}])
def test_the_same_tokens_whenever_the_env_is_ready(name, arguments):
    model = build(name)
    (tokens, logps), *others = (
        play(model, queue, **arguments) for queue in (None, FakeClock(), FakeClock(workers=1, stepping=0.05))
    )
    assert len({len(row) for row in tokens}) > 2
    for other, other_logps in others:
        assert other == tokens
        for a, b in zip(other_logps, logps, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_decoder_is_busy():
    """64 rows and 8 workers at 0.2 s a step. In turns of lockstep, it is busy 17% of the time: 0.32 s of every 1.92."""
    clock = FakeClock()
    play(build("llama"), clock)
    assert clock.busy / clock.now >= 0.6
    slow = FakeClock(workers=1, stepping=1.0)  # the env is the bottleneck then: turns come back one by one, once a second
    play(build("llama"), slow)
    assert slow.busy / slow.now < 0.6


class NeedsOthers(Letters):
    """A step returns when other rows have sampled more tokens: it would wait without end if decoding waited for it."""

    sampled = threading.Semaphore(0)

    def step(self, action):
        assert self.sampled.acquire(timeout=60)
        return super().step(action)


def test_decoding_goes_on_while_the_env_steps(monkeypatch):
    env = TextGenerationEnv.from_text_env(NeedsOthers, TOKENIZER, check_seeds=False, workers=8, async_envs=True, **LIMITS)
    agent = GRPO(make_model("llama", len(TOKENIZER)), env, group_size=4, n_envs=8, seed=0)
    monkeypatch.setattr(agent, "_on_tokens", lambda count: NeedsOthers.sampled.release(8))
    assert len(agent.sample_rollout()) == 8


@pytest.mark.parametrize("kind", [GRPO, PPO])
def test_an_agent_trains_the_same(kind):
    def learned(**arguments):
        env = TextGenerationEnv.from_text_env(Scripted, TOKENIZER, **LIMITS, **arguments)
        settings = {"group_size": 4} if kind is GRPO else {"batch_size": 8}
        torch.manual_seed(0)
        return kind(make_model("llama", len(TOKENIZER)), env, 1e-3, n_envs=16, seed=0, **settings).learn(300)

    agent, *others = learned(), learned(async_envs=True), learned(async_envs=True, workers=4)
    for other in others:
        assert other.num_timesteps == agent.num_timesteps
        for a, b in zip(agent.policy.parameters(), other.policy.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_tools_are_called_in_the_background():
    def rollout(**arguments):
        torch.manual_seed(0)
        model = make_model("llama", len(LETTERS), scale=1.0)
        agent = GRPO(model, short(turn_limit="continue", **arguments), n_envs=32, group_size=4, seed=0)
        return agent._make_collector().collect(list(range(8)))

    expected, found = rollout(), rollout(async_envs=True, tool_workers=2)
    assert found.responses == expected.responses and torch.equal(found.rewards, expected.rewards)
    assert sum(info["tool_calls"] for info in found.infos) > 3


def test_errors_of_the_env_are_the_same():
    def learn(**arguments):
        env = TextGenerationEnv.from_text_env(Sometimes, TOKENIZER, check_seeds=False, async_envs=True, **LIMITS, **arguments)
        agent = GRPO(make_model("llama", len(TOKENIZER)), env, group_size=4, n_envs=32, seed=0)
        return agent.sample_rollout()

    Sometimes.wake.set()  # nothing hangs
    with pytest.raises(RuntimeError, match=r"step\('.*c.*'\) raised KeyError: 'no c' \(row \d+, seed \d+, turns before"):
        learn(workers=4)
    rollout = learn(workers=4, on_error=-1.0)
    failed = ["env_error" in info for info in rollout.infos]
    assert any(failed) and not all(failed)


def test_it_is_for_envs_that_reply():
    with pytest.raises(ValueError, match="async_envs=True is for text envs and tools"):
        TextGenerationEnv(["a"], lambda completions, **kwargs: [0.0], TOKENIZER, async_envs=True)
    assert make(Letters, async_envs=True).rules.async_envs


def test_background_work_is_fetched_once_in_order():
    gates = [threading.Event() for _ in range(3)]
    background = Background(workers=3)
    for number in (2, 0, 1):
        background.begin(number, gates[number].wait)
    background.begin(7, None)
    assert background.ready(block=True) == [7] and background.ready(block=False) == []
    gates[1].set(), gates[0].set()
    found = []
    while len(found) < 2:
        found += background.ready(block=True)
    assert sorted(found) == [0, 1]
    gates[2].set()
    assert background.ready(block=True) == [2] and background.ready(block=True) == []
    background.begin(4, lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        background.ready(block=True)
    background.close()
