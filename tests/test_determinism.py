"""The same seeds, the same episodes: whatever the number of rows, the clock, the autoreset mode, and across a resume."""

import json

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_env import TextGenerationEnv, TextGenerationVectorEnv
from llm_env.prompts import PromptTable
from llm_env.tasks.addition import AdditionProblems
from llm_env.tasks.countdown import CountdownProblems
from tests.conftest import make_tokenizer

TOKENIZER = make_tokenizer("abcdefgh")
EOS, A, LIMIT = 0, 3, 3


def vary(prompts, completions, **kwargs):
    """A score that tells prompts and completions apart."""
    return [ord(p) + len(c) / 8 for p, c in zip(prompts, completions, strict=True)]


def arguments(prompts):
    return {
        "prompts": prompts,
        "reward": vary,
        "tokenizer": TOKENIZER,
        "max_prompt_tokens": 1,
        "max_new_tokens": LIMIT,
    }


def single_episodes(prompts, seed, lengths):
    """(prompt index, return) of consecutive episodes of these lengths; the last of the longest is no end token."""
    env = TextGenerationEnv(**arguments(prompts))
    env.reset(seed=seed)
    episodes = []
    for length in lengths:
        for t in range(length):
            _, reward, terminated, truncated, info = env.step(EOS if t == length - 1 < LIMIT - 1 else A)
        assert terminated or truncated
        episodes.append((info["prompt_index"], reward))
        env.reset()
    return episodes


def vector_episodes(prompts, n, mode, seed, lengths):
    """The same of every row of a vector env, row i playing episodes of the lengths `lengths[i]` on the token clock."""
    venv = TextGenerationVectorEnv(n, **arguments(prompts), autoreset_mode=mode)
    venv.reset(seed=seed)
    episodes, written = [[] for _ in range(n)], np.zeros(n, dtype=int)
    begins = np.zeros(n, dtype=bool)
    while any(len(done) < len(wanted) for done, wanted in zip(episodes, lengths, strict=True)):
        # A row that has played all its episodes goes on with the longest ones.
        length = np.array([(wanted + [LIMIT] * 99)[len(done)] for done, wanted in zip(episodes, lengths, strict=True)])
        actions = np.where((written == length - 1) & (length < LIMIT), EOS, A)
        _, rewards, terminated, truncated, infos = venv.step(actions)
        over, written = terminated | truncated, np.where(begins, 0, written + 1)
        last = infos.get("final_info", infos) if mode is AutoresetMode.SAME_STEP else infos
        for row in np.flatnonzero(over):
            episodes[row].append((last["prompt_index"][row], rewards[row]))
        written[over] = 0
        begins = over if mode is AutoresetMode.NEXT_STEP else np.zeros(n, dtype=bool)
        if mode is AutoresetMode.DISABLED and over.any():
            venv.reset(options={"reset_mask": over})
    return [done[: len(wanted)] for done, wanted in zip(episodes, lengths, strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_row_i_lives_the_life_of_a_single_env_seeded_with_seed_plus_i(data):
    prompts = data.draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6))  # duplicates, too
    n = data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 2**40) | st.sampled_from([np.int64(2**63 - 1), np.uint8(255), 2**200]))
    lengths = [data.draw(st.lists(st.integers(1, LIMIT), min_size=1, max_size=8)) for _ in range(n)]
    expected = [single_episodes(prompts, int(seed) + i, lengths[i]) for i in range(n)]
    mode = data.draw(st.sampled_from(list(AutoresetMode)))
    assert vector_episodes(prompts, n, mode, seed, lengths) == expected


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_order_goes_on_from_a_state_taken_anywhere(data):
    """Through JSON and back, from the middle of epochs of rows and of groups, under way in episodes that are then given up."""
    prompts = list("abcdefgh")[: data.draw(st.integers(1, 8))]
    mode = data.draw(st.sampled_from([AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP]))
    venv, other = (TextGenerationVectorEnv(4, **arguments(prompts), autoreset_mode=mode) for _ in range(2))
    venv.reset(seed=data.draw(st.integers(0, 99)))
    other.reset(seed=100)

    def go_on(v, moves):
        seen = []
        for move in moves:
            if move == "step":
                v.step(np.array([A, EOS, A, EOS]))
            else:
                v.reset(options={"group_size": move})
            seen.append(v.episodes.prompt_indexes.tolist())
        return seen

    moves = st.lists(st.sampled_from(["step", None, 2, 4]), max_size=12)
    go_on(venv, data.draw(moves))
    state = json.loads(json.dumps(venv.state_dict()))
    later = [data.draw(st.sampled_from([None, 2])), *data.draw(moves)]
    # A reset of all rows by group does not touch the rows' own streams, so that both may follow.
    expected = go_on(venv, later)
    other.load_state_dict(state)
    assert go_on(other, later) == expected


@pytest.mark.parametrize("n", [1, 3, 8])
def test_a_seeded_group_reset_gives_the_same_prompts_to_more_rows(n):
    venv = TextGenerationVectorEnv(2 * n, **arguments(list("abcdefgh")))
    venv.reset(seed=5, options={"group_size": 2})
    expected = TextGenerationVectorEnv(16, **arguments(list("abcdefgh")))
    expected.reset(seed=5, options={"group_size": 2})
    assert venv.episodes.prompt_indexes.tolist() == expected.episodes.prompt_indexes.tolist()[: 2 * n]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_no_text_is_in_both_splits(data):
    source = data.draw(
        st.one_of(
            st.lists(st.text("ab", max_size=3), max_size=30).map(lambda texts: texts + [f"{i % 40}" for i in range(90)]),
            st.integers(12, 20).map(AdditionProblems),
            st.integers(0, 99).map(lambda seed: CountdownProblems(size=90, count=2, largest=9, largest_target=20, seed=seed)),
        )
    )
    texts = [row if isinstance(row, str) else row["prompt"] for row in source]
    tokenizer = lambda texts, **_: {"input_ids": [[A]] * len(texts)}  # noqa: E731
    split = {name: PromptTable(source, tokenizer, 1, split=name).texts for name in ("train", "test")}
    assert not set(split["train"]) & set(split["test"])
    assert sorted(split["train"] + split["test"]) == sorted(texts)
    assert split["train"] == [text for text in texts if text in set(split["train"])]  # in their own order
