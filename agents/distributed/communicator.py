"""Training in several processes: which episodes each one has, and the collectives between them.

All processes hold the same rollouts, counts, random states and order of the prompts, and take the same optimizer steps. Each
one generates, scores and backpropagates its share of the episodes only. So N processes train as one process does, up to the
rounding of sums, and a checkpoint of N processes resumes in M.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

TIMEOUT = timedelta(hours=2)  # to wait for the slowest reward; a process that exits is noticed at once
BUCKET_BYTES = 2**25  # of an all-reduce
SUPPORTED_DISTRIBUTED_TYPES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")  # accelerate's `distributed_type`


class Communicator:
    """The processes that train one agent. This class is a single process; its collectives return what they are given.

    Attributes:
        rank: the number of this process, 0..size-1.
        size: the number of processes.
        device: the device of this process; None if the launcher assigned none.
        bf16: whether the launcher asked for mixed precision in bfloat16.
        accelerator: accelerate's `Accelerator`, with the FSDP2 configuration in `state.fsdp_plugin`; None for one process.
        sharded: whether weights, gradients and optimizer state are sharded over the processes (FSDP2).
    """

    rank = 0
    size = 1
    device: torch.device | None = None
    bf16 = False
    accelerator: Any = None
    sharded = False

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def split_rows(self, rows: int, unit: int = 1) -> range:
        """Return the rows of this process.

        Args:
            rows: number of rows of all processes.
            unit: rows that stay together, for instance a group; a divisor of `rows`.

        Returns:
            Whole units, the same number in all processes or one more in some.
        """
        units = rows // unit
        return range(units * self.rank // self.size * unit, units * (self.rank + 1) // self.size * unit)

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name the code within the block; a collective raises if another process calls it in another section."""
        yield

    def all_gather_object(self, value: T, label: str = "") -> list[T]:
        """Return the value of each process, in the order of their ranks.

        Args:
            value: of this process; is pickled.
            label: what the value is, the same in all processes.

        Raises:
            OutOfStepError: If the processes are in different sections or gather different things.
        """
        return [value]

    def gather_or_raise(self, value: T, error: Exception | None = None) -> list[T]:
        """Return the value of each process, in the order of their ranks; an error in one process is raised in all.

        Args:
            value: of this process.
            error: why this process has no value; raised here once the others know.

        Raises:
            RuntimeError: If another process failed; the message has its error.
        """
        if error is not None:
            raise error
        return [value]

    def broadcast_from_main(self, value: T) -> T:
        """Return the main process's value."""
        return value

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place.

        Args:
            tensors: float32, of the same shapes in all processes.
        """

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; it stays None where no process has one."""

    def broadcast_weights(self, module: nn.Module) -> None:
        """Copy the main process's weights and buffers into the modules of all processes."""

    def broadcast_seed(self, seed: int | None) -> int | None:
        """Return the main process's seed; several processes get a random one if it has none."""
        return seed


class OutOfStepError(RuntimeError):
    """The processes call different collectives; raised in all of them."""


SINGLE_PROCESS = Communicator()


