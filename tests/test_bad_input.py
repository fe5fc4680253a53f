"""Bad input: a clear error where it enters, and an env that goes on as if nothing had been said."""

import json

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from llm_env import TextGenerationEnv, TextGenerationVectorEnv, process_reward
from llm_env.reference import Reference
from tests.conftest import make_tokenizer, refused

TOKENIZER = make_tokenizer("abc")
EOS, A, B = 0, 3, 4
V, LIMIT = len(TOKENIZER), 3
PROMPTS = ["a", "b", "c", "ab", "ba"]


class Ladder(Reference):
    """A reference without a model: log pi_ref of token k is -(k + 1) / 8."""

    def __init__(self):
        pass

    def check_vocabulary(self, vocab_size):
        pass

    def log_probs(self, prompts, responses, allowed=None):
        return [np.array([-(token + 1) / 8 for token in row], dtype=np.float32) for row in responses]


class Flaky:
    """Pays 1 an a; raises where it is told to."""

    __name__ = "flaky"
    fails = False

    def __call__(self, completions):
        if self.fails:
            raise OSError("no network")
        return [float(c.count("a")) for c in completions]


@process_reward
def each_b(completion_ids):
    return [[(t, 0.5) for t, token in enumerate(ids) if token == B] for ids in completion_ids]


def arguments(reward=None, **kwargs):
    return {
        "prompts": PROMPTS,
        "reward": [reward or Flaky(), each_b],
        "tokenizer": TOKENIZER,
        "max_prompt_tokens": 2,
        "max_new_tokens": LIMIT,
        "reference": Ladder(),
        "kl_coef": 0.5,
        **kwargs,
    }


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray) and one.dtype == object:
        one, other = one.tolist(), other.tolist()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(
        one, other, equal_nan=isinstance(one, float) or getattr(one, "dtype", None) in (np.float32, np.float64)
    )


tokens = st.sampled_from([EOS, A, A, B, B, 5])
strange = st.sampled_from(
    [True, np.True_, 1.0, np.float64(0), float("nan"), "1", b"1", None, [1], (), {}, 1j, np.array([1, 2])]
)
outside = st.integers(max_value=-1) | st.integers(min_value=V) | st.sampled_from([2**63, 2**64 - 1, -(2**70), np.int8(-1), V])
no_seed = st.integers(max_value=-1) | strange.filter(lambda x: x is not None and not isinstance(x, (list, tuple)))
no_index = st.integers(max_value=-1) | st.integers(min_value=len(PROMPTS)) | st.sampled_from([True, 1.0, "1", b"1", {}, 1j])
no_number = st.sampled_from([float("nan"), float("inf"), -np.inf])


class SingleEnv(RuleBasedStateMachine):
    """An env that is handed bad input, and its twin that is not, live the same life."""

    @initialize(observation=st.sampled_from(["dict", "flat"]))
    def make(self, observation):
        self.flaky = Flaky()
        self.env = TextGenerationEnv(**arguments(self.flaky, observation=observation))
        self.twin = TextGenerationEnv(**arguments(observation=observation))
        self.both(lambda env: env.reset(seed=0))
        self.over = False

    def both(self, call):
        one, other = call(self.env), call(self.twin)
        assert same(one, other), (one, other)
        return one

    @rule(seed=st.none() | st.integers(0, 9), index=st.none() | st.sampled_from([0, 4, np.int64(2)]))
    def reset(self, seed, index):
        self.both(lambda env: env.reset(seed=seed, options={"index": index}))
        self.over = False

    @precondition(lambda self: not self.over)
    @rule(token=tokens, told=st.none() | st.floats(-4, 0), fails=st.booleans())
    def step(self, token, told, fails):
        if told is not None:
            self.both(lambda env: env.set_action_logprob(told))
        self.flaky.fails = fails
        ends = token == EOS or self.env._episodes.lengths[0] == LIMIT - 1
        if fails and ends:
            refused(self.env.step, token, error=ValueError, match="'flaky' raised OSError: no network")
        self.flaky.fails = False
        self.over = any(self.both(lambda env: env.step(token))[2:4])

    @rule(token=outside | strange)
    def bad_step(self, token):
        refused(self.env.step, token, error=ValueError)

    @precondition(lambda self: self.over)
    @rule(token=tokens)
    def step_after_the_end(self, token):
        refused(self.env.step, token, error=ValueError, match=r"row 0 has ended.*call reset\(\)")

    @rule(seed=no_seed, index=st.none() | st.integers(0, 4))
    def bad_seed(self, seed, index):
        refused(self.env.reset, seed=seed, options={"index": index}, error=ValueError, match="seed=.*must be a whole number")

    @rule(seed=st.none() | st.integers(0, 9), index=no_index)
    def bad_index(self, seed, index):
        refused(self.env.reset, seed=seed, options={"index": index}, error=ValueError, match="index=.*the prompts 0..4")

    @rule(seed=st.integers(0, 9), options=st.sampled_from([{"indx": 1}, {"group_size": 2}, {1: 1}, [1], "index", 3, True]))
    def bad_options(self, seed, options):
        refused(self.env.reset, seed=seed, options=options, match="options")

    @rule(logprob=no_number)
    def bad_told(self, logprob):
        refused(self.env.set_action_logprob, logprob, error=ValueError, match="must be finite")

    @invariant()
    def nothing_has_changed(self):
        self.both(lambda env: env._observation())
        self.both(lambda env: env.np_random.bit_generator.state)


