"""Keys and values stay in the cache between turns: log-probs, texts and passes against contexts that are computed again."""

import numpy as np
import pytest
import torch

import agents.engines.base
from agents.policy import LanguagePolicy
from agents.sampling.generate import CachedRows, keeps_cache, sample_responses
from agents.sampling.sampler import Sampler
from agents.sampling.shared_prefix import SharedDecoding
from llm_env import TextGenerationVectorEnv
from tests.conftest import FAMILIES, make_model
from tests.decoders import OTHERS, PROMPTS, UNABLE, WINDOWS, V, build, plain
from tests.rollouts import collect
from tests.test_turn_agents import TOKENIZER, make

TURNS, ROOM = 8, 90


class World:
    """Replies with 0 to 6 tokens, by row and turn; episodes end after 1 to 8 turns, or when there is no room."""

    def __init__(self, group_size, turns=TURNS):
        self.group_size, self.turns, self.calls = group_size, turns, []
        self.contexts = [list(PROMPTS[i // group_size]) for i in range(len(PROMPTS) * group_size)]
        self.taken = [0] * len(self.contexts)
        self.spoken = [[] for _ in self.contexts]  # (context before the turn, the turn, its log-probs)

    def __call__(self, rows, turns, logprobs):
        self.calls.append(list(rows))
        assert list(rows) == sorted(set(rows))
        replies = []
        for row, turn, logp in zip(rows, turns, logprobs, strict=True):
            self.spoken[row].append((list(self.contexts[row]), list(turn), logp))
            rng = np.random.default_rng([row, self.taken[row]])
            observation = rng.integers(7, V, rng.integers(0, 7)).tolist()
            self.taken[row] += 1
            self.contexts[row] += [*turn, *observation]
            used = len(self.contexts[row]) - len(PROMPTS[row // self.group_size])
            over = self.taken[row] >= 1 + (row * 5) % self.turns or used + 12 > ROOM
            replies.append(None if over else observation)
        return replies


def sampler():
    return Sampler(0.9, generator=torch.Generator().manual_seed(0))


def episodes(model, group_size, **settings):
    world = World(group_size)
    found = sample_responses(
        model,
        PROMPTS,
        sampler(),
        vocab_size=V,
        eos_id=3,
        max_new_tokens=11,
        group_size=group_size,
        completes_stop=lambda ids: ids[-1] in (5, 6),
        on_turns=world,
        max_episode_tokens=ROOM,
        **settings,
    )
    return world, found


def are_plain(model, world):
    """The log-probs of every turn are those of a plain forward pass over its whole context."""
    count = 0
    for row in world.spoken:
        for context, turn, logp in row:
            with torch.no_grad():
                expected = plain(model, context, turn, 0.9)[0]
            np.testing.assert_allclose(logp, expected.numpy(), atol=1e-4)
            count += len(turn)
    return count


@pytest.mark.parametrize("group_size", [1, 5])
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, *WINDOWS, *UNABLE])
def test_log_probs_over_eight_turns_are_those_of_a_plain_forward(name, group_size):
    model = build(name)
    if not keeps_cache(model, group_size, max(map(len, PROMPTS)) + ROOM, "auto"):
        pytest.skip("contexts of this model are computed again in every turn")
    world, (responses, _) = episodes(model, group_size)
    assert max(world.taken) == TURNS or group_size == 1
    assert are_plain(model, world) == sum(map(len, responses)) > 50
    for row, response in zip(world.spoken, responses, strict=True):
        assert [token for _, turn, _ in row for token in turn] == response


def test_the_families_of_the_suite_keep_their_caches():
    able = [name for name in [*FAMILIES, *OTHERS] if keeps_cache(build(name), 4, 120, "auto")]
    assert set(FAMILIES) <= set(able) and len(able) >= len(OTHERS)


@pytest.mark.parametrize("sharing", ["auto", False])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_wait_for_a_place_have_the_same_episodes(name, sharing):
    model = build(name)
    together, few = (episodes(model, 2, max_num_seqs=n, prefix_sharing=sharing) for n in (None, 2))
    assert together[1][0] == few[1][0]
    assert are_plain(model, few[0]) > 50


@pytest.mark.parametrize("sharing", ["auto", False])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, sharing):
    """Alone, with the same random numbers, a row has the same episode."""
    model = build(name)
    _, (responses, _) = episodes(model, 2, prefix_sharing=sharing)
    numbers = sampler().uniforms(2 * len(PROMPTS), ROOM, V, torch.device("cpu"))
    for row in (0, 3, 5):
        world = World(2)

        def alone(rows, turns, logprobs, row=row, world=world):
            return world([row], turns, logprobs)

        (response,), _ = sample_responses(
            model,
            [PROMPTS[row // 2]],
            sampler(),
            vocab_size=V,
            eos_id=3,
            max_new_tokens=11,
            completes_stop=lambda ids: ids[-1] in (5, 6),
            on_turns=alone,
            max_episode_tokens=ROOM,
            uniforms=numbers[row : row + 1],
            prefix_sharing=sharing,
        )
        assert response == responses[row]


# --- the engine against contexts that are computed again ---------------------------------------------------------------------


def rollouts(monkeypatch, keeps, family="llama", sharing="auto", places=None, **env):
    """Two rollouts of 16 episodes, groups of 4, with given prompts and random numbers."""
    rules = make(**env).rules
    policy = LanguagePolicy(make_model(family, len(TOKENIZER), scale=1.5), TOKENIZER)
    policy.prefix_sharing, policy.max_num_seqs = sharing, places
    with monkeypatch.context() as patch:
        if not keeps:
            patch.setattr(agents.engines.base, "keeps_cache", lambda *args: False)
        venv, numbers = TextGenerationVectorEnv.from_rules(rules, 16), sampler()
        return [collect(policy, venv, 4, numbers, indexes) for indexes in ([0, 1, 2, 3], [4, 5, 6, 7])]


CASES = {
    "plain": {},
    "limit ends": {"turn_limit": "truncate"},
    "stops": {"stop": ["ab", "c"], "max_turns": 6},
    "allowed": {"allowed_tokens": lambda context, turn: [0, 3, 4, 5] if len(turn) % 2 else [3, 4, 5, 10]},
    "few places": {"places": 4},
    "no sharing": {"sharing": False},
    "GPT-2": {"family": "gpt2"},
    "GPT-2, no sharing": {"family": "gpt2", "sharing": False},
}


@pytest.mark.parametrize("name", CASES)
def test_the_engine_plays_the_same_episodes_as_without_a_cache(name, monkeypatch):
    cached, again = (rollouts(monkeypatch, keeps, **CASES[name]) for keeps in (True, False))
    turns = 0
    for one, other in zip(cached, again, strict=True):
        assert one.responses == other.responses
        assert torch.equal(one.rewards, other.rewards) and torch.equal(one.truncated, other.truncated)
        torch.testing.assert_close(one.sampled_logp, other.sampled_logp, atol=1e-4, rtol=0)
        assert [info["transcript"] for info in one.infos] == [info["transcript"] for info in other.infos]
        turns += sum(info["turns"] for info in one.infos)
    assert turns > 40


# --- passes -----------------------------------------------------------------------------------------------------------------


class Counted:
    """Counts the forward passes of a model, and the tokens in them."""

    def __init__(self, model):
        self.passes = self.tokens = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.passes += 1
        self.tokens += kwargs["input_ids"].numel()


class Planned:
    """A constraint that makes row i speak 64 tokens in turn i mod 6 and 1 token elsewhere. Prompts begin with 30 + i."""

    lengths = [[64 if turn == row % 6 else 1 for turn in range(6)] for row in range(12)]

    def masks(self, requests):
        masks = np.zeros((len(requests), V), dtype=bool)
        for i, (context, turn) in enumerate(requests):
            length = self.lengths[context[0] - 30][context.count(8)]
            masks[i, 3 if len(turn) + 1 == length else 20] = True
        return masks


@pytest.mark.parametrize("sharing", ["auto", False])
def test_no_row_waits_for_the_long_turn_of_another(sharing):
    """The longest row speaks 69 tokens; by turns in lockstep it is 6 * 64."""
    model = make_model("llama", V, max_position_embeddings=512)
    assert keeps_cache(model, 1, 200, sharing)  # its trials are passes, too
    counted, taken, calls = Counted(model), [0] * 12, []

    def on_turns(rows, turns, logprobs):
        calls.append(list(rows))
        replies = []
        for row, turn in zip(rows, turns, strict=True):
            assert len(turn) == Planned.lengths[row][taken[row]]
            taken[row] += 1
            replies.append([8, 9] if taken[row] < 6 else None)
        return replies

    sample_responses(
        model,
        [[30 + row, 2, 4] for row in range(12)],
        sampler(),
        vocab_size=V,
        eos_id=3,
        max_new_tokens=64,
        constraint=Planned(),
        prefix_sharing=sharing,
        on_turns=on_turns,
        max_episode_tokens=100,
    )
    assert taken == [6] * 12 and counted.passes <= 80
    assert calls[0] == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11], "turns that end in one step are given together"


@pytest.mark.parametrize("sharing", ["auto", False])
def test_nothing_is_computed_twice(sharing):
    """8 turns of 4 tokens and observations of 5: every token but the last is fed once, and the prompt once for its group."""
    model = make_model("llama", V, max_position_embeddings=512)
    assert keeps_cache(model, 4, 200, sharing)
    counted = Counted(model)
    taken = [0] * 4

    def on_turns(rows, turns, logprobs):
        taken[0] += 1
        return [[9, 8, 9, 8, 9] if taken[0] < 8 else None for _ in rows]

    sample_responses(
        model,
        [[1, 2, 3]],
        sampler(),
        vocab_size=V,
        eos_id=V + 1,
        max_new_tokens=4,
        group_size=4,
        prefix_sharing=sharing,
        on_turns=on_turns,
        max_episode_tokens=100,
    )
    assert counted.tokens == 3 + 4 * (8 * 4 + 7 * 5 - 1)
    assert counted.passes == 1 + 8 * 3 + 7  # three single tokens a turn; the fourth goes with what the env writes


@torch.no_grad()
def test_a_cache_without_sharing_stays_without_gaps():
    model = make_model("llama", V)
    rows = CachedRows(model)
    rows.prefill([[1, 2, 3], [4, 5], [6]], 1)
    rows.extend(torch.tensor([0, 2]), [[7, 8], [9]])
    assert rows.mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert rows.cache.get_seq_length() == 5


@torch.no_grad()
def test_responses_of_one_length_stay_on_the_fast_path():
    """Equal observations for all keep `same_length`; others turn it off, and what is masked is not NaN."""
    model = make_model("llama", V)
    decoding = SharedDecoding(model, 2)
    decoding.prefill([[1, 2, 3], [4, 5]])
    numbers = torch.arange(4)
    decoding(torch.tensor([7, 8, 9, 10]))
    decoding.extend(numbers, [[7, 8]] * 4)
    assert decoding.same_length and decoding.max_generated == 3
    for kv in decoding.response_kv.values():
        kv[..., decoding.max_generated :, :] = torch.nan
    logits = decoding.extend(numbers[1:3], [[7], [8, 9]])
    assert not decoding.same_length and logits.isfinite().all()
    assert decoding(torch.tensor([7, 8, 9, 10])).isfinite().all()
