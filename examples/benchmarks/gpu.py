"""Check this package on a GPU, and measure it: decoding, update and a whole GRPO step.

    pip install -c constraints.txt -e ".[bench]"
    python examples/benchmarks/gpu.py

Nothing is downloaded: the models have seeded random weights in the shapes of Qwen2.5-0.5B and Qwen2.5-1.5B. First come checks.
Log-probs of sampling, training and reference are compared with a plain forward pass per row in float32; GRPO and PPO train the
packaged pupil; a run that is resumed is compared with one that is not; and a bfloat16 run with a float32 run.

Then come timings, beside transformers' `generate` and the card's limits. The limit of decoding is computed for the card as
measured here: the larger of bytes / bandwidth (all weights in bfloat16, and the keys and values of all tokens, those of a
prompt once for its group) and operations / rate, plus the logits written and read once. The share of the dense rate counts 6
operations a weight and token that the update needs, and those of attention; recomputation does not count. Each timing follows
a warm-up, and the device is synchronized before and after it.

`--small` runs every stage on small shapes on a CPU: that tests the script, and its timings mean nothing. The script writes
`gpu.md`, `gpu.png` and `gpu.json` to `outputs/benchmarks` after each stage, so that a run that is cut off leaves its results.
"""

import argparse
import json
import math
import platform
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import torch
from speed_parts.line import Phases
from speed_parts.tables import rows as table
from speed_parts.work import even_words
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import agents.sampling.generate
import llm_env
import llm_env.lm.flash
import llm_env.lm.scoring
from agents import GRPO, PPO
from agents.rollout import Rollout
from agents.sampling import decode_kernel
from agents.sampling.shared_prefix import SharedDecoding
from llm_env import TextGenerationEnv
from llm_env.lm.compiling import num_compiled_graphs
from llm_env.lm.scoring import score
from llm_env.rewards import RewardSum

