"""Drawing the next rollout while the last one is learned from: what is drawn, by which weights, and what a file has of it."""

import threading
import time
from concurrent.futures import Future

import pytest
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import BaseCallback

from agents import GRPO, PPO, REINFORCE
from agents.engines.base import PolicyEngine
from agents.rollout import Rollout
from tests.conftest import make_model, make_tokenizer, refused
from tests.probes import LETTERS, make_env

TOKENIZER = make_tokenizer(LETTERS)


def make_agent(kind=GRPO, env=None, **kwargs):
    env = make_env(TOKENIZER) if env is None else env
    group = {"group_size": 4} if kind is GRPO else {}
    settings = {"n_envs": 16, "seed": 0, "learning_rate": 1e-2, "overlap": True, **group, **kwargs}
    return kind(make_model("llama", len(TOKENIZER)), env, **settings)


def slowly(completions):
    time.sleep(0.3)
    return [c.count("a") / 4 for c in completions]


def watch(agent, monkeypatch):
    """The rollouts that are learned from, each with the weights before it."""
    seen, original = [], type(agent).train

    def train(self, rollout):
        seen.append((rollout, {name: value.clone() for name, value in self.policy.state_dict().items()}))
        original(self, rollout)

    monkeypatch.setattr(type(agent), "train", train)
    return seen


def log_probs(agent, weights, rollout: Rollout):
    agent.policy.load_state_dict(weights)
    with torch.no_grad():
        return agent.policy.log_probs(rollout.prompts, rollout.responses)


@pytest.mark.parametrize("kind", [GRPO, PPO, REINFORCE])
def test_a_rollout_is_drawn_by_the_weights_before_the_last_update(kind, monkeypatch):
    """The first by those that learn from it; and both clocks of time give the same, for nothing depends on who is faster."""
    agent = make_agent(kind)
    seen = watch(agent, monkeypatch)
    agent.learn(250)
    assert len(seen) > 3
    others = make_agent(kind)
    for i, (rollout, weights) in enumerate(seen):
        drawn_by = seen[max(0, i - 1)][1]
        for row, expected in enumerate(log_probs(others, drawn_by, rollout)):
            assert torch.allclose(rollout.sampled_logp[row, : len(expected)], expected, atol=1e-4)
        if i > 0:
            moved = log_probs(others, weights, rollout)
            assert max((a - rollout.sampled_logp[j, : len(a)]).abs().max() for j, a in enumerate(moved)) > 1e-3
    slow = make_agent(kind, make_env(TOKENIZER, slowly))
    slow.learn(250)
    assert all(torch.equal(a, b) for a, b in zip(slow.policy.parameters(), agent.policy.parameters(), strict=True))


def test_rewards_are_computed_while_the_update_runs(monkeypatch):
    threads, during = set(), []

    def reward(completions):
        threads.add(threading.current_thread().name)
        during.append(updating.is_set())
        return [c.count("a") / 4 for c in completions]

    updating = threading.Event()
    original = GRPO.train

    def train(self, rollout):
        updating.set()
        time.sleep(0.3)
        original(self, rollout)
        updating.clear()

    monkeypatch.setattr(GRPO, "train", train)
    make_agent(env=make_env(TOKENIZER, reward), preflight=False).learn(200)
    assert during[0] is False and all(during[1:]) and len(during) > 2  # the first has nothing to overlap with
    assert len(threads) == 2


def test_the_weights_correct_for_the_step(monkeypatch):
    """By default capped at 2; the log has them, and none where it is off."""
    agent = make_agent(verbose=0)
    agent.learn(150, log_interval=None)
    logged = agent.logger.name_to_value
    assert 0.5 < logged["train/importance"] < 1.5 and agent.importance == 2.0
    assert logged["train/logp_gap"] > 1e-3
    plain = make_agent(overlap=False)
    plain.learn(150, log_interval=None)
    assert plain.importance is None and "train/importance" not in plain.logger.name_to_value
    assert make_agent(importance_cap=3.0).importance == 3.0


def test_it_learns():
    agent = make_agent(n_envs=64, group_size=8, learning_rate=5e-3)
    agent.learn(12_000)
    assert agent.evaluate(make_env(TOKENIZER))["reward"] > 0.9


