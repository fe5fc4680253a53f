"""Training runs of `learning.py`, with `agents.GRPO` and TRL's `GRPOTrainer`."""

import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from stable_baselines3.common.callbacks import BaseCallback
from tasks import Task
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from agents import GRPO
from llm_env import TextGenerationEnv
from llm_env.prompts import PromptTable, Row


@dataclass
class Run:
    """Measurements of a training run.

    Attributes:
        rewards: mean reward of the completions of each rollout, before the update on them.
        seconds: wall-clock seconds from the start of training to the end of each update.
        cpu_seconds: CPU seconds of this process for the whole training. Other load on the machine affects them less.
        exam: greedy accuracy on held-out problems after training. None if the task has no exam.
        rows: dataset rows of the prompts in the order of training, one per group.
    """

    rewards: list[float]
    seconds: list[float]
    cpu_seconds: float
    exam: float | None
    rows: list[Row]


class Clock:
    """Stopwatch for wall-clock and CPU seconds since its creation."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.seconds: list[float] = []
        self.cpu_seconds = 0.0

    def tick(self) -> None:
        """Append the wall-clock seconds and update the CPU seconds."""
        self.seconds.append(time.perf_counter() - self._wall)
        self.cpu_seconds = time.process_time() - self._cpu


def exam(task: Task, weights: dict[str, torch.Tensor] | None = None) -> float | None:
    """Return the greedy accuracy on held-out problems; None if the task has no exam.

    Both sides use this function.

    Args:
        task: task with model and exam.
        weights: state dict to load into the model. Default None (the weights of the task's model).
    """
    if task.exam is None:
        return None
    agent = GRPO(task.model)
    if weights is not None:
        agent.policy.lm.load_state_dict(weights)
    return agent.evaluate(TextGenerationEnv(**task.exam))["success_rate"]


# --- here ------------------------------------------------------------------------------------------------------------


class Notes(BaseCallback):
    """Callback that records the mean reward and the prompts of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[float] = []
        self.prompts: list[str] = []

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.rewards.append(float(self.locals["rewards"].mean()))
        self.prompts += [info["prompt"] for info in self.locals["infos"]]


def train_here(task: Task, rollouts: int, seed: int) -> Run:
    """Train for `rollouts` rollouts with `agents.GRPO`."""
    env = TextGenerationEnv(**task.env)
    settings = {"group_size": task.group_size, "n_envs": task.batch, "kl_coef": task.kl_coef}
    agent = GRPO(task.model, env, task.learning_rate, seed=seed, device="cpu", **settings)
    notes, clock = Notes(), Clock()
    for _ in range(rollouts):
        agent.learn(1, callback=notes, reset_num_timesteps=False)  # a budget of one token collects one whole rollout
        clock.tick()
    rows = rows_by_text(env.rules.prompts)
    answered = [rows[text] for text in notes.prompts[:: task.group_size]]
    return Run(notes.rewards, clock.seconds, clock.cpu_seconds, exam(task, agent.policy.lm.state_dict()), answered)


def rows_by_text(prompts: PromptTable) -> dict[str, Row]:
    """Return dataset rows for TRL (prompt and other columns), by prompt text."""
    return {text: {"prompt": text, **prompts.row(i)} for i, text in enumerate(prompts.texts)}


# --- TRL -------------------------------------------------------------------------------------------------------------


class Ticks(TrainerCallback):
    """Callback that starts a clock when training begins and reads it after every step."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock: models and data are loaded, the first rollout has not begun."""
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read the clock after the optimizer step."""
        self.clock.tick()


def trl_settings(
    task: Task, rollouts: int, seed: int, folder: str, device: str = "cpu", dtype: str = "float32", passes: int = 1
) -> GRPOConfig:
    """Return TRL's arguments that are equivalent to the settings of `agents.GRPO`.

    Comments explain deviations from TRL's defaults.

    Args:
        task: task to train.
        rollouts: number of rollouts.
        seed: random seed.
        folder: output folder of the trainer.
        device: torch device. Default "cpu".
        dtype: "float32" or "bfloat16" (autocast). Default "float32".
        passes: forward passes per update. Default 1.
    """
    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        # Model: same precision and device.
        use_cpu=device == "cpu",
        model_init_kwargs={"dtype": torch.float32},
        bf16=dtype == "bfloat16",  # TRL's default is True; this package uses float32 by default
        gradient_checkpointing=False,  # TRL's default is True: same gradient, but slower
        disable_dropout=True,
        # One rollout of `batch` completions and one optimizer step on it, in `passes` forward passes.
        max_steps=rollouts,
        per_device_train_batch_size=task.batch // passes,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_iterations=1,
        num_generations=task.group_size,
        shuffle_dataset=False,  # same order of prompts as on the other side
        # Sample from the full distribution.
        max_completion_length=task.env["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # Loss of DeepSeekMath: mean over the tokens of a response, then over responses (TRL's default "dapo": over all tokens).
        loss_type="grpo",
        scale_rewards="group",
        importance_sampling_level="token",
        epsilon=0.2,
        beta=task.kl_coef,
        use_bias_correction_kl=False,  # TRL's default is True: k3 times the ratio; its on-policy gradient is that of k2
        mask_truncated_completions=False,
        reward_weights=task.env.get("reward_weights"),
        # AdamW of torch; TRL's default is the fused version.
        optim="adamw_torch",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        # No output and no checkpoints; log the reward of every step.
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def train_trl(task: Task, rows: list[Row], seed: int) -> Run:
    """Train with TRL for as many rollouts as the prompts in `rows` need."""
    rollouts = len(rows) * task.group_size // task.batch
    ticks = Ticks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=task.model,
            reward_funcs=task.rewards,
            args=trl_settings(task, rollouts, seed, folder),
            train_dataset=Dataset.from_list(rows),
            callbacks=[ticks],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    clock = ticks.clock
    return Run(rewards, clock.seconds, clock.cpu_seconds, exam(task, trainer.model.state_dict()), rows)
