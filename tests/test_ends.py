"""What an end does to the score, steps paid at their tokens, and what render says of them; numbers by hand."""

import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_env import TextGenerationEnv, process_reward
from llm_env.penalties import EndPenalties
from tests.conftest import make_model, make_tokenizer

TOKENIZER = make_tokenizer("abc")
EOS, A, B, C = 0, 3, 4, 5


def count_a(completions, **kwargs):
    return [float(c.count("a")) for c in completions]


def make(reward=count_a, prompts=("abcabcab",), **kwargs):
    kwargs = {"max_prompt_tokens": 8, "max_new_tokens": 4, **kwargs}
    return TextGenerationEnv(list(prompts), reward, TOKENIZER, **kwargs)


def play(env, tokens):
    env.reset(seed=0)
    steps = [env.step(token) for token in tokens]
    return [step[1] for step in steps], steps[-1][4]


@pytest.mark.parametrize(
    ("kwargs", "tokens", "paid", "components"),
    [
        ({}, [A, A, A, A], 4.0, {}),
        ({"length_stop": "zero"}, [A, A, A, A], 0.0, {}),
        ({"length_stop": "zero"}, [A, A, A, EOS], 3.0, {}),
        ({"missing_eos_penalty": 1.5}, [A, A, A, A], 2.5, {"reward/missing_eos": -1.5}),
        ({"missing_eos_penalty": 1.5}, [A, A, EOS], 2.0, {"reward/missing_eos": 0.0}),
        ({"missing_eos_penalty": 1.5, "stop": "ab"}, [A, B], 1.0, {"reward/missing_eos": 0.0}),
        # a buffer of 2 of 4: no penalty up to 2 tokens, half of it at 3, all at 4
        ({"overlong_buffer": 2}, [A, EOS], 1.0, {"reward/overlong": 0.0}),
        ({"overlong_buffer": 2}, [A, A, EOS], 1.5, {"reward/overlong": -0.5}),
        ({"overlong_buffer": 2}, [A, A, A, A], 3.0, {"reward/overlong": -1.0}),
        ({"overlong_buffer": 4, "overlong_penalty": 0.8}, [A, EOS], 0.6, {"reward/overlong": -0.4}),
        (
            {"overlong_buffer": 2, "missing_eos_penalty": 2.0, "length_stop": "zero"},
            [A, A, A, A],
            -3.0,
            {"reward/overlong": -1.0, "reward/missing_eos": -2.0},
        ),
    ],
)
@pytest.mark.parametrize("clock", ["token", "response"])
def test_ends_by_hand_whatever_the_length_of_the_prompt(clock, kwargs, tokens, paid, components):
    for prompts in (("a",), ("abcabcab",)):
        env = make(prompts=prompts, **kwargs)
        if clock == "token":
            rewards, info = play(env, tokens)
        else:
            venv = env.vectorize(1)
            venv.reset(seed=0)
            outcome = venv.step_responses([tokens])
            rewards, info = outcome.rewards[0].tolist(), outcome.infos[0]
        assert rewards[:-1] == [0.0] * (len(tokens) - 1) and rewards[-1] == pytest.approx(paid)
        assert {k: v for k, v in info.items() if k.startswith("reward/")} == {
            "reward/count_a": float(tokens.count(A)),
            **{key: pytest.approx(value) for key, value in components.items()},
        }


def test_what_is_cut_off_and_paid_nothing_is_no_success():
    def wrote_a(completions):
        return [float("a" in c) for c in completions]

    for stop, expected in (("score", True), ("zero", False)):
        assert play(make(wrote_a, success="wrote_a", length_stop=stop), [A, A, A, A])[1]["is_success"] is expected
        assert play(make(wrote_a, success="wrote_a", length_stop=stop), [A, EOS])[1]["is_success"] is True


def test_the_overlong_penalty_is_dapos():
    """Equation 13 of arXiv 2503.14476 with L_max = 10 and L_cache = 4, at every length."""
    lengths = np.arange(1, 11)
    expected = [0.0 if n <= 6 else (6 - n) / 4 for n in lengths]
    _, penalties = EndPenalties(10, overlong_buffer=4).apply(np.zeros(10), lengths, lengths == 10)
    assert penalties["overlong"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"length_stop": "overlong"}, "length_stop='overlong' must be 'score' or 'zero'"),
        ({"overlong_buffer": 5}, "overlong_buffer=5 must be a whole number of at least 0, at most 4"),
        ({"overlong_buffer": 1.5}, "overlong_buffer=1.5"),
        ({"overlong_buffer": True}, "overlong_buffer=True"),
        ({"overlong_penalty": "x"}, "overlong_penalty='x' must be a finite number"),
        ({"overlong_penalty": -1}, "overlong_penalty=-1 must be a finite number of at least 0"),
        ({"missing_eos_penalty": float("nan")}, "missing_eos_penalty=nan"),
    ],
)
def test_bad_ends_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**kwargs)


def test_a_reward_cannot_take_the_name_of_a_penalty_in_use():
    def overlong(completions):
        return [5.0 for _ in completions]

    assert play(make(overlong), [EOS])[1]["reward/overlong"] == 5.0
    with pytest.raises(ValueError, match="the name 'overlong', under which a penalty is reported; rename it"):
        make(overlong, overlong_buffer=2)


# --- process rewards --------------------------------------------------------------------------------------------------


