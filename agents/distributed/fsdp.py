"""Sharding of weights over processes (FSDP2, `fully_shard`) by accelerate's configuration, and gathering them again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from agents.distributed.communicator import Communicator, get_communicator

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

_reshards: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether a layer is resharded after its forward pass
_gathered: WeakSet[nn.Module] = WeakSet()
_aliases: WeakKeyDictionary[nn.Module, WeightAlias] = WeakKeyDictionary()


class WeightAlias:
    """A model whose parameters are those of another, sharded model; it has them only while that one is gathered.

    Args:
        model: its parameters are the same objects as the owner's, under other names.
        owner: the model to be sharded.
    """

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        places = {id(p): (part, leaf) for part in owner.modules() for leaf, p in part._parameters.items() if p is not None}
        self._pairs = [
            (part, leaf, *places[id(p)]) for part in model.modules() for leaf, p in part._parameters.items() if p is not None
        ]
        weights = (part.get_parameter(leaf) for part, leaf, _, _ in self._pairs)
        self._shapes = [nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False) for weight in weights]

    def attach(self) -> None:
        """Set the parameters to the owner's current ones."""
        for part, leaf, owning, name in self._pairs:
            part._parameters[leaf] = owning._parameters[name]

    def detach(self) -> None:
        """Set the parameters to meta tensors of the same shapes."""
        for (part, leaf, _, _), shape in zip(self._pairs, self._shapes, strict=True):
            part._parameters[leaf] = shape


def shard_model(communicator: Communicator, model: nn.Module, entry: str) -> None:
    """Shard a model's weights over the processes, layer by layer.

    Args:
        communicator: with accelerate's configuration.
        model: its weights are the same in all processes. Its layers are what transformers does not split
            (`_no_split_modules`), unless accelerate's `fsdp_transformer_layer_cls_to_wrap` names others.
        entry: the method that computes with the weights; it returns tensors, or tuples of them.

    Raises:
        ValueError: If the configuration does not fit the model.
    """
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method

    layers = sorted({name for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()})
    model._no_split_modules = layers  # type: ignore[assignment]
    state, plugin = communicator.accelerator.state, communicator.accelerator.state.fsdp_plugin
    state.fsdp_plugin = copy.copy(plugin)  # accelerate writes the layers of the first model into it
    if (policy := plugin.mixed_precision_policy) is not None:
        # Layers are gathered in bfloat16. Autocast decides what they compute in: log-probs stay float32.
        state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    try:
        fsdp2_prepare_model(communicator.accelerator, model)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"accelerate's FSDP configuration does not fit {type(model).__name__}, whose layers are {layers}: {error}"
        ) from error
    finally:
        state.fsdp_plugin = plugin
    for part in _fsdp_modules(model):
        part.set_gradient_divide_factor(1.0)  # sums: the loss weights count the tokens of all processes
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    register_fsdp_forward_method(model, entry)
    _reshards[model] = bool(plugin.reshard_after_forward)


def shard_and_warm_up(
    communicator: Communicator,
    model: nn.Module,
    warm_up: Callable[[], object],
    entry: str,
    alias: nn.Module | None = None,
) -> None:
    """Shard a model if the launcher asks for it, and compute with it once before and once after.

    The first warm-up runs the trials of what the model can do, which do not use the entry. The second one tells FSDP which
    module is the outermost.

    Args:
        communicator: the processes.
        model: see `shard_model`.
        warm_up: computes with the model through its entry.
        entry: see `shard_model`.
        alias: a model made of the same parameters; becomes a `WeightAlias`.
    """
    if communicator.sharded:
        with torch.no_grad():
            warm_up()
            weight_alias = None if alias is None else WeightAlias(alias, model)
            shard_model(communicator, model, entry)
            if weight_alias is not None:
                _aliases[model] = weight_alias
                weight_alias.detach()
            warm_up()
            for part in _fsdp_modules(model):  # the outermost one keeps its weights for a backward pass, which does not come
                part.reshard()


def _fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in model.modules() if isinstance(part, FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` was called for the model."""
    return model in _reshards


def is_sharded_now(model: nn.Module) -> bool:
    """Return whether a sharded model is not gathered at the moment."""
    return model in _reshards and model not in _gathered


@contextmanager
def full_params(model: nn.Module | None) -> Iterator[None]:
    """Gather all weights of a sharded model in every process; within the block it computes without the other processes.

    Args:
        model: nothing happens if it is None, not sharded, or gathered already.
    """
    if model is None or not is_sharded_now(model):
        yield
        return
    get_communicator().all_gather_object(None, "weights")  # raises if a process is in another section
    parts = _fsdp_modules(model)
    _gathered.add(model)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        if model in _aliases:
            _aliases[model].attach()
        yield
    finally:
        if model in _aliases:
            _aliases[model].detach()
        _gathered.discard(model)
        for part in parts:
            part.set_reshard_after_forward(_reshards[model] and part is not model, recurse=False)
            part.reshard()


def full_params_context(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that makes the context `full_params(model)`, an empty one if the model is not sharded."""
    return partial(full_params, model) if is_sharded(model) else nullcontext


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one; another tensor as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_dict(state: Any) -> Any:
    """Replace the sharded tensors of a state dict, of a model or an optimizer, by full tensors on the CPU.

    Tensor by tensor, in every process, so that a file is the same for any number of processes. (torch's
    `get_optimizer_state_dict` takes a step where there is no state yet and renames it, and its `get_model_state_dict` gives
    full tensors on the CPU in one process only.)
    """
    from torch.distributed.tensor import DTensor

    if isinstance(state, DTensor):
        return state.full_tensor().cpu()
    if isinstance(state, Mapping):
        return type(state)((key, full_state_dict(value)) for key, value in state.items())  # type: ignore[call-arg]
    return state


def shard_state_dict(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the full tensors of a model's state dict by this process's shards of those that are sharded in `like`."""
    return {name: _shard(value, like.get(name)) for name, value in state.items()}


def shard_optim_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Replace the full tensors of an optimizer's state dict by this process's shards where its weights are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {name: _shard(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": shards}


def _shard(value: Any, like: Any) -> Any:
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
    return value
