"""Checkpoints: the training state that a run resumes from, and complete files on SB3's zip format."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from stable_baselines3.common.save_util import open_path
from stable_baselines3.common.vec_env import VecEnv

from agents.vec_env import vector_env_of
from llm_env.prompts import PromptCursor
from llm_env.reference import KLController

FORMAT = 2  # of the files; version 0.1 wrote format 1, without a number
MEMBERS = {"data", "policy.pth", "policy.optimizer.pth", "system_info.txt"}  # SB3 writes the last of them last


class Stateful(Protocol):
    """A part of the training state."""

    def state_dict(self) -> Any:
        """Return the state, detached from the part."""

    def load_state_dict(self, state: Any) -> None:
        """Take over a state; one of another kind of device or env is left out."""


class TrainingState:
    """What a rollout and its update move besides weights and optimizer: counts, random states, order of prompts, KL.

    A *snapshot* is the state of all parts, by name. Weights and a snapshot are all that training resumes from. A rollout and
    its update happen together or not at all; see `rollback_on_error`.

    Args:
        waiting: a saved snapshot, of which a part takes its state as soon as it is added.

    Attributes:
        began: the snapshot from which the rollout that is being collected began; None between rollouts.
    """

    def __init__(self, waiting: dict[str, Any] | None = None) -> None:
        self.began: dict[str, Any] | None = None
        self._parts: dict[str, Stateful] = {}
        self._waiting = dict(waiting or {})

    def add(self, **parts: Stateful) -> None:
        """Add parts; one with the name of another replaces it."""
        for name, part in parts.items():
            self._parts[name] = part
            if name in self._waiting:
                part.load_state_dict(self._waiting.pop(name))

    def snapshot(self) -> dict[str, Any]:
        """Return the state of every part, and saved states whose parts have not been added yet."""
        return {**self._waiting, **{name: part.state_dict() for name, part in self._parts.items()}}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Put all parts that are in a snapshot back to it."""
        for name, part in self._parts.items():
            if name in snapshot:
                part.load_state_dict(snapshot[name])

    @contextmanager
    def rollback_on_error(
        self, began: dict[str, Any], before_restore: Callable[[], None], is_final: Callable[[], bool]
    ) -> Iterator[Transaction]:
        """Undo a rollout that does not reach its end: after an error, Ctrl-C, or `Transaction.roll_back`.

        Args:
            began: the snapshot from which the rollout begins, and which a checkpoint gets meanwhile.
            before_restore: stops whatever else moves the state.
            is_final: whether weights have moved since, so that nothing can be undone any more.
        """
        self.began = began

        def roll_back() -> None:
            before_restore()
            self.restore(began)

        transaction = Transaction(roll_back)
        try:
            yield transaction
        except BaseException:
            if not transaction.is_committed and not is_final():
                roll_back()
            raise
        finally:
            self.began = None


@dataclass
class Transaction:
    """A rollout and its update under way.

    Attributes:
        roll_back: puts the state back to where the rollout began.
        is_committed: whether to keep all that happened, whatever comes.
    """

    roll_back: Callable[[], None]
    is_committed: bool = False


class Attributes:
    """Some attributes of an object as a part of the training state."""

    def __init__(self, owner: object, *names: str) -> None:
        self._owner, self._names = owner, names

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the attributes."""
        return {name: copy.copy(getattr(self._owner, name)) for name in self._names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the attributes that there are."""
        for name, value in state.items():
            if name in self._names:
                setattr(self._owner, name, copy.copy(value))


class TorchGenerator:
    """A torch generator as a part of the training state; a state of another kind of device is left out."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> tuple[str, Any]:
        """Return the kind of device and the state."""
        return self._generator.device.type, self._generator.get_state()

    def load_state_dict(self, state: tuple[str, Any]) -> None:
        """Take over a state of the same kind of device."""
        if state[0] == self._generator.device.type:
            self._generator.set_state(state[1])


class NumpyGenerator:
    """A numpy generator as a part of the training state."""

    def __init__(self, generator: np.random.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> Any:
        """Return the state."""
        return self._generator.bit_generator.state

    def load_state_dict(self, state: Any) -> None:
        """Take over a state."""
        self._generator.bit_generator.state = state


class KLCoefficient:
    """The coefficient of a KL controller as a part of the training state.

    Args:
        controller: returns the controller, or a number or None, which have no state.
        is_fixed_restored: whether a coefficient that no rollout moves is taken from a checkpoint, too.
    """

    def __init__(self, controller: Callable[[], Any], is_fixed_restored: bool) -> None:
        self._controller, self._is_fixed_restored = controller, is_fixed_restored

    def state_dict(self) -> float | None:
        """Return the coefficient, None where there is no controller."""
        controller = self._controller()
        return controller.value if isinstance(controller, KLController) else None

    def load_state_dict(self, state: float | None) -> None:
        """Take over the coefficient of a controller."""
        controller = self._controller()
        if isinstance(controller, KLController) and state is not None:
            if self._is_fixed_restored or type(controller) is not KLController:
                controller.value = state


class EnvState:
    """The random streams and the order of the prompts of a vector env as a part of the training state."""

    def __init__(self, env: VecEnv) -> None:
        self._env, self._venv = env, vector_env_of(env)

    def state_dict(self) -> dict[str, Any]:
        """Return them, and the seeds that wait for the first reset."""
        return {"venv": None if self._venv is None else self._venv.state_dict(), "seeds": list(self._env._seeds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of as many rows and prompts."""
        if self._venv is not None and state["venv"] is not None and self._venv.fits(state["venv"]):
            self._env._seeds = list(state.get("seeds") or [None] * self._env.num_envs)
            self._venv.load_state_dict(state["venv"])


