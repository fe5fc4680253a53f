"""Run the tool calls of turns: `tools=[function, ...]`, in TRL's contract."""

from __future__ import annotations

import copy
import inspect
import json
import time
import typing
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from llm_env.arguments import check_int, check_seconds
from llm_env.dialogue.text_env import Transition
from llm_env.rewards.calls import time_out_message, wait_for
from llm_env.threads import call_all, within
from llm_env.tools.formats import ToolCall, ToolFormat, ToolResult

Messages = list[dict[str, Any]]
TOOL_COUNTS = ("tool_calls", "tool_errors")  # entries of the last info: calls of an episode, and how many of them failed
ID_LENGTH = 9  # of a call's id; Mistral's template asks for it


class ToolSet:
    """Functions that a model may call, as in TRL's `tools=`.

    A function is described to the model by its type hints and its Google-style docstring
    (`transformers.utils.get_json_schema`). It may be `async`. What it returns is shown as `str(result)`; it must be a text,
    number, list, dict or the like. An exception, a time-out, an unknown name, a malformed call and a result that is no text are
    shown to the model as `str({"error": message})`; training goes on.

    Args:
        tools: functions with type hints and a docstring that describes every argument.
        timeout: seconds that a call may take; None for no limit. A plain function that takes longer keeps running in its
            thread.
        workers: maximum number of turns whose calls are made at a time, each in a thread.

    Attributes:
        names: names of the tools.
        schemas: the JSON schema of each tool.

    Raises:
        TypeError, ValueError: If a tool is no function, has no usable docstring or type hints, returns no text by its type
            hint, or two have one name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], timeout: float | None = None, workers: int = 1) -> None:
        if callable(tools) or isinstance(tools, (str, dict)) or not isinstance(tools, Sequence) or not tools:
            raise TypeError(f"tools={tools!r} must be a list of functions, such as tools=[llm_env.tools.calculator]")
        self._functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        for tool in tools:
            schema = _schema(tool)
            name = schema["function"]["name"]
            if name in self._functions:
                raise ValueError(f"two tools have the name {name!r}; rename one of them")
            self._functions[name] = tool
            self.schemas.append(schema)
        self.timeout, self.workers = check_seconds("tool_timeout", timeout), check_int("tool_workers", workers, 1)
        self._seconds = 0.0

    @property
    def names(self) -> list[str]:
        """Names of the tools."""
        return list(self._functions)

    def run(self, calls: Sequence[ToolCall]) -> list[ToolResult]:
        """Make calls, one after the other; return their results."""
        return [self._run(call) for call in calls]

    def add_seconds(self, seconds: float) -> None:
        """Count seconds spent in tools."""
        self._seconds += seconds

    def take_seconds(self) -> float:
        """Return the seconds spent in tools since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _run(self, call: ToolCall) -> ToolResult:
        error = call.error
        if not error and call.name not in self._functions:
            error = f"Tool {call.name} not found; the tools are {', '.join(self.names)}."
        if not error:
            function, arguments = self._functions[call.name], self._arguments(call)
            try:
                result = self._call(function, arguments)
                if _has_text(type(result)):
                    return ToolResult(call, str(result))
                error = f"{call.name} returned a {type(result).__name__}, which is no text"
            except TimeoutError as raised:
                error = str(raised) or time_out_message(self.timeout)
            except Exception as raised:  # shown to the model
                error = str(raised) or type(raised).__name__
        return ToolResult(call, str({"error": error}), failed=True)

    def _arguments(self, call: ToolCall) -> dict[str, Any]:
        """Return a copy of a call's arguments; texts become numbers and the like where the schema says so."""
        arguments: dict[str, Any] = copy.deepcopy(call.arguments)
        if call.are_texts:
            schema = self.schemas[self.names.index(call.name)]["function"]
            properties = schema.get("parameters", {}).get("properties", {})
            for name, text in arguments.items():
                if properties.get(name, {}).get("type", "string") != "string":
                    try:
                        arguments[name] = json.loads(text)
                    except json.JSONDecodeError:
                        arguments[name] = {"True": True, "False": False, "None": None}.get(text, text)
        return arguments

    def _call(self, function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        def work() -> Any:
            result = function(**arguments)
            return wait_for(result, self.timeout) if inspect.isawaitable(result) else result

        if self.timeout is None or inspect.iscoroutinefunction(function):
            return work()
        return within(self.timeout, work)


class ToolSessions:
    """The turns of each row with their tool calls. A repeated call of `step` runs no tool twice.

    Args:
        tools: the tools.
        chat_format: how calls and results are written in chats.
        text_format: how they are written after prompts of plain text.
        special_tokens: texts of special tokens, which are left out of messages.
    """

    def __init__(
        self, tools: ToolSet, chat_format: ToolFormat, text_format: ToolFormat, special_tokens: Sequence[str] = ()
    ) -> None:
        self.tools, self.chat_format, self.text_format = tools, chat_format, text_format
        self._special_tokens = sorted(special_tokens, key=len, reverse=True)
        self._rows: dict[int, tuple[bool, list[tuple[str, Transition]]]] = {}

    def start(self, row: int, is_chat: bool) -> None:
        """Begin an episode in a row; `is_chat` says whether its prompt is a list of messages."""
        self._rows[row] = (is_chat, [])

    def prepare(self, calls: Sequence[tuple[int, list[str]]]) -> None:
        """Take turns of several rows, in threads; `step` then finds their transitions."""
        begin = time.perf_counter()
        if self.tools.workers == 1 or len(calls) < 2:
            for row, turns in calls:
                self.step(row, turns)
        else:
            call_all(self.step, calls, self.tools.workers)
        self.tools.add_seconds(time.perf_counter() - begin)

    def step(self, row: int, turns: Sequence[str]) -> Transition:
        """Make the tool calls in the last of a row's turns. A turn without a call ends the episode.

        Args:
            row: the row.
            turns: the texts of all turns of the episode, the new one included, with special tokens.
        """
        is_chat, steps = self._rows[row]
        if [text for text, _ in steps[: len(turns)]] == list(turns):
            return steps[len(turns) - 1][1]
        del steps[len(turns) - 1 :]
        transition = self._take(turns[-1], is_chat, sum(step.info["tool_calls"] for _, step in steps))
        steps.append((turns[-1], transition))
        return transition

    def close_episode(self, row: int, turns: Sequence[str]) -> Transition:
        """Return a transition that pays nothing: reward functions pay an episode that a limit has ended."""
        return Transition("", 0.0, False, True, {})

    def try_step(self, row: int, turns: list[str]) -> None:
        """Take a turn; an error is raised by `step` when it takes the turn again."""
        with suppress(Exception):
            self.step(row, turns)

    def discard(self, row: int) -> None:
        """Keep the last transition: a tool is not called again."""

    def close(self) -> None:
        """Do nothing: tools hold no resources here."""

    def _take(self, turn: str, is_chat: bool, calls_before: int) -> Transition:
        tool_format = self.chat_format if is_chat else self.text_format
        content, calls = tool_format.parse(turn)
        if not calls:
            return Transition("", 0.0, True, False, dict.fromkeys(TOOL_COUNTS, 0))
        for token in self._special_tokens:
            content = content.replace(token, "")
        calls = [_with_id(call, calls_before + i) for i, call in enumerate(calls)]
        results = self.tools.run(calls)
        spoken = {"role": "assistant", "content": content, "tool_calls": [call.as_message_entry() for call in calls]}
        messages = [spoken, *(result.message() for result in results)]
        info = dict(zip(TOOL_COUNTS, (len(calls), sum(result.failed for result in results)), strict=True))
        return Transition(tool_format.observation(results, is_chat), 0.0, False, False, info, messages)


def _with_id(call: ToolCall, number: int) -> ToolCall:
    call_id = call.id if len(call.id) == ID_LENGTH else f"call{number:05d}"
    return replace(call, id=call_id)


def _schema(tool: Any) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    name = getattr(tool, "__name__", None)
    if not callable(tool) or name is None:
        raise TypeError(f"tools has a {type(tool).__name__}, {tool!r}; it must be a function with type hints and a docstring")
    try:
        schema = get_json_schema(tool)
    except Exception as error:
        raise ValueError(
            f"the tool {name!r} cannot be described to a model: {error}. Give each argument a type hint and a line under "
            "'Args:' in the docstring"
        ) from error
    hint = typing.get_type_hints(tool).get("return", str)
    if isinstance(hint, type) and not _has_text(hint):
        raise ValueError(
            f"the tool {name!r} returns {hint.__name__} by its type hint, which is no text for a model; have it "
            "return a str, a number, or a list or dict of them"
        )
    return schema


def _has_text(kind: type) -> bool:
    """Whether `str` of an object of this type says what it is: not None, bytes, or an object that shows its address only."""
    without = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
    return not (without or issubclass(kind, (type(None), bytes, bytearray)))
