"""The optimizer: its kinds, its state on the CPU between two steps, and how many bytes that state takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

NAMES = ("adamw_torch", "adamw_8bit")  # as in transformers' TrainingArguments
CPU = torch.device("cpu")
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
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError(f"optimizer={name!r} needs bitsandbytes ({error}): pip install llm-env[8bit]") from error
    return AdamW8bit


def make_optimizer(
    name: str, offload: bool, given: dict[str, Any], parameters: Sequence[Tensor], *, lr: float, eps: float
) -> Optimizer:
    """An optimizer of the trained parameters.

    Args:
        name: one of `NAMES`.
        offload: its state is on the CPU between two steps; see `Offloaded`.
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
    if offload:
        kind = offloaded(kind)  # type: ignore[arg-type]
    return kind(parameters, lr=lr, **kwargs)


class Offloaded(Optimizer):
    """Mixed into an optimizer's class: its state is on the CPU, but for that of the parameter that is stepped.

    The steps are taken on the parameters' device, one parameter after the other, each with its state moved there and back: the
    same arithmetic, so that the weights are bit for bit those of the optimizer without it. Single numbers, such as a count of
    steps, stay where the optimizer keeps them. (torchao's `CPUOffloadOptimizer` steps on the CPU and takes gradients away as
    the backward pass makes them, before they can be clipped.)
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Raises:
            ValueError: the optimizer keeps something for all parameters together, of which there is more than one here.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step_alone(group, parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_alone(self, group: dict[str, Any], parameter: Tensor) -> None:
        alone = {**group, "params": [parameter]}
        self.param_groups = [alone]
        try:
            self._move(parameter, parameter.device)
            super().step()
        finally:
            self._move(parameter, CPU)
        changed = [name for name, value in alone.items() if name != "params" and value is not group.get(name)]
        if changed:
            kind = type(self).__name__.removeprefix("Offloaded")
            raise ValueError(
                f"offload_optimizer=True, but {kind} keeps {', '.join(changed)} for all parameters together, and here they are "
                "stepped one by one; set offload_optimizer=False"
            )

    def _move(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor) and value.ndim:
                state[name] = value.to(device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, and put it where it belongs."""
        super().load_state_dict(state_dict)
        for parameter in self.state:
            self._move(parameter, CPU)


@cache
def offloaded(kind: type[Optimizer]) -> type[Optimizer]:
    """An optimizer's class with its state on the CPU."""
    return type(f"Offloaded{kind.__name__}", (Offloaded, kind), {"__doc__": kind.__doc__})


def states_to_come(optimizer: Optimizer) -> int:
    """Bytes that the optimizer will take on the parameters' device from its first step on, besides what it has.

    Two numbers a weight with Adam and its kin, else one, of float32 or (bitsandbytes) of 8 bits. Where they are on the CPU
    between steps, those of the largest parameter: without the activations of a pass, there is room for them.
    """
    new = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    counts = [(2 if "betas" in optimizer.defaults else 1) * _bytes_of_moment(optimizer, p) for p in new]
    away = isinstance(optimizer, Offloaded) and any(p.device != CPU for p in new)
    return max(counts, default=0) if away else sum(counts)


def _bytes_of_moment(optimizer: Optimizer, parameter: Tensor) -> int:
    """Of one number a weight, as the optimizer holds it."""
    settings: Any = getattr(optimizer, "args", None)  # bitsandbytes'
    if getattr(settings, "optim_bits", 32) == 8 and parameter.numel() >= settings.min_8bit_size:
        return parameter.numel() + 4 * -(-parameter.numel() // BLOCK)
    return parameter.nbytes
