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
    """Return the optimizer class of a name.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If it needs bitsandbytes, which is not installed.
    """
    if name not in NAMES:
        raise ValueError(
            f"optimizer={name!r} must be one of {', '.join(map(repr, NAMES))}. Set policy_kwargs={{'optimizer_class': ..., "
            "'optimizer_kwargs': {...}} for another class"
        )
    if name == "adamw_torch":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise ImportError(f"optimizer={name!r} needs bitsandbytes ({error}): pip install llm-env[8bit]") from error
    return PagedAdamW8bit if name.startswith("paged") else AdamW8bit


def make_optimizer(
    name: str, policy_kwargs: dict[str, Any], parameters: Sequence[Tensor], *, lr: float, eps: float
) -> Optimizer:
    """Make the optimizer of the trained parameters.

    Args:
        name: one of `NAMES`.
        policy_kwargs: may have `optimizer_class` and `optimizer_kwargs`.
        parameters: the trained parameters.
        lr: the initial learning rate.
        eps: Adam's epsilon. It and a weight decay of 0 are AdamW's defaults here; `optimizer_kwargs` override them.

    Raises:
        TypeError: If the class is no optimizer, or needs a closure.
        ValueError: If both a class and a name are given, or `optimizer_kwargs` has a learning rate.
    """
    if "optimizer_class" in policy_kwargs and name != NAMES[0]:
        raise ValueError(
            f"optimizer={name!r} and policy_kwargs['optimizer_class']={policy_kwargs['optimizer_class']!r} were both given. "
            "Drop one of them"
        )
    kind: Any = policy_kwargs.get("optimizer_class", class_of(name))
    kwargs = policy_kwargs.get("optimizer_kwargs") or {}
    if not isinstance(kind, type) or not issubclass(kind, Optimizer) or issubclass(kind, torch.optim.LBFGS):
        raise TypeError(
            f"policy_kwargs['optimizer_class'] is {kind!r}; give a torch.optim.Optimizer that steps without a closure"
        )
    if "lr" in kwargs:
        raise ValueError(f"optimizer_kwargs has lr={kwargs['lr']!r}; set learning_rate of the agent instead")
    if "optimizer_class" not in policy_kwargs or kind is torch.optim.AdamW:
        kwargs = {"weight_decay": 0.0, "eps": eps, **kwargs}
    return kind(parameters, **{"lr": lr, **kwargs})


def keep_steps_on_cpu(optimizer: Optimizer) -> None:
    """Move the step counts in an optimizer's state to the CPU, where torch has them, after they were loaded to a GPU.

    On a GPU, each step of the optimizer would wait for every one of them to be read.
    """
    for group in optimizer.param_groups:
        if group.get("capturable") or group.get("fused"):  # these count on the GPU
            continue
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].cpu()


def missing_state_bytes(optimizer: Optimizer) -> int:
    """Return the bytes of the state that the optimizer's next step allocates on the parameters' device.

    Two moments a weight for Adam and its variants, else one; in float32, or (bitsandbytes) in 8 bits. Paged tensors do not
    count: the driver moves them to the CPU when the GPU is full.
    """
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    return sum((2 if "betas" in optimizer.defaults else 1) * _bytes_of_moment(optimizer, p) for p in new)


def _bytes_of_moment(optimizer: Optimizer, parameter: Tensor) -> int:
    """Return the bytes of one moment of a parameter."""
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
