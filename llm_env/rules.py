"""Rules: the settings that all rows of an env share. Nothing here imports torch, except for a reference."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from llm_env.arguments import as_int, check_int, check_seconds
from llm_env.constraints import TokenConstraint
from llm_env.dialogue.chat import Bridge, PromptFormat
from llm_env.dialogue.text_env import Sessions, Text, TextEnvTasks, as_messages
from llm_env.end_tokens import resolve_end_tokens
from llm_env.observations import FORMS
from llm_env.penalties import EndPenalties
from llm_env.prompts import PromptTable, TaskTable
from llm_env.recorder import Recorder
from llm_env.rewards import ENV_REWARD, RewardFunction, RewardSum
from llm_env.stops import StopStrings, special_tokens
from llm_env.tokenization import decode, encode_texts, load_tokenizer, vocabulary_size
from llm_env.tools.formats import (
    FORMATS,
    PlainFormat,
    ToolCall,
    ToolFormat,
    ToolResult,
    as_tool_format,
    format_of_rendered_call,
)
from llm_env.tools.toolset import ToolSessions, ToolSet

if TYPE_CHECKING:
    from llm_env.reference import KLController, Reference

logger = logging.getLogger("llm_env")

DEFAULT_MAX_TURNS = 8  # with a text env
TURN_LIMITS = ("truncate", "continue")


class _CommonOptions(TypedDict, total=False):
    reward_weights: Sequence[float] | None
    max_prompt_tokens: int
    max_new_tokens: int
    stop: str | Sequence[str] | None
    eos_token_ids: int | Sequence[int] | None
    chat_template: str | Path | None
    chat_template_kwargs: dict[str, Any] | None
    reference: Any
    kl_coef: float | KLController
    long_prompts: str
    success: str | None
    observation: str
    record: str | Path | None
    allowed_tokens: Any
    min_new_tokens: int
    length_stop: str
    overlong_buffer: int
    overlong_penalty: float
    missing_eos_penalty: float
    max_turns: int | None
    max_observation_tokens: int
    max_episode_tokens: int | None
    turn_limit: str | None
    tools: Sequence[Callable[..., Any]] | None
    tool_format: str | ToolFormat | None
    tool_timeout: float | None
    tool_workers: int
    rollout_timeout: float | None
    async_envs: bool


class RulesOptions(_CommonOptions, total=False):
    """Keyword arguments of every text env; `Rules` documents them."""

    split: str | None
    chat: bool | None


class TaskOptions(_CommonOptions, total=False):
    """Keyword arguments of an env that a task sets and a user may override; without `split`, which tasks name."""

    prompts: Any
    reward: Any
    tokenizer: Any


class SplitTaskOptions(TaskOptions, total=False):
    """`TaskOptions` with `split`, for tasks that do not name it."""

    split: str | None


OPTIONS = RulesOptions.__optional_keys__
NAMES = frozenset({"prompts", "reward", "tokenizer"}) | OPTIONS


class Rules:
    """Settings that all rows of an env share: prompts, tokenizer, rewards, ends and reference.

    `TextGenerationEnv` and `TextGenerationVectorEnv` pass their keyword arguments to this class.

    Args:
        prompts: a list of str, a list of dict with `prompt` or `messages`, a `PromptSource`, a dataset, the path of a `.jsonl`
            file, or the `TextEnvTasks` of a text env.
        reward: a reward function in TRL's convention, or a list of them; see `llm_env.rewards`. With a text env it may be None:
            only the text env's own rewards are paid.
        tokenizer: a path, a hub id or a transformers tokenizer. It must have an end token.
        reward_weights: one weight per reward function; all 1 by default.
        max_prompt_tokens: maximum length of a prompt, in tokens; see `long_prompts`.
        max_new_tokens: maximum length of a turn, in tokens; see `turn_limit`.
        stop: one or several stop strings. A turn ends with the token that completes one of them. The stop string stays in the
            completion, except for special tokens in it; see `llm_env.stops`.
        eos_token_ids: one or several ids: all tokens that end a turn. By default the tokenizer's end token and those of the
            model whose files are in the tokenizer's folder. An agent adds those of its model. See `llm_env.end_tokens`.
        chat_template: for chats: a template, the name of one of the tokenizer's templates, or the path of a `.jinja` file.
            Default: the tokenizer's. The agent saves it with the model.
        chat_template_kwargs: keyword arguments of the template, such as `{"enable_thinking": False}`. A column of that name
            overrides them for its row. A column `tools` is passed to the template, too.
        reference: a path, hub id, model or `Reference`, which computes log pi_ref of every action; see `llm_env.reference`.
            `"base"` is the policy with its LoRA adapter off; see `llm_env.reference.BaseReference`.
        kl_coef: beta of the KL penalty in the reward, in reward per nat: a number or a KL controller. Needs a reference.
        split: `"train"` or `"test"` (a tenth of the prompts, by a hash of their text); None for all prompts.
        long_prompts: what to do with prompts of more than `max_prompt_tokens` tokens: `"error"` or `"drop"`.
        record: the path of a file. Every episode is appended to it as a line of JSON; see `llm_env.recorder`.
        allowed_tokens: the tokens that may come next: ids, a (V,) bool array or a function of the state; see
            `llm_env.constraints.TokenConstraint`. It applies to action masks, sampling, training and the reference.
        min_new_tokens: minimum length of a turn, in tokens: no end token is allowed before.
        length_stop, overlong_buffer, overlong_penalty, missing_eos_penalty: how the end of an episode changes its score; see
            `llm_env.penalties.EndPenalties`.
        observation: `"dict"`, or `"flat"` for agents that need a single Box; see `llm_env.observations`.
        max_turns: maximum number of turns in an episode; 1 with prompts, by default 8 with a text env or tools.
        max_observation_tokens: expected length of an observation (of a text env, or the results of tools), in tokens; it only
            sets the default of `max_episode_tokens`.
        max_episode_tokens: maximum number of tokens after the prompt, turns and observations together; by default
            `max_turns * (max_new_tokens + max_observation_tokens)`, and `max_new_tokens` with prompts.
        turn_limit: what happens to a turn that reaches its limit without an end token or stop string. `"truncate"` ends the
            episode (default with prompts). `"continue"` gives the turn to the text env or the tools (default with a text env).
        chat: whether texts of a text env are user messages of the tokenizer's chat template; by default if it has one.
        tools: functions that the model may call during an episode, in TRL's contract; see `llm_env.tools`. A turn without a
            call ends the episode. Completions are lists of messages then.
        tool_format: how calls are written: `"hermes"`, `"llama"`, `"mistral"`, `"plain"` or a `llm_env.tools.ToolFormat`. By
            default that of the chat template; `"plain"` where the template knows no tools, and for prompts of plain text.
        tool_timeout: seconds that a call may take; None for no limit.
        tool_workers: maximum number of turns whose calls are made at a time, each in a thread.
        async_envs: step the text env or the tools in threads (`workers` or `tool_workers` at a time) while the responses of
            other rows are sampled. The episodes are the same. Engines that generate turns in lockstep step all rows at once.
        rollout_timeout: seconds of a rollout after which no new turn begins: episodes under way end after their turn,
            truncated by `"rollout_timeout"`. None for no limit. Which episodes these are depends on the clock. The token clock
            has no such limit.
        success: name of the reward component that is at least 1 exactly where the episode is a success; it makes
            `is_success` appear in the last info.

    Raises:
        ValueError, TypeError: If an argument is unusable. The message names the value and the remedy.

    Attributes:
        eos_ids: the tokens that end a turn.
        eos_id: one of `eos_ids`: the tokenizer's end token if it is among them.
        text_env: the tasks of a text env; None with prompts.
        tools: the tools; None without.
    """

    def __init__(
        self,
        prompts: Any,
        reward: RewardFunction | Sequence[RewardFunction] | None,
        tokenizer: Any,
        *,
        reward_weights: Sequence[float] | None = None,
        max_prompt_tokens: int = 64,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] | None = None,
        eos_token_ids: int | Sequence[int] | None = None,
        chat_template: str | Path | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        reference: Any = None,
        kl_coef: float | KLController = 0.0,
        split: str | None = None,
        long_prompts: str = "error",
        success: str | None = None,
        observation: str = "dict",
        record: str | Path | None = None,
        allowed_tokens: Any = None,
        min_new_tokens: int = 0,
        length_stop: str = "score",
        overlong_buffer: int = 0,
        overlong_penalty: float = 1.0,
        missing_eos_penalty: float = 0.0,
        max_turns: int | None = None,
        max_observation_tokens: int = 64,
        max_episode_tokens: int | None = None,
        turn_limit: str | None = None,
        chat: bool | None = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        tool_format: str | ToolFormat | None = None,
        tool_timeout: float | None = None,
        tool_workers: int = 1,
        rollout_timeout: float | None = None,
        async_envs: bool = False,
    ) -> None:
        self.text_env = prompts if isinstance(prompts, TextEnvTasks) else None
        self.tools = self._as_tools(tools, tool_format, tool_timeout, tool_workers)
        self.max_prompt_tokens = check_int("max_prompt_tokens", max_prompt_tokens, 1)
        self.max_new_tokens = check_int("max_new_tokens", max_new_tokens, 1)
        min_new_tokens = check_int("min_new_tokens", min_new_tokens, 0, self.max_new_tokens)
        self._set_turns(max_turns, max_observation_tokens, max_episode_tokens, turn_limit)
        self._format = format = PromptFormat(load_tokenizer(tokenizer), chat_template, chat_template_kwargs)
        self.tokenizer = format.tokenizer
        if observation not in FORMS:
            raise ValueError(f"observation={observation!r} must be one of {FORMS}")
        self.observation = observation
        self.ends = EndPenalties(self.max_actions, length_stop, overlong_buffer, overlong_penalty, missing_eos_penalty)
        self.vocab_size = vocabulary_size(self.tokenizer)
        self.ends_are_given = eos_token_ids is not None
        self.special = special_tokens(self.tokenizer)
        if isinstance(allowed_tokens, Iterator):
            allowed_tokens = list(allowed_tokens)
        self._wanted = {"stop": stop, "allowed_tokens": allowed_tokens, "min_new_tokens": min_new_tokens}
        self._set_ends(resolve_end_tokens(eos_token_ids, self.tokenizer, self.vocab_size))
        self.pad_id = self.eos_id if self.tokenizer.pad_token_id is None else int(self.tokenizer.pad_token_id)
        self.chat = self._as_chat(chat)
        if self.tools is not None:
            self._set_tool_formats(tool_format)
        self.prompts: PromptTable | TaskTable
        if self.text_env is None:
            self.prompts = PromptTable(prompts, format, self.max_prompt_tokens, split, long_prompts)
        else:
            self.prompts = TaskTable(self.text_env, format, self.max_prompt_tokens, self.chat, split)
        self.rewards = self._make_rewards(reward, reward_weights)
        if taken := set(self.ends.names) & set(self.rewards.names):
            raise ValueError(f"a reward function has the name {taken.pop()!r}, under which a penalty is reported; rename it")
        components = [*self.rewards.names, *([] if self.text_env is None else [ENV_REWARD])]
        if success is not None and success not in components:
            raise ValueError(f"success={success!r} is not one of the reward components {components}")
        self.success = success
        self.reference, self.kl = _reference_and_kl(reference, kl_coef)
        if self.reference is not None:
            self.reference.check_vocabulary(self.vocab_size)
            self.reference.check_length(self.longest_prompt, self.max_episode_tokens, self.length_argument)
        self.recorder = None if record is None else Recorder(record, self.prompts.rows())
        self.rollout_timeout = self._as_rollout_timeout(rollout_timeout)
        self.async_envs = self._as_async_envs(async_envs)
        self.bridge = self._make_bridge()
        for seen in [] if self.text_env is None else self.text_env.checked_observations:
            self.observation_ids((), seen)
        self._warned = False
        if self.ends_are_given or self.tokenizer.name_or_path:  # else an agent may know more
            self.warn_of_endless_turn()

    def _as_tools(self, tools: Any, tool_format: Any, timeout: float | None, workers: int) -> ToolSet | None:
        if tools is None:
            for name, value in (("tool_format", tool_format), ("tool_timeout", timeout)):
                if value is not None:
                    raise ValueError(f"{name}={value!r} needs tools; set tools=[function, ...]")
            return None
        if self.text_env is not None:
            raise ValueError("tools are for prompts with reward functions; a text env answers every turn itself. Drop tools=")
        return ToolSet(tools, timeout, workers)

    def _set_tool_formats(self, given: Any) -> None:
        """Choose how calls are written in chats and after prompts of text, and have the prompts describe the tools."""
        assert self.tools is not None
        name = self._template_tool_format() if given is None else None
        self._chat_tools = as_tool_format(name if given is None else given)
        self._text_tools = PlainFormat() if given is None else self._chat_tools
        self._format.chat_instructions = self._chat_tools.instructions(self.tools.schemas)
        self._format.text_instructions = self._text_tools.instructions(self.tools.schemas)
        if not self._format.chat_instructions:
            self._format.tools = self.tools.schemas

    def _template_tool_format(self) -> str:
        """Return the name of the format in which the chat template writes tool calls."""
        assert self.tools is not None
        if not self._format.has_template:
            return "plain"
        name = self.tools.names[0]
        text = self._format.rendered_call(name, self.tools.schemas)
        if text is None:
            return "plain"
        if (found := format_of_rendered_call(text, name)) is None:
            raise ValueError(
                f"the chat template writes tool calls in a format that is not known here: {text!r}. Set tool_format= to one of "
                f"{sorted(FORMATS)}, or to a llm_env.tools.ToolFormat that parses it"
            )
        return found

    def _make_bridge(self) -> Bridge | None:
        closing = {*self.eos_ids, *self.special}
        if self.tools is None:
            return Bridge(self._format, closing) if self.chat else None
        if not self.prompts.has_chats:
            return None
        example = self._chat_tools.observation([ToolResult(ToolCall(self.tools.names[0], id="call00000"), "")], is_chat=True)
        return Bridge(self._format, closing, as_messages(example))

    def sessions(self) -> Sessions | ToolSessions | None:
        """Return new instances of what answers turns: a text env's, or the tools; None if the first turn ends an episode."""
        if self.tools is not None:
            return ToolSessions(self.tools, self._chat_tools, self._text_tools, list(self.special.values()))
        return None if self.text_env is None else Sessions(self.text_env)

    @property
    def has_replies(self) -> bool:
        """Whether turns are answered, by a text env or by tools."""
        return self.replies is not None

    @property
    def replies(self) -> TextEnvTasks | ToolSet | None:
        """What answers turns: a text env or tools; None if the first turn ends an episode."""
        return self.text_env if self.tools is None else self.tools

    @property
    def reply_workers(self) -> int:
        """Maximum number of rows that the text env or the tools answer at a time, in threads."""
        return 1 if self.replies is None else self.replies.workers

    def turn_text(self, tokens: Sequence[int]) -> str:
        """Return the text of a turn as a text env or tools get it: special tokens stay where they may mark a tool call."""
        if self.tools is None and not (self.text_env is not None and self.text_env.keeps_special_tokens):
            return self.decode([tokens])[0]
        kept = [token for token in tokens if token not in self.eos_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _set_turns(self, max_turns: Any, max_observation_tokens: Any, max_episode_tokens: Any, turn_limit: Any) -> None:
        if not self.has_replies and max_turns not in (None, 1):
            raise ValueError(
                f"max_turns={max_turns!r}, but prompts with reward functions have one turn; make the env with "
                "TextGenerationEnv.from_text_env, give tools=, or set max_turns=1"
            )
        default = DEFAULT_MAX_TURNS if self.has_replies else 1
        self.max_turns = check_int("max_turns", default if max_turns is None else max_turns, 1)
        observation = check_int("max_observation_tokens", max_observation_tokens, 0) if self.has_replies else 0
        if max_episode_tokens is None:
            max_episode_tokens = self.max_turns * (self.max_new_tokens + observation)
        self.max_episode_tokens = check_int("max_episode_tokens", max_episode_tokens, 1)
        if self.max_episode_tokens < self.max_new_tokens:
            raise ValueError(
                f"max_episode_tokens={self.max_episode_tokens} must hold a turn of max_new_tokens={self.max_new_tokens}; "
                "raise it, or lower max_new_tokens"
            )
        if not self.has_replies and self.max_episode_tokens != self.max_new_tokens:
            raise ValueError(
                f"max_episode_tokens={self.max_episode_tokens} is for text envs and tools; with prompts set max_new_tokens"
            )
        if turn_limit is None:
            turn_limit = "truncate" if self.text_env is None else "continue"
        if turn_limit not in TURN_LIMITS or (turn_limit == "continue" and not self.has_replies):
            raise ValueError(f"turn_limit={turn_limit!r} must be one of {TURN_LIMITS}; with prompts only 'truncate'")
        self.turn_limit = turn_limit

    def _as_async_envs(self, is_on: bool) -> bool:
        if is_on and not self.has_replies:
            raise ValueError("async_envs=True is for text envs and tools; nothing answers the responses to these prompts")
        return bool(is_on)

    def _as_rollout_timeout(self, seconds: Any) -> float | None:
        if seconds is not None and not self.has_replies:
            raise ValueError(f"rollout_timeout={seconds!r} is for text envs and tools; one turn is limited by max_new_tokens")
        return check_seconds("rollout_timeout", seconds)

    def _as_chat(self, chat: bool | None) -> bool:
        """Return whether texts of the text env are messages."""
        has_template = self._format.has_template
        if chat is not None and self.text_env is None:
            raise ValueError(f"chat={chat!r} is for text envs; give a prompt as a str or as a list of messages")
        if chat and not has_template:
            raise ValueError("chat=True needs a chat template, but the tokenizer has none; set chat_template=, or chat=False")
        return self.text_env is not None and (has_template if chat is None else bool(chat))

    def _make_rewards(self, reward: Any, weights: Any) -> RewardSum:
        if not self.has_replies:
            return RewardSum(reward, weights, self.prompts.columns, self.prompts.incomplete)
        if self.tools is not None:
            rewards = RewardSum(reward, weights, self.prompts.columns, self.prompts.incomplete)
            if rewards.stepwise:
                raise ValueError(
                    "a reward marked with process_reward is called while a response is written, which is not supported with "
                    "tools; take off the mark"
                )
            return rewards
        functions = [] if reward is None else reward
        rewards = RewardSum(functions, weights, self.prompts.columns, self.prompts.incomplete, required=False)
        if rewards.stepwise:
            raise ValueError(
                "a reward marked with process_reward is called while a response is written, which is not supported with a text "
                "env; pay turns in the text env's step, or take off the mark"
            )
        if ENV_REWARD in rewards.names:
            raise ValueError(f"a reward function has the name {ENV_REWARD!r}, the component of the text env; rename it")
        return rewards

    def _set_ends(self, eos_ids: frozenset[int]) -> None:
        self.eos_ids = eos_ids
        own = int(self.tokenizer.eos_token_id)
        self.eos_id = own if own in eos_ids else min(eos_ids)
        self.stop_strings = StopStrings(self._wanted["stop"], self.tokenizer, self.special, eos_ids)
        self.stop = self.stop_strings.strings
        self.constraint: TokenConstraint | None = None
        allowed, least = self._wanted["allowed_tokens"], self._wanted["min_new_tokens"]
        if allowed is not None or least:
            self.constraint = TokenConstraint(allowed, least, self.vocab_size, eos_ids)

    def end_also_at(self, tokens: Collection[int]) -> None:
        """Add end tokens: those of a model that was not known when the env was made."""
        self._set_ends(self.eos_ids | frozenset(tokens))
        if self.bridge is not None:
            self.bridge = self._make_bridge()

    @property
    def max_tokens(self) -> int:
        """L, the length of an observation: the longest prompt and all tokens after it."""
        return self.max_prompt_tokens + self.max_episode_tokens

    @property
    def length_argument(self) -> str:
        """The name of the argument that limits the tokens after the prompt, for error messages."""
        return "max_episode_tokens" if self.has_replies else "max_new_tokens"

    @property
    def max_actions(self) -> int:
        """The maximum number of action tokens in an episode."""
        return min(self.max_turns * self.max_new_tokens, self.max_episode_tokens)

    @property
    def longest_prompt(self) -> int:
        """The length of the longest prompt, in tokens; of a text env the limit, `max_prompt_tokens`."""
        return max(map(len, self.prompts.longest()))

    def observation_ids(self, turn: Sequence[int], observation: Text) -> list[int]:
        """Return the token ids that the env writes after a turn.

        Args:
            turn: token ids of the turn.
            observation: of the text env or the tools.

        Raises:
            ValueError: If it cannot be written, for instance messages without a chat template.
        """
        if self.bridge is not None and (self.chat or not isinstance(observation, str)):
            return self.bridge(turn, as_messages(observation))
        if not isinstance(observation, str):
            raise ValueError(
                f"the observation {str(observation)[:80]!r} is a list of messages, but texts are raw (chat=False, or no "
                "chat template); return a str, or set chat_template="
            )
        return encode_texts(self.tokenizer, [observation], special=False)[0]

    def describe(self) -> str:
        """Return prompts and limits in a few words."""
        if self.text_env is None:
            tools = "" if self.tools is None else f", tools {', '.join(self.tools.names)}, max_turns={self.max_turns}"
            return f"{len(self.prompts)} prompts{tools}, max_new_tokens={self.max_new_tokens}"
        tasks = "endless" if self.text_env.endless else str(len(self.prompts))
        return f"{self.text_env.name}, {tasks} tasks, max_turns={self.max_turns}, max_new_tokens={self.max_new_tokens}"

    def are_end_tokens(self, tokens: np.ndarray) -> np.ndarray:
        """Return which tokens are end tokens: a bool array of the same shape."""
        found: np.ndarray = np.zeros(tokens.shape, dtype=bool)
        for token in self.eos_ids:
            found |= tokens == token
        return found

    def record_apart(self, process: int) -> None:
        """Record into a separate file, in all processes except the first."""
        if self.recorder is not None and process:
            self.recorder = self.recorder.beside(f"process{process}")

    def decode(self, responses: Sequence[Sequence[int]]) -> list[str]:
        """Decode responses without special tokens, as reward functions and people read them."""
        return [
            self.tokenizer.decode(
                [token for token in ids if token not in self.eos_ids],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
            for ids in responses
        ]

    def prompt_index(self, index: Any) -> int:
        """Return an index of a prompt as an int.

        Raises:
            ValueError: If it is not a whole number, or there is no such prompt.
        """
        number = as_int(index)
        if number is None:
            raise ValueError(f"index={index!r} must be a whole number: this env has the prompts 0..{len(self.prompts) - 1}")
        if not 0 <= number < len(self.prompts) or not self.prompts.contains(number):
            raise ValueError(f"index={number} is out of range: this env has the prompts 0..{len(self.prompts) - 1}")
        return number

    def reference_log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        begins: Sequence[int],
        turn_ids: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Compute log pi_ref of the action tokens from token begins[i] on of each response.

        Args:
            prompts: B lists of token ids.
            responses: B lists of token ids, turns and observations.
            begins: B ints.
            turn_ids: B int arrays, the turn of each token and -1 for tokens that the env wrote; all actions by default.

        Returns:
            B float32 arrays, in nats; 0 at tokens that the env wrote.
        """
        assert self.reference is not None
        contexts = [[*prompt, *response[:n]] for prompt, response, n in zip(prompts, responses, begins, strict=True)]
        tails = [list(response[n:]) for response, n in zip(responses, begins, strict=True)]
        allowed = None
        if self.constraint is not None:
            turns = [np.zeros(len(response), int) for response in responses] if turn_ids is None else turn_ids
            allowed = [self.constraint.along_turns(*row) for row in zip(prompts, responses, turns, begins, strict=True)]
        if self.max_turns == 1 or turn_ids is None:
            return self.reference.log_probs(contexts, tails, allowed)
        actions = [turns[n:] >= 0 for turns, n in zip(turn_ids, begins, strict=True)]
        return self.reference.log_probs(contexts, tails, allowed, actions=actions)

    def closes(self, turn: Sequence[int]) -> bool:
        """Return whether a turn has ended by itself: its last token is an end token, or completes a stop string."""
        return turn[-1] in self.eos_ids or self.completes_stop(turn)

    def completes_stop(self, response: Sequence[int]) -> bool:
        """Return whether the last token of `response` completes a stop string; always False without any."""
        return self.stop_strings.completed_by(response)

    def endless_turn(self) -> str:
        """Return a warning if the chat template closes a turn with a token that is not an end token.

        The warning has the remedy. It is empty if no prompt is a chat, or if the text that the template writes after a turn
        has an end token or a stop string.
        """
        if not self.prompts.has_chats:
            return ""
        tokens = self.prompts.format.end_of_turn()
        if any(token in self.eos_ids or self.completes_stop(tokens[: i + 1]) for i, token in enumerate(tokens)):
            return ""
        added = self.tokenizer.added_tokens_decoder
        closing = next((token for token in tokens if token in added), None)
        if closing is not None:
            name, remedy = added[closing].content, f"eos_token_ids={sorted([*self.eos_ids, closing])}"
        elif marker := re.match(r"\s*(<\S+?>|\[\S+?\])", decode(self.tokenizer, tokens)):  # of ordinary tokens
            name, remedy = marker[1], f"stop={marker[1]!r}"
        else:
            return ""
        return (
            f"the chat template closes a turn with {name!r}, which ends no episode of this env (end tokens are "
            f"{sorted(self.eos_ids)}): answers continue after it; set {remedy}"
        )

    def warn_of_endless_turn(self) -> None:
        """Log the warning of `endless_turn`, and chats whose prompt ends with an end token; once."""
        if self._warned:
            return
        self._warned = True
        if problem := self.endless_turn():
            logger.warning("%s", problem)
        if not isinstance(self.prompts, PromptTable):
            return
        chats = (i for i, messages in enumerate(self.prompts.messages) if messages is not None)
        if (i := next((i for i in chats if int(self.prompts.ids[i][-1]) in self.eos_ids), None)) is not None:
            logger.warning(
                "the prompt %r ends with an end token: the chat template writes no opening of the assistant's answer; check "
                "that it uses add_generation_prompt",
                self.prompts.texts[i][-80:],
            )


def _reference_and_kl(reference: Any, kl_coef: Any) -> tuple[Reference | None, KLController | None]:
    if reference is None:
        if not (isinstance(kl_coef, (int, float)) and kl_coef == 0):
            raise ValueError(f"kl_coef={kl_coef!r} needs a reference to measure the KL from; set reference=, or kl_coef=0.0")
        return None, None
    from llm_env.reference import as_kl_controller, as_reference  # torch is needed from here on only

    return as_reference(reference), as_kl_controller(kl_coef)
