"""One training in several processes: who does which part of it, and how the parts come together.

All processes hold the same rollouts, counts, random states and order of the prompts, and take the same optimizer steps. What
costs time, that is drawing responses, rewards, and forward and backward passes, each does for its part of the episodes alone.
So N processes make what one would have made, up to the rounding of sums, and what is saved by N goes on in M.
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

PATIENCE = timedelta(hours=2)  # that processes wait for the slowest reward; one that dies they notice at once
BUCKET_BYTES = 2**25  # of gradients that are added up at a time
ENGINES = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")  # of accelerate's; what its configuration may ask for


class World:
    """The processes that train one agent; by itself this is a single process, for which every method is a formality.

    Attributes:
        rank: the number of this process, 0..size-1.
        size: how many processes there are.
        device: what this one computes on; None where nobody has assigned one.
        bf16: whether the launcher asked for mixed precision in bfloat16.
        accelerator: accelerate's, with its configuration of FSDP2 in `accelerator.state.fsdp_plugin`; None for one process.
        sharded: whether weights, gradients and the optimizer's state are spread over the processes (FSDP2).
    """

    rank = 0
    size = 1
    device: torch.device | None = None
    bf16 = False
    accelerator: Any = None
    sharded = False

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def part(self, rows: int, unit: int = 1) -> range:
        """Which of `rows` rows are this process's, in whole units (groups) as evenly as they can be."""
        units = rows // unit
        return range(units * self.rank // self.size * unit, units * (self.rank + 1) // self.size * unit)

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """What this process does within, by which others know whether they do the same."""
        yield

    def gather(self, value: T, what: str = "") -> list[T]:
        """What each process has, in the order of their numbers; `what` it is, the same in all.

        Raises:
            RuntimeError: they are at different places, or have different things to give.
        """
        return [value]

    def gather_or_raise(self, value: T, error: Exception | None = None) -> list[T]:
        """Return the value of each process, in the order of their ranks; an error in one process is raised in all.

        Args:
            value: this process's.
            error: what this process failed with, if it did; raised here once the others know.

        Raises:
            RuntimeError: If another process failed; the message has its error.
        """
        if error is not None:
            raise error
        return [value]

    def from_main(self, value: T) -> T:
        """What the main process has."""
        return value

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Make each of the tensors (float32, the same shapes everywhere) its sum over all processes, in place."""

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient its sum over all processes; None where no process has one."""

    def spread(self, module: nn.Module) -> None:
        """Give all processes the weights and buffers of the main one."""

    def seed(self, seed: int | None) -> int | None:
        """The seed; where there is none and several processes need one, one that all share."""
        return seed


class OutOfStepError(RuntimeError):
    """Several processes are not at the same place in the program; raised in all of them."""


ALONE = World()


class Processes(World):
    """Several processes, over torch.distributed and as accelerate has set it up."""

    def __init__(self) -> None:
        self.accelerator = _accelerator()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = self.accelerator.device
        self.bf16 = self.accelerator.mixed_precision == "bf16"
        self.sharded = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self._place = "the script"

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """What this process does within, by which others know whether they do the same."""
        before, self._place = self._place, place
        try:
            yield
        finally:
            self._place = before

    def gather(self, value: T, what: str = "") -> list[T]:
        """What each process has, in the order of their numbers; none waits for one that is elsewhere."""
        found: list[Any] = [None] * self.size
        with self._all_there():
            dist.all_gather_object(found, (f"{self._place} ({what})" if what else self._place, value), group=self._group)
        places = [place for place, _ in found]
        if len(set(places)) > 1:
            raise OutOfStepError(
                f"processes 0 to {self.size - 1} are at {', '.join(places)}: they cannot go on together. What learns, "
                "evaluates, saves or loads is to be called in all of them, and in the same order; `agent.world.main` is for "
                "what a single one prints or writes"
            )
        return [value for _, value in found]

    def gather_or_raise(self, value: T, error: Exception | None = None) -> list[T]:
        """Return the value of each process; an error in one process is raised in all."""
        if isinstance(error, OutOfStepError):
            raise error  # raised in the others as well
        try:
            found = self.gather((value, None if error is None else f"{type(error).__name__}: {error}"), "results")
        finally:
            if error is not None:
                raise error
        for rank, (_, told) in enumerate(found):
            if told is not None:
                raise RuntimeError(f"process {rank} of {self.size} failed, and all stop with it: {told}")
        return [value for value, _ in found]

    def from_main(self, value: T) -> T:
        """What the main process has."""
        return self.gather(value if self.main else None, "the main one's")[0]  # type: ignore[return-value]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Make each of the tensors its sum over all processes, in place, some of them at a time."""
        bucket: list[Tensor] = []
        for tensor in tensors:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                self._add(bucket)
                bucket = []
            bucket.append(tensor)
        if bucket:
            self._add(bucket)

    def _add(self, tensors: list[Tensor]) -> None:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._all_there():
            dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Make each gradient its sum over all processes; None where no process has one."""
        parameters = list(parameters)
        here = np.array([parameter.grad is not None for parameter in parameters])
        used = [p for p, anywhere in zip(parameters, np.any(self.gather(here, "gradients"), axis=0), strict=True) if anywhere]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.add(parameter.grad for parameter in used if parameter.grad is not None)

    def spread(self, module: nn.Module) -> None:
        """Give all processes the weights and buffers of the main one."""
        with torch.no_grad(), self._all_there():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0, group=self._group if tensor.device.type == "cpu" else None)

    def seed(self, seed: int | None) -> int | None:
        """The main process's seed, or one that all share."""
        drawn = int(np.random.default_rng().integers(2**32)) if seed is None else seed
        return self.from_main(drawn)

    def _all_there(self) -> _AllThere:
        return _AllThere(self)


class _AllThere:
    """Says what an error within means: that a process is gone."""

    def __init__(self, world: Processes) -> None:
        self.world = world

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError):
            world = self.world
            raise RuntimeError(
                f"process {world.rank} of {world.size} waits for others in vain: one has ended, or was silent for "
                f"{PATIENCE.total_seconds() / 3600:g} h ({str(error).splitlines()[0]}). Start all of them again and go on from "
                "the last checkpoint: load(path, env=env), learn(..., reset_num_timesteps=False)"
            ) from error


