"""Sampling and learning at once: the next rollout is generated, by older weights, while the last one is trained on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from agents.collection.collector import ResponseCollector, gather_rollout
from agents.rollout import Rollout

RNG_KEYS = ("torch", "env", "cursor")  # parts of a `TrainingState` that a rollout moves when it begins


class PrefetchedRollout:
    """A rollout that is generated in a thread, with the weights of when this was made.

    It is off-policy by one step, for which importance weights correct (`agents.losses.truncated_importance`). Prompts and
    random numbers are drawn here, so that the result does not depend on which of the two threads is faster. Callbacks are
    called, and files written, while no rollout is being generated; a reward function runs beside the update.

    A checkpoint has the state before this rollout: who resumes from it generates the rollout again, with the weights in the
    file, so that a run that was stopped is on-policy for one rollout where the uninterrupted one was not.

    Args:
        collector: with an engine whose weights nobody changes; see `PolicyEngine.snapshot`.
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
        """Wait until the rollout is there, or has failed, and its thread has ended."""
        self._executor.shutdown(wait=True)

    def result(self) -> Rollout:
        """Return the episodes of all processes; where the call is interrupted, it returns once no env is stepped any more."""
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
    """Check that the next rollout can be generated during the update.

    Raises:
        ValueError: If the env is stepped token by token, or the weights are sharded.
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
