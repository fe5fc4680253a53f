"""Weights spread over processes (FSDP2, `fully_shard`), as accelerate's configuration says: sharding, and the whole again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from agents.distributed import World, world

_reshards: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a layer's weights are given back after its pass
_whole: WeakSet[nn.Module] = WeakSet()
_shadows: WeakKeyDictionary[nn.Module, Shadow] = WeakKeyDictionary()


class Shadow:
    """A model made of weights of another one, which is sharded: it has them while that one is whole, and holds none itself.

    Args:
        model: that model; its parameters are the very ones of `owner`, by other names.
        owner: the one to be sharded.
    """

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        places = {id(p): (part, leaf) for part in owner.modules() for leaf, p in part._parameters.items() if p is not None}
        self._pairs = [
            (part, leaf, *places[id(p)]) for part in model.modules() for leaf, p in part._parameters.items() if p is not None
        ]
        weights = (part.get_parameter(leaf) for part, leaf, _, _ in self._pairs)
        self._shapes = [nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False) for weight in weights]

    def appear(self) -> None:
        """Take the owner's weights, as they are now."""
        for part, leaf, owning, name in self._pairs:
            part._parameters[leaf] = owning._parameters[name]

    def vanish(self) -> None:
        """Keep their shapes."""
        for (part, leaf, _, _), shape in zip(self._pairs, self._shapes, strict=True):
            part._parameters[leaf] = shape


def shard(world: World, model: nn.Module, entry: str) -> None:
    """Spread a model's weights over the processes, layer by layer.

    Args:
        world: with accelerate's configuration.
        model: its weights are the same in all processes. What transformers calls its parts that are not to be split are its
            layers, where accelerate's `fsdp_transformer_layer_cls_to_wrap` names no others.
        entry: the method that computes with them; its results are tensors, or tuples of them.

    Raises:
        ValueError: the configuration does not fit the model.
    """
    from accelerate.utils import fsdp2_prepare_model

    layers = sorted({name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()})
    model._no_split_modules = layers  # type: ignore[assignment]
    state, plugin = world.accelerator.state, world.accelerator.state.fsdp_plugin
    state.fsdp_plugin = copy.copy(plugin)  # it takes note of the layers of the first model that it sees
    if (policy := plugin.mixed_precision_policy) is not None:
        # The layers' weights come together in bfloat16. What they compute is autocast's to say: log-probs stay float32.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    try:
        fsdp2_prepare_model(world.accelerator, model)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"accelerate's FSDP configuration does not fit {type(model).__name__}, whose layers are {layers}: {error}"
        ) from error
    finally:
        state.fsdp_plugin = plugin
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # sums: the loss is weighed over all processes
        part.set_force_sum_reduction_for_comms(True)  # which gloo can do as well
    register_fsdp_forward_method(model, entry)
    _reshards[model] = bool(plugin.reshard_after_forward)


def begin(world: World, model: nn.Module, run: Callable[[], object], entry: str, made_of_it: nn.Module | None = None) -> None:
    """`shard` a model, after and before which `run()` computes once with it; `made_of_it` becomes its `Shadow`.

    What is found out about a model by trials, which do not come in by its entry, is then known; and the first pass through the
    entry tells all parts which of them is the outermost.
    """
    if world.sharded:
        with torch.no_grad():
            run()
            shadow = None if made_of_it is None else Shadow(made_of_it, model)
            shard(world, model, entry)
            if shadow is not None:
                _shadows[model] = shadow
                shadow.vanish()
            run()
            for part in _parts(model):  # the outermost keeps its weights for the backward pass that usually follows
                part.reshard()


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called for the model."""
    return model in _reshards


def is_spread(model: nn.Module) -> bool:
    """Whether the weights of a sharded model are spread right now."""
    return model in _reshards and model not in _whole


@contextmanager
def whole(model: nn.Module | None) -> Iterator[None]:
    """Every process holds all weights within, and computes without the others; they come together at the beginning alone."""
    if model is None or not is_spread(model):
        yield
        return
    world().gather(None, "weights")  # tells of one that is elsewhere
    parts = _parts(model)
    _whole.add(model)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        if model in _shadows:
            _shadows[model].appear()
        yield
    finally:
        if model in _shadows:
            _shadows[model].vanish()
        _whole.discard(model)
        for part in parts:
            part.set_reshard_after_forward(_reshards[model] and part is not model, recurse=False)
            part.reshard()


def wholeness(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """`whole` of a model that is sharded, for later."""
    return partial(whole, model) if is_sharded(model) else nullcontext


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(state: Any) -> Any:
    """A state dict, of a model or an optimizer, with whole tensors on the CPU in the place of sharded ones."""
    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return type(state)((key, gathered(value)) for key, value in state.items())  # type: ignore[call-arg]
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return state


def scattered(state: Any, like: Any) -> Any:
    """A state dict of whole tensors with this process's shards of those that are sharded in `like`."""
    if isinstance(like, DTensor) and isinstance(state, Tensor) and state.shape == like.shape:
        return distribute_tensor(state.to(like.device, like.dtype), like.device_mesh, like.placements)
    if isinstance(state, Mapping) and isinstance(like, Mapping):
        return {key: scattered(value, like.get(key)) for key, value in state.items()}
    return state


def scattered_for(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's whole state with this process's shards of what is as large as its weights."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    like = {number: dict.fromkeys(entries, parameters[number]) for number, entries in state["state"].items()}
    return {**state, "state": scattered(state["state"], like)}
