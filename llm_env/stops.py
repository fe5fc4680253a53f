"""Stop strings: texts that end a response with the token that completes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_env.arguments import check_text
from llm_env.tokenization import decode

PRIVATE = 0xF0000  # first of the characters that stand for special tokens while texts are compared


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the contents of a tokenizer's special tokens, by id."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


class StopStrings:
    """Find stop strings in responses.

    A stop string may hold special tokens (`"<|im_end|>"`, `"</s>User:"`): these match by their ids alone. All else is
    compared with decoded text. The space before a word counts also where the tokenizer's decoder swallows it at the beginning
    of a text.

    Args:
        stop: a string, several, or None for none.
        tokenizer: a transformers tokenizer.
        special: the contents of the tokenizer's special tokens, by id; they decode to no text.
        ends: end tokens, which decode to no text either.

    Attributes:
        strings: the stop strings as they were given.
        texts: those without special tokens.
        token_ids: ids of those that are one special token each.

    Raises:
        ValueError: If a stop string is empty, is not a string, or is a text that no tokens make.
    """

    def __init__(self, stop: Any, tokenizer: Any, special: Mapping[int, str], ends: Collection[int]) -> None:
        self.strings = _as_strings(stop)
        self._tokenizer = tokenizer
        textless = {*special, *ends}
        found = {text: token for token, text in special.items() if any(text in string for string in self.strings)}
        # Longest first: "<|end|>x" is not "<|end" and a rest.
        ordered = sorted(found, key=len, reverse=True)
        self._symbols = {found[text]: chr(PRIVATE + i) for i, text in enumerate(ordered)}
        self._patterns = [self._symbolic(string, ordered, found) for string in self.strings]
        self._textless = textless - set(self._symbols)
        symbols = set(self._symbols.values())
        over = "".join(symbol for token, symbol in self._symbols.items() if token in set(ends))
        for string, pattern in zip(self.strings, self._patterns, strict=True):
            if over and (at := re.search(f"[{over}](?=.)", pattern, re.DOTALL)):
                end = next(text for text, token in found.items() if self._symbols[token] == at[0])
                raise ValueError(
                    f"the stop string {string!r} can never appear: an episode ends at its end token {end!r}; leave out what "
                    "comes after it"
                )
        self.texts = [p for p in self._patterns if not symbols & set(p)]
        self.token_ids = sorted(token for token, symbol in self._symbols.items() if symbol in self._patterns)
        # A token with text holds at least a byte, so this many hold every stop string, with room for what a decoder strips.
        self._window = max((len(pattern.encode()) for pattern in self._patterns), default=0) + 8
        self._anchor = _anchor(tokenizer, textless) if self.strings else []
        self._anchor_length = len(decode(tokenizer, self._anchor))
        for string, pattern in zip(self.strings, self._patterns, strict=True):
            for text in re.split("[" + "".join(symbols) + "]", pattern) if symbols else [pattern]:
                self._check_possible(string, text)

    def __bool__(self) -> bool:
        return bool(self.strings)

    def completed_by(self, response: Sequence[int]) -> bool:
        """Return whether the last token of `response` completes a stop string.

        Only as many of the last tokens are read as a stop string can need, so that the cost of a response is linear.
        """
        if not self.strings:
            return False
        tail: list[int] = []
        for token in reversed(response):
            if token not in self._textless:
                tail.append(token)
                if len(tail) == self._window:
                    break
        text = self._text(tail[::-1])
        return any(pattern in text for pattern in self._patterns)

    def _text(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, with a private character for each special token that a stop string has."""
        parts: list[str] = []
        run: list[int] = []
        for token in tokens:
            if token in self._symbols:
                parts += [self._plain(run), self._symbols[token]]
                run = []
            else:
                run.append(token)
        return "".join([*parts, self._plain(run)])

    def _plain(self, tokens: Sequence[int]) -> str:
        return decode(self._tokenizer, [*self._anchor, *tokens])[self._anchor_length :]

    def _symbolic(self, string: str, ordered: Sequence[str], ids: dict[str, int]) -> str:
        for text in ordered:
            string = string.replace(text, self._symbols[ids[text]])
        return string

    def _check_possible(self, string: str, text: str) -> None:
        """Refuse a stop string with a text that no sequence of tokens has."""
        if not text or text in self._plain(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]):
            return
        pieces = {self._plain([token]) for token in self._tokenizer.get_vocab().values()}
        # A piece that is part of a character says that characters can be put together of bytes.
        if not any("\ufffd" in piece for piece in pieces) and not can_be_written(text, pieces):
            raise ValueError(
                f"the stop string {string!r} can never appear: no tokens of the tokenizer make the text {text!r}; correct it, "
                "or give the id of an end token with eos_token_ids="
            )


def can_be_written(text: str, pieces: Collection[str]) -> bool:
    """Return whether some sequence of pieces has `text` in it."""
    if any(text in piece for piece in pieces):
        return True
    # How much of the text stands at the end of a sequence of pieces.
    reached = {n for piece in pieces for n in range(1, min(len(piece) + 1, len(text))) if piece.endswith(text[:n])}
    waiting = sorted(reached)
    while waiting:
        begin = waiting.pop()
        for piece in pieces:
            if piece and piece.startswith(text[begin:]):
                return True
            end = begin + len(piece)
            if piece and end not in reached and text.startswith(piece, begin):
                reached.add(end)
                waiting.append(end)
    return False


def _as_strings(stop: Any) -> list[str]:
    if stop is None:
        return []
    strings: list[Any] = list(stop) if isinstance(stop, (list, tuple, set, frozenset)) else [stop]
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop={stop!r} must be a string or a list of strings, none of them empty")
    for s in strings:
        check_text(s, f"the stop string {s!r}")
    return strings


def _anchor(tokenizer: Any, textless: set[int]) -> list[int]:
    """Return a token to decode others after, so that the space before them is kept; none where all decode to nothing."""
    for text in ("a", "0", "."):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-1:]
        if not textless.intersection(ids) and decode(tokenizer, ids).strip():
            return ids
    return []
