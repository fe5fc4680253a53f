"""Text to token ids and back, with any tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def vocabulary_size(tokenizer: Any) -> int:
    """Return V, one more than the largest token id: some vocabularies have gaps."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Return the text of tokens, without special tokens."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], special: bool = True, end: bool = False, **kwargs: Any
) -> list[list[int]]:
    """Tokenize texts, with each special token once.

    Args:
        tokenizer: a transformers tokenizer.
        texts: N texts.
        special: add the tokenizer's special tokens: those before a text, unless it begins with them (a rendered chat that has a
            BOS); and with `end` those after it.
        end: whether the texts are whole. Without it nothing is added after a text, because a prompt is continued.
        kwargs: further arguments of the tokenizer.
    """
    if not len(texts):
        return []
    if not special:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False, **kwargs)["input_ids"]
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False, **kwargs)
    if "special_tokens_mask" not in encoded:  # a tokenizer of somebody's own, which does not tell what it adds
        return encoded["input_ids"]
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [_once(list(ids), list(added), tokenizer.eos_token_id, end) for ids, added in pairs]


def _once(ids: list[int], added: list[int], eos_id: int | None, end: bool) -> list[int]:
    """Return the ids of a text without what was added to it twice, or (unless `end`) after it.

    Args:
        ids: (n,) token ids.
        added: (n,) 1 where the tokenizer has added a special token.
        eos_id: the end token, to tell before from after in a text that is empty.
        end: whether what was added after the text stays.
    """
    begin = next((i for i, is_added in enumerate(added) if not is_added), None)
    if begin is None:
        while ids and ids[-1] == eos_id and not end:
            ids = ids[:-1]
        return ids
    stop = len(ids) - next(i for i, is_added in enumerate(reversed(added)) if not is_added)
    before, text, after = ids[:begin], ids[begin:stop], ids[stop:]
    if before == text[: len(before)]:
        before = []
    return before + text + (after if end and after != text[len(text) - len(after) :] else [])
