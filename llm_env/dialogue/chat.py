"""Chat templates: prompts as text or messages, their token ids, and the tokens between two turns."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llm_env.arguments import check_text
from llm_env.tokenization import encode_texts

Messages = list[dict[str, Any]]
SPOKEN = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")  # one of which a message has
RESERVED = (
    "conversation",
    "messages",
    "chat_template",
    "tools",
    "tokenize",
    "return_dict",
    "return_tensors",
    "padding",
    "truncation",
)
PLACEHOLDER = "placeholder-7f3a"  # stands for an assistant message when the text after a turn is rendered
OBSERVATION = "observation-7f3a"  # stands for an observation there
FIRST_USER = "question-7f3a"  # stands for the user message before the turn


class Prompt(NamedTuple):
    """A rendered prompt.

    Attributes:
        text: the text that is tokenized; a chat as rendered by the template.
        messages: the messages of a chat; None for text.
    """

    text: str
    messages: Messages | None


class PromptFormat:
    """Converts prompts to text, and text to token ids.

    Args:
        tokenizer: a transformers tokenizer.
        chat_template: a template, the name of one of the tokenizer's templates, or the path of a `.jinja` file. Default: the
            tokenizer's template.
        chat_template_kwargs: keyword arguments of the template for all prompts, such as `{"enable_thinking": False}`.

    Attributes:
        tools: JSON schemas that the template of every chat gets, unless its row has a column `tools`.
        chat_instructions, text_instructions: texts that are put in front of chats and texts; "" for none.
        tokenizer: the tokenizer; a copy with the template if `chat_template` is given. It is saved with the model.

    Raises:
        TypeError, ValueError: If an argument is unusable.
    """

    def __init__(self, tokenizer: Any, chat_template: str | Path | None = None, chat_template_kwargs: Any = None) -> None:
        self.chat_template = _template(tokenizer, chat_template)
        self.tokenizer = tokenizer if self.chat_template is None else _with_template(tokenizer, self.chat_template)
        self.chat_template_kwargs = _checked_kwargs(chat_template_kwargs, "chat_template_kwargs")
        self.tools: list[dict[str, Any]] | None = None
        self.chat_instructions = self.text_instructions = ""

    @property
    def has_tools(self) -> bool:
        """Whether prompts describe tools: completions are messages then, also after a prompt of text."""
        return self.tools is not None or bool(self.chat_instructions)

    @property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return self.chat_template is not None or getattr(self.tokenizer, "chat_template", None) is not None

    # --- text ------------------------------------------------------------------------------------------------------------

    def render(self, row: Any, index: int, kind: str = "row") -> Prompt:
        """Render the prompt of a row.

        A chat in `prompt` that ends with an assistant message is continued, as in TRL. A chat in `messages` that does so is an
        example for supervised training, and an error: its answer would be part of the prompt.

        Args:
            row: a dict with `prompt` (text or messages) or `messages`, and optionally `tools` and `chat_template_kwargs`.
            index: the row's number, for error messages.
            kind: name of a row in error messages.

        Raises:
            TypeError, ValueError: If the row has no usable prompt, or the template fails. The message names the row.
        """
        name = f"{kind} {index}"
        long_name = f"row {index} of the prompts" if kind == "row" else name
        if not isinstance(row, dict):
            raise TypeError(f"{long_name} is a {type(row).__name__}; rows are str, or dict with a 'prompt' key")
        if other := [key for key in row if not isinstance(key, str)]:
            raise TypeError(f"{long_name} has the key {other[0]!r}; keys are the names of columns, of type str")
        key = next((key for key in ("prompt", "messages") if key in row), None)
        if key is None:
            raise ValueError(f"{long_name} has the keys {sorted(row)}, but neither 'prompt' nor 'messages'")
        content = row[key]
        if content is None:
            raise ValueError(f"{long_name} holds None as its {key!r}; give a text or messages")
        if isinstance(content, str):
            begin = f"{self.text_instructions}\n\n" if self.text_instructions else ""
            prompt = Prompt(begin + content, None)
        elif isinstance(content, (list, tuple)):
            prompt = self._render_chat(list(content), key, row, name)
        else:
            raise TypeError(f"{name}: {key!r} is a {type(content).__name__}; it must be a str or a list of messages")
        check_text(prompt.text, long_name)
        return prompt

    def _render_chat(self, messages: Messages, key: str, row: dict[str, Any], name: str) -> Prompt:
        if not self.has_template:
            raise ValueError(
                f"{name} holds chat messages, but the tokenizer has no chat template; set chat_template= (or "
                "tokenizer.chat_template), or give the prompt as text"
            )
        for message in messages:
            check_message(message, name)
        own = _checked_kwargs(row.get("chat_template_kwargs"), f"{name}: 'chat_template_kwargs'")
        # A dataset column has every key in every row, with None for missing ones.
        kwargs = {**self.chat_template_kwargs, **{key: value for key, value in own.items() if value is not None}}
        answered = bool(messages) and messages[-1].get("role") == "assistant"
        goes_on = kwargs.pop("continue_final_message", answered and key == "prompt")
        if answered and not goes_on and key == "messages":
            raise ValueError(
                f"{name}: 'messages' ends in an assistant's message, which would put the answer into the prompt; drop that "
                "message, or have it continued: give the list as 'prompt', or "
                "chat_template_kwargs={'continue_final_message': True}"
            )
        begins = kwargs.pop("add_generation_prompt", not goes_on)
        kwargs |= {"add_generation_prompt": begins, "continue_final_message": goes_on}
        if goes_on and messages[-1].get("content") is None:
            raise ValueError(
                f"{name}: the last message, of the assistant, has no content to be continued; drop it, or give it content"
            )
        tools = _tools(row.get("tools"), name) or self.tools
        told = with_instructions(messages, self.chat_instructions) if self.chat_instructions else messages
        try:
            text = self._apply(told, tools=tools, **kwargs)
        except Exception as error:
            raise ValueError(f"{name}: the chat template raised {type(error).__name__}: {error}") from error
        return Prompt(text, messages)

    def _apply(self, messages: Messages, **kwargs: Any) -> str:
        # Keywords that are off are not passed: some tokenizers do not accept them.
        used = {key: value for key, value in kwargs.items() if value is not None and (key, value) != OFF}
        if self.chat_template is not None:
            used["chat_template"] = self.chat_template
        return self.tokenizer.apply_chat_template(messages, tokenize=False, **used)

    # --- token ids -------------------------------------------------------------------------------------------------------

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Tokenize prompts: text with BOS and without EOS, a chat as its template rendered it."""
        return encode_prompts(self.tokenizer, prompts)

    def after_turn(self, observation: Messages, turn: str) -> str | None:
        """Render a chat of a user, a turn and an observation, with the opening of the next turn; return what follows the turn.

        Returns None if the turn does not appear.

        Raises:
            ValueError: If the template fails.
        """
        chat = [{"role": "user", "content": FIRST_USER}, {"role": "assistant", "content": turn}, *observation]
        try:
            text = self._apply(chat, **{**self.chat_template_kwargs, "add_generation_prompt": True})
        except Exception as error:
            raise ValueError(f"the chat template raised {type(error).__name__} on an observation: {error}") from error
        _, found, rest = text.partition(turn)
        return rest if found else None

    def rendered_call(self, name: str, tools: list[dict[str, Any]]) -> str | None:
        """Render a call of the tool `name` by the assistant; return what the template writes after the user message.

        Returns None if the template does not show the call.
        """
        user = {"role": "user", "content": FIRST_USER}
        function = {"name": name, "arguments": {"argument": PLACEHOLDER}}
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "id": "call00000", "function": function}],
        }
        try:
            text = self._apply([user, call], tools=tools, **self.chat_template_kwargs)
        except Exception:  # the template refuses tool calls
            return None
        said = text.rpartition(FIRST_USER)[2]
        return said if name in said and PLACEHOLDER in said else None

    def end_of_turn(self) -> list[int]:
        """Return the tokens that the chat template writes after an assistant message; empty if there are none."""
        turn = [{"role": "user", "content": PLACEHOLDER}, {"role": "assistant", "content": PLACEHOLDER}]
        try:
            text = self._apply(turn, **self.chat_template_kwargs)
        except Exception:  # the template refuses these messages
            return []
        _, found, rest = text.rpartition(PLACEHOLDER)
        return encode_texts(self.tokenizer, [rest], special=False)[0] if found else []


