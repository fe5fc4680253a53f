"""Ctrl-C and errors at any moment of `learn`: going on gives the weights of the run that nobody interrupted."""

import errno
import os
import resource
import signal
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback

from agents import GRPO, PPO, REINFORCE
from agents.checkpoint import defer_interrupt
from tests.conftest import make_model, make_tokenizer
from tests.probes import make_env

TOKENIZER = make_tokenizer("abcdefgh")
PASSES = {"n_epochs": 2, "batch_size": 4}
CASES = {
    "GRPO": (GRPO, {"group_size": 4, **PASSES}),
    "GRPO, one step": (GRPO, {"group_size": 4}),
    "GRPO, moving reference": (GRPO, {"group_size": 4, "kl_coef": 0.1, "reference_every": 2, **PASSES}),
    "PPO": (PPO, PASSES),
    "REINFORCE": (REINFORCE, {"baseline": "running_mean", **PASSES}),
}
TOKENS, ROLLOUT = 300, 16


def letters(completions, **kwargs):
    return [c.count("a") + 0.3 * len(c) for c in completions]


def press():
    """Ctrl-C; the handler runs before the next line."""
    os.kill(os.getpid(), signal.SIGINT)


def make_agent(case, reward=letters):
    kind, arguments = CASES[case]
    reference = {"reference": make_model("llama", len(TOKENIZER), seed=1)} if "kl_coef" in arguments else {}
    env = make_env(TOKENIZER, reward, tuple("abcdefg"), max_new_tokens=6, **reference)
    model = make_model("llama", len(TOKENIZER))
    return kind(model, env, n_envs=ROLLOUT, learning_rate=1e-2, seed=0, preflight=False, **arguments)


def weights(agent):
    return [parameter.detach().clone() for parameter in agent.policy.parameters()]


@cache
def uninterrupted(case):
    agent = make_agent(case).learn(TOKENS)
    assert agent._n_updates >= 3
    return agent


def same(a, b):
    return (
        all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))
        and (a.num_timesteps, a._n_updates) == (b.num_timesteps, b._n_updates)
        and torch.equal(a._generator.get_state(), b._generator.get_state())
    )


def go_on(case, agent, whole, path):
    """In this process, and from a file; both reach what the uninterrupted run reached."""
    agent.save(path)
    loaded = type(agent).load(path, env=make_agent(case).env)
    for resumed in (agent, loaded):
        resumed.learn(whole.num_timesteps - resumed.num_timesteps, reset_num_timesteps=False)
        assert same(resumed, whole)


def calls(number, then, function):
    """The function, which at its call `number` (from 1) does something else first."""
    count = [0]

    def counted(*args, **kwargs):
        count[0] += 1
        if count[0] == number:
            then()
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize("step", [1, 9])
@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_in_an_update_takes_effect_after_it(case, step, tmp_path, capsys):
    whole = uninterrupted(case)
    if step > whole._n_updates:
        step = whole._n_updates
    agent = make_agent(case)
    agent.loss = calls(step, press, agent.loss)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOKENS)
    del agent.loss
    steps = agent._n_updates
    assert steps >= step and "stopping after this update" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    go_on(case, agent, whole, tmp_path / "agent")


@pytest.mark.parametrize("case", ["GRPO", "PPO", "REINFORCE"])
@pytest.mark.parametrize("call", [1, 3])
def test_ctrl_c_in_a_reward_function_undoes_the_rollout(case, call, tmp_path):
    whole = uninterrupted(case)
    agent = make_agent(case, calls(call, press, letters))
    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOKENS)
    assert agent._n_updates < whole._n_updates
    go_on(case, agent, whole, tmp_path / "agent")


@pytest.mark.parametrize("event", ["_on_rollout_start", "_on_step", "_on_rollout_end"])
@pytest.mark.parametrize("case", ["GRPO", "PPO", "REINFORCE"])
def test_ctrl_c_in_a_callback(case, event, tmp_path):
    whole = uninterrupted(case)

    class Pressing(BaseCallback):
        def _on_step(self):
            return True

    agent, callback = make_agent(case), Pressing()
    setattr(callback, event, calls(2, press, getattr(callback, event)))
    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOKENS, callback)
    go_on(case, agent, whole, tmp_path / "agent")


@pytest.mark.parametrize("where", ["dump_logs", "save"])
def test_ctrl_c_beside_a_rollout(where, tmp_path):
    case = "PPO"
    whole, agent = uninterrupted(case), make_agent(case)

    class Saving(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            self.model.save(tmp_path / "within")

    method = getattr(agent, where)
    setattr(agent, where, calls(2, press, method))
    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOKENS, Saving())
    delattr(agent, where)
    go_on(case, agent, whole, tmp_path / "agent")


