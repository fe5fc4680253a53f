"""The rules of an episode, over a batch of token ids: what a prompt is, when an episode ends and what it earns.

Both clocks of every env go through `Episodes.advance`: a token is a response of length one. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import AutoTokenizer

from llm_env.observations import FORMS, observe
from llm_env.prompts import PromptTable
from llm_env.rewards import RewardFunction, RewardSum

if TYPE_CHECKING:
    from llm_env.reference import KLController, Reference


class Rules:
    """What all rows of an env share. The faces of the env pass their keyword arguments on to here.

    Args:
        prompts: list of str, list of dict with `prompt` or `messages`, a `PromptSource`, a dataset, or a `.jsonl` path.
        reward: a reward function in TRL's convention, or a list of them; see `llm_env.rewards`.
        tokenizer: a path, a hub id or a transformers tokenizer; it must have an end token.
        reward_weights: one weight a reward function; all 1 by default.
        max_prompt_tokens: the longest prompt, in tokens; see `long_prompts`.
        max_new_tokens: the length limit of a response, in tokens; reaching it truncates the episode.
        stop: a string or several; an episode ends with the token that completes one of them. It stays in the completion.
        reference: a path, hub id, model or `Reference` that gives log pi_ref of every action; see `llm_env.reference`.
        kl_coef: beta of the KL penalty in the reward, in reward per nat: a number or a KL controller. Needs a reference.
        split: `"train"` or `"test"`, a tenth of the prompts by a hash of their text; None for all.
        long_prompts: `"error"` or `"drop"`, for prompts of more than `max_prompt_tokens` tokens.
        success: name of the reward component that is at least 1 exactly where the episode is a success; it makes
            `is_success` appear in the last info.
        observation: `"dict"`, or `"flat"` for agents that want one Box; see `llm_env.observations`.

    Raises:
        ValueError, TypeError: any of them is unusable; the message names the value and the remedy.
    """

    def __init__(
        self,
        prompts: Any,
        reward: RewardFunction | Sequence[RewardFunction],
        tokenizer: Any,
        *,
        reward_weights: Sequence[float] | None = None,
        max_prompt_tokens: int = 64,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] | None = None,
        reference: Any = None,
        kl_coef: float | KLController = 0.0,
        split: str | None = None,
        long_prompts: str = "error",
        success: str | None = None,
        observation: str = "dict",
    ) -> None:
        for name, value in (("max_prompt_tokens", max_prompt_tokens), ("max_new_tokens", max_new_tokens)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        self.tokenizer = AutoTokenizer.from_pretrained(str(tokenizer)) if isinstance(tokenizer, (str, Path)) else tokenizer
        if getattr(self.tokenizer, "eos_token_id", None) is None:
            raise ValueError("the tokenizer has no end token: set tokenizer.eos_token to the token that ends an answer")
        if observation not in FORMS:
            raise ValueError(f"observation={observation!r} must be one of {FORMS}")
        self.observation = observation
        self.max_prompt_tokens = int(max_prompt_tokens)
        self.max_new_tokens = int(max_new_tokens)
        self.stop = [stop] if isinstance(stop, str) else list(stop or [])
        if not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={stop!r} must be a string or a list of strings, none of them empty")
        # A token holds at least a byte, so this many tokens hold every stop string, with room for tokens without text.
        self._stop_window = max((len(s.encode("utf-8", "surrogatepass")) for s in self.stop), default=0) + 8
        self.eos_id = int(self.tokenizer.eos_token_id)
        self.pad_id = self.eos_id if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.prompts = PromptTable(prompts, self.tokenizer, self.max_prompt_tokens, split, long_prompts)
        self.rewards = RewardSum(reward, reward_weights, self.prompts.columns, self.prompts.incomplete)
        if success is not None and success not in self.rewards.names:
            raise ValueError(f"success={success!r} is not one of the reward components {self.rewards.names}")
        self.success = success
        self.reference, self.kl = _reference_and_kl(reference, kl_coef)
        if self.reference is not None:
            self.reference.check_vocabulary(self.vocab_size)

    @property
    def max_tokens(self) -> int:
        """L, the length of an observation: the longest prompt and the longest response together."""
        return self.max_prompt_tokens + self.max_new_tokens

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """The responses as text, without special tokens: what reward functions and people read."""
        return [
            self.tokenizer.decode(
                [token for token in ids if token != self.eos_id],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for ids in responses
        ]

    def completes_stop(self, response: Sequence[int]) -> bool:
        """Whether the last token of `response` completes a stop string; always False without any.

        Only as many of the last tokens are read as a stop string can need, so that the cost of a response is linear.
        """
        if not self.stop:
            return False
        (text,) = self.decode([response[-self._stop_window :]])
        return any(stop in text for stop in self.stop)


def vocabulary_size(tokenizer: Any) -> int:
    """V, one more than the largest token id: some vocabularies have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def _reference_and_kl(reference: Any, kl_coef: Any) -> tuple[Reference | None, KLController | None]:
    if reference is None:
        if not (isinstance(kl_coef, (int, float)) and kl_coef == 0):
            raise ValueError(f"kl_coef={kl_coef!r} needs a reference to measure the KL from; set reference=, or kl_coef=0.0")
        return None, None
    from llm_env.reference import as_kl_controller, as_reference  # torch is needed from here on only

    return as_reference(reference), as_kl_controller(kl_coef)