class Bridge:
    """The token ids that an env writes between two turns of a chat: the end of the turn, the observation, the next opening.

    The template is rendered around a placeholder for the turn. The bridge is what follows the placeholder, tokenized without
    special tokens. Its first tokens close the turn; those that the turn already ends with are left out. Sampled tokens are
    never changed.

    Args:
        format: the template.
        closing: token ids that may close a turn: end tokens and special tokens.
        example: messages of an observation, to check the template with; one user message by default.

    Raises:
        ValueError: If the template fails on an observation, does not show it, or what it writes after a turn depends on the
            text of the turn. Observations with other roles than those of the example are checked when they first appear.
    """

    def __init__(self, format: PromptFormat, closing: Collection[int], example: Messages | None = None) -> None:
        self._format, self._closing = format, frozenset(closing)
        self._checked: set[tuple[str, ...]] = set()
        self._check([{"role": "user", "content": ""}] if example is None else example)

    def _check(self, observation: Messages) -> None:
        """Check the rendering of an observation, once for all with the same roles."""
        roles = tuple(message["role"] for message in observation)
        if roles in self._checked:
            return
        shown = [{**message, "content": f"{OBSERVATION}-{i}"} for i, message in enumerate(observation)]
        text, other = (self._format.after_turn(shown, turn) for turn in (PLACEHOLDER, f"{PLACEHOLDER} 2"))
        named = "+".join(roles)
        if text is None or not all(message["content"] in text for message in shown):
            raise ValueError(
                f"the chat template does not show a {named} message after an assistant message; it renders {text!r}. Set "
                "chat=False to use texts without a template, tool_format='plain' for tools, or another chat_template"
            )
        if text != other:
            raise ValueError(
                f"the chat template writes {text!r} after one turn and {other!r} after another: what follows a turn must not "
                "depend on its text. Set chat=False, or another chat_template"
            )
        self._checked.add(roles)

    def __call__(self, turn: Sequence[int], observation: Messages) -> list[int]:
        """Return the ids between a turn and the next one.

        Args:
            turn: token ids of the turn.
            observation: messages of the env.
        """
        self._check(observation)
        text = self._format.after_turn(observation, PLACEHOLDER)
        if text is None:
            raise ValueError(f"the chat template does not render the observation {observation!r} after an assistant message")
        (ids,) = encode_texts(self._format.tokenizer, [text], special=False)
        end = next((i + 1 for i, token in enumerate(ids) if token in self._closing), None)
        if end is None:  # a template of plain text closes a turn by what it also writes without an observation
            plain = self._format.end_of_turn()
            same = [a == b for a, b in zip(ids, plain, strict=False)]
            end = same.index(False) if False in same else len(same)
        for n in range(min(end, len(turn)), 0, -1):
            if list(turn[-n:]) == ids[:n]:
                return ids[n:]
        return ids


