"""Worker process for TRL: steps of `GRPOTrainer`.

A callback pauses TRL's training loop between steps.
"""

from __future__ import annotations

import tempfile
from typing import Any

from datasets import Dataset
from sides import trl_settings
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOTrainer

from speed_parts.here import grpo_task
from speed_parts.line import Line
from speed_parts.work import Work, work_of_this_process

STEPS = 1_000_000  # more than any benchmark run needs
EPOCH = 64  # rollouts per epoch; TRL creates the data loader again after each epoch


def grpo_trainer(work: Work, folder: str, callbacks: list[TrainerCallback]) -> GRPOTrainer:
    """Create the trainer with models and prompts."""
    task = grpo_task(work)
    trainer = GRPOTrainer(
        model=task.model,
        reward_funcs=task.rewards,
        args=trl_settings(task, STEPS, 0, folder, work.device, work.dtype, work.passes),
        train_dataset=Dataset.from_list([{"prompt": text} for text in work.texts()] * EPOCH),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Turns(TrainerCallback):
    """Callback that waits for the next job after each training step.

    Attributes:
        tokens: response tokens of the last rollout.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.tokens = 0

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Report readiness and wait for the first job: models and data are loaded."""
        self.line.phases.time(optimizer, "step", "update")
        self.line.ready()
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Report the finished step and wait for the next job."""
        self.line.done(self.tokens)
        self._wait()

    def _wait(self) -> None:
        if not self.line.next_job():
            raise SystemExit

    def count(self, trainer: GRPOTrainer) -> None:
        """Wrap generation so that it counts the response tokens of each rollout."""
        generate = trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = generate(*args, **kwargs)
            self.tokens = sum(map(len, result[0]))
            return result

        trainer._generate_single_turn = counted


def main() -> None:
    """Run jobs until standard input ends."""
    work = work_of_this_process()
    line = Line(work.device)
    turns = Turns(line)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(work, folder, [turns])
        turns.count(trainer)
        # A step calls `training_step` once per pass, then the optimizer. The first call collects the rollout in
        # `_prepare_inputs`.
        line.phases.time(trainer, "training_step", "update")
        line.phases.time(trainer, "_prepare_inputs", "other")
        line.phases.time(trainer, "_generate_single_turn", "generate")
        line.phases.time(trainer, "_calculate_rewards", "reward")
        line.phases.time(trainer.ref_model, "forward", "reference")
        line.phases.time(trainer.accelerator, "clip_grad_norm_", "update")
        line.phases.time(trainer.model, "zero_grad", "update")
        trainer.train()


if __name__ == "__main__":
    main()
