"""`check_text_env` passes clean environments, and finds each planted fault in the fault's own row."""

import random

import numpy as np
import pytest
import torch

import llm_env
from llm_env import check_text_env
from tests.chats import CHATML
from tests.conftest import make_tokenizer
from tests.text_envs import Letters

ROWS = [
    "values", "no exceptions", "same seed, same start", "same actions, same turns", "different seeds", "instances side by side",
    "random generators", "step after the end", "observations are new text", "ends", "texts can be encoded", "chat template",
    "lengths", "returns", "seconds",
]  # fmt: skip
SEEDED, PLAYED, BESIDE, GLOBAL = (
    "same seed, same start",
    "same actions, same turns",
    "instances side by side",
    "random generators",
)


class Guess:
    """A clean game: guess a number in four turns. Faults are planted by subclasses."""

    def reset(self, *, seed=None):
        self.rng, self.left = np.random.default_rng(seed), 4
        self.number = int(self.rng.integers(1, 8))
        return f"guess a number, start near {int(self.rng.integers(1, 8))}: ", {}

    def step(self, action):
        if self.left <= 0:
            return "", 0.0, True, False, {}
        self.left -= 1
        guess = int(action) if action.isdecimal() else 0
        if guess == self.number:
            self.left = 0
            return "", 1.0, True, False, {"is_success": True}
        hint = "higher" if guess < self.number else "lower"
        return f"{hint} than {guess}, {self.left} guesses are left: ", 0.0, self.left == 0, False, {}


ACTIONS = [*"1234567", "x"]


def failed(make, tokenizer=llm_env.PUPIL, **arguments):
    """Names of the rows that fail, and the report."""
    report = check_text_env(make, tokenizer, quiet=True, **{"actions": ACTIONS, **arguments})
    assert [row.check for row in report.rows] == ROWS
    names = {row.check for row in report.rows if row.result == "FAILED"}
    assert report.passed == (not names)
    return names, report


@pytest.mark.parametrize("actions", [None, ACTIONS, lambda observation, rng: str(rng.integers(1, 8))])
def test_a_clean_environment_passes(actions):
    names, report = failed(Guess, actions=actions)
    assert names == set()
    assert report["lengths"].detail.startswith("first observations have up to 30 tokens, later ones 35:")  # characters
    assert failed(Letters, actions=None)[0] == set()


def test_the_table_is_printed_and_repeats(capsys):
    report = check_text_env(Guess, llm_env.PUPIL, actions=ACTIONS, seed=5)
    assert capsys.readouterr().out == f"{report}\n"
    again = check_text_env(Guess, llm_env.PUPIL, actions=ACTIONS, seed=5, quiet=True)
    assert capsys.readouterr().out == ""
    assert [row for row in again.rows if row.check != "seconds"] == [row for row in report.rows if row.check != "seconds"]


class BadReward(Guess):
    def step(self, action):
        text, reward, *rest = super().step(action)
        return text, np.nan if action == "3" else reward, *rest


class FourValues(Guess):
    def step(self, action):
        return super().step(action)[:4]


class NoText(Guess):
    def reset(self, *, seed=None):
        super().reset(seed=seed)
        return None, {}


class IntEnds(Guess):
    def step(self, action):
        text, reward, terminated, truncated, info = super().step(action)
        return text, reward, int(terminated), truncated, info


class Crashes(Guess):
    def step(self, action):
        int(action)
        return super().step(action)


class NeverStarts(Guess):
    def reset(self, *, seed=None):
        raise OSError("no board")


class NotMade(Guess):
    def __init__(self):
        raise RuntimeError("no licence")


class Remembers(Guess):
    """State that `reset` does not set: the first observation counts the episodes of the instance."""

    games = 0

    def reset(self, *, seed=None):
        self.games += 1
        return f"game {self.games}. {super().reset(seed=seed)[0]}", {}


class Unseeded(Guess):
    def step(self, action):
        text, *rest = super().step(action)
        return text + str(np.random.default_rng().integers(10**6)), *rest


class Shared(Guess):
    """State in the class: two instances write to one number of turns."""

    board = [0]

    def reset(self, *, seed=None):
        self.board[0] = 0
        return super().reset(seed=seed)

    def step(self, action):
        text, *rest = super().step(action)
        self.board[0] += 1
        return f"{text} move {self.board[0]}", *rest


