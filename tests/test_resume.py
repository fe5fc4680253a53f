"""A training that is stopped, saved and gone on with is, bit for bit, the one that never stopped."""

import functools
import hashlib
import io
import itertools
import os
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import TransformReward
from stable_baselines3.common.callbacks import BaseCallback, CheckpointCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.callbacks import remaining_timesteps
from llm_env.prompts import PromptCursor
from llm_env.reference import AdaptiveKLController
from tests.conftest import make_model, refused
from tests.probes import make_env
from tests.test_agents import AGENTS, TOKENIZER, make_agent, same, weights

PROMPTS = tuple("abcdefg")  # an epoch of them ends in the middle of a rollout of groups
K = 57
PASSES = {"n_envs": 8, "n_epochs": 2, "batch_size": 4}
CASES = {
    "GRPO": ("GRPO", {**PASSES, "kl_coef": 0.05}),
    "PPO": ("PPO", {**PASSES, "target_kl": 0.02, "learning_rate": 5e-3}),
    "REINFORCE": ("REINFORCE", {"n_envs": 8}),
    "REINFORCE with critic": ("REINFORCE with critic", {"n_envs": 8, "batch_size": 4, "family": "gpt2"}),
    "wrapped": ("GRPO", {"n_envs": 4, "group_size": 2, "batch_size": 2}),
}
# The window is longer than a rollout, so that a rollout counted twice would be seen in it.
FALLING = {"stats_window_size": 100, "learning_rate": lambda left: 5e-3 * left, "clip_range": lambda left: 0.3 * left}
TIMES_AND_LIVE = {
    "start_time",
    "_model",
    "_logger",
    "env",
    "policy",
    "_last_obs",
    "_last_episode_starts",
    "_num_timesteps_at_start",
    "_state",
    "_reference_sync",
    "_engine",
    "_preflighted",
    "_on_tokens",
    "_samples",
}

pytestmark = pytest.mark.filterwarnings("ignore:the env is stepped token by token")


def make_case_env(name):
    """Only PPO's env has the adaptive KL; the reference is not the policy, or no KL would be there to be steered by."""
    reference = make_model("llama", len(TOKENIZER), seed=1) if name in ("GRPO", "PPO") else None
    kl = {"kl_coef": AdaptiveKLController(0.2, target=0.5, horizon=50)} if name == "PPO" else {}
    env = make_env(TOKENIZER, prompts=PROMPTS, reference=reference, **kl)
    return TransformReward(env, lambda reward: -reward) if name == "wrapped" else env


def build(name, **changes):
    kind, kwargs = CASES[name]
    return make_agent(kind, env=make_case_env(name), **{**kwargs, **changes})


@functools.cache
def whole_run(name):
    """The run that never stops; look, do not touch."""
    return build(name).learn(2 * K)


def reload(name, path):
    return AGENTS[CASES[name][0]][0].load(path, env=make_case_env(name))


def digest(agent):
    """Of the weights and of the optimizer's state, so that another process can say which it has."""
    moments = [value for state in agent.policy.optimizer.state_dict()["state"].values() for value in state.values()]
    data = b"".join(tensor.detach().numpy().tobytes() for tensor in [*agent.policy.state_dict().values(), *moments])
    return hashlib.sha256(data).hexdigest()


def comparable(value):
    if isinstance(value, deque):  # of episodes; their seconds are left out
        return [value.maxlen, *({k: v for k, v in row.items() if k != "t"} if isinstance(row, dict) else row for row in value)]
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple):
        return tuple(map(comparable, value))
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if isinstance(value, gym.Space):
        return repr(value)  # its own generator is seeded from anything, and asked for nothing
    if isinstance(value, PromptCursor):
        return value.state_dict()
    return value if isinstance(value, (int, float, str, type(None))) else cloudpickle.dumps(value)


def standing(agent):
    """Every attribute of an agent but the clock's and the live objects', and what its env and optimizer would go on from."""
    state = {key: comparable(value) for key, value in vars(agent).items() if key not in TIMES_AND_LIVE}
    groups = agent.policy.optimizer.state_dict()["param_groups"]
    state |= {"digest": digest(agent), "groups": groups, "kl": agent.rules.kl and agent.rules.kl.value}
    for name, part in agent._state.snapshot().items():
        if name not in ("env", "cursor"):
            values = part if isinstance(part, dict) else {"": part}
            state |= {f"{name}.{key}": comparable(value) for key, value in values.items()}
    if hasattr(agent.env, "venv"):
        venv = agent.env.venv.state_dict()
        state["prompts"] = (venv["np_random"], venv["group_cursor"])
    return state


def same_standing(a, b):
    a, b = standing(a), standing(b)
    differing = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    assert not differing, {key: (a.get(key), b.get(key)) for key in differing}


def twice(name, path, **changes):
    """Half of the way, saved."""
    agent = build(name, **changes)
    agent.learn(K)
    assert agent.num_timesteps > K  # or the overshot would not be tested
    agent.save(path)
    return agent


