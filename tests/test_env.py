"""The env by itself: Gymnasium's contract, the rules of an episode, bad input."""

import copy
import pickle
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import llm_env
from llm_env import TextGenerationEnv
from tests.conftest import make_model

EOS, PAD, A, B = 0, 1, 3, 4  # ids in the tests' tokenizer


def count_a(completions, **kwargs):
    return [float(c.count("a")) for c in completions]


def make(tokenizer, prompts=("ab", "c", "abc"), reward=count_a, **kwargs):
    return TextGenerationEnv(list(prompts), reward, tokenizer, **{"max_prompt_tokens": 4, "max_new_tokens": 3, **kwargs})


def play(env, actions, **reset):
    env.reset(**reset)
    return [env.step(action)[1:] for action in actions]


@pytest.mark.parametrize("checker", [check_env, sb3_check_env], ids=["gymnasium", "sb3"])
@pytest.mark.parametrize(
    "env_id",
    ["llm_env/Addition-v0", "llm_env/Continuation-v0", "llm_env/Countdown-v0", "llm_env/GSM8K-v0", "llm_env/ReasoningGym-v0"],
)
def test_registered_envs_pass_the_checkers_without_warnings(checker, env_id, tmp_path):
    if "ReasoningGym" in env_id:
        pytest.importorskip("reasoning_gym")
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"question": "2+3?", "answer": "#### 5"}\n{"question": "2+4?", "answer": "#### 6"}\n')
    kwargs = {"path": str(path)} if "GSM8K" in env_id else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checker(gym.make(env_id, **kwargs).unwrapped)
        checker(gym.make(f"llm_env:{env_id}", render_mode="ansi", **kwargs).unwrapped)