class Save(BaseCallback):
    def __init__(self, path, at):
        super().__init__()
        self.path, self.at, self.rollouts = path, at, 0

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.rollouts += 1
        if self.rollouts == self.at:
            self.model.save(self.path)


def test_a_file_loses_no_prompt(tmp_path, monkeypatch):
    """What a run that goes on from a file draws next is what the unbroken one drew: the same prompts."""
    env = make_env(TOKENIZER, prompts=tuple(LETTERS))
    agent = make_agent(env=env)
    seen = watch(agent, monkeypatch)
    agent.learn(300, callback=Save(tmp_path / "agent", 3))
    unbroken = [rollout.prompts for rollout, _ in seen]
    seen.clear()
    again = GRPO.load(tmp_path / "agent", env=make_env(TOKENIZER, prompts=tuple(LETTERS)))
    assert again.overlap
    again.learn(300 - again.num_timesteps, reset_num_timesteps=False)
    resumed = [rollout.prompts for rollout, _ in seen]
    assert len(resumed) > 2 and resumed == unbroken[2 : 2 + len(resumed)]


@pytest.mark.parametrize("fails", [OSError, KeyboardInterrupt])
def test_an_error_on_the_way_gives_the_prompts_back(fails, monkeypatch):
    """An error of the reward in the thread, or Ctrl-C in the update: the next call goes on with the prompts that follow."""
    failing = []

    def reward(completions):
        if fails is OSError and failing and threading.current_thread() is not threading.main_thread():
            raise OSError("no judge")
        return [c.count("a") / 4 for c in completions]

    agent = make_agent(env=make_env(TOKENIZER, reward, prompts=tuple(LETTERS)), preflight=False)
    plain = make_agent(env=make_env(TOKENIZER, prompts=tuple(LETTERS)), preflight=False, overlap=False)
    seen = watch(agent, monkeypatch)
    agent.learn(100)
    noted = GRPO.train

    def train(self, rollout):
        if self is agent and failing and fails is KeyboardInterrupt:
            failing.clear()
            raise KeyboardInterrupt
        noted(self, rollout)

    monkeypatch.setattr(GRPO, "train", train)
    failing.append(True)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        agent.learn(200, reset_num_timesteps=False)
    failing.clear()
    agent.learn(100, reset_num_timesteps=False)
    drawn = [prompt for rollout, _ in seen for prompt in rollout.prompts[::4]]
    seen.clear()
    plain.learn(400)
    expected = [prompt for rollout, _ in seen for prompt in rollout.prompts[::4]]
    assert drawn == expected[: len(drawn)]


def test_ctrl_c_while_a_rollout_is_waited_for(monkeypatch):
    """Its thread has ended by the time the call has: it steps no env under the next one, which draws the same again."""
    texts, threads = [], []

    def reward(completions):
        texts.append(completions)
        return [0.0 for _ in completions]

    agent = make_agent(env=make_env(TOKENIZER, reward), preflight=False)
    drawn, waited, pressed = PolicyEngine.generate, Future.result, threading.Event()

    def generate(self, *args, **kwargs):
        if len(texts) == 1:
            threads.append(threading.current_thread())
            assert pressed.wait(60)
            time.sleep(0.3)
        return drawn(self, *args, **kwargs)

    def result(self, timeout=None):
        if not pressed.is_set():
            pressed.set()
            raise KeyboardInterrupt
        return waited(self, timeout)

    monkeypatch.setattr(PolicyEngine, "generate", generate)
    monkeypatch.setattr(Future, "result", result)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(400)
    # Its thread itself is looked at: of others in this process, tests before may have left some that come and go.
    assert threads and threads[0] is not threading.main_thread() and not threads[0].is_alive() and len(texts) == 2
    agent.learn(100, reset_num_timesteps=False)
    assert texts[2] == texts[1]


def test_where_it_cannot_be_it_says_so():
    wrapped = TransformReward(make_env(TOKENIZER), lambda reward: 2 * reward)
    with pytest.warns(UserWarning, match="token by token"):
        agent = make_agent(env=wrapped)
    refused(agent.learn, 10, match="overlap=True generates whole responses")
    refused(make_agent, overlap="yes", match="overlap='yes' must be True or False")
