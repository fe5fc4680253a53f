"""End tokens of a response, from the tokenizer and the generation config."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llm_env.arguments import as_int


def as_token_ids(value: Any) -> list[int]:
    """Convert a config's `eos_token_id` (None, an id or several) to a list of ids."""
    if value is None:
        return []
    value = value.tolist() if hasattr(value, "tolist") else value
    return [int(token) for token in (value if isinstance(value, (list, tuple, set, frozenset)) else [value])]


def end_tokens_of_model(generation_config: Any, config: Any, tokenizer: Any) -> list[int]:
    """Return the end tokens of a model's generation config.

    Transformers may derive the generation config from the model config. Its `eos_token_id` can then be the default of the
    config class (2 for Llama, 50256 for GPT-2), which may not fit the tokenizer. Such a default is used only if the tokenizer
    has a special token with this id that has no other role, such as padding.

    Args:
        generation_config: `model.generation_config`; None for a model without one.
        config: `model.config`.
        tokenizer: the model's tokenizer; None if unknown.
    """
    ids = as_token_ids(getattr(generation_config, "eos_token_id", None))
    derived = getattr(generation_config, "_from_model_config", False)
    if derived and ids == _class_default(config):
        return [token for token in ids if tokenizer is not None and _may_end(token, tokenizer)]
    return ids


def _may_end(token: int, tokenizer: Any) -> bool:
    added = tokenizer.added_tokens_decoder.get(token)
    names = ("bos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id")
    others = {getattr(tokenizer, name, None) for name in names} - {tokenizer.eos_token_id}
    return added is not None and added.special and token not in others


def _class_default(config: Any) -> list[int]:
    try:
        default = type(config)().get_text_config(decoder=True)
    except Exception:  # a custom config class with required arguments has no default
        return []
    return as_token_ids(getattr(default, "eos_token_id", None))


def end_tokens_beside(path: str, tokenizer: Any) -> list[int]:
    """Return the end tokens of the model that is stored with a tokenizer.

    Returns an empty list if no model is stored there.

    Args:
        path: the folder or hub id from which the tokenizer was loaded.
        tokenizer: the tokenizer.
    """
    from transformers import AutoConfig, GenerationConfig

    try:
        generation_config = GenerationConfig.from_pretrained(path)
    except (OSError, ValueError):  # the file or the model does not exist
        generation_config = None
    if generation_config is not None and not getattr(generation_config, "_from_model_config", False):
        return as_token_ids(generation_config.eos_token_id)
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return [] if generation_config is None else as_token_ids(generation_config.eos_token_id)
    return end_tokens_of_model(generation_config or GenerationConfig.from_model_config(config), config, tokenizer)


def resolve_end_tokens(eos_token_ids: Any, tokenizer: Any, vocab_size: int) -> frozenset[int]:
    """Return the tokens that end a response.

    Args:
        eos_token_ids: a token id or a list of ids, which are then the only end tokens. None uses the tokenizer's EOS token and
            the end tokens of the model stored with the tokenizer (at `tokenizer.name_or_path`).
        tokenizer: a transformers tokenizer with an EOS token.
        vocab_size: V; valid token ids are 0 to V - 1.

    Raises:
        ValueError: If `eos_token_ids` is empty or contains a value that is not a token id.
    """
    if eos_token_ids is None:
        path = getattr(tokenizer, "name_or_path", "")
        beside = end_tokens_beside(str(path), tokenizer) if path else []
        return frozenset([int(tokenizer.eos_token_id), *(token for token in beside if 0 <= token < vocab_size)])
    given: Sequence[Any] = [eos_token_ids] if as_int(eos_token_ids) is not None else _listed(eos_token_ids)
    ids = [as_int(token) for token in given]
    if not ids or not all(token is not None and 0 <= token < vocab_size for token in ids):
        raise ValueError(
            f"eos_token_ids={eos_token_ids!r} must be a token id or a list of them, from 0 to {vocab_size - 1}; for a token's "
            "text use tokenizer.convert_tokens_to_ids(text)"
        )
    return frozenset(token for token in ids if token is not None)


def _listed(value: Any) -> list[Any]:
    if isinstance(value, (str, bytes, dict)) or not hasattr(value, "__iter__"):
        return [None]
    return list(value)


def missing_end_tokens(mine: Collection[int], of_model: Collection[int], vocab_size: int) -> list[int]:
    """Return the sorted end tokens of a model that are < V and not in `mine`."""
    return sorted(token for token in set(of_model) - set(mine) if 0 <= token < vocab_size)
