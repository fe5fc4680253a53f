"""The way of an episode, over a batch of token ids: its tokens, its end and what it earns.

Both clocks of every env go through `Episodes.advance`: a token is a response of length one. Nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_env.observations import observe
from llm_env.rewards import NOTES, Scores
from llm_env.rules import Rules


@dataclass
class StepOutcome:
    """What became of R rows that were given up to n tokens each.

    Attributes:
        rewards: (R, n) float64, one number per action token, 0 at padding.
        terminated: (R,) bool, ended by the end token or a stop string.
        truncated: (R,) bool, ended by the length limit. Where both are False, the episode continues.
        ref_logp: (R, n) float32, log pi_ref of the tokens in nats, NaN where the reference was not asked; None without one.
        infos: the last infos by row number, of the rows that ended.
    """

    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    ref_logp: np.ndarray | None
    infos: dict[int, dict[str, Any]]


class Episodes:
    """The state of B episodes and their one way forward.

    Args:
        rules: what all rows share.
        num_rows: B.

    Attributes:
        ids: (B, L) int64, prompt then response, right-padded; a token's index is its position.
        prompt_lengths: (B,) int64.
        response_lengths: (B,) int64, action tokens so far.
        finished: (B,) bool, True until a row is started.
        prompt_indexes: (B,) int64, which prompt of `rules.prompts` a row has.
        scores: (B,) float64, what rewards and ends paid for the last episode that ended in a row, without a KL.
    """

    def __init__(self, rules: Rules, num_rows: int) -> None:
        self.rules = rules
        self.ids = np.full((num_rows, rules.max_tokens), rules.pad_id, dtype=np.int64)
        self.prompt_lengths = np.zeros(num_rows, dtype=np.int64)
        self.response_lengths = np.zeros(num_rows, dtype=np.int64)
        self.finished = np.ones(num_rows, dtype=bool)
        self.prompt_indexes = np.zeros(num_rows, dtype=np.int64)
        self._logp = np.full((num_rows, rules.max_new_tokens), np.nan, dtype=np.float64)
        self._ref_logp = np.full((num_rows, rules.max_new_tokens), np.nan, dtype=np.float32)
        self._paid_steps = np.zeros(num_rows)
        self._step_errors = [""] * num_rows
        self.scores = np.full(num_rows, np.nan)

    def start(self, rows: Sequence[int] | np.ndarray, prompt_indexes: Sequence[int]) -> None:
        """Begin new episodes in `rows` with the prompts `prompt_indexes`, which exist."""
        for row, index in zip(rows, prompt_indexes, strict=True):
            prompt = self.rules.prompts.ids[index]
            self.ids[row] = self.rules.pad_id
            self.ids[row, : len(prompt)] = prompt
            self.prompt_lengths[row] = len(prompt)
            self.prompt_indexes[row] = index
            self._step_errors[row] = ""
        self.response_lengths[rows] = 0
        self.finished[rows] = False
        self._logp[rows] = np.nan
        self._ref_logp[rows] = np.nan
        self._paid_steps[rows] = 0.0

    def observation(self) -> Any:
        """Return what the agent sees of all rows, new arrays at every call; see `llm_env.observations`."""
        return observe(self.rules.observation, self.ids, self.prompt_lengths + self.response_lengths)

    def prompt(self, row: int) -> np.ndarray:
        """Return the prompt's token ids, (P,)."""
        return self.ids[row, : self.prompt_lengths[row]]

    def response(self, row: int) -> np.ndarray:
        """Return the action tokens so far, (T,)."""
        return self.ids[row, self.prompt_lengths[row] :][: self.response_lengths[row]]

    def log_probs(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return Log pi and log pi_ref of the action tokens so far, (T,) each, in nats; NaN where not known."""
        at = slice(0, self.response_lengths[row])
        return self._logp[row, at], self._ref_logp[row, at]

    def advance(
        self,
        rows: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        logprobs: np.ndarray | None = None,
        score_reference: bool = False,
    ) -> StepOutcome:
        """Append tokens to rows, end the episodes that they end, and pay.

        Args:
            rows: (R,) distinct row numbers.
            tokens: (R, n) int64 action tokens, row i holding `lengths[i]` of them.
            lengths: (R,) int64, at most n; a row of length 0 stays as it is.
            logprobs: (R, n) log pi of the tokens in nats, where known.
            score_reference: ask the reference about all tokens now, not only when an episode ends or a KL is paid.

        Raises:
            ValueError: If a row has ended, or a token is out of range, comes after the end token, or exceeds the limit; or a
                reward function failed, or the record could not be written. No row has changed then.
        """
        written = np.arange(tokens.shape[1]) < lengths[:, None]
        self._check(rows, tokens, lengths, written)
        before, paid_before, scores_before = self.response_lengths[rows], self._paid_steps[rows], self.scores[rows]
        columns = (self.prompt_lengths[rows] + before)[:, None] + np.arange(tokens.shape[1])
        at = (np.repeat(rows, lengths), columns[written])
        actions_at = (at[0], (before[:, None] + np.arange(tokens.shape[1]))[written])
        self.ids[at] = tokens[written]
        self.response_lengths[rows] += lengths
        try:
            terminated, truncated = self._ends(rows, tokens, lengths, before)
            ended = terminated | truncated
            rewards = np.zeros(tokens.shape)
            if logprobs is not None:
                self._logp[actions_at] = logprobs[written]
            shaped = self.rules.kl is not None
            if self.rules.reference is not None:
                self._score_reference(rows[lengths > 0] if shaped or score_reference else rows[ended])
            if shaped:
                for i, row in enumerate(rows):
                    rewards[i, : lengths[i]] = self._kl_rewards(row, before[i], lengths[i], logprobs is not None)
            infos = self._compute_rewards(rows, before, lengths, ended, truncated, rewards)
            if self.rules.recorder is not None:
                now = [(int(rows[i]), bool(terminated[i])) for i in np.flatnonzero(ended)]
                self.rules.recorder.write([self._record(row, infos[row], by_itself) for row, by_itself in now])
        except BaseException:
            self.response_lengths[rows], self._paid_steps[rows], self.scores[rows] = before, paid_before, scores_before
            self.ids[at] = self.rules.pad_id
            self._logp[actions_at] = self._ref_logp[actions_at] = np.nan
            raise
        self.finished[rows[ended]] = True
        ref_logp = None
        if self.rules.reference is not None:
            ref_logp = np.full(tokens.shape, np.nan, dtype=np.float32)
            ref_logp[written] = self._ref_logp[actions_at]
        return StepOutcome(rewards, terminated, truncated, ref_logp, infos)

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
        total = self.response_lengths[rows] + lengths
        long = total > self.rules.max_new_tokens
        if long.any():
            raise ValueError(
                f"the response in row {rows[long][0]} has {total[long][0]} tokens, more than "
                f"max_new_tokens={self.rules.max_new_tokens}; cut it there"
            )
        if self.rules.constraint is not None:
            self._check_allowed(rows, tokens, lengths)

    def action_masks(self) -> np.ndarray:
        """(B, V) bool, True for the tokens that may come next; all where a row's episode is over."""
        masks = np.ones((len(self.finished), self.rules.vocab_size), dtype=bool)
        if self.rules.constraint is not None:
            for row in np.flatnonzero(~self.finished).tolist():
                masks[row] = self.rules.constraint.next(self.prompt(row).tolist(), self.response(row).tolist())
        return masks

    def _check_allowed(self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray) -> None:
        assert self.rules.constraint is not None
        for row, new, length in zip(rows, tokens, lengths, strict=True):
            before = self.response(row).tolist()
            ends = np.flatnonzero(self.rules.are_end_tokens(new[:length]))
            new = new[: ends[0] + 1 if len(ends) else length]  # nothing is asked of what comes after the end
            masks = self.rules.constraint.along(self.prompt(row).tolist(), before + new.tolist(), len(before))
            bad = np.flatnonzero(~masks[np.arange(len(new)), new])
            if len(bad):
                t = bad[0]
                some = np.flatnonzero(masks[t])[:8].tolist()
                raise ValueError(
                    f"action {new[t]} ({self.rules.tokenizer.decode([new[t]])!r}) in row {row} is not allowed as token "
                    f"{len(before) + t} of the response; action_masks() says what is, for instance {some}"
                )

    def _ends(
        self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, before: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return where the tokens just written end an episode: (terminated, truncated), both (R,) bool."""
        position = np.arange(tokens.shape[1])
        is_end: Any = self.rules.are_end_tokens(tokens) & (position < lengths[:, None])
        if self.rules.stop:
            for i, row in enumerate(rows):
                response = self.response(row).tolist()
                for t in range(lengths[i]):
                    is_end[i, t] |= self.rules.completes_stop(response[: before[i] + t + 1])
        early = is_end & (position < lengths[:, None] - 1)
        if early.any():
            i, t = np.argwhere(early)[0]
            raise ValueError(
                f"the response in row {rows[i]} has {lengths[i] - 1 - t} tokens after its end at token "
                f"{before[i] + t} ({tokens[i, t]}); cut it after the end token or stop string"
            )
        terminated = is_end.any(axis=1)
        truncated = ~terminated & (lengths > 0) & (self.response_lengths[rows] == self.rules.max_new_tokens)
        return terminated, truncated

    def _score_reference(self, rows: np.ndarray) -> None:
        """Fill in log pi_ref of all action tokens of `rows` that have none yet."""
        if not len(rows):
            return
        prompts = [self.prompt(row).tolist() for row in rows]
        responses = [self.response(row).tolist() for row in rows]
        known = [
            int(np.isfinite(self._ref_logp[row, : len(response)]).sum()) for row, response in zip(rows, responses, strict=True)
        ]
        for row, begin, logp in zip(rows, known, self.rules.reference_log_probs(prompts, responses, known), strict=True):
            self._ref_logp[row, begin : begin + len(logp)] = logp

    def _kl_rewards(self, row: int, begin: int, length: int, known: bool) -> np.ndarray:
        """-beta * (log pi - log pi_ref) per token; without log pi what the env knows of it, beta * log pi_ref."""
        assert self.rules.kl is not None
        at = slice(begin, begin + length)
        logp = self._logp[row, at] if known else 0.0
        return -self.rules.kl.value * (logp - self._ref_logp[row, at])

    def _compute_rewards(
        self,
        rows: np.ndarray,
        before: np.ndarray,
        lengths: np.ndarray,
        ended: np.ndarray,
        truncated: np.ndarray,
        rewards: np.ndarray,
    ) -> dict[int, dict[str, Any]]:
        """Add to `rewards`, (R, n), what the reward functions pay for the tokens just written; the infos of rows that end."""
        infos: dict[int, dict[str, Any]] = {}
        ends: dict[int, tuple[int, ...]] = {}
        paid, step_errors = self._paid_steps[rows], {}
        open_rows = np.flatnonzero(~ended & (lengths > 0))
        if self.rules.rewards.stepwise and len(open_rows):
            so_far = self.rules.rewards.steps_so_far(*self._reward_inputs(rows[open_rows]))
            for k, i in enumerate(open_rows):
                paid[i] += self._pay_steps(so_far, k, rows[i], before[i], rewards[i])
            step_errors = {int(rows[open_rows[k]]): error for k, error in so_far.errors.items()}
        if ended.any():
            scores = self.rules.rewards(*self._reward_inputs(rows[ended]))
            outcome, penalties = self.rules.ends.apply(scores.outcome, self.response_lengths[rows[ended]], truncated[ended])
            for k, i in enumerate(np.flatnonzero(ended)):
                paid[i] += self._pay_steps(scores, k, rows[i], before[i], rewards[i])
                if (earlier := self._step_errors[rows[i]]) and earlier != scores.errors.get(k):
                    scores.errors[k] = "; ".join(filter(None, [earlier, scores.errors.get(k)]))
                last = before[i] + lengths[i] - 1
                for at, score in scores.final_steps(k, before[i], last):
                    rewards[i, at - before[i]] += score
                rewards[i, lengths[i] - 1] += outcome[k]
                if k in scores.given_steps:
                    ends[int(rows[i])] = scores.step_ends(k, before[i], last, bool(outcome[k]))
            whole = [sum(score for _, score in steps) for steps in scores.steps]
            self.scores[rows[ended]] = paid[ended] + np.array(whole) + outcome
            infos = self._infos(rows[ended].tolist(), scores, penalties, truncated[ended])
            for row, row_ends in ends.items():
                infos[row]["step_ends"] = row_ends
        self._paid_steps[rows] = paid
        for row, error in step_errors.items():
            self._step_errors[row] = self._step_errors[row] or error
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
        responses = [self.response(row).tolist() for row in rows.tolist()]
        indexes = self.prompt_indexes[rows].tolist()
        prompts, completions, columns = self.rules.prompts.reward_inputs(indexes, self.rules.decode(responses))
        return prompts, completions, responses, columns, [self.rules.prompts.texts[i] for i in indexes]

    def _infos(
        self, rows: list[int], scores: Scores, penalties: dict[str, np.ndarray], truncated: np.ndarray
    ) -> dict[int, dict[str, Any]]:
        """Return the last infos of rows that end."""
        components = {**scores.components, **penalties}
        completions = self.rules.decode([self.response(row).tolist() for row in rows])
        infos: dict[int, dict[str, Any]] = {}
        for i, row in enumerate(rows):
            index = int(self.prompt_indexes[row])
            info = {"prompt": self.rules.prompts.texts[index], "completion": completions[i], "prompt_index": index}
            info.update({f"reward/{name}": float(v[i]) for name, v in components.items() if np.isfinite(v[i])})
            info.update({key: values[i] for key, values in scores.notes.items()})
            if i in scores.errors:
                info["reward_error"] = scores.errors[i]
            if self.rules.success is not None:
                counts = not (truncated[i] and self.rules.ends.length_stop == "zero")
                info["is_success"] = bool(counts and components[self.rules.success][i] >= 1)
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
        (prompt,), (completion,), _ = self.rules.prompts.reward_inputs([index], [info["completion"]])
        logp, ref_logp = (x.tolist() if np.isfinite(x).all() else None for x in self.log_probs(row))
        return {
            "prompt_index": index,
            "prompt": prompt,
            "completion": completion,
            **({} if isinstance(prompt, str) else {"prompt_text": info["prompt"]}),
            "prompt_ids": self.prompt(row).tolist(),
            "completion_ids": self.response(row).tolist(),
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
