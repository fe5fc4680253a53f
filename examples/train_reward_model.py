"""Train a reward model on preference pairs with the Bradley-Terry loss.

    python examples/train_reward_model.py --seed 0

The packaged pupil samples two answers per prompt. A judge that knows the true reward prefers one of them. A classifier with
one logit, initialized from the pupil, is trained on these pairs only. The loss of a pair is
-log sigmoid(r_chosen - r_rejected) (Bradley & Terry 1952; for language models Ouyang et al. 2022, arXiv 2203.02155).

The script prints the accuracy on held-out pairs and saves the model to `outputs/reward_model`. Load it with
`llm_env.RewardModel` or `AutoModelForSequenceClassification.from_pretrained`.

    python examples/train_reward_model.py --data pairs.jsonl --model MODEL_DIR

trains any base model on your own pairs. Each line of the file is an object with `prompt`, `chosen` and `rejected`.
"""

import argparse
import random
import time
from operator import gt
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

import llm_env
from agents import LanguagePolicy
from llm_env import RewardModel
from llm_env.prompts import Row, read_jsonl, split_of
from llm_env.rewards import exact_match
from llm_env.tasks.addition import AdditionProblems

Pair = dict[str, str]
KEYS = ("prompt", "chosen", "rejected")
HELD_OUT = 500


class Judge:
    """Judge that labels pairs of the pupil's answers by the true reward.

    The true reward is 1 if the answer is correct, else 0. The reward model sees only the preferences.

    Args:
        seed: random seed for the choice of problems and for sampling from the pupil.
        split: split of the problems, `"train"` or `"test"`. Default `"train"`.
    """

    def __init__(self, seed: int, split: str = "train") -> None:
        problems = AdditionProblems()
        rows = [problems[i] for i in range(len(problems))]
        self._rows = [row for row in rows if split_of(row["prompt"]) == split]
        self._random = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._pupil = LanguagePolicy(llm_env.PUPIL)

    def answers(self, count: int) -> tuple[list[Row], list[str], list[str]]:
        """Choose problems at random and sample two answers of the pupil to each."""
        rows = self._random.sample(self._rows, count)
        prompts = self._pupil.tokenizer([row["prompt"] for row in rows])["input_ids"]
        responses, _ = self._pupil.sample(prompts, group_size=2, max_new_tokens=8, generator=self._generator)
        texts = self._pupil.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return rows, texts[::2], texts[1::2]

    def pairs(self, count: int) -> list[Pair]:
        """Return preference pairs; skip problems whose two answers have equal reward."""
        pairs: list[Pair] = []
        while len(pairs) < count:
            rows, first, second = self.answers(256)
            right = [row["answer"] for row in rows]
            goodness = zip(exact_match(first, answer=right), exact_match(second, answer=right), strict=True)
            for row, one, other, (good, better) in zip(rows, first, second, goodness, strict=True):
                if good != better:
                    chosen, rejected = (one, other) if good > better else (other, one)
                    pairs.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
        return pairs[:count]


def read_pairs(path: Path) -> list[Pair]:
    """Read preference pairs from a `.jsonl` file.

    Raises:
        ValueError: If `prompt`, `chosen` or `rejected` of a row is missing or not a string.
    """
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        for key in KEYS:
            if not isinstance(row.get(key), str):
                raise ValueError(f"{path}:{number} has {key}={row.get(key)!r}; prompt, chosen and rejected must be strings")
    return rows


def split_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training pairs and about a tenth of held-out pairs.

    The split depends on a hash of the prompt. No prompt occurs in both splits.

    Raises:
        ValueError: If one of the splits is empty.
    """
    sides = [[pair for pair in pairs if split_of(pair["prompt"]) == side] for side in ("train", "test")]
    if not all(sides):
        raise ValueError(
            f"{len(sides[1])} of {len(pairs)} pairs are held out (by a hash of the prompt), but training and held-out pairs "
            "must both be at least 1. Add pairs with other prompts."
        )
    return sides[0], sides[1]


def scored_together(pairs: list[Pair]) -> tuple[list[str], list[str]]:
    """Return prompts and completions of a batch: all chosen, then all rejected."""
    return [p["prompt"] for p in pairs] * 2, [p["chosen"] for p in pairs] + [p["rejected"] for p in pairs]


def train(
    base: str, pairs: list[Pair], seed: int, epochs: int = 4, learning_rate: float = 3e-4, batch_size: int = 64
) -> RewardModel:
    """Train a reward model with the Bradley-Terry loss, without dropout.

    Args:
        base: path or hub id of a causal language model or of a classifier with one label.
        pairs: preference pairs.
        seed: random seed for the initial weights of the head and for the order of the pairs.
        epochs: number of passes over the pairs. Default 4.
        learning_rate: initial learning rate of AdamW; decreases to 0. Default 3e-4.
        batch_size: pairs per optimizer step. Default 64.
    """
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).eval()
    reward = RewardModel(model, base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * -(-len(pairs) // batch_size))
    for _ in range(epochs):
        order = torch.randperm(len(pairs)).tolist()
        for begin in range(0, len(order), batch_size):
            chosen, rejected = reward.logits(*scored_together([pairs[i] for i in order[begin : begin + batch_size]])).chunk(2)
            loss = -logsigmoid(chosen - rejected).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return reward


def accuracy(reward: RewardModel, pairs: list[Pair]) -> float:
    """Return the share of pairs whose chosen answer has the higher score."""
    scores = reward(*scored_together(pairs))
    return sum(map(gt, scores[: len(pairs)], scores[len(pairs) :])) / len(pairs)


def main() -> None:
    """Parse the command line, create or read pairs, train and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=".jsonl file of preference pairs (default: pairs of the pupil's answers)")
    parser.add_argument("--pairs", type=int, default=1000, help="number of training pairs without --data (default 1000)")
    parser.add_argument("--model", default=llm_env.PUPIL, help="base model (default the packaged pupil)")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/reward_model"), help="folder for the reward model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more threads are slower for a model of this size
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # transformers warns that the head has new weights, which is intended

    if arguments.data is not None:
        pairs, held_out = split_pairs(read_pairs(arguments.data))
    else:
        pairs = Judge(arguments.seed).pairs(arguments.pairs)
        held_out = Judge(arguments.seed, "test").pairs(HELD_OUT)
    start = time.monotonic()
    reward = train(arguments.model, pairs, arguments.seed, arguments.epochs, arguments.learning_rate)
    seconds = time.monotonic() - start
    print(f"{'prompt':12}  {'chosen':12}  {'rejected':12}  reward of chosen, rejected")
    for pair in held_out[:5]:
        scores = reward([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]])
        print(*(f"{pair[key][:12]!r:14}" for key in KEYS), f"{scores[0]:6.2f} {scores[1]:6.2f}", sep="")
    print(
        f"accuracy on pairs: {accuracy(reward, pairs):.3f} of the {len(pairs)} trained on, "
        f"{accuracy(reward, held_out):.3f} of {len(held_out)} held out, after {seconds:.0f} s"
    )
    reward.model.save_pretrained(arguments.out)
    reward.tokenizer.save_pretrained(arguments.out)
    print(f"saved {arguments.out} (llm_env.RewardModel, or AutoModelForSequenceClassification.from_pretrained)")


if __name__ == "__main__":
    main()