@pytest.mark.parametrize("name", CASES)
def test_twice_k_tokens_are_2k(name, tmp_path):
    whole = whole_run(name)
    first = twice(name, tmp_path / "agent")
    assert [p.name for p in tmp_path.iterdir()] == ["agent.zip"] and first.num_timesteps < whole.num_timesteps
    again = reload(name, tmp_path / "agent")
    same_standing(first, again)
    again.learn(K, reset_num_timesteps=False)
    same_standing(whole, again)
    assert whole._n_updates > first._n_updates > 0
    if name == "PPO":
        assert whole.rules.kl.value != first.rules.kl.value != 0.2


@pytest.mark.parametrize("name", CASES)
def test_an_agent_saved_before_its_first_rollout_learns_as_one_that_was_not(name, tmp_path):
    """The seed that waits for the first reset is in the file."""
    build(name).save(tmp_path / "agent")
    same_standing(whole_run(name), reload(name, tmp_path / "agent").learn(2 * K))


class StopAt(BaseCallback):
    """Asks to stop, or raises, at the first `on_step` from n tokens on: in the middle of a rollout."""

    def __init__(self, n, error=None):
        super().__init__()
        self.n, self.error = n, error

    def _on_step(self):
        if self.num_timesteps >= self.n and self.error is not None:
            raise self.error
        return self.num_timesteps < self.n


@pytest.mark.parametrize(("name", "error"), [("PPO", None), ("PPO", KeyboardInterrupt()), ("wrapped", None)])
def test_a_run_stopped_at_n_goes_on_for_the_rest_with_its_schedules(name, error, tmp_path):
    whole = build(name, **FALLING).learn(2 * K)
    agent = build(name, **FALLING)
    if error is None:
        agent.learn(2 * K, StopAt(K))
    else:
        with pytest.raises(KeyboardInterrupt):
            agent.learn(2 * K, StopAt(K, error))
    n = agent.num_timesteps
    assert 0 < n < K  # the rollout under way does not count
    agent.save(tmp_path / "agent")
    for later in (agent, reload(name, tmp_path / "agent")):  # in this process, and from the file
        later.learn(2 * K - n, reset_num_timesteps=False)
        same_standing(whole, later)


def test_every_checkpoint_leads_to_the_same_end(tmp_path):
    """Those that a callback wrote in the middle of rollouts, of an agent without a seed."""
    whole = build("GRPO", seed=None).learn(2 * K, CheckpointCallback(4, str(tmp_path)))
    files = sorted(tmp_path.glob("*_steps.zip"))
    assert len(files) >= 3
    for file in files:
        again = reload("GRPO", file)
        assert again.num_timesteps <= int(file.stem.split("_")[-2])
        same_standing(whole, again.learn(2 * K - again.num_timesteps, reset_num_timesteps=False))


@pytest.mark.parametrize(
    ("done", "asked_before", "asked", "go"),
    [
        (0, 0, 100, 100),
        (110, 100, 100, 90),  # 10 were overshot: on to 200
        (90, 200, 110, 110),  # stopped at 90 of 200: on to 200
        (130, 100, 30, 30),  # all of it was overshot: SB3's rule, on to 160
        (130, 100, 31, 1),
        (110, 100, 0, 0),
    ],
)
def test_remaining_timesteps(done, asked_before, asked, go):
    assert remaining_timesteps(asked, done, asked_before, False) == go
    assert remaining_timesteps(asked, done, asked_before, True) == asked


def scalars(folder):
    """Points by tag. Files of one second are read in the order of their names, which end in a counter: 10 comes before 9."""
    events = EventAccumulator(str(folder)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("time/")]
    return {tag: sorted((event.step, event.value) for event in events.Scalars(tag)) for tag in tags}


def test_tensorboard_goes_on_in_the_same_run(tmp_path):
    build("PPO", tensorboard_log=str(tmp_path / "whole")).learn(2 * K)
    agent = build("PPO", tensorboard_log=str(tmp_path / "parts"))
    agent.learn(2 * K, StopAt(K))
    agent.save(tmp_path / "agent")
    reload("PPO", tmp_path / "agent").learn(2 * K - agent.num_timesteps, reset_num_timesteps=False)
    (whole,), (parts,) = (list((tmp_path / name).iterdir()) for name in ("whole", "parts"))
    assert len(list(parts.iterdir())) == 2  # event files: one each for the two halves
    expected, got = scalars(whole), scalars(parts)
    assert got == expected and {"train/loss", "rollout/kl_coef", "train/learning_rate"} <= got.keys()
    for points in got.values():
        steps = [step for step, _ in points]
        assert len(steps) > 3 and all(a < b for a, b in itertools.pairwise(steps))


