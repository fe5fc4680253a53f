"""Make the optimizer by name or class, and count the bytes of its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NAMES = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit")  # as in transformers' TrainingArguments
BITSANDBYTES = NAMES[1:]
PAGED_FROM = 100_000  # numbers, below which bitsandbytes does not page a table
BLOCK = 256  # numbers that share a scale in bitsandbytes' 8-bit state


def class_of(name: str) -> type[Optimizer]:
    """The class of an optimizer that has a name.

    Raises:
        ValueError: the name is unknown.
        ImportError: it needs a package that is not there.
    """
    if name not in NAMES:
        raise ValueError(
            f"optimizer={name!r} must be one of {', '.join(map(repr, NAMES))}; another class is given with "
            "policy_kwargs={'optimizer_class': ..., 'optimizer_kwargs': {...}}"
        )
    if name == "adamw_torch":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise ImportError(f"optimizer={name!r} needs bitsandbytes ({error}): pip install llm-env[8bit]") from error
    return PagedAdamW8bit if name.startswith("paged") else AdamW8bit


def make_optimizer(name: str, given: dict[str, Any], parameters: Sequence[Tensor], *, lr: float, eps: float) -> Optimizer:
    """An optimizer of the trained parameters.

    Args:
        name: one of `NAMES`.
        given: `policy_kwargs`, of which `optimizer_class` and `optimizer_kwargs` are read.
        parameters: what is trained.
        lr: learning rate at the beginning.
        eps: Adam's, where `optimizer_kwargs` does not say; likewise weights do not decay.

    Raises:
        TypeError: the class is no optimizer, or needs a closure.
        ValueError: a class was given besides a name, or a learning rate here.
    """
    if "optimizer_class" in given and name != NAMES[0]:
        raise ValueError(
            f"optimizer={name!r} and policy_kwargs['optimizer_class']={given['optimizer_class']!r} were both given; drop one "
            "of them"
        )
    kind: Any = given.get("optimizer_class", class_of(name))
    kwargs = given.get("optimizer_kwargs") or {}
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or issubclass(kind, torch.optim.LBFGS):
        raise TypeError(
            f"policy_kwargs['optimizer_class'] is {kind!r}; give a torch.optim.Optimizer that steps without a closure"
        )
    if "lr" in kwargs:
        raise ValueError(f"optimizer_kwargs has lr={kwargs['lr']!r}; give the agent learning_rate= in its place")
    if "optimizer_class" not in given or kind is torch.optim.AdamW:
        kwargs = {"weight_decay": 0.0, "eps": eps, **kwargs}
    return kind(parameters, **{"lr": lr, **kwargs})


def states_to_come(optimizer: Optimizer) -> int:
    """Bytes that the optimizer will take on the parameters' device from its first step on, besides what it has.

    Two numbers a weight with Adam and its kin, else one, of float32 or (bitsandbytes) of 8 bits. Paged tables do not count: the
    driver moves them to the CPU when the GPU is full.
    """
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    return sum((2 if "betas" in optimizer.defaults else 1) * _bytes_of_moment(optimizer, p) for p in new)


def _bytes_of_moment(optimizer: Optimizer, parameter: Tensor) -> int:
    """Of one number a weight, as the optimizer holds it."""
    settings: Any = getattr(optimizer, "args", None)  # bitsandbytes'
    if getattr(optimizer, "is_paged", False) and parameter.numel() >= PAGED_FROM:
        return 0
    if getattr(settings, "optim_bits", 32) == 8 and parameter.numel() >= settings.min_8bit_size:
        return parameter.numel() + 4 * -(-parameter.numel() // BLOCK)
    return parameter.nbytes


def check_sharding(sharded: bool, optimizer: str, quantized: bool = False) -> None:
    """Raise if the weights cannot be sharded, or the optimizer cannot update sharded weights.

    Raises:
        ValueError: If the weights are sharded and quantized, or sharded and the optimizer is bitsandbytes'.
    """
    if sharded and quantized:
        raise ValueError(
            "the model is quantized, and quantized weights are not sharded (FSDP2); launch without sharding, which keeps the "
            "whole quantized model in every process, or load the model without quantization"
        )
    if sharded and optimizer in BITSANDBYTES:
        raise ValueError(
            f"optimizer={optimizer!r}, but the weights are sharded, which bitsandbytes cannot update; leave it out: each "
            "process keeps its share of the optimizer's state alone"
        )