def check_message(message: Any, name: str) -> None:
    """Check that a message is a dict with a role and a content.

    Raises:
        TypeError, ValueError: If it is not; the message begins with `name`.
    """
    if not isinstance(message, dict):
        raise TypeError(f"{name}: a message is a {type(message).__name__}; it must be a dict with 'role' and 'content'")
    if not isinstance(message.get("role"), str) or all(message.get(key) is None for key in SPOKEN):
        raise ValueError(
            f"{name}: a message has the keys {sorted(map(str, message))}; it must have 'role' and 'content', such as "
            "{'role': 'user', 'content': 'Hello'}"
        )


def with_instructions(messages: Messages, instructions: str) -> Messages:
    """Return a chat with instructions: after its system message, or else in front of the first user message.

    Not all templates have a system message, so none is added.
    """
    first = messages[0]
    if first.get("role") == "system" and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{instructions}"}, *messages[1:]]
    texts = [i for i, each in enumerate(messages) if each.get("role") == "user" and isinstance(each.get("content"), str)]
    if not texts:
        return [{"role": "user", "content": instructions}, *messages]
    at = texts[0]
    told = {**messages[at], "content": f"{instructions}\n\n{messages[at]['content']}"}
    return [*messages[:at], told, *messages[at + 1 :]]