class CursorState:
    """A prompt cursor as a part of the training state."""

    def __init__(self, cursor: PromptCursor, size: int) -> None:
        self._cursor, self._size = cursor, size

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""
        return self._cursor.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state over as many prompts."""
        if state["size"] == self._size:
            self._cursor.load_state_dict(state)


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------


@contextmanager
def defer_interrupt(message: str, loss: str = "") -> Iterator[None]:
    """Hold a Ctrl-C (SIGINT) back until the block has ended; a second one goes through at once.

    Without effect outside the main thread, which alone gets signals, and where SIGINT is ignored.

    Args:
        message: printed at the first Ctrl-C.
        loss: printed at the second: what is lost by it.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    held: list[tuple[int, Any]] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            print(loss, end="\n" if loss else "", flush=True)
            signal.signal(signal.SIGINT, previous)
            previous(number, frame)
            return
        held.append((number, frame))
        print(message, flush=True)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if held:
        previous(*held[0])


# --- files -------------------------------------------------------------------------------------------------------------


def migrate(attributes: dict[str, Any]) -> None:
    """Convert the attributes of an agent from a file of version 0.1 (format 1) to this version's, in place."""
    if attributes.get("_checkpoint_format", 1) >= FORMAT:
        return
    for old, new in RENAMED_ATTRIBUTES.items():
        if old in attributes:
            value = attributes.pop(old)
            attributes[new] = attributes.get(new) or value  # what `load` was given goes first
    position = attributes.pop("_position", {})
    state = {new: position[old] for old, new in RENAMED_PARTS.items() if position.get(old) is not None}
    if position.get("env") is not None:
        state["env"] = {"venv": position["env"], "seeds": position.get("seeds")}
    sync = {new: attributes.pop(old) for old, new in RENAMED_REFERENCE_SYNC.items() if old in attributes}
    if sync:
        state["reference_sync"] = {"has_moved": False, "num_rollouts": 0, "rollouts": [], **sync}
    attributes["_saved_state"] = {**attributes.get("_saved_state", {}), **state}
    attributes["_checkpoint_format"] = FORMAT
    for name in DROPPED_ATTRIBUTES:
        attributes.pop(name, None)


RENAMED_ATTRIBUTES = {
    "engine": "_engine_setting",
    "_own_engine": "_engine_is_object",
    "_wanted_n_envs": "_n_envs_setting",
    "_wanted_learning_rate": "_learning_rate_setting",
}
RENAMED_PARTS = {
    "counts": "counts",
    "torch": "torch",
    "numpy": "numpy",
    "kl_in_loss": "kl_in_loss",
    "cursor": "cursor",
    "kl_coef": "kl_in_reward",
}
RENAMED_REFERENCE_SYNC = {"_reference_moved": "has_moved", "_rollouts_since": "num_rollouts", "_rollouts": "rollouts"}
DROPPED_ATTRIBUTES = ("offload_optimizer", "offload_reference")


@contextmanager
def atomic_write(target: Path) -> Iterator[io.BufferedWriter]:
    """Open a file to write that takes the name `target` once all of it is on the disk; until then the old file keeps it."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:  # a full disk does not say which file it has no room for
        raise OSError(error.errno, f"{error.strerror or error}; {target} was not written", str(target)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with suppress(OSError):  # not every system can write out a folder; the file is in its place all the same
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _data_of(path: Any) -> dict[str, Any]:
    """Read the attributes of a checkpoint as JSON; nothing is unpickled."""
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            return json.loads(archive.read("data"))
    finally:
        file.seek(0) if file is path else file.close()


def algorithms_of(path: Any) -> list[str]:
    """Return the names of the class that wrote a checkpoint and of its base classes; empty if the file does not say.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it was cut off or damaged.
    """
    verify_archive(path)
    data = _data_of(path)
    return list(data.get("_algorithms") or filter(None, [data.get("_algorithm")]))


def check_algorithm(path: Any, kind: type) -> None:
    """Check that a checkpoint was written by an algorithm that `kind` can read; those of version 0.1 may not say by which.

    Raises:
        ValueError: If it was written by neither `kind` nor one of its base or derived classes, by an agent of
            Stable-Baselines3, or by a newer version.
    """
    data = _data_of(path)
    if "_policy_data" not in data:
        raise ValueError(
            f"{path} was not saved by an agent of this package, but by Stable-Baselines3; load it with its own class"
        )
    written = data.get("_checkpoint_format", 1)
    if written > FORMAT:
        raise ValueError(f"{path} has the checkpoint format {written}, this version reads up to {FORMAT}; update llm-env")
    wrote, parents = data.get("_algorithm"), data.get("_algorithms", [data.get("_algorithm")])
    if wrote is not None and kind.__name__ not in parents and wrote not in [parent.__name__ for parent in kind.__mro__]:
        raise ValueError(f"{path} was saved by {wrote}, not by {kind.__name__}; load it with {wrote}.load(...)")


def verify_archive(path: Any) -> None:
    """Check that a checkpoint is complete.

    The checksums of all members are checked, because torch reads weights without looking at them; and that all members are
    there, because a zip file whose writing was ended by an error is closed as if it were complete.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it was cut off or damaged.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged, missing = archive.testzip(), sorted(MEMBERS - set(archive.namelist()))
        fault = f"{damaged} is damaged" if damaged else f"{', '.join(missing)} is missing" if missing else ""
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        fault = str(error) or type(error).__name__
    finally:
        file.seek(0) if file is path else file.close()
    if fault:
        raise ValueError(
            f"{path} is not a complete checkpoint ({fault}): it was cut off or damaged while it was written or copied, or save "
            "did not write it. Load an earlier one, for instance from CheckpointCallback"
        )
