"""Encode and decode text with any transformers tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_env.model_names import check_model_name


def load_tokenizer(tokenizer: Any) -> Any:
    """Load a tokenizer, or check one.

    Args:
        tokenizer: a path, a hub id or a transformers tokenizer.

    Raises:
        TypeError: If it is anything else.
        ValueError: If it has no end token.
    """
    from transformers import AutoTokenizer

    check_model_name(tokenizer, "tokenizer")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise TypeError(
            f"tokenizer is a {type(tokenizer).__name__}; give a path, a hub id or a transformers tokenizer "
            "(PreTrainedTokenizerFast(tokenizer_object=...) makes one of a tokenizers.Tokenizer)"
        )
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError("the tokenizer has no end token: set tokenizer.eos_token to the token that ends an answer")
    return tokenizer


def vocabulary_size(tokenizer: Any) -> int:
    """Return the vocabulary size V.

    This is the largest token id plus 1, because some vocabularies have gaps.
    """
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Decode token ids to text; special tokens are skipped."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode_texts(
    tokenizer: Any, texts: Sequence[str], special: bool = True, end: bool = False, **kwargs: Any
) -> list[list[int]]:
    """Tokenize texts without duplicate special tokens.

    Args:
        tokenizer: a transformers tokenizer.
        texts: N texts.
        special: whether to add the tokenizer's special tokens. Those before a text are added unless the text already begins
            with them (a rendered chat with a BOS token). Those after a text are added only with `end=True`.
        end: whether the texts are complete. With False, the default, no token is added after a text, because a prompt is
            continued.
        kwargs: further arguments of the tokenizer.

    Returns:
        N lists of token ids.
    """
    if not len(texts):
        return []
    if not special:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False, **kwargs)["input_ids"]
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False, **kwargs)
    if "special_tokens_mask" not in encoded:  # a custom tokenizer that does not report the tokens it adds
        return encoded["input_ids"]
    pairs = zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    return [_once(list(ids), list(added), tokenizer.eos_token_id, end) for ids, added in pairs]


def _once(ids: list[int], added: list[int], eos_id: int | None, end: bool) -> list[int]:
    """Remove added special tokens that the text already has.

    Unless `end`, the special tokens added after the text are removed, too.

    Args:
        ids: (n,) token ids.
        added: (n,) 1 for a special token that the tokenizer added, else 0.
        eos_id: id of the EOS token. In an empty text, it marks the tokens added after the text.
        end: whether to keep the tokens added after the text.
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
