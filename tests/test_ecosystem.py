"""Gymnasium's tools around the envs: vector wrappers, autoreset modes, its own vectorizers, and the flat observation."""

import multiprocessing
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector as vector_wrappers
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from agents import TextVecEnv
from agents.vec_env import rows_of
from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from tests.test_agents import TOKENIZER, make_agent, same, weights

EOS, A, B = 0, 3, 4
MODES = list(AutoresetMode)
NOT_SAME_STEP = [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]  # Gymnasium's observation wrappers refuse SAME_STEP

# TorchRL, once imported, makes "spawn" the default, and every worker would load torch anew.
FORK = {"context": "fork"} if "fork" in multiprocessing.get_all_start_methods() else {}

# Two episodes a row; `value` pays 1 for an a and 0.25 for a b, so that returns, lengths and kinds of end are known by hand.
PLANS = [[[A, A, EOS], [EOS]], [[B, B, A, A], [A, EOS]]]
RETURNS, LENGTHS = [[2.0, 0.0], [2.5, 1.0]], [[3, 1], [4, 2]]
ENDS = [[(True, False), (True, False)], [(False, True), (True, False)]]
TEXTS = [["aa", ""], ["bbaa", "a"]]


def value(completions, **kwargs):
    return [c.count("a") + c.count("b") / 4 for c in completions]


def arguments(**kwargs):
    return dict(prompts=["a", "bc"], reward=value, tokenizer=TOKENIZER, max_prompt_tokens=2, max_new_tokens=4) | kwargs


def make(mode=AutoresetMode.NEXT_STEP, n=2, **kwargs):
    return TextGenerationVectorEnv(n, **arguments(**kwargs), autoreset_mode=mode)


def play(env, plans=PLANS, seed=0):
    """Every row's episodes under the env's autoreset mode: `(steps, ends)`.

    `steps` has one (observation, rewards, live) a step, live being the rows whose action counted; `ends` one dict an episode
    and row: return, length, (terminated, truncated), last info, and the statistics that a wrapper left under `episode`.
    """
    mode, steps, ends = env.metadata["autoreset_mode"], [], [[] for _ in plans]
    queues = [[list(response) for response in plan] for plan in plans]
    env.reset(seed=seed)
    returns, lengths, resetting = np.zeros(len(plans)), np.zeros(len(plans), dtype=int), np.zeros(len(plans), dtype=bool)
    while any(queues):
        live = np.array([bool(queue) for queue in queues]) & ~resetting
        actions = np.array([queue[0].pop(0) if now else B for queue, now in zip(queues, live, strict=True)])
        observation, rewards, terminated, truncated, infos = env.step(actions)
        steps.append((observation, np.asarray(rewards).tolist(), live.tolist()))
        returns, lengths = returns + rewards * live, lengths + live
        done = terminated | truncated
        for row in np.flatnonzero(done & live):
            queues[row].pop(0)
            info = infos if isinstance(infos, dict) else infos[row]
            episode = {key: v[row] for key, v in info["episode"].items()} if "episode" in info else None
            last = info["final_info"] if mode is AutoresetMode.SAME_STEP else info
            if isinstance(infos, dict):
                last = {k: v[row] for k, v in last.items() if f"_{k}" in last and last[f"_{k}"][row] and k != "episode"}
            kind = (bool(terminated[row]), bool(truncated[row]))
            ends[row].append(dict(r=returns[row], l=lengths[row], kind=kind, info=last, episode=episode))
            returns[row] = lengths[row] = 0
        resetting = done if mode is AutoresetMode.NEXT_STEP else resetting & False
        if mode is AutoresetMode.DISABLED and done.any():
            env.reset(options={"reset_mask": done})
    return steps, ends


def column(ends, key):
    return [[end[key] for end in row] for row in ends]


def completions(ends):
    return column(column(ends, "info"), "completion")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=r".*multi-threaded, use of fork", category=DeprecationWarning)
        yield


