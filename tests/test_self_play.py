"""Kuhn poker in self-play: the exact exploitability, by hand, and the script."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from agents import GRPO, SelfPlay
from llm_env import PUPIL, TextGenerationEnv, check_text_env
from llm_env.adapters import TextArenaEnv
from tests.conftest import make_model, make_tokenizer
from tests.test_adapters import Card
from tests.test_readme_and_examples import ROOT, run


@pytest.fixture(scope="module")
def kuhn():
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    try:
        import self_play_kuhn

        yield self_play_kuhn
    finally:
        sys.path.remove(folder)


def equilibrium(alpha):
    """Kuhn's equilibria: the first player bets J with probability alpha and K with three times that."""
    first = {"J": alpha, "Q": 0, "K": 3 * alpha, "Jpb": 0, "Qpb": alpha + 1 / 3, "Kpb": 1}
    return first | {"Jp": 1 / 3, "Qp": 0, "Kp": 1, "Jb": 0, "Qb": 1 / 3, "Kb": 1}


@pytest.mark.parametrize("alpha", [0, 0.2, 1 / 3])
def test_an_equilibrium_cannot_be_exploited(kuhn, alpha):
    strategy = equilibrium(alpha)
    assert set(strategy) == set(kuhn.SETS) and len(kuhn.SETS) == 12
    assert kuhn.value(strategy, strategy) == pytest.approx(-1 / 18)
    assert kuhn.exploitability(strategy) == pytest.approx(0, abs=1e-12)


def test_simple_strategies_by_hand(kuhn):
    """Who always passes loses the ante to every bet; who always bets loses 2 to K, 1 to a fold of J, and breaks even with Q."""
    passive, aggressive = (dict.fromkeys(kuhn.SETS, bet) for bet in (0.0, 1.0))
    assert kuhn.exploitability(passive) == 1.0
    # Against bets in every hand, K calls and wins 2, J folds and loses 1, Q calls: it beats J and loses to K.
    assert kuhn.exploitability(aggressive) == pytest.approx((2 - 1 + 0) / 3)
    assert kuhn.value(aggressive, passive) == 1 and kuhn.value(passive, aggressive) == -1


def test_the_average_is_weighted_by_reach(kuhn):
    """Of two strategies, one never passes J first: only the other comes to J after pass and bet."""
    never, always = dict.fromkeys(kuhn.SETS, 0.0), dict.fromkeys(kuhn.SETS, 1.0)
    mean = kuhn.average([never, always])
    assert mean["J"] == 0.5 and mean["Jb"] == 0.5 and mean["Jpb"] == 0.0


def test_hands_are_those_of_their_seeds(kuhn):
    check = check_text_env(kuhn.Kuhn, PUPIL, actions=["p", "b"], quiet=True)
    assert check["same seed, same start"].result == check["same actions, same turns"].result == "passed", str(check)
    hand = kuhn.Kuhn()
    before = [hand.reset(seed=seed)[0] for seed in range(20)]
    kuhn.Kuhn.opponents.append(dict.fromkeys(kuhn.SETS, 1.0))
    assert [kuhn.Kuhn().reset(seed=seed)[0] for seed in range(20)] == before
    assert [len(text) for text in before] == [1, 2] * 10  # of an odd seed, the opponent moves first
    kuhn.Kuhn.opponents.pop()


# --- agents.SelfPlay ---------------------------------------------------------------------------------------------------------

TOKENIZER = make_tokenizer("abcdwxyz")
MOVES = {"w": "[bet]", "x": "[fold]", "y": "[call]", "z": "[pass]"}


def short(messages):
    """Messages of `Card` as letters: the card as a, b or c (d if it is not seen), and the moves of the other player."""
    said = ""
    for sender, text in messages:
        if "You are player" in text:
            said += "abc"[int(text[-2])] if "Card" in text else "d"
        elif sender >= 0:
            said += {move: letter for letter, move in MOVES.items()}[text]
    return said


def a_game(opponent, seat=0):
    make = partial(
        TextArenaEnv, Card, seat=seat, opponent=opponent, observation_to_text=short, text_to_action=lambda turn: MOVES[turn[0]]
    )
    limits = {"max_turns": 2, "max_prompt_tokens": 4, "max_new_tokens": 1, "max_observation_tokens": 2}
    allowed = TOKENIZER.convert_tokens_to_ids(list(MOVES))
    return TextGenerationEnv.from_text_env(make, TOKENIZER, num_tasks=None, allowed_tokens=allowed, **limits)


def an_agent(env, **arguments):
    return GRPO(make_model("llama", len(TOKENIZER), scale=2.0), env, 1e-2, n_envs=16, group_size=4, seed=0, **arguments)