BOUND = 1e-3  # nats, in float32
BOUND_BF16 = (0.03, 0.3)  # nats, mean and largest difference of bfloat16 from float32
Results = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model and what is generated with it.

    Attributes:
        name: of the model whose shape this is.
        hidden, layers, heads, kv_heads, intermediate, vocabulary: of the model; embeddings are tied.
        prompt, new_tokens, group, problems: P, T, G and the number of prompts.
        budget: tokens in a pass of the update.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int = 151_936
    prompt: int = 256
    new_tokens: int = 512
    group: int = 8
    problems: int = 64
    budget: int = 17_408

    def model(self, device: torch.device) -> Qwen2ForCausalLM:
        """Return the model with seeded random weights in float32."""
        config = Qwen2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            intermediate_size=self.intermediate,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=self.vocabulary - 1,
            pad_token_id=None,
        )
        torch.manual_seed(0)
        with device:
            return Qwen2ForCausalLM(config).eval()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer whose tokens are the words w0, w1, ...; the last one ends a response."""
        end = f"w{self.vocabulary - 1}"
        tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(self.vocabulary)}, unk_token=end))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end)

    def prompts(self, count: int | None = None, uneven: bool = False) -> list[list[int]]:
        """Return prompts of random tokens; of different lengths if `uneven`."""
        rng = np.random.default_rng(0)
        lengths = [self.prompt - (5 * i) % (self.prompt // 2) * uneven for i in range(count or self.problems)]
        return [rng.integers(self.vocabulary - 1, size=n).tolist() for n in lengths]

    @property
    def body(self) -> int:
        """Weights of the layers."""
        d = self.hidden // self.heads
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_heads * d
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head(self) -> int:
        """Weights of the embedding, which is the head as well."""
        return self.hidden * self.vocabulary

    @property
    def sequences(self) -> int:
        """Number of responses."""
        return self.problems * self.group

    def pairs(self) -> float:
        """Pairs of tokens that attend to each other in prompts computed once, and responses."""
        return self.problems * (self.prompt**2 / 2 + self.group * (self.new_tokens * self.prompt + self.new_tokens**2 / 2))

    def update_operations(self) -> float:
        """Operations that an update needs, forward and backward."""
        responses = self.sequences * self.new_tokens
        attention = 12 * self.layers * self.hidden * self.pairs()
        return 6 * self.body * (self.problems * self.prompt + responses) + 6 * self.head * responses + attention

    def decoding_limit(self, bandwidth: float, rate: float) -> float:
        """Return the seconds that the average decoding step takes at least, from bytes/s and operations/s."""
        tokens = self.problems * self.prompt + self.sequences * self.new_tokens / 2
        kv = 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads) * tokens
        weights = 2 * (self.body + self.head)
        operations = 2 * self.sequences * (self.body + self.head)
        operations += 4 * self.layers * self.hidden * self.sequences * (self.prompt + self.new_tokens / 2)
        logits = 2 * 2 * self.sequences * self.vocabulary
        return max((weights + kv) / bandwidth, operations / rate) + logits / bandwidth


HALF = Shape("Qwen2.5-0.5B", hidden=896, layers=24, heads=14, kv_heads=2, intermediate=4864)
ONE_AND_A_HALF = Shape("Qwen2.5-1.5B", hidden=1536, layers=28, heads=12, kv_heads=2, intermediate=8960, budget=8704)
TINY = Shape("tiny", 32, 2, 4, 2, 64, vocabulary=300, prompt=12, new_tokens=10, group=2, problems=2, budget=256)


class Bench:
    """One run: the device, the settings and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.small, self.folder, self.minutes, self.skip = args.small, args.output, args.minutes, args.skip
        self.device = torch.device("cpu" if args.small or not torch.cuda.is_available() else "cuda")
        self.results: Results = {"card": self.card(), "versions": {name: version(name) for name in ("torch", "transformers")}}
        self.began = time.monotonic()

    def card(self) -> str:
        """Return the name of the device."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU ({platform.machine()}), not a GPU"

    def now(self) -> float:
        """Return the time, once the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds(self, call: Callable[[], Any], repeats: int = 1, warm_up: bool = True) -> float:
        """Return the median seconds of a call, after a warm-up."""
        if warm_up:
            call()
        found = []
        for _ in range(repeats):
            begin = self.now()
            call()
            found.append(self.now() - begin)
        return float(np.median(found))

    def stage(self, name: str, run: Callable[[], Any]) -> None:
        """Run a stage, unless time is up; keep its result or its error, and write the report."""
        elapsed = time.monotonic() - self.began
        if elapsed > 60 * self.minutes:
            self.results[name] = {"skipped": f"{elapsed:.0f} s had passed"}
        else:
            begin = time.monotonic()
            try:
                self.results[name] = run()
            except Exception as error:  # the other stages still count
                self.results[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
            self.free()
            print(f"[{time.monotonic() - self.began:5.0f} s] {name} ({time.monotonic() - begin:.1f} s): "
                  f"{json.dumps(self.results[name])}", flush=True)  # fmt: skip
        self.write()

    def free(self) -> None:
        """Return unused memory to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """Return the peak memory since `free`, in GB."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else math.nan

    def write(self) -> None:
        """Write numbers, report and figure."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "gpu.json").write_text(json.dumps(self.results, indent=1))
        (self.folder / "gpu.md").write_text(report(self.results))
        draw(self.results, self.folder / "gpu.png")

    # --- limits of the card ------------------------------------------------------------------------------------------

    def ceilings(self) -> Results:
        """Measure the rate of a large matrix product in bfloat16, and the bandwidth of a copy."""
        size = 256 if self.small else 8192
        a, b = torch.randn(2, size, size, device=self.device, dtype=torch.bfloat16)
        rate = 2 * size**3 / self.seconds(lambda: a @ b, 10)
        source = torch.randn(2**16 if self.small else 2**30, device=self.device)
        target = torch.empty_like(source)
        bandwidth = 2 * source.nbytes / self.seconds(lambda: target.copy_(source), 10)
        return {"operations/s": rate, "bytes/s": bandwidth}

    # --- correctness -------------------------------------------------------------------------------------------------

    def log_probs(self, shape: Shape) -> Results:
        """Compare log-probs with those of a plain forward pass per row in float32; return the largest differences."""
        shape = replace(shape, prompt=min(shape.prompt, 70), new_tokens=min(shape.new_tokens, 80), group=4, problems=3)
        agent = make_agent(shape, self.device, bf16=False)
        lm, prompts, found = agent.policy.lm, shape.prompts(uneven=True), Results()
        repeated = [prompt for prompt in prompts for _ in range(shape.group)]
        for bf16 in (False, True):
            agent.policy.bf16 = bf16
            prefix = "bf16 " if bf16 else ""
            for name, sharing, variant in self.decoding_variants():
                agent.policy.prefix_sharing = sharing
                generator = torch.Generator(self.device).manual_seed(1)
                with decoding(**variant):
                    responses, sampled = agent.policy.sample(prompts, shape.group, shape.new_tokens, generator=generator)
                expected = plain_log_probs(lm, repeated, responses)
                found[f"{prefix}sampling, {name}"] = difference(sampled, expected)
            agent.policy.prefix_sharing = "auto"
            for mode in self.modes():
                with shared_by(mode), torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                    scored = score(lm, repeated, responses, shape.vocabulary, entropy=True)
                rows = [row[: len(response)].tolist() for row, response in zip(scored.logp, responses, strict=True)]
                found[f"{prefix}training, {mode}"] = difference(rows, expected)
            reference = agent.rules.reference
            reference.bf16 = bf16
            rows = [row.tolist() for row in reference.log_probs(repeated, responses)]
            found[f"{prefix}reference"] = difference(rows, expected)
        for name, (mean, largest) in found.items():
            bounds = BOUND_BF16 if name.startswith("bf16") else (BOUND, BOUND)
            if not (mean <= bounds[0] and largest <= bounds[1]):
                raise AssertionError(f"{name}: mean {mean:.2e}, largest {largest:.2e} nats exceed {bounds}; all: {found}")
        return found

    def decoding_variants(self) -> Iterator[tuple[str, Any, Results]]:
        """Yield the ways to decode: name, `prefix_sharing` and arguments of `SharedDecoding`."""
        on_gpu = self.device.type == "cuda"
        yield "default", "auto", {}
        if on_gpu:
            yield "kernel without graph", "auto", {"captures": False}
            yield "graph without kernel", "auto", {"fused": False}
        yield "one row a response", False, {}

    def modes(self, *more: str) -> list[str]:
        """Return the ways to share prompts in the update; the first is the default."""
        more = ("without flash", *more) if self.device.type == "cuda" else ()
        return [name for name in ("split", *more, "plain") if name not in self.skip]

    def gradients(self, shape: Shape) -> Results:
        """Compare the gradient of log-probs and entropies with that of plain rows in float32, by PyTorch alone."""
        shape = replace(shape, prompt=min(shape.prompt, 70), new_tokens=min(shape.new_tokens, 60), group=4, problems=2)
        lm, prompts = shape.model(self.device), shape.prompts(uneven=True)
        repeated = [prompt for prompt in prompts for _ in range(shape.group)]
        rng = np.random.default_rng(1)
        responses = [rng.integers(shape.vocabulary - 1, size=shape.new_tokens - i).tolist() for i in range(len(repeated))]

        def gradient(mode: str, chunk: int = 2**31, bf16: bool = False) -> torch.Tensor:
            lm.zero_grad()
            chunks = patch.multiple(llm_env.lm.scoring, CHUNK_BYTES=chunk, CHUNK_BYTES_CUDA=chunk)
            with shared_by(mode), chunks, torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
                scored = score(lm, repeated, responses, shape.vocabulary, 0.9, entropy=True)
                (scored.logp * scored.mask + 0.5 * scored.entropy).sum().backward()
            return torch.cat([p.grad.flatten() for p in lm.parameters()])

        with patch.object(llm_env.lm.scoring, "runs_on", lambda device: False):
            expected = gradient("plain")
        found: Results = {}
        for mode in self.modes():
            few = 2**16 * shape.vocabulary // 1000
            for name, arguments in (("", (2**31,)), (", chunks", (few,)), (", bf16", (2**31, True))):
                error = (gradient(mode, *arguments) - expected).norm() / expected.norm()
                found[mode + name] = error.item()
                if not error < (0.1 if "bf16" in name else 1e-3):
                    raise AssertionError(f"the gradient differs by {error:.2e}; all: {found}")
        return found

    def learns(self) -> Results:
        """Train the packaged pupil on addition with GRPO and PPO; return the accuracy before and after."""
        found: Results = {}
        for name, agent, tokens in (("GRPO", GRPO, 70_000), ("PPO", PPO, 60_000)):
            settings = {"group_size": 8} if agent is GRPO else {"batch_size": 64}
            trained = agent(
                llm_env.PUPIL,
                "llm_env/Addition-v0",
                LinearSchedule(3e-4, 0.0, 1.0),
                n_envs=256,
                seed=0,
                device=self.device,
                **settings,
            )
            before, begin = accuracy(trained), self.now()
            trained.learn(2000 if self.small else tokens)
            found[name] = {"before": before, "after": accuracy(trained), "seconds": self.now() - begin}
            if found[name]["after"] < 0.98 and not self.small:
                raise AssertionError(f"{name} reaches {found[name]}, not 0.98")
        return found

    def resumes(self) -> Results:
        """Compare a run that is saved and loaded half-way with one that is not; return the largest difference of a weight."""

        def start() -> GRPO:
            return GRPO(llm_env.PUPIL, "llm_env/Addition-v0", 1e-4, n_envs=64, seed=1, device=self.device)

        tokens = 600 if self.small else 3000
        whole, again, half = start().learn(2 * tokens), start().learn(2 * tokens), start().learn(tokens)
        with tempfile.TemporaryDirectory() as folder:
            half.save(f"{folder}/agent")
            resumed = GRPO.load(f"{folder}/agent", env="llm_env/Addition-v0", device=self.device)
        resumed.learn(2 * tokens - resumed.num_timesteps, reset_num_timesteps=False)
        weights = [flat(agent) for agent in (whole, again, resumed)]
        found = {"run again": (weights[0] - weights[1]).abs().max().item()}
        found["resumed"] = (weights[0] - weights[2]).abs().max().item()
        found["steps"] = [agent._n_updates for agent in (whole, again, resumed)]
        if found["resumed"] > max(1e-4, 10 * found["run again"]):
            raise AssertionError(f"the resumed run differs: {found}")
        return found

    def precisions(self) -> Results:
        """Train the pupil for 200 updates in float32 and in bfloat16; return the rewards of each tenth."""
        curves: Results = {}
        for bf16 in (False, True):
            rewards: list[float] = []
            agent = GRPO(
                llm_env.PUPIL, "llm_env/Addition-v0", 1e-4, n_envs=64, group_size=8, seed=2, bf16=bf16, device=self.device
            )

            def train(rollout: Rollout, train: Any = agent.train, rewards: list[float] = rewards) -> None:
                rewards.append(rollout.scores.mean().item())
                train(rollout)

            with patch.object(agent, "train", train):
                agent.learn(10**9, callback=StopAfter(6 if self.small else 200))
            parts = np.array_split(np.array(rewards), 10 if len(rewards) >= 10 else 1)
            curves["bf16" if bf16 else "float32"] = [round(float(part.mean()), 3) for part in parts]
        return curves

    # --- speed -------------------------------------------------------------------------------------------------------

    def decoding(self, shape: Shape) -> Results:
        """Time decoding in bfloat16 in all variants, and transformers' `generate`."""
        ceilings = self.results["ceilings"]
        agent = make_agent(shape, self.device, bf16=True)
        prompts, tokens = shape.prompts(), shape.sequences * shape.new_tokens
        limit = shape.decoding_limit(ceilings["bytes/s"], ceilings["operations/s"]) * shape.new_tokens
        found: Results = {"limit": tokens / limit}
        variants = [("default", {}, False)]
        if self.device.type == "cuda":
            variants += [("without graphs", {"captures": False}, False), ("without kernel", {"fused": False}, False)]
        variants += [("compile", {}, True)]

        def draw(new_tokens: int = shape.new_tokens) -> None:
            generator = torch.Generator(self.device).manual_seed(0)
            responses, _ = agent.policy.sample(prompts, shape.group, new_tokens, generator=generator)
            assert sum(map(len, responses)) > 0.9 * shape.sequences * new_tokens

        for name, variant, compiles in variants:
            if name in self.skip:
                continue
            agent.policy.compiles = compiles
            with decoding(**variant):
                draw(8)  # weights are copied, kernels compiled
                self.free()
                seconds = self.seconds(draw, warm_up=False)
            found[name] = {"tokens/s": tokens / seconds, "peak GB": self.peak()}
        agent.policy.compiles = False
        with agent.policy.sampling(prompts, shape.new_tokens) as lm:
            ids = torch.tensor(prompts, device=self.device).repeat_interleave(shape.group, 0)

            def generate(new_tokens: int = shape.new_tokens) -> None:
                out = lm.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=new_tokens,
                    min_new_tokens=new_tokens,
                    pad_token_id=0,
                )
                assert out.shape[1] == ids.shape[1] + new_tokens

            generate(8)
            self.free()
            found["generate"] = {"tokens/s": tokens / self.seconds(generate, warm_up=False), "peak GB": self.peak()}
        return found

    def kernel(self, shape: Shape) -> Results:
        """Time the kernel of decoding, half-way through the responses, with other constants; return milliseconds a layer."""
        n, k, d, tokens = shape.problems, shape.kv_heads, shape.hidden // shape.heads, shape.new_tokens // 2

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device=self.device, dtype=torch.bfloat16)

        caches = [
            (random(n, k, shape.prompt, d).mT, random(n, k, shape.prompt, d), random(2, n, k, shape.group, shape.new_tokens, d))
            for _ in range(4)
        ]
        inputs = random(n, shape.heads, shape.group, d), random(n, k, shape.group, d), random(n, k, shape.group, d)
        lengths = torch.full((n,), shape.prompt, device=self.device)
        counts = torch.full((n, shape.group), tokens, device=self.device)
        found: Results = {}
        for block, warps, stages in [(64, 4, 3), (64, 4, 2), (32, 4, 3), (128, 4, 2), (64, 2, 3), (32, 2, 3), (32, 1, 3),
                                     (64, 1, 2), (128, 8, 2), (128, 2, 2), (64, 2, 4), (32, 2, 5)]:  # fmt: skip
            with patch.multiple(decode_kernel, BLOCK=block, WARPS=warps, STAGES=stages):

                def run() -> None:
                    for i in range(40):
                        decode_kernel.attend_slots(*inputs, caches[i % 4], lengths, counts, None)

                found[f"{block} tokens, {warps} warps, {stages} stages"] = round(1e3 * self.seconds(run, 3) / 40, 4)
        return found

    def update(self, shape: Shape) -> Results:
        """Time one optimizer step of GRPO in bfloat16, in all ways to compute attention, and compiled."""
        rate = self.results["ceilings"]["operations/s"]
        agent = make_agent(shape, self.device, bf16=True)
        rollout = constant_rollout(agent, shape)
        found: Results = {}
        variants = [(mode, False) for mode in self.modes("flex")]
        if "compile" not in self.skip:
            variants.insert(1, ("split, compile", True))
        for name, compiles in variants:
            agent.policy.compiles, mode = compiles, name.split(",")[0]
            trainer, graphs = agent.make_trainer(), num_compiled_graphs()
            step = partial(trainer.step, rollout, np.arange(len(rollout)), True)
            try:
                with shared_by(mode):
                    trainer.step(rollout, np.arange(4 * shape.group % len(rollout) or len(rollout)), False)
                    self.free()
                    seconds = self.seconds(step, warm_up=False)
                found[name] = {
                    "tokens/s": shape.sequences * shape.new_tokens / seconds,
                    "seconds": seconds,
                    "share of dense rate": shape.update_operations() / seconds / rate,
                    "peak GB": self.peak(),
                    "graphs compiled": num_compiled_graphs() - graphs,
                }
            except torch.OutOfMemoryError as error:
                found[name] = {"error": str(error)[:200]}
            self.free()
        return found

    def steps(self, shape: Shape) -> Results:
        """Time a whole GRPO step by phase, with the default settings."""
        agent = make_agent(shape, self.device, bf16=True)
        phases = Phases(str(self.device))
        phases.time(agent.engine, "generate", "generate")
        phases.time(RewardSum, "__call__", "reward")
        phases.time(agent.rules.reference, "log_probs", "reference")
        phases.time(agent, "train", "update")
        agent.learn(1)  # a warm-up
        self.free()
        phases.begin()
        agent.learn(1, reset_num_timesteps=False)
        phases.end()
        return {"seconds": {name: round(value, 3) for name, value in phases.seconds.items()}, "peak GB": self.peak()}

    def profile(self, shape: Shape) -> Results:
        """Return the kernels that take most time in decoding steps and in an update, as shares of the device's time."""
        from torch.profiler import ProfilerActivity, profile

        agent = make_agent(shape, self.device, bf16=True)
        prompts = shape.prompts()
        rollout = constant_rollout(agent, shape)
        trainer = agent.make_trainer()
        found: Results = {}

        def few() -> None:
            agent.policy.sample(prompts, shape.group, min(48, shape.new_tokens))

        def part() -> None:
            trainer.step(rollout, np.arange(2 * shape.group), False)

        for name, call in (("decoding", few), ("update", part)):
            call()
            begin = self.now()
            call()
            wall = self.now() - begin
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
                call()
                self.now()
            events = [e for e in profiler.key_averages() if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
            total = sum(e.self_device_time_total for e in events) or 1
            events.sort(key=lambda e: -e.self_device_time_total)
            top = [(e.key[:90], e.count, round(e.self_device_time_total / total, 3)) for e in events[:22]]
            found[name] = {"wall s": wall, "kernels s": total / 1e6, "top": top}
        return found


class StopAfter(BaseCallback):
    """Ends `learn` after so many optimizer steps."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.updates = updates

    def _on_step(self) -> bool:
        return self.model._n_updates < self.updates  # called at every token of a rollout


def make_agent(shape: Shape, device: torch.device, bf16: bool) -> GRPO:
    """Return a GRPO agent with a reference model, on prompts of random words."""
    model, tokenizer = shape.model(device), shape.tokenizer()
    env = TextGenerationEnv(
        [" ".join(f"w{token}" for token in prompt) for prompt in shape.prompts()],
        even_words,
        tokenizer,
        max_prompt_tokens=shape.prompt,
        max_new_tokens=shape.new_tokens,
        reference=deepcopy(model),
    )
    return GRPO(
        model,
        env,
        1e-6,
        n_envs=shape.sequences,
        group_size=shape.group,
        kl_coef=0.04,
        bf16=bf16,
        max_tokens_per_batch=shape.budget,
        preflight=False,
        seed=0,
        device=device,
        policy_kwargs={"tokenizer": tokenizer},
    )


def constant_rollout(agent: GRPO, shape: Shape) -> Rollout:
    """Return a rollout of random responses of full length, with advantages."""
    rng = np.random.default_rng(2)
    prompts = [prompt for prompt in shape.prompts() for _ in range(shape.group)]
    responses = rng.integers(shape.vocabulary - 1, size=(len(prompts), shape.new_tokens)).tolist()
    device, size = agent.device, (len(prompts), shape.new_tokens)
    logp = torch.full(size, -math.log(shape.vocabulary), device=device)
    rewards = torch.zeros(size, device=device)
    rewards[:, -1] = torch.as_tensor(rng.random(len(prompts)), device=device)
    rollout = Rollout(
        prompts=prompts,
        responses=responses,
        mask=torch.ones(size, device=device),
        rewards=rewards,
        sampled_logp=logp,
        ref_logp=logp.clone(),
        step_ends=(rewards != 0).float(),
        truncated=torch.zeros(len(prompts), dtype=torch.bool, device=device),
        infos=[{} for _ in prompts],
        group_size=shape.group,
    )
    rollout.old_logp = logp.clone()
    agent.compute_advantages(rollout)
    return rollout


@contextmanager
def decoding(**arguments: Any) -> Iterator[None]:
    """Context in which `SharedDecoding` has other arguments."""
    if not arguments:
        yield
        return

    class Variant(SharedDecoding):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, **arguments})

    with patch.object(agents.sampling.generate, "SharedDecoding", Variant):
        yield


@contextmanager
def shared_by(mode: str) -> Iterator[None]:
    """Context in which the training path shares prompts in one way, or not at all ("plain")."""
    way = {"plain": None, "without flash": "split"}.get(mode, mode)
    with patch.object(llm_env.lm.scoring, "sharing_mode", lambda *_: way):
        if mode != "without flash":
            yield
            return
        with patch.object(llm_env.lm.flash, "runs_on", lambda query: False):
            yield


@torch.no_grad()
def plain_log_probs(lm: Qwen2ForCausalLM, prompts: list[list[int]], responses: list[list[int]]) -> list[torch.Tensor]:
    """Compute log-probs by one forward pass a row in float32, alone and unpadded."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[*prompt, *response]], device=lm.device)
        logits = lm(input_ids=ids, use_cache=False, logits_to_keep=len(response) + 1).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0].cpu())
    return found


