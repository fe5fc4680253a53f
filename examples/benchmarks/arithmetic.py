"""Memory per GPU and time of a GRPO step for models of 0.5, 7 and 70 billion parameters: computed, not measured.

    python examples/benchmarks/arithmetic.py

writes `arithmetic.md` into `outputs/benchmarks`; the one in this folder is its output. The functions below are the formulas
that the page states; `tests/test_arithmetic.py` compares those of memory with tensors that are really there.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from arithmetic_text import HEAD, MEMORY_HEAD, TIME_HEAD

GB, GPU = 1e9, 80e9
USABLE = 0.9  # of a GPU: allocators lose some of it between the pieces
PEAK, MFU = 989e12, 0.4  # FLOP/s in bfloat16, dense; the share of them that a pass gets
HBM, HBM_SHARE = 3.35e12, 0.6  # bytes/s; likewise, for a step of decoding
NVLINK, INFINIBAND, LINK_SHARE = 450e9, 400e9, 0.8  # bytes/s in one direction of a GPU, and of a node of eight
PROMPTS, GROUP, PROMPT, NEW = 64, 8, 512, 1024
CHUNK, TABLES = 2**28, 5  # bytes of logits at a time, and how many tables of that size there are at the peak
RANK = 16


@dataclass(frozen=True)
class Model:
    """A decoder of Llama's kind, by its public config.

    Attributes:
        name: on the hub.
        hidden, layers, heads, kinds, size, intermediate, vocabulary: widths and counts; `kinds` are the heads of keys and
            values, `size` is a head's.
        tied: whether the output embedding is the input's.
        biased: whether queries, keys and values have biases.
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
        """Inputs and outputs of a layer's matrices."""
        queries, keys = self.heads * self.size, self.kinds * self.size
        mixing = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*mixing, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def parameters(self) -> int:
        """N: matrices, biases, norms and embeddings."""
        biases = (self.heads + 2 * self.kinds) * self.size * self.biased
        layer = sum(a * b for a, b in self.matrices) + biases + 2 * self.hidden
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but an input embedding of its own."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def adapter(self, rank: int) -> int:
        """Parameters of LoRA's two matrices beside every matrix of every layer."""
        return self.layers * rank * sum(a + b for a, b in self.matrices)


MODELS = [
    Model("Qwen/Qwen2.5-0.5B", 896, 24, 14, 2, 64, 4864, 151936, True, True),
    Model("Qwen/Qwen2.5-7B", 3584, 28, 28, 4, 128, 18944, 152064, False, True),
    Model("meta-llama/Meta-Llama-3-70B", 8192, 80, 64, 8, 128, 28672, 128256, False, False),
]


