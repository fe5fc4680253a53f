"""Compile a model's layers with `torch.compile`: operations between matrix products become one kernel."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from llm_env.lm.shared_prompt import NAME, attention, register_attention
from llm_env.patching import patched

MOST_VARIANTS = 32  # torch's own limit is 8, which two dtypes, two gradient modes and two sizes reach


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers can compute again in the backward pass; empty where its class has none."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


_compiled: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


@contextmanager
def compiled_layers(models: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the layers that are computed within the block.

    All layers of a model run one code, so they are compiled once: with shapes as variables, in a variant for each dtype, for
    gradients on and off, and for sizes of 1. After `MOST_VARIANTS` of them, a layer runs as it is. Attention over shared
    prompts is not compiled (a graph break).

    Args:
        models: their layers are compiled. Nothing happens to a model without the layers of transformers' decoders.
    """
    with ExitStack() as stack:
        for model in models:
            _leave_attention_alone()
            stack.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS))
            # Sizes that are equal once need not be equal again.
            stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
            for layer in decoder_layers(model):
                if layer not in _compiled:
                    _compiled[layer] = torch.compile(type(layer).forward, dynamic=True)
                stack.enter_context(patched(layer, forward=_compiled[layer].__get__(layer)))
        yield


@cache  # also imports torch._dynamo, which takes a second
def _leave_attention_alone() -> None:
    import torch._dynamo
    import torch.fx.experimental._config
    from transformers import AttentionInterface

    register_attention()  # whose one call would otherwise come later, and undo the next line
    AttentionInterface.register(NAME, torch.compiler.disable(attention))


def num_compiled_graphs() -> int:
    """Return how many graphs this process has compiled so far: a number that keeps growing tells of recompilation."""
    import torch._dynamo.utils

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