def _tools(tools: Any, name: str) -> Any:
    """Parse the column `tools`, which may be JSON. Return None for no tools: some templates mention an empty list."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: 'tools' is {tools!r}, which is no JSON; give a list of tools") from error
    if tools and not isinstance(tools, (list, tuple)):
        raise TypeError(f"{name}: 'tools' is a {type(tools).__name__}; give a list of tools")
    return tools or None


OFF = ("continue_final_message", False)


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], end: bool = False, **kwargs: Any) -> list[list[int]]:
    """Tokenize rendered prompts: text with the tokenizer's special tokens, a chat with those of its template.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: N prompts.
        end: whether to append the tokenizer's end; see `encode_texts`.
        kwargs: further arguments of the tokenizer.
    """
    rows: list[list[int]] = [[]] * len(prompts)
    for is_text in (True, False):
        numbers = [i for i, prompt in enumerate(prompts) if (prompt.messages is None) == is_text]
        encoded = encode_texts(tokenizer, [prompts[i].text for i in numbers], special=is_text, end=end, **kwargs)
        for i, ids in zip(numbers, encoded, strict=True):
            rows[i] = ids
    return rows


def _template(tokenizer: Any, chat_template: Any) -> str | None:
    """Return the text of a template.

    Raises:
        TypeError, ValueError: If it is not text, the file cannot be read, or the tokenizer has no template of that name.
    """
    if chat_template is None:
        return None
    if isinstance(chat_template, Path) or (isinstance(chat_template, str) and chat_template.endswith(".jinja")):
        try:
            return Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"chat_template={str(chat_template)!r} cannot be read ({error}); give the path of a file"
            ) from error
    if not isinstance(chat_template, str):
        raise TypeError(
            f"chat_template is a {type(chat_template).__name__}; give a template, the name of one, or a .jinja file's path"
        )
    named = getattr(tokenizer, "chat_template", None)
    if isinstance(named, dict) and chat_template in named:
        return named[chat_template]
    if "{" not in chat_template:
        known = sorted(named) if isinstance(named, dict) else []
        raise ValueError(
            f"chat_template={chat_template!r} is neither a template nor the name of one of the tokenizer's, which are {known}"
        )
    return chat_template


def _with_template(tokenizer: Any, template: str) -> Any:
    """Return a copy of a tokenizer with another chat template. The tokenizer itself belongs to the user."""
    tokenizer, named = copy.copy(tokenizer), tokenizer.chat_template
    tokenizer.chat_template = {**named, "default": template} if isinstance(named, dict) else template
    return tokenizer


def _checked_kwargs(kwargs: Any, name: str) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, dict):
        raise TypeError(f"{name} is a {type(kwargs).__name__}; give a dict, such as {{'enable_thinking': False}}")
    if reserved := [key for key in RESERVED if key in kwargs]:
        raise ValueError(
            f"{name} has the key {reserved[0]!r}, which is no variable of a template; tools are a column, the template is "
            "chat_template="
        )
    return dict(kwargs)
