"""What reward functions may return and do, and what is refused."""

import numpy as np
import pytest
import torch

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.rewards import exact_match
from tests.conftest import make_tokenizer, refused

TOKENIZER = make_tokenizer("abc")
EOS, A = 0, 3
PROMPTS = ["a", "b", "c", "ab", "ba"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (None, "reward=None is a NoneType"),
        (3, "reward=3 is a int"),
        ("exact_match", "reward='exact_match' is a str"),
        ({exact_match: 1.0}, "reward=.* is a dict"),
        ([], "reward is an empty list"),
        ([exact_match, None], "reward None is a NoneType"),
        (exact_match, r"'exact_match' needs \['answer'\]"),
        (len, r"reward 'len' takes \['obj'\] by position only"),
        (lambda completions, /: [0.0], r"takes \['completions'\] by position only"),
    ],
)
def test_rewards_that_are_none(reward, message):
    refused(TextGenerationEnv, PROMPTS, reward, TOKENIZER, match=message)


def paid(reward, **kwargs):
    venv = TextGenerationVectorEnv(2, PROMPTS, reward, TOKENIZER, **kwargs)
    venv.reset(seed=0)
    return [row.tolist() for row in venv.step_responses([[A, EOS], [EOS]]).rewards]


class Series:
    """What pandas gives, as far as it matters: values, and an index that is not 0, 1."""

    ndim = 1

    def __iter__(self):
        return iter([1.0, 2.0])

    def __len__(self):
        return 2

    def __getitem__(self, key):
        return {7: 1.0, 9: 2.0}[key]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2],
        (1.0, 2.0),
        np.array([1.0, 2.0]),
        np.array([1, 2], dtype=np.uint8),
        [np.float16(1), np.int8(2)],
        [np.array(1.0), torch.tensor(2.0)],
        torch.tensor([1.0, 2.0]),
        torch.tensor([1, 2], dtype=torch.bfloat16),
        range(1, 3),
        {"a": 1.0, "b": 2.0}.values(),
        (x for x in (1.0, 2.0)),
        Series(),
        np.array([1.0, 2.0], dtype=object),
    ],
)
def test_numbers_of_every_kind_are_scores(values):
    assert paid(lambda completions: values) == [[0.0, 1.0], [2.0]]


def test_bools_are_scores_and_none_is_left_to_the_others():
    assert paid(lambda completions: [True, np.False_]) == [[0.0, 1.0], [0.0]]
    assert paid([lambda completions: [None, 3.0], lambda completions: [2.0, None]]) == [[0.0, 2.0], [3.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((2, 1)), "returned a ndarray of 2 dimensions"),
        (torch.ones(2, 1), "returned a Tensor of 2 dimensions"),
        (np.array(1.0), "returned a ndarray of 0 dimensions"),
        (np.ones(3), "returned 3 values for 2 completions"),
        (iter([1.0]), "returned 1 values for 2 completions"),
        ({1.0, 2.0}, "must return one number a completion"),
        ({0: 1.0, 1: 2.0}, "must return one number a completion"),
        ("12", "must return one number a completion"),
        (["1", "2"], "returned '1' for row 0"),
        ([1.0, b"2"], "returned b'2' for row 1"),
        ([1.0, 1j], "returned 1j for row 1"),
        ([10**400, 1], "for row 0"),
        ([1.0, np.nan], "returned nan for row 1"),
        ([None, None], "no reward function of .* scored row 0"),
        (None, "returned None for all 2"),
        ([1.0, 1e39], r"weighted sum of the rewards \['lambda'\] is 1e\+39 for row 1: agents hold rewards in float32"),
    ],
)
def test_what_is_no_score(values, message):
    refused(paid, lambda completions: values, error=ValueError, match=message)


def test_a_weight_cannot_make_a_score_infinite():
    with pytest.raises(ValueError, match="is -inf for row 0"):
        paid(lambda completions: [1e308] * 2, reward_weights=[-10.0])


def test_a_reward_may_spoil_what_it_is_given():
    def spoil(prompts, completions, completion_ids, numbers, nested):
        n = len(prompts)
        for given_to_it in (*numbers, *completion_ids, *nested, prompts, completions, completion_ids, numbers):
            given_to_it.clear()
        return [1.0] * n

    def see(prompts, completions, completion_ids, numbers, nested):
        seen.append((prompts, completions, completion_ids, numbers, nested))
        return [1.0] * len(prompts)

    seen = []
    rows = [{"prompt": "a", "numbers": [1, 2], "nested": {"x": [1]}}]
    venv = TextGenerationVectorEnv(2, rows, [spoil, see, spoil], TOKENIZER)
    for _ in range(2):
        venv.reset()
        outcome = venv.step_responses([[A, EOS], [EOS]])
        assert [(info["prompt"], info["completion"]) for info in outcome.infos] == [("a", "a"), ("a", "")]
        assert outcome.rewards[0].tolist() == [0.0, 3.0]
    assert seen == [(["a"] * 2, ["a", ""], [[A, EOS], [EOS]], [[1, 2]] * 2, [{"x": [1]}] * 2)] * 2
    assert rows == [{"prompt": "a", "numbers": [1, 2], "nested": {"x": [1]}}]