def difference(found: Any, expected: list[torch.Tensor]) -> tuple[float, float]:
    """Return the mean and the largest absolute difference."""
    gaps = torch.cat([(torch.as_tensor(a, dtype=torch.float32) - b).abs() for a, b in zip(found, expected, strict=True)])
    return gaps.mean().item(), gaps.max().item()


def accuracy(agent: Any) -> float:
    """Return the share of addition problems that the greedy answer solves."""
    return agent.evaluate(gym.make("llm_env/Addition-v0", split="test"), n_prompts=512)["reward"]


def flat(agent: Any) -> torch.Tensor:
    """Return all weights of a policy as one vector."""
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


# --- report ----------------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """Format the results as Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts = [f"# Measurements on a GPU\n\n{results['card']}; {versions}. Written by `gpu.py`, which says what is measured.\n"]
    if "note" in results:
        parts.append(results["note"] + "\n")
    for name, result in results.items():
        if not isinstance(result, dict) or name == "versions":
            continue
        if "error" in result or "skipped" in result:
            parts.append(f"**{name}**: {result.get('error') or 'skipped, ' + result['skipped']}\n")
            continue
        section = next((section for prefix, section in SECTIONS.items() if name.startswith(prefix)), None)
        if section is not None:
            parts.append(section(name, result))
    return "\n".join(parts)


