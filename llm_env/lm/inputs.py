"""A forward pass over rows of token ids: its keyword arguments, and the modules' mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of token ids as one int64 tensor (B, longest row), and the 0/1 mask of the same shape and type.

    The padding is token 0; nothing may depend on its value.
    """
    width = max((len(row) for row in rows), default=0)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)


def pad_with_tokens(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Rows of token ids, (B, longest row), padded on the right with the first token of each, to which no model does a thing."""
    ids, mask = pad(rows, "right", device)
    return torch.where(mask.bool(), ids, ids[:, :1])


def model_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return keyword arguments of a forward pass, with the positions that padding on the left would otherwise shift.

    GPT-2's absolute positions need them; models without `position_ids` (ALiBi) count by the mask themselves. A model whose
    `forward` takes no mask gets none, and a trial finds that it takes no padding on the left (`llm_env.lm.capabilities`).
    """
    inputs = {"input_ids": input_ids} | ({"attention_mask": attention_mask} if takes(model, "attention_mask") else {})
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def only_last(model: PreTrainedModel, count: int) -> dict[str, int]:
    """Return keyword arguments of a forward pass that makes logits at the last positions alone, if the model knows how to."""
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return keyword arguments of a forward pass that keeps no cache, if the model knows any (GPT-1 does not)."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's `forward` takes a keyword argument, by name or among `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
