"""Compare GRPO on a game of several turns with TRL's GRPOTrainer and `environment_factory`.

    pip install -c constraints.txt -e ".[extra,bench]"
    python examples/benchmarks/multiturn.py

The game is a class for TRL's `environment_factory`, `Collect`: a tool takes one to four coins in each of four turns, and the
reward is the share of the coins. It is easy, since it is for comparing trainers. TRL plays it as it is, and this package plays
it through `llm_env.adapters.TRLEnv`. Both use the same chat template (Qwen2.5's, from TRL), model, groups, limits, loss and
optimizer, on one CPU thread in float32. The script first checks that both build the same tokens of an episode. Both sides start
from the same copy of a model that was trained by supervision on random calls, since it has never seen one.

1. Learning: the reward by episodes and by seconds, three seeds.
2. Seconds of a training step by the number of turns, with a larger model.

The sides take turns, so that other load on the machine affects both. The script writes `multiturn.md`, `multiturn.json` and
`multiturn.png` to `outputs/benchmarks`. The files in this folder were made with the command above.
"""

import argparse
import copy
import json
import random
import tempfile
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from transformers.utils import logging

try:
    import trl
    from datasets import Dataset
    from matplotlib.figure import Figure
    from sides import Clock, Notes, Run, Ticks, trl_settings
except ImportError as error:
    raise SystemExit(f"this example needs TRL and matplotlib ({error}): pip install trl datasets matplotlib") from error
from tasks import Task

from agents import GRPO
from llm_env import TextGenerationEnv
from llm_env.adapters import TRLEnv

SIDES = ("here", "TRL")
LARGEST, GAMES = 4, 64
CALL = '<tool_call>\n{"name": "take", "arguments": {"number": N}}\n</tool_call>'
END = "<|im_end|>"
QUESTION = "Take the coins."


class Collect:
    """Coins are collected, up to four a turn; a class for TRL's `environment_factory`."""

    turns = 4

    def reset(self, number: int, **columns: Any) -> None:
        """Begin without coins; the number of the game has no effect."""
        self.taken = self.coins = 0

    def take(self, number: int) -> str:
        """Take coins.

        Args:
            number: How many.

        Returns:
            The coins that were taken.
        """
        if self.taken == self.turns:
            return "over"
        coins = min(max(number, 0), LARGEST)
        self.taken, self.coins = self.taken + 1, self.coins + coins
        return str(coins)

    def get_reward(self) -> float:
        """Return the share of all coins that was taken."""
        return self.coins / (LARGEST * self.turns)


def game_class(turns: int) -> type[Collect]:
    """Return the game with a number of turns."""
    return type("Collect", (Collect,), {"turns": turns})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words and marks, with Qwen2.5's chat template as TRL ships it."""
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    split = pre_tokenizers.Split(Regex(r"<\|?\w+\|?>|</\w+>|\w+|\s+|[^\w\s]"), behavior="isolated")
    special = ["<|endoftext|>", "<|im_start|>", END]
    tools = TRLEnv(Collect, [{"prompt": QUESTION, "number": 1}], "hermes").tools.schemas
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    chat = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": CALL}]
    chat += [{"role": "tool", "name": "take", "content": hint} for hint in ("1", "over", "{'error': '")]
    text = bare.apply_chat_template(chat, tools=tools, tokenize=False, add_generation_prompt=True, chat_template=template)
    words = [word for word, _ in split.pre_tokenize_str(text + "0123456789")]
    pieces = dict.fromkeys([*special, "?", *words, *map(str, range(1, LARGEST + 1))])
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="?"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token="<|endoftext|>",
        unk_token="?",
        additional_special_tokens=special[1:2],
    )
    fast.chat_template = template
    return fast


TOKENIZER = make_tokenizer()
HINTS = (*map(str, range(1, LARGEST + 1)), "over")
CALL_IDS = {n: TOKENIZER(CALL.replace("N", str(n)) + END)["input_ids"] for n in range(1, LARGEST + 1)}
TURN = len(CALL_IDS[1])


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        model: both sides train copies of it.
        turns: number of calls that count; TRL's `max_tool_calling_iterations`. One more turn may follow them.
        batch: episodes of a rollout, which is used for one optimizer step.
        learning_rate: of AdamW.
        group_size: episodes of a game.
    """

    model: LlamaForCausalLM
    turns: int
    batch: int = 64
    learning_rate: float = 3e-4
    group_size: int = 8

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The dataset: the seeds of the games."""
        return [{"prompt": [{"role": "user", "content": QUESTION}], "number": n} for n in range(GAMES)]

    @property
    def max_episode_tokens(self) -> int:
        """Tokens after the prompt: turns with the longest answer, and a last turn."""
        return self.turns * (TURN + max(map(len, ANSWERS.values()))) + TURN


