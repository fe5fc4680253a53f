"""Vector env for text generation: step by token or by whole response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from typing_extensions import Unpack

from llm_env.arguments import check_int, finite, integers, one_per_row, reset_options
from llm_env.dialogue.text_env import TextEnvTasks
from llm_env.episodes import Episodes, StepOutcome, padded
from llm_env.keywords import AGENT_NAMES, check_keywords
from llm_env.observations import Observation, pick, spaces_of
from llm_env.prompts import PromptCursor
from llm_env.rules import NAMES, Rules, RulesOptions


@dataclass
class ResponseStep:
    """Result of `step_responses`, for B rows with n_i action tokens in row i.

    Attributes:
        rewards: B float64 arrays of length n_i, one number per action token.
        terminated: (B,) bool, ended by an end token or stop string, or by the text env.
        truncated: (B,) bool, ended by a limit, or cut off by the text env. If both are False, the episode continues.
        observations: B int64 arrays, the tokens that the env wrote after the turn; empty on termination.
        ref_logprobs: B float32 arrays of length n_i, log pi_ref of the action tokens, in nats; None without a reference.
        infos: B dicts, the last infos of episodes that ended; before that empty, or `turn_truncated` after a turn that was cut.
    """

    rewards: list[np.ndarray]
    terminated: np.ndarray
    truncated: np.ndarray
    observations: list[np.ndarray]
    ref_logprobs: list[np.ndarray] | None
    infos: list[dict[str, Any]]


class TextGenerationVectorEnv(VectorEnv[Observation, np.ndarray, np.ndarray]):
    """Vector env with `num_envs` rows of text generation.

    `TextGenerationEnv` documents the episode. There are two ways to step:

    - *Token clock*: `step(actions)` takes one token per row. It supports Gymnasium's three autoreset modes.
    - *Response clock*: `step_responses(responses)` takes a whole response per row, with one call of the reward functions and
      one forward pass of the reference.

    Both give the same rewards, terminations, truncations and infos for the same tokens.

    Every row has a separate random stream. After `reset(seed=s)`, row i gets the same prompts as a `TextGenerationEnv` after
    `reset(seed=s + i)`. A group reset (`options={"group_size": G}`), which training uses, samples prompts from the env's
    `np_random` instead. No prompt is repeated until all prompts have been used.

    Args:
        num_envs: number of rows, B.
        prompts, reward, tokenizer, rules: see `llm_env.rules.Rules`.
        autoreset_mode: when `step` resets rows whose episode ended. `step_responses` never resets; call `reset` after it.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __new__(cls, *args: Any, **kwargs: Any) -> TextGenerationVectorEnv:
        """Raise if a keyword argument is unknown; the error names the called class."""
        if cls.__init__ is TextGenerationVectorEnv.__init__:
            check_keywords(cls.__name__, kwargs, NAMES | {"num_envs", "autoreset_mode"}, AGENT_NAMES)
        return super().__new__(cls)

    def __init__(
        self,
        num_envs: int,
        prompts: Any,
        reward: Any,
        tokenizer: Any,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **rules: Unpack[RulesOptions],
    ) -> None:
        self._set_up(Rules(prompts, reward, tokenizer, **rules), num_envs, autoreset_mode)

    @classmethod
    def from_text_env(
        cls,
        num_envs: int,
        make: Any,
        tokenizer: Any,
        reward: Any = None,
        *,
        num_tasks: int | None = 1000,
        first_seed: int = 0,
        check_seeds: bool = True,
        workers: int = 1,
        timeout: float | None = None,
        on_error: float | str = "raise",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        **rules: Unpack[RulesOptions],
    ) -> TextGenerationVectorEnv:
        """Make a vector env of several turns from a text env; see `TextGenerationEnv.from_text_env`.

        Every row has its own instance of the text env.
        """
        check_keywords(f"{cls.__name__}.from_text_env", rules, NAMES - {"prompts"}, AGENT_NAMES)
        tasks = TextEnvTasks(make, num_tasks, first_seed, check_seeds, workers, timeout, on_error)
        return cls(num_envs, tasks, reward, tokenizer, autoreset_mode=autoreset_mode, **rules)

    @classmethod
    def from_rules(
        cls, rules: Rules, num_envs: int, autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP
    ) -> TextGenerationVectorEnv:
        """Make an env from existing rules, which are shared, not copied."""
        env = cls.__new__(cls)
        env._set_up(rules, num_envs, autoreset_mode)
        return env

    def _set_up(self, rules: Rules, num_envs: int, autoreset_mode: AutoresetMode | str) -> None:
        self.rules = rules
        self.num_envs = num_envs = check_int("num_envs", num_envs, 1)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError as error:
            modes = [mode.value for mode in AutoresetMode]
            raise ValueError(f"autoreset_mode={autoreset_mode!r} must be an AutoresetMode or one of {modes}") from error
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space, self.single_action_space = spaces_of(
            rules.observation, rules.max_tokens, rules.vocab_size
        )
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.episodes = Episodes(rules, num_envs)
        self._row_rngs: list[np.random.Generator | None] = [None] * num_envs
        self._row_cursors = [PromptCursor.over(rules.prompts, partial(self._row_rng, i)) for i in range(num_envs)]
        self._group_cursor = PromptCursor.over(rules.prompts, partial(getattr, self, "np_random"))
        self._pending = np.zeros(num_envs, dtype=bool)
        self._action_logprob = np.full(num_envs, np.nan)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode in every row.

        Args:
            seed: an int or B ints. Row i is seeded with seed + i or seed[i]; None keeps the random state.
            options: a dict with any of these keys:
                `{"index": i}` or `{"index": [i, ...]}` selects the prompts by index, one per row (one per group with
                `group_size`). An index of None selects the next prompt of the row or group.
                `{"group_size": G}` gives rows iG..iG+G-1 the same prompt.
                `{"reset_mask": mask}`, (B,) bool, resets only the rows with True.

        Raises:
            TypeError: If `options` is not a dict.
            ValueError: If G does not divide the number of rows, if seeds, mask or indexes are invalid, or if an option is
                unknown. The env is then unchanged.
        """
        options = reset_options(options, ("index", "group_size", "reset_mask"))
        rows, seeds = self._rows_to_reset(options.get("reset_mask")), self._row_seeds(seed)
        group_size = options.get("group_size")
        if group_size is not None:
            group_size = check_int("group_size", group_size, 1)
            if len(rows) % group_size:
                raise ValueError(
                    f"group_size={group_size} must divide num_envs={len(rows)}; try num_envs="
                    f"{group_size * -(-len(rows) // group_size)}"
                )
        heads = rows[:: group_size or 1]
        wanted = self._wanted_indexes(options.get("index"), len(heads))
        before = None if self.rules.text_env is None else self.state_dict()
        self._seed(seeds, rows)
        indexes = [self._next_index(row, group_size) if i is None else i for row, i in zip(heads, wanted, strict=True)]
        try:
            self.episodes.start(rows, np.repeat(indexes, group_size or 1).tolist())
        except Exception:
            if before is not None:
                self.load_state_dict(before)
            raise
        self._pending[rows], self._action_logprob[rows] = False, np.nan
        return self.episodes.observation(), {}

    def step(
        self, actions: np.ndarray, logprobs: np.ndarray | None = None
    ) -> tuple[Observation, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Append one token to every row.

        Args:
            actions: (B,) integers. In NEXT_STEP mode, the actions of rows that ended in the last step are ignored.
            logprobs: (B,) log pi of the actions, in nats. With log-probs, the KL penalty is exact.

        Returns:
            Observation, rewards (B,) float64, terminations and truncations (B,) bool, infos in Gymnasium's vector format.

        Raises:
            ValueError: If the number of actions is not B, or `advance_tokens` rejects an action. The env is then unchanged.
        """
        tokens = self.checked_actions(actions)
        renewed = np.flatnonzero(self._pending)
        rows = np.flatnonzero(~self._pending)
        logp = None
        if logprobs is not None:
            logp = finite(logprobs, "logprobs")
            if logp.shape != (self.num_envs,):
                raise ValueError(f"logprobs have shape {logp.shape}; they must have the actions' shape {(self.num_envs,)}")
            logp = logp[rows]
        outcome = self.advance_tokens(rows, tokens[rows], logp)
        self.restart_rows(renewed)
        rewards, terminations, truncations = np.zeros(self.num_envs), *np.zeros((2, self.num_envs), dtype=bool)
        rewards[rows] = outcome.rewards[:, 0]
        terminations[rows], truncations[rows] = outcome.terminated, outcome.truncated
        ended = terminations | truncations
        infos: dict[str, Any] = {}
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        final = self.episodes.observation() if same_step and ended.any() else None
        for row, info in outcome.infos.items():
            if same_step and ended[row]:
                info = {"final_obs": pick(final, row), "final_info": info}
            infos = self._add_info(infos, info, row)
        if same_step:
            self.restart_rows(np.flatnonzero(ended))
        self._pending = ended if self.autoreset_mode is AutoresetMode.NEXT_STEP else np.zeros_like(ended)
        return self.episodes.observation(), rewards, terminations, truncations, infos

    def step_responses(self, responses: Sequence[Any], logprobs: Sequence[Any] | None = None) -> ResponseStep:
        """Append a response to every row.

        The result is the same as calling `step` for each token.

        Args:
            responses: B integer sequences, each up to and including its end token or stop string, or up to the length limit.
                The episode of a shorter response continues (neither terminated nor truncated). An empty response leaves its
                row unchanged.
            logprobs: B float sequences of the same lengths, log pi of the tokens, in nats. With log-probs, the KL penalty is
                exact.

        Raises:
            TypeError: If `responses` or `logprobs` is not a list or another ordered sequence.
            ValueError: If the number of responses is not B, the lengths of `logprobs` differ, a token is out of range, after
                the end or beyond the length limit, or the episode of a row has already ended. All rows are then unchanged.
        """
        rows = one_per_row(responses, "responses", self.num_envs)
        rows = [integers(row, f"response {i}", "a flat sequence of token ids") for i, row in enumerate(rows)]
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        tokens = padded(rows, lengths, np.int64)
        logp = None
        if logprobs is not None:
            told = one_per_row(logprobs, "logprobs", self.num_envs)
            told = [finite(row, f"logprobs[{i}]") for i, row in enumerate(told)]
            shapes = [row.shape for row in told]
            if shapes != [(n,) for n in lengths.tolist()]:
                raise ValueError(
                    f"logprobs must have one number per token: their shapes are {shapes}, the responses' lengths "
                    f"{lengths.tolist()}"
                )
            logp = padded(told, lengths, np.float64)
        outcome = self.episodes.advance(np.arange(self.num_envs), tokens, lengths, logp, score_reference=True)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self._pending |= outcome.terminated | outcome.truncated
        return _response_step(outcome, lengths, range(self.num_envs))

    def advance_turns(
        self, rows: Sequence[int], turns: Sequence[Sequence[int]], logprobs: Sequence[Any]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Take whole turns in some rows, and leave rewards and infos for `settle`; see `Episodes.advance_turns`.

        Args:
            rows: R distinct row numbers.
            turns: R lists of token ids, each up to the end of the turn.
            logprobs: R lists of log pi of the tokens, in nats.

        Returns:
            The tokens that the env wrote after each turn, R int64 arrays; and which episodes have ended, (R,) bool.
        """
        at = np.asarray(rows, dtype=np.int64)
        observations, ended = self.episodes.advance_turns(at, turns, logprobs)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self._pending[at[ended]] = True
        return observations, ended

    def settle(self, rows: Sequence[int]) -> ResponseStep:
        """Pay and record the episodes that `advance_turns` has played to their ends in R rows; one entry a row.

        One call for all rows is fastest: reward functions and the reference then get large batches. `rewards` and
        `ref_logprobs` have an entry per token after the prompt, up to the last action; 0 and NaN at tokens of the env.
        """
        at = np.asarray(rows, dtype=np.int64)
        outcome = self.episodes.settle(at)
        lengths = np.array([len(self.episodes.completion_ids(row)) for row in at.tolist()])
        return _response_step(outcome, lengths, at.tolist())

    def close_extras(self, **kwargs: Any) -> None:
        """Close the text env's instances, if there are any."""
        self.episodes.close()
        self.rules.prompts.close()

    def set_action_logprob(self, row: int, logprob: float) -> None:
        """Set log pi of the next action of a row.

        Use this if wrappers hide the `logprobs` argument of `step`.

        Args:
            row: number of the row.
            logprob: log pi of the action that the row takes in the next step, in nats.

        Raises:
            ValueError: If `logprob` is not finite, or `row` is out of range.
        """
        if not np.isfinite(logprob):
            raise ValueError(f"logprob={logprob} must be finite")
        self._action_logprob[check_int("row", row, 0, self.num_envs - 1)] = logprob

    def checked_actions(self, actions: Any) -> np.ndarray:
        """Convert actions to a (B,) int64 array, one action per row.

        Raises:
            ValueError: If `actions` is not a flat sequence of B integers.
        """
        tokens = integers(actions, "actions", f"{self.num_envs} integers, one a row")
        if len(tokens) != self.num_envs:
            raise ValueError(f"actions must be {self.num_envs} integers, one a row; got {len(tokens)}")
        return tokens

    def advance_tokens(self, rows: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray | None = None) -> StepOutcome:
        """Append one token to each of `rows`; see `Episodes.advance`.

        Args:
            rows: (R,) distinct row numbers.
            tokens: (R,) int64.
            logprobs: (R,) log pi of the tokens, in nats. None uses the values of `set_action_logprob` if they are set for all
                of `rows`. The values of all rows are cleared after the step.
        """
        told = self._action_logprob[rows]
        if logprobs is None and np.isfinite(told).all():
            logprobs = told
        logp = None if logprobs is None else logprobs[:, None]
        outcome = self.episodes.advance(rows, tokens[:, None], np.ones(len(rows), dtype=np.int64), logp)
        self._action_logprob[:] = np.nan
        return outcome

    def action_masks(self) -> np.ndarray:
        """Return the mask of valid actions, (B, V) bool, True for valid tokens."""
        return self.episodes.action_masks()

    def state_dict(self) -> dict[str, Any]:
        """Return the random states and the prompt order; running episodes are not saved."""
        return {
            "np_random": self.np_random.bit_generator.state,
            "group_cursor": self._group_cursor.state_dict(),
            "rows": [
                (None if rng is None else rng.bit_generator.state, cursor.state_dict())
                for rng, cursor in zip(self._row_rngs, self._row_cursors, strict=True)
            ],
        }

    def fits(self, state: dict[str, Any]) -> bool:
        """Return whether a saved state has the same number of rows and prompts."""
        return len(state["rows"]) == self.num_envs and state["group_cursor"]["size"] == len(self.rules.prompts)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the random states and the prompt order from `state_dict`.

        Raises:
            ValueError: If the state has a different number of rows or prompts.
        """
        if not self.fits(state):
            raise ValueError(
                f"the saved state has {len(state['rows'])} rows and {state['group_cursor']['size']} prompts, this env "
                f"num_envs={self.num_envs} and {len(self.rules.prompts)}"
            )
        self.np_random.bit_generator.state = state["np_random"]
        self._group_cursor.load_state_dict(state["group_cursor"])
        for i, (rng_state, cursor) in enumerate(state["rows"]):
            if rng_state is not None:
                self._row_rng(i).bit_generator.state = rng_state
            self._row_cursors[i].load_state_dict(cursor)

    def restart_rows(self, rows: np.ndarray) -> None:
        """Start new episodes in `rows`, each with the next prompt of the row's stream."""
        self.episodes.start(rows, [self._row_cursors[row].next() for row in rows])
        self._pending[rows] = False

    def _row_rng(self, row: int) -> np.random.Generator:
        rng = self._row_rngs[row]
        if rng is None:
            rng = self._row_rngs[row] = seeding.np_random()[0]
        return rng

    def _next_index(self, row: int, group_size: int | None) -> int:
        return (self._row_cursors[row] if group_size is None else self._group_cursor).next()

    def _wanted_indexes(self, index: Any, count: int) -> list[int | None]:
        """Return `count` prompt indexes; None stands for the next prompt of the stream."""
        many = isinstance(index, (list, tuple)) or (isinstance(index, np.ndarray) and index.ndim > 0)
        wanted = list(index) if many else [index] * count
        if len(wanted) != count:
            raise ValueError(f"options['index'] holds {len(wanted)} indexes; it must be a number or hold {count} of them")
        return [None if i is None else self.rules.prompt_index(i) for i in wanted]

    def _row_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if isinstance(seed, (list, tuple)) or (isinstance(seed, np.ndarray) and seed.ndim > 0):
            seeds = [None if s is None else check_int("seed", s, 0) for s in seed]
        elif seed is None:
            seeds = [None] * self.num_envs
        else:
            seeds = list(range(first := check_int("seed", seed, 0), first + self.num_envs))
        if len(seeds) != self.num_envs:
            raise ValueError(f"seed has {len(seeds)} numbers for num_envs={self.num_envs} rows; give one each, or a single one")
        return seeds

    def _seed(self, seeds: list[int | None], rows: np.ndarray) -> None:
        for i in rows:
            if seeds[i] is not None:
                self._row_rngs[i] = seeding.np_random(seeds[i])[0]
                self._row_cursors[i].restart()
        if seeds[0] is not None and rows[0] == 0:
            super().reset(seed=seeds[0])
            self._group_cursor.restart()

    def _rows_to_reset(self, mask: np.ndarray | None) -> np.ndarray:
        if mask is None:
            return np.arange(self.num_envs)
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
            raise ValueError(f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with at least one True")
        return np.flatnonzero(mask)


def _response_step(outcome: StepOutcome, lengths: np.ndarray, rows: Sequence[int]) -> ResponseStep:
    """Return an outcome without padding; `rows` names the rows of its entries."""
    cut = partial(_cut, lengths=lengths)
    return ResponseStep(
        rewards=cut(outcome.rewards),
        terminated=outcome.terminated,
        truncated=outcome.truncated,
        observations=outcome.observations,
        ref_logprobs=None if outcome.ref_logp is None else cut(outcome.ref_logp),
        infos=[outcome.infos.get(row, {}) for row in rows],
    )


def _cut(table: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return [row[:length] for row, length in zip(table, lengths, strict=True)]
