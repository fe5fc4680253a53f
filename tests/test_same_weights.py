"""The script that compares trainings before and after a change tells different trainings apart."""

import pytest

from tests import same_weights


def test_equal_trainings_have_equal_hashes_and_others_have_not(monkeypatch):
    first, again = (same_weights.train("GRPO") for _ in range(2))
    assert first == again and first["rollouts"] > 2
    assert same_weights.train("GRPO", resume=True) == first
    monkeypatch.setattr(same_weights, "SEED", same_weights.SEED + 1)
    other = same_weights.train("GRPO")
    assert other["weights"] != first["weights"] and other["logs"] != first["logs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(same_weights.configurations()))
def test_every_configuration_trains_and_repeats_itself(name):
    assert same_weights.train(name) == same_weights.train(name)
