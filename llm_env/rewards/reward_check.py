"""Check reward functions for common errors before training; see `check_reward`."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import gymnasium as gym
import numpy as np

from llm_env.prompts import PromptTable
from llm_env.report import FAILED, NOT_APPLICABLE, NOT_RUN, NOTE, PASSED, CheckRow, Report, short
from llm_env.rewards.pool import PooledReward
from llm_env.rewards.probes import GOLD_COLUMNS, Gold, Sample, choose_prompts, known_answers, make_probes
from llm_env.rewards.sums import RewardSum

ROUNDS, SECONDS = 3, 0.3  # minimum number of calls per thread, and minimum duration of the calls in seconds


class RewardTask(Protocol):
    """Attributes of an env's rules (`llm_env.rules.Rules`) that the check reads."""

    prompts: PromptTable
    rewards: RewardSum
    success: str | None
    tokenizer: Any
    eos_id: int
    max_new_tokens: int
    text_env: Any


def check_reward(env: Any, *, gold: Gold = None, n: int = 64, seed: int = 0, threads: int = 4, quiet: bool = False) -> Report:
    """Check the reward functions of an env; print and return a table of results.

    The completions are constructed; no model is needed. For every task, the check verifies that the reward

    - returns one score per sample, in batches of 1 and larger ones,
    - returns a finite number for any text,
    - returns equal scores for equal input: called again, twice in one batch, in another order and alone,
    - returns equal scores when several threads call it at the same time.

    For tasks with known answers, the gold answer must get the maximum. These completions must not get it: empty text, the
    echoed prompt, the answer among junk, the answer repeated, and all answers at once. If the env's `success` names a
    component, the maximum means that this component is at least 1. Otherwise the gold answer must score higher than all of
    these completions. Wrappers around the env are ignored.

    Args:
        env: a text env, single or vector, wrapped or not, or its id.
        gold: the gold completion: the name of a column, or a function from a row (a dict of `prompt` and the columns) to the
            completion. By default the column `solution`, else `answer`; without either, no answers are known.
        n: maximum number of prompts. Prompts with different answer formats are preferred.
        seed: seed for the choice of prompts and the junk; equal seeds give equal tables.
        threads: number of threads that call the reward in parallel.
        quiet: whether to skip printing.

    Raises:
        TypeError: If `env` is not a text env.
        ValueError: If `n` or `threads` is less than 1, there is no column `gold`, or the env is made from a text env.

    Examples:
        >>> import llm_env
        >>> def mentions(completions, answer, **kwargs):
        ...     return [float(a in c) for c, a in zip(completions, answer)]
        >>> rows = [{"prompt": f"{a}+7=", "answer": str(a + 7)} for a in range(10, 19)]
        >>> env = llm_env.TextGenerationEnv(rows, mentions, llm_env.PUPIL)
        >>> report = llm_env.check_reward(env, quiet=True)
        >>> report.passed, [row.check for row in report.rows if row.result == "FAILED"]
        (False, ['answer among junk', 'answer repeated', 'all answers at once'])
        >>> llm_env.check_reward("llm_env/Addition-v0").passed
        one score per sample           passed
        a finite number for any text   passed
        equal score when called again  passed
        equal score twice in a batch   passed
        equal score in another batch   passed
        safe under threads             passed
        gold gets the maximum          passed
        empty text                     passed
        echoed prompt                  passed
        answer among junk              passed
        answer repeated                passed
        all answers at once            passed
        gold fits max_new_tokens       passed
        => passed
        True
    """
    if n < 1 or threads < 1:
        raise ValueError(f"n={n} and threads={threads} must be at least 1")
    rules = _rules(env)
    if rules.text_env is not None:
        raise ValueError(
            "check_reward makes up single answers; a text env pays its own turns. Check its reward functions alone"
        )
    rng = np.random.default_rng(seed)
    golds = known_answers(rules.prompts, gold)
    indexes = choose_prompts(rules.prompts, golds, n, rng)
    probes = make_probes(rules.prompts, golds, indexes, rng)
    lint = _Lint(rules, probes, golds, indexes)
    with _uncached(rules):
        rows = [*lint.numbers(), *lint.equality()]
        steady = not any(row.result == FAILED for row in rows)
        unsteady = CheckRow("safe under threads", NOT_RUN, "the scores differ or fail without threads, see above")
        rows.append(lint.threads(threads) if steady else unsteady)
        report = Report([*rows, *lint.answers(), lint.lengths()])
    if not quiet:
        print(report)
    return report


