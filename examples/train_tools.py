"""Teach the packaged pupil when to call a calculator.

    python examples/train_tools.py --seed 0

The pupil adds numbers up to 99. Here it gets sums of numbers with one to three digits and a calculator. A right answer pays 1,
and every call of the calculator costs 0.3: calling it pays where the pupil cannot add, and only there.

A call is written `?123+456`, and the result comes as `>579=`. `ShortFormat` defines both; with an instruct model, the format
of its chat template is used instead.

The script has three parts:

1. GRPO on sums up to 99+99, without the calculator (`llm_env/Addition-v0`).
2. A supervised warm-up, since the pupil has never seen a call. Half of the examples are calls, whatever the size of the
   numbers; the other half are the pupil's own answers, right or wrong. It learns how to call, not when.
3. GRPO with the calculator, on sums of all sizes.

It prints, before and after part 3, how often the pupil calls the calculator and how often it is right, by the number of digits
of the larger number, on sums that it was not trained on. It draws both to `--out`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from stable_baselines3.common.utils import LinearSchedule
from transformers import PreTrainedModel
from transformers.utils import logging

import llm_env
from agents import GRPO
from llm_env.tools import ToolCall, ToolFormat, ToolResult, calculator

COST = 0.3  # of a call
DIGITS = (1, 2, 3)
TRAINED, HELD_OUT = 4000, 200  # sums for each number of digits


class ShortFormat(ToolFormat):
    """Calls of the calculator in a few characters: `?1+2`, answered by `>3=`."""

    def parse(self, text: str) -> tuple[str, list[ToolCall]]:
        """Take a turn that begins with a question mark for a call."""
        if not text.startswith("?"):
            return text, []
        return "", [ToolCall("calculator", {"expression": text[1:]})]

    def observation(self, results: Any, is_chat: bool) -> str:
        """Return the result; an error is `>!=`."""
        result: ToolResult = results[0]
        return ">!=" if result.failed else f">{result.content[:8]}="


def problems(seed: int, count: int) -> list[dict[str, Any]]:
    """Draw `count` sums for each number of digits of the larger number, those of one digit with repetitions."""
    rng = np.random.default_rng(seed)
    rows = []
    for digits in DIGITS:
        for _ in range(count):
            large, small = int(rng.integers(10 ** (digits - 1) - (digits == 1), 10**digits)), 0
            small = int(rng.integers(0, large + 1))
            a, b = (large, small) if rng.random() < 0.5 else (small, large)
            rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b), "digits": digits})
    return rows


def correct(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """1 if the last message is the sum."""
    last = [messages[-1] for messages in completions]
    return [float(m["role"] == "assistant" and m["content"] == a) for m, a in zip(last, answer, strict=True)]


def calls(completions: list[Any], **_: Any) -> list[float]:
    """Return the number of tool calls."""
    return [float(sum(len(message.get("tool_calls", ())) for message in messages)) for messages in completions]


def make_env(rows: list[dict[str, Any]], **settings: Any) -> llm_env.TextGenerationEnv:
    """Make the env: an answer, or a call and an answer."""
    return llm_env.TextGenerationEnv(
        rows,
        [correct, calls],
        llm_env.PUPIL,
        reward_weights=[1.0, -COST],
        tools=[calculator],
        tool_format=ShortFormat(),
        max_turns=3,
        max_prompt_tokens=8,
        max_new_tokens=10,
        max_observation_tokens=10,
        success="correct",
        **settings,
    )


def learn_to_add(seed: int, logs: Path) -> GRPO:
    """Train the pupil on sums up to 99+99."""
    agent = GRPO(llm_env.PUPIL, "llm_env/Addition-v0", seed=seed, n_envs=128, group_size=8, tensorboard_log=str(logs))
    agent.learn(12_000, tb_log_name="adding")
    return agent


def encode(tokenizer: Any, examples: list[list[tuple[str, bool]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode examples, lists of texts with whether the model says them; return `input_ids` and `labels`."""
    rows = []
    for parts in examples:
        ids: list[int] = []
        labels: list[int] = []
        for text, is_said in parts:
            tokens = tokenizer.encode(text) + [tokenizer.eos_token_id] * is_said
            ids += tokens
            labels += tokens if is_said else [-100] * len(tokens)
        rows.append((ids, labels))
    width = max(len(ids) for ids, _ in rows)
    inputs = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]
    return torch.tensor(inputs), torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])


