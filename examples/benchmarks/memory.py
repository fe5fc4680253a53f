"""Peak memory and time of one update by GRPO, for each keyword that saves memory, alone and together.

    pip install -c constraints.txt -e ".[8bit]"
    python examples/benchmarks/memory.py

A Llama of 7.3 million random weights has answered 4 prompts of 256 tokens with 8 responses of 64 tokens each; all keywords
learn from the same episodes, with GRPO's loss, a KL and one optimizer step. What is held between two updates (weights,
reference, optimizer's state) is counted tensor by tensor, after an update, and what an update needs besides (gradients,
activations, logits) is `peak.peak_bytes`: on CUDA by its allocator, on a CPU by torch's profiler. The updates
of all keywords take turns, so that what else the machine does falls on all of them; the first turn does not count.

The table is left in `outputs/benchmarks`; the one in this folder is of the defaults.
"""

import argparse
import copy
import os
import platform
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peak import peak_bytes
from speed_parts.work import BETA, LEARNING_RATE, Work, build, even_words
from stable_baselines3.common.logger import configure
from torch import Tensor

from agents import GRPO
from agents.rollout import Rollout
from llm_env import TextGenerationEnv
from llm_env.reference import Reference

SMALL = {"gradient_checkpointing": True, "optimizer": "adamw_8bit"}
ROWS: list[dict[str, Any]] = [
    {},
    {"bf16": True},
    {"gradient_checkpointing": True},
    {"optimizer": "adamw_8bit"},
    SMALL,
    {"bf16": True, **SMALL},
]
MB = 2**20


@dataclass
class Measured:
    """One set of keywords.

    Attributes:
        keywords: of the agent.
        weights, reference, optimizer: bytes on the device between two updates.
        update: bytes that an update takes besides, at its peak.
        seconds, cpu_seconds: of the updates that count.
    """

    keywords: dict[str, Any]
    weights: int = 0
    reference: int = 0
    optimizer: int = 0
    update: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes of all, at the peak of an update."""
        return self.weights + self.reference + self.optimizer + self.update

    @property
    def name(self) -> str:
        """The keywords as they are written."""
        return ", ".join(f"{key}={value!r}" for key, value in self.keywords.items()) or "(none)"


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompt", 256), ("group", 8), ("new-tokens", 64), ("problems", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocabulary", 4096), ("hidden", 256), ("layers", 6), ("heads", 4), ("intermediate", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3, help="turns that count")
    parser.add_argument("--threads", type=int, default=1, help="of torch; small models are faster on one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="folder for the table")
    return parser.parse_args()


def make_agent(work: Work, keywords: dict[str, Any]) -> GRPO:
    """Return an agent that writes its logs nowhere."""
    env = TextGenerationEnv(
        work.texts(),
        even_words,
        work.model,
        max_prompt_tokens=work.prompt,
        max_new_tokens=work.new_tokens,
        reference=Reference(work.model),
    )
    settings = {"group_size": work.group, "n_envs": work.batch, "kl_coef": BETA, "learning_rate": LEARNING_RATE}
    agent = GRPO(work.model, env, seed=0, device=work.device, preflight=False, **settings, **keywords)
    agent.set_logger(configure(format_strings=[]))
    return agent


def bytes_on(device: torch.device, tensors: list[Tensor]) -> int:
    """Of the memory behind some tensors, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type}
    return sum(storages.values())


def measure_memory(agent: GRPO, rollout: Rollout, measured: Measured) -> None:
    """Fill in the bytes."""
    assert agent.rules.reference is not None
    agent.policy.zero_grad()
    states = [value for state in agent.policy.optimizer.state.values() for value in state.values()]
    reference = agent.rules.reference.model
    count = partial(bytes_on, agent.device)
    measured.weights = count([*agent.policy.parameters(), *agent.policy.buffers()])
    measured.reference = count([*reference.parameters(), *reference.buffers()])
    measured.optimizer = count([value for value in states if isinstance(value, Tensor)])
    measured.update = peak_bytes(lambda: agent.train(copy.copy(rollout)), agent.device)


