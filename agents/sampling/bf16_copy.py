"""A copy of a model's weights in bfloat16, to sample with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_env.lm.capabilities import register_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEVICES = ("cuda",)  # where decoding reads all weights for every token; a CPU's matrix products are faster in float32


@dataclass
class _Copy:
    """A copy, and the version of the weights that it was made of."""

    model: PreTrainedModel
    version: object = None


_copies: WeakKeyDictionary[PreTrainedModel, _Copy] = WeakKeyDictionary()


@torch.no_grad()
def bf16_copy(model: PreTrainedModel, version: object) -> PreTrainedModel:
    """Return a copy of a model with its weights as they are now, rounded to bfloat16. Buffers keep their dtype.

    Autocast would read and round all float32 weights in every decoding step. The copy takes two bytes a weight and is kept: its
    weights are rounded again where `version` has changed. What a model can do is found out by trials on the original.

    Args:
        model: a causal language model in float32, not quantized and not sharded.
        version: changes whenever weights change.
    """
    if model not in _copies:
        weights: dict[int, Tensor] = {}
        for parameter in model.parameters():
            rounded = parameter.to(torch.bfloat16) if parameter.is_floating_point() else parameter
            weights[id(parameter)] = nn.Parameter(rounded, requires_grad=False)
        copied = copy.deepcopy(model, weights)
        register_copy(copied, model)
        _copies[model] = _Copy(copied, version)
    found = _copies[model]
    if found.version != version:
        for rounded, parameter in zip(found.model.parameters(), model.parameters(), strict=True):
            rounded.copy_(parameter)
        found.version = version
    return found.model


def release_bf16_copy(model: PreTrainedModel) -> None:
    """Free the memory of a model's copy; the next call of `bf16_copy` makes another."""
    _copies.pop(model, None)
