"""The two sides of `learning.py`: one training run by `agents.GRPO`, and the same run by TRL's `GRPOTrainer`."""

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
    """One training run, rollout by rollout.

    Attributes:
        rewards: mean reward of a rollout's completions, before they are learned from.
        seconds: since the training began, when the rollout had been learned from.
        cpu_seconds: of this process for the whole training; what else the machine does shows less in them.
        exam: greedy accuracy on held-out problems after the training; None where the task has no exam.
        rows: the prompts in the order in which they were answered, one row a group.
    """

    rewards: list[float]
    seconds: list[float]
    cpu_seconds: float
    exam: float | None
    rows: list[Row]


class Clock:
    """Seconds since it was made, of the wall and of this process's CPU, at every tick."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self.seconds: list[float] = []
        self.cpu_seconds = 0.0

    def tick(self) -> None:
        """Read both."""
        self.seconds.append(time.perf_counter() - self._wall)
        self.cpu_seconds = time.process_time() - self._cpu


def exam(task: Task, weights: dict[str, torch.Tensor] | None = None) -> float | None:
    """Greedy accuracy of the task's model on its held-out problems, with other weights if given; the same for both sides."""
    if task.exam is None:
        return None
    agent = GRPO(task.model)
    if weights is not None:
        agent.policy.lm.load_state_dict(weights)
    return agent.evaluate(TextGenerationEnv(**task.exam))["success_rate"]


# --- here ------------------------------------------------------------------------------------------------------------


class Notes(BaseCallback):
    """Notes what every rollout earned and which prompts it answered."""

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
    """`rollouts` rollouts with `agents.GRPO`."""
    env = TextGenerationEnv(**task.env)
    settings = {"group_size": task.group_size, "n_envs": task.batch, "kl_coef": task.kl_coef}
    agent = GRPO(task.model, env, task.learning_rate, seed=seed, device="cpu", **settings)
    notes, clock = Notes(), Clock()
    for _ in range(rollouts):
        agent.learn(1, callback=notes, reset_num_timesteps=False)  # whole rollouts are learned from: here one
        clock.tick()
    rows = rows_by_text(env.rules.prompts)
    answered = [rows[text] for text in notes.prompts[:: task.group_size]]
    return Run(notes.rewards, clock.seconds, clock.cpu_seconds, exam(task, agent.policy.lm.state_dict()), answered)


def rows_by_text(prompts: PromptTable) -> dict[str, Row]:
    """Prompt and columns of every prompt, as a data set for TRL has them."""
    return {text: {"prompt": text, **prompts.row(i)} for i, text in enumerate(prompts.texts)}


# --- TRL -------------------------------------------------------------------------------------------------------------


class Ticks(TrainerCallback):
    """Starts a clock when the training begins and reads it after every step."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Models and data are there; the first prompt is not yet."""
        self.clock = Clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has made its step."""
        self.clock.tick()


def trl_settings(
    task: Task, rollouts: int, seed: int, folder: str, device: str = "cpu", dtype: str = "float32", passes: int = 1
) -> GRPOConfig:
    """TRL's arguments that mean what `agents.GRPO` does. Where TRL's default is another one, the comment says why."""
    return GRPOConfig(
        output_dir=folder,
        seed=seed,
        # The model, in the same precision and place.
        use_cpu=device == "cpu",
        model_init_kwargs={"dtype": torch.float32},
        bf16=dtype == "bfloat16",  # TRL trains in bf16 by default; here it is fp32
        gradient_checkpointing=False,  # on by default: the same gradient, more slowly
        disable_dropout=True,
        # One rollout of `batch` completions, one optimizer step on all of it, in so many forward passes.
        max_steps=rollouts,
        per_device_train_batch_size=task.batch // passes,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_iterations=1,
        num_generations=task.group_size,
        shuffle_dataset=False,  # the prompts come in the order in which they came on the other side
        # Sampling from the whole distribution.
        max_completion_length=task.env["max_new_tokens"],
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        # The loss of DeepSeekMath: a response's tokens first, then the responses (by default "dapo": all tokens alike).
        loss_type="grpo",
        scale_rewards="group",
        importance_sampling_level="token",
        epsilon=0.2,
        beta=task.kl_coef,
        use_bias_correction_kl=False,  # on by default: k3 times the ratio, whose gradient on-policy is that of k2
        mask_truncated_completions=False,
        reward_weights=task.env.get("reward_weights"),
        # AdamW as in torch; fused by default.
        optim="adamw_torch",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=1.0,
        # Nothing is written or shown; the reward of every step is kept.
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def train_trl(task: Task, rows: list[Row], seed: int) -> Run:
    """As many rollouts with TRL as it takes to answer the prompts in `rows`."""
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
