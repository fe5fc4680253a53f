"""Text envs that are slow or fail: workers, time-outs, replaced errors, and a deadline for the rollout."""

import threading

import numpy as np
import pytest
from stable_baselines3.common.logger import Logger

import llm_env.episodes
from agents import GRPO, PPO
from agents.ppo import bootstraps
from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.tools import calculator
from tests.conftest import make_model, make_tokenizer, refused
from tests.test_tools import short
from tests.test_turn_agents import Kept
from tests.text_envs import Letters, Scripted

TOKENIZER = make_tokenizer("abcdefgh")
EOS = 0
LIMITS = {"max_prompt_tokens": 4, "max_new_tokens": 3, "max_turns": 3, "max_observation_tokens": 4}
LONG = 60  # seconds; no test waits that long


def ids_of(text):
    return TOKENIZER.convert_tokens_to_ids(list(text))


def make(kind, num_envs=4, **kwargs):
    return TextGenerationVectorEnv.from_text_env(num_envs, kind, TOKENIZER, **{**LIMITS, **kwargs})


class Meeting(Letters):
    """A step returns when as many instances as `party` has are in it at the same time."""

    party = threading.Barrier(4)

    def step(self, action):
        self.party.wait(LONG)
        return super().step(action)


def test_workers_step_several_instances_at_a_time():
    """With fewer than 4 workers, the instances would wait for each other without end."""
    venv = make(Meeting, check_seeds=False, workers=4)
    venv.reset(seed=0)
    step = venv.step_responses([[*ids_of("a"), EOS]] * 4)
    assert [rewards.tolist() for rewards in step.rewards] == [[0.0, 0.5]] * 4


@pytest.mark.parametrize("workers", [2, 8])
def test_episodes_do_not_depend_on_the_number_of_workers(workers):
    def play(count):
        venv, rng = make(Scripted, 6, workers=count, max_turns=4), np.random.default_rng(0)
        venv.reset(seed=1)
        told = []
        while not venv.episodes.finished.all():
            turns = [
                [] if venv.episodes.finished[row] else [*rng.choice(ids_of("abc"), rng.integers(0, 3)).tolist(), EOS]
                for row in range(6)
            ]
            step = venv.step_responses(turns)
            told.append(([r.tolist() for r in step.rewards], [o.tolist() for o in step.observations], step.infos))
        return told

    assert str(play(1)) == str(play(workers))


class Sometimes(Letters):
    """Raises on c, hangs on d, and counts its instances and what is closed."""

    made, closed, wake = [], [], threading.Event()

    def __init__(self):
        self.made.append(self)

    def step(self, action):
        if "c" in action:
            raise KeyError("no c")
        if "d" in action:
            self.wake.wait(LONG)
        return super().step(action)

    def close(self):
        self.closed.append(self)


@pytest.fixture
def sometimes():
    Sometimes.made, Sometimes.closed, Sometimes.wake = [], [], threading.Event()
    yield Sometimes
    Sometimes.wake.set()


@pytest.mark.parametrize("workers", [1, 4])
def test_an_error_names_row_seed_and_turns_and_the_call_can_be_repeated(workers, sometimes):
    venv = make(sometimes, workers=workers, first_seed=5)
    venv.reset(options={"index": [0, 1, 2, 3]})
    venv.step_responses([[*ids_of("a"), EOS]] * 4)
    before = venv.episodes.lengths.copy()
    turns = [[*ids_of(letter), EOS] for letter in "bbcb"]
    with pytest.raises(RuntimeError, match=r"raised KeyError: 'no c' \(row 2, seed 7, turns before: \['a'\]\)"):
        venv.step_responses(turns)
    assert (venv.episodes.lengths == before).all()
    with pytest.raises(RuntimeError, match="no c"):
        venv.step_responses(turns)
    step = venv.step_responses([*turns[:2], [*ids_of("b"), EOS], turns[3]])
    assert [rewards[-1] for rewards in step.rewards] == [-0.25] * 4


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("letter, said", [("c", "raised KeyError: 'no c'"), ("d", "takes longer than timeout=0.05 seconds")])
def test_an_episode_may_end_with_the_reward_of_an_error(letter, said, workers, sometimes):
    venv = make(sometimes, workers=workers, timeout=0.05, on_error=-1.0, check_seeds=False)
    venv.reset(seed=0)
    venv.step_responses([[*ids_of("a"), EOS]] * 4)
    failing = venv.episodes._sessions._sessions[1].env
    step = venv.step_responses([[*ids_of(each), EOS] for each in ("b", letter, "b", "h")])
    assert step.terminated.tolist() == [False, True, False, True] and not step.truncated.any()
    assert [rewards[-1] for rewards in step.rewards] == [-0.25, -1.0, -0.25, 0.0]
    info = step.infos[1]
    assert said in info["env_error"] and info["reward/env"] == -0.5 and info["is_success"] is False
    assert "env_error" not in step.infos[3]
    assert (failing in sometimes.closed) == (letter == "c"), "an instance whose call is still running is left to itself"
    venv.reset(seed=1)
    venv.step_responses([[*ids_of("a"), EOS]] * 4)
    assert venv.episodes._sessions._sessions[1].env is not failing