def changed(length, value, filler=A):
    """Sequences of `length` in which one entry is bad."""
    return st.tuples(st.integers(0, length - 1), value).map(lambda at: [at[1] if i == at[0] else filler for i in range(length)])


def one_row_less_or_more(n):
    return st.sampled_from([n - 1, n + 1])


class VectorEnv(RuleBasedStateMachine):
    """The same for the vector env, on both clocks and in all autoreset modes."""

    n = 4

    @initialize(mode=st.sampled_from(list(AutoresetMode)))
    def make(self, mode):
        self.mode, self.flaky = mode, Flaky()
        self.env = TextGenerationVectorEnv(self.n, **arguments(self.flaky), autoreset_mode=mode)
        self.twin = TextGenerationVectorEnv(self.n, **arguments(), autoreset_mode=mode)
        self.both(lambda env: env.reset(seed=0))

    both = SingleEnv.both

    @property
    def closed(self):
        """Rows that take no more tokens before a reset."""
        return self.env.episodes.finished & ~self.env._pending

    @rule(
        seed=st.none() | st.integers(0, 9) | st.lists(st.none() | st.integers(0, 9), min_size=4, max_size=4),
        group_size=st.sampled_from([None, 1, 2, 4]),
        mask=st.none() | st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda mask: sum(mask) in (2, 4)),
        index=st.none() | st.integers(0, 4),
    )
    def reset(self, seed, group_size, mask, index):
        if group_size == 4 and mask is not None:
            group_size = 2
        options = {"group_size": group_size, "reset_mask": mask, "index": index}
        self.both(lambda env: env.reset(seed=seed, options=options))

    @precondition(lambda self: not self.closed.any())
    @rule(chosen=st.lists(tokens, min_size=4, max_size=4), told=st.none() | st.floats(-4, 0), fails=st.booleans())
    def step(self, chosen, told, fails):
        for row in range(self.n if told is not None else 0):
            self.both(lambda env, row=row: env.set_action_logprob(row, told - row))
        here = ~self.env._pending
        ends = here & ((np.array(chosen) == EOS) | (self.env.episodes.lengths == LIMIT - 1))
        self.flaky.fails = fails
        if fails and ends.any():
            refused(self.env.step, np.array(chosen), error=ValueError, match="no network")
        self.flaky.fails = False
        self.both(lambda env: env.step(np.array(chosen)))

    @precondition(lambda self: self.closed.any())
    @rule(chosen=st.lists(tokens, min_size=4, max_size=4))
    def step_after_the_end(self, chosen):
        refused(self.env.step, np.array(chosen), error=ValueError, match=r"has ended.*call reset\(\)")

    @rule(chosen=st.lists(st.lists(tokens, max_size=LIMIT), min_size=4, max_size=4), told=st.booleans())
    def respond(self, chosen, told):
        episodes, responses = self.env.episodes, []
        for row, response in enumerate(chosen):
            room = 0 if episodes.finished[row] else LIMIT - int(episodes.lengths[row])
            whole = response[: response.index(EOS) + 1] if EOS in response else response
            responses.append(whole[:room])
        logprobs = [[-0.5] * len(response) for response in responses] if told else None
        self.both(lambda env: list(vars(env.step_responses(responses, logprobs)).values()))

    @rule(
        actions=changed(4, st.integers(max_value=-1) | st.integers(min_value=V, max_value=2**80))
        | changed(4, st.sampled_from([1.0, "1", None, [1], 1j]))
        | one_row_less_or_more(4).map(lambda n: [A] * n)
        | st.sampled_from([None, 3, "abab", {0: 1}, [[A]] * 4, [True] * 4, np.array([2**64 - 1] * 4, dtype=np.uint64)])
    )
    def bad_step(self, actions):
        if self.env._pending.any():  # what a row that begins anew is told is ignored, so that only the form counts
            actions = [A] * (self.n + 1)
        refused(self.env.step, actions, error=ValueError)

    @rule(logprobs=changed(4, no_number) | changed(4, st.sampled_from(["x", [1]])) | st.sampled_from([3, "ab", [0.0], {}]))
    def bad_logprobs_of_a_step(self, logprobs):
        refused(self.env.step, np.array([A] * 4), logprobs=logprobs, error=ValueError, match="logprobs")

    @rule(
        responses=changed(4, st.sampled_from([[A] * (LIMIT + 1), [EOS, A], [A, EOS, B], [V], [-1], [A, 2**64]]), filler=[])
        | changed(4, st.sampled_from([None, "a", [[A]], [1.0], [True], [A, [B]], A, {A}, "", 2.5]), filler=[])
        | one_row_less_or_more(4).map(lambda n: [[A]] * n)
        | st.sampled_from([None, 3, "abab", {0: [A]}])
    )
    def bad_responses(self, responses):
        refused(self.env.step_responses, responses)

    @rule(
        logprobs=st.sampled_from(
            [3, "abab", [0.0] * 4, [[0.0]] * 3, [[]] * 3 + [[0.0]], [[]] * 3 + [["x"]], [[]] * 3 + [[np.nan]]]
        )
    )
    def bad_logprobs_of_responses(self, logprobs):
        refused(self.env.step_responses, [[]] * 4, logprobs, match="logprobs")

    @rule(seed=changed(4, no_seed) | no_seed | st.sampled_from([[1, 2, 3], (), "1234"]), mask=st.none() | st.just([True] * 4))
    def bad_seeds(self, seed, mask):
        refused(self.env.reset, seed=seed, options={"reset_mask": mask}, error=ValueError, match="seed")

    @rule(
        seed=st.integers(0, 9),
        options=st.fixed_dictionaries(
            {"index": no_index | changed(4, no_index) | st.sampled_from([[0, 1, 2], [[1]] * 4, range(4)])}
        )
        | st.fixed_dictionaries({"group_size": st.sampled_from([0, -1, 3, 8, 10**30, 2.0, "2", True, float("nan"), [2]])})
        | st.fixed_dictionaries({"reset_mask": st.sampled_from([[True], [0, 1, 0, 1], [False] * 4, "x", True, [[True]] * 4])})
        | st.sampled_from([{"indx": 1}, {"seed": 1, "index": 0}, [1], 3, "index"]),
    )
    def bad_options(self, seed, options):
        refused(self.env.reset, seed=seed, options=options)

    @rule(row=st.sampled_from([-1, 4, 1.0, True, None]), logprob=st.just(-1.0))
    def bad_told(self, row, logprob):
        refused(self.env.set_action_logprob, row, logprob, error=ValueError, match="row=")

    @invariant()
    def nothing_has_changed(self):
        self.both(lambda env: env.state_dict())
        self.both(lambda env: vars(env.episodes)["ids"])
        self.both(lambda env: [env.episodes.observation(), env.episodes.finished, env._pending])


