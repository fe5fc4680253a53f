"""The single env: `gymnasium.Env` whose actions are tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, SupportsIndex

import gymnasium as gym
import numpy as np
from typing_extensions import Unpack

from llm_env.arguments import as_int, check_int, reset_options
from llm_env.dialogue.text_env import TextEnvTasks
from llm_env.episodes import Episodes, transcript_text
from llm_env.keywords import AGENT_NAMES, check_keywords
from llm_env.observations import Observation, pick, spaces_of
from llm_env.prompts import PromptCursor
from llm_env.rules import NAMES, Rules, RulesOptions
from llm_env.vector_env import TextGenerationVectorEnv


class TextGenerationEnv(gym.Env[Observation, SupportsIndex]):
    """Text generation, token by token: one answer to a prompt, or a conversation with a text env.

    ## Description
    An episode is a prompt's token ids, then turns of the policy, with observations of the env between them:
    `[prompt | turn 1 | observation 1 | turn 2 | ...]`. An action is one token of a turn. With `prompts` and `reward` an episode
    has one turn. `from_text_env` makes an env of several turns from a `TextEnv`. Sampled tokens are never changed: text is
    decoded for reward functions, text envs and people, and is not tokenized again.

    ## Action Space
    `Discrete(V)`, the next token; V is the size of the tokenizer's vocabulary. With `allowed_tokens` or `min_new_tokens` some
    tokens are not allowed, and taking one is an error. `action_masks()` returns the allowed ones.

    ## Observation Space
    `Dict(input_ids: Box(int64, (L,)), attention_mask: Box(int8, (L,)))`: the tokens so far, padded on the right, so that a
    token's index is its position. L = max_prompt_tokens + max_new_tokens, or max_prompt_tokens + max_episode_tokens with a text
    env. With `observation="flat"` it is `Box(-1, V - 1, (L,), int64)`: the same tokens, and -1 for padding.

    ## Rewards
    The weighted sum of the reward functions is paid with the last action (steps of a process reward at their ends; see
    `llm_env.rewards`), minus penalties of the end (see `llm_env.penalties`). The reward of a text env's step is paid with the
    last action of the turn. With `kl_coef` every action also earns `kl_coef * log pi_ref(action)`: the part of the KL penalty
    that an env knows. The rest is an entropy bonus, which is left to the agent. If log pi is set by `set_action_logprob`, the
    env pays the whole penalty.

    ## Starting State
    The next prompt in shuffled order, which `reset(seed=)` restarts, or prompt i with `reset(options={"index": i})`. Prompts of
    a text env are its seeds: prompt i is the observation of its `reset(seed=first_seed + i)`.

    ## Episode End
    A turn ends with an end token (see `llm_env.end_tokens`), with the token that completes a stop string, or at its limit,
    token number max_new_tokens. With prompts, `terminated` means the turn ended by itself, and `truncated` that it reached the
    limit. A text env terminates or truncates episodes itself. They are also truncated after `max_turns` turns, and where
    `max_episode_tokens` leaves no room for an action.

    The last info has `prompt` and `completion` as text, `prompt_index`, `turns`, `reward/<name>` for every component,
    `is_success` where it is defined, `reward_error` where a reward function failed and was replaced by a number,
    `metric/<name>` and `extra/<column>` where reward functions log them. With a reference it has `ref_logprob`, the sum of log
    pi_ref, and `kl` if log pi was set, in nats. With a text env or tools it also has `transcript`, `observation_tokens` and
    `turns_truncated` (turns that reached their limit); with a text env `env/<name>` for numbers in the info of its last step,
    and `env_error` if it failed; with tools `tool_calls` and `tool_errors`. If the episode was truncated, `truncated_by` is
    "turn_limit", "env", "max_turns", "max_episode_tokens" or "rollout_timeout", and `final_observation_fits` says whether the
    last observation was written. The info of a turn that reached its limit and was continued has `turn_truncated`.

    ## Arguments
    `prompts`, `reward`, `tokenizer` and the keywords of `llm_env.rules.Rules`. `render_mode="ansi"` renders the text so far.

    ## Version History
    v0: first version.

    Examples:
        >>> import llm_env
        >>> env = llm_env.TextGenerationEnv(["2+3="], lambda completions: [float(c == "5") for c in completions], llm_env.PUPIL)
        >>> observation, info = env.reset(seed=0)
        >>> five, end = env.rules.tokenizer.convert_tokens_to_ids(["5", "<eos>"])
        >>> observation, reward, terminated, truncated, info = env.step(five)
        >>> reward, terminated, truncated
        (0.0, False, False)
        >>> observation, reward, terminated, truncated, info = env.step(end)
        >>> reward, terminated, info["completion"]
        (1.0, True, '5')
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}  # noqa: RUF012

    def __new__(cls, *args: Any, **kwargs: Any) -> TextGenerationEnv:
        """Refuse unknown keyword arguments in the name of this class."""
        if cls.__init__ is TextGenerationEnv.__init__:
            check_keywords(cls.__name__, kwargs, NAMES | {"render_mode"}, AGENT_NAMES)
        return super().__new__(cls)

    def __init__(
        self,
        prompts: Any,
        reward: Any,
        tokenizer: Any,
        *,
        render_mode: str | None = None,
        **rules: Unpack[RulesOptions],
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            # A TypeError: SB3 asks for "rgb_array" first, and then for none.
            raise TypeError(f"render_mode={render_mode!r} must be None or one of {self.metadata['render_modes']}")
        self.rules = Rules(prompts, reward, tokenizer, **rules)
        self.render_mode = render_mode
        self.observation_space, self.action_space = spaces_of(
            self.rules.observation, self.rules.max_tokens, self.rules.vocab_size
        )
        self._episodes = Episodes(self.rules, 1)
        self._cursor = PromptCursor.over(self.rules.prompts, partial(getattr, self, "np_random"))
        self._last_info: dict[str, Any] = {}
        self._action_logprob: float | None = None

    @classmethod
    def from_text_env(
        cls,
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
        render_mode: str | None = None,
        **rules: Unpack[RulesOptions],
    ) -> TextGenerationEnv:
        """Make an env of several turns from a text env.

        Args:
            make: a class or a function without arguments that returns a `llm_env.TextEnv`; or its name, `"module:Class"`.
            tokenizer: a path, a hub id or a transformers tokenizer.
            reward: reward functions, paid at the end of the episode in addition to the text env's rewards; see
                `llm_env.rewards`. Completions are lists of messages.
            num_tasks: number of seeds, 1000 by default; None for fresh seeds without end.
            first_seed: prompt i is the first observation of `reset(seed=first_seed + i)`.
            check_seeds: play two seeds twice, and raise if the episodes differ.
            workers: maximum number of instances that are stepped at a time, each in a thread.
            timeout: seconds that a `reset` or `step` may take; None for no limit. An instance that takes longer is discarded.
            on_error: `"raise"`, or the reward of a turn whose `step` raises an exception or takes too long. The episode ends
                with this turn; the info has the message as `env_error`, and `rollout/env_errors` counts such episodes.
            render_mode: None or `"ansi"`.
            rules: keywords of `llm_env.rules.Rules`, such as `max_turns` and `max_new_tokens`.

        Raises:
            ValueError, TypeError: If an argument is unusable, or the text env returns unusable values or ignores its seed.

        Examples:
            >>> import llm_env
            >>> class Echo:
            ...     def reset(self, *, seed=None):
            ...         return "say it: ", {}
            ...     def step(self, action):
            ...         return "again: ", float(action == "it"), action == "it", False, {}
            >>> env = llm_env.TextGenerationEnv.from_text_env(Echo, llm_env.PUPIL, max_turns=2, max_new_tokens=3)
            >>> env.rules.max_turns, env.rules.turn_limit
            (2, 'continue')
        """
        check_keywords(f"{cls.__name__}.from_text_env", rules, NAMES - {"prompts"}, AGENT_NAMES)
        tasks = TextEnvTasks(make, num_tasks, first_seed, check_seeds, workers, timeout, on_error)
        return cls(tasks, reward, tokenizer, render_mode=render_mode, **rules)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: restarts the order of the prompts.
            options: `{"index": i}` takes prompt i.

        Raises:
            ValueError: If the seed, an option or the index is unusable, or a text env's `reset` failed. Nothing has changed
                then.
        """
        index = reset_options(options, ("index",)).get("index")
        if index is not None:
            index = self.rules.prompt_index(index)
        if seed is not None:
            seed = check_int("seed", seed, 0)
        before = None if self.rules.text_env is None else self._order()
        super().reset(seed=seed)
        if seed is not None:
            self._cursor.restart()
        try:
            self._episodes.start([0], [self._cursor.next() if index is None else index])
        except Exception:
            if before is not None:
                self._restore_order(*before)
            raise
        self._last_info, self._action_logprob = {}, None
        return self._observation(), {}

    def close(self) -> None:
        """Close the text env's instances, if there are any. The env can be used again after `reset`."""
        self._episodes.close()
        self.rules.prompts.close()

    def _order(self) -> tuple[Any, Any, int | None, dict[str, Any]]:
        """Return the state of the prompts' order, for `_restore_order`."""
        rng = self._np_random
        return rng, None if rng is None else rng.bit_generator.state, self._np_random_seed, self._cursor.state_dict()

    def _restore_order(self, rng: Any, state: Any, seed: int | None, cursor: dict[str, Any]) -> None:
        self._np_random, self._np_random_seed = rng, seed
        if rng is not None:
            rng.bit_generator.state = state
        self._cursor.load_state_dict(cursor)

    def step(self, action: SupportsIndex) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token to the turn. If it ends the turn, a text env is stepped and its observation is appended.

        Raises:
            ValueError: If the action is no token id or not allowed, the episode has ended, a reward function failed or a text
                env returned unusable values. Nothing has changed then: the same step can be repeated.
            RuntimeError: If a text env raised an exception. Nothing has changed then.
        """
        token = as_int(action)
        if token is None:
            raise ValueError(f"action {action!r} is not a token id: give a whole number from 0 to {self.rules.vocab_size - 1}")
        logp = None if self._action_logprob is None else np.array([[self._action_logprob]])
        outcome = self._episodes.advance(np.array([0]), np.array([[token]]), np.array([1]), logp)
        self._action_logprob = None  # only now: after an error the same step may be tried again
        self._last_info = outcome.infos.get(0, {})
        reward = float(outcome.rewards[0, 0])
        return self._observation(), reward, bool(outcome.terminated[0]), bool(outcome.truncated[0]), dict(self._last_info)

    def set_action_logprob(self, logprob: float) -> None:
        """Set log pi, in nats, of the next action, so that the KL penalty in its reward is exact.

        Without it the env pays the part that it knows, `kl_coef * log pi_ref`.
        """
        if not np.isfinite(logprob):
            raise ValueError(f"logprob={logprob} must be finite")
        self._action_logprob = float(logprob)

    def action_masks(self) -> np.ndarray:
        """Return the tokens that are allowed next, (V,) bool."""
        return self._episodes.action_masks()[0]

    def render(self) -> str | None:
        """Return the prompt and what was written so far, of a text env as a transcript; None without `render_mode="ansi"`.

        After the end it also has every reward component. With a reference it lists log pi_ref of every action and, where log pi
        was set, the KL, in nats.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='ansi' at construction")
            return None
        if self._episodes.prompt_lengths[0] == 0:
            return ""
        if not self.rules.has_replies:
            prompt = self.rules.prompts.texts[self._episodes.prompt_indexes[0]]
            (completion,) = self.rules.decode([self._episodes.response(0).tolist()])
            lines = [f"{prompt}{completion}"]
        else:
            lines = [transcript_text(self._episodes.transcript(0))]
        lines += [f"{key}: {value:g}" for key, value in self._last_info.items() if key.startswith("reward")]
        if self._last_info and self.rules.reference is not None:
            lines += self._token_lines()
        return "\n".join(lines)

    def _token_lines(self) -> list[str]:
        """Return a line per action: its text, log pi, log pi_ref and their difference; `-` if log pi was not set."""
        lines = [f"{'token':>12} {'log pi':>9} {'log pi_ref':>11} {'kl':>9}"]
        actions = self._episodes.response(0)[self._episodes.actions(0)]
        for token, logp, ref_logp in zip(actions.tolist(), *self._episodes.log_probs(0), strict=True):
            known = [f"{x:.4f}" if np.isfinite(x) else "-" for x in (logp, ref_logp, logp - ref_logp)]
            lines.append(f"{self.rules.tokenizer.decode([token])!r:>12} {known[0]:>9} {known[1]:>11} {known[2]:>9}")
        return lines

    def vectorize(self, num_envs: int, **options: Any) -> TextGenerationVectorEnv:
        """Return the native vector env with the same rules, which are shared, not copied."""
        return TextGenerationVectorEnv.from_rules(self.rules, num_envs, **options)

    def _observation(self) -> Observation:
        return pick(self._episodes.observation(), 0)
