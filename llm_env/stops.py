"""Stop strings: end a response at the token that completes one of the given texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llm_env.arguments import check_text
from llm_env.tokenization import decode

PRIVATE = 0xF0000  # first private-use character; each one replaces a special token in compared text


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the texts of a tokenizer's special tokens, by token id."""
    return {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}


class StopStrings:
    """Find stop strings in responses.

    A stop string may contain special tokens (`"<|im_end|>"`, `"</s>User:"`), which are matched by token id. The rest of the
    stop string is matched against decoded text. A leading space is part of the match, even if the tokenizer's decoder strips
    the space at the beginning of a text.

    Args:
        stop: a string, a list of strings, or None for no stop strings.
        tokenizer: a transformers tokenizer.
        special: the texts of the tokenizer's special tokens, by token id. Special tokens are skipped in decoding.
        ends: ids of the end tokens. End tokens are skipped in decoding, too.

    Attributes:
        strings: the stop strings as passed.
        texts: the stop strings without special tokens.
        token_ids: sorted ids of the stop strings that are a single special token.

    Raises:
        ValueError: If a stop string is empty, is not a string, has text after an end token, or has text that no token
            sequence decodes to.
    """

    def __init__(self, stop: Any, tokenizer: Any, special: Mapping[int, str], ends: Collection[int]) -> None:
        self.strings = _as_strings(stop)
        self._tokenizer = tokenizer
        textless = {*special, *ends}
        found = {text: token for token, text in special.items() if any(text in string for string in self.strings)}
        # Replace longer tokens first: a special token may be a prefix of another one.
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
        # Each decoded token has at least one byte, so this many tokens cover the longest stop string. The 8 extra tokens
        # allow for characters that the decoder strips.
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

        Only the last `_window` tokens are decoded, so the cost of a whole response is linear in its length.
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
        """Decode tokens; special tokens of stop strings become private-use characters."""
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
        """Raise if no token sequence decodes to `text`, which is part of `string`."""
        if not text or text in self._plain(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]):
            return
        pieces = {self._plain([token]) for token in self._tokenizer.get_vocab().values()}
        # A piece that is part of a character means a byte-level vocabulary, which can generate any text.
        if not any("\ufffd" in piece for piece in pieces) and not can_be_written(text, pieces):
            raise ValueError(
                f"the stop string {string!r} can never appear: no tokens of the tokenizer make the text {text!r}; correct it, "
                "or give the id of an end token with eos_token_ids="
            )


def can_be_written(text: str, pieces: Collection[str]) -> bool:
    """Return whether some concatenation of pieces contains `text`."""
    if any(text in piece for piece in pieces):
        return True
    # Lengths of the prefixes of `text` with which a concatenation of pieces can end.
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
    """Return a token that keeps the leading space of the tokens decoded after it.

    The list has one token id, or is empty if no candidate decodes to text.
    """
    for text in ("a", "0", "."):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][-1:]
        if not textless.intersection(ids) and decode(tokenizer, ids).strip():
            return ids
    return []
