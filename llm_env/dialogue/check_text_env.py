"""Check a text environment for common faults before training; see `check_text_env`."""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from llm_env.arguments import check_int
from llm_env.dialogue.chat import Bridge, PromptFormat
from llm_env.dialogue.text_env import EnvFailed, Text, TextEnvTasks, as_messages, close
from llm_env.end_tokens import as_token_ids
from llm_env.report import FAILED, NOT_APPLICABLE, NOT_RUN, NOTE, PASSED, CheckRow, Report, short
from llm_env.tokenization import encode_texts, load_tokenizer

WORDS = (
    "",
    "a",
    "1",
    "yes",
    "no",
    "up",
    "left",
    "[0]",
    "[1]",
    "hello there",
)  # of random play, beside words of the observation
HISTORY = 20  # characters; a shorter text may be part of the next one by chance
SLOW = 0.05  # seconds of a step

Actions = Sequence[str] | Callable[[Text, np.random.Generator], str]


def check_text_env(
    make: Any,
    tokenizer: Any,
    *,
    n: int = 8,
    turns: int = 8,
    seed: int = 0,
    actions: Actions | None = None,
    quiet: bool = False,
) -> Report:
    """Check a text environment for common faults; print and return a table of results.

    `n` episodes are played with random actions, and played again: on the same instance, on a new one, beside another one, and
    with the random generators of the process in another state. No model is needed.

    | row | fails |
    | --- | --- |
    | values | `reset` or `step` returns other types than Gymnasium's, or a reward that is not finite |
    | no exceptions | the constructor, `reset` or `step` raises one |
    | same seed, same start | the first observation differs on the same instance, or on a new one |
    | same actions, same turns | observations, rewards or ends differ when an episode is played again |
    | different seeds | never; a note if all episodes are the same |
    | instances side by side | an episode differs while another instance plays as well |
    | random generators | `random`, `numpy.random` or `torch`'s global generator is drawn from or seeded |
    | step after the end | never; a note if such a step pays a reward, or the episode goes on |
    | observations are new text | observations repeat the history: each contains the one before it |
    | ends | never; a note if no episode ends, or one ends as terminated and truncated at once |
    | texts can be encoded | a text has unpaired surrogates or unknown tokens; a note if it has special tokens |
    | chat template | the template cannot render the observations after a turn |
    | lengths, returns, seconds | never; notes. Equal returns mean that random play gives no signal to learn from |

    The random generators of the process have their state back afterwards. What the environment prints is not shown.

    Args:
        make: a class or a function without arguments that returns a `llm_env.TextEnv`; or its name, `"module:Class"`.
        tokenizer: a path, a hub id or a transformers tokenizer.
        n: number of seeds, `seed` to `seed + n - 1`.
        turns: maximum number of turns that are played of an episode.
        seed: the first seed; also seeds the actions. Equal seeds give equal tables, but for the seconds.
        actions: texts to draw actions from, or a function of the observation and a `np.random.Generator` that returns one. By
            default short texts and words of the last observation.
        quiet: whether to skip printing.

    Raises:
        TypeError: If `make` cannot be called, or `actions` are no texts.
        ValueError: If `n` or `turns` is less than 1, or `actions` is empty.

    Examples:
        >>> import llm_env, numpy as np
        >>> class Toss:
        ...     def reset(self, *, seed=None):
        ...         self.side = np.random.choice(["heads", "tails"])  # ignores the seed
        ...         return "heads or tails? ", {}
        ...     def step(self, action):
        ...         return "", float(action == self.side), True, False, {}
        >>> report = llm_env.check_text_env(Toss, llm_env.PUPIL, actions=["heads", "tails"], quiet=True)
        >>> [row.check for row in report.rows if row.result == "FAILED"]
        ['same actions, same turns', 'instances side by side', 'random generators']
        >>> report["random generators"].detail
        'reset draws from numpy.random: use np.random.default_rng(seed) in reset, since other code draws from them as well'
    """
    n, turns, seed = check_int("n", n, 1), check_int("turns", turns, 1), check_int("seed", seed, 0)
    tasks = TextEnvTasks(make, num_tasks=n, first_seed=seed, check_seeds=False)
    check = _Check(tasks, turns, _chooser(actions))
    with _generators_kept(), contextlib.redirect_stdout(io.StringIO()):
        rows = check.run(load_tokenizer(tokenizer))
    report = Report(rows)
    if not quiet:
        print(report)
    return report