@dataclass
class Outcome:
    """What became of R rows that were given up to n tokens each.

    Attributes:
        rewards: (R, n) float64, one number per action token, 0 at padding.
        terminated: (R,) bool, ended by the end token or a stop string.
        truncated: (R,) bool, ended by the length limit. Where neither holds, the episode goes on.
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

    def start(self, rows: Sequence[int] | np.ndarray, prompt_indexes: Sequence[int]) -> None:
        """Begin new episodes in `rows` with the prompts `prompt_indexes`.

        Raises:
            ValueError: a prompt index is out of range.
        """
        for index in prompt_indexes:
            if not 0 <= index < len(self.rules.prompts):
                raise ValueError(f"index={index} is out of range: this env has the prompts 0..{len(self.rules.prompts) - 1}")
        for row, index in zip(rows, prompt_indexes, strict=True):
            prompt = self.rules.prompts.ids[index]
            self.ids[row] = self.rules.pad_id
            self.ids[row, : len(prompt)] = prompt
            self.prompt_lengths[row] = len(prompt)
            self.prompt_indexes[row] = index
        self.response_lengths[rows] = 0
        self.finished[rows] = False
        self._logp[rows] = np.nan
        self._ref_logp[rows] = np.nan

    def observation(self) -> Any:
        """What the agent sees of all rows, new arrays at every call; see `llm_env.observations`."""
        return observe(self.rules.observation, self.ids, self.prompt_lengths + self.response_lengths)

    def prompt(self, row: int) -> np.ndarray:
        """The prompt's token ids, (P,)."""
        return self.ids[row, : self.prompt_lengths[row]]

    def response(self, row: int) -> np.ndarray:
        """The action tokens so far, (T,)."""
        return self.ids[row, self.prompt_lengths[row] :][: self.response_lengths[row]]

    def advance(
        self,
        rows: np.ndarray,
        tokens: np.ndarray,
        lengths: np.ndarray,
        logprobs: np.ndarray | None = None,
        score_reference: bool = False,
    ) -> Outcome:
        """Append tokens to rows, end the episodes that they end, and pay.

        Args:
            rows: (R,) distinct row numbers.
            tokens: (R, n) int64 action tokens, row i holding `lengths[i]` of them.
            lengths: (R,) int64, at most n; a row of length 0 stays as it is.
            logprobs: (R, n) log pi of the tokens in nats, where known.
            score_reference: ask the reference about all tokens now, not only when an episode ends or a KL is paid.

        Raises:
            ValueError: a row has ended, or a token is out of range, comes after the end token, or exceeds the limit; or a
                reward function failed. No row has changed then.
        """
        written = np.arange(tokens.shape[1]) < lengths[:, None]
        self._check(rows, tokens, lengths, written)
        before = self.response_lengths[rows]
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
            scores, infos = self._pay(rows[ended])
        except BaseException:
            self.response_lengths[rows] = before
            self.ids[at] = self.rules.pad_id
            self._logp[actions_at] = self._ref_logp[actions_at] = np.nan
            raise
        rewards[ended, lengths[ended] - 1] += scores
        self.finished[rows[ended]] = True
        ref_logp = None
        if self.rules.reference is not None:
            ref_logp = np.full(tokens.shape, np.nan, dtype=np.float32)
            ref_logp[written] = self._ref_logp[actions_at]
        return Outcome(rewards, terminated, truncated, ref_logp, infos)

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

    def _ends(
        self, rows: np.ndarray, tokens: np.ndarray, lengths: np.ndarray, before: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the tokens just written end an episode: (terminated, truncated), both (R,) bool."""
        position = np.arange(tokens.shape[1])
        is_end = (tokens == self.rules.eos_id) & (position < lengths[:, None])
        if self.rules.stop:
            for i, row in enumerate(rows):
                response = self.response(row).tolist()
                for t in range(lengths[i]):
                    is_end[i, t] |= self.rules.completes_stop(response[: before[i] + t + 1])
        early = is_end & (position < lengths[:, None] - 1)
        if early.any():
            i, t = np.argwhere(early)[0]
            raise ValueError(
                f"the response in row {rows[i]} goes on for {lengths[i] - 1 - t} tokens after its end at token "
                f"{before[i] + t} ({tokens[i, t]}); cut it after the end token or stop string"
            )
        terminated = is_end.any(axis=1)
        truncated = ~terminated & (lengths > 0) & (self.response_lengths[rows] == self.rules.max_new_tokens)
        return terminated, truncated

    def _score_reference(self, rows: np.ndarray) -> None:
        """Fill in log pi_ref of all action tokens of `rows` that have none yet."""
        assert self.rules.reference is not None
        contexts, fresh = [], []
        for row in rows:
            response = self.response(row)
            known = int(np.isfinite(self._ref_logp[row, : len(response)]).sum())
            contexts.append([*self.prompt(row).tolist(), *response[:known].tolist()])
            fresh.append(response[known:].tolist())
        if not contexts:
            return
        for row, new, logp in zip(rows, fresh, self.rules.reference.log_probs(contexts, fresh), strict=True):
            end = self.response_lengths[row]
            self._ref_logp[row, end - len(new) : end] = logp

    def _kl_rewards(self, row: int, begin: int, length: int, known: bool) -> np.ndarray:
        """-beta * (log pi - log pi_ref) per token; without log pi what the env knows of it, beta * log pi_ref."""
        assert self.rules.kl is not None
        at = slice(begin, begin + length)
        logp = self._logp[row, at] if known else 0.0
        return -self.rules.kl.value * (logp - self._ref_logp[row, at])

    def _pay(self, rows: np.ndarray) -> tuple[np.ndarray, dict[int, dict[str, Any]]]:
        """Scores, (R,), and last infos of rows that have just ended."""
        if not len(rows):
            return np.zeros(0), {}
        table, indexes = self.rules.prompts, self.prompt_indexes[rows].tolist()
        responses = [self.response(row).tolist() for row in rows]
        prompts, completions = [table.texts[i] for i in indexes], self.rules.decode(responses)
        columns = {name: table.column(name, indexes) for name in table.columns}
        scores, components = self.rules.rewards(prompts, completions, responses, columns)
        infos: dict[int, dict[str, Any]] = {}
        for i, row in enumerate(rows.tolist()):
            info = {"prompt": prompts[i], "completion": completions[i], "prompt_index": indexes[i]}
            info.update({f"reward/{name}": float(v[i]) for name, v in components.items() if np.isfinite(v[i])})
            if self.rules.success is not None:
                info["is_success"] = bool(components[self.rules.success][i] >= 1)
            if self.rules.reference is not None:
                logp, ref_logp = (x[row, : len(responses[i])] for x in (self._logp, self._ref_logp))
                info["ref_logprob"] = float(ref_logp.sum(dtype=np.float64))
                if np.isfinite(logp).all():
                    info["kl"] = float((logp - ref_logp).sum())
            infos[row] = info
        return scores, infos
