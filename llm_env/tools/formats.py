"""How a model writes tool calls, and how it is shown their results.

A format parses the text of a turn and writes the observation. `HermesFormat` (Hermes, Qwen 2.5 and 3), `XMLFormat`
(Qwen3-Coder, Qwen 3.5 and later), `LlamaFormat` (Llama 3.1) and `MistralFormat` are for chat templates that describe tools.
`PlainFormat` is for all other models: it describes the tools in the prompt. A subclass of `ToolFormat` makes another format.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_env.rewards.answers import strip_thoughts

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class ToolCall:
    """A tool call that a model wrote.

    Attributes:
        name: name of the tool; "" if it cannot be read.
        arguments: keyword arguments.
        error: why the call cannot be made; "" if it can. The model is shown this text as the result.
        id: id of the call, if the model wrote one.
        are_texts: whether the format writes all arguments as text; the tool's schema says then what is a number.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    id: str = ""
    are_texts: bool = False

    def as_message_entry(self) -> dict[str, Any]:
        """Return the entry of `tool_calls` in the assistant's message."""
        return {"type": "function", "id": self.id, "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call.

    Attributes:
        call: the call.
        content: what the tool returned, as text; for a call that failed `str({"error": message})`, as in TRL.
        failed: whether the call failed.
    """

    call: ToolCall
    content: str
    failed: bool = False

    def message(self) -> dict[str, Any]:
        """Return the message of role `tool`."""
        return {"role": "tool", "name": self.call.name, "tool_call_id": self.call.id, "content": self.content}


class ToolFormat:
    """How a model writes tool calls, and how it is shown their results.

    Subclasses define `parse`, and may define `instructions` and `observation`.
    """

    def instructions(self, schemas: Sequence[dict[str, Any]]) -> str:
        """Return a text that describes the tools; it is added to the prompt. "" adds nothing.

        Args:
            schemas: the JSON schema of each tool, as from `transformers.utils.get_json_schema`.
        """
        return ""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return the text of a turn without its tool calls, and the calls in order. No call ends the episode.

        Args:
            text: the turn with special tokens, but without end tokens.
        """
        raise NotImplementedError

    def observation(self, results: Sequence[ToolResult], is_chat: bool) -> str | Messages:
        """Return what the model is shown after a turn with tool calls: messages in a chat, else a text.

        Args:
            results: the results of the turn's calls, in order.
            is_chat: whether the prompt is a list of messages.
        """
        return [result.message() for result in results]


class HermesFormat(ToolFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, as in Hermes and Qwen. A turn may hold several."""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Parse a turn; calls within thoughts are ignored. A call that is not closed extends to the end."""
        said = strip_thoughts(text)
        calls = [self.read_call(found) for found in _HERMES.findall(said)]
        return (text, []) if not calls else (_HERMES.sub("", _thoughts(text, said) + said).strip(), calls)

    def read_call(self, text: str) -> ToolCall:
        """Return the call that is written between the tags."""
        return _json_call(text)


class XMLFormat(HermesFormat):
    """`<tool_call><function=name><parameter=argument>value</parameter></function></tool_call>`, as in Qwen3-Coder.

    A turn may hold several. Values are texts; those of arguments that are not strings by the tool's schema are read as JSON.
    """

    def read_call(self, text: str) -> ToolCall:
        """Return the call that is written between the tags."""
        return _xml_call(text)


class LlamaFormat(ToolFormat):
    """`{"name": ..., "parameters": {...}}` as the whole turn, as in Llama 3.1.

    `<|python_tag|>` may come before it, which is a special token; after this tag, `name.call(argument="value")` is a call as
    well. Several calls are separated by `;`.
    """

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Parse a turn. A text without the tag is a call only if it begins as one."""
        before, tag, said = strip_thoughts(text).partition(PYTHON_TAG)
        if not tag:
            before, said = "", before
            if not _LLAMA.match(said):
                return text, []
        return before.strip(), self._calls(said.strip(), bool(tag))

    def _calls(self, said: str, is_tagged: bool) -> list[ToolCall]:
        if is_tagged and not said.startswith("{"):
            return [_python_call(said)]
        calls: list[ToolCall] = []
        decoder = json.JSONDecoder()
        while said:
            try:
                value, end = decoder.raw_decode(said)
            except json.JSONDecodeError as error:
                return [*calls, ToolCall("", error=f"the tool call {_short(said)} is not valid JSON: {error}")]
            calls.append(_call(value))
            said = said[end:].lstrip("; \n\t")
        return calls or [ToolCall("", error="the tool call is empty")]


class MistralFormat(ToolFormat):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}, "id": ...}]`, as in Mistral 7B v0.3."""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Parse a turn."""
        before, tag, said = text.partition(TOOL_CALLS)
        if not tag:
            return text, []
        try:
            values = json.loads(said)
        except json.JSONDecodeError as error:
            return before.strip(), [ToolCall("", error=f"the tool call {_short(said)} is not valid JSON: {error}")]
        values = values if isinstance(values, list) and values else [values]
        return before.strip(), [_call(value) for value in values]


class PlainFormat(HermesFormat):
    """The calls of `HermesFormat` for models whose chat template knows no tools, and for prompts without a template.

    The tools are described in the prompt. Results are a user message (or plain text): `<tool_response>...</tool_response>`.
    """

    def instructions(self, schemas: Sequence[dict[str, Any]]) -> str:
        """Return the description of the tools."""
        lines = [json.dumps(schema.get("function", schema), ensure_ascii=False) for schema in schemas]
        return (
            "You can call these tools:\n" + "\n".join(lines) + "\nTo call one, write "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call> and end your turn. You then get its result.'
        )

    def observation(self, results: Sequence[ToolResult], is_chat: bool) -> str | Messages:
        """Return the results as one user message, or as text."""
        text = "\n".join(f"<tool_response>\n{result.content}\n</tool_response>" for result in results)
        return [{"role": "user", "content": text}] if is_chat else f"\n{text}\n"


PYTHON_TAG, TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"
FORMATS: dict[str, type[ToolFormat]] = {
    "hermes": HermesFormat,
    "xml": XMLFormat,
    "llama": LlamaFormat,
    "mistral": MistralFormat,
    "plain": PlainFormat,
}
_HERMES = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*)?", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_LLAMA = re.compile(r'\s*\{\s*"(?:name|parameters|arguments|type|function)"\s*:')
_LONGEST_SHOWN = 200


def as_tool_format(tool_format: Any) -> ToolFormat:
    """Return a format by name, or the format itself.

    Raises:
        ValueError, TypeError: If it is neither.
    """
    if isinstance(tool_format, ToolFormat):
        return tool_format
    if isinstance(tool_format, str):
        if tool_format not in FORMATS:
            raise ValueError(f"tool_format={tool_format!r} must be one of {sorted(FORMATS)}, or a llm_env.tools.ToolFormat")
        return FORMATS[tool_format]()
    raise TypeError(
        f"tool_format is a {type(tool_format).__name__}; it must be one of {sorted(FORMATS)}, or a llm_env.tools.ToolFormat"
    )


def format_of_rendered_call(text: str, name: str) -> str | None:
    """Return the name of the format in which a chat template writes a call of the tool `name`; None if it is not known.

    Args:
        text: the assistant message with the call, as rendered.
        name: name of the tool.
    """
    if "<tool_call>" in text and re.search(rf'"name"\s*:\s*"{name}"', text):
        return "hermes"
    if "<tool_call>" in text and f"<function={name}>" in text and "<parameter=" in text:
        return "xml"
    if TOOL_CALLS in text:
        return "mistral"
    if re.search(rf'\{{\s*"name"\s*:\s*"{name}"\s*,\s*"parameters"\s*:', text):
        return "llama"
    return None


def _json_call(text: str) -> ToolCall:
    try:
        return _call(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        return ToolCall("", error=f"the tool call {_short(text.strip())} is not valid JSON: {error}")


def _xml_call(text: str) -> ToolCall:
    function = _FUNCTION.fullmatch(text)
    if function is None or _PARAMETER.sub("", function[2]).strip():
        return ToolCall("", error=f"the tool call {_short(text.strip())} is not <function=name><parameter=...>...</function>")
    return ToolCall(function[1], dict(_PARAMETER.findall(function[2])), are_texts=True)


def _call(value: Any) -> ToolCall:
    """Return the call of a JSON value: a dict with `name`, and `arguments` or `parameters`."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):  # OpenAI's form
        value = {**value, **value["function"]}
    name = value.get("name") if isinstance(value, dict) else None
    if not isinstance(name, str) or not name:
        return ToolCall("", error=f"the tool call {_short(value)} must be an object with 'name' and 'arguments'")
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError:
            pass
    if not isinstance(arguments, dict):
        return ToolCall(name, error=f"the arguments {_short(arguments)} of {name} must be an object")
    call_id = value.get("id")
    return ToolCall(name, arguments, id=call_id if isinstance(call_id, str) else "")


def _python_call(text: str) -> ToolCall:
    """Return the call `name.call(argument=value)` or `name(argument=value)`, with literal values."""
    try:
        node = ast.parse(text, mode="eval").body
        assert isinstance(node, ast.Call) and not node.args
        function = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr == "call" else node.func
        assert isinstance(function, ast.Name)
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg}
    except (SyntaxError, ValueError, AssertionError, RecursionError, MemoryError):
        return ToolCall("", error=f"the tool call {_short(text)} must be JSON, or name.call(argument=value)")
    return ToolCall(function.id, arguments)


def _thoughts(text: str, said: str) -> str:
    """Return the part of a turn before `said`, which `strip_thoughts` leaves of it."""
    return text[: text.rfind(said)] if said else text


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "..."