def _ceilings(_name: str, result: Results) -> str:
    rate, bandwidth = result["operations/s"] / 1e12, result["bytes/s"] / 1e12
    return f"A matrix product in bfloat16 runs at {rate:.0f} TFLOP/s, a copy at {bandwidth:.2f} TB/s.\n"


def _log_probs(name: str, result: Results) -> str:
    lines = [(key, f"{mean:.1e}", f"{largest:.1e}") for key, (mean, largest) in result.items()]
    return f"## {name}: difference from a plain float32 forward pass, in nats\n\n{table(('path', 'mean', 'largest'), lines)}\n"


def _gradients(_name: str, result: Results) -> str:
    lines = [(key, f"{value:.1e}") for key, value in result.items()]
    return f"## Gradients: relative difference from plain rows in float32\n\n{table(('path', 'difference'), lines)}\n"


def _learning(_name: str, result: Results) -> str:
    lines = [(key, *(f"{value[part]:.3g}" for part in ("before", "after", "seconds"))) for key, value in result.items()]
    return f"## The pupil on addition, in float32\n\n{table(('', 'accuracy before', 'after', 'seconds'), lines)}\n"


def _resume(_name: str, result: Results) -> str:
    return (
        f"## Resume\n\nLargest difference of a weight after {result['steps'][0]} updates: {result['run again']:.1e} when the "
        f"run is repeated, {result['resumed']:.1e} when it is saved and loaded half-way.\n"
    )