def make_env(setting: Setting) -> TextGenerationEnv:
    """Return this package's env of the game. As in TRL, a turn may be as long as the episode."""
    limits = {"max_new_tokens": setting.max_episode_tokens, "max_episode_tokens": setting.max_episode_tokens}
    return TextGenerationEnv.from_text_env(
        partial(TRLEnv, game_class(setting.turns), setting.rows, "hermes"),
        TOKENIZER,
        num_tasks=GAMES,
        max_turns=setting.turns + 1,
        max_prompt_tokens=512,
        turn_limit="truncate",
        **limits,
    )


def trl_trainer(setting: Setting, rows: list[dict[str, Any]], rollouts: int, seed: int, folder: str) -> Any:
    """Return TRL's trainer of a copy of the model."""
    limits = {"max_new_tokens": setting.max_episode_tokens}
    task = Task("Collect", "", limits, setting.group_size, setting.batch, setting.learning_rate, 0.0, 0, 0.0)
    arguments = trl_settings(task, rollouts, seed, folder)
    arguments.max_tool_calling_iterations, arguments.model_init_kwargs = setting.turns, None
    trainer = trl.GRPOTrainer(
        copy.deepcopy(setting.model),
        None,
        arguments,
        Dataset.from_list(rows),
        processing_class=copy.deepcopy(TOKENIZER),
        environment_factory=game_class(setting.turns),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def make_model(hidden: int, layers: int) -> LlamaForCausalLM:
    """Return a Llama with random weights."""
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": TOKENIZER.eos_token_id, "pad_token_id": TOKENIZER.pad_token_id}
    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), max_position_embeddings=2048, **sizes, **ids))