# Goes on from each file; then dies while it saves over the first, with part of the weights written.
OTHER_PROCESS = """
import os, sys, torch
from pathlib import Path
from types import SimpleNamespace
from stable_baselines3.common import save_util
from tests import test_resume
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    agent = test_resume.reload(name, folder / name)
    agent.learn(test_resume.K, reset_num_timesteps=False)
    print(name, test_resume.digest(agent), sep="=", flush=True)
def dies(state, file):
    file.write(b"half of the weights")
    file.flush()
    os._exit(9)
save_util.th = SimpleNamespace(save=dies)
agent.save(folder / sys.argv[2])
"""


def test_another_process_goes_on_and_one_killed_in_save_leaves_the_old_file(tmp_path):
    names = ["GRPO", "PPO", "REINFORCE with critic"]
    halves = {name: twice(name, tmp_path / name) for name in names}
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path), *names]
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 9, done.stderr
    expected = [f"{name}={digest(whole_run(name))}" for name in names]
    assert done.stdout.split("\n")[:-1] == expected
    assert (tmp_path / ".GRPO.zip.partial").stat().st_size > 0
    old = reload("GRPO", tmp_path / "GRPO")
    same_standing(old, halves["GRPO"])
    old.save(tmp_path / "GRPO")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{name}.zip" for name in names)


@pytest.fixture(scope="module")
def saved():
    """The bytes of a saved agent."""
    file = io.BytesIO()
    build("REINFORCE").save(file)
    return file.getvalue()


def test_a_file_cut_off_anywhere_is_refused(saved, tmp_path):
    kind, path = AGENTS["REINFORCE"][0], tmp_path / "cut.zip"
    path.write_bytes(saved)
    assert same(weights(kind.load(path)), weights(build("REINFORCE")))
    for length in [0, 1, *np.linspace(2, len(saved) - 1, 24, dtype=int).tolist()]:
        path.write_bytes(saved[:length])
        refused(kind.load, path, error=ValueError, match=r"cut.zip is not a complete checkpoint \(.+Load an earlier one")
    refused(build("REINFORCE").set_parameters, path, error=ValueError, match="is not a complete checkpoint")
    with pytest.raises(FileNotFoundError):
        kind.load(tmp_path / "nothing")


def test_a_byte_that_flipped_in_the_weights_is_noticed(saved, tmp_path):
    start = saved.index(b"policy.pth")
    for place in np.linspace(start + 5000, saved.index(b"policy.optimizer.pth") - 500, 12, dtype=int).tolist():
        flipped = bytearray(saved)
        flipped[place] ^= 0x10
        refused(AGENTS["REINFORCE"][0].load, io.BytesIO(flipped), error=ValueError, match=r"policy.pth is damaged")


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    agent = build("REINFORCE")
    agent.save(tmp_path / "agent")
    before = weights(agent)
    agent.learn(K)

    def full(state, file):
        file.write(b"half of the weights")
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stable_baselines3.common.save_util.th", SimpleNamespace(save=full))
        with pytest.raises(OSError, match="no space left"):
            agent.save(tmp_path / "agent")
        closed_as_if_whole = io.BytesIO()
        with pytest.raises(OSError, match="no space left"):
            agent.save(closed_as_if_whole)
    assert [p.name for p in tmp_path.iterdir()] == ["agent.zip"]
    assert same(weights(reload("REINFORCE", tmp_path / "agent")), before) and not same(before, weights(agent))
    closed_as_if_whole.seek(0)
    refused(AGENTS["REINFORCE"][0].load, closed_as_if_whole, error=ValueError, match="policy.optimizer.pth, policy.pth, system")


def test_a_reference_that_moved_is_in_the_file(tmp_path):
    agent = twice("GRPO", tmp_path / "before")
    agent.rules.reference.model.load_state_dict(agent.policy.lm.state_dict())
    agent._reference_sync.has_moved = True
    agent.save(tmp_path / "agent")
    without_env = AGENTS["GRPO"][0].load(tmp_path / "agent")
    without_env.save(tmp_path / "again")
    agent.learn(K, reset_num_timesteps=False)
    for file in ("agent", "again"):
        again = reload("GRPO", tmp_path / file)
        same_standing(agent, again.learn(K, reset_num_timesteps=False))
    assert digest(reload("GRPO", tmp_path / "before").learn(K, reset_num_timesteps=False)) != digest(agent)
    kind, other = AGENTS["GRPO"][0], make_model("gpt2", len(TOKENIZER))
    for reference, message in (
        (None, "the env has no reference; make it with"),
        (other, "do not fit the env's GPT2LMHeadModel"),
    ):
        env = make_env(TOKENIZER, prompts=PROMPTS, reference=reference)
        refused(kind.load, tmp_path / "agent", env=env, kl_coef=0.0, error=ValueError, match=message)


def test_a_fixed_kl_coefficient_is_the_envs(tmp_path):
    def env(kl_coef):
        return make_env(TOKENIZER, reference=make_model("llama", len(TOKENIZER), seed=1), kl_coef=kl_coef)

    make_agent("PPO", env=env(0.1)).save(tmp_path / "agent")
    assert AGENTS["PPO"][0].load(tmp_path / "agent", env=env(0.3)).rules.kl.value == 0.3
