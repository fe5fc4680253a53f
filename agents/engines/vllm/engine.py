"""vLLM as an engine: in this process, or behind its server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from agents.distributed.communicator import Communicator, get_communicator
from agents.engines.base import Completions, DecodingSpec, Lockstep, OnTurns, StaleWeightsError, end_episodes
from agents.engines.vllm.local import LocalVLLM
from agents.engines.vllm.server import VLLMServer
from agents.policy import LanguagePolicy
from agents.sampling.sampler import Sampler
from llm_env.rules import Rules

CHUNK = 1 << 25  # bytes of weights that travel at a time
# Nats, at a temperature of 2. A push that arrived leaves 3e-7 in float32, and up to 0.006 in bfloat16 (small models).
TOLERANCE = {"torch.float32": 1e-3}
LOW_PRECISION = 0.1
COMPARED = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class VLLM(Protocol):
    """Where vLLM runs."""

    def open(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Have it run, with a model of the policy's kind."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `agents.engines.vllm.worker.PolicyWeights` on every worker."""

    def take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Hand over some of the weights."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""

    def complete(self, requests: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Return token ids and their log-probs: for each request `n` responses."""

    def close(self) -> None:
        """Let go of it."""


class VLLMEngine:
    """Draws with vLLM (at least 0.32). Token ids go in and come out; log-probs are those of the whole tempered distribution.

    Weights go straight into the running model, never through a file: from this process's memory, or over HTTP. vLLM has to be
    told to load `agents.engines.vllm.worker`, which keeps the weights of a CPU model where they can be replaced.

    Args:
        base_url: of a server, for instance `"http://localhost:8000"`; by default vLLM runs in this process. Several processes
            need a server each: a list of urls. A server is started with `VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0
            vllm serve MODEL --worker-extension-cls agents.engines.vllm.worker.PolicyWeights`, where this package is installed
            too. MODEL has the policy's shape; its weights do not matter. In that mode whoever reaches the server can do with it
            what they like: keep it private.
        tolerance: how far, in nats, a log-prob may be from the policy's after a push. By default 1e-3 in float32, and 0.1 in
            bfloat16 and float16, where weights that lag behind by one small step do not show.
        model: the name that the server must serve; any by default.
        timeout: seconds after which a request has failed.
        attempts: how often a request is tried, with pauses of 0.5, 1, 2, ... seconds.
        api_key: the server's; by default the environment's `VLLM_API_KEY`, which is not saved with the agent.
        vllm: arguments of `vllm.LLM`, without a `base_url`, for instance `gpu_memory_utilization` or `enforce_eager`.

    Raises:
        ImportError: If vLLM is to run in this process and is not installed.
        ValueError: If arguments do not go with a server (or its absence), or there are more processes than servers.
    """

    takes_uniforms = False

    def __init__(self, base_url: str | Sequence[str] | None = None, tolerance: float | None = None, **settings: Any) -> None:
        self.vllm: VLLM = (
            LocalVLLM(settings) if base_url is None else VLLMServer(own_url(base_url, get_communicator()), **settings)
        )
        self._wanted_tolerance = tolerance
        self.tolerance = TOLERANCE["torch.float32"] if tolerance is None else tolerance
        self._dtype = torch.float32
        self._version: str | None = None

    def start(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Have vLLM run a model of the policy's kind, and check that it is.

        Raises:
            ImportError: If vLLM is not installed, or too old.
            ValueError: If vLLM refuses the model, or serves another one; or an adapter's base is quantized.
            ConnectionError: If there is no server.
        """
        self._version = None
        if policy.adapter is not None:
            policy.adapter.check_mergeable()
        self.vllm.open(policy, rules)
        found = self.vllm.call("llm_env_begin", rules.vocab_size)[0]
        if "error" in found:
            raise ValueError(f"vLLM cannot serve as an engine: {found['error']}; start it with VLLM_USE_V2_MODEL_RUNNER=0")
        mine = policy.lm.config.get_text_config().to_dict()
        mine["vocab_size"] = policy.lm.get_input_embeddings().num_embeddings
        differing = [name for name in COMPARED if name in mine and mine[name] != found["config"].get(name, mine[name])]
        if differing:
            detail = ", ".join(f"{name} {found['config'][name]} where the policy has {mine[name]}" for name in differing)
            raise ValueError(f"vLLM runs another model: {detail}; start it with the policy's")
        needed = rules.longest_prompt + rules.max_episode_tokens
        if found["max_model_len"] < needed:
            raise ValueError(
                f"vLLM runs with max_model_len={found['max_model_len']}, but the longest prompt and max_new_tokens="
                f"{rules.max_new_tokens} need {needed}; start it with more, or lower max_new_tokens"
            )
        self._dtype = getattr(torch, found["dtype"].removeprefix("torch."))
        if self._wanted_tolerance is None:
            self.tolerance = TOLERANCE.get(found["dtype"], LOW_PRECISION)

    def update_weights(self, policy: LanguagePolicy) -> None:
        """Copy the weights into the running model, and empty its prefix cache.

        Raises:
            ValueError: If some of vLLM's parameters got no weights.
            ConnectionError: If the server cannot be reached.
        """
        self._version = None
        for chunk in chunks_of(policy, self._dtype):
            self.vllm.take(chunk)
        version = uuid.uuid4().hex
        missing = sorted({name for worker in self.vllm.call("llm_env_commit", version) for name in worker["missing"]})
        if missing:
            raise ValueError(f"{len(missing)} of vLLM's parameters got no weights from the policy, for instance {missing[:3]}")
        self.vllm.forget_prefixes()
        self._version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        group_size: int,
        decoding: DecodingSpec,
        on_turns: OnTurns = end_episodes,
    ) -> Completions:
        """Generate `group_size` responses to each prompt; see `agents.engines.base.Engine.generate`.

        A response ends where the rules say. vLLM looks for stop strings by other means and may stop too early, or late: tokens
        beyond the end are cut off, and a response that has not ended continues in another request.
        """
        turns = Lockstep(prompts, group_size, decoding, on_turns)
        while turns.rows:
            turns.reply(*self._sample_turns(turns.contexts, turns.group_size, turns.limits, decoding))
        return turns.completions()

    def _sample_turns(
        self, prompts: list[list[int]], group_size: int, limits: list[int], decoding: DecodingSpec
    ) -> tuple[list[list[int]], list[np.ndarray]]:
        """Generate `group_size` turns of up to limits[i] tokens for each prompt i; return token ids and log-probs."""
        rules, sampler = decoding.rules, decoding.sampler
        settings = sampling_settings(rules, sampler)
        min_tokens = 0 if rules.constraint is None or rules.constraint.fixed is None else rules.constraint.fixed[1]
        responses: list[list[int]] = [[] for _ in range(len(prompts) * group_size)]
        logps: list[list[float]] = [[] for _ in responses]
        groups = [range(i * group_size, (i + 1) * group_size) for i in range(len(prompts))]  # rows that one request answers
        while groups:
            seeds = torch.randint(2**31, (len(groups),), generator=sampler.generator, device=_device(sampler)).tolist()
            requests = []
            for rows, seed in zip(groups, seeds, strict=True):
                begun, limit = responses[rows[0]], limits[rows[0] // group_size]
                room = {"max_tokens": limit - len(begun), "min_tokens": max(0, min_tokens - len(begun))}
                # Ints: numpy's are other keys of the prefix cache.
                context = [*map(int, prompts[rows[0] // group_size]), *begun]
                requests.append({**settings, **room, "prompt": context, "n": len(rows), "seed": seed})
            unfinished = []
            for rows, choices in zip(groups, self.vllm.complete(requests), strict=True):
                for row, (ids, values) in zip(rows, choices, strict=True):
                    if not extend(responses[row], logps[row], ids, values, rules, limits[row // group_size]):
                        unfinished.append(range(row, row + 1))
            groups = unfinished
        if any(worker["version"] != self._version for worker in self.vllm.call("llm_env_version")):
            raise StaleWeightsError(
                "vLLM generated with other weights than it was given: it was restarted, or another run gave it its own"
            )
        return responses, [np.array(row, dtype=np.float32) for row in logps]

    def close(self) -> None:
        """Shut down the vLLM in this process; a server keeps running."""
        self._version = None
        self.vllm.close()


def own_url(base_url: str | Sequence[str], communicator: Communicator) -> str:
    """Return the url of this process's server.

    Raises:
        ValueError: If there are more processes, each of which gives a server its weights, or fewer.
    """
    urls: list[Any] = list(base_url) if isinstance(base_url, (list, tuple)) else [base_url]
    count = communicator.size
    if len(urls) != count:
        raise ValueError(
            f"base_url={base_url!r} names {len(urls)} servers for {count} processes, each of which gives its weights to "
            "one of its own; give a list of as many urls"
        )
    return urls[communicator.rank]


def _device(sampler: Sampler) -> torch.device | str:
    return "cpu" if sampler.generator is None else sampler.generator.device


def sampling_settings(rules: Rules, sampler: Sampler) -> dict[str, Any]:
    """Return what all requests of a rollout have in common, by the names of vLLM's `SamplingParams`.

    Raises:
        ValueError: If vLLM has no such temperature; it replaces lower ones by 0.01.
    """
    if not 0.01 <= sampler.temperature <= 2:
        raise ValueError(f"temperature={sampler.temperature} is not possible with vLLM, which takes 0.01 to 2")
    settings: dict[str, Any] = {
        "temperature": float(sampler.temperature),
        "top_k": 1 if sampler.deterministic else int(sampler.top_k),
        "top_p": float(sampler.top_p),
        "min_p": float(sampler.min_p),
        "logprobs": 0,  # of the drawn token alone
        "ignore_eos": True,  # the model's idea of its end tokens; the env's one is
        "stop_token_ids": sorted({*rules.eos_ids, *rules.stop_strings.token_ids}),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if rules.stop_strings.texts:  # one with special tokens in it is noticed by `extend`
        settings |= {"stop": rules.stop_strings.texts, "include_stop_str_in_output": True, "skip_special_tokens": True}
    if rules.constraint is not None and rules.constraint.fixed is not None and not rules.constraint.fixed[0].all():
        settings["allowed_token_ids"] = rules.constraint.fixed[0].nonzero()[0].tolist()
    return settings


def extend(
    response: list[int], logps: list[float], ids: Sequence[int], values: Sequence[float], rules: Rules, limit: int
) -> bool:
    """Add tokens and log-probs to a response up to its end; whether it has come.

    Raises:
        RuntimeError: If there are no tokens.
        ValueError: If a log-prob is no finite number.
    """
    if not len(ids):
        raise RuntimeError(f"vLLM added no token to a response of {len(response)} that had not ended")
    if not np.isfinite(values).all():
        raise ValueError("the model's log-probs are not finite: its weights, or the update that made them, have gone wrong")
    for token, value in zip(ids, values, strict=True):
        response.append(token)
        logps.append(value)
        if token in rules.eos_ids or len(response) == limit or (rules.stop and rules.completes_stop(response)):
            return True
    return False


def chunks_of(policy: LanguagePolicy, dtype: torch.dtype) -> Iterator[list[tuple[str, Tensor]]]:
    """The language model's weights, adapters merged in, by the names that checkpoints have, in `dtype`.

    At most `CHUNK` bytes at a time, or one weight.
    """
    chunk: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in policy.weights():
        tensor = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor.detach()
        if chunk and size + tensor.nbytes > CHUNK:
            yield chunk
            chunk, size = [], 0
        chunk.append((name, tensor))
        size += tensor.nbytes
    yield chunk
