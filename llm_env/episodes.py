"""Episodes of token ids: turns of the policy, observations of the env, ends and rewards. Numpy only.

Both clocks of every env call `Episodes.advance`: a token is a part of an open turn. A prompt with one answer is an episode of
one turn.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llm_env.dialogue.text_env import Transition, as_messages, env_scores
from llm_env.observations import observe
from llm_env.prompts import TaskTable
from llm_env.rewards import ENV_REWARD, NOTES, Scores
from llm_env.rules import Rules
from llm_env.tools.toolset import TOOL_COUNTS, ToolSessions


@dataclass
class StepOutcome:
    """The result of R rows that were given up to n tokens each.

    Attributes:
        rewards: (R, n) float64, one number per action token, 0 at padding.
        terminated: (R,) bool, ended by an end token or stop string, or by the text env.
        truncated: (R,) bool, ended by a limit, or cut off by the text env. If both are False, the episode continues.
        ref_logp: (R, n) float32, log pi_ref of the tokens in nats, NaN if the reference was not asked; None without one.
        observations: R int64 arrays, the tokens that the env wrote after a turn; empty otherwise.
        infos: infos by row number: the last infos of rows that ended, and `turn_truncated` of rows whose turn was cut.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    ref_logp: np.ndarray | None
    observations: list[np.ndarray]
    infos: dict[int, dict[str, Any]]

    @property
    def ended(self) -> np.ndarray:
        """(R,) bool, rows whose episode has ended."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class Turn:
    """A turn of the policy and the reply of the env.

    Attributes:
        text: the turn, without special tokens.
        transition: the reply; None without a text env and tools, or if the turn was not given to them.
        is_cut: whether the turn reached its limit.
        given: the turn as the text env or the tools got it; see `Rules.turn_text`.
        closing: what the text env paid when a limit ended the episode with this turn; None otherwise.
    """

    text: str
    transition: Transition | None
    is_cut: bool
    given: str = ""
    closing: Transition | None = None

    @property
    def reward(self) -> float | None:
        """What the text env paid for the turn; None if the turn was not given to it and nothing was paid."""
        paid = [result.reward for result in (self.transition, self.closing) if result is not None]
        return sum(paid) if paid else None


@dataclass(frozen=True)
class Utterance:
    """One line of a transcript.

    Attributes:
        speaker: `"env"` or `"policy"`.
        text: what it wrote, without special tokens.
        reward: of the text env for a turn of the policy; None if it paid none.
        is_cut: whether the turn reached its limit.
    """

    speaker: str
    text: str
    reward: float | None = None
    is_cut: bool = False


def padded(rows: Sequence[Any], lengths: np.ndarray, dtype: Any) -> np.ndarray:
    """Pad rows on the right with zeros; return (B, the longest)."""
    padded_rows = np.zeros((len(rows), int(lengths.max(initial=0))), dtype=dtype)
    for i, row in enumerate(rows):
        padded_rows[i, : len(row)] = row
    return padded_rows


def transcript_text(utterances: Sequence[Utterance]) -> str:
    """Return a transcript as text, a line per utterance, with the reward of each turn."""
    lines = []
    for each in utterances:
        reward = "" if each.reward is None else f"  [reward {each.reward:g}]"
        lines.append(f"{each.speaker + ':':<8}{each.text!r}{'  [cut]' if each.is_cut else ''}{reward}")
    return "\n".join(lines)


class Episodes:
    """The state of B episodes, and the rules by which they advance.

    Args:
        rules: the rules, shared by all rows.
        num_rows: B.

    Attributes:
        ids: (B, L) int64, the prompt and all tokens after it, right-padded; a token's index is its position.
        turn_ids: (B, L - P) int64 by token after the prompt: its turn, from 0; -1 for tokens of the env and padding.
        prompt_lengths: (B,) int64.
        lengths: (B,) int64, tokens after the prompt, of turns and observations.
        num_actions: (B,) int64, tokens of turns.
        turn_starts: (B,) int64, index after the prompt at which the open turn begins.
        finished: (B,) bool, True until a row is started.
        prompt_indexes: (B,) int64, the index of each row's prompt.
        turns: B lists of the turns that have ended.
        scores: (B,) float64, what rewards and ends paid for the last episode that ended in a row, without a KL.
        deadline: time of `time.monotonic()` after which no new turn begins; None for no limit.
    """

    def __init__(self, rules: Rules, num_rows: int) -> None:
        self.rules = rules
        width = rules.max_episode_tokens
        self.ids = np.full((num_rows, rules.max_tokens), rules.pad_id, dtype=np.int64)
        self.turn_ids = np.full((num_rows, width), -1, dtype=np.int64)
        self.prompt_lengths, self.lengths, self.num_actions, self.turn_starts, self.prompt_indexes = np.zeros(
            (5, num_rows), dtype=np.int64
        )
        self.finished = np.ones(num_rows, dtype=bool)
        self.turns: list[list[Turn]] = [[] for _ in range(num_rows)]
        self._logp = np.full((num_rows, width), np.nan, dtype=np.float64)
        self._ref_logp = np.full((num_rows, width), np.nan, dtype=np.float32)
        self._paid_steps = np.zeros(num_rows)
        self._step_errors = [""] * num_rows
        self.scores = np.full(num_rows, np.nan)
        self._sessions = rules.sessions()
        self._unsettled: list[list[_Segment]] = [[] for _ in range(num_rows)]
        self.deadline: float | None = None

    def start(self, rows: Sequence[int] | np.ndarray, prompt_indexes: Sequence[int]) -> None:
        """Begin new episodes in `rows` with the prompts `prompt_indexes`, which exist."""
        prompts = [self.rules.prompts.ids[index] for index in prompt_indexes]  # a text env may raise here
        for row, index, prompt in zip(np.asarray(rows).tolist(), prompt_indexes, prompts, strict=True):
            self.ids[row] = self.rules.pad_id
            self.ids[row, : len(prompt)] = prompt
            self.prompt_lengths[row] = len(prompt)
            self.prompt_indexes[row] = index
            self.turns[row] = []
            self._unsettled[row] = []
            self._step_errors[row] = ""
            if isinstance(self._sessions, ToolSessions):
                self._sessions.start(row, self.rules.prompts.messages[index] is not None)
            elif self._sessions is not None:
                assert isinstance(self.rules.prompts, TaskTable)
                task = self.rules.prompts.task(index)
                self._sessions.start(row, task.seed, task.observation)
        for counts in (self.lengths, self.num_actions, self.turn_starts):
            counts[rows] = 0
        self.finished[rows] = False
        self.turn_ids[rows] = -1
        self._logp[rows] = np.nan
        self._ref_logp[rows] = np.nan
        self._paid_steps[rows] = 0.0

    def close(self) -> None:
        """Close the instances of the text env."""
        if self._sessions is not None:
            self._sessions.close()

    def observation(self) -> Any:
        """Return the observations of all rows, new arrays at every call; see `llm_env.observations`."""
        return observe(self.rules.observation, self.ids, self.prompt_lengths + self.lengths)

    def prompt(self, row: int) -> np.ndarray:
        """Return the prompt's token ids, (P,)."""
        return self.ids[row, : self.prompt_lengths[row]]

    def response(self, row: int) -> np.ndarray:
        """Return the tokens after the prompt, (T,): turns and observations."""
        return self.ids[row, self.prompt_lengths[row] :][: self.lengths[row]]

    def turn(self, row: int) -> np.ndarray:
        """Return the tokens of the open turn."""
        return self.response(row)[self.turn_starts[row] :]

    def context(self, row: int) -> np.ndarray:
        """Return the tokens before the open turn: the prompt, and earlier turns and observations."""
        return self.ids[row, : self.prompt_lengths[row] + self.turn_starts[row]]

    def actions(self, row: int) -> np.ndarray:
        """Return which tokens after the prompt are actions, (T,) bool."""
        return self.turn_ids[row, : self.lengths[row]] >= 0

    def log_probs(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return log pi and log pi_ref of the action tokens so far, one number each, in nats; NaN if not known."""
        at = np.flatnonzero(self.actions(row))
        return self._logp[row, at], self._ref_logp[row, at]

    def turn_limits(self, rows: np.ndarray) -> np.ndarray:
        """Return the maximum lengths of the open turns: `max_new_tokens`, or less where the episode has less room."""
        return np.minimum(self.rules.max_new_tokens, self.rules.max_episode_tokens - self.turn_starts[rows])

    def advance(
        self,
        rows: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        logprobs: np.ndarray | None = None,
        score_reference: bool = False,
    ) -> StepOutcome:
        """Append tokens to the open turns of rows, step the text env where a turn ends, and pay.

        Args:
            rows: (R,) distinct row numbers.
            tokens: (R, n) int64 action tokens, row i holding `lengths[i]` of them.
            lengths: (R,) int64, at most n; a row of length 0 stays as it is.
            logprobs: (R, n) log pi of the tokens in nats, where known.
            score_reference: ask the reference about all tokens now, not only when an episode ends or a KL is paid.

        Raises:
            ValueError: If a row has ended; a token is out of range, comes after the end of the turn, or exceeds the limit; a
                reward function failed, a text env returned unusable values, or the record could not be written. No row has
                changed then.
            RuntimeError: If a text env raised an exception. No row has changed then.
        """
        before, state = self.lengths[rows], self._save(rows)
        try:
            segments = self._write(rows, tokens, lengths, logprobs)
            new = _NewTokens(rows, before, lengths, [[segment] for segment in segments], np.zeros(tokens.shape))
            infos = self._settle(new, score_reference)
        except BaseException:
            self._restore(rows, state)
            raise
        self.finished[rows[new.ended]] = True
        return self._outcome(new, infos)

    def advance_turns(
        self, rows: np.ndarray, turns: Sequence[Sequence[int]], logprobs: Sequence[Any]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Append turns and step the text env; rewards, reference and infos are left for `settle`.

        Args:
            rows: (R,) distinct row numbers.
            turns: R lists of action tokens, at least one each.
            logprobs: R lists of log pi of the tokens, in nats.

        Returns:
            The tokens that the env wrote after each turn, R int64 arrays; and which episodes have ended, (R,) bool.

        Raises:
            ValueError, RuntimeError: As `advance` does. No row has changed then.
        """
        lengths = np.array([len(turn) for turn in turns], dtype=np.int64)
        tokens, logp = padded(turns, lengths, np.int64), padded(logprobs, lengths, np.float64)
        state = self._save(rows)
        try:
            segments = self._write(rows, tokens, lengths, logp)
        except BaseException:
            self._restore(rows, state)
            raise
        for row, segment in zip(rows.tolist(), segments, strict=True):
            self._unsettled[row].append(segment)
        ended = np.array([segment.reply.ends for segment in segments], dtype=bool)
        self.finished[rows[ended]] = True
        return [np.array(segment.reply.observation, dtype=np.int64) for segment in segments], ended

    def turn_work(self, row: int, turn: Sequence[int]) -> Callable[[], None] | None:
        """Return the text env's or the tools' part of a turn, to be run in a thread before `advance_turns` gets the turn.

        Args:
            row: a row whose turn ends.
            turn: all tokens of the turn.

        Returns:
            A function that steps the env and keeps transition or error for `advance_turns`. None if the env does not get this
            turn.
        """
        if self._sessions is None or not (self.rules.closes(turn) or self.rules.turn_limit == "continue"):
            return None
        return partial(self._sessions.try_step, row, self._given_turns(row, turn))

    def settle(self, rows: np.ndarray) -> StepOutcome:
        """Ask the reference, pay and record whole episodes that `advance_turns` has played, all in one call.

        Args:
            rows: (R,) row numbers whose episodes have ended.

        Returns:
            The outcome of all tokens after the prompt up to the last action, (R, n) where there is one number a token: rewards
            are 0 and `ref_logp` is NaN at tokens of the env.

        Raises:
            ValueError: If a reward function failed, or the record could not be written. The call can be repeated then.
        """
        segments = [self._unsettled[row] for row in rows.tolist()]
        lengths = np.array([each[-1].begin + each[-1].length for each in segments], dtype=np.int64)
        rewards = np.zeros((len(rows), int(lengths.max(initial=0))))
        new = _NewTokens(rows, np.zeros(len(rows), dtype=np.int64), lengths, segments, rewards)
        state = [self._paid_steps[rows], self.scores[rows]]
        try:
            infos = self._settle(new, score_reference=True)
        except BaseException:
            self._paid_steps[rows], self.scores[rows] = state
            raise
        for row in rows.tolist():
            self._unsettled[row] = []
        return self._outcome(new, infos)

    def _write(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, logprobs: np.ndarray | None) -> list[_Segment]:
        """Append tokens to open turns, and step the text env where a turn ends; return what was written in each row."""
        written = np.arange(tokens.shape[1]) < lengths[:, None]
        self._check(rows, tokens, lengths, written)
        before = self.lengths[rows]
        offsets = (before[:, None] + np.arange(tokens.shape[1]))[written]
        at = (np.repeat(rows, lengths), offsets)
        self.ids[at[0], self.prompt_lengths[at[0]] + offsets] = tokens[written]
        self.turn_ids[at] = np.repeat([len(self.turns[row]) for row in rows], lengths)
        self.lengths[rows] += lengths
        self.num_actions[rows] += lengths
        by_end, is_cut = self._turn_ends(rows, tokens, lengths)
        if logprobs is not None:
            self._logp[at] = logprobs[written]
        replies = self._take_turns(rows, by_end, is_cut)
        known = logprobs is not None
        return [
            _Segment(*each, has_logp=known)
            for each in zip(before.tolist(), lengths.tolist(), is_cut.tolist(), replies, strict=True)
        ]

    def _outcome(self, new: _NewTokens, infos: dict[int, dict[str, Any]]) -> StepOutcome:
        ref_logp = None
        if self.rules.reference is not None:
            ref_logp = np.full(new.rewards.shape, np.nan, dtype=np.float32)
            for i, row in enumerate(new.rows):
                ref_logp[i, : new.lengths[i]] = self._ref_logp[row, new.before[i] :][: new.lengths[i]]
        observations = [np.array(reply.observation, dtype=np.int64) for reply in new.replies]
        return StepOutcome(new.rewards, new.terminated, new.truncated, ref_logp, observations, infos)

    def _settle(self, new: _NewTokens, score_reference: bool) -> dict[int, dict[str, Any]]:
        """Ask the reference, pay the new tokens and record episodes that ended; return the infos by row number."""
        rows, ended, shaped = new.rows, new.ended, self.rules.kl is not None
        if self.rules.reference is not None:
            self._score_reference(rows[new.lengths > 0] if shaped or score_reference else rows[ended])
        if shaped:
            for i, segment in new.all_segments():
                begin = segment.begin - new.before[i]
                kl_rewards = self._kl_rewards(rows[i], segment.begin, segment.length, segment.has_logp)
                new.rewards[i, begin : begin + segment.length] = kl_rewards
        infos = self._compute_rewards(new)
        for i, segment in new.all_segments():
            if segment.reply.reward:
                new.rewards[i, segment.begin - new.before[i] + segment.length - 1] += segment.reply.reward
        for i, reply in enumerate(new.replies):
            if self.rules.has_replies and (ended[i] or new.is_cut[i]):
                infos.setdefault(int(rows[i]), {}).update(self._turn_info(int(rows[i]), reply, bool(ended[i])))
        if self.rules.recorder is not None:
            now = [(int(rows[i]), bool(new.terminated[i])) for i in np.flatnonzero(ended)]
            self.rules.recorder.write([self._record(row, infos[row], by_itself) for row, by_itself in now])
        return infos

    def _save(self, rows: np.ndarray) -> list[Any]:
        counts = (self.lengths, self.num_actions, self.turn_starts, self._paid_steps, self.scores)
        return [[len(self.turns[row]) for row in rows], *(values[rows] for values in counts)]

    def _restore(self, rows: np.ndarray, state: list[Any]) -> None:
        num_turns, self.lengths[rows], self.num_actions[rows], self.turn_starts[rows], paid, scores = state
        self._paid_steps[rows], self.scores[rows] = paid, scores
        for row, count in zip(rows, num_turns, strict=True):
            del self.turns[row][count:]
            length = self.lengths[row]
            self.ids[row, self.prompt_lengths[row] + length :] = self.rules.pad_id
            self.turn_ids[row, length:] = -1
            self._logp[row, length:] = self._ref_logp[row, length:] = np.nan

    def _check(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, written: np.ndarray) -> None:
        over = self.finished[rows] & (lengths > 0)
        if over.any():
            raise ValueError(f"row {rows[over][0]} has ended (or was never started): call reset() before the next action")
        bad = written & ((tokens < 0) | (tokens >= self.rules.vocab_size))
        if bad.any():
            i, t = np.argwhere(bad)[0]
            raise ValueError(
                f"action {tokens[i, t]} in row {rows[i]} is not a token id: the vocabulary is 0..{self.rules.vocab_size - 1}"
            )
        total, limits = self.lengths[rows] - self.turn_starts[rows] + lengths, self.turn_limits(rows)
        long = total > limits
        if long.any():
            row, limit = rows[long][0], limits[long][0]
            reason = f"max_new_tokens={limit}"
            if limit < self.rules.max_new_tokens:
                reason = f"the {limit} that max_episode_tokens={self.rules.max_episode_tokens} leaves"
            raise ValueError(f"the response in row {row} has {total[long][0]} tokens, more than {reason}; cut it there")
        if self.rules.constraint is not None:
            self._check_allowed(rows, tokens, lengths)

    def action_masks(self) -> np.ndarray:
        """Return the tokens that are allowed next, (B, V) bool; all of them in rows whose episode has ended."""
        masks = np.ones((len(self.finished), self.rules.vocab_size), dtype=bool)
        if self.rules.constraint is not None:
            for row in np.flatnonzero(~self.finished).tolist():
                masks[row] = self.rules.constraint.next(self.context(row).tolist(), self.turn(row).tolist())
        return masks

    def _check_allowed(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        assert self.rules.constraint is not None
        for row, new, length in zip(rows, tokens, lengths, strict=True):
            before = self.turn(row).tolist()
            ends = np.flatnonzero(self.rules.are_end_tokens(new[:length]))
            new = new[: ends[0] + 1 if len(ends) else length]  # tokens after the end are another error
            masks = self.rules.constraint.along(self.context(row).tolist(), before + new.tolist(), len(before))
            bad = np.flatnonzero(~masks[np.arange(len(new)), new])
            if len(bad):
                t = bad[0]
                some = np.flatnonzero(masks[t])[:8].tolist()
                raise ValueError(
                    f"action {new[t]} ({self.rules.tokenizer.decode([new[t]])!r}) in row {row} is not allowed as token "
                    f"{len(before) + t} of the response; action_masks() says what is, for instance {some}"
                )

    def _turn_ends(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the tokens just written end a turn, (R,) bool: by an end token or stop string, and by the limit."""
        position = np.arange(tokens.shape[1])
        is_end: Any = self.rules.are_end_tokens(tokens) & (position < lengths[:, None])
        before = self.lengths[rows] - self.turn_starts[rows] - lengths
        if self.rules.stop:
            for i, row in enumerate(rows):
                turn = self.turn(row).tolist()
                for t in range(lengths[i]):
                    is_end[i, t] |= self.rules.completes_stop(turn[: before[i] + t + 1])
        early = is_end & (position < lengths[:, None] - 1)
        if early.any():
            i, t = np.argwhere(early)[0]
            raise ValueError(
                f"the response in row {rows[i]} has {lengths[i] - 1 - t} tokens after its end at token "
                f"{before[i] + t} ({tokens[i, t]}); cut it after the end token or stop string"
            )
        by_end = is_end.any(axis=1)
        is_cut = ~by_end & (lengths > 0) & (before + lengths == self.turn_limits(rows))
        return by_end, is_cut

    def _take_turns(self, rows: np.ndarray, by_end: np.ndarray, is_cut: np.ndarray) -> list[_Reply]:
        """End turns: step the text env and write its observations; return what follows in each row."""
        replies, ended = [_Reply()] * len(rows), np.flatnonzero(by_end | is_cut).tolist()
        given: dict[int, list[str]] = {}
        if self._sessions is not None:
            taken = [int(rows[i]) for i in ended if by_end[i] or self.rules.turn_limit == "continue"]
            given = {row: self._given_turns(row, self.turn(row).tolist()) for row in taken}
            self._sessions.prepare(list(given.items()))
        for i in ended:
            replies[i] = self._take_turn(int(rows[i]), bool(is_cut[i]), given.get(int(rows[i])))
        return replies

    def _given_turns(self, row: int, turn: Sequence[int]) -> list[str]:
        """Return all turns as the text env or the tools get them, with the tokens `turn` as the last one."""
        return [*(past.given for past in self.turns[row]), self.rules.turn_text(turn)]

    def _take_turn(self, row: int, is_cut: bool, given: list[str] | None) -> _Reply:
        """End a turn; `given` is all turns as the text env or the tools get them, None if they do not get this one."""
        tokens, turns, rules = self.turn(row).tolist(), self.turns[row], self.rules
        if self._sessions is None:
            turns.append(Turn("", None, is_cut))
            return _Reply(terminated=not is_cut, truncated_by="turn_limit" if is_cut else "")
        (text,) = rules.decode([tokens])
        if given is None:
            has_room = self.turn_limits(np.array([row]))[0] == rules.max_new_tokens
            closing = self._close(row, [turn.given for turn in turns])
            turns.append(turn := Turn(text, None, is_cut, closing=closing))
            return _Reply(turn.reward or 0.0, truncated_by="turn_limit" if has_room else "max_episode_tokens")
        transition = self._sessions.step(row, given)
        if transition.terminated:
            turns.append(Turn(text, transition, is_cut, given[-1]))
            return _Reply(transition.reward, terminated=True)
        try:
            observation = rules.observation_ids(tokens, transition.observation)
        except Exception:
            self._sessions.discard(row)
            raise
        room, reason = rules.max_episode_tokens - int(self.lengths[row]), ""
        if transition.truncated:
            reason = "env"
        elif len(given) == rules.max_turns:
            reason = "max_turns"
        elif len(observation) >= room:
            reason = "max_episode_tokens"
        elif self.deadline is not None and time.monotonic() > self.deadline:
            reason = "rollout_timeout"
        closing = self._close(row, given) if reason not in ("", "env") else None
        turns.append(turn := Turn(text, transition, is_cut, given[-1], closing))
        fits = len(observation) <= room
        if fits:
            begin = int(self.prompt_lengths[row] + self.lengths[row])
            self.ids[row, begin : begin + len(observation)] = observation
            self.lengths[row] += len(observation)
            self.turn_starts[row] = self.lengths[row]
        return _Reply(turn.reward or 0.0, False, reason, observation if fits else (), fits)

    def _close(self, row: int, given: list[str]) -> Transition | None:
        """Return what the text env pays an episode that a limit ends; None for nothing."""
        assert self._sessions is not None
        closing = self._sessions.close_episode(row, given)
        return closing if closing.reward or closing.info else None

    def _turn_info(self, row: int, reply: _Reply, ended: bool) -> dict[str, Any]:
        """Return what a text env or tools add to the info at the end of a turn that was cut, and at the end of the episode."""
        turns = self.turns[row]
        info: dict[str, Any] = {"turn_truncated": turns[-1].is_cut}
        if not ended:
            return info
        actions = self.actions(row)
        info["turns_truncated"] = sum(turn.is_cut for turn in turns)
        info["observation_tokens"] = int((~actions).sum())
        info["transcript"] = transcript_text(self.transcript(row))
        if self.rules.tools is None:
            info |= {f"env/{key}": value for key, value in env_scores(self._last_info(row)).items()}
            if "env_error" in (last := self._last_info(row)):
                info["env_error"] = last["env_error"]
        else:
            steps = [turn.transition.info for turn in turns if turn.transition is not None]
            info |= {key: sum(step[key] for step in steps) for key in TOOL_COUNTS}
        if reply.truncated_by:
            info |= {"truncated_by": reply.truncated_by, "final_observation_fits": reply.fits}
        return info

    def _last_info(self, row: int) -> dict[str, Any]:
        """Return the info of the text env's last step in a row."""
        turns = self.turns[row]
        last = next((turn.transition.info for turn in reversed(turns) if turn.transition is not None), {})
        closing = turns[-1].closing if turns else None
        return last if closing is None else {**last, **closing.info}

    def _score_reference(self, rows: np.ndarray) -> None:
        """Fill in log pi_ref of all action tokens of `rows` that have none yet."""
        if not len(rows):
            return
        prompts, responses, turn_ids, begins = [], [], [], []
        for row in rows.tolist():
            actions = self.actions(row)
            end = int(np.flatnonzero(actions)[-1]) + 1
            unknown = np.flatnonzero(actions[:end] & ~np.isfinite(self._ref_logp[row, :end]))
            begins.append(int(unknown[0]) if len(unknown) else end)
            prompts.append(self.prompt(row).tolist())
            responses.append(self.response(row)[:end].tolist())
            turn_ids.append(self.turn_ids[row, :end])
        for row, begin, turns, logp in zip(
            rows, begins, turn_ids, self.rules.reference_log_probs(prompts, responses, begins, turn_ids), strict=True
        ):
            at = begin + np.flatnonzero(turns[begin:] >= 0)
            self._ref_logp[row, at] = logp[at - begin]

    def _kl_rewards(self, row: int, begin: int, length: int, known: bool) -> np.ndarray:
        """-beta * (log pi - log pi_ref) per token; without log pi what the env knows of it, beta * log pi_ref."""
        assert self.rules.kl is not None
        at = slice(begin, begin + length)
        logp = self._logp[row, at] if known else 0.0
        return -self.rules.kl.value * (logp - self._ref_logp[row, at])

    def _compute_rewards(self, new: _NewTokens) -> dict[int, dict[str, Any]]:
        """Add what reward functions and ends pay to `new.rewards`; return the infos of rows that ended."""
        paid, step_errors = self._paid_steps[new.rows], {}
        open_rows = np.flatnonzero(~new.ended & (new.lengths > 0))
        if self.rules.rewards.stepwise and len(open_rows):
            so_far = self.rules.rewards.steps_so_far(*self._reward_inputs(new.rows[open_rows]))
            for k, i in enumerate(open_rows):
                paid[i] += self._pay_steps(so_far, k, new.rows[i], new.before[i], new.rewards[i])
            step_errors = {int(new.rows[open_rows[k]]): error for k, error in so_far.errors.items()}
        infos = self._pay_ends(new, paid) if new.ended.any() else {}
        self._paid_steps[new.rows] = paid
        for row, error in step_errors.items():
            self._step_errors[row] = self._step_errors[row] or error
        return infos

    def _pay_ends(self, new: _NewTokens, paid: np.ndarray) -> dict[int, dict[str, Any]]:
        """Pay the episodes that ended, and add what live steps were paid to `paid`, (R,); return their infos."""
        rows, ended = new.rows[new.ended], np.flatnonzero(new.ended)
        scores = self.rules.rewards(*self._reward_inputs(rows))
        outcome, penalties = self.rules.ends.apply(scores.outcome, self.num_actions[rows], new.is_cut[ended])
        ends: dict[int, set[int]] = {}
        for k, i in enumerate(ended):
            row, before, rewards = new.rows[i], new.before[i], new.rewards[i]
            paid[i] += self._pay_steps(scores, k, row, before, rewards)
            if (earlier := self._step_errors[row]) and earlier != scores.errors.get(k):
                scores.errors[k] = "; ".join(filter(None, [earlier, scores.errors.get(k)]))
            last = before + new.lengths[i] - 1
            for at, score in scores.final_steps(k, before, last):
                rewards[at - before] += score
            rewards[new.lengths[i] - 1] += outcome[k]
            if k in scores.given_steps:
                ends[int(row)] = set(scores.step_ends(k, before, last, bool(outcome[k])))
            if self.rules.has_replies:  # every turn is a step, also if it was paid 0
                ends[int(row)] = {*ends.get(int(row), ()), *self._turn_last_tokens(row)}
        final = [sum(score for _, score in steps) for steps in scores.steps]
        self.scores[rows] = paid[ended] + np.array(final) + outcome + [self._env_return(row) for row in rows]
        infos = self._infos(rows.tolist(), scores, penalties, new.is_cut[ended])
        for row, row_ends in ends.items():
            infos[row]["step_ends"] = tuple(sorted(row_ends))
        return infos

    def _pay_steps(self, scores: Scores, k: int, row: int, before: int, rewards: np.ndarray) -> float:
        """Pay the live steps of entry k of `scores` that end at new tokens, (n,) `rewards`; returns the sum.

        Those that end earlier must have been paid, unless a call failed: what it did not say is paid by the next that does.
        """
        steps, paid = scores.immediate_steps[k], self._paid_steps[row]
        earlier = sum(score for end, score in steps if end < before)
        owed = 0.0
        if k not in scores.failed_rows and not math.isclose(earlier, paid, rel_tol=1e-9, abs_tol=1e-9):
            if not self._step_errors[row]:
                raise ValueError(
                    f"a reward marked with process_reward was paid {paid:g} for the first {before} tokens and now says "
                    f"{earlier:g}: its steps depend on what comes after them; take the mark off"
                )
            owed = earlier - paid
            rewards[0] += owed
        new = [(end - before, score) for end, score in steps if end >= before]
        for at, score in new:
            rewards[at] += score
        return owed + sum(score for _, score in new)

    def _reward_inputs(self, rows: np.ndarray) -> tuple[list[Any], list[Any], list[list[int]], dict[str, list[Any]], list[str]]:
        """Return what rewards are called with: prompts, completions, their ids, the columns and the rendered prompts."""
        indexes = self.prompt_indexes[rows].tolist()
        prompts, columns = self.rules.prompts.prompts_of(indexes)
        completions = [self._completion(row) for row in rows.tolist()]
        ids = [self.completion_ids(row) for row in rows.tolist()]
        return prompts, completions, ids, columns, [self.rules.prompts.texts[i] for i in indexes]

    def completion_ids(self, row: int) -> list[int]:
        """Return the tokens after the prompt, up to the last action token."""
        return self.response(row)[: int(np.flatnonzero(self.actions(row))[-1]) + 1].tolist()

    def _completion(self, row: int) -> Any:
        """Return the completion as reward functions get it: a text, or messages for chats and text envs, as in TRL."""
        if self._sessions is None:
            (text,) = self.rules.decode([self.response(row).tolist()])
            is_chat = self.rules.prompts.messages[self.prompt_indexes[row]] is not None
            return [{"role": "assistant", "content": text}] if is_chat else text
        messages: list[dict[str, Any]] = []
        for turn in self.turns[row]:
            if turn.transition is not None and turn.transition.messages is not None:
                messages += turn.transition.messages
                continue
            messages.append({"role": "assistant", "content": turn.text})
            if turn.transition is not None and not turn.transition.terminated:
                messages += as_messages(turn.transition.observation)
        return messages

    def transcript(self, row: int) -> list[Utterance]:
        """Return who said what in the episode of a row; the open turn is included."""
        index = int(self.prompt_indexes[row])
        utterances = [Utterance("env", self.rules.prompts.texts[index])]
        for turn in self.turns[row]:
            utterances.append(Utterance("policy", turn.text, turn.reward, turn.is_cut))
            if turn.transition is not None:
                said = [str(message.get("content")) for message in as_messages(turn.transition.observation)]
                utterances += [Utterance("env", text) for text in said if text or not turn.transition.terminated]
        open_turn = self.turn(row)
        if len(open_turn) and self.turn_ids[row, self.lengths[row] - 1] == len(self.turns[row]):
            utterances.append(Utterance("policy", self.rules.decode([open_turn.tolist()])[0]))
        return utterances

    def _env_return(self, row: int) -> float:
        """Return the sum of the text env's rewards in an episode."""
        return sum(turn.reward or 0.0 for turn in self.turns[row])

    def _turn_last_tokens(self, row: int) -> list[int]:
        """Return the index after the prompt of the last token of every turn."""
        turns = self.turn_ids[row, : self.lengths[row]]
        return [int(np.flatnonzero(turns == turn)[-1]) for turn in range(len(self.turns[row]))]

    def _infos(
        self, rows: list[int], scores: Scores, penalties: dict[str, np.ndarray], is_cut: np.ndarray
    ) -> dict[int, dict[str, Any]]:
        """Return the last infos of rows that end."""
        components = {**scores.components, **penalties}
        if self.rules.text_env is not None:
            components[ENV_REWARD] = np.array([self._env_return(row) for row in rows])
        completions = self.rules.decode([self.response(row).tolist() for row in rows])
        infos: dict[int, dict[str, Any]] = {}
        for i, row in enumerate(rows):
            index = int(self.prompt_indexes[row])
            info = {"prompt": self.rules.prompts.texts[index], "completion": completions[i], "prompt_index": index}
            info["turns"] = len(self.turns[row])
            info.update({f"reward/{name}": float(v[i]) for name, v in components.items() if np.isfinite(v[i])})
            info.update({key: values[i] for key, values in scores.notes.items()})
            if i in scores.errors:
                info["reward_error"] = scores.errors[i]
            if self.rules.success is not None:
                counts = not (is_cut[i] and self.rules.ends.length_stop == "zero")
                info["is_success"] = bool(counts and components[self.rules.success][i] >= 1)
            elif "is_success" in (last := self._last_info(row)):
                info["is_success"] = bool(last["is_success"])
            if self.rules.reference is not None:
                logp, ref_logp = self.log_probs(row)
                info["ref_logprob"] = float(ref_logp.sum(dtype=np.float64))
                if np.isfinite(logp).all():
                    info["kl"] = float((logp - ref_logp).sum())
            infos[row] = info
        return infos

    def _record(self, row: int, info: dict[str, Any], terminated: bool) -> dict[str, Any]:
        """Return the record of the episode that ended in `row`; see `llm_env.recorder.Recorder`."""
        index, notes = info["prompt_index"], {key: value for key, value in info.items() if key.startswith(NOTES)}
        (prompt,), _ = self.rules.prompts.prompts_of([index])
        logp, ref_logp = (x.tolist() if np.isfinite(x).all() else None for x in self.log_probs(row))
        return {
            "prompt_index": index,
            "prompt": prompt,
            "completion": self._completion(row),
            **({} if isinstance(prompt, str) else {"prompt_text": info["prompt"]}),
            "prompt_ids": self.prompt(row).tolist(),
            "completion_ids": self.completion_ids(row),
            **({} if self._sessions is None else {"turn_ids": self.turn_ids[row, : len(self.completion_ids(row))].tolist()}),
            "columns": self.rules.prompts.row(index),
            "components": {key.removeprefix("reward/"): value for key, value in info.items() if key.startswith("reward/")},
            "score": float(self.scores[row]),
            "terminated": terminated,
            "truncated": not terminated,
            "logprobs": logp,
            "ref_logprobs": ref_logp,
            **{key: info[key] for key in ("is_success", "reward_error") if key in info},
            **notes,
        }


@dataclass(frozen=True)
class _Reply:
    """What follows the tokens that were just written in a row.

    Attributes:
        reward: of the text env.
        terminated: whether the episode has ended.
        truncated_by: why the episode was truncated: `"turn_limit"`, `"env"`, `"max_turns"`, `"max_episode_tokens"`,
            `"rollout_timeout"`; "" if not.
        observation: token ids that the env wrote.
        fits: whether the observation was written.
    """

    reward: float = 0.0
    terminated: bool = False
    truncated_by: str = ""
    observation: Sequence[int] = ()
    fits: bool = True

    @property
    def ends(self) -> bool:
        """Whether the episode has ended."""
        return self.terminated or bool(self.truncated_by)


@dataclass(frozen=True)
class _Segment:
    """Tokens of one turn that were written together, and what followed.

    Attributes:
        begin: index of the first after the prompt.
        length: number of tokens.
        is_cut: whether the turn reached its limit.
        reply: what followed.
        has_logp: whether log pi of the tokens is known.
    """

    begin: int
    length: int
    is_cut: bool
    reply: _Reply
    has_logp: bool


@dataclass(frozen=True)
class _NewTokens:
    """Tokens that are paid together: those of one call of `advance`, or whole episodes.

    Attributes:
        rows: (R,) row numbers.
        before: (R,) index after the prompt of the first token.
        lengths: (R,) number of tokens, up to the last action.
        segments: R lists of what was written.
        rewards: (R, n) float64, filled in by `Episodes`.
    """

    rows: np.ndarray
    before: np.ndarray
    lengths: np.ndarray
    segments: list[list[_Segment]]
    rewards: np.ndarray

    def all_segments(self) -> Iterator[tuple[int, _Segment]]:
        """Iterate over all segments, each with the index of its row in `rows`."""
        return ((i, segment) for i, each in enumerate(self.segments) for segment in each)

    @property
    def replies(self) -> list[_Reply]:
        """What followed the last tokens of each row."""
        return [each[-1].reply for each in self.segments]

    @property
    def is_cut(self) -> np.ndarray:
        """(R,) bool, whether the last turn reached its limit."""
        return np.array([each[-1].is_cut for each in self.segments], dtype=bool)

    @property
    def terminated(self) -> np.ndarray:
        """(R,) bool."""
        return np.array([reply.terminated for reply in self.replies], dtype=bool)

    @property
    def truncated(self) -> np.ndarray:
        """(R,) bool."""
        return np.array([bool(reply.truncated_by) for reply in self.replies], dtype=bool)

    @property
    def ended(self) -> np.ndarray:
        """(R,) bool."""
        return self.terminated | self.truncated
