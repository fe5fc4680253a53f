"""From prompts in any form to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llm_env.dialogue.chat import PromptFormat
from llm_env.rules import Rules


def encode_prompts(prompts: Sequence[Any], format: PromptFormat, rules: Rules | None) -> list[list[int]]:
    """Return the token ids of prompts; a prompt that is one of the env's gets the ids that it has there.

    Args:
        prompts: texts, chats (lists of messages), or rows as an env takes them.
        format: how they become text and token ids.
        rules: the env's; None without one.

    Raises:
        TypeError: If a prompt is none of these.
        ValueError: If a prompt has no tokens.
    """
    rows = [row if isinstance(row, dict) else {"prompt": row} for row in prompts]
    for i, row in enumerate(rows):
        if "role" in row and not {"prompt", "messages"} & set(row):
            raise TypeError(f"prompt {i} is a dict, one message of a chat; give a list of chats, [messages]")
        content = row.get("prompt", "")
        if not isinstance(content, str) and not (
            isinstance(content, (list, tuple)) and all(isinstance(message, dict) for message in content)
        ):
            raise TypeError(f"prompt {i} is a {type(prompts[i]).__name__}; give a list of str or of chats")
    rendered = [format.render(row, i, "prompt") for i, row in enumerate(rows)]
    contexts = format.encode(rendered)
    if rules is not None:
        known = [rules.prompts.ids_of_text(prompt.text) for prompt in rendered]
        contexts = [context if ids is None else ids for context, ids in zip(contexts, known, strict=True)]
    if not all(contexts):
        empty = [bool(context) for context in contexts].index(False)
        raise ValueError(f"prompt {empty} is empty ({rendered[empty].text!r} has no tokens); a model needs at least one")
    return contexts