def _launched() -> bool:
    """Whether a launcher (accelerate, torchrun) has started this process as one of several."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _accelerator() -> Any:
    """Accelerate's `Accelerator`, with its own configuration of the processes, which is then checked.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: the configuration asks for what is not supported here.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            "this is one of several processes, which train together through accelerate: pip install 'llm-env[distributed]'"
        ) from error
    if dist.is_initialized():  # by the script itself: accelerate looks here
        os.environ.setdefault("RANK", str(dist.get_rank()))
        os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
        os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    # Every process loads its weights itself: models that are not sharded (a reward model's) are otherwise left empty in all
    # processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    kind = accelerator.distributed_type.value
    if kind not in ENGINES:
        raise ValueError(f"accelerate's configuration says distributed_type: {kind}; this works with {', '.join(ENGINES[1:])}")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(
            f"accelerate's configuration says mixed_precision: {accelerator.mixed_precision}; take 'no' or 'bf16', whose range "
            "needs no scaling of the loss"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"accelerate's configuration says gradient_accumulation_steps: {accelerator.gradient_accumulation_steps}; leave it "
            "out: the agent's batch_size says what an optimizer step is, max_tokens_per_batch what a pass"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _configure_sharding(accelerator)
    return accelerator


def _configure_sharding(accelerator: Any) -> None:
    """See that there is accelerate's own configuration of FSDP2, which it makes on GPUs alone, and that it can be followed."""
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        accelerator.state.fsdp_plugin = plugin = FullyShardedDataParallelPlugin()
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    if plugin.fsdp_version != 2:
        raise ValueError(f"accelerate's configuration says fsdp_version: {plugin.fsdp_version}; set fsdp_version: 2")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "accelerate's configuration says fsdp_offload_params: true; leave it out: shards stay where they are computed with"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "accelerate's configuration says fsdp_activation_checkpointing: true; leave it out, and say "
            "gradient_checkpointing=True to the agent"
        )


def placed(method: F) -> F:
    """A method that is to be called in all processes, or in none."""

    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Any:
        with world().at(method.__name__):
            return method(*args, **kwargs)

    return called  # type: ignore[return-value]


@cache
def _processes() -> Processes:
    return Processes()


def world() -> World:
    """The processes that this one was launched with."""
    return _processes() if _launched() else ALONE