# --- Gymnasium's vector wrappers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("observation", ["dict", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_record_episode_statistics(mode, observation):
    env = vector_wrappers.RecordEpisodeStatistics(make(mode, observation=observation))
    _, ends = play(env)
    for found in (ends, column(ends, "episode")):
        assert column(found, "r") == RETURNS and column(found, "l") == LENGTHS
    assert column(ends, "kind") == ENDS
    assert completions(ends) == TEXTS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wrap", "expected"),
    [
        (lambda env: vector_wrappers.TransformReward(env, lambda r: 3 * r), [[6.0, 0.0], [7.5, 3.0]]),
        (lambda env: vector_wrappers.ClipReward(env, 0.5, 1.5), [[2.5, 0.5], [3.0, 1.5]]),  # every step pays at least 0.5
        (
            lambda env: vector_wrappers.VectorizeTransformReward(env, gym.wrappers.TransformReward, func=lambda r: r - 1),
            [[-1.0, -1.0], [-1.5, -1.0]],
        ),
    ],
    ids=["TransformReward", "ClipReward", "VectorizeTransformReward"],
)
def test_reward_wrappers(wrap, expected, mode):
    _, ends = play(wrap(make(mode)))
    assert column(ends, "r") == expected


@pytest.mark.parametrize("mode", MODES)
def test_normalize_reward(mode):
    """Against the pooled variance of all discounted sums so far, and of the weight 1e-4 with variance 1 that it begins with."""
    plans = [[[A, A, EOS], [B, EOS]], [[B, A, EOS], [A, EOS]]]  # rows end together: a reset of some rows clears all its sums
    steps, _ = play(vector_wrappers.NormalizeReward(make(mode), gamma=0.9), plans)
    raw, _ = play(make(mode), plans)
    sums, seen, taken = np.zeros(2), [], 0
    for (_, rewards, live), (_, paid, _) in zip(steps, raw, strict=True):
        if any(live):
            taken += 1
            final = taken in (3, 5)
            sums = sums * 0.9 * (not final) + paid
            seen += sums.tolist()
            if mode is not AutoresetMode.NEXT_STEP:  # there Gymnasium carries the last reward into the next episode's sum
                sums = sums * (not final)
        n = len(seen) + 1e-4
        variance = (1e-4 + np.sum(np.square(seen))) / n - (np.sum(seen) / n) ** 2
        np.testing.assert_allclose(rewards, np.array(paid) / np.sqrt(variance + 1e-8), rtol=1e-5)
    assert [paid for _, paid, _ in raw if any(paid)] == [[2.0, 1.25], [0.25, 1.0]]


@pytest.mark.parametrize("mode", MODES)
def test_dict_info_to_list(mode):
    _, ends = play(vector_wrappers.DictInfoToList(make(mode, prompts=["a"])))
    first = {"prompt": "a", "completion": "bbaa", "prompt_index": 0, "turns": 1, "reward/value": 2.5}
    assert ends[1][0]["info"] == first and ends[0][1]["info"]["completion"] == ""


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("vectorized", [False, True], ids=["TransformAction", "VectorizeTransformAction"])
def test_action_wrappers(vectorized, mode):
    swap = np.arange(len(TOKENIZER))
    swap[[A, B]] = B, A
    env = make(mode)
    if vectorized:
        env = vector_wrappers.VectorizeTransformAction(
            env, gym.wrappers.TransformAction, func=lambda token: swap[token], action_space=env.single_action_space
        )
    else:
        env = vector_wrappers.TransformAction(env, lambda tokens: swap[tokens])
    _, ends = play(env)
    assert completions(ends) == [["bb", ""], ["aabb", "b"]]


