"""Rewards in workers: time-outs, errors, caches and awaiting, and what the env and the logs say of them."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from llm_env import PooledReward, TextGenerationEnv, TextGenerationVectorEnv, process_reward
from llm_env.prompts import read_jsonl
from llm_env.rewards import RewardSum
from tests.conftest import make_tokenizer
from tests.pooled import Unreadable, letters, odd, picky, pids
from tests.test_agents import make_agent

TOKENIZER = make_tokenizer("abcdefgh")
EOS, A, B = 0, 3, 4


async def awaited(completions):
    await asyncio.sleep(30 if "c" in completions[0] else 0.05)
    return [float(len(c)) for c in completions]


def score(reward, completions, **columns):
    ids = [TOKENIZER(c)["input_ids"] for c in completions]
    return reward(["p"] * len(completions), list(completions), ids, columns)


def test_a_pool_changes_no_score_and_keeps_the_order():
    def slow_first(completions):
        time.sleep(0.05 if completions[0] == "a" else 0.0)
        return [float(len(c)) for c in completions]

    completions = ["a", "bb", "ccc", "dddd", "eeeee"]
    for settings in ({}, {"batch_size": 2}, {"batch_size": None}, {"workers": 1}, {"timeout": 5.0}, {"cache_size": 10}):
        scores = score(RewardSum(PooledReward(slow_first, **settings)), completions)
        assert scores.total.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0] and scores.errors == {}
        assert list(scores.components) == ["slow_first"]


def test_workers_run_at_once():
    barrier = threading.Barrier(4, timeout=10)

    def together(completions):
        barrier.wait()  # goes on only when four calls are under way
        return [1.0]

    assert score(RewardSum(PooledReward(together, workers=4)), "abcd").total.tolist() == [1.0] * 4


def test_the_time_out_begins_with_the_call_and_not_in_the_line():
    def quarter(completions):
        time.sleep(0.25)
        return [1.0]

    begin = time.monotonic()
    scores = score(RewardSum(PooledReward(quarter, workers=1, timeout=0.75, on_error=-1.0)), "abcdef")
    assert time.monotonic() - begin > 1.4  # the last call waited for longer than the time-out
    assert scores.errors == {} and scores.total.tolist() == [1.0] * 6


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_errors_and_time_outs_hit_their_own_rows(processes):
    reward = PooledReward(picky, workers=2, processes=processes, timeout=3.0, on_error=-5.0)
    begin = time.monotonic()
    scores = score(RewardSum(reward), ["a", "b", "aa", "c", "aaa"])
    assert time.monotonic() - begin < 25
    assert scores.total.tolist() == [1.0, -5.0, 2.0, -5.0, 3.0]
    assert scores.errors == {
        1: "picky: RuntimeError: cannot read 'b'",
        3: "picky: TimeoutError: no answer within 3.0 s of the call's start",
    }
    assert score(RewardSum(reward), ["aaaa", "a"]).total.tolist() == [4.0, 1.0]  # the pool is whole again
    if processes:
        assert score(RewardSum(reward), ["d", "a"]).errors == {0: "picky: the worker process died with exit code 7"}
    reward.close()


def test_raise_is_the_default_and_loses_nothing():
    fails = [True]

    def sometimes(completions):
        if fails[0]:
            raise RuntimeError("no network")
        return [7.0]

    env = TextGenerationEnv(["a"], PooledReward(sometimes), TOKENIZER, max_new_tokens=3)
    env.reset(seed=0)
    env.step(A)
    with pytest.raises(
        ValueError, match="'sometimes' failed for 1 of 1 completions, the first in row 0: RuntimeError: no network"
    ):
        env.step(EOS)
    fails[0] = False
    assert env.step(EOS)[1] == 7.0


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([float("nan")], "returned nan for row 0"),
        ([1.0, 2.0], "returned 2 values for 1 completions"),
        (None, "returned None for all"),
    ],
)
def test_what_is_no_score_is_an_error_too(returned, message):
    scores = score(RewardSum(PooledReward(lambda completions: returned, on_error=-1.0)), ["a"])
    assert scores.total.tolist() == [-1.0] and message in scores.errors[0]


def test_the_cache_knows_prompt_ids_and_columns():
    calls = []

    def counted(completions, answer):
        calls.append(completions[0])
        return [float(len(completions[0]) + answer[0])]

    reward = RewardSum(PooledReward(counted, cache_size=3), columns=["answer"])
    assert score(reward, ["a", "a", "bb"], answer=[0, 0, 0]).total.tolist() == [1.0, 1.0, 2.0]
    assert sorted(calls) == ["a", "bb"]  # twins of one batch are asked for once
    assert score(reward, ["a", "bb"], answer=[0, 5]).total.tolist() == [1.0, 7.0]
    assert sorted(calls) == ["a", "bb", "bb"]
    score(reward, ["ccc"], answer=[0])  # the oldest leaves
    score(reward, ["a"], answer=[0])
    assert calls.count("a") == 2


def test_an_error_is_not_remembered():
    fails = [True]

    def sometimes(completions):
        if fails[0]:
            raise RuntimeError("busy")
        return [1.0]

    reward = RewardSum(PooledReward(sometimes, on_error=0.0, cache_size=5))
    assert score(reward, ["a"]).errors
    fails[0] = False
    assert score(reward, ["a"]).total.tolist() == [1.0] and not score(reward, ["a"]).errors


def test_asynchronous_functions_plain_and_pooled():
    assert score(RewardSum(awaited), ["a", "bb"]).total.tolist() == [1.0, 2.0]

    async def in_a_running_loop():
        return score(RewardSum(awaited), ["a", "bb"]).total.tolist()

    assert asyncio.run(in_a_running_loop()) == [1.0, 2.0]
    begin = time.monotonic()
    scores = score(RewardSum(PooledReward(awaited, workers=8, timeout=1.0, on_error=0.5)), "abcdefgh")
    assert scores.total.tolist() == [1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0] and time.monotonic() - begin < 5


class Client:
    """A web client in small: bound to the loop in which it was first used."""

    def __init__(self):
        self.free = None
        self.cancelled = 0

    async def __call__(self, completions):
        if self.free is None:
            self.free = asyncio.Queue(1)
        await self.free.put(None)  # only one at a time
        try:
            await asyncio.sleep(30 if "c" in completions[0] else 0.01)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.free.get_nowait()
        return [1.0] * len(completions)


def test_calls_share_one_loop_and_a_late_one_is_cancelled():
    client = Client()
    plain = RewardSum(client)
    assert [score(plain, ["a", "b"]).total.tolist() for _ in range(3)] == [[1.0, 1.0]] * 3
    pooled = PooledReward(client, timeout=1.0, on_error=-1.0)
    assert score(RewardSum(pooled), "abd").total.tolist() == [1.0] * 3
    assert score(RewardSum(pooled), "c").total.tolist() == [-1.0] and client.cancelled == 1
    assert score(RewardSum(pooled), "a").total.tolist() == [1.0]  # the queue was left by the one cancelled


def test_steps_come_through_a_pool():
    def steps(completion_ids):
        return [[(0, 1.0), (len(ids) - 1, 2.0)] for ids in completion_ids]

    venv = TextGenerationVectorEnv(2, ["a"], PooledReward(steps), TOKENIZER, max_new_tokens=4)
    venv.reset(seed=0)
    assert [row.tolist() for row in venv.step_responses([[A, B, EOS], [A, EOS]]).rewards] == [[1.0, 0.0, 2.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    ("fails_at", "paid", "score"),
    [
        ((), [1.0, 0.0, 1.0, 0.0], 2.0),
        ((1,), [0.0, 1.0, 1.0, 0.0], 2.0),  # what the failed call did not say comes with the next
        ((1, 2), [0.0, 0.0, 2.0, 0.0], 2.0),
        ((4,), [1.0, 0.0, 1.0, -5.0], -3.0),  # what was paid stays, and the episode gets the number of the policy
        ((1, 4), [0.0, 1.0, 1.0, -5.0], -3.0),
    ],
)
def test_a_live_reward_that_fails_under_way_is_told_and_its_steps_are_paid_later(fails_at, paid, score, tmp_path):
    def steps(completion_ids):
        if len(completion_ids[0]) in fails_at:
            raise RuntimeError(f"down at {len(completion_ids[0])}")
        return [[(i, 1.0) for i, token in enumerate(ids) if token == B] for ids in completion_ids]

    reward = PooledReward(process_reward(steps), on_error=-5.0)
    env = TextGenerationEnv(["a"], reward, TOKENIZER, max_new_tokens=6, record=tmp_path / "episodes.jsonl")
    for _ in range(2):  # nothing is left over for the next episode
        env.reset(seed=0)
        outcomes = [env.step(token) for token in (B, A, B, EOS)]
        assert [outcome[1] for outcome in outcomes] == paid
        errors = "; ".join(f"steps: RuntimeError: down at {n}" for n in fails_at if n in (fails_at[0], 4))
        assert outcomes[-1][4].get("reward_error", "") == errors
    assert [record["score"] for record in read_jsonl(tmp_path / "episodes.jsonl")] == [score, score]


def test_the_info_and_the_logs_tell_of_errors_and_of_time():
    def fails_on_a(completions):
        time.sleep(0.01)
        if completions[0].startswith("a"):
            raise RuntimeError("no a")
        return [1.0]

    env = TextGenerationEnv(
        ["a", "b"], [PooledReward(fails_on_a, on_error=0.25), letters], TOKENIZER, max_prompt_tokens=1, max_new_tokens=2
    )
    env.reset(seed=0)
    env.step(A)
    info = env.step(EOS)[4]
    assert info["reward_error"] == "fails_on_a: RuntimeError: no a" and info["reward/fails_on_a"] == 0.25
    agent = make_agent("GRPO", env=env, n_envs=32)
    agent.learn(10, log_interval=None)  # one rollout, not dumped
    logged = agent.logger.name_to_value
    expected = (logged["rollout/reward/fails_on_a"] - 1.0) / (0.25 - 1.0)  # a share p of errors makes a mean of 1 - 0.75 p
    assert logged["rollout/reward_errors"] == pytest.approx(expected) and 0 < expected < 1
    assert logged["time/reward/fails_on_a"] >= 0.01 * 32 / 4 and logged["time/reward/letters"] < 0.1


def test_a_pool_can_be_pickled_and_is_a_function_by_itself():
    reward = pickle.loads(pickle.dumps(PooledReward(picky, timeout=1.0, on_error=2.0)))
    assert reward(completions=["a", "b"]) == [1.0, 2.0]


def in_a_fork(work, daemon):
    """What `work()` returns or raises in a forked process, as text."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def run():
        try:
            results.put(str(work()))
        except Exception as error:
            results.put(str(error))

    process = context.Process(target=run, daemon=daemon)
    process.start()
    try:
        return results.get(timeout=40)
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("processes", [False, True], ids=["threads", "processes"])
def test_a_forked_process_has_workers_of_its_own(processes):
    reward = PooledReward(picky, workers=1, processes=processes)
    assert reward(completions=["a"]) == [1.0]  # workers are there before the fork

    def work():
        reward.close()  # leaves the parent's worker alone
        return reward(completions=["aa"])

    workers = {process.pid for process in multiprocessing.active_children()}
    assert len(workers) == processes
    assert in_a_fork(work, daemon=False) == "[2.0]"
    assert reward(completions=["aaa"]) == [3.0]
    assert {process.pid for process in multiprocessing.active_children()} == workers
    reward.close()
    assert multiprocessing.active_children() == []


