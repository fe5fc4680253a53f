"""Gradient checkpointing: what a layer makes is made again in the backward pass, in the place of being kept for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from agents.untouched import replaced
from llm_env.lm.shared_prompt import attention_as_now


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers marks as ones that can be computed again.

    Raises:
        ValueError: there are none.
    """
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"gradient_checkpointing=True, but transformers knows no layers of {type(model).__name__} that can be computed "
            "again; set gradient_checkpointing=False, and max_tokens_per_batch to bound the memory"
        )
    return layers


def check_recomputing(model: PreTrainedModel, wanted: bool) -> None:
    """Refuse a model that cannot be computed again; say so where its own switch is on, which does nothing here.

    Raises:
        ValueError: `wanted`, and transformers marks no layers of the model.
    """
    if wanted:
        layers_of(model)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn(
            "the model's own gradient checkpointing is on, which does nothing in evaluation mode, and dropout is off here; set "
            "the agent's gradient_checkpointing=True",
            stacklevel=4,
        )


@contextmanager
def recomputing(models: Iterable[nn.Module]) -> Iterator[None]:
    """Of the layers that are computed within, the inputs alone are kept for the backward pass, which may come after.

    transformers' own switch does so for layers in training mode only, in which some of them (OPT's) drop out; and it takes
    their cache away. Here the mode stays evaluation, and nothing is switched but what is computed within.
    """
    with ExitStack() as stack:
        for model in models:
            for layer in layers_of(model):
                stack.enter_context(replaced(layer, forward=partial(_forward, layer.forward)))
        yield


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    attention = attention_as_now()  # the backward pass runs when it is over, on CUDA in a thread of its own

    def again(*args: Any) -> Any:
        with attention():
            return forward(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)