class MultiProcess(Communicator):
    """Several processes over torch.distributed, as accelerate has configured it."""

    def __init__(self) -> None:
        self.accelerator = _accelerator()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = self.accelerator.device
        self.bf16 = self.accelerator.mixed_precision == "bf16"
        self.sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._section = "the script"

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Name the code within the block."""
        before, self._section = self._section, name
        try:
            yield
        finally:
            self._section = before

    def all_gather_object(self, value: T, label: str = "") -> list[T]:
        """Return the value of each process; raise if they are in different sections."""
        gathered: list[Any] = [None] * self.size
        with _PeerFailure(self):
            section = f"{self._section} ({label})" if label else self._section
            dist.all_gather_object(gathered, (section, value), group=self._group)
        sections = [section for section, _ in gathered]
        if len(set(sections)) > 1:
            raise OutOfStepError(
                f"processes 0 to {self.size - 1} are at {', '.join(sections)}. Call learn, evaluate, save and load in all "
                "processes and in the same order; use agent.communicator.is_main_process for what one process prints or writes"
            )
        return [value for _, value in gathered]

    def gather_or_raise(self, value: T, error: Exception | None = None) -> list[T]:
        """Return the value of each process; an error in one process is raised in all."""
        if isinstance(error, OutOfStepError):
            raise error  # raised in the others as well
        try:
            gathered = self.all_gather_object((value, None if error is None else f"{type(error).__name__}: {error}"), "results")
        finally:
            if error is not None:
                raise error
        for rank, (_, message) in enumerate(gathered):
            if message is not None:
                raise RuntimeError(f"process {rank} of {self.size} failed, and all stop with it: {message}")
        return [value for value, _ in gathered]

    def broadcast_from_main(self, value: T) -> T:
        """Return the main process's value."""
        label = "the main process's"
        return self.all_gather_object(value if self.is_main_process else None, label)[0]  # type: ignore[return-value]

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, in place, some of them at a time."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                self._all_reduce(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            self._all_reduce(bucket)

    def _all_reduce(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with _PeerFailure(self):
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over all processes; it stays None where no process has one."""
        parameters = list(parameters)
        has_gradient = np.array([parameter.grad is not None for parameter in parameters])
        anywhere = np.any(self.all_gather_object(has_gradient, "gradients"), axis=0)
        reduced = [parameter for parameter, is_used in zip(parameters, anywhere, strict=True) if is_used]
        for parameter in reduced:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.all_reduce(parameter.grad for parameter in reduced if parameter.grad is not None)

    def broadcast_weights(self, module: nn.Module) -> None:
        """Copy the main process's weights and buffers into the modules of all processes."""
        with torch.no_grad(), _PeerFailure(self):
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0, group=self._group if tensor.device.type == "cpu" else None)

    def broadcast_seed(self, seed: int | None) -> int | None:
        """Return the main process's seed, a random one if it has none."""
        drawn = int(np.random.default_rng().integers(2**32)) if seed is None else seed
        return self.broadcast_from_main(drawn)


class _PeerFailure:
    """Converts an error of a collective within the block to one that says that another process is gone."""

    def __init__(self, communicator: MultiProcess) -> None:
        self._communicator = communicator

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            communicator, hours = self._communicator, TIMEOUT.total_seconds() / 3600
            raise RuntimeError(
                f"process {communicator.rank} of {communicator.size}: another process exited or did not respond within "
                f"{hours:g} h ({str(error).splitlines()[0]}). Restart all processes and resume from the last checkpoint: "
                "load(path, env=env), learn(..., reset_num_timesteps=False)"
            ) from error


def _is_launched() -> bool:
    """Return whether a launcher (accelerate, torchrun) started this process as one of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _accelerator() -> Any:
    """Make accelerate's `Accelerator` from the launcher's configuration and check the configuration.

    Raises:
        ImportError: If accelerate is not installed.
        ValueError: If the configuration is not supported.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("training in several processes needs accelerate: pip install 'llm-env[distributed]'") from error
    if dist.is_initialized():  # by the script itself: accelerate reads these variables
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    # Every process loads all weights: else models that are not sharded (a reward model) would be empty in all processes
    # except the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kind = accelerator.distributed_type.value
    if kind not in SUPPORTED_DISTRIBUTED_TYPES:
        supported = ", ".join(SUPPORTED_DISTRIBUTED_TYPES[1:])
        raise ValueError(f"distributed_type: {kind} in accelerate's configuration must be one of {supported}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"mixed_precision: {accelerator.mixed_precision} in accelerate's configuration must be 'no' or 'bf16', which needs "
            "no loss scaling"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"gradient_accumulation_steps: {accelerator.gradient_accumulation_steps} in accelerate's configuration must be 1. "
            "Set the agent's batch_size (episodes in an optimizer step) and max_tokens_per_batch (tokens in a pass)"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _configure_fsdp(accelerator)
    return accelerator


def _configure_fsdp(accelerator: Any) -> None:
    """Make accelerate's FSDP2 configuration where it makes none (without a GPU) and check it.

    Raises:
        ValueError: If the configuration is not supported.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version: {plugin.fsdp_version} in accelerate's configuration must be 2. Set fsdp_version: 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError("fsdp_offload_params: true in accelerate's configuration is not supported. Leave it out")
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing: true in accelerate's configuration is not supported. Leave it out and give the "
            "agent gradient_checkpointing=True"
        )


def collective(method: F) -> F:
    """Decorate a method that all processes must call, or none; its name is the section."""

    @wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with get_communicator().section(method.__name__):
            return method(*args, **kwargs)

    return wrapper  # type: ignore[return-value]


@cache
def _multi_process() -> MultiProcess:
    return MultiProcess()


def get_communicator() -> Communicator:
    """Return the processes that this one was launched with."""
    return _multi_process() if _is_launched() else SINGLE_PROCESS