class DrawsInStep(Guess):
    def step(self, action):
        torch.rand(1)  # without any effect of its own
        return super().step(action)


class SeedsInReset(Guess):
    def reset(self, *, seed=None):
        np.random.seed(seed)
        return super().reset(seed=seed)


class History(Guess):
    def reset(self, *, seed=None):
        self.said = super().reset(seed=seed)[0]
        return self.said, {}

    def step(self, action):
        text, *rest = super().step(action)
        self.said += f"{action}\n{text}"
        return self.said, *rest


class Surrogate(Guess):
    def step(self, action):
        text, *rest = super().step(action)
        return text + "\ud800", *rest


@pytest.mark.parametrize(
    "make, rows, row, detail",
    [
        (BadReward, {"values"}, "values", "returned the reward nan"),
        (FourValues, {"values"}, "values", "must return (text, reward, terminated, truncated, info)"),
        (NoText, {"values"}, "values", "returned None as its observation"),
        (IntEnds, {"values"}, "values", "returned terminated="),
        (Crashes, {"no exceptions"}, "no exceptions", "raised ValueError: invalid literal for int() with base 10: 'x'"),
        (NeverStarts, {"no exceptions"}, "no exceptions", "raised OSError: no board"),
        (NotMade, {"no exceptions"}, "no exceptions", "NotMade() raised RuntimeError: no licence"),
        (Remembers, {SEEDED}, SEEDED, "on the same instance: seed 0 gives 'game 1."),
        (Unseeded, {PLAYED, BESIDE}, PLAYED, "turn 1 of seed 0 gives"),
        (Shared, {BESIDE}, BESIDE, "an episode changes while another instance plays: turn 2 of seed 0"),
        (DrawsInStep, {GLOBAL}, GLOBAL, "step draws from torch: use np.random.default_rng(seed)"),
        (SeedsInReset, {GLOBAL}, GLOBAL, "reset seeds numpy.random: use"),
        (History, {"observations are new text"}, "observations are new text", "observations repeat the history"),
        (Surrogate, {"texts can be encoded"}, "texts can be encoded", "surrogate"),
    ],
)
def test_planted_faults(make, rows, row, detail):
    names, report = failed(make)
    assert names == rows, str(report)
    assert detail in report[row].detail


class LikeGEM(Guess):
    """Global generators in the constructor, in `reset` and in `step`, and the seed is ignored."""

    def __init__(self):
        self.offset = random.randint(0, 10**6)

    def reset(self, *, seed=None):
        self.left = 3
        return f"question {np.random.randint(10**6)} of {self.offset}: ", {}

    def step(self, action):
        self.left -= 1
        return f"wrong {random.random()}, again: ", 0.0, self.left == 0, False, {}


def test_global_generators_in_every_call():
    names, report = failed(LikeGEM)
    assert names == {SEEDED, PLAYED, BESIDE, GLOBAL} - ({PLAYED} if report[PLAYED].result == "passed" else set())
    for said in ("the constructor draws from random", "reset draws from numpy.random", "step draws from random"):
        assert said in report[GLOBAL].detail
    assert "no signal" in report["returns"].detail


class LikeTextArena(Guess):
    """The global generator is seeded, and the observation is the history, which a reset keeps."""

    def __init__(self):
        self.log = ""

    def reset(self, *, seed=None):
        random.seed(seed)
        self.left = 3
        self.log += f"[GAME] You play a game on board {random.randint(0, 99)}.\n"
        return self.log, {}

    def step(self, action):
        self.left -= 1
        self.log += f"[Player 0] {action}\n[GAME] roll {random.randint(0, 99)}\n"
        return self.log, 0.0, self.left == 0, False, {}


def test_a_history_that_is_kept_over_resets():
    names, report = failed(LikeTextArena)
    assert {SEEDED, BESIDE, GLOBAL, "observations are new text"} <= names
    assert "reset seeds random" in report[GLOBAL].detail
    assert report["observations are new text"].detail.startswith("the first observation after a reset contains one of the")


def test_growing_boards_are_no_history():
    class Board(Guess):
        def step(self, action):
            _, *rest = super().step(action)
            return f"{'.' * (20 - self.left)}|{'x' * self.left}|{action}", *rest

    assert failed(Board)[0] == set()


