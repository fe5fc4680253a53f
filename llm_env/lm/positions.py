"""Find the maximum sequence length of a model, and check lengths against it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIMITS = (  # config names of the number of positions
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "max_context_length",
    "n_ctx",
    "seq_length",
)
_POSITIONS = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")  # module names of position embeddings, learned or fixed


def max_positions(model: PreTrainedModel) -> int | None:
    """Return the maximum length of prompt and response together, in tokens; None if unlimited.

    It is the smaller of two limits: the number of positions in the text model's config, under the first name of `LIMITS` that
    is set; and the size of its position embedding, minus the offset (OPT, BART). Beyond the size of a position embedding, a
    forward pass fails. With rotary positions it does not, but the model was not trained on longer sequences, so the config's
    number counts as a limit, too. Two names are ignored: `context_length` (RWKV), which only describes the training, and the
    `seq_length` of models that compute ALiBi for any length (BLOOM).
    """
    from transformers import PreTrainedModel

    config, decoder = model.config.get_text_config(), model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # something else with the same name, such as ModernBERT's head
        decoder = model.base_model
    hints = {"context_length", *(["seq_length"] if hasattr(decoder, "build_alibi_tensor") else [])}
    named = [getattr(config, name, None) for name in LIMITS if config.attribute_map.get(name, name) not in hints]
    known = [value for value in named if isinstance(value, int) and not isinstance(value, bool) and value > 0][:1]
    return min([*known, *map(_usable, _position_tables(decoder, decoder.config))], default=None)


def _position_tables(module: nn.Module, config: Any) -> Iterator[nn.Embedding]:
    """Yield the absolute position embeddings of a text model; skip submodels with other configs (images)."""
    from transformers import PreTrainedModel

    for name, part in module.named_children():
        if isinstance(part, nn.Embedding):
            if _POSITIONS.search(name) and "rel" not in name:
                yield part
        elif not isinstance(part, PreTrainedModel) or part.config is config:
            yield from _position_tables(part, config)


def _usable(table: nn.Embedding) -> int:
    """Return the number of usable rows of a position embedding."""
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.weight.shape[0] - int(getattr(table, "offset", 0)) - reserved


def check_length(limit: int | None, prompt: int, new: int, owner: str = "the model", name: str = "max_new_tokens") -> None:
    """Raise if the longest prompt and its new tokens exceed a model's number of positions.

    Args:
        limit: number of positions, see `max_positions`; None for no limit.
        prompt: length of the longest prompt, in tokens.
        new: number of new tokens; 0 if none are generated.
        owner: name of the model, for error messages.
        name: name of the argument that limits new tokens, for error messages.

    Raises:
        ValueError: If `prompt + new` exceeds the limit.
    """
    if limit is None or prompt + new <= limit:
        return
    if not new:
        raise ValueError(f"the longest row of tokens needs {prompt} positions, {owner} has {limit}; shorten it")
    remedy = "shorten the prompts" if prompt >= limit else f"lower {name} to {limit - prompt} or shorten the prompts"
    raise ValueError(
        f"the longest prompt, of {prompt} tokens, and {name}={new} need {prompt + new} positions, {owner} has {limit}; {remedy}"
    )