@pytest.mark.parametrize("mode", NOT_SAME_STEP)
def test_observation_wrappers(mode):
    plain, _ = play(make(mode))
    flat, _ = play(make(mode, observation="flat"))
    env = make(mode)
    counts = gym.spaces.Box(0, 6, (), np.int64)
    wrapped = {
        "count": vector_wrappers.TransformObservation(
            env, lambda o: o["attention_mask"].sum(1), single_observation_space=counts
        ),
        "ids": vector_wrappers.FilterObservation(make(mode), ["input_ids"]),
        "both": vector_wrappers.FlattenObservation(make(mode)),
        "float": vector_wrappers.DtypeObservation(make(mode, observation="flat"), np.float32),
    }
    seen = {name: [step[0] for step in play(env)[0]] for name, env in wrapped.items()}
    for t, (observation, _, _) in enumerate(plain):
        mask, ids = observation["attention_mask"], observation["input_ids"]
        assert np.array_equal(seen["count"][t], mask.sum(1))
        assert seen["ids"][t].keys() == {"input_ids"} and np.array_equal(seen["ids"][t]["input_ids"], ids)
        assert np.array_equal(seen["both"][t], np.concatenate([mask, ids], 1))
        assert seen["float"][t].dtype == np.float32 and np.array_equal(seen["float"][t], flat[t][0])
    first_steps = [seen["count"][t].tolist() for t in range(3)]
    assert np.diff(first_steps, axis=0).tolist() == [[1, 1], [1, 1]]


# --- Gymnasium's own vectorizers -------------------------------------------------------------------------------------


def same_steps(envs, tokens, seed):
    """Whether all envs give the same observations, rewards, ends and infos for the same random tokens."""
    mode, rng = envs[0].metadata["autoreset_mode"], np.random.default_rng(seed)
    n, outcomes = envs[0].num_envs, [env.reset(seed=seed) for env in envs]
    endings = 0
    for _ in range(30):
        assert all(data_equivalence(outcome, outcomes[0]) for outcome in outcomes[1:])
        actions = rng.choice(tokens, n)
        outcomes = [env.step(actions) for env in envs]
        for outcome in outcomes[1:]:  # `data_equivalence` does not look into arrays of objects
            final, expected = ([row for row in o[4].get("final_obs", [])] for o in (outcome, outcomes[0]))
            assert len(final) == len(expected)
            assert all(data_equivalence(*pair) for pair in zip(final, expected, strict=True))
        done = outcomes[0][2] | outcomes[0][3]
        endings += done.sum()
        if mode is AutoresetMode.DISABLED and done.any():
            assert all(np.array_equal(outcome[2] | outcome[3], done) for outcome in outcomes)
            outcomes = [env.reset(options={"reset_mask": done.copy()}) for env in envs]
    for env in envs:
        env.close()
    return endings


@pytest.mark.parametrize("observation", ["dict", "flat"])
@pytest.mark.parametrize("mode", MODES)
def test_the_native_vector_env_gives_the_episodes_of_gymnasiums_vectorizers(mode, observation):
    makers = [lambda: TextGenerationEnv(**arguments(prompts=list("abcdefgh"), observation=observation)) for _ in range(3)]
    native = make(mode, 3, prompts=list("abcdefgh"), observation=observation)
    others = [SyncVectorEnv(makers, autoreset_mode=mode), AsyncVectorEnv(makers, autoreset_mode=mode, **FORK)]
    assert all(other.observation_space == native.observation_space for other in others)
    assert same_steps([native, *others], [EOS, A, B], 5) > 10


@pytest.mark.parametrize("env_id", ["llm_env/Addition-v0", "llm_env/Continuation-v0"])
def test_make_vec_gives_the_same_episodes_in_every_vectorization_mode(env_id):
    native = gym.make_vec(env_id, 3)
    assert isinstance(native, TextGenerationVectorEnv)
    others = [gym.make_vec(env_id, 3, vectorization_mode=m, vector_kwargs=k) for m, k in (("sync", {}), ("async", FORK))]
    assert same_steps([native, *others], [native.rules.eos_id, 5, 9, 12], 11) > 10


def test_an_env_made_from_its_spec_matches_by_gymnasiums_own_check():
    env = gym.make("llm_env/Addition-v0", observation="flat", render_mode="ansi")
    check_environments_match(env, gym.make(env.spec), num_steps=40, seed=3)