def test_notes():
    class Same(Guess):
        def reset(self, *, seed=None):
            return super().reset(seed=0)

    class Endless(Guess):
        def step(self, action):
            return "go on", 0.0, False, False, {}

    class PaysAgain(Guess):
        def step(self, action):
            return "", 1.0, True, True, {}

    report = failed(Same)[1]
    assert report.passed and report["different seeds"].result == "note"
    report = failed(Endless, turns=3)[1]
    assert (
        report.passed and "no episode ends within 3 turns" in report["ends"].detail and "no signal" in report["returns"].detail
    )
    assert report["step after the end"].result == "not run"
    report = failed(PaysAgain)[1]
    assert report.passed and "seed 0 pays 1 and stays ended after its end" in report["step after the end"].detail
    assert "terminated and truncated" in report["ends"].detail
    assert failed(Guess, n=1)[1]["different seeds"].result == "not run"


def test_returns_and_lengths_by_hand():
    class Fixed:
        def reset(self, *, seed=None):
            self.pay = float(seed % 2)
            return "abc", {}

        def step(self, action):
            return "de", self.pay, True, False, {}

    report = failed(Fixed, n=4)[1]
    assert report["returns"].detail == "mean 0.5, std 0.5, from 0 to 1"
    assert "up to 3 tokens, later ones 2: max_prompt_tokens at least 3, max_observation_tokens=2" in report["lengths"].detail


class Talks(Guess):
    """Observations are messages, sometimes of a tool."""

    role = "tool"

    def reset(self, *, seed=None):
        return [{"role": "user", "content": super().reset(seed=seed)[0]}], {}

    def step(self, action):
        text, *rest = super().step(action)
        return [{"role": self.role, "content": text}], *rest


def test_chat_templates():
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789:,<|_>\n")
    assert failed(Guess, tokenizer)[1]["chat template"].result == "not applicable"
    names, report = failed(Talks, tokenizer)
    assert names == {"chat template"} and "no chat template" in report["chat template"].detail
    tokenizer.chat_template = CHATML
    assert failed(Guess, tokenizer)[1]["chat template"].result == "passed"
    assert failed(Talks, tokenizer)[1]["chat template"].result == "passed"
    tokenizer.chat_template = "{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    names, report = failed(Talks, tokenizer)
    assert names == {"chat template"} and "does not show a tool message" in report["chat template"].detail


def test_tokens_of_the_tokenizer():
    tokenizer = make_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789:,")

    class Special(Guess):
        def step(self, action):
            text, *rest = super().step(action)
            return text + tokenizer.eos_token, *rest

    report = failed(Special, tokenizer)[1]
    assert report.passed and f"the special token {tokenizer.eos_token}" in report["texts can be encoded"].detail


@pytest.mark.parametrize("make", [Guess, LikeGEM, LikeTextArena, Crashes, NotMade])
def test_the_state_of_the_generators_is_restored(make):
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    failed(make)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_the_state_is_restored_when_the_check_is_interrupted():
    class Interrupted(Guess):
        def step(self, action):
            random.random()
            raise KeyboardInterrupt

    random.seed(3)
    expected = random.random()
    random.seed(3)
    with pytest.raises(KeyboardInterrupt):
        check_text_env(Interrupted, llm_env.PUPIL, quiet=True)
    assert random.random() == expected


def test_prints_do_not_garble_the_table(capsys):
    class Loud(Guess):
        def step(self, action):
            print("thinking ...")
            return super().step(action)

    report = check_text_env(Loud, llm_env.PUPIL, actions=ACTIONS)
    assert capsys.readouterr().out == f"{report}\n"


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"make": 3}, TypeError, "make=3 must be a class or a function"),
        ({"n": 0}, ValueError, "n=0"),
        ({"turns": 0}, ValueError, "turns=0"),
        ({"actions": []}, ValueError, "actions is empty"),
        ({"actions": "abc"}, TypeError, "actions='abc' must be a sequence of str"),
        ({"actions": [1]}, TypeError, "must be a sequence of str"),
        ({"tokenizer": 3}, TypeError, "tokenizer"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        check_text_env(**{"make": Guess, "tokenizer": llm_env.PUPIL, "quiet": True, **arguments})


def test_by_name_it_is_the_same():
    report = check_text_env("tests.text_envs:Letters", llm_env.PUPIL, quiet=True)
    assert report.passed
