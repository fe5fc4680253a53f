"""Measure peak memory and time of a GRPO update for each memory-saving argument.

    pip install -c constraints.txt -e ".[8bit]"
    python examples/benchmarks/memory.py

The arguments are `bf16`, `gradient_checkpointing` and `optimizer="adamw_8bit"`, alone and combined. The model is a Llama with
7.3 million random weights. It generates 8 responses of 64 tokens for each of 4 prompts of 256 tokens. All agents train on the
same episodes, with the GRPO loss, a KL term and one optimizer step.

Memory that is held between updates (weights, reference, optimizer state) is counted tensor by tensor, after an update. The
additional memory of an update (gradients, activations, logits) is measured with `peak.peak_bytes`: by the allocator on CUDA,
by torch's profiler on a CPU. The updates of all agents alternate, so that other load on the machine affects all of them. The
first update of each agent is a warm-up.

The script writes a table to `outputs/benchmarks`. The table in this folder was made with the default settings.
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
    """Measurements for one combination of agent arguments.

    Attributes:
        keywords: keyword arguments of the agent.
        weights, reference, optimizer: bytes on the device between updates.
        update: additional bytes at the peak of an update.
        seconds, cpu_seconds: wall-clock and CPU time of each timed update.
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
        """Total bytes at the peak of an update."""
        return self.weights + self.reference + self.optimizer + self.update

    @property
    def name(self) -> str:
        """Keyword arguments as Python source."""
        return ", ".join(f"{key}={value!r}" for key, value in self.keywords.items()) or "(none)"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompt", 256), ("group", 8), ("new-tokens", 64), ("problems", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("vocabulary", 4096), ("hidden", 256), ("layers", 6), ("heads", 4), ("intermediate", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3, help="timed updates (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; small models are faster with one (default 1)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks"), help="output folder for the table")
    return parser.parse_args()


def make_agent(work: Work, keywords: dict[str, Any]) -> GRPO:
    """Create an agent without log output."""
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
    """Return the bytes of the tensors' storages on a device, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.device.type == device.type}
    return sum(storages.values())


def measure_memory(agent: GRPO, rollout: Rollout, measured: Measured) -> None:
    """Measure the bytes and store them in `measured`."""
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
    """Time an update and append the result to `measured`."""
    wall, cpu = time.perf_counter(), time.process_time()
    agent.train(copy.copy(rollout))
    if agent.device.type == "cuda":
        torch.cuda.synchronize(agent.device)
    measured.seconds.append(time.perf_counter() - wall)
    measured.cpu_seconds.append(time.process_time() - cpu)


def measure(work: Work, repeats: int) -> list[Measured]:
    """Measure all combinations of arguments, with alternating updates."""
    agents = [make_agent(work, keywords) for keywords in ROWS]
    results = [Measured(keywords) for keywords in ROWS]
    rollout = agents[0].sample_rollout()
    for agent, measured in zip(agents, results, strict=True):
        agent.policy.bf16 = False  # warm-up without bf16, which is slow on some CPUs; creates the optimizer state
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
    """Format the table."""
    lines = ["# Memory of an update", "", title, ""]
    lines += ["| arguments | weights | reference | optimizer | update | peak, MiB | peak ratio | time ratio | CPU time ratio |"]
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
    lines += ["", f"The median time of an update of `(none)` was {median(first.seconds):.2f} s."]
    return "\n".join(lines) + "\n"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 matrix products in hardware.

    For a CPU the answer is read from /proc/cpuinfo.
    """
    flags = Path("/proc/cpuinfo")
    knows = flags.exists() and any(flag in flags.read_text() for flag in ("avx512_bf16", "amx_bf16", " bf16"))
    return device.type != "cpu" or knows


def title_of(work: Work, parameters: int, repeats: int) -> str:
    """Describe versions, machine, model and shape of the measurement."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "bitsandbytes"))
    place = (
        f"{work.threads} thread{'s' * (work.threads > 1)} of a machine with {os.cpu_count()} CPU cores ({platform.machine()})"
    )
    if work.device.startswith("cuda"):
        place = torch.cuda.get_device_name(work.device)
    return (
        f"{versions}; {place}. A Llama of {parameters / 1e6:.1f} million parameters, {work.problems} prompts of {work.prompt} "
        f"tokens, {work.group} responses of {work.new_tokens} tokens each, one optimizer step.\n\n"
        "Memory is in MiB. Weights, reference and optimizer state are held between updates. `update` is the additional memory "
        "at the peak of an update: gradients, activations and logits. Ratios are relative to `(none)`. Times are medians of "
        f"{repeats} updates without sampling; the updates of all rows alternate. The time of `bf16` is not measured on a CPU "
        "without bfloat16 instructions, which emulates them several times more slowly than float32."
    )


def main() -> None:
    """Parse the command line, measure and report."""
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
