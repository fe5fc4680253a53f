"""Kuhn poker in self-play: the exact exploitability, by hand, and the script."""

import sys
from pathlib import Path

import pytest

from llm_env import PUPIL, check_text_env
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


@pytest.mark.slow
def test_the_script_runs(tmp_path):
    pytest.importorskip("matplotlib")
    out = run([Path(ROOT / "examples/self_play_kuhn.py"), "--rollouts", 4], tmp_path)
    assert "average policy" in out and "of the start's" in out
    assert (tmp_path / "outputs/self_play_kuhn.png").stat().st_size > 5_000
