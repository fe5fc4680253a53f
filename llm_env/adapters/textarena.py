"""TextArena's games as text environments, for one seat."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from llm_env.adapters.base import Adapter, GlobalGenerators, Prompt, Step, ToAction, ToText, import_package

Messages = list[tuple[int, str]]


@runtime_checkable
class EpisodeOpponent(Protocol):
    """An opponent that plays whole episodes, such as `agents.SelfPlay`."""

    def begin(self, seed: int) -> Callable[[str], str] | None:
        """Return the player of an episode: a function of what is new to it, which returns a turn; None to play at random."""


Opponent = str | Callable[[str], str] | EpisodeOpponent | None
MOVE = re.compile(r"\[([^\[\]\n]{1,40})\]")  # how games list moves: [check], [4], [A1 B2]
GAME = -1  # sender of the game's own messages
PLAYER_ACTION = "PLAYER_ACTION"


class TextArenaEnv(Adapter):
    """A game of TextArena (https://github.com/LeonGuertler/TextArena, arXiv 2504.11442) as a `llm_env.TextEnv`.

    The model plays one seat; an opponent plays the others, between two turns of the model. Observations are the messages since
    the last turn, without the model's own. The reward is the game's, paid when it ends; `is_success` says whether it is
    positive. TextArena draws from and seeds the global random generators; each instance has separate states, see
    `llm_env.adapters.base.GlobalGenerators`, and every episode begins with a copy of a fresh game, since games keep parts of
    their state. Some games download word lists with nltk when they are made (Hangman, Wordle, Crosswords and others).

    Args:
        env: an id such as `"KuhnPoker-v0"` (the package textarena must be installed), or a function that makes a game.
        seat: the model's player number; `"parity"` takes the seed's parity, so that both seats are played.
        opponent: `"random"`, which draws among the moves in brackets that the game has listed last (where it lists none, the
            examples in its rules); a function of all that the opponent has seen, as TextArena writes it, that returns its move;
            or an object with `begin(seed)`, such as `agents.SelfPlay`, which sees and writes the same texts as the model. None
            for games of one player.
        num_players: of the game; 1 without an opponent, else 2.
        prompt, observation_to_text, text_to_action, illegal_reward: see `llm_env.adapters.base.Adapter`. `observation_to_text`
            gets the list of new messages, `(sender, text)`.
        kwargs: arguments of `textarena.make`.

    Raises:
        ImportError: If textarena is not installed.
        ValueError: If the opponent is unknown, or finds no move to draw.
    """

    def __init__(
        self,
        env: str | Callable[[], Any],
        seat: int | str = 0,
        opponent: Opponent = None,
        *,
        num_players: int | None = None,
        prompt: Prompt = None,
        observation_to_text: ToText = None,
        text_to_action: ToAction = None,
        illegal_reward: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(prompt, observation_to_text, text_to_action, illegal_reward)
        if not (opponent is None or opponent == "random" or callable(opponent) or isinstance(opponent, EpisodeOpponent)):
            raise ValueError(
                f"opponent={opponent!r} must be 'random', a function of an observation, an agents.SelfPlay, or None"
            )
        self.num_players = num_players or (1 if opponent is None else 2)
        if seat != "parity" and not (isinstance(seat, int) and 0 <= seat < self.num_players):
            raise ValueError(f"seat={seat!r} must be a number below {self.num_players}, or 'parity'")
        self._seat_setting, self.opponent = seat, opponent
        self._generators = GlobalGenerators()
        with self._generators.own(0):
            self._fresh = self._make(env, kwargs)
        self.seat = 0

    @staticmethod
    def _make(env: str | Callable[[], Any], kwargs: dict[str, Any]) -> Any:
        if not isinstance(env, str):
            return env(**kwargs)
        raw = env if env.endswith("-raw") else f"{env}-raw"  # without the wrapper that repeats the history
        return import_package("textarena", "textarena", f"TextArenaEnv({env!r})").make(raw, **kwargs)

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode; the opponent moves first where the game says so."""
        number = 0 if seed is None else seed
        self.seat = number % 2 if self._seat_setting == "parity" else int(self._seat_setting)
        self._rng = np.random.default_rng([number, 7])
        self._heard: dict[int, str] = {}
        self._moves: dict[int, list[str]] = {}
        self._players: dict[int, Callable[[str], str]] = {}
        if isinstance(self.opponent, EpisodeOpponent):
            begun = {player: self.opponent.begin(number) for player in range(self.num_players) if player != self.seat}
            self._players = {player: turn_of for player, turn_of in begun.items() if turn_of is not None}
        with self._generators.own(number):
            self.env = copy.deepcopy(self._fresh)
            self.env.reset(num_players=self.num_players, seed=number)
            is_over, text = self._play_others(False)
        return self._first(text), {"seat": self.seat} if not is_over else {"seat": self.seat, "is_over": True}

    def _advance(self, action: Any) -> Step:
        with self._generators.own():
            is_over, _ = self.env.step(action=action)
            is_over, text = self._play_others(bool(is_over))
            if not is_over:
                return text, 0.0, False, False, {"illegal_actions": self.illegal_actions}
            rewards, game_info = self.env.close()
        reward = float((rewards or {}).get(self.seat, 0.0))
        info = {"is_success": reward > 0, "illegal_actions": self.illegal_actions, "reward": reward}
        info["invalid_move"] = bool((game_info or {}).get(self.seat, {}).get("invalid_move", False))
        return "", reward, True, False, info

    def _play_others(self, is_over: bool) -> tuple[bool, str]:
        """Let opponents move until it is the model's turn; return whether the game is over, and what the model has heard."""
        while not is_over:
            player, messages = self.env.get_observation()
            if player == self.seat:
                return False, self._text(_of_others(messages, player), _as_text)
            is_over, _ = self.env.step(action=self._opponents_move(player, messages))
        return True, ""

    def _opponents_move(self, player: int, messages: list[Any]) -> Any:
        new = [(sender, text) for sender, text, _ in messages]
        is_first = player not in self._heard
        self._heard[player] = self._heard.get(player, "") + _as_text(new)
        if player in self._players:
            text = self._text(_of_others(messages, player), _as_text)
            turn = self._players[player](self._with_prompt(text) if is_first else text)
            try:
                return self._parsed(turn)
            except ValueError:  # no move of the game, which says what happens then
                return turn
        if callable(self.opponent) and not isinstance(self.opponent, EpisodeOpponent):
            return self.opponent(self._heard[player])
        listed = (sorted(set(MOVE.findall(text))) for sender, text in reversed(new) if sender == GAME)
        self._moves[player] = next((moves for moves in listed if moves), self._moves.get(player, []))
        if self._moves[player]:
            return f"[{self._rng.choice(self._moves[player])}]"
        raise ValueError(f"no moves in brackets for the random opponent in {new!r}; give opponent= a function")


def _of_others(messages: list[Any], player: int) -> Messages:
    """Return messages without the player's own moves."""
    is_own = [sender == player and str(getattr(kind, "name", kind)) == PLAYER_ACTION for sender, _, kind in messages]
    return [(sender, text) for (sender, text, _), own in zip(messages, is_own, strict=True) if not own]


def _as_text(messages: Messages) -> str:
    """Return messages as TextArena writes them."""
    return "".join(f"[{'GAME' if sender == GAME else f'Player {sender}'}] {text}\n" for sender, text in messages)
