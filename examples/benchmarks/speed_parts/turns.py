"""Time episodes of several turns: what the cache between turns saves, and what turns cost; `speed.py --turns`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.logger import Logger
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llm_env
from agents import GRPO
from agents.policy import LanguagePolicy
from agents.rollout import Rollout, from_episodes
from agents.sampling.generate import OnTurns, keeps_cache, sample_responses
from agents.sampling.sampler import Sampler
from speed_parts.work import Work

TURNS, TURN, OBSERVATION = 8, 16, 16  # turns, and tokens of a turn and of an observation
UNEVEN, LONG = 6, 64  # turns, and tokens of the long one; the others have one token
REPLAYED = 8  # rows of the token clock


@dataclass
class Case:
    """Something that is timed.

    Attributes:
        name: what it is.
        run: runs it once; returns seconds if it times itself.
        seconds: of each repetition.
        passes: forward passes of a repetition.
        tokens: tokens in these passes, padding included.
    """

    name: str
    run: Callable[[], float | None]
    seconds: list[float] = field(default_factory=list)
    passes: int = 0
    tokens: int = 0

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


class Conversations:
    """Conversations of the model with a world that says random words.

    Args:
        work: model, prompts and groups.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(work.model).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(work.model)
        self.prompts: list[list[int]] = self.tokenizer(work.texts())["input_ids"]
        drawn = np.random.default_rng(0).integers(work.vocabulary - 1, size=(work.batch, OBSERVATION))
        self.observations: list[list[int]] = drawn.tolist()
        if not keeps_cache(
            self.model, work.group, work.prompt + TURNS * (TURN + OBSERVATION), "auto"
        ):  # trials are passes, too
            raise SystemExit("this model's cache cannot be kept between turns")

    def sample(self, contexts: Sequence[Sequence[int]], group: int, limit: int, **settings: Any) -> list[list[int]]:
        """Sample turns; by default all have `limit` tokens."""
        sampler, work = Sampler(generator=torch.Generator().manual_seed(0)), self.work
        settings = {"vocab_size": work.vocabulary - 1, "eos_id": work.vocabulary - 1, **settings}
        return sample_responses(self.model, contexts, sampler, group_size=group, max_new_tokens=limit, **settings)[0]

    def replies(self, turns: int) -> OnTurns:
        """Return an `on_turns` that replies until a row has taken `turns` turns."""
        left = [turns] * self.work.batch

        def on_turns(rows: Sequence[int], _: Any, __: Any) -> list[list[int] | None]:
            for row in rows:
                left[row] -= 1
            return [self.observations[row] if left[row] else None for row in rows]

        return on_turns

    # --- what is timed ---------------------------------------------------------------------------------------------------

    def turn_by_turn(self) -> None:
        """All rows take turns of equal length."""
        room = TURNS * (TURN + OBSERVATION)
        self.sample(self.prompts, self.work.group, TURN, on_turns=self.replies(TURNS), max_episode_tokens=room)

    def one_turn(self) -> None:
        """One turn with as many tokens; the prompt is longer by the mean of what observations add to the context."""
        added = (TURNS - 1) * OBSERVATION // 2
        prompts = [prompt + (self.observations[i] * TURNS)[:added] for i, prompt in enumerate(self.prompts)]
        self.sample(prompts, self.work.group, TURNS * TURN)

    @torch.no_grad()
    def prefills(self) -> None:
        """Compute the observations alone, in a pass for each turn."""
        ids = torch.tensor(self.observations)
        for _ in range(TURNS - 1):
            self.model(ids, use_cache=False, logits_to_keep=1)

    def resent(self) -> None:
        """Compute the whole context again in every turn."""
        contexts, group = self.prompts, self.work.group
        for _ in range(TURNS):
            turns = self.sample(contexts, group, TURN)
            starts = contexts if group == 1 else [prompt for prompt in contexts for _ in range(group)]
            contexts, group = [a + b + c for a, b, c in zip(starts, turns, self.observations, strict=True)], 1

    def uneven(self) -> None:
        """Row i speaks `LONG` tokens in turn i mod `UNEVEN`, and one token elsewhere; no row waits for another."""
        rule, replies = _Uneven(self), self.replies(UNEVEN)

        def on_turns(rows: Sequence[int], turns: list[list[int]], logps: list[np.ndarray]) -> list[list[int] | None]:
            rule.count(rows, turns)
            return replies(rows, turns, logps)

        room = UNEVEN * (1 + OBSERVATION) + LONG
        self.sample(rule.contexts, 1, LONG, on_turns=on_turns, max_episode_tokens=room, **rule.settings)

    def uneven_lockstep(self) -> None:
        """The same in lockstep: all rows wait for the longest turn, and contexts are computed again."""
        rule = _Uneven(self)
        contexts = rule.contexts
        for _ in range(UNEVEN):
            turns = self.sample(contexts, 1, LONG, **rule.settings)
            rule.count(range(len(turns)), turns)
            contexts = [a + b + c for a, b, c in zip(contexts, turns, self.observations, strict=True)]

    def token_clock(self, turns: int) -> None:
        """Predict token by token, `REPLAYED` rows at a time."""
        policy = LanguagePolicy(self.model, self.tokenizer)
        rows, state = [list(self.prompts[i % len(self.prompts)]) for i in range(REPLAYED)], None
        for _ in range(turns):
            for _ in range(TURN):
                tokens, _, state = policy.next_tokens(rows, state, Sampler(generator=torch.Generator().manual_seed(0)))
                rows = [[*row, int(token)] for row, token in zip(rows, tokens, strict=True)]
            rows = [[*row, *self.observations[i % len(self.observations)]] for i, row in enumerate(rows)]

    def update(self, with_observations: bool) -> float:
        """Train on episodes of equal length, with and without observations in them; return the seconds of the update."""
        work, length = self.work, TURNS * (TURN + OBSERVATION)
        words = np.random.default_rng(1).integers(work.vocabulary - 1, size=(work.batch, length)).tolist()
        turn = np.arange(length) // (TURN + OBSERVATION)
        is_written = (np.arange(length) % (TURN + OBSERVATION) >= TURN) & with_observations
        turn_ids = np.where(is_written, -1, turn if with_observations else 0)
        agent = self._agent(length)
        rewards = np.zeros((work.batch, length))
        rewards[:, np.flatnonzero(turn_ids >= 0)[-1]] = np.arange(work.batch) % 3
        rollout = self._rollout(words, rewards, turn_ids)
        begin = time.perf_counter()
        agent.train(rollout)
        return time.perf_counter() - begin

    def _agent(self, length: int) -> GRPO:
        env = llm_env.TextGenerationEnv(
            ["w0"], lambda completions: [0.0] * len(completions), self.tokenizer, max_prompt_tokens=self.work.prompt,
            max_new_tokens=length,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(self.work.model)
        agent = GRPO(model, env, group_size=self.work.group, n_envs=self.work.batch, preflight=False)
        agent.set_logger(Logger(None, []))
        return agent

    def _rollout(self, words: list[list[int]], rewards: np.ndarray, turn_ids: np.ndarray) -> Rollout:
        prompts = [prompt for prompt in self.prompts for _ in range(self.work.group)]
        logps, batch = np.zeros(rewards.shape), self.work.batch
        infos: list[dict[str, Any]] = [{"completion": ""} for _ in range(batch)]
        return from_episodes(
            prompts, words, rewards, logps, None, [False] * batch, infos, self.work.group, torch.device("cpu"),
            [turn_ids] * batch,
        )  # fmt: skip


class _Uneven:
    """A constraint by which each turn ends after its own number of tokens; contexts name the row after the prompt."""

    def __init__(self, conversations: Conversations) -> None:
        work = conversations.work
        self.lengths = [[LONG if turn == row % UNEVEN else 1 for turn in range(UNEVEN)] for row in range(work.batch)]
        self.contexts = [[*conversations.prompts[row // work.group], row] for row in range(work.batch)]
        self._size, self._prompt, self._taken = work.vocabulary, work.prompt, [0] * work.batch

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `sample_responses`: here the end token can be sampled."""
        return {"constraint": self, "vocab_size": self._size}

    def masks(self, requests: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
        """Return the allowed tokens (R, V): words, or the end token alone."""
        masks = np.ones((len(requests), self._size), dtype=bool)
        for mask, (context, turn) in zip(masks, requests, strict=True):
            row = context[self._prompt]
            ends = len(turn) + 1 == self.lengths[row][self._taken[row]]
            mask[:-1], mask[-1] = not ends, ends
        return masks

    def count(self, rows: Sequence[int], turns: list[list[int]]) -> None:
        """Count turns that were taken, and check their lengths."""
        for row, turn in zip(rows, turns, strict=True):
            if len(turn) != self.lengths[row][self._taken[row]]:
                raise RuntimeError(f"row {row} spoke {len(turn)} tokens in turn {self._taken[row]}")
            self._taken[row] += 1


def measure_turns(work: Work, repeats: int, warm_ups: int) -> dict[str, Case]:
    """Time all cases in turns (A B C A B C); return them by key."""
    talk = Conversations(work)
    cases = {
        "turns": Case(f"{TURNS} turns of {TURN} tokens, observations of {OBSERVATION}", talk.turn_by_turn),
        "one": Case(f"one turn of {TURNS * TURN} tokens at the same key/value length", talk.one_turn),
        "prefills": Case(f"the observations alone, {TURNS - 1} passes without a cache", talk.prefills),
        "resent": Case("the turns with the context computed again in each", talk.resent),
        "uneven": Case(f"{UNEVEN} turns, one of {LONG} tokens and the others of 1", talk.uneven),
        "lockstep": Case("the same in lockstep", talk.uneven_lockstep),
        "clock 4": Case(f"token clock, {REPLAYED} rows, {TURNS // 2} turns", lambda: talk.token_clock(TURNS // 2)),
        "clock 8": Case(f"token clock, {REPLAYED} rows, {TURNS} turns", lambda: talk.token_clock(TURNS)),
        "update": Case("update on these episodes", lambda: talk.update(True)),
        "update one": Case("update on episodes of one turn, of equal length", lambda: talk.update(False)),
    }
    passes: list[int] = []
    talk.model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append((args[0] if args else kwargs["input_ids"]).numel()), with_kwargs=True
    )
    for repetition in range(warm_ups + repeats):
        for case in cases.values():
            passes.clear()
            begin = time.perf_counter()
            own = case.run()
            seconds = time.perf_counter() - begin if own is None else own
            if repetition >= warm_ups:
                case.seconds.append(seconds)
                case.passes, case.tokens = len(passes), sum(passes)
        print(f"repetition {repetition + 1} of {warm_ups + repeats}", flush=True)
    return cases


def ratios(cases: dict[str, Case]) -> list[tuple[str, float]]:
    """Return what the measurement is about, as ratios of medians."""
    seconds = {key: case.median for key, case in cases.items()}
    return [
        ("turns / (one turn + observations)", seconds["turns"] / (seconds["one"] + seconds["prefills"])),
        ("turns / contexts computed again", seconds["turns"] / seconds["resent"]),
        ("uneven turns / lockstep", seconds["uneven"] / seconds["lockstep"]),
        (f"token clock: {TURNS} turns / {TURNS // 2} turns", seconds["clock 8"] / seconds["clock 4"]),
        ("update: seconds per token of one turn / of turns", seconds["update one"] / seconds["update"]),
    ]


def report_turns(title: str, cases: dict[str, Case]) -> str:
    """Return the tables in Markdown."""
    rows = [["what", "seconds", "forward passes", "tokens in them"]]
    rows += [
        [case.name, f"{case.median:.2f}", str(case.passes or ""), f"{case.tokens or '':,}" if case.tokens else ""]
        for case in cases.values()
    ]
    found = [["ratio of medians", ""], *([name, f"{value:.3f}"] for name, value in ratios(cases))]
    return f"# Episodes of several turns\n\n{title}\n\n{_table(rows)}\n\n{_table(found)}\n"


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def draw_turns(cases: dict[str, Case], path: Any) -> None:
    """Draw the seconds of all cases as bars, in three panels."""
    panels = [("Equal turns", ["turns", "one", "prefills", "resent"]), ("Uneven turns", ["uneven", "lockstep"])]
    panels += [("Token clock", ["clock 4", "clock 8"]), ("Update", ["update", "update one"])]
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(len(panels), 1, height_ratios=[len(keys) + 0.8 for _, keys in panels])
    for axis, (title, keys) in zip(axes, panels, strict=True):
        bars = axis.barh([cases[key].name for key in keys], [cases[key].median for key in keys], color="C0", alpha=0.8)
        axis.bar_label(bars, [f"{cases[key].median:.2f} s" for key in keys], padding=3)
        axis.invert_yaxis()
        axis.set_title(title, loc="left", fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds (median)")
    figure.savefig(path, dpi=110)