@pytest.mark.parametrize("machine", [SingleEnv, VectorEnv])
def test_bad_input_changes_nothing(machine):
    run_state_machine_as_test(machine, settings=settings(max_examples=60, stateful_step_count=20, deadline=None))


@pytest.mark.parametrize("clock", ["single", "tokens", "responses"])
def test_a_record_that_cannot_be_written_loses_nothing(clock, tmp_path, monkeypatch):
    path = tmp_path / "episodes.jsonl"
    settings = arguments(record=path)
    env = TextGenerationEnv(**settings) if clock == "single" else TextGenerationVectorEnv(2, **settings)
    env.reset(seed=0)
    write, disk_is_full = env.rules.recorder.write, [True]

    def sometimes(records):
        if records and disk_is_full[0]:
            raise OSError("no space left on device")
        write(records)

    def rewards(tokens):
        if clock == "single":
            return [env.step(tokens[-1])[1]]
        return env.step(tokens)[1] if clock == "tokens" else np.ravel(env.step_responses([[t] for t in tokens]).rewards)

    monkeypatch.setattr(env.rules.recorder, "write", sometimes)
    rewards([B, B])
    for _ in range(2):
        with pytest.raises(OSError, match="no space"):
            rewards([B, EOS])  # row 0 goes on and is paid a step, row 1 ends
    assert not path.read_text()
    disk_is_full[0] = False
    expected = [0.5 + 0.5 * -5 / 8, 0.5 * -1 / 8]
    assert rewards([B, EOS]) == pytest.approx(expected[-1:] if clock == "single" else expected)
    assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [0.5]