def warm_up(agent: GRPO, rows: list[dict[str, Any]], steps: int, seed: int) -> PreTrainedModel:
    """Train the agent's model on calls and on its own answers, in equal parts; return it."""
    env = make_env(rows[:1])
    tokenizer = env.rules.tokenizer
    own = agent.generate([row["prompt"] for row in rows], max_new_tokens=6)
    calling, answering = [], []
    for row, answer in zip(rows, own, strict=True):
        prompt = (row["prompt"], False)
        calling.append([prompt, (f"?{row['prompt'][:-1]}", True), (f">{row['answer']}=", False), (row["answer"], True)])
        answering.append([prompt, (answer, True)])
    sets = [encode(tokenizer, examples) for examples in (calling, answering)]
    model = agent.policy.lm.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        chosen = torch.randint(len(rows), (64,), generator=generator)
        losses, count = [], 0
        for inputs, targets in sets:
            labels = targets[chosen, 1:].flatten()
            logits = model(input_ids=inputs[chosen, :-1]).logits.flatten(0, 1)
            losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels >= 0).sum())
        loss = sum(losses) / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"warm-up step {step}: loss {loss.item():.3f}", flush=True)
    return model.eval()


def examine(agent: GRPO) -> dict[str, list[float]]:
    """Return the share of problems with a call and of right answers, by number of digits; answers are sampled."""
    found: dict[str, list[float]] = {"calls": [], "correct": []}
    rows = problems(1_000_000, HELD_OUT)
    for digits in DIGITS:
        result = agent.evaluate(make_env([row for row in rows if row["digits"] == digits]), deterministic=False)
        found["calls"].append(result["reward/calls"])
        found["correct"].append(result["success_rate"])
    return found


def draw(before: dict[str, list[float]], after: dict[str, list[float]], path: Path) -> None:
    """Draw both exams as bars by number of digits."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, constrained_layout=True)
    places = np.arange(len(DIGITS))
    for axis, key, title in zip(axes, ("calls", "correct"), ("Calls of the calculator", "Right answers"), strict=True):
        axis.bar(places - 0.2, before[key], 0.38, label="after the warm-up", color="#b0b7c3")
        axis.bar(places + 0.2, after[key], 0.38, label="after GRPO", color="#2a6f97")
        axis.set(title=title, xlabel="digits of the larger number", xticks=places, xticklabels=DIGITS, ylim=(0, 1.08))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="upper left", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train and examine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", type=int, default=1200, help="supervised steps (default 1200)")
    parser.add_argument("--timesteps", type=int, default=300_000, help="budget of part 3, in action tokens (default 300000)")
    parser.add_argument("--logs", type=Path, default=Path("runs"), help="folder for TensorBoard logs (default runs)")
    parser.add_argument("--out", type=Path, default=Path("outputs/tools.png"), help="the figure (default outputs/tools.png)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()

    rows = problems(arguments.seed, TRAINED)
    adder = learn_to_add(arguments.seed, arguments.logs)
    accuracy = adder.evaluate(gym.make("llm_env/Addition-v0", split="test"))["success_rate"]
    print(f"sums up to 99+99: {accuracy:.3f} right. Warm-up ...", flush=True)
    model = warm_up(adder, rows, arguments.warm_up, arguments.seed)
    agent = GRPO(
        model,
        make_env(rows),
        group_size=8,
        n_envs=256,
        learning_rate=LinearSchedule(3e-4, 3e-5, end_fraction=1.0),
        seed=arguments.seed,
        tensorboard_log=str(arguments.logs),
    )
    before = examine(agent)
    start = time.monotonic()
    agent.learn(arguments.timesteps, tb_log_name="tools")
    after = examine(agent)
    print(f"\n{'digits':>24}{''.join(f'{digits:>8}' for digits in DIGITS)}")
    for name, exam in (("before", before), ("after", after)):
        for key in ("calls", "correct"):
            print(f"{f'{name}: {key}':>24}{''.join(f'{share:>8.2f}' for share in exam[key])}")
    print(f"\n{time.monotonic() - start:.0f} s of GRPO on {agent.num_timesteps} tokens\n")
    for prompt in ("34+57=", "345+678="):
        print(agent.play(make_env([{"prompt": prompt, "answer": str(calculator(prompt[:-1])), "digits": 0}])))
    draw(before, after, arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
