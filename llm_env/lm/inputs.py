"""Inputs of a forward pass: padding, attention mask, position ids, and evaluation mode."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids with token 0; results must not depend on that value.

    Args:
        rows: B lists of token ids.
        side: "left" or "right".
        device: device of the result.

    Returns:
        The ids and the 0/1 attention mask, both (B, longest row) int64.
    """
    width = max((len(row) for row in rows), default=0)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)


def pad_with_tokens(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Pad rows on the right with each row's first token, which models do not treat as padding; return (B, longest row)."""
    ids, mask = pad(rows, "right", device)
    return torch.where(mask.bool(), ids, ids[:, :1])


def model_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return keyword arguments of a forward pass, with position ids that skip left padding.

    Models with absolute positions (GPT-2) need the position ids. Models without the argument (ALiBi) derive positions from the
    mask. If `forward` takes no `attention_mask`, none is passed; a trial in `llm_env.lm.capabilities` then finds that the model
    does not support left padding.
    """
    inputs = {"input_ids": input_ids} | ({"attention_mask": attention_mask} if takes(model, "attention_mask") else {})
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def only_last(model: PreTrainedModel, count: int | Tensor) -> dict[str, Any]:
    """Return keyword arguments that limit logits to some positions; empty if the model has no such option.

    Args:
        model: a causal language model.
        count: how many of the last positions, or the indexes (n,) of the positions.
    """
    return {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return keyword arguments that disable the KV cache; empty if the model has no such option (GPT-1)."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def takes(model: nn.Module, name: str) -> bool:
    """Return whether a model's `forward` accepts a keyword argument, by name or through `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context with every module in evaluation mode; restores each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