def test_an_opponent_sees_and_writes_what_the_model_would():
    seen = []

    class Opponent:
        def begin(self, seed):
            seen.append([seed])
            return lambda text: seen[-1].append(text) or "y"

    env = TextArenaEnv(
        Card, opponent=Opponent(), prompt=">{observation}", observation_to_text=short, text_to_action=MOVES.__getitem__
    )
    first, _ = env.reset(seed=4)
    env.step("w"), env.step("x")
    assert first in (">a", ">b", ">c") and seen == [[4, ">dw", "x"]]
    assert env.env.moves == ["[bet]", "[call]", "[fold]", "[call]"]


def test_a_turn_of_an_opponent_that_is_no_move_reaches_the_game_as_it_is():
    class Opponent:
        def begin(self, seed):
            return lambda text: "nonsense"

    strict = TextArenaEnv(Card, opponent=Opponent(), text_to_action=lambda turn: f"[{int(turn)}]")
    strict.reset(seed=0), strict.step("3")
    assert strict.env.moves == ["[3]", "nonsense"] and strict.illegal_actions == 0


def test_moves_are_drawn_with_the_snapshots_probabilities():
    """The opponent's first move over 2,000 seeds, against the exact probabilities of the policy that was copied."""
    self_play = SelfPlay(opponents="last")
    agent = an_agent(a_game(self_play, seat=1))
    agent.learn(1, callback=self_play)
    snapshot = self_play.snapshots[0].policy
    env = a_game(self_play, seat=1).rules.text_env.new()
    drawn = {card: [] for card in "abc"}
    for seed in range(2000):
        env.reset(seed=seed)
        drawn["abc"[env.env.deck[0]]].append(env.env.moves[0])
    for card, moves in drawn.items():
        context = TOKENIZER.convert_tokens_to_ids([card])
        ids = TOKENIZER.convert_tokens_to_ids(list(MOVES))
        logits = snapshot.lm(torch.tensor([context])).logits[0, -1, ids].double()
        expected = torch.softmax(logits, 0).detach().numpy()
        shares = np.array([np.mean([move == name for move in moves]) for name in MOVES.values()])
        assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / len(moves)), (card, shares, expected)


@pytest.mark.parametrize("opponents, numbers", [("all", [0, 1, 2]), ("last", [2])])
def test_snapshots_are_taken_every_few_rollouts_and_stay(opponents, numbers):
    self_play = SelfPlay(every=2, opponents=opponents)
    agent = an_agent(a_game(self_play, seat="parity"))
    states = []
    while self_play.rollouts < 5:  # snapshots before the rollouts 1, 3 and 5
        states.append(agent.policy.lm.state_dict()["model.embed_tokens.weight"].clone())
        agent.learn(1, callback=self_play, reset_num_timesteps=False)
    assert list(self_play.snapshots) == numbers and self_play.taken == 3
    for number, engine in self_play.snapshots.items():
        assert torch.equal(engine.policy.lm.state_dict()["model.embed_tokens.weight"], states[2 * number])
    assert not torch.equal(states[0], states[4])


def test_a_seed_keeps_its_opponent():
    self_play = SelfPlay()
    env = a_game(self_play, seat="parity")
    agent = an_agent(env)
    agent.learn(120, callback=self_play)
    assert self_play.taken >= 3
    make = env.rules.text_env.make
    assert check_text_env(make, TOKENIZER, actions=list(MOVES), quiet=True).passed
    before = [make().reset(seed=seed) for seed in range(1000, 1040)]
    agent.learn(60, callback=self_play, reset_num_timesteps=False)
    assert [make().reset(seed=seed) for seed in range(1000, 1040)] == before
    assert {info["seat"] for _, info in before} == {0, 1}
    assert len({self_play._met[seed] for seed in range(1000, 1040)}) > 1  # drawn among all


def test_memory_of_snapshots_is_bounded():
    self_play = SelfPlay(max_snapshots=2)
    agent = an_agent(a_game(self_play))
    agent.learn(160, callback=self_play)
    assert self_play.taken > 2 and list(self_play.snapshots) == [self_play.taken - 2, self_play.taken - 1]


@pytest.mark.parametrize(
    "arguments, match",
    [({"every": 0}, "every=0 must be"), ({"opponents": "best"}, "opponents='best' must be"), ({"max_snapshots": 0}, "must be")],
)
def test_bad_arguments_of_self_play(arguments, match):
    with pytest.raises(ValueError, match=match):
        SelfPlay(**arguments)


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    pytest.importorskip("matplotlib")
    out = run([Path(ROOT / "examples/self_play_kuhn.py"), "--rollouts", 4], tmp_path)
    assert "average policy" in out and "of the start's" in out
    assert (tmp_path / "outputs/self_play_kuhn.png").stat().st_size > 5_000