def test_an_episode_by_hand(tokenizer):
    env = make(tokenizer)
    observation, info = env.reset(options={"index": 1})
    assert observation["input_ids"].tolist() == [5, PAD, PAD, PAD, PAD, PAD, PAD] and info == {}
    assert observation["attention_mask"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    observation, *rest = env.step(A)
    assert observation["input_ids"].tolist() == [5, A, PAD, PAD, PAD, PAD, PAD]
    assert observation["attention_mask"].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert rest == [0.0, False, False, {}]
    observation, *rest = env.step(EOS)
    assert rest == [1.0, True, False, {"prompt": "c", "completion": "a", "prompt_index": 1, "turns": 1, "reward/count_a": 1.0}]
    assert type(rest[0]) is float and type(rest[1]) is bool and type(rest[2]) is bool


@pytest.mark.parametrize(
    ("actions", "terminated", "truncated", "reward"),
    [
        ([A, A, A], False, True, 3.0),  # the length limit: scored all the same
        ([A, A, EOS], True, False, 2.0),  # the end token as the last allowed token terminates
        ([EOS], True, False, 0.0),
    ],
)
def test_ends(actions, terminated, truncated, reward, tokenizer):
    assert play(make(tokenizer), actions)[-1][:3] == (reward, terminated, truncated)


def test_the_end_token_ends_when_it_is_the_padding_too():
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    env = make(tokenizer)
    observation, _ = env.reset(options={"index": 0})
    assert observation["attention_mask"].sum() == 2
    observation, *_ = env.step(EOS)
    assert observation["attention_mask"].sum() == 3  # the end token counts, the padding does not
    assert env.reset()[0]["attention_mask"].sum() in (1, 2, 3)


@pytest.mark.parametrize(("stop", "actions"), [("ba", [A, B, A]), (["h", "b"], [A, B]), ("aa", [A, A])])
def test_a_stop_string_terminates_with_the_token_that_completes_it(stop, actions, tokenizer):
    steps = play(make(tokenizer, stop=stop, max_new_tokens=5), actions)
    assert [step[1] for step in steps] == [False] * (len(actions) - 1) + [True]
    assert steps[-1][3]["completion"] == "".join({A: "a", B: "b"}[a] for a in actions)


def test_a_stop_string_in_the_prompt_does_not_count(tokenizer):
    env = make(tokenizer, prompts=["ab"], stop="ba")
    assert [step[1] for step in play(env, [A, A])] == [False, False]


def test_stop_strings_over_real_subwords(stories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories)
    text = "the little dog ran. Then"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    env = make(tokenizer, prompts=["Once"], stop=". T", max_prompt_tokens=8, max_new_tokens=32)
    decoded = [tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    last = next(i for i, prefix in enumerate(decoded) if ". T" in prefix)
    assert 0 < last < len(ids) - 1  # the text goes on after the stop string
    assert [step[1] for step in play(env, ids[: last + 1])] == [False] * last + [True]


def test_the_same_seed_gives_the_same_prompts_and_each_comes_once(tokenizer):
    env = make(tokenizer, prompts=list("abcdefgh"))

    def order(seed, n=8):
        first = [env.reset(seed=seed)[0]["input_ids"][0]]
        return first + [env.reset()[0]["input_ids"][0] for _ in range(n - 1)]

    assert order(3) == order(3)
    assert len(set(order(3))) == 8
    assert order(3) != order(4)


def test_success_and_components(tokenizer):
    def right(completions, answer, **kwargs):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    rows = [{"prompt": "a", "answer": "b"}]
    env = make(tokenizer, prompts=rows, reward=[right, count_a], reward_weights=[2.0, 0.5], success="right")
    reward, _, _, info = play(env, [B, EOS])[-1]
    assert reward == 2.0 and info["is_success"] is True and info["reward/right"] == 1.0 and info["reward/count_a"] == 0.0
    reward, _, _, info = play(env, [A, EOS])[-1]
    assert reward == 0.5 and info["is_success"] is False


def test_render_shows_text_and_components(tokenizer):
    env = make(tokenizer, prompts=["ab"], render_mode="ansi")
    assert env.render() == ""
    play(env, [A])
    assert env.render() == "aba"
    env.step(EOS)
    assert env.render() == "aba\nreward/count_a: 1"


def test_what_was_told_of_an_action_holds_until_the_action_is_taken(tokenizer):
    broken = [True]

    def sometimes(completions):
        if broken[0]:
            raise RuntimeError("boom")
        return [0.0]

    model = make_model("llama", len(tokenizer))
    env = make(tokenizer, reward=sometimes, reference=model, kl_coef=1.0)
    env.reset(seed=0)
    env.set_action_logprob(-1.0)
    with pytest.raises(ValueError, match="boom"):
        env.step(0)
    broken[0] = False
    _, reward, *_, info = env.step(0)
    assert reward == pytest.approx(1.0 + info["ref_logprob"]) and info["kl"] == pytest.approx(-reward)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"])
def test_a_copy_meets_the_prompts_that_the_env_would_have_met_and_leaves_it_alone(tokenizer, copied):
    prompts = [f"{a}{b}" for a in "abc" for b in "abc"]

    def met(env):
        return [env.reset()[0]["input_ids"][..., :2].tolist() for _ in range(30)]

    for env in (make(tokenizer, prompts), make(tokenizer, prompts).vectorize(2)):
        env.reset(seed=0)
        twins = copied(env), copied(env)
        assert met(twins[0]) == met(twins[1]) == met(env)


def test_what_was_told_before_a_reset_is_forgotten(tokenizer):
    env = make(tokenizer, reference=make_model("llama", len(tokenizer)), kl_coef=1.0)
    venv = env.vectorize(1)
    expected = play(env, [A], options={"index": 0})[0][0]
    for told in (False, True):
        venv.reset(options={"index": 0})
        assert venv.step(np.array([A]))[1] == pytest.approx([expected])
        if not told:
            venv.set_action_logprob(0, -1.0)


def test_a_failing_reward_loses_nothing(tokenizer):
    fails = [True]

    def sometimes(completions):
        if fails[0]:
            raise RuntimeError("no network")
        return [7.0]

    env = make(tokenizer, reward=sometimes)
    env.reset(options={"index": 0})
    env.step(A)
    with pytest.raises(ValueError, match="'sometimes' raised RuntimeError: no network"):
        env.step(EOS)
    fails[0] = False
    observation, reward, terminated, _, info = env.step(EOS)
    assert (reward, terminated, info["completion"]) == (7.0, True, "a")
    assert observation["attention_mask"].sum() == 4


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0 must be"),
        ({"max_prompt_tokens": 2.5}, ValueError, "max_prompt_tokens=2.5 must be"),
        ({"stop": [""]}, ValueError, "none of them empty"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef=0.1 needs a reference"),
        ({"success": "right"}, ValueError, r"success='right' is not one of the reward components \['count_a'\]"),
        ({"render_mode": "human"}, TypeError, "render_mode='human' must be None or one of"),
        ({"split": "dev"}, ValueError, "split='dev' must be"),
        ({"long_prompts": "cut"}, ValueError, "long_prompts='cut' must be"),
        ({"reference": 3}, TypeError, "reference is a int"),
    ],
)
def test_bad_arguments(kwargs, error, message, tokenizer):
    with pytest.raises(error, match=message):
        make(tokenizer, **kwargs)


def test_a_tokenizer_without_an_end_token_is_refused(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end token: set tokenizer\.eos_token"):
        make(tokenizer)


def test_bad_actions(tokenizer):
    env = make(tokenizer)
    with pytest.raises(ValueError, match=r"call reset\(\)"):
        env.step(A)
    env.reset()
    for action in (-1, len(tokenizer)):
        with pytest.raises(ValueError, match=f"action {action} in row 0 is not a token id"):
            env.step(action)
    env.step(EOS)
    with pytest.raises(ValueError, match=r"row 0 has ended.*call reset\(\)"):
        env.step(A)
    with pytest.raises(ValueError, match=r"index=3 is out of range: this env has the prompts 0\.\.2"):
        env.reset(options={"index": 3})


def test_gsm8k_needs_its_path():
    with pytest.raises(ValueError, match=r"needs path="):
        gym.make("llm_env/GSM8K-v0")


def test_gsm8k_rows(gsm8k):
    env = gym.make("llm_env/GSM8K-v0", path=str(gsm8k / "test.jsonl"))
    assert len(env.unwrapped.rules.prompts) == 1319
    assert env.unwrapped.rules.prompts.texts[0].startswith("Janet\u2019s ducks lay 16 eggs per day.")
    env.reset(options={"index": 0})
    for character in "#### 18":
        (token,) = env.unwrapped.rules.tokenizer(character)["input_ids"]
        env.step(token)
    reward, terminated, _, info = env.step(env.unwrapped.rules.eos_id)[1:]
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


def test_the_spec_can_be_written_and_made_again():
    env = gym.make("llm_env/Addition-v0", split="test")
    again = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.rules.prompts.texts == env.unwrapped.rules.prompts.texts


def test_observations_are_the_users_to_keep(tokenizer):
    env = make(tokenizer)
    first, _ = env.reset(options={"index": 0})
    kept = {key: value.copy() for key, value in first.items()}
    env.step(A)
    assert all(np.array_equal(first[key], kept[key]) for key in kept)
    first["input_ids"][:] = -1
    assert env.step(A)[0]["input_ids"].min() >= 0


def test_public_names():
    assert llm_env.TextGenerationEnv and llm_env.TextGenerationVectorEnv and llm_env.PUPIL