def _precisions(_name: str, result: Results) -> str:
    lines = [(key, *value) for key, value in result.items()]
    return f"## Mean reward in each tenth of 200 updates\n\n{table(('', *range(1, len(lines[0]))), lines)}\n"


def _decoding(name: str, result: Results) -> str:
    limit, other = result["limit"], result["generate"]["tokens/s"]
    lines = []
    for key, value in result.items():
        if key != "limit":
            speed = value["tokens/s"]
            lines.append((key, f"{speed:,.0f}", f"{speed / limit:.2f}", f"{speed / other:.1f}", f"{value['peak GB']:.1f}"))
    head = ("", "tokens/s", "of the limit", "times `generate`", "peak GB")
    return f"## {name}: limit {limit:,.0f} tokens/s\n\n{table(head, lines)}\n"


def _update(name: str, result: Results) -> str:
    lines, errors = [], []
    for key, value in result.items():
        if "error" in value:
            errors.append(f"\n{key}: {value['error']}\n")
            continue
        share, peak = f"{value['share of dense rate']:.2f}", f"{value['peak GB']:.1f}"
        lines.append((key, f"{value['tokens/s']:,.0f}", share, peak, value["graphs compiled"]))
    head = ("attention", "tokens/s", "of the dense rate", "peak GB", "graphs compiled")
    return f"## {name}\n\n{table(head, lines)}\n" + "".join(errors)