def test_where_no_worker_can_be_started_no_policy_pays():
    reward = RewardSum(PooledReward(picky, processes=True, on_error=0.0))
    assert "cannot start a worker process from a daemonic one; use processes=False" in in_a_fork(
        lambda: score(reward, ["a"]).total, daemon=True
    )


def test_close_waits_for_calls_under_way_and_the_next_call_starts_new_workers():
    reward = PooledReward(picky, workers=2, processes=True, timeout=2.0, on_error=-1.0)
    values = []
    call = threading.Thread(target=lambda: values.extend(reward(completions=["c", "a"])))
    call.start()
    while len(multiprocessing.active_children()) < 2:
        time.sleep(0.01)
    reward.close()
    call.join()
    assert values == [-1.0, 1.0] and multiprocessing.active_children() == []
    assert reward(completions=["aa"]) == [2.0]
    reward.close()


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_a_worker_that_was_killed_while_idle_is_replaced():
    reward = PooledReward(pids, workers=1, processes=True)
    (pid,) = reward(completions=["a"])
    os.kill(int(pid), signal.SIGKILL)
    assert wait_until(lambda: not is_running(int(pid)))
    assert wait_until(lambda: multiprocessing.active_children() == [])  # seen by the pool
    (other,) = reward(completions=["a"])
    assert other != pid
    reward.close()