def measure_time(agent: GRPO, rollout: Rollout, measured: Measured) -> None:
    """Add the time of an update."""
    wall, cpu = time.perf_counter(), time.process_time()
    agent.train(copy.copy(rollout))
    if agent.device.type == "cuda":
        torch.cuda.synchronize(agent.device)
    measured.seconds.append(time.perf_counter() - wall)
    measured.cpu_seconds.append(time.process_time() - cpu)


def measure(work: Work, repeats: int) -> list[Measured]:
    """Return all keywords, in turns."""
    agents = [make_agent(work, keywords) for keywords in ROWS]
    results = [Measured(keywords) for keywords in ROWS]
    rollout = agents[0].sample_rollout()
    for agent, measured in zip(agents, results, strict=True):
        agent.policy.bf16 = False  # as fast as can be; the optimizer has a state from here on
        agent.train(copy.copy(rollout))
        agent.policy.bf16 = agent.bf16
        measure_memory(agent, rollout, measured)
        print(f"{measured.name}: {measured.peak / MB:.1f} MiB", flush=True)
    for _ in range(repeats):
        for agent, measured in zip(agents, results, strict=True):
            if not agent.bf16 or has_bfloat16(agent.device):
                measure_time(agent, rollout, measured)
    return results


def report(results: list[Measured], title: str) -> str:
    """Return the table."""
    lines = ["# Memory of an update", "", title, ""]
    lines += ["| keywords | weights | reference | optimizer | update | peak, MiB | of (none) | time of (none) | by CPU time |"]
    lines += ["| :--- |" + " ---: |" * 8]
    first = results[0]
    for row in results:
        parts = (row.weights, row.reference, row.optimizer, row.update, row.peak)
        sizes = [*(f"{part / MB:.1f}" for part in parts), f"{row.peak / first.peak:.2f}"]
        times = ["not measured"] * 2
        if row.seconds:
            pairs = ((row.seconds, first.seconds), (row.cpu_seconds, first.cpu_seconds))
            times = [f"{median(mine) / median(plain):.2f}" for mine, plain in pairs]
        lines.append(f"| `{row.name}` | {' | '.join([*sizes, *times])} |")
    lines += ["", f"An update without keywords took {median(first.seconds):.2f} s (median)."]
    return "\n".join(lines) + "\n"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 by itself, a CPU as Linux tells."""
    flags = Path("/proc/cpuinfo")
    knows = flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    return device.type != "cpu" or knows


def title_of(work: Work, parameters: int, repeats: int) -> str:
    """Return what was measured, and how."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    place = (
        f"{work.threads} thread{'s' * (work.threads > 1)} of a machine with {os.cpu_count()} CPU cores ({platform.machine()})"
    )
    if work.device.startswith("cuda"):
        place = torch.cuda.get_device_name(work.device)
    return (
        f"{versions}; {place}. A Llama of {parameters / 1e6:.1f} million parameters, {work.problems} prompts of {work.prompt} "
        f"tokens, {work.group} responses of {work.new_tokens} to each, one optimizer step.\n\n"
        "Between two updates the weights, the reference and the optimizer's state are held; `update` is what one takes besides "
        f"at its peak: gradients, activations and logits. Times are ratios of medians of {repeats} updates, taken alternately; "
        "the sampling is in none of them. The time of `bf16` is not measured on a CPU without bfloat16 products, which "
        "imitates them, several times as slowly as float32."
    )


def main() -> None:
    """Parse the command line, measure, report."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        sizes = (arguments.hidden, arguments.layers, arguments.heads, arguments.intermediate)
        parameters = build(folder, arguments.vocabulary, *sizes, arguments.prompt + arguments.new_tokens)
        shape = (arguments.prompt, arguments.group, arguments.new_tokens, arguments.problems, 1)
        work = Work(folder, arguments.vocabulary, *shape, arguments.device, "float32", arguments.threads)
        results = measure(work, arguments.repeats)
        text = report(results, title_of(work, parameters, arguments.repeats))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "memory.md").write_text(text)
    print(f"{text}\nsaved memory.md in {arguments.out}")


if __name__ == "__main__":
    main()