def _step(name: str, result: Results) -> str:
    lines = [(key, f"{value:.2f}") for key, value in result["seconds"].items()]
    lines.append(("total", f"{sum(result['seconds'].values()):.2f}"))
    return f"## {name}: peak {result['peak GB']:.1f} GB\n\n{table(('phase', 'seconds'), lines)}\n"


def _kernel(_name: str, result: Results) -> str:
    lines = [(key, f"{value:.3f}") for key, value in result.items()]
    return f"## Milliseconds of the decoding kernel, a layer\n\n{table(('constants', 'ms'), lines)}\n"


SECTIONS: dict[str, Callable[[str, Results], str]] = {
    "ceilings": _ceilings,
    "log-probs": _log_probs,
    "gradients": _gradients,
    "learning": _learning,
    "resume": _resume,
    "precisions": _precisions,
    "decoding": _decoding,
    "update": _update,
    "GRPO step": _step,
    "kernel": _kernel,
}


def draw(results: Results, path: Path) -> None:
    """Draw tokens per second of decoding and update, and the limit of decoding."""
    from matplotlib.figure import Figure

    names = [
        name
        for name, result in results.items()
        if name.startswith(("decoding", "update")) and "error" not in result and "skipped" not in result
    ]
    if not names:
        return
    figure = Figure(figsize=(4.6 * len(names), 3), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        result = results[name]
        bars = {key: value["tokens/s"] for key, value in result.items() if isinstance(value, dict) and "tokens/s" in value}
        axes.barh(list(bars), list(bars.values()), color="0.6")
        if "limit" in result:
            axes.axvline(result["limit"], color="black", linestyle="--", linewidth=1)
            axes.annotate("limit", (result["limit"], 0), (-4, 0), textcoords="offset points", ha="right", va="center")
        axes.invert_yaxis()
        axes.set(title=name, xlabel="tokens/s")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:.0f}k" if value >= 1000 else f"{value:.0f}")
    figure.suptitle(results["card"], fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes on a CPU, to test this script")
    parser.add_argument("--minutes", type=float, default=8, help="begin no stage after this time (default %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks"), help="folder (default %(default)s)")
    parser.add_argument("--only", nargs="+", help="names of stages; all by default")
    parser.add_argument("--skip", nargs="+", default=[], help="variants to leave out, such as compile or flex")
    parser.add_argument("--profile", action="store_true", help="also list the kernels that take most time")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU; --small tests this script on a CPU")
    bench = Bench(args)
    shapes = [TINY] if bench.small else [HALF, ONE_AND_A_HALF]
    stages: dict[str, Callable[[], Any]] = {"ceilings": bench.ceilings}
    stages[f"log-probs, {shapes[0].name}"] = partial(bench.log_probs, shapes[0])
    stages["gradients"] = partial(bench.gradients, shapes[0])
    stages |= {"resume": bench.resumes, "learning": bench.learns}
    for shape in shapes:
        stages[f"decoding, {shape.name}"] = partial(bench.decoding, shape)
        stages[f"update, {shape.name}"] = partial(bench.update, shape)
        stages[f"GRPO step, {shape.name}"] = partial(bench.steps, shape)
    stages["precisions"] = bench.precisions
    if bench.device.type == "cuda":
        stages["kernel"] = partial(bench.kernel, shapes[0])
    if args.profile:
        stages["profile"] = partial(bench.profile, shapes[0])
    for name, run in stages.items():
        if args.only is None or name == "ceilings" or any(name.startswith(chosen) for chosen in args.only):
            bench.stage(name, run)
    print((bench.folder / "gpu.md").read_text())
    failed = [name for name, result in bench.results.items() if isinstance(result, dict) and "error" in result]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