def read_tokens() -> tuple[list[int], dict[str, list[int]]]:
    """Return the prompt, and what follows a turn by hint, as TRL builds them."""
    setting = Setting(make_model(32, 1), 1)
    question = setting.rows[0]["prompt"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(setting, setting.rows, 1, 0, folder)
    answers = {hint: trainer._get_tool_suffix_ids([{"role": "tool", "name": "take", "content": hint}]) for hint in HINTS}
    rendering = {"tools": trainer.tools, "add_generation_prompt": True, "chat_template": trainer.chat_template}
    prompt = TOKENIZER.apply_chat_template(question, return_dict=False, **rendering)
    return prompt, answers


ANSWERS: dict[str, list[int]] = {"": []}  # what follows a turn, by hint
PROMPT, answers = read_tokens()
ANSWERS.update(answers)


def check_tokens(setting: Setting) -> None:
    """Raise unless this package builds the prompt and the answers that TRL builds."""
    venv = make_env(setting).unwrapped.vectorize(1)
    venv.reset(options={"index": [2]})
    written = [venv.step_responses([CALL_IDS[n]]).observations[0].tolist() for n in (1, 4)]
    game = game_class(setting.turns)()
    game.reset(2)
    said = [game.take(n) for n in (1, 4)]
    if venv.episodes.prompt(0).tolist() != PROMPT or written != [ANSWERS[word] for word in said]:
        raise RuntimeError("the two sides build different tokens")


def warm_up(model: LlamaForCausalLM, turns: int, steps: int) -> LlamaForCausalLM:
    """Train by supervision on random calls.

    Args:
        model: trained in place.
        turns: number of turns.
        steps: optimizer steps, with 16 episodes each.
    """
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        rows = [random_play(draw, turns) for _ in range(16)]
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [TOKENIZER.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def random_play(draw: random.Random, turns: int) -> tuple[list[int], list[int]]:
    """Return the ids of an episode of random calls, and labels: -100 for what the model does not write."""
    game = game_class(turns)()
    game.reset(draw.randrange(1_000_000))
    ids, labels = list(PROMPT), [-100] * len(PROMPT)
    for turn in range(turns + 1):
        number = draw.randint(1, LARGEST)
        written, answer = CALL_IDS[number], ANSWERS[game.take(number)] if turn < turns else []
        ids, labels = [*ids, *written, *answer], [*labels, *written, *[-100] * len(answer)]
    return ids, labels


class GameNotes(Notes):
    """Callback that records the rewards, the numbers and the turns of every rollout."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self.turns: list[float] = []

    def _on_rollout_end(self) -> None:
        infos = self.locals["infos"]
        self.rewards.append(float(np.mean([info["reward/env"] for info in infos])))
        self.numbers += [info["prompt_index"] for info in infos]
        self.turns.append(float(np.mean([info["turns"] for info in infos])))


def train_here(setting: Setting, rollouts: int, seed: int) -> Run:
    """Train with `agents.GRPO`."""
    settings = {"group_size": setting.group_size, "n_envs": setting.batch}
    model = copy.deepcopy(setting.model)
    agent = GRPO(model, make_env(setting), setting.learning_rate, seed=seed, device="cpu", **settings)
    notes, clock = GameNotes(), Clock()
    for _ in range(rollouts):
        agent.learn(1, callback=notes, reset_num_timesteps=False)  # a budget of one token collects one whole rollout
        clock.tick()
    rows = [setting.rows[i] for i in notes.numbers[:: setting.group_size]]
    return Run(notes.rewards, clock.seconds, clock.cpu_seconds, float(np.mean(notes.turns)), rows)


def train_trl(setting: Setting, rows: list[dict[str, Any]], seed: int) -> Run:
    """Train with TRL on the numbers in `rows`, one a group."""
    rollouts = len(rows) * setting.group_size // setting.batch
    ticks = Ticks()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(setting, rows, rollouts, seed, folder)
        trainer.add_callback(ticks)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    turns = float(np.mean([entry["tools/call_frequency"] for entry in logs])) + 1
    return Run([entry["reward"] for entry in logs], ticks.clock.seconds, ticks.clock.cpu_seconds, turns, rows)


def compare(setting: Setting, rollouts: int, seeds: int) -> dict[str, list[Run]]:
    """Train both sides alternately, for every seed."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for seed in range(seeds):
        runs["here"].append(train_here(setting, rollouts, seed))
        runs["TRL"].append(train_trl(setting, runs["here"][-1].rows, seed))
        ends = ", ".join(f"{side} {np.mean(runs[side][-1].rewards[-5:]):.3f}" for side in SIDES)
        print(f"{setting.turns + 1} turns, seed {seed}: reward at the end {ends}", flush=True)
    return runs


def step_seconds(run: Run) -> float:
    """Return the median seconds of a training step, without the first."""
    return float(np.median(np.diff(run.seconds)))


def measure_steps(hidden: int, layers: int, turns: list[int], steps: int, warm_up_steps: int) -> list[dict[str, float]]:
    """Measure a training step of both sides for several numbers of turns; all turns are calls."""
    results = []
    for n in turns:
        model = warm_up(make_model(hidden, layers), n, steps=warm_up_steps)
        runs = compare(Setting(model, n, learning_rate=1e-6), steps + 1, 1)
        entry = {"turns": n + 1, "parameters": sum(p.numel() for p in model.parameters())}
        for side in SIDES:
            (run,) = runs[side]
            entry |= {f"{side} seconds": step_seconds(run), f"{side} CPU seconds": run.cpu_seconds / len(run.seconds)}
            entry[f"{side} turns"] = float(run.exam or 0.0)
        results.append(entry)
    return results


def report(data: dict[str, Any]) -> str:
    """Format the results as Markdown."""
    learning, steps = data["learning"], data["steps"]
    lines = [f"# A game of several turns, here and in TRL\n\n{data['versions']}; one CPU thread, float32.\n"]
    setting = f"{learning['calls'] + 1} turns, {learning['batch']} episodes a rollout in groups of {learning['group_size']}"
    lines.append(
        f"## Learning\n\n{setting}, learning rate {learning['learning_rate']:g}; a model of {learning['parameters']:,} "
        "parameters that was trained on random calls by supervision first, which are paid 0.625. Mean ± standard "
        f"deviation over {learning['seeds']} seeds.\n"
    )
    lines += ["| | here | TRL |", "| --- | --- | --- |"]
    for i, name in enumerate(("first", "second", "third", "last")):
        means = {side: [np.mean(np.array_split(run, 4)[i]) for run in learning[side]["rewards"]] for side in SIDES}
        lines.append(f"| reward, {name} quarter | {spread(means['here'])} | {spread(means['TRL'])} |")
    for name in ("seconds", "CPU seconds"):
        totals = {side: learning[side][name] for side in SIDES}
        lines.append(f"| {name}, total | {np.median(totals['here']):.0f} | {np.median(totals['TRL']):.0f} |")
    lines.append(
        f"\n## Seconds of a training step\n\n{data['batch']} episodes in groups of 8 after a prompt of {len(PROMPT)} tokens, "
        f"{TURN} tokens a turn and {len(ANSWERS['1'])} tokens an answer, in all episodes; a model of "
        f"{steps[0]['parameters']:,} parameters; median of {data['repetitions']} steps.\n"
    )
    lines += ["| turns | here | TRL | ratio | ratio of CPU seconds |", "| ---: | ---: | ---: | ---: | ---: |"]
    for entry in steps:
        ratio, cpu = (entry[f"TRL {name}"] / entry[f"here {name}"] for name in ("seconds", "CPU seconds"))
        seconds = f"{entry['here seconds']:.1f} | {entry['TRL seconds']:.1f}"
        lines.append(f"| {entry['turns']:.0f} | {seconds} | {ratio:.2f} | {cpu:.2f} |")
    return "\n".join([*lines, ""])


def spread(values: list[Any]) -> str:
    """Format mean ± standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else np.nan:.3f}"


def draw(data: dict[str, Any], path: Path) -> None:
    """Plot the reward by episodes and by seconds, and the seconds of a step by turns."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    by_episodes, by_seconds, by_turns = figure.subplots(1, 3)
    for side, colour, style in zip(SIDES, ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
        rewards = np.array(data["learning"][side]["rewards"])
        mean, deviation = rewards.mean(0), rewards.std(0, ddof=min(1, len(rewards) - 1))
        seconds = np.mean(data["learning"][side]["clock"], axis=0)
        for axes, x in ((by_episodes, data["learning"]["batch"] * np.arange(1, len(mean) + 1)), (by_seconds, seconds)):
            axes.plot(x, mean, style, color=colour, label="llm-env" if side == "here" else side)
            axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)
        turns = [entry["turns"] for entry in data["steps"]]
        by_turns.plot(turns, [e[f"{side} seconds"] for e in data["steps"]], style, marker="o", color=colour)
    by_episodes.set(xlabel="episodes", ylabel="reward")
    by_seconds.set(xlabel="seconds", ylabel="reward")
    by_turns.set(xlabel="turns of an episode", ylabel="seconds of a training step", ylim=(0, None), xticks=turns)
    by_episodes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Parse the command line, train, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the learning curves (default 3)")
    parser.add_argument("--rollouts", type=int, default=25, help="rollouts of a learning curve (default 25)")
    parser.add_argument("--steps", type=int, default=3, help="training steps that are timed (default 3)")
    parser.add_argument("--turns", type=int, nargs="+", default=[2, 4, 8], help="turns of the episodes that are timed")
    parser.add_argument("--small", action="store_true", help="a tiny model and little training, to try the script")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="output folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    setting = Setting(warm_up(make_model(64, 2), 4, steps=5 if args.small else 300), 4)
    check_tokens(setting)
    train_trl(setting, setting.rows, 0)  # imports and lazy initialization
    runs = compare(setting, args.rollouts, args.seeds)
    learning: dict[str, Any] = {
        side: {
            "rewards": [run.rewards for run in runs[side]],
            "clock": [run.seconds for run in runs[side]],
            "seconds": [run.seconds[-1] for run in runs[side]],
            "CPU seconds": [run.cpu_seconds for run in runs[side]],
        }
        for side in SIDES
    }
    learning |= {"calls": setting.turns, "batch": setting.batch, "group_size": setting.group_size, "seeds": args.seeds}
    learning |= {"learning_rate": setting.learning_rate, "parameters": sum(p.numel() for p in setting.model.parameters())}
    hidden, layers, warm_up_steps = (64, 2, 5) if args.small else (256, 8, 60)
    steps = measure_steps(hidden, layers, [n - 1 for n in args.turns], args.steps, warm_up_steps)
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    data = {"versions": versions, "learning": learning, "steps": steps, "batch": setting.batch, "repetitions": args.steps}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "multiturn.json").write_text(json.dumps(data, indent=1) + "\n")
    (args.out / "multiturn.md").write_text(report(data))
    draw(data, args.out / "multiturn.png")
    print(report(data))


if __name__ == "__main__":
    main()
