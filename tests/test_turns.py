"""Episodes of several turns: the rules on both clocks against a simulation by hand, seeds, and bad text envs."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from agents.vec_env import TextVecEnv
from llm_env import TextEnvTasks, TextGenerationEnv, TextGenerationVectorEnv
from llm_env.prompts import split_of
from tests.chats import make_chat_tokenizer
from tests.conftest import make_model, make_tokenizer
from tests.test_clocks import token_clock
from tests.text_envs import Closing, GuessNumber, Letters, Scripted

TOKENIZER = make_tokenizer("abc")
EOS, FIRST = 0, 3  # ids below FIRST are special


def text_of(ids):
    return "".join("abc"[i - FIRST] for i in ids if i >= FIRST)


def ids_of(text):
    return [FIRST + "abc".index(c) for c in text]


def last_turn_length(completions, **kwargs):
    return [len([m for m in c if m["role"] == "assistant"][-1]["content"]) / 4 for c in completions]


class Simulated:
    """One episode by the rules as the documentation states them, with tokens from `draw`."""

    def __init__(self, kind, seed, draw, limits, stop, turn_limit, has_reward):
        self.env, self.limits = kind(), limits
        text, _ = self.env.reset(seed=seed)
        self.prompt, self.after, self.rewards, self.turns, self.observations, self.cut = ids_of(text), [], [], [], [], []
        self.end, self.fits, last = None, True, {}
        while self.end is None:
            turn, by_end = self.turn(draw, stop)
            self.after += turn
            self.turns.append(turn)
            self.cut.append(not by_end)
            paid, observation = 0.0, []
            if not by_end and turn_limit == "truncate":
                has_room = len(self.after) - len(turn) + limits["max_new_tokens"] <= limits["max_episode_tokens"]
                self.end = "turn_limit" if has_room else "max_episode_tokens"
            else:
                text, paid, terminated, truncated, last = self.env.step(text_of(turn))
                observation = [] if terminated else ids_of(text)
                self.end = "terminated" if terminated else self.truncation(truncated, len(observation))
                self.fits = len(self.after) + len(observation) <= limits["max_episode_tokens"]
            if kind is Closing and self.end not in (None, "terminated", "env"):
                paid += self.env.final_reward()
            self.observations.append(observation if self.fits else [])
            self.after += self.observations[-1]
            self.rewards.append([0.0] * (len(turn) - 1) + [paid])
        self.info = {"turns": len(self.turns), "reward/env": sum(turn[-1] for turn in self.rewards)}
        if has_reward:
            self.rewards[-1][-1] += len(text_of(self.turns[-1])) / 4
        self.info |= {"turns_truncated": sum(self.cut), "observation_tokens": sum(map(len, self.observations))}
        if last:
            self.info |= {"env/n": float(last["n"]), "is_success": bool(last["is_success"])}
        if self.end != "terminated":
            self.info |= {"truncated_by": self.end, "final_observation_fits": self.fits}

    def turn(self, draw, stop):
        """The tokens of a turn, and whether it ended by itself."""
        limit = min(self.limits["max_new_tokens"], self.limits["max_episode_tokens"] - len(self.after))
        turn = []
        while len(turn) < limit:
            turn.append(draw())
            if turn[-1] == EOS or any(s in text_of(turn) for s in stop):
                return turn, True
        return turn, False

    def truncation(self, by_env, observation):
        if by_env:
            return "env"
        if len(self.turns) == self.limits["max_turns"]:
            return "max_turns"
        return "max_episode_tokens" if len(self.after) + observation >= self.limits["max_episode_tokens"] else None

    @property
    def ends(self):
        return (self.end == "terminated", self.end != "terminated")


def has(info, expected):
    return {key: info.get(key) for key in expected} == pytest.approx(expected) and ("truncated_by" in info) == (
        "truncated_by" in expected
    )


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_both_clocks_and_the_single_env_agree_with_a_simulation(data):
    limits = {"max_turns": data.draw(st.integers(1, 4)), "max_new_tokens": data.draw(st.integers(1, 4))}
    limits["max_episode_tokens"] = data.draw(st.integers(limits["max_new_tokens"], 20))
    stop = data.draw(st.lists(st.text("abc", min_size=1, max_size=2), max_size=2))
    turn_limit = data.draw(st.sampled_from(["truncate", "continue"]))
    reward = data.draw(st.sampled_from([None, last_turn_length]))
    group_size = data.draw(st.integers(1, 3))
    n = group_size * data.draw(st.integers(1, 2))
    first_seed = data.draw(st.integers(0, 1000))
    kind = data.draw(st.sampled_from([Scripted, Closing]))
    kwargs = dict(make=kind, tokenizer=TOKENIZER, reward=reward, num_tasks=20, first_seed=first_seed, stop=stop)
    kwargs |= dict(turn_limit=turn_limit, max_prompt_tokens=3, check_seeds=False, **limits)
    by_token, by_response = (TextGenerationVectorEnv.from_text_env(n, **kwargs) for _ in range(2))
    seed = data.draw(st.integers(0, 100))
    for venv in (by_token, by_response):
        venv.reset(seed=seed, options={"group_size": group_size})
    indexes = by_response.episodes.prompt_indexes.copy()
    assert (indexes == indexes[::group_size].repeat(group_size)).all()

    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    expected = [
        Simulated(kind, first_seed + i, lambda: int(rng.integers(len(TOKENIZER))), limits, stop, turn_limit, reward is not None)
        for i in indexes.tolist()
    ]

    # turn by turn, some of the rows at a time, and some turns in two parts
    rewards, infos, left = [[] for _ in range(n)], [{}] * n, [list(e.turns) for e in expected]
    while any(left):
        parts, closed = [[] for _ in range(n)], [False] * n
        for i in range(n):
            if left[i] and rng.random() < 0.7:
                turn = left[i].pop(0)
                cut = int(rng.integers(1, len(turn) + 1))
                parts[i], closed[i] = turn[:cut], cut == len(turn)
                left[i] = [*([] if closed[i] else [turn[cut:]]), *left[i]]
        step = by_response.step_responses(parts)
        for i in range(n):
            done = len(expected[i].turns) - len(left[i])
            rewards[i] += step.rewards[i].tolist()
            assert step.observations[i].tolist() == (expected[i].observations[done - 1] if closed[i] else [])
            ends = expected[i].ends if closed[i] and not left[i] else (False, False)
            assert (bool(step.terminated[i]), bool(step.truncated[i])) == ends
            if any(ends):
                infos[i] = step.infos[i]
            else:
                cut = closed[i] and expected[i].cut[done - 1]
                assert step.infos[i] == ({"turn_truncated": True} if cut else {})
    flat = [[r for turn in e.rewards for r in turn] for e in expected]
    assert rewards == flat
    for row, e in enumerate(expected):
        assert has(infos[row], e.info)
        assert by_response.episodes.response(row).tolist() == e.after

    actions = [[token for turn in e.turns for token in turn] for e in expected]
    paid, ends, last = token_clock(by_token, actions)
    assert paid == flat and ends == [e.ends for e in expected]
    assert last == infos
    single = TextGenerationEnv.from_text_env(**kwargs)
    for i, e in enumerate(expected):
        single.reset(options={"index": int(indexes[i])})
        steps = [single.step(token) for token in actions[i]]
        assert [step[1] for step in steps] == flat[i]
        assert steps[-1][2:4] == e.ends and steps[-1][4] == infos[i]
        ids, mask = steps[-1][0]["input_ids"], steps[-1][0]["attention_mask"]
        assert ids[mask == 1].tolist() == [*e.prompt, *e.after]


# --- Gymnasium and SB3 -------------------------------------------------------------------------------------------------------


def make(kind=Letters, tokenizer=None, **kwargs):
    defaults = dict(max_prompt_tokens=12, max_new_tokens=3, max_turns=3, max_observation_tokens=6)
    tokenizer = make_tokenizer("abcdefgh") if tokenizer is None else tokenizer
    return TextGenerationEnv.from_text_env(kind, tokenizer, **{**defaults, **kwargs})


def test_checkers_and_ids():
    sb3_check_env(make(observation="flat"))
    sb3_check_env(make())
    arguments = {"make": "tests.text_envs:Letters", "tokenizer": make_tokenizer("abcdefgh"), "max_new_tokens": 3}
    gymnasium_check_env(gym.make("llm_env/TextEnv-v0", **arguments).unwrapped)
    for mode in AutoresetMode:
        venv = gym.make_vec("llm_env/TextEnv-v0", num_envs=3, autoreset_mode=mode, **arguments)
        assert isinstance(venv, TextGenerationVectorEnv) and venv.autoreset_mode is mode
        venv.reset(seed=0)
        total = 0
        for _ in range(40):
            _, _, terminated, truncated, _ = venv.step(np.array([3, 10, 4]))
            ended = terminated | truncated
            total += ended.sum()
            if mode is AutoresetMode.DISABLED and ended.any():
                venv.reset(options={"reset_mask": ended})
        assert total > 5
        venv.close()


def test_autoreset_begins_the_next_episode_of_the_row():
    """In SAME_STEP mode the last observation is in `final_obs`, and the row has its next prompt."""
    venv = TextGenerationVectorEnv.from_text_env(
        1, Letters, make_tokenizer("abcdefgh"), max_new_tokens=1, max_turns=2, autoreset_mode="SameStep"
    )
    single = make(max_new_tokens=1, max_turns=2)
    venv.reset(seed=5)
    single.reset(seed=5)
    for token in (3, 4):  # a, b
        _, _, _, truncated, infos = venv.step(np.array([token]))
        last, *_, info = single.step(token)
    assert truncated[0] and infos["final_info"]["truncated_by"][0] == info["truncated_by"] == "max_turns"
    n = int(last["attention_mask"].sum())
    assert infos["final_obs"][0]["input_ids"][:n].tolist() == last["input_ids"][:n].tolist()
    single.reset()
    assert venv.episodes.prompt_indexes[0] == single._episodes.prompt_indexes[0]


def test_time_limit_counts_tokens_and_leaves_the_open_turn_unstepped():
    env = TimeLimit(make(max_new_tokens=3), 5)
    env.reset(seed=0)
    for _ in range(5):
        _, _, terminated, truncated, _ = env.step(3)
    assert truncated and not terminated
    (turn,) = env.unwrapped._episodes.turns[0]
    assert turn.text == "aaa" and env.unwrapped._episodes.turn(0).tolist() == [3, 3]


def test_the_sb3_face_reports_the_last_observation():
    venv = TextVecEnv(make(max_new_tokens=1, max_turns=2).vectorize(2))
    venv.seed(0)
    venv.reset()
    venv.step(np.array([3, 10]))  # a goes on, h terminates
    _, _, dones, infos = venv.step(np.array([3, 3]))
    assert dones[0] and infos[0]["TimeLimit.truncated"] and infos[0]["episode"]["l"] == 2 and infos[0]["episode"]["r"] == 1.0
    assert infos[0]["terminal_observation"]["attention_mask"].sum() > 2 + infos[0]["observation_tokens"]


def test_render_shows_who_said_what():
    env = make(GuessNumber, make_tokenizer("0123456789guess-=+ "), render_mode="ansi", max_new_tokens=1)
    env.reset(options={"index": 0})
    number = env.rules.prompts.row(0)["number"]
    env.step(env.rules.tokenizer.convert_tokens_to_ids(str(number % 7 + 1)))
    sign = "+" if number % 7 + 1 < number else "-"
    assert env.render().splitlines() == [
        "env:    'guess 1-7='",
        f"policy: '{number % 7 + 1}'  [cut]  [reward 0]",
        f"env:    {sign!r}",
    ]


# --- chats: bridge tokens ----------------------------------------------------------------------------------------------------


class Talk:
    def reset(self, *, seed=None):
        return "hi", {}

    def step(self, action):
        return [{"role": "user", "content": f"you said {action}"}], 0.0, False, False, {}


def test_bridge_tokens_continue_the_chat_as_its_template_writes_it():
    """A turn that closes itself, one that is cut, and one that stops by another end token; sampled tokens never change."""
    tokenizer = make_chat_tokenizer()
    env = TextGenerationEnv.from_text_env(
        Talk, tokenizer, max_prompt_tokens=40, max_new_tokens=4, max_turns=4, max_observation_tokens=60
    )
    assert env.rules.chat
    render = lambda chat: tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)  # noqa: E731
    env.reset()
    start = render([{"role": "user", "content": "hi"}])
    assert env._episodes.prompt(0).tolist() == start
    said = tokenizer("ab", add_special_tokens=False)["input_ids"]
    for closing in (sorted(env.rules.eos_ids), [None]):
        for end in closing:
            env.reset()
            turn = [*said, end] if end is not None else [*said, *said]
            for token in turn:
                env.step(token)
            text = env.rules.decode([turn])[0]
            chat = [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": text},
                {"role": "user", "content": f"you said {text}"},
            ]
            expected = render(chat)
            got = [*start, *env._episodes.response(0).tolist()]
            if end is None or end in expected[len(start) + len(said) : len(start) + len(said) + 1]:
                assert got == expected
            assert got[len(start) : len(start) + len(turn)] == turn


# --- seeds -------------------------------------------------------------------------------------------------------------------


class GlobalState(Letters):
    def reset(self, *, seed=None):
        GlobalState.count = getattr(GlobalState, "count", 0) + 1
        super().reset(seed=seed)
        return "c" * (GlobalState.count % 3 + 1), {}


class IgnoresSeedLater(Letters):
    """The first observation is always the same, the number to be found is not."""

    def reset(self, *, seed=None):
        self.rng = np.random.default_rng()
        return "c", {}

    def step(self, action):
        return "d", float(self.rng.random()), False, False, {}


def test_a_text_env_that_ignores_its_seed_is_refused():
    for kind in (GlobalState, IgnoresSeedLater):
        with pytest.raises(ValueError, match=r"does not repeat an episode: with seed 0 .*np\.random\.default_rng\(seed\)"):
            make(kind)
    env = make(GlobalState, check_seeds=False)
    env.reset(options={"index": 0})
    with pytest.raises(ValueError, match=r"returned .* and now .*: the episodes of a group would differ"):
        for _ in range(3):
            env.step(3)


def test_splits_hash_the_seed():
    parts = {split: make(num_tasks=100, first_seed=50, split=split).rules.prompts for split in ("train", "test")}
    seeds = {split: [table.seed(i) for i in range(len(table))] for split, table in parts.items()}
    assert sorted(seeds["train"] + seeds["test"]) == list(range(50, 150))
    assert all(split_of(str(seed)) == split for split in seeds for seed in seeds[split])


def test_endless_seeds_stay_in_the_split_and_go_on_where_they_were_saved():
    def make_venv():
        return TextGenerationVectorEnv.from_text_env(4, Letters, make_tokenizer("abcdefgh"), num_tasks=None, split="test")

    venv = make_venv()
    venv.reset(seed=3, options={"group_size": 2})
    state = venv.state_dict()
    seeds = []
    for _ in range(5):
        venv.reset(options={"group_size": 2})
        seeds.append([venv.rules.prompts.seed(int(i)) for i in venv.episodes.prompt_indexes])
    flat = [seed for row in seeds for seed in row[::2]]
    assert len(set(flat)) == len(flat) and all(split_of(str(seed)) == "test" for seed in flat)
    assert all(row[0] == row[1] and row[2] == row[3] for row in seeds)
    again = make_venv()
    again.load_state_dict(state)
    for row in seeds:
        again.reset(options={"group_size": 2})
        assert [again.rules.prompts.seed(int(i)) for i in again.episodes.prompt_indexes] == row


def test_a_failed_reset_of_the_text_env_changes_nothing():
    class Fails(Letters):
        fails = False

        def reset(self, *, seed=None):
            if Fails.fails:
                raise OSError("the server is down")
            return super().reset(seed=seed)

    env, venv = make(Fails), make(Fails).vectorize(2)
    env.reset(seed=1), venv.reset(seed=1)
    twin, venv_twin = make(), make().vectorize(2)
    twin.reset(seed=1), venv_twin.reset(seed=1)
    Fails.fails = True
    for broken in (env, venv):
        before = broken._observation() if broken is env else broken.episodes.observation()
        with pytest.raises(ValueError, match=r"Fails\.reset\(seed=\d+\) raised OSError: the server is down"):
            broken.reset()
        with pytest.raises(ValueError, match="the server is down"):
            broken.reset(seed=77)
        after = broken._observation() if broken is env else broken.episodes.observation()
        np.testing.assert_equal(before, after)
    Fails.fails = False
    for _ in range(3):
        np.testing.assert_equal(env.reset()[0], twin.reset()[0])
        np.testing.assert_equal(venv.reset()[0], venv_twin.reset()[0])


# --- bad text envs -----------------------------------------------------------------------------------------------------------


class Returns(Letters):
    """Returns something else in the second step, once."""

    result, broken = None, False

    def step(self, action):
        good = super().step(action)
        if self.turns == 2 and Returns.broken:
            Returns.broken = False
            if isinstance(Returns.result, Exception):
                raise Returns.result
            return Returns.result(good)
        return good


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (lambda good: good[:4], ValueError, r"must return \(text, reward, terminated, truncated, info\); got "),
        (lambda good: None, ValueError, "must return .* got None"),
        (lambda good: (b"d", *good[1:]), TypeError, "returned b'd' as its observation; it must be a str or a list of messages"),
        (lambda good: (None, *good[1:]), TypeError, "returned None as its observation"),
        (lambda good: (["d"], *good[1:]), TypeError, "a message is a str; it must be a dict with 'role' and 'content'"),
        (lambda good: ([{"content": "d"}], *good[1:]), ValueError, "it must have 'role' and 'content'"),
        (lambda good: ([{"role": "user", "content": "d"}], *good[1:]), ValueError, "list of messages, but texts are raw"),
        (lambda good: ("\ud800", *good[1:]), ValueError, "observation"),
        (lambda good: (good[0], float("nan"), *good[2:]), ValueError, "returned the reward nan; it must be a finite number"),
        (lambda good: (good[0], None, *good[2:]), ValueError, "returned the reward None"),
        (lambda good: (good[0], True, *good[2:]), ValueError, "returned the reward True"),
        (lambda good: (*good[:2], 1, *good[3:]), TypeError, "returned terminated=1; it must be a bool"),
        (lambda good: (*good[:3], "no", good[4]), TypeError, "returned truncated='no'; it must be a bool"),
        (lambda good: (*good[:4], None), TypeError, "returned an info of type NoneType"),
        (OSError("gone"), RuntimeError, r"step\('c'\) raised OSError: gone .*row 1, seed \d+, turns before: \['a'\]"),
    ],
)
def test_a_bad_step_is_refused_and_can_be_repeated(result, error, match):
    venv = make(Returns, max_new_tokens=1).vectorize(3)
    twin = make(max_new_tokens=1).vectorize(3)
    venv.reset(seed=0), twin.reset(seed=0)
    Returns.result, Returns.broken = (result if isinstance(result, Exception) else staticmethod(result)), False
    for each in (venv, twin):
        each.step_responses([[3], [3], [4]])
    before = copy.deepcopy(venv.episodes.observation())
    Returns.broken = True
    turns = [[], [5], [10]]
    with pytest.raises(error, match=match):
        venv.step_responses(turns)
    np.testing.assert_equal(venv.episodes.observation(), before)
    assert [len(row) for row in venv.episodes.turns] == [1, 1, 1] and not venv.episodes.finished.any()
    again, expected = venv.step_responses(turns), twin.step_responses(turns)
    assert again.infos == expected.infos and again.terminated.tolist() == expected.terminated.tolist() == [False, False, True]
    for name in ("rewards", "observations"):
        np.testing.assert_equal(getattr(again, name), getattr(expected, name))


def test_what_a_limit_leaves_to_pay_is_asked_for_once():
    """`final_reward` fails, then is asked again: no turn is stepped twice; a numeric `on_error` ends the episode instead."""
    asked, stepped = [], []

    class Pays(Letters):
        def step(self, action):
            stepped.append(action)
            return super().step(action)

        def final_reward(self):
            asked.append(self.turns)
            if len(asked) == 1:
                raise OSError("no judge")
            return 2.0

    venv = make(Pays, max_new_tokens=1, max_turns=1, check_seeds=False).vectorize(2)
    venv.reset(seed=0)
    with pytest.raises(RuntimeError, match=r"Pays.final_reward\(\) raised OSError: no judge \(row 0, seed \d+, turns before: "):
        venv.step_responses([[3], [10]])
    outcome = venv.step_responses([[3], [10]])
    # "a" pays 0.5 and is truncated by max_turns, which pays 2 more; "h" ends the episode itself
    assert [row.tolist() for row in outcome.rewards] == [[2.5], [0.0]] and outcome.truncated.tolist() == [True, False]
    assert outcome.infos[0]["reward/env"] == 2.5 and outcome.infos[0]["truncated_by"] == "max_turns"
    assert asked == [1, 1] and stepped.count("h") == 1
    asked.clear()
    venv = make(Pays, max_new_tokens=2, turn_limit="truncate", check_seeds=False, on_error=-1.0).vectorize(1)
    venv.reset(seed=0)
    outcome = venv.step_responses([[3, 3]])  # cut: the text env does not get this turn
    assert [row.tolist() for row in outcome.rewards] == [[0.0, -1.0]] and outcome.infos[0]["env_error"].startswith(
        "Pays.final_reward() raised"
    )
    assert outcome.infos[0]["truncated_by"] == "turn_limit" and asked == [0]


def test_a_repeated_step_steps_nothing_twice():
    """A reward function that fails after the text envs were stepped: their transitions are kept."""
    stepped = []

    class Counted(Letters):
        def step(self, action):
            stepped.append(action)
            return super().step(action)

    fails = [True]

    def reward(completions, **kwargs):
        if fails.pop():
            raise OSError("no judge")
        return [0.0] * len(completions)

    venv = make(Counted, reward=reward, max_new_tokens=1, check_seeds=False).vectorize(3)
    venv.reset(seed=0)
    with pytest.raises(ValueError, match="no judge"):
        venv.step_responses([[10], [3], [10]])
    assert stepped == ["h", "a", "h"]
    fails.append(False)
    step = venv.step_responses([[10], [3], [10]])
    assert stepped == ["h", "a", "h"] and step.terminated.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("result", "error", "match"),
    [
        (None, ValueError, r"reset\(seed=0\) must return \(text, info\); got None"),
        (("c",), ValueError, "must return"),
        ((b"c", {}), TypeError, "returned b'c' as its observation"),
        (("c", None), TypeError, "info of type NoneType"),
        (("", {}), ValueError, "empty observation"),
        (("c" * 13, {}), ValueError, "has 13 tokens, more than max_prompt_tokens=12; set max_prompt_tokens=13"),
        (("c", {1: 2}), TypeError, "key that is not a str: 1"),
    ],
)
def test_a_bad_reset_is_refused_at_construction(result, error, match):
    class Bad(Letters):
        def reset(self, *, seed=None):
            super().reset(seed=seed)
            return result

    with pytest.raises(error, match=match):
        make(Bad)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"kind": 3}, "make=3 must be a class or a function"),
        ({"kind": dict}, "make.. returned a dict without reset and step"),
        ({"num_tasks": 0}, "num_tasks"),
        ({"first_seed": -1}, "first_seed"),
        ({"max_turns": 0}, "max_turns"),
        ({"max_episode_tokens": 2}, "max_episode_tokens=2 must hold a turn of max_new_tokens=3"),
        ({"turn_limit": "stop"}, "turn_limit='stop' must be one of"),
        ({"chat": True}, "chat=True needs a chat template"),
        ({"max_turn": 3}, r"from_text_env\(\) has no argument 'max_turn'; did you mean max_turns\?"),
        ({"prompts": ["a"]}, "has no argument 'prompts'"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make(**kwargs)


def test_text_env_arguments_need_a_text_env():
    for name, value in {"max_turns": 2, "max_episode_tokens": 99, "turn_limit": "continue", "chat": True}.items():
        with pytest.raises(ValueError, match=name):
            TextGenerationEnv(["a"], lambda completions: [0.0], TOKENIZER, **{name: value})
    with pytest.raises(TypeError, match="from_text_env"):
        TextGenerationEnv(Letters, None, TOKENIZER)


def test_episodes_longer_than_the_model_are_refused_before_long_work():
    from agents import GRPO

    model = make_model("llama", 22)
    with pytest.raises(ValueError, match="max_episode_tokens=1000"):
        GRPO(model, make(max_episode_tokens=1000), n_envs=8)
    with pytest.raises(ValueError, match="max_episode_tokens=1000"):
        make(max_episode_tokens=1000, reference=model)


# --- copies, closing, records ------------------------------------------------------------------------------------------------


class Handle(Letters):
    """Cannot be pickled, and counts what is open."""

    opened = 0

    def __init__(self):
        Handle.opened += 1
        self.lock = lambda: None

    def close(self):
        Handle.opened -= 1


def test_instances_are_closed_and_copies_play_on():
    Handle.opened = 0
    env = make(Handle, max_new_tokens=1)
    venv = env.vectorize(3)
    venv.reset(seed=0)
    venv.step_responses([[3], [4], []])
    assert Handle.opened == 3  # two rows, and the one that reads prompts
    copied = pickle.loads(pickle.dumps(venv))
    one, other = venv.step_responses([[4], [3], [3]]), copied.step_responses([[4], [3], [3]])
    np.testing.assert_equal(one.observations, other.observations)
    np.testing.assert_equal(one.rewards, other.rewards)
    for each in (venv, copied, env):
        each.close()
    assert Handle.opened == 0
    env.reset(seed=0)
    env.step(3)
    env.close()
    assert Handle.opened == 0


def test_tasks_can_be_made_by_name_and_listed():
    tasks = TextEnvTasks("tests.text_envs:GuessNumber", num_tasks=5, first_seed=2)
    env = TextGenerationEnv(tasks, None, make_tokenizer("0123456789guess-=+ "), max_new_tokens=1)
    assert [env.rules.prompts.seed(i) for i in env.rules.prompts.indexes()] == [2, 3, 4, 5, 6]
    assert env.rules.prompts.columns == ["number"]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_episodes_that_are_settled_together_are_paid_as_turn_by_turn(data):
    """`advance_turns` for some rows at a time and `settle` at the end, against `step_responses`; with a KL in the reward."""
    calls = []

    def many(completions, **kwargs):
        calls.append(len(completions))
        return last_turn_length(completions)

    reference = make_model("llama", len(TOKENIZER), seed=1)
    kind = data.draw(st.sampled_from([Scripted, Closing]))
    kwargs = dict(make=kind, tokenizer=TOKENIZER, num_tasks=20, max_prompt_tokens=3, check_seeds=False, max_new_tokens=3)
    kwargs |= dict(max_turns=data.draw(st.integers(1, 4)), turn_limit=data.draw(st.sampled_from(["truncate", "continue"])))
    kwargs |= dict(max_episode_tokens=data.draw(st.integers(3, 16)), reference=reference, kl_coef=0.3, reward=many)
    one, other = (TextGenerationVectorEnv.from_text_env(3, **kwargs) for _ in range(2))
    seed = data.draw(st.integers(0, 100))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    for venv in (one, other):
        venv.reset(seed=seed)
    rewards, references, infos, truncated = ([[] for _ in range(3)] for _ in range(4))
    under_way = [0, 1, 2]
    while under_way:
        chosen = [row for row in under_way if rng.random() < 0.6] or under_way[:1]
        limits = one.episodes.turn_limits(np.array(chosen))
        turns = [a_turn(rng, int(limit)) for limit in limits]
        logp = [rng.normal(-1, 0.3, len(turn)) for turn in turns]
        observations, ended = other.advance_turns(chosen, turns, logp)
        given_turns, given_logp = [[]] * 3, [[]] * 3
        for row, turn, values in zip(chosen, turns, logp, strict=True):
            given_turns[row], given_logp[row] = turn, values
        step = one.step_responses(given_turns, given_logp)
        for i, row in enumerate(chosen):
            assert observations[i].tolist() == step.observations[row].tolist()
            assert ended[i] == (step.terminated[row] or step.truncated[row])
            written = [np.nan] * len(observations[i])
            rewards[row] += [*step.rewards[row], *(0.0 for _ in written)]
            references[row] += [*step.ref_logprobs[row], *written]
            if ended[i]:
                infos[row], truncated[row] = step.infos[row], bool(step.truncated[row])
        under_way = [row for row in under_way if not one.episodes.finished[row]]
    calls.clear()
    settled = other.settle([0, 1, 2])
    assert calls == [3], "one call for all episodes"
    for row in range(3):
        n = len(settled.rewards[row])
        assert settled.rewards[row] == pytest.approx(rewards[row][:n], abs=1e-6) and not any(rewards[row][n:])
        np.testing.assert_allclose(settled.ref_logprobs[row], references[row][:n], atol=1e-4)
        assert settled.infos[row].keys() == infos[row].keys()
        for key, value in infos[row].items():
            assert settled.infos[row][key] == (pytest.approx(value, abs=1e-4) if isinstance(value, float) else value)
        assert settled.truncated[row] == truncated[row]


def a_turn(rng, limit):
    """A random turn: up to an end token, or up to the limit."""
    turn = []
    while len(turn) < limit and EOS not in turn:
        turn.append(int(rng.choice([EOS, *range(FIRST, len(TOKENIZER))])))
    return turn


def test_settling_can_be_repeated_after_an_error():
    failures = [True]

    def fails_once(completions, **kwargs):
        if failures:
            failures.pop()
            raise RuntimeError("the judge is down")
        return [1.0] * len(completions)

    venv = TextGenerationVectorEnv.from_text_env(
        2, Letters, make_tokenizer("abcdefgh"), reward=fails_once, max_prompt_tokens=3, max_new_tokens=3
    )
    venv.reset(seed=0)
    h = venv.rules.tokenizer.convert_tokens_to_ids("h")
    _, ended = venv.advance_turns([1, 0], [[h, EOS], [h, EOS]], [[-1.0, -1.0], [-1.0, -1.0]])
    assert ended.all()
    with pytest.raises(ValueError, match="the judge is down"):
        venv.settle([0, 1])
    step = venv.settle([0, 1])
    assert [row.tolist() for row in step.rewards] == [[0.0, 1.0], [0.0, 1.0]]
    with pytest.raises(ValueError, match="row 0 has ended"):
        venv.advance_turns([0], [[h]], [[-1.0]])