def _chooser(actions: Actions | None) -> Callable[[Text, np.random.Generator], str]:
    if callable(actions):
        return actions
    if actions is None:

        def choose(observation: Text, rng: np.random.Generator) -> str:
            return str(rng.choice([*WORDS, *_content(observation).split()[:50]]))

        return choose
    if isinstance(actions, str) or not all(isinstance(action, str) for action in actions):
        raise TypeError(f"actions={actions!r} must be a sequence of str, or a function of an observation and a generator")
    if not len(actions):
        raise ValueError("actions is empty; give at least one text, or leave it out")
    return lambda _, rng: str(rng.choice(list(actions)))


# --- the random generators of the process ------------------------------------------------------------------------------


def _states() -> dict[str, bytes]:
    """Return the state of each global random generator, as bytes to compare."""
    import torch  # imported here: nothing else in `import llm_env` needs it

    numpy_state: Any = np.random.get_state()
    return {
        "random": repr(random.getstate()).encode(),
        "numpy.random": repr((numpy_state[1].tobytes(), *numpy_state[2:])).encode(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


def _seed_generators(number: int) -> None:
    import torch

    random.seed(number)
    np.random.seed(number)
    torch.default_generator.manual_seed(number)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the state of all global random generators after the block."""
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


# --- playing -----------------------------------------------------------------------------------------------------------


@dataclass
class _Episode:
    """An episode as it was played.

    Attributes:
        seed: its seed.
        start: the first observation; None if `reset` failed.
        actions: the actions that were taken, also one that failed.
        turns: by turn: action, observation, reward, terminated, truncated.
        error: what was raised, or returned unusably; the episode ends there.
        states: of the global generators after the constructor, `reset` and each `step`, by call.
        seconds: of `reset` and each `step`.
    """

    seed: int
    start: Text | None = None
    actions: list[str] = field(default_factory=list)
    turns: list[tuple[str, Text, float, bool, bool]] = field(default_factory=list)
    error: Exception | None = None
    states: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def observations(self) -> list[Text]:
        """All observations, the first one included."""
        return [*([] if self.start is None else [self.start]), *(turn[1] for turn in self.turns)]

    @property
    def has_ended(self) -> bool:
        """Whether the environment ended the episode."""
        return bool(self.turns) and (self.turns[-1][3] or self.turns[-1][4])

    @property
    def played(self) -> tuple[Any, ...]:
        """What must be the same when the episode is played again."""
        return self.start, self.turns, None if self.error is None else str(self.error)


class _Player:
    """An instance that plays one episode, turn by turn."""

    def __init__(self, check: _Check, seed: int, env: Any = None, actions: Sequence[str] | None = None) -> None:
        self.check, self.actions, self.episode = check, actions, _Episode(seed)
        self.rng = np.random.default_rng([seed, 1])
        self.env = env
        self.is_over = False
        if env is None:
            self._call("the constructor", self._make)
        if not self.is_over:
            self._call("reset", self._reset)

    def _call(self, name: str, call: Callable[[], None]) -> None:
        begin = time.perf_counter()
        try:
            call()
        except Exception as error:
            self.episode.error, self.is_over = error, True
        if name != "the constructor":
            self.episode.seconds.append(time.perf_counter() - begin)
        if self.check.watches:
            self.episode.states.append((name, _states()))

    def _make(self) -> None:
        try:
            self.env = self.check.tasks.new()
        except TypeError:
            raise
        except Exception as error:
            raise EnvFailed(f"{self.check.tasks.name}() raised {type(error).__name__}: {error}") from error

    def _reset(self) -> None:
        self.episode.start, _ = self.check.tasks.reset(self.env, self.episode.seed)

    def step(self) -> None:
        """Take the next turn."""
        number = len(self.episode.turns)
        if self.actions is None:
            action = self.check.choose(self.episode.observations[-1], self.rng)
        else:
            if number == len(self.actions):
                self.is_over = True
                return
            action = self.actions[number]
        self.episode.actions.append(action)

        def step() -> None:
            result = self.check.tasks.step(self.env, action)
            self.episode.turns.append((action, result.observation, result.reward, result.terminated, result.truncated))

        self._call("step", step)
        self.is_over = self.is_over or self.episode.has_ended or len(self.episode.turns) >= self.check.turns

    def play(self) -> _Episode:
        """Play to the end."""
        while not self.is_over:
            self.step()
        return self.episode


class _Check:
    """The episodes of a check, and its rows.

    Args:
        tasks: makes and steps the instances.
        turns: maximum number of turns of an episode.
        choose: chooses an action.
    """

    def __init__(self, tasks: TextEnvTasks, turns: int, choose: Callable[[Text, np.random.Generator], str]) -> None:
        self.tasks, self.turns, self.choose = tasks, turns, choose
        self.watches = False

    def run(self, tokenizer: Any) -> list[CheckRow]:
        """Play all episodes and return the rows."""
        seeds = range(self.tasks.first_seed, self.tasks.first_seed + self.tasks.num_tasks)
        self.players, self.episodes = [], []
        for number in seeds:
            self.players.append(self._started(number))
            self.episodes.append(self.players[-1].play())
        started = [episode for episode in self.episodes if episode.start is not None]
        rows = [self._values(), self._exceptions()]
        names = ("same seed, same start", "same actions, same turns", "different seeds", "instances side by side",
                 "random generators", "step after the end", "observations are new text", "ends", "texts can be encoded",
                 "chat template", "lengths", "returns", "seconds")  # fmt: skip
        if not started:
            return [*rows, *(CheckRow(name, NOT_RUN, "no episode starts") for name in names)]
        after_end = self._after_the_end()
        same_start, same_turns, kept = self._again()
        return [
            *rows,
            same_start,
            same_turns,
            self._different_seeds(),
            self._side_by_side(),
            self._generators(),
            after_end,
            self._history(kept),
            self._ends(),
            self._encoded(tokenizer),
            self._template(tokenizer),
            self._lengths(tokenizer),
            self._returns(),
            self._seconds(),
        ]

    def _started(self, seed: int, state: int = 0, **arguments: Any) -> _Player:
        _seed_generators(2 * seed + state)
        return _Player(self, seed, **arguments)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _values(self) -> CheckRow:
        errors = [episode.error for episode in self.episodes if isinstance(episode.error, (TypeError, ValueError))]
        errors = [error for error in errors if not isinstance(error, EnvFailed) and "surrogate" not in str(error)]
        return CheckRow("values", FAILED, str(errors[0])) if errors else CheckRow("values", PASSED)

    def _exceptions(self) -> CheckRow:
        errors = [episode.error for episode in self.episodes if isinstance(episode.error, EnvFailed)]
        if not errors:
            return CheckRow("no exceptions", PASSED)
        detail = f"{errors[0]}. A model can write any text: answer it, or set on_error= to a reward"
        return CheckRow("no exceptions", FAILED, detail)

    def _again(self) -> tuple[CheckRow, CheckRow, str]:
        """Play each episode again; return two rows, and the history that a reset has kept."""
        starts: list[str] = []
        differences: list[str] = []
        kept = ""
        for player, episode in zip(self.players, self.episodes, strict=True):
            if episode.start is None:
                continue
            ways = [
                ("on the same instance", {"env": player.env}, 0),
                ("on a new instance", {}, 0),
                ("with the process's random generators in another state", {}, 1),
            ]
            for where, arguments, state in ways:
                again = self._started(episode.seed, state, actions=episode.actions, **arguments)
                other = again.play()
                if again.env is not player.env:
                    close(again.env)
                if other.start != episode.start:
                    starts.append(f"{where}: seed {episode.seed} gives {_shown(episode.start)}, then {_shown(other.start)}")
                    last = [text for text in episode.observations if isinstance(text, str) and len(text) >= HISTORY]
                    if isinstance(other.start, str) and any(text in other.start and text != other.start for text in last):
                        kept = f"the first observation after a reset contains one of the episode before: {_shown(other.start)}"
                elif other.played != episode.played:
                    differences.append(f"{where}: {_first_difference(episode, other)}")
        remedy = ". Draw all random numbers of an episode from np.random.default_rng(seed) in reset, and set all state there"
        rows = [
            CheckRow(check, FAILED, found[0] + remedy) if found else CheckRow(check, PASSED)
            for check, found in (("same seed, same start", starts), ("same actions, same turns", differences))
        ]
        return rows[0], rows[1], kept

    def _different_seeds(self) -> CheckRow:
        check, first = "different seeds", self.episodes[0]
        if len(self.episodes) == 1:
            return CheckRow(check, NOT_RUN, "n=1")
        for episode in self.episodes[1:]:
            player = self._started(episode.seed, actions=first.actions)
            other = player.play()
            close(player.env)
            if (other.start, other.turns) != (first.start, first.turns):
                return CheckRow(check, PASSED)
        detail = f"{len(self.episodes)} seeds give one episode: groups of different prompts would all be the same task"
        return CheckRow(check, NOTE, detail)

    def _side_by_side(self) -> CheckRow:
        """Play two seeds in turns, each on its own instance."""
        check = "instances side by side"
        pairs = list(zip(self.episodes, [*self.episodes[1:], self.episodes[0]], strict=True))
        for first, second in pairs:
            if first.start is None or second.start is None:
                continue
            players = [self._started(first.seed, actions=first.actions)]
            players.append(_Player(self, second.seed, actions=second.actions))
            while not all(player.is_over for player in players):
                for player in players:
                    if not player.is_over:
                        player.step()
            for player, alone in zip(players, (first, second), strict=True):
                close(player.env)
                if player.episode.played != alone.played:
                    detail = f"an episode changes while another instance plays: {_first_difference(alone, player.episode)}"
                    return CheckRow(check, FAILED, f"{detail}. Keep all state, random generators included, in the instance")
        return CheckRow(check, PASSED)

    def _generators(self) -> CheckRow:
        """Name the calls that change a global generator: to the same state whatever it was (seeds), or not (draws)."""
        check, found = "random generators", dict[str, None]()
        self.watches = True
        for episode in self.episodes:
            runs = []
            for state in (0, 1):
                _seed_generators(2 * episode.seed + state)
                before = _states()
                player = _Player(self, episode.seed, actions=episode.actions)
                runs.append([("before", before), *player.play().states])
                close(player.env)
            for (before_a, after_a), (before_b, after_b) in zip(pairwise(runs[0]), pairwise(runs[1]), strict=False):
                for name in before:
                    verb = _change(before_a[1][name], after_a[1][name], before_b[1][name], after_b[1][name])
                    if verb is not None:
                        found[f"{after_a[0]} {verb} {name}"] = None
        if not found:
            return CheckRow(check, PASSED)
        remedy = "use np.random.default_rng(seed) in reset, since other code draws from them as well"
        return CheckRow(check, FAILED, f"{', '.join(found)}: {remedy}")

    def _after_the_end(self) -> CheckRow:
        check = "step after the end"
        ended = [(player, episode) for player, episode in zip(self.players, self.episodes, strict=True) if episode.has_ended]
        if not ended:
            return CheckRow(check, NOT_RUN, f"no episode ended in {self.turns} turns")
        for player, episode in ended:
            try:
                result = self.tasks.step(player.env, episode.actions[-1])
            except Exception:  # refusing it is as good as any answer
                continue
            said = f"pays {result.reward:g} and " if result.reward else ""
            goes_on = "stays ended" if result.terminated or result.truncated else "goes on"
            if said or goes_on == "goes on":
                detail = f"seed {episode.seed} {said}{goes_on} after its end; in training, no episode is stepped there"
                return CheckRow(check, NOTE, detail)
        return CheckRow(check, PASSED)

    def _history(self, kept: str) -> CheckRow:
        check = "observations are new text"
        if kept:
            return CheckRow(check, FAILED, f"{kept}. Clear the history in reset")
        steps = [
            (before, after)
            for episode in self.episodes
            for before, after in pairwise(episode.observations)
            if isinstance(before, str) and isinstance(after, str) and len(before) >= HISTORY and after
        ]
        grown = [(before, after) for before, after in steps if before in after and len(after) > len(before)]
        if len(grown) >= 2 and 2 * len(grown) >= len(steps):
            before, after = grown[0]
            detail = (
                f"observations repeat the history: {_shown(after)} contains {_shown(before)}. The context keeps earlier "
                "observations: return what is new"
            )
            return CheckRow(check, FAILED, detail)
        return CheckRow(check, PASSED)

    def _ends(self) -> CheckRow:
        check = "ends"
        both = next((episode for episode in self.episodes if episode.turns and all(episode.turns[-1][3:])), None)
        if both is not None:
            return CheckRow(check, NOTE, f"seed {both.seed} ends as terminated and truncated; it counts as terminated")
        open_ended = sum(not episode.has_ended for episode in self.episodes)
        if open_ended == len(self.episodes):
            return CheckRow(check, NOTE, f"no episode ends within {self.turns} turns of random play; set max_turns")
        return CheckRow(
            check, PASSED, f"{open_ended} of {len(self.episodes)} go on after {self.turns} turns" if open_ended else ""
        )

    def _texts(self) -> list[str]:
        contents = (_content(observation) for episode in self.episodes for observation in episode.observations)
        return list(dict.fromkeys(filter(None, contents)))

    def _encoded(self, tokenizer: Any) -> CheckRow:
        check = "texts can be encoded"
        surrogates = [episode.error for episode in self.episodes if "surrogate" in str(episode.error)]
        if surrogates:
            return CheckRow(check, FAILED, str(surrogates[0]))
        special = {token for token in tokenizer.all_special_ids if token != tokenizer.unk_token_id}
        note = ""
        for text, ids in zip(self._texts(), encode_texts(tokenizer, self._texts(), special=False), strict=True):
            unknown = tokenizer.unk_token_id
            if unknown is not None and unknown in ids and tokenizer.unk_token not in text:
                detail = f"the tokenizer does not know a part of {_shown(text)}, and writes {tokenizer.unk_token}"
                return CheckRow(check, FAILED, detail)
            if found := special & set(ids):
                tokens = ", ".join(tokenizer.convert_ids_to_tokens(sorted(found)))
                note = f"{_shown(text)} contains the special token {tokens}, which a model may take for the end of a turn"
        return CheckRow(check, NOTE, note) if note else CheckRow(check, PASSED)

    def _template(self, tokenizer: Any) -> CheckRow:
        check = "chat template"
        chats = [episode.start for episode in self.episodes if isinstance(episode.start, list)]
        format = PromptFormat(tokenizer)
        if not format.has_template:
            if chats:
                detail = "observations are messages, but the tokenizer has no chat template; set chat_template="
                return CheckRow(check, FAILED, detail)
            return CheckRow(check, NOT_APPLICABLE, "the tokenizer has none")
        try:
            bridge = Bridge(format, {*as_token_ids(tokenizer.eos_token_id), *tokenizer.all_special_ids})
            for episode in self.episodes:
                if episode.start is not None:
                    format.render({"prompt": as_messages(episode.start)}, episode.seed)
                for turn in episode.turns:
                    bridge([], as_messages(turn[1]))
        except (ValueError, TypeError) as error:
            return CheckRow(check, FAILED, str(error))
        return CheckRow(check, PASSED)

    def _lengths(self, tokenizer: Any) -> CheckRow:
        def longest(observations: list[Text]) -> int:
            return max(map(len, encode_texts(tokenizer, [_content(text) for text in observations], special=False)), default=0)

        try:
            first = longest([episode.start for episode in self.episodes if episode.start is not None])
            later = longest([turn[1] for episode in self.episodes for turn in episode.turns])
        except Exception as error:
            return CheckRow("lengths", NOT_RUN, f"{type(error).__name__}: {error}")
        detail = f"first observations have up to {first} tokens, later ones {later}: max_prompt_tokens at least {first}"
        return CheckRow("lengths", NOTE, f"{detail}, max_observation_tokens={later}, without the chat template's own")

    def _returns(self) -> CheckRow:
        returns = np.array([sum(turn[2] for turn in episode.turns) for episode in self.episodes if episode.start is not None])
        detail = f"mean {returns.mean():.3g}, std {returns.std():.3g}, from {returns.min():.3g} to {returns.max():.3g}"
        if returns.min() == returns.max():
            detail += ": no signal under random play. Give actions= that can earn something, or shape the reward"
        return CheckRow("returns", NOTE, detail)

    def _seconds(self) -> CheckRow:
        resets = float(np.median([episode.seconds[0] for episode in self.episodes if episode.seconds]))
        steps = [second for episode in self.episodes for second in episode.seconds[1:]]
        step = float(np.median(steps)) if steps else 0.0
        remedy = "; set workers= to step several instances at a time" if max(resets, step) > SLOW else ""
        return CheckRow("seconds", NOTE, f"reset {resets:.2g}, step {step:.2g} (medians){remedy}")


def _change(before: bytes, after: bytes, other_before: bytes, other_after: bytes) -> str | None:
    """Say what a call did to a generator, from its states around the call in two runs that began in different states."""
    if before == after and other_before == other_after:
        return None
    if before == other_before:  # an earlier call has seeded it
        return "draws from or seeds"
    return "seeds" if after == other_after else "draws from"


def _first_difference(expected: _Episode, found: _Episode) -> str:
    """Describe where an episode departs from another of the same seed."""
    if expected.start != found.start:
        return f"seed {expected.seed} gives {_shown(expected.start)}, then {_shown(found.start)}"
    for number, (a, b) in enumerate(zip(expected.turns, found.turns, strict=False), 1):
        if a != b:
            return f"turn {number} of seed {expected.seed} gives {_shown(a[1:])}, then {_shown(b[1:])}"
    ends = [str(each.error) if each.error is not None else f"{len(each.turns)} turns" for each in (expected, found)]
    return f"seed {expected.seed} gives {short(ends[0])}, then {short(ends[1])}"


def _content(observation: Text) -> str:
    """Return the text of an observation; of messages, that of all of them."""
    contents = (message.get("content") for message in as_messages(observation))
    return " ".join(content for content in contents if isinstance(content, str))


def _shown(value: Any) -> str:
    return short(repr(value))
