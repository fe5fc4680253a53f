"""Compute memory per GPU and time of a GRPO step for several model sizes.

    python examples/benchmarks/arithmetic.py

The models have 0.5B, 7B and 70B parameters. The script writes `arithmetic.md` to `outputs/benchmarks`. The file in this folder
is its output. All numbers are computed, not measured. The functions below implement the formulas of that page.
`tests/test_arithmetic.py` compares the memory formulas with the sizes of real tensors.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from arithmetic_text import HEAD, MEMORY_HEAD, TIME_HEAD

GB, GPU = 1e9, 80e9
USABLE = 0.9  # share of GPU memory that is usable; the rest is lost to fragmentation
PEAK, MFU = 989e12, 0.4  # dense bfloat16 FLOP/s; share that forward and backward passes reach
HBM, HBM_SHARE = 3.35e12, 0.6  # bytes/s; share that a decoding step reaches
NVLINK, INFINIBAND, LINK_SHARE = 450e9, 400e9, 0.8  # bytes/s per direction: per GPU, per node of 8
PROMPTS, GROUP, PROMPT, NEW = 64, 8, 512, 1024
CHUNK, TABLES = 2**28, 5  # bytes of a chunk of logits; tensors of that size at the peak
RANK = 16  # of the LoRA adapters


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama-like decoder, from its public config.

    Attributes:
        name: name on the Hugging Face hub.
        hidden: hidden size.
        layers: number of layers.
        heads: number of query heads.
        kinds: number of KV heads.
        size: head dimension.
        intermediate: width of the feed-forward network.
        vocabulary: vocabulary size.
        tied: whether input and output embeddings are tied.
        biased: whether the projections to queries, keys and values have biases.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kinds: int
    size: int
    intermediate: int
    vocabulary: int
    tied: bool
    biased: bool

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Input and output sizes of the matrices of a layer."""
        queries, keys = self.heads * self.size, self.kinds * self.size
        mixing = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*mixing, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        """Number of parameters, N: matrices, biases, norms and embeddings."""
        biases = (self.heads + 2 * self.kinds) * self.size * self.biased
        layer = sum(a * b for a, b in self.matrices) + biases + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Parameters used in matrix products, M: all but an untied input embedding."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def adapter(self, rank: int) -> int:
        """Return the LoRA parameters: two matrices for every matrix of every layer."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


MODELS = [
    Model("Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151936, True, True),
    Model("Qwen/Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064, False, True),
    Model("meta-llama/Meta-Llama-3-70B", 8192, 80, 64, 8, 128, 28672, 128256, False, False),
]


def room(new: int) -> int:
    """Return the allocated KV cache length: 64 tokens, doubled whenever it is full."""
    return 64 * 2 ** max(0, (-(-new // 64) - 1).bit_length())


def cache_bytes(model: Model, prompts: int, prompt: int, rows: int, new: int, number: int = 2) -> int:
    """Return the bytes of the KV cache.

    The prompt is cached once per group.

    Args:
        model: the model.
        prompts: number of prompts.
        prompt: tokens per prompt.
        rows: number of responses.
        new: tokens per response.
        number: bytes per number. Default 2 (bfloat16).
    """
    return 2 * model.layers * model.kinds * model.size * (prompts * prompt + rows * room(new)) * number


def activation_bytes(model: Model, positions: int) -> int:
    """Return activation bytes with bfloat16 autocast and gradient checkpointing.

    These are the float32 inputs of all layers, and the activations of one layer. The latter are, per position:

    - float32: inputs and outputs of both norms (4 h);
    - bfloat16: inputs of the matrices (h in attention, h in the feed-forward network, n d for the output projection), queries
      (n d), keys and values (2 k d), and four tensors of the intermediate size f of the feed-forward network.
    """
    h, keys = model.hidden, 2 * model.kinds * model.size
    layer = 4 * 4 * h + 2 * (2 * h + 2 * model.heads * model.size + keys + 4 * model.intermediate)
    return positions * (4 * h * model.layers + layer)


@dataclass(frozen=True)
class Sharding:
    """Placement of a model on S GPUs.

    Attributes:
        name: name in the tables.
        gpus: number of GPUs, S.
        sharded: whether FSDP2 shards everything, so that each GPU holds 1/S. Default False.
        lora: whether LoRA adapters are trained. The reference is then the model without adapters. Default False.
    """

    name: str
    gpus: int
    sharded: bool = False
    lora: bool = False

    def held(self, model: Model) -> dict[str, float]:
        """Return the bytes that each GPU holds permanently, by kind."""
        parts = self.gpus if self.sharded else 1
        trained = model.adapter(RANK) if self.lora else model.parameters
        weights = 4 * (model.parameters + (trained if self.lora else 0))
        reference = 0 if self.lora else 4 * model.parameters
        kinds = {"weights": weights, "gradients": 4 * trained, "moments": 8 * trained, "reference": reference}
        return {name: size / parts for name, size in kinds.items()}

    def working(self, model: Model) -> float:
        """Return the additional bytes per GPU for bfloat16 weights during an update.

        Data parallel: all weights. FSDP2: two layers, the embeddings and one gradient. LoRA: the largest matrix.
        """
        if self.lora and not self.sharded:
            # Autocast casts one matrix at a time.
            return 2 * max(a * b for a, b in [*model.matrices, (model.hidden, model.vocabulary)])
        if not self.sharded:
            return 2 * model.parameters  # cached by autocast
        layer = sum(a * b for a, b in model.matrices)
        return 2 * (2 * layer + (1 if model.tied else 2) * model.vocabulary * model.hidden) + 4 * layer  # plus one gradient

    def update(self, model: Model) -> float:
        """Return the peak bytes per GPU of an update with one group per forward pass."""
        passed = self.working(model) + activation_bytes(model, PROMPT + GROUP * NEW)
        return sum(self.held(model).values()) + passed + TABLES * CHUNK

    def gathered(self, model: Model) -> float:
        """Return the additional bytes per GPU for bfloat16 weights while sampling.

        FSDP2 without LoRA also gathers the reference. LoRA without FSDP2 casts one matrix at a time.
        """
        if self.sharded:
            return 2 * model.parameters * (1 if self.lora else 2)
        return self.working(model) if self.lora else 2 * model.parameters

    def at_a_time(self, model: Model) -> int:
        """Return how many of a GPU's groups fit into its memory at a time while sampling."""
        left = GPU * USABLE - sum(self.held(model).values()) - self.gathered(model)
        return max(0, min(PROMPTS // self.gpus, int(left // cache_bytes(model, 1, PROMPT, GROUP, NEW))))

    def sampling(self, model: Model) -> float:
        """Return the peak bytes per GPU while sampling.

        The number of concurrent groups is the largest that fits, at least one.
        """
        groups = max(1, self.at_a_time(model))
        return sum(self.held(model).values()) + self.gathered(model) + groups * cache_bytes(model, 1, PROMPT, GROUP, NEW)


SHARDINGS = [
    *(Sharding("data parallel", gpus) for gpus in (1, 8, 64)),
    *(Sharding("FSDP2", gpus, sharded=True) for gpus in (8, 64)),
    *(Sharding("LoRA", gpus, lora=True) for gpus in (1, 8, 64)),
    *(Sharding("LoRA, FSDP2", gpus, sharded=True, lora=True) for gpus in (8, 64)),
]


def link(gpus: int) -> float:
    """Return the bandwidth of a ring over the GPUs, in bytes/s."""
    return LINK_SHARE * (NVLINK if gpus <= 8 else INFINIBAND)


def all_reduce(size: float, gpus: int) -> float:
    """Return the seconds of an all-reduce: 2 (S - 1) / S of the bytes pass each GPU."""
    return 2 * (gpus - 1) / gpus * size / link(gpus)


def all_gather(size: float, gpus: int) -> float:
    """Return the seconds of an all-gather or reduce-scatter.

    (S - 1) / S of the bytes pass each GPU.
    """
    return (gpus - 1) / gpus * size / link(gpus)


def seconds(model: Model, sharding: Sharding) -> dict[str, float]:
    """Return the seconds of a GRPO step by phase; `arithmetic.md` has the formulas."""
    groups, gpus = PROMPTS // sharding.gpus, sharding.gpus
    waves = -(-groups // max(1, sharding.at_a_time(model)))
    rows = GROUP * groups / waves
    speed = PEAK * MFU
    # Autocast casts frozen weights for every matrix product: float32 read (4), bfloat16 write (2) and read (2).
    read = (8 if sharding.lora and not sharding.sharded else 2) * model.multiplied
    cached = 4 * model.layers * model.kinds * model.size * (groups / waves * PROMPT + rows * NEW / 2)
    token = max((read + cached) / (HBM * HBM_SHARE), 2 * model.multiplied * rows / speed)
    positions = groups * (PROMPT + GROUP * NEW)
    forward = 2 * model.multiplied * positions / speed
    trained = model.adapter(RANK) if sharding.lora else model.parameters
    passes, moved = groups, 0.0
    if sharding.sharded:
        gather, scatter = all_gather(2 * model.parameters, gpus), all_gather(4 * trained, gpus)
        moved = (1 if sharding.lora else 2) * gather + passes * (2 * gather + scatter)  # sampling and reference, then update
    else:
        moved = all_reduce(4 * trained, gpus)
    return {
        "prompts": 2 * model.multiplied * groups * PROMPT / speed,
        "decoding": waves * NEW * token,
        "reference": forward,
        "update": (3 if sharding.lora else 4) * forward,
        "moving": moved,
    }


def verdict(model: Model, sharding: Sharding) -> str:
    """Return whether update and sampling fit, and with which `max_num_seqs`."""
    groups, limit = sharding.at_a_time(model), GPU * USABLE
    if sharding.update(model) > limit:
        return "no"
    if groups == 0:
        return "update yes, sampling no"
    return "yes" if groups == PROMPTS // sharding.gpus else f"yes, `max_num_seqs={groups * GROUP}`"


def tables(model: Model) -> list[str]:
    """Return the lines of a model's section: sizes, memory table, time table."""
    memory, times = [*MEMORY_HEAD], [*TIME_HEAD]
    for sharding in SHARDINGS:
        held, fits = sharding.held(model), verdict(model, sharding)
        sizes = [*held.values(), sharding.update(model), sharding.gathered(model), sharding.sampling(model)]
        memory.append(f"| {sharding.name} | {sharding.gpus} | {' | '.join(f'{size / GB:.1f}' for size in sizes)} | {fits} |")
        if fits.endswith("no"):
            continue
        parts = seconds(model, sharding)
        cells = " | ".join(f"{part:.3g}" for part in parts.values())
        times.append(f"| {sharding.name} | {sharding.gpus} | {cells} | {sum(parts.values()):.3g} |")
    cache, passed = cache_bytes(model, 1, PROMPT, GROUP, NEW), activation_bytes(model, PROMPT + GROUP * NEW)
    facts = (
        f"N = {model.parameters:,}, M = {model.multiplied:,}, a = {model.adapter(RANK):,}. Per group, the KV cache "
        f"takes {cache / GB:.2f} GB and the activations take {passed / GB:.1f} GB. The logits take "
        f"{TABLES * CHUNK / GB:.1f} GB. A separate critic (PPO) needs the bytes of weights, gradients and moments once more."
    )
    return [
        f"## {model.name}",
        "",
        facts,
        "",
        *memory,
        "",
        *(times if len(times) > len(TIME_HEAD) else ["There is no table of time, because no configuration fits."]),
        "",
    ]


def page() -> str:
    """Return the text of `arithmetic.md`."""
    return "\n".join([HEAD, *(line for model in MODELS for line in tables(model))]).rstrip() + "\n"


def main() -> None:
    """Parse the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="output folder for the page")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "arithmetic.md").write_text(page())
    print(f"saved arithmetic.md in {out}")


if __name__ == "__main__":
    main()