# --- the flat observation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checker", [check_env, sb3_check_env], ids=["gymnasium", "sb3"])
@pytest.mark.parametrize("env_id", ["llm_env/Addition-v0", "llm_env/Continuation-v0", "llm_env/GSM8K-v0"])
def test_the_checkers_accept_flat_observations_without_warnings(checker, env_id, tmp_path):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "2+3?", "answer": "#### 5"}\n{"question": "2+4?", "answer": "#### 6"}\n')
    kwargs = {"path": str(path)} if "GSM8K" in env_id else {}
    checker(gym.make(env_id, observation="flat", **kwargs).unwrapped)


def test_a_flat_episode_by_hand():
    env = TextGenerationEnv(**arguments(observation="flat"))
    assert env.observation_space == gym.spaces.Box(-1, len(TOKENIZER) - 1, (6,), np.int64)
    assert env.reset(options={"index": 1})[0].tolist() == [B, 5, -1, -1, -1, -1]
    assert env.step(A)[0].tolist() == [B, 5, A, -1, -1, -1]
    observation, reward, terminated, truncated, _ = env.step(EOS)
    assert (observation.tolist(), reward, terminated, truncated) == ([B, 5, A, EOS, -1, -1], 1.0, True, False)
    assert observation.dtype == np.int64 and env.observation_space.contains(observation)
    with pytest.raises(ValueError, match=r"observation='image' must be one of \('dict', 'flat'\)"):
        TextGenerationEnv(**arguments(observation="image"))


def test_the_flat_form_holds_what_the_dict_holds_in_the_final_observation_too():
    envs = [make(AutoresetMode.SAME_STEP, observation=form) for form in ("dict", "flat")]
    envs += [TextVecEnv(make(observation=form)) for form in ("dict", "flat")]
    for env in envs[2:]:
        env.seed(0)
    for env in envs:
        env.reset(**({"seed": 0} if isinstance(env, TextGenerationVectorEnv) else {}))
    for _ in range(6):
        results = [env.step(np.array([A, EOS])) for env in envs]
        for dicts, flats in (results[:2], results[2:]):
            assert rows_of(dicts[0]) == rows_of(flats[0])
            assert (flats[0] >= 0).tolist() == dicts[0]["attention_mask"].astype(bool).tolist()
        finals = [result[4]["final_obs"][1] for result in results[:2]]
        finals += [result[3][1]["terminal_observation"] for result in results[2:]]
        for a, b in (finals[:2], finals[2:]):
            ids = a["input_ids"][a["attention_mask"] == 1].tolist()
            assert b[b >= 0].tolist() == ids and ids[-1] == EOS


def test_predict_and_rows_of_read_both_forms():
    agent = make_agent("GRPO", scale=3.0)
    forms = [TextGenerationEnv(**arguments(observation=form)).reset(options={"index": 1})[0] for form in ("dict", "flat")]
    tokens = [agent.predict(observation, deterministic=True)[0] for observation in forms]
    assert tokens[0] == tokens[1] and tokens[1].shape == ()
    batch, _ = agent.predict(np.stack([forms[1], forms[1]]), deterministic=True)
    assert batch.tolist() == [tokens[0]] * 2
    for wrong in ({"ids": forms[1]}, forms[1].astype(float), "ab"):
        with pytest.raises(ValueError, match="or an integer array with -1 for padding"):
            rows_of(wrong)
    with pytest.raises(ValueError, match="row 1 of the observation holds no token"):
        rows_of(np.array([[A, -1], [-1, -1]]))


@pytest.mark.parametrize("wrapped", [False, True], ids=["response clock", "token clock"])
def test_a_flat_env_teaches_exactly_what_a_dict_env_teaches(wrapped):
    agents = []
    for form in ("dict", "flat"):
        env = TextGenerationEnv(**arguments(observation=form))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            agent = make_agent("PPO", env=gym.wrappers.TransformReward(env, lambda r: 2 * r) if wrapped else env, n_envs=8)
        before = weights(agent)
        agents.append(agent.learn(60))
        assert not same(before, weights(agent))
    assert same(weights(agents[0]), weights(agents[1]))
    with pytest.raises(ValueError, match="Observation spaces do not match"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agents[0].set_env(agents[1].env)