@pytest.mark.parametrize("case", CASES)
def test_an_error_before_the_first_step_of_an_update_undoes_the_rollout(case, tmp_path):
    whole, agent = uninterrupted(case), make_agent(case)
    loss, rollouts = agent.loss, []

    def fail():
        raise OSError("no disk")

    train = agent.train

    def failing_train(rollout):
        rollouts.append(rollout)
        if len(rollouts) == 2:
            agent.loss = calls(1, fail, loss)
        train(rollout)

    agent.train = failing_train
    with pytest.raises(OSError, match="no disk"):
        agent.learn(TOKENS)
    del agent.loss, agent.train
    assert 0 < agent._n_updates < whole._n_updates
    go_on(case, agent, whole, tmp_path / "agent")


def test_a_second_ctrl_c_goes_through_at_once(capsys):
    done = []
    with pytest.raises(KeyboardInterrupt), defer_interrupt("waiting", "lost"):
        press()
        done.append("first")
        press()
        done.append("second")
    assert done == ["first"] and capsys.readouterr().out == "waiting\nlost\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_called_after_the_block():
    seen, before = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        with defer_interrupt("waiting"):
            press()
            assert seen == []
        assert seen == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_ignored_signal_stays_ignored(capsys):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with defer_interrupt("waiting"):
            press()
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().out == ""


def test_a_full_disk_and_a_folder_that_cannot_be_made_name_the_file(tmp_path, monkeypatch):
    agent = make_agent("PPO")
    agent.save(tmp_path / "agent")
    before = (tmp_path / "agent.zip").read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("agents.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; .*agent\.zip was not written") as caught:
        agent.save(tmp_path / "agent")
    assert caught.value.errno == 28 and caught.value.filename == str(tmp_path / "agent.zip")
    assert (tmp_path / "agent.zip").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"agent\.zip was not written"):
        agent.save(tmp_path / "file" / "agent")


@contextmanager
def file_size_limit(size):
    """Let the operating system refuse to write a file beyond `size` bytes (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_record_that_does_not_fit_the_disk_names_the_file_and_loses_nothing(tmp_path):
    def make(name):
        env = make_env(TOKENIZER, letters, tuple("abcdefg"), max_new_tokens=6, record=tmp_path / name)
        return GRPO(make_model("llama", len(TOKENIZER)), env, group_size=4, n_envs=ROLLOUT, seed=0, learning_rate=1e-2)

    whole, agent = make("whole.jsonl").learn(TOKENS), make("cut.jsonl")
    agent.learn(1)
    done, size = agent.num_timesteps, (tmp_path / "cut.jsonl").stat().st_size
    with file_size_limit(size + 1000), pytest.raises(OSError, match="episodes were not recorded") as caught:
        agent.learn(TOKENS - done, reset_num_timesteps=False)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "cut.jsonl")
    assert agent.num_timesteps == done and (tmp_path / "cut.jsonl").stat().st_size == size
    agent.learn(TOKENS - done, reset_num_timesteps=False)
    assert same(agent, whole)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread ends
def test_logs_that_do_not_fit_the_disk_name_their_folder_and_the_agent_goes_on(tmp_path):
    whole = uninterrupted("GRPO")
    agent = make_agent("GRPO")
    agent.tensorboard_log = str(tmp_path / "runs")
    with file_size_limit(2000), pytest.raises(OSError, match="the logs were not written") as caught:
        agent.learn(TOKENS)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "runs" / "GRPO_1")
    agent.learn(TOKENS - agent.num_timesteps, reset_num_timesteps=False, tb_log_name="next")
    assert same(agent, whole)


def test_a_second_ctrl_c_in_an_update_says_what_is_lost_and_the_agent_goes_on(tmp_path, capsys):
    whole, agent = uninterrupted("PPO"), make_agent("PPO")
    agent.loss = calls(3, lambda: (press(), press()), agent.loss)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(TOKENS)
    del agent.loss
    assert 0 < agent._n_updates < whole._n_updates
    assert "in the middle of an update. The rest of its optimizer steps are lost" in capsys.readouterr().out
    agent.save(tmp_path / "agent")
    for resumed in (agent, PPO.load(tmp_path / "agent", env=make_agent("PPO").env)):
        done = resumed.num_timesteps
        assert resumed.learn(50, reset_num_timesteps=False).num_timesteps > done > 0