def _rules(env: Any) -> RewardTask:
    rules: Any = getattr(getattr(gym.make(env) if isinstance(env, str) else env, "unwrapped", None), "rules", None)
    if not isinstance(getattr(rules, "rewards", None), RewardSum):
        raise TypeError(f"check_reward takes a text env, single or vector, or its id; this is a {type(env).__name__}")
    return rules


class _Lint:
    """Run the checks on one set of test completions."""

    def __init__(self, rules: RewardTask, probes: dict[str, Sample], golds: dict[int, str], indexes: list[int]) -> None:
        self.rules, self.probes, self.golds, self.indexes = rules, probes, golds, indexes
        self.failures: list[str] = []
        self.scores: dict[str, np.ndarray] = {}
        mixed = [(i, text) for sample in probes.values() for i, text in zip(sample.indexes, sample.completions, strict=True)]
        step = -(-len(mixed) // max(len(indexes), 8))
        self.mixed = Sample([i for i, _ in mixed[::step]], [text for _, text in mixed[::step]])

    def given(self, sample: Sample) -> tuple[Any, ...]:
        """Return the arguments of the reward call for a sample."""
        prompts, completions, columns = self.rules.prompts.reward_inputs(sample.indexes, sample.completions)
        texts = [self.rules.prompts.texts[i] for i in sample.indexes]
        return prompts, completions, [self._ids(text) for text in sample.completions], columns, texts

    def pay(self, given: tuple[Any, ...]) -> np.ndarray:
        """Call the reward; return (B,) values of the success component, or of the weighted sum."""
        scored = self.rules.rewards(*given)
        for error in scored.errors.values():  # a replacement score (on_error) is not a score
            raise ValueError(f"the reward failed: {error}")
        return scored.total if self.rules.success is None else scored.components[self.rules.success]

    def score(self, sample: Sample) -> np.ndarray:
        """Return the (B,) scores of a sample."""
        return self.pay(self.given(sample))

    def _ids(self, text: str) -> list[int]:
        return [*self.rules.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], self.rules.eos_id]

    def numbers(self) -> list[CheckRow]:
        """Check that every sample gets one finite number, in single, uniform and mixed batches."""
        counts: list[str] = []
        others: list[str] = []
        singles = [self.mixed.take([i]) for i in range(0, len(self.mixed.indexes), -(-len(self.mixed.indexes) // 8))]
        batches = [("", sample) for sample in [*singles, self.mixed]]
        for check, sample in [*batches, *((check, sample) for check, sample in self.probes.items() if sample.indexes)]:
            try:
                self.scores[check] = self.score(sample)
            except Exception as error:
                is_count = re.search(r"returned \d+ values for|returned None for all|but returned ", str(error))
                (counts if is_count else others).append(f"{error}" if isinstance(error, ValueError) else repr(error))
        self.failures = counts + others
        return [
            CheckRow(check, FAILED if messages else PASSED, short(messages[0], 300) if messages else "")
            for check, messages in (("one score per sample", counts), ("a finite number for any text", others))
        ]

    def _run(self, check: str, examine: Callable[[], str]) -> CheckRow:
        """Run a check and return its row. `examine` returns a description of the failure, or ""."""
        try:
            detail = examine()
        except Exception as error:
            if self.failures:
                return CheckRow(check, NOT_RUN, "the reward function fails, see above")
            return CheckRow(check, FAILED, short(f"{type(error).__name__}: {error}", 300))
        return CheckRow(check, FAILED if detail else PASSED, detail)

    def _differences(self, sample: Sample, expected: np.ndarray, got: np.ndarray) -> str:
        wrong = np.flatnonzero(~np.isclose(got, expected, rtol=1e-4, atol=1e-6, equal_nan=True))
        if not len(wrong):
            return ""
        i = wrong[0]
        return f"{len(wrong)} of {len(got)} differ, such as {self._example(sample, i)}: {expected[i]:g}, then {got[i]:g}"

    def _example(self, sample: Sample, i: int) -> str:
        prompt = self.rules.prompts.texts[sample.indexes[i]]
        return f"prompt {short(repr(prompt))}, completion {short(repr(sample.completions[i]))}"

    def equality(self) -> list[CheckRow]:
        """Check that the score of a sample depends only on the sample."""
        sample, size = self.mixed, len(self.mixed.indexes)

        def again() -> str:
            return self._differences(sample, self.score(sample), self.score(sample))

        def twice() -> str:
            both = self.score(sample.take([*range(size), *range(size)]))
            return self._differences(sample, both[:size], both[size:])

        def order() -> str:
            expected = self.score(sample)
            backwards = self.score(sample.take(range(size)[::-1]))[::-1]
            alone = list(range(0, size, -(-size // 8)))
            single = np.concatenate([self.score(sample.take([i])) for i in alone])
            return self._differences(sample, expected, backwards) or self._differences(
                sample.take(alone), expected[alone], single
            )

        return [
            self._run("equal score when called again", again),
            self._run("equal score twice in a batch", twice),
            self._run("equal score in another batch", order),
        ]

    def threads(self, threads: int) -> CheckRow:
        """Check that several threads with different batches get the same scores as one thread."""
        sample, size = self.mixed, len(self.mixed.indexes)

        def examine() -> str:
            expected = self.score(sample)
            orders = [np.roll(np.arange(size), shift * size // threads).tolist() for shift in range(threads)]
            batches = [(sample.take(order), expected[order]) for order in orders]
            given = [self.given(batch) for batch, _ in batches]
            barrier = threading.Barrier(threads)

            def work(thread: int) -> str:
                barrier.wait()
                begin, calls = time.perf_counter(), 0
                while calls < ROUNDS or time.perf_counter() - begin < SECONDS:
                    if detail := self._differences(*batches[thread], self.pay(given[thread])):
                        return detail
                    calls += 1
                return ""

            with _eager_switching(), ThreadPoolExecutor(threads) as pool:
                return next(filter(None, pool.map(work, range(threads))), "")

        return self._run("safe under threads", examine)

    def answers(self) -> list[CheckRow]:
        """Check that gold answers get the maximum, and that wrong completions do not."""
        checks = [check for check in self.probes if check != "gold"]
        if not self.golds:
            why = f"no answers known: no column {' or '.join(map(repr, GOLD_COLUMNS))}; give gold="
            return [CheckRow(check, NOT_APPLICABLE, why) for check in ("gold gets the maximum", *checks)]
        return [self._run("gold gets the maximum", self._gold), *(self._junk_row(check) for check in checks)]

    def _gold(self) -> str:
        sample, scores = self.probes["gold"], self.scores["gold"]
        if self.rules.success is not None:
            return self._paid(sample, ~(scores >= 1), scores, "do not get 1 or more")
        best = self._gold_scores()
        junk = [probe for check, probe in self.probes.items() if check != "gold" and probe.indexes]
        above = [(probe, scored, scored > best[probe.indexes]) for probe in junk for scored in [self.score(probe)]]
        return next(
            (self._paid(probe, high, scored, "beat the gold answer") for probe, scored, high in above if high.any()), ""
        )

    def _gold_scores(self) -> np.ndarray:
        """Return the gold scores by prompt index; infinity for prompts without a gold answer."""
        best = np.full(len(self.rules.prompts), np.inf)
        best[self.probes["gold"].indexes] = self.scores["gold"]
        return best

    def _junk_row(self, check: str) -> CheckRow:
        sample = self.probes[check]
        if not sample.indexes:
            return CheckRow(check, NOT_APPLICABLE, "all gold answers are the same")

        def examine() -> str:
            scores = self.scores[check]
            limit = np.ones(len(scores)) if self.rules.success is not None else self._gold_scores()[sample.indexes]
            return self._paid(sample, scores >= limit, scores, "are paid like the gold answer")

        return self._run(check, examine)

    def _paid(self, sample: Sample, wrong: np.ndarray, scores: np.ndarray, what: str) -> str:
        if not wrong.any():
            return ""
        i = int(np.flatnonzero(wrong)[0])
        gold = short(repr(self.golds.get(sample.indexes[i])))
        return f"{wrong.sum()} of {len(wrong)} {what}, such as {self._example(sample, i)}: {scores[i]:g} (gold {gold})"

    def lengths(self) -> CheckRow:
        """Check that the gold answers, with their end token, fit into `max_new_tokens`."""
        check, limit = "gold fits max_new_tokens", self.rules.max_new_tokens
        if not self.golds:
            return CheckRow(check, NOT_APPLICABLE, "no answers known")
        lengths = [len(self._ids(text)) for text in self.probes["gold"].completions]
        long = sum(length > limit for length in lengths)
        if not long:
            return CheckRow(check, PASSED)
        detail = f"{long} of {len(lengths)} gold answers need more than max_new_tokens={limit} tokens, up to {max(lengths)}"
        return CheckRow(check, NOTE, detail)


@contextmanager
def _eager_switching() -> Iterator[None]:
    """Switch threads every microsecond, to expose shared state."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


@contextmanager
def _uncached(rules: RewardTask) -> Iterator[None]:
    """Disable the caches of pools without clearing them: a cache would hide random scores."""
    pools = [function for function in rules.rewards.functions if isinstance(function, PooledReward)]
    sizes = [pool.cache_size for pool in pools]
    for pool in pools:
        pool.cache_size = 0
    try:
        yield
    finally:
        for pool, size in zip(pools, sizes, strict=True):
            pool.cache_size = size