def test_a_time_out_stops_training_by_default(sometimes):
    venv = make(sometimes, timeout=0.05, check_seeds=False)
    venv.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"takes longer than timeout=0.05 seconds \(row 0, seed \d+, turns before: \[\]\)"):
        venv.step_responses([[*ids_of("d"), EOS]] * 4)


class Hangs(Letters):
    def reset(self, *, seed=None):
        threading.Event().wait(LONG)


def test_a_reset_that_hangs_is_found_at_construction():
    refused(make, Hangs, timeout=0.05, match=r"Hangs.reset\(seed=0\) takes longer than timeout=0.05 seconds")


@pytest.mark.parametrize(
    "kwargs, match",
    [
        ({"workers": 0}, "workers=0"),
        ({"timeout": 0}, "timeout=0 must be a positive number"),
        ({"timeout": "fast"}, "timeout='fast' must be a positive number"),
        ({"on_error": "ignore"}, "on_error='ignore' must be 'raise', or the reward"),
        ({"on_error": float("nan")}, "on_error=nan must be"),
        ({"rollout_timeout": 0}, "rollout_timeout=0 must be a positive number"),
        ({"rollout_timeout": True}, "rollout_timeout=True must be a positive number"),
    ],
)
def test_bad_arguments_are_refused(kwargs, match):
    refused(make, Letters, match=match, **kwargs)
    if "rollout_timeout" in kwargs:
        refused(TextGenerationEnv, ["a"], lambda completions: [0.0], TOKENIZER, match="is for text envs and tools", **kwargs)


def test_errors_are_counted_in_the_logs(sometimes):
    kept = Kept()
    env = TextGenerationEnv.from_text_env(sometimes, TOKENIZER, on_error=-1.0, **LIMITS)
    agent = GRPO(make_model("llama", len(TOKENIZER), scale=1.0), env, n_envs=16, group_size=4, seed=0)
    agent.set_logger(Logger(None, [kept]))
    sometimes.wake.set()
    agent.learn(100)
    shares = [row["rollout/env_errors"] for row in kept.rows if "rollout/env_errors" in row]
    assert shares and 0 < np.mean(shares) < 1


# --- the deadline of a rollout ----------------------------------------------------------------------------------------------


class Clock:
    """Stands still, and moves on by a second with every step of a text env."""

    now = 0.0

    def monotonic(self):
        return Clock.now


class Ticking(Letters):
    def step(self, action):
        Clock.now += 1.0
        return super().step(action)


@pytest.mark.parametrize("seconds, late", [(1000.0, 0), (20.5, None)])
def test_after_the_deadline_no_turn_begins(seconds, late, monkeypatch):
    monkeypatch.setattr(llm_env.episodes, "time", Clock())
    monkeypatch.setattr("agents.collection.collector.time", Clock())
    Clock.now, kept = 0.0, Kept()
    env = TextGenerationEnv.from_text_env(Ticking, TOKENIZER, rollout_timeout=seconds, check_seeds=False, **LIMITS)
    agent = PPO(make_model("llama", len(TOKENIZER), scale=1.0), env, n_envs=16, batch_size=8, seed=0)
    agent.set_logger(Logger(None, [kept]))
    rollout = agent.sample_rollout()
    timed_out = [info.get("truncated_by") == "rollout_timeout" for info in rollout.infos]
    assert sum(timed_out) == 0 if late == 0 else sum(timed_out) > 0
    waits = bootstraps(rollout, None, 1.0)
    for info, is_late, truncated, is_continued in zip(
        rollout.infos, timed_out, rollout.truncated.tolist(), waits.tolist(), strict=True
    ):
        if is_late:
            assert truncated and info["turns"] < LIMITS["max_turns"] and is_continued and "reward/env" in info
    if late is None:
        turns = sum(info["turns"] for info in rollout.infos)
        assert 21 <= turns <= 20 + 16, "every row under way took one more turn at most"
    agent.learn(50)
    assert all("rollout/timed_out" in row for row in kept.rows if "rollout/turns" in row)


# --- slow tools -------------------------------------------------------------------------------------------------------------


def test_tool_workers_make_the_calls_of_several_turns_at_a_time():
    party = threading.Barrier(3)

    def meet(x: int) -> str:
        """Meet.

        Args:
            x: A number.
        """
        party.wait(LONG)
        return "met"

    from tests.chats import ids_of as chat_ids
    from tests.test_tools import END, call
    from tests.test_tools import make as make_tools

    rules = make_tools(tools=[meet], tool_workers=3, prompts=[{"prompt": [{"role": "user", "content": "x"}]}]).rules
    venv = TextGenerationVectorEnv.from_rules(rules, 3)
    venv.reset(seed=0)
    venv.step_responses([[*chat_ids(call("meet", x=1)), END]] * 3)
    assert [venv.episodes.turns[row][0].transition.info["tool_errors"] for row in range(3)] == [0, 0, 0]
    refused(short, tool_workers=0, match="tool_workers=0")
    refused(TextGenerationEnv, ["a"], lambda completions: [0.0], TOKENIZER, tools=[calculator], tool_workers=1.5)