def steps_of_b(completion_ids, **kwargs):
    return [[(i, 1.0 + i) for i, token in enumerate(ids) if token == B] for ids in completion_ids]


live_b = process_reward(lambda completion_ids, **kwargs: steps_of_b(completion_ids))


def test_steps_are_paid_at_their_tokens_and_the_outcome_with_the_last():
    venv = make([steps_of_b, count_a], reward_weights=[0.5, 10.0]).vectorize(2)
    venv.reset(seed=0)
    outcome = venv.step_responses([[B, A, B, EOS], [A, C, EOS]])
    assert outcome.rewards[0].tolist() == [0.5, 0.0, 1.5, 10.0]
    assert outcome.rewards[1].tolist() == [0.0, 0.0, 10.0]
    assert outcome.infos[0]["reward/steps_of_b"] == 4.0 and outcome.infos[1]["reward/steps_of_b"] == 0.0


def test_on_the_token_clock_a_marked_reward_pays_at_once_and_another_at_the_end():
    assert play(make(live_b), [B, A, B, EOS])[0] == [1.0, 0.0, 3.0, 0.0]
    assert play(make(steps_of_b), [B, A, B, EOS])[0] == [0.0, 0.0, 0.0, 4.0]
    assert play(make(live_b, length_stop="zero"), [B, A, A, B])[0] == [1.0, 0.0, 0.0, 4.0]  # steps earned stay earned


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([A, B, C]), max_size=5), st.integers(0, 5), st.booleans())
def test_a_marked_reward_pays_alike_however_the_response_is_cut(tokens, cut, ends):
    tokens = [*tokens, EOS] if ends or not tokens else tokens
    env = make([live_b, count_a], max_new_tokens=max(len(tokens), 1))
    whole, parts = env.vectorize(1), env.vectorize(1)
    for venv in (whole, parts):
        venv.reset(seed=0)
    expected = whole.step_responses([tokens]).rewards[0].tolist()
    cut = min(cut, len(tokens))
    got = (
        [*parts.step_responses([tokens[:cut]]).rewards[0], *parts.step_responses([tokens[cut:]]).rewards[0]]
        if (cut < len(tokens))
        else parts.step_responses([tokens]).rewards[0]
    )
    assert list(got) == expected == play(env, tokens)[0]


def test_methods_can_be_marked_and_the_unmarked_function_stays_as_it_is():
    class Judge:
        def steps(self, completion_ids):
            return steps_of_b(completion_ids)

        def __call__(self, completion_ids):
            return steps_of_b(completion_ids)

    for function in (Judge().steps, Judge(), steps_of_b):
        assert play(make(process_reward(function)), [B, A, B, EOS])[0] == [1.0, 0.0, 3.0, 0.0]
        assert play(make(function), [B, A, B, EOS])[0] == [0.0, 0.0, 0.0, 4.0]
    assert list(make(process_reward(Judge())).rules.rewards.names) == ["Judge"]


def test_a_mark_that_is_not_true_is_noticed():
    liar = process_reward(lambda completion_ids: [[(0, float(len(ids)))] for ids in completion_ids])
    env = make(liar)
    env.reset(seed=0)
    assert env.step(A)[1] == 1.0
    with pytest.raises(ValueError, match=r"was paid 1 for the first 1 tokens and now says 2.*take the mark off"):
        env.step(A)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(3, 1.0)], r"a step that ends at token 3 for row 0, whose completion has the tokens 0\.\.2"),
        ([(-1, 1.0)], "ends at token -1"),
        ([(1, 1.0), (1, 2.0)], "ends must be different and in order"),
        ([(2, 1.0), (1, 2.0)], "ends must be different and in order"),
        ([(1, float("nan"))], "returned nan for row 0"),
        ([1.0, 2.0], r"a step is \(index of its last token, score\)"),
        ([(1.0, 2.0)], r"a step is \(index of its last token, score\)"),
    ],
)
def test_bad_steps_are_named(steps, message):
    env = make(lambda completions: [steps])
    env.reset(seed=0)
    env.step(A)
    env.step(A)
    with pytest.raises(ValueError, match=message):
        env.step(EOS)


def test_render_ends_with_components_and_the_kl_of_every_token():
    model = make_model("llama", len(TOKENIZER))
    env = make(prompts=("ab",), render_mode="ansi", reference=model, missing_eos_penalty=0.5)
    env.reset(seed=0)
    env.set_action_logprob(-1.25)
    env.step(A)
    assert env.render() == "aba"
    env.set_action_logprob(-0.5)
    env.step(EOS)
    ref = env.rules.reference.log_probs([[A, B]], [[A, EOS]])[0]
    lines = env.render().splitlines()
    assert lines[:3] == ["aba", "reward/count_a: 1", "reward/missing_eos: 0"] and len(lines) == 6
    assert lines[4].split() == ["'a'", "-1.2500", f"{ref[0]:.4f}", f"{-1.25 - ref[0]:.4f}"]
    assert lines[5].split() == ["'<eos>'", "-0.5000", f"{ref[1]:.4f}", f"{-0.5 - ref[1]:.4f}"]
    play(env, [A, EOS])
    assert env.render().splitlines()[4].split() == ["'a'", "-", f"{ref[0]:.4f}", "-"]  # log pi was not told


def test_a_vocabulary_without_the_end_token_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="llm_env"):
        make(allowed_tokens=[A])
    assert "does not have the end token 0" in caplog.text
