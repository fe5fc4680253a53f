"""One episode of text generation as a `gymnasium.Env` whose actions are tokens."""

from __future__ import annotations

from functools import partial
from typing import Any, SupportsIndex

import gymnasium as gym
import numpy as np
from typing_extensions import Unpack

from llm_env.arguments import as_int, check_int, reset_options
from llm_env.episodes import Episodes
from llm_env.keywords import AGENT_NAMES, check_keywords
from llm_env.observations import Observation, pick, spaces_of
from llm_env.prompts import PromptCursor
from llm_env.rules import NAMES, Rules, RulesOptions
from llm_env.vector_env import TextGenerationVectorEnv


class TextGenerationEnv(gym.Env[Observation, SupportsIndex]):
    """Write the answer to a prompt, token by token.

    ## Description
    An episode is a prompt's token ids and then the ids of the actions. Text is decoded for reward functions and people
    only, and never tokenized again.

    ## Action Space
    `Discrete(V)`, V the size of the tokenizer's vocabulary: the next token. With `allowed_tokens` or `min_new_tokens` some
    are forbidden, an error to take; `action_masks()` says which may come next.

    ## Observation Space
    `Dict(input_ids: Box(int64, (L,)), attention_mask: Box(int8, (L,)))`, L = max_prompt_tokens + max_new_tokens: the tokens
    so far, padded on the right, so that a token's index is its position. With `observation="flat"` it is
    `Box(-1, V - 1, (L,), int64)`: the same tokens, and -1 for padding.

    ## Rewards
    The weighted sum of the reward functions, paid with the last action (steps of a process reward with theirs; see
    `llm_env.rewards`), less what the end costs (see `llm_env.penalties`). With `kl_coef` every action earns
    `kl_coef * log pi_ref(action)` besides: the part of the KL penalty that an env can know; the rest, an entropy bonus, is
    the agent's. Told log pi by `set_action_logprob`, the env pays the whole.

    ## Starting State
    The next prompt in a shuffled order that `reset(seed=)` begins anew, or the prompt `reset(options={"index": i})`.

    ## Episode End
    `terminated`: the action is an end token (see `llm_env.end_tokens`), or completes a stop string. `truncated`: it is action
    number max_new_tokens and does not terminate. The last info has `prompt` and `completion` as text, `prompt_index`,
    `reward/<name>` for every component, `is_success` where `success` names a component, `reward_error` where a reward failed
    and was paid a number in its place, `metric/<name>` and `extra/<column>` where rewards log such, and with a reference
    `ref_logprob`, the sum of log pi_ref, and (told log pi) `kl`, in nats.

    ## Arguments
    prompts, reward, tokenizer and the keywords of `llm_env.rules.Rules`; `render_mode="ansi"` renders the text so far.

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
        self._cursor = PromptCursor(len(self.rules.prompts), partial(getattr, self, "np_random"))
        self._last_info: dict[str, Any] = {}
        self._action_logprob: float | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode.

        Args:
            seed: begins the order of the prompts anew.
            options: `{"index": i}` takes prompt i.

        Raises:
            ValueError: If the seed, an option or the index is unusable. Nothing has changed then.
        """
        index = reset_options(options, ("index",)).get("index")
        if index is not None:
            index = self.rules.prompt_index(index)
        if seed is not None:
            seed = check_int("seed", seed, 0)
        super().reset(seed=seed)
        if seed is not None:
            self._cursor.restart()
        self._episodes.start([0], [self._cursor.next() if index is None else index])
        self._last_info, self._action_logprob = {}, None
        return self._observation(), {}

    def step(self, action: SupportsIndex) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append one token.

        Raises:
            ValueError: If the action is no token id or not allowed, the episode has ended, or a reward function failed. Nothing
                has changed then.
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
        """Say log pi, in nats, of the next action, so that the KL penalty in its reward is exact.

        An agent that stays silent is paid the part that an env can know, `kl_coef * log pi_ref`.
        """
        if not np.isfinite(logprob):
            raise ValueError(f"logprob={logprob} must be finite")
        self._action_logprob = float(logprob)

    def action_masks(self) -> np.ndarray:
        """(V,) bool, True for the tokens that may come next."""
        return self._episodes.action_masks()[0]

    def render(self) -> str | None:
        """The prompt and what has been written so far; once the episode has ended also every reward component and, with a
        reference, for every token log pi_ref and (where the agent told log pi) the KL, in nats.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='ansi' at construction")
            return None
        if self._episodes.prompt_lengths[0] == 0:
            return ""
        prompt = self.rules.prompts.texts[self._episodes.prompt_indexes[0]]
        (completion,) = self.rules.decode([self._episodes.response(0).tolist()])
        lines = [f"{prompt}{completion}"]
        lines += [f"{key}: {value:g}" for key, value in self._last_info.items() if key.startswith("reward")]
        if self._last_info and self.rules.reference is not None:
            lines += self._token_lines()
        return "\n".join(lines)

    def _token_lines(self) -> list[str]:
        """Return one line a token: its text, log pi, log pi_ref and their difference; `-` where log pi was not told."""
        lines = [f"{'token':>12} {'log pi':>9} {'log pi_ref':>11} {'kl':>9}"]
        for token, logp, ref_logp in zip(self._episodes.response(0).tolist(), *self._episodes.log_probs(0), strict=True):
            known = [f"{x:.4f}" if np.isfinite(x) else "-" for x in (logp, ref_logp, logp - ref_logp)]
            lines.append(f"{self.rules.tokenizer.decode([token])!r:>12} {known[0]:>9} {known[1]:>11} {known[2]:>9}")
        return lines

    def vectorize(self, num_envs: int, **options: Any) -> TextGenerationVectorEnv:
        """The native vector env with the same rules: prompts, tokenizer, rewards and reference are shared, not copied."""
        return TextGenerationVectorEnv.from_rules(self.rules, num_envs, **options)

    def _observation(self) -> Observation:
        return pick(self._episodes.observation(), 0)