def room(new: int) -> int:
    """Tokens of a response for which decoding has room: 64, and twice as many whenever they are full."""
    return 64 * 2 ** max(0, (-(-new // 64) - 1).bit_length())


def cache_bytes(model: Model, prompts: int, prompt: int, rows: int, new: int, number: int = 2) -> int:
    """Return keys and values of prompts, once for a group, and of `new` tokens of each response; `number` bytes each."""
    return 2 * model.layers * model.kinds * model.size * (prompts * prompt + rows * room(new)) * number


def activation_bytes(model: Model, positions: int) -> int:
    """Under bfloat16 and gradient checkpointing: the inputs of all layers, float32, and what one layer keeps.

    That is of a position, in numbers: float32 the two inputs and outputs of the norms (4 h); bfloat16 the inputs of the
    matrices (2 h in attention, 2 h in the feed-forward network, of which 1 h is attention's output), queries, keys and values,
    and four of the feed-forward network's width.
    """
    h, keys = model.hidden, 2 * model.kinds * model.size
    layer = 4 * 4 * h + 2 * (2 * h + 2 * model.heads * model.size + keys + 4 * model.intermediate)
    return positions * (4 * h * model.layers + layer)


@dataclass(frozen=True)
class Sharding:
    """How a model lies on S GPUs.

    Attributes:
        name: for the tables.
        gpus: S.
        sharded: FSDP2; each GPU holds 1/S of all that is held.
        lora: adapters are trained, and the reference is the model without them.
    """

    name: str
    gpus: int
    sharded: bool = False
    lora: bool = False

    def held(self, model: Model) -> dict[str, float]:
        """Return bytes on each GPU by what they are, all the time."""
        parts = self.gpus if self.sharded else 1
        trained = model.adapter(RANK) if self.lora else model.parameters
        weights = 4 * (model.parameters + (trained if self.lora else 0))
        reference = 0 if self.lora else 4 * model.parameters
        kinds = {"weights": weights, "gradients": 4 * trained, "moments": 8 * trained, "reference": reference}
        return {name: size / parts for name, size in kinds.items()}

    def working(self, model: Model) -> float:
        """Bytes of weights in bfloat16 beside those held, during an update: all, or (FSDP2) two layers and the embeddings."""
        if self.lora and not self.sharded:
            return 2 * max(a * b for a, b in [*model.matrices, (model.hidden, model.vocabulary)])  # cast for each product
        if not self.sharded:
            return 2 * model.parameters  # autocast keeps them
        layer = sum(a * b for a, b in model.matrices)
        return 2 * (2 * layer + (1 if model.tied else 2) * model.vocabulary * model.hidden) + 4 * layer  # and a gradient

    def update(self, model: Model) -> float:
        """Return bytes on each GPU at the peak of an update, one group at a time."""
        passed = self.working(model) + activation_bytes(model, PROMPT + GROUP * NEW)
        return sum(self.held(model).values()) + passed + TABLES * CHUNK

    def gathered(self, model: Model) -> float:
        """Return bytes of weights in bfloat16 beside those held, while sampling: all; sharded, those of a second model too."""
        if self.sharded:
            return 2 * model.parameters * (1 if self.lora else 2)
        return self.working(model) if self.lora else 2 * model.parameters

    def at_a_time(self, model: Model) -> int:
        """Groups for whose cache there is room while sampling, of those that a GPU has."""
        left = GPU * USABLE - sum(self.held(model).values()) - self.gathered(model)
        return max(0, min(PROMPTS // self.gpus, int(left // cache_bytes(model, 1, PROMPT, GROUP, NEW))))

    def sampling(self, model: Model) -> float:
        """Return bytes on each GPU while sampling, with as many groups at a time as there is room for, or one."""
        groups = max(1, self.at_a_time(model))
        return sum(self.held(model).values()) + self.gathered(model) + groups * cache_bytes(model, 1, PROMPT, GROUP, NEW)


SHARDINGS = [
    *(Sharding("data parallel", gpus) for gpus in (1, 8, 64)),
    *(Sharding("FSDP2", gpus, sharded=True) for gpus in (8, 64)),
    *(Sharding("LoRA", gpus, lora=True) for gpus in (1, 8, 64)),
    *(Sharding("LoRA, FSDP2", gpus, sharded=True, lora=True) for gpus in (8, 64)),
]


def link(gpus: int) -> float:
    """Bytes/s that a ring over the GPUs moves."""
    return LINK_SHARE * (NVLINK if gpus <= 8 else INFINIBAND)


def all_reduce(size: float, gpus: int) -> float:
    """Seconds: 2 (S - 1) / S of the bytes pass each GPU."""
    return 2 * (gpus - 1) / gpus * size / link(gpus)


def all_gather(size: float, gpus: int) -> float:
    """Seconds, and those of a reduce-scatter: (S - 1) / S of the bytes pass each GPU."""
    return (gpus - 1) / gpus * size / link(gpus)


def seconds(model: Model, sharding: Sharding) -> dict[str, float]:
    """Of a step, by what it does; see the page."""
    groups, gpus = PROMPTS // sharding.gpus, sharding.gpus
    waves = -(-groups // max(1, sharding.at_a_time(model)))
    rows = GROUP * groups / waves
    speed = PEAK * MFU
    # Weights that are not trained are cast for every product: read, written and read again.
    read = (8 if sharding.lora and not sharding.sharded else 2) * model.multiplied
    cached = 4 * model.layers * model.kinds * model.size * (groups / waves * PROMPT + rows * NEW / 2)
    token = max((read + cached) / (HBM * HBM_SHARE), 2 * model.multiplied * rows / speed)
    positions = groups * (PROMPT + GROUP * NEW)
    forward = 2 * model.multiplied * positions / speed
    trained = model.adapter(RANK) if sharding.lora else model.parameters
    passes, moved = groups, 0.0
    if sharding.sharded:
        gather, scatter = all_gather(2 * model.parameters, gpus), all_gather(4 * trained, gpus)
        moved = (1 if sharding.lora else 2) * gather + passes * (2 * gather + scatter)  # sampling, the reference; update
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
    """Return whether it fits, and with what."""
    groups, limit = sharding.at_a_time(model), GPU * USABLE
    if sharding.update(model) > limit:
        return "no"
    if groups == 0:
        return "update yes, sampling no"
    return "yes" if groups == PROMPTS // sharding.gpus else f"yes, `max_num_seqs={groups * GROUP}`"


def tables(model: Model) -> list[str]:
    """Memory and time of a model."""
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
        f"N = {model.parameters:,}, M = {model.multiplied:,}, a = {model.adapter(RANK):,}. The cache of a group takes "
        f"{cache / GB:.2f} GB, its activations {passed / GB:.1f} GB and the logits {TABLES * CHUNK / GB:.1f} GB. A separate "
        "critic (PPO) adds as much again as weights, gradients and moments."
    )
    return [
        f"## {model.name}",
        "",
        facts,
        "",
        *memory,
        "",
        *(times if len(times) > len(TIME_HEAD) else ["No time is given, since nothing fits."]),
        "",
    ]


def page() -> str:
    """Return all of it."""
    return "\n".join([HEAD, *(line for model in MODELS for line in tables(model))]).rstrip() + "\n"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder for the page")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    (out / "arithmetic.md").write_text(page())
    print(f"saved arithmetic.md in {out}")


if __name__ == "__main__":
    main()