def test_told_log_probs_outlive_a_failure_and_neither_a_step_nor_a_reset():
    single, venv = TextGenerationEnv(**arguments()), TextGenerationVectorEnv(2, **arguments())
    exact, without = pytest.approx(-0.5 * (-1.0 + 4 / 8)), pytest.approx(0.5 * -4 / 8)
    for env, action, bad in [(single, A, V), (venv, [A, A], [A, V])]:

        def tell(env=env):
            for row in [()] if env is single else [(0,), (1,)]:
                env.set_action_logprob(*row, -1.0)

        env.reset(seed=0)
        tell()
        refused(env.step, bad)
        assert np.ravel(env.step(action)[1])[0] == exact
        assert np.ravel(env.step(action)[1])[0] == without
        tell()
        env.reset()
        assert np.ravel(env.step(action)[1])[0] == without


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_new_tokens", [0, -1, 2.5, True, "3", None, float("nan"), [3]]),
        ("max_prompt_tokens", [0, -1, 2.5, True, "3", None]),
        (
            "reward_weights",
            [1.0, "11", ["1", "1"], [[1.0], [1.0]], [None, 1.0], [1.0], [1j, 1.0], {0: 1.0, 1: 1.0}, [np.nan, 1.0]],
        ),
        ("observation", ["dicts", 3, None, [], {}]),
        ("split", ["dev", 1, [], True, ""]),
        ("long_prompts", ["cut", None, 0, []]),
        ("length_stop", ["none", None, 0, []]),
        ("success", ["other", 3, []]),
        ("kl_coef", ["x", None, -1.0, float("nan")]),
        ("reference", [3, [], {}]),
    ],
)
def test_arguments_that_are_none(name, values):
    for value in values:
        if name == "kl_coef":
            refused(TextGenerationEnv, **arguments(kl_coef=value, reference=None), match="kl_coef")
        else:
            refused(TextGenerationEnv, **arguments(**{name: value}), match=name)


@pytest.mark.parametrize("tokenizer", [None, 3, TOKENIZER.backend_tokenizer, [], {}])
def test_tokenizers_that_are_none(tokenizer):
    refused(TextGenerationEnv, PROMPTS, Flaky(), tokenizer, error=TypeError, match="tokenizer is a")


def test_numbers_and_modes_of_a_vector_env():
    for n in (0, -1, 2.5, True, "2", None):
        refused(TextGenerationVectorEnv, n, **arguments(), error=ValueError, match="num_envs=")
    for mode in ("next_step", None, 3, "", []):
        refused(TextGenerationVectorEnv, 2, **arguments(), autoreset_mode=mode, match="autoreset_mode=")


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize("env_id", ["llm_env/Addition-v0", "llm_env/Countdown-v0", "llm_env/Continuation-v0"])
def test_an_unknown_keyword_is_named(make, env_id):
    with pytest.raises(TypeError, match="has no argument 'max_token'; did you mean max_new_tokens"):
        make(env_id, max_token=3)


@pytest.mark.parametrize(
    ("task", "name", "values"),
    [
        ("Addition", "largest", [-1, 2.5, "9", True, None]),
        ("Countdown", "size", [0, 2.5, "9", True, None]),
        ("Countdown", "count", [1, (3,), (4, 3), "34", 3.5, None, True, (3, 4, 5), (2.5, 3)]),
        ("Countdown", "smallest", [-1, "a", 100, None]),
        ("Countdown", "largest_target", [0, 1.5, None]),
    ],
)
def test_arguments_of_tasks(task, name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name}=|largest=" if name == "smallest" else f"{name}="):
            gym.make(f"llm_env/{task}-v0", **{name: value})


def test_a_vocabulary_of_half_a_million():
    tokenizer = make_tokenizer([chr(0x10000 + i) for i in range(500_000)])
    venv = TextGenerationVectorEnv(2, [chr(0x10000)], lambda completions: [float(len(c)) for c in completions], tokenizer)
    venv.reset()
    outcome = venv.step_responses([[500_002, EOS], [3, 4, EOS]])
    assert [info["completion"] for info in outcome.infos] == [chr(0x10000 + 499_999), chr(0x10000) + chr(0x10001)]
    venv.reset()
    refused(venv.step, [500_003, 3], match=r"action 500003 in row 0 is not a token id: the vocabulary is 0\.\.500002")
    assert venv.action_masks().shape == (2, 500_003)
