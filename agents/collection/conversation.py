"""Answer messages in the context of training; see `LanguageAgent.chat`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from agents.engines.base import DecodingSpec, PolicyEngine
from agents.policy import LanguagePolicy
from agents.policy.prompt_encoding import encode_prompts
from agents.sampling.sampler import Sampler
from llm_env.dialogue.chat import check_message
from llm_env.dialogue.text_env import Transition, as_messages
from llm_env.lm.positions import check_length
from llm_env.rules import Rules
from llm_env.tokenization import encode_texts
from llm_env.tools.toolset import ToolSessions

Messages = list[dict[str, Any]]
MOST_REMEMBERED = 1024


def check_messages(messages: Any) -> Messages:
    """Return a conversation that waits for an answer.

    Raises:
        TypeError, ValueError: If it is no list of messages, or ends with one of the assistant.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TypeError(f"messages={messages!r} must be a list of messages, such as [{{'role': 'user', 'content': 'Hello'}}]")
    for i, message in enumerate(messages):
        check_message(message, f"message {i}")
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is of the assistant; add what it shall answer, such as a user message")
    return list(messages)


class Conversations:
    """Contexts of conversations that were answered: a continuation has the sampled tokens in its context, as in training."""

    def __init__(self) -> None:
        self._contexts: dict[str, tuple[list[int], list[int], Messages]] = {}  # see `_remember`

    def answer(self, policy: LanguagePolicy, rules: Rules, messages: Messages, sampler: Sampler) -> Messages:
        """Sample the assistant's turn, make its tool calls and go on until it makes none; return the new messages.

        Args:
            policy: the model.
            rules: of an env whose turns are answered, by a text env or by tools.
            messages: a conversation.
            sampler: temperature, or greedy decoding.

        Raises:
            ValueError: If the conversation has no template, cannot be rendered, or leaves no room for an answer.
        """
        context = self._context(rules, messages)
        check_length(policy.max_positions, len(context), 1)
        room = rules.max_episode_tokens
        if policy.max_positions is not None:
            room = min(room, policy.max_positions - len(context))
        sessions = rules.sessions() if rules.tools is not None else None
        said: Messages = []
        turns: list[list[int]] = []
        given: list[str] = []

        def reply(rows: Sequence[int], new: list[list[int]], _: list[np.ndarray]) -> list[list[int] | None]:
            nonlocal context, room
            (turn,) = new
            turns.append(turn)
            context = [*context, *turn]
            transition: Transition | None = None
            if isinstance(sessions, ToolSessions) and (rules.closes(turn) or rules.turn_limit == "continue"):
                if not given:
                    sessions.start(0, is_chat=True)
                given.append(rules.turn_text(turn))
                transition = sessions.step(0, given)
            if transition is None or transition.messages is None:
                said.append({"role": "assistant", "content": rules.decode([turn])[0]})
                self._remember([*messages, *said], context, turn, [])
                return [None]
            said.extend(transition.messages)
            self._remember([*messages, *said], context, turn, as_messages(transition.observation))
            observation = rules.observation_ids(turn, transition.observation)
            room -= len(turn) + len(observation)
            context = [*context, *observation]
            return [observation if room > 0 and len(turns) < rules.max_turns else None]

        spec = DecodingSpec(rules, sampler, min(rules.max_new_tokens, room), max_episode_tokens=room)
        PolicyEngine(policy).generate([context], 1, spec, reply)
        return said

    def _context(self, rules: Rules, messages: Messages) -> list[int]:
        """Return the token ids of a conversation: the prompt, and turns and what follows them as the env writes it."""
        if rules.bridge is None:
            raise ValueError("the env's prompts are plain texts, not messages; use agent.generate or agent.play")
        at = next((k for k in range(len(messages), 0, -1) if _key(messages[:k]) in self._contexts), 0)
        if at:
            ids, turn, shown = self._contexts[_key(messages[:at])]
        else:
            at = next((k for k, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
            if not at:
                raise ValueError("the first message is of the assistant; a conversation begins with a system or user message")
            (ids,), turn, shown = encode_prompts([messages[:at]], rules.prompts.format, rules), [], []
        while at < len(messages):
            if messages[at]["role"] == "assistant":
                content = messages[at].get("content")
                if messages[at].get("tool_calls") or not isinstance(content, str):
                    raise ValueError(
                        f"message {at}, of the assistant, has tool calls or no text, and this agent did not write it; begin "
                        "with the messages before it"
                    )
                (turn,) = encode_texts(rules.tokenizer, [content], special=False)
                ids, at, shown = [*ids, *turn], at + 1, []
                continue
            end = next((k for k in range(at, len(messages)) if messages[k]["role"] == "assistant"), len(messages))
            ids, at = [*ids, *rules.bridge(turn, [*shown, *messages[at:end]])], end
        return ids

    def _remember(self, messages: Messages, context: list[int], turn: list[int], shown: Messages) -> None:
        """Keep the context up to the last turn of `messages`, that turn, and the messages by which its tools answered."""
        self._contexts[_key(messages)] = (context, turn, shown)
        while len(self._contexts) > MOST_REMEMBERED:
            del self._contexts[next(iter(self._contexts))]


def _key(messages: Messages) -> str:
    return json.dumps(messages, sort_keys=True, default=str)
