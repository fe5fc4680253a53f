"""Pretrain the packaged pupil model from random weights.

    python examples/pretrain_pupil.py --out llm_env/pupil

The pupil is a Llama of one million parameters with a character tokenizer. It is pretrained on additions of 0..99 + 0..99.
If a problem has a carry, 60% of its training answers omit it (57+68=15 instead of 125): 63% if both numbers have two digits,
40% if one has a single digit. Greedy answers are therefore correct on four of ten problems: those without a carry and those
with a single-digit number. Sampled answers with and without the carry occur for all problems that have one. Pretraining uses
no reward. Reinforcement learning later decides which of the two kinds of answers is correct.

A tenth of the problems is held out, chosen by a hash of their text (the `test` split of `llm_env/Addition-v0`). The run is
seeded and takes about half an hour on one slow core.
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_env.prompts import split_of

FORGETS, FORGETS_EASY = 0.63, 0.40  # probability of omitting the carry; 60% of all problems with a carry
CHARACTERS = ["\n", *map(chr, range(32, 127))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Create a character tokenizer for newline and printable ASCII.

    The first three tokens are `<pad>`, `<eos>` and `<unk>`.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Create a Llama of 1.06M parameters with head dimension 32 and tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def without_carry(a: int, b: int) -> int:
    """Add tens and units separately, each modulo 10, without a carry: 57 + 68 -> 15."""
    return (a // 10 + b // 10) % 10 * 10 + (a % 10 + b % 10) % 10


def encode_all(tokenizer: PreTrainedTokenizerFast, width: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode every training problem, with the correct answer and without the carry.

    Returns:
        `input_ids` and `labels`, (problems, 2, width), and the probability of the answer without carry, (problems,).
        Row 0 is the correct answer, row 1 the answer without carry. Labels are -100 outside the answer and its end token.
    """
    inputs, labels = [], []
    problems = [(a, b) for a in range(100) for b in range(100) if split_of(f"{a}+{b}=") == "train"]
    for a, b in problems:
        prompt = tokenizer.encode(f"{a}+{b}=")
        for answer in (a + b, without_carry(a, b)):
            target = [*tokenizer.encode(str(answer)), tokenizer.eos_token_id]
            padding = width - len(prompt) - len(target)
            inputs.append([*prompt, *target, *[tokenizer.pad_token_id] * padding])
            labels.append([*[-100] * len(prompt), *target, *[-100] * padding])
    shape = (len(problems), 2, width)
    forgetting = torch.tensor([FORGETS_EASY if min(a, b) < 10 else FORGETS for a, b in problems])
    return torch.tensor(inputs).view(shape), torch.tensor(labels).view(shape), forgetting


def pretrain(out: Path, seed: int, steps: int) -> None:
    """Pretrain the pupil; save model and tokenizer to `out`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # faster than two threads for a model of this size
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    inputs, labels, forgetting = encode_all(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    start = time.monotonic()
    for step in range(1, steps + 1):
        problem = torch.randint(len(inputs), (256,))
        forgets = (torch.rand(256) < forgetting[problem]).long()
        # With right padding and a causal mask, no answer token attends to padding: no attention mask is needed.
        logits = model(input_ids=inputs[problem, forgets, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[problem, forgets, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - start:5.0f} s", flush=True)
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="output folder for weights, config and tokenizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    pretrain(arguments.out, arguments.seed, arguments.steps)