def test_workers_of_a_forgotten_pool_end():
    reward = PooledReward(pids, workers=2, processes=True)
    (pid,) = reward(completions=["a"])
    assert is_running(int(pid))
    del reward
    gc.collect()
    assert wait_until(lambda: multiprocessing.active_children() == [])


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["pass", "os.kill(os.getpid(), signal.SIGKILL)"], ids=["exit", "killed"])
def test_no_worker_outlives_its_script(tmp_path, end):
    (tmp_path / "script.py").write_text(
        "import os, signal\nfrom llm_env import PooledReward\n"
        "def pids(completions):\n    return [float(os.getpid())]\n"
        'if __name__ == "__main__":\n'
        f"    print(*PooledReward(pids, workers=1, processes=True)(completions=['a']), flush=True)\n    {end}\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, timeout=120)
    pid = int(float(done.stdout))
    assert wait_until(lambda: not is_running(pid))


def test_what_cannot_be_sent_to_a_worker_or_back_is_an_error_of_the_call():
    reward = PooledReward(odd, workers=1, processes=True, on_error=-1.0)
    for completion, columns, error in [
        ("x", {}, "SystemExit: enough"),
        ("a", {}, "must return one number a completion, but returned 'a' for row 0"),
        ("a", {"column": [Unreadable()]}, "ValueError: invalid literal for int() with base 10: 'no number'"),
        ("a", {"column": [threading.Lock()]}, "TypeError: cannot pickle '_thread.lock' object"),
    ]:
        called = reward.run({"completions": [completion], **columns}, [()], [1])
        assert called.values == [-1.0] and called.errors == {0: f"odd: {error}"}
    reward.close()


def test_processes_without_pebble(monkeypatch):
    monkeypatch.setitem(sys.modules, "pebble", None)
    assert PooledReward(letters)(completions=["aa"]) == [2.0]  # threads need no pebble
    with pytest.raises(ImportError, match=r'pip install "llm-env\[pool\]"'):
        PooledReward(letters, processes=True)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"function": 3}, TypeError, "reward 3 is a int"),
        ({"workers": 0}, ValueError, "workers=0 must be"),
        ({"batch_size": 0}, ValueError, "batch_size=0 must be"),
        ({"timeout": 0}, ValueError, "timeout=0 must be"),
        ({"on_error": "zero"}, ValueError, "on_error='zero' must be 'raise' or a finite number"),
        ({"on_error": float("nan")}, ValueError, "on_error=nan"),
        ({"cache_size": -1}, ValueError, "cache_size=-1"),
        ({"function": lambda completions: [0.0], "processes": True}, TypeError, "cannot be sent to a worker process"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        PooledReward(**{"function": picky, **kwargs})


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    (tmp_path / "script.py").write_text(
        "from llm_env import PooledReward\n"
        "def one(completions):\n    return [1.0]\n"
        "print(PooledReward(one, processes=True)(completions=['a']))\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and 'if __name__ == "__main__"' in done.stderr.splitlines()[-1]


def test_hung_threads_do_not_keep_a_script_from_ending(tmp_path):
    (tmp_path / "script.py").write_text(
        "import time\nfrom llm_env import PooledReward\n"
        "print(PooledReward(lambda completions: time.sleep(60), timeout=0.2, on_error=0.0)(completions=['a']))\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert done.stdout == "[0.0]\n" and time.monotonic() - begin < 40
    assert "no answer within 0.2 s" in done.stderr  # never silent
