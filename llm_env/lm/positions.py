"""How many tokens a model can read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

LIMITS = (  # the names under which configs give the number of positions
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "max_context_length",
    "n_ctx",
    "seq_length",
)
_POSITIONS = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")  # names of tables of learned or fixed positions


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read, prompt and response together; None where it has no limit.

    The limit is that of the config of the text model, under any of `LIMITS`, or the size of a table of positions (less its
    offset, as in OPT and BART), whichever is smaller. Beyond a table a forward pass fails. Beyond the limit of rotary positions
    it does not, but the model has not learned them, so that they count as a limit as well. `context_length` (RWKV) is a hint
    about its training and is not read; nor is the `seq_length` of models that compute ALiBi for any length (BLOOM).
    """
    config, decoder = model.config.get_text_config(), model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # a part that has the name by chance, such as ModernBERT's head
        decoder = model.base_model
    hints = {"context_length", *(["seq_length"] if hasattr(decoder, "build_alibi_tensor") else [])}
    named = [getattr(config, name, None) for name in LIMITS if config.attribute_map.get(name, name) not in hints]
    known = [value for value in named if isinstance(value, int) and not isinstance(value, bool) and value > 0][:1]
    return min([*known, *map(_usable, _position_tables(decoder, decoder.config))], default=None)


def _position_tables(module: nn.Module, config: Any) -> Iterator[nn.Embedding]:
    """The tables of absolute positions in a text model, but not those of models of images in it, which have other configs."""
    for name, part in module.named_children():
        if isinstance(part, nn.Embedding):
            if _POSITIONS.search(name) and "rel" not in name:
                yield part
        elif not isinstance(part, PreTrainedModel) or part.config is config:
            yield from _position_tables(part, config)


def _usable(table: nn.Embedding) -> int:
    """Return the positions of a table that tokens can have."""
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.weight.shape[0] - int(getattr(table, "offset", 0)) - reserved


def check_length(limit: int | None, prompt: int, new: int, owner: str = "the model") -> None:
    """Raise if a prompt and what follows it have more tokens than a model has positions.

    Args:
        limit: of the model, see `max_positions`.
        prompt: tokens of the longest prompt.
        new: `max_new_tokens`; 0 where nothing follows.
        owner: whose limit it is; for messages.

    Raises:
        ValueError: If there are more.
    """
    if limit is None or prompt + new <= limit:
        return
    if not new:
        raise ValueError(f"the longest row of tokens needs {prompt} positions, {owner} has {limit}; shorten it")
    remedy = "shorten the prompts" if prompt >= limit else f"lower max_new_tokens to {limit - prompt} or shorten the prompts"
    raise ValueError(
        f"the longest prompt, of {prompt} tokens, and max_new_tokens={new} need {prompt + new} positions, {owner} has {limit}; "
        f"{remedy}"
    )
