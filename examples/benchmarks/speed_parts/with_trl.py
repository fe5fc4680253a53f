"""TRL's side: steps by `GRPOTrainer`, whose own training loop is halted between two of them."""

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

STEPS = 1_000_000  # more than anybody asks for
EPOCH = 64  # rollouts; the data loader is made anew after them


def grpo_trainer(work: Work, folder: str, callbacks: list[TrainerCallback]) -> GRPOTrainer:
    """Return the trainer, with its models and prompts."""
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
    """Makes a turn of every step: the training loop waits in here until the next one is asked for.

    Attributes:
        tokens: of the last rollout's responses.
    """

    def __init__(self, line: Line) -> None:
        self.line = line
        self.tokens = 0

    def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
        """Models and data are there; the first prompt is not yet."""
        self.line.phases.time(optimizer, "step", "update")
        self.line.ready()
        self._wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has made its step."""
        self.line.done(self.tokens)
        self._wait()

    def _wait(self) -> None:
        if not self.line.next_job():
            raise SystemExit

    def count(self, trainer: GRPOTrainer) -> None:
        """Note how many tokens each rollout has."""
        generate = trainer._generate_single_turn

        def counted(*args: Any, **kwargs: Any) -> Any:
            result = generate(*args, **kwargs)
            self.tokens = sum(map(len, result[0]))
            return result

        trainer._generate_single_turn = counted


def main() -> None:
    """Take turns until there are none any more."""
    work = work_of_this_process()
    line = Line(work.device)
    turns = Turns(line)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(work, folder, [turns])
        turns.count(trainer)
        # A step is a call of `training_step` for each pass, the first of which makes the rollout in `_prepare_inputs`, and one
        # of the optimizer.
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
