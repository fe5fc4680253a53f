"""Gradient checkpointing: recompute the activations of a layer in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_env.lm.compiling import decoder_layers
from llm_env.lm.shared_prompt import attention_as_now
from llm_env.patching import patched
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers that transformers can checkpoint.

    Raises:
        ValueError: If there are none.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"gradient_checkpointing=True, but transformers cannot checkpoint the layers of {type(model).__name__}. Set "
            "gradient_checkpointing=False, and max_tokens_per_batch to bound the memory"
        )
    return layers


def check_gradient_checkpointing(model: PreTrainedModel, is_on: bool) -> None:
    """Raise if a model's layers cannot be checkpointed; warn if transformers' own switch is on, which has no effect here.

    Args:
        model: the policy's language model.
        is_on: whether the agent checkpoints its layers.

    Raises:
        ValueError: If `is_on` and transformers cannot checkpoint the layers.
    """
    if is_on:
        layers_of(model)
    elif any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warn(
            "the model's own gradient checkpointing is on, which has no effect in evaluation mode, and dropout is off here. "
            "Set the agent's gradient_checkpointing=True instead"
        )


@contextmanager
def checkpoint_layers(models: Iterable[nn.Module]) -> Iterator[None]:
    """Store only the inputs of the layers that are computed within the block; the backward pass may come after it.

    transformers' own switch works in training mode only, in which some layers (OPT's) apply dropout, and it turns the KV cache
    off. Here the layers stay in evaluation mode, and layers outside the block are not affected.

    Args:
        models: their layers are checkpointed.
    """
    with ExitStack() as stack:
        for model in models:
            for layer in layers_of(model):
                stack.enter_context(patched(layer, forward=partial(_forward, layer.forward)))
        yield


def _forward(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    attention = attention_as_now()  # the backward pass runs after its context has ended, on CUDA in another thread

    def recompute(*args: Any) -> Any:
        with attention():
            return forward(*args, **kwargs)

    return checkpoint(recompute, *args, use_reentrant=False, preserve_rng_state=False)
