"""Overlap sampling and training: generate the next rollout during the update."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agents.collection.collector import ResponseCollector, gather_rollout
from agents.rollout import Rollout

RNG_KEYS = ("torch", "env", "cursor")  # entries of a `TrainingState` that change when a rollout begins


class PrefetchedRollout:
    """A rollout that is generated in a thread, with a snapshot of the weights.

    The rollout is off-policy by one update. Importance weights correct for this (`agents.losses.truncated_importance`).
    Prompts and random numbers are sampled at construction, so the result does not depend on the timing of the threads.
    Callbacks run and files are written only while no rollout is being generated. Reward functions run concurrently with the
    update.

    A checkpoint has the state before this rollout. A resumed run generates the rollout again, with the weights of the
    checkpoint. Its first rollout is therefore on-policy, unlike in an uninterrupted run.

    Args:
        collector: its engine must have weights that do not change during the update; see `PolicyEngine.snapshot`.
        began: the training state before the rollout.
    """

    def __init__(self, collector: ResponseCollector, began: dict[str, Any]) -> None:
        self.began = {key: began[key] for key in RNG_KEYS}
        self._collector = collector
        request = collector.prepare()
        self._executor = ThreadPoolExecutor(1, "sampling")
        self._future = self._executor.submit(collector.collect_local, request)
        self._executor.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the rollout is finished or has failed, and its thread has ended."""
        self._executor.shutdown(wait=True)

    def result(self) -> Rollout:
        """Return the episodes of all processes.

        If the call is interrupted, it waits until the thread has ended, then re-raises.
        """
        local, error = None, None
        try:
            try:
                local = self._future.result()
            except Exception as raised:
                error = raised
            return gather_rollout(self._collector.communicator, local, error, self._collector.policy.device)
        except BaseException:
            self.wait()
            raise


def check_overlap(overlap: bool, by_response: bool, sharded: bool) -> None:
    """Raise if the next rollout cannot be generated during the update.

    Raises:
        ValueError: If `overlap` is True and the env is stepped token by token, or the weights are sharded.
    """
    if overlap and not by_response:
        raise ValueError(
            "overlap=True generates whole responses during the update, but this env is stepped token by token; leave out its "
            "wrappers, or set overlap=False"
        )
    if overlap and sharded:
        raise ValueError(
            "overlap=True needs a copy of the whole weights in every process, but they are sharded; set overlap=False"
        )
