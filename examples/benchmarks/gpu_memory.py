"""Compute what fits on one GPU: memory of a rollout and of an update, for several models, ways of training and cards.

    python examples/benchmarks/gpu_memory.py

The models have 0.5B, 1.5B and 7B parameters, the cards 24, 80 and 141 GB. All numbers are computed with the formulas of
`arithmetic.md` and the sizes that hold on a GPU; a line below the table compares them with `gpu.md`, which was measured.
`agent.audit()` prints what an agent's own weights, gradients, optimizer state, reference and copy take. The script writes
`gpu_memory.md` to `outputs/benchmarks`.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from arithmetic import GB, GROUP, MODELS, NEW, PROMPT, PROMPTS, RANK, USABLE, Model, activation_bytes

CARDS = (24, 80, 141)  # GB
LOGITS = 2**31  # bytes: logits of a chunk and their gradient in bfloat16, `llm_env.lm.scoring.CHUNK_BYTES_CUDA` / 2 each
FIRST = 256  # tokens for which the cache of responses is first allocated; see `agents.sampling.shared_prefix.BLOCK_GRAPH`

SIZES = [MODELS[0], Model("Qwen/Qwen2.5-1.5B", 1536, 28, 12, 2, 128, 8960, 151936, True, True), MODELS[1]]


@dataclass(frozen=True)
class Training:
    """A way to train on one GPU, with `bf16=True`.

    Attributes:
        name: in the table.
        lora: whether adapters of rank 16 are trained, and the reference is the base.
        moments: bytes of the optimizer's state a trained weight.
    """

    name: str
    lora: bool = False
    moments: float = 8

    def held(self, model: Model) -> float:
        """Return the bytes that are held at all times.

        Float32 weights, gradients, optimizer state and reference, and the bfloat16 copy to sample with.
        """
        total = model.parameters + (model.adapter(RANK) if self.lora else 0)
        trained = model.adapter(RANK) if self.lora else model.parameters
        return (4 + 2) * total + (4 + self.moments) * trained + (0 if self.lora else 4 * model.parameters)

    def update(self, model: Model) -> float:
        """Return the peak bytes of an update: one group a pass, with gradient checkpointing.

        Autocast keeps its own bfloat16 weights during a pass; of frozen ones, one matrix at a time.
        """
        largest = max(a * b for a, b in [*model.matrices, (model.hidden, model.vocabulary)])
        cast = 2 * (largest if self.lora else model.parameters)
        return self.held(model) + cast + activation_bytes(model, PROMPT + GROUP * NEW) + LOGITS

    def groups(self, model: Model, card: float) -> int:
        """Return how many groups can be sampled at a time."""
        left = card * GB * USABLE - self.held(model)
        return max(0, min(PROMPTS, int(left // group_bytes(model, PROMPT, GROUP, NEW))))


WAYS = [Training("full"), Training("full, `adamw_8bit`", moments=2 * (1 + 4 / 256)), Training("LoRA", lora=True)]


def group_bytes(model: Model, prompt: int, group: int, new: int) -> float:
    """Return the bytes of a group while it is sampled: its cache and its logits.

    The cache of the responses doubles when it is full, and the old one is held while it is copied, layer by layer.
    """
    width = FIRST * 2 ** max(0, (-(-new // FIRST) - 1).bit_length())
    cache = 4 * model.layers * model.kinds * model.size * (prompt + group * width)
    return cache + 4 * group * model.vocabulary


def page() -> str:
    """Return the text of `gpu_memory.md`."""
    lines = []
    for model in SIZES:
        for way in WAYS:
            cells = [f"{way.held(model) / GB:.1f}", f"{way.update(model) / GB:.1f}"]
            for card in CARDS:
                groups = way.groups(model, card)
                fits = way.update(model) <= card * GB * USABLE and groups > 0
                limit = "" if groups >= PROMPTS else f", `max_num_seqs={groups * GROUP}`"
                cells.append(f"yes{limit}" if fits else "no")
            name = model.name.split("/")[1]
            lines.append(f"| {name} | {way.name} | {' | '.join(cells)} |")
    half = SIZES[0]
    sampling = (4 + 4 + 2) * half.parameters + 64 * group_bytes(half, 256, 8, 512)
    return f"""# Memory on one GPU

**Computed, not measured** (`gpu_memory.py`), with the formulas of [arithmetic.md](arithmetic.md). Memory is in GB (10^9 bytes).
A rollout has {PROMPTS} prompts of {PROMPT} tokens with {GROUP} responses of {NEW} tokens each; an update has one group in a
pass (`max_tokens_per_batch={PROMPT + GROUP * NEW}`), `bf16=True`, `gradient_checkpointing=True` and a reference. "Held" are
float32 weights, gradients, the optimizer's state, the reference (with LoRA, the base is the reference) and the bfloat16 copy of
the weights that responses are sampled with. A configuration fits if update and sampling need at most {USABLE:.0%} of the card;
`max_num_seqs` is given where not all {PROMPTS * GROUP} responses can be sampled at a time.

| model | training | held | update | {" | ".join(f"{card} GB" for card in CARDS)} |
| :--- | :--- | ---: | ---: | {" | ".join(":---" for _ in CARDS)} |
{chr(10).join(lines)}

In [gpu.md](gpu.md), decoding with the 0.5B model (64 prompts of 256 tokens, 8 responses of 512 tokens, with a reference, no
gradients yet) was measured to take 9.2 GB at its peak; these formulas give {sampling / GB:.1f} GB.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="output folder for the page")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu_memory.md").write_text(page())
    print(f"saved gpu_memory.md in {out}")


if __name__ == "__main__":
    main()
