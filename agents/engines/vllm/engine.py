"""Generate responses with vLLM, in this process or on a vLLM server."""

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

CHUNK = 1 << 25  # bytes of weights that are sent at a time
# Nats, at temperature 2. After a complete update, differences are 3e-7 in float32, up to 0.006 in bfloat16 (small models).
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
    """A running vLLM, in this process (`LocalVLLM`) or on a server (`VLLMServer`)."""

    def open(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Start or connect to a vLLM that runs a model of the policy's architecture."""

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of `agents.engines.vllm.worker.PolicyWeights` on every worker."""

    def take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy some of the weights into the running model."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""

    def complete(self, requests: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Generate `n` responses per request; return token ids and log-probs of each."""

    def close(self) -> None:
        """Release the resources."""


class VLLMEngine:
    r"""Engine that generates responses with vLLM (0.32 or newer).

    Prompts and responses are passed as token ids. Log-probs are those of the whole distribution after temperature, before
    top-k, top-p and min-p.

    Weights are copied into the running model without a file, from this process's memory or over HTTP. A server must load the
    worker extension `agents.engines.vllm.worker.PolicyWeights`, which also keeps the weights of a CPU model replaceable. Start
    it on a machine where this package is installed:

        VLLM_SERVER_DEV_MODE=1 VLLM_USE_V2_MODEL_RUNNER=0 vllm serve MODEL \
            --worker-extension-cls agents.engines.vllm.worker.PolicyWeights

    MODEL must have the policy's architecture and shapes; its weights are replaced. In dev mode, anyone who can reach the server
    has full control of it: do not expose it to other users.

    Args:
        base_url: url of a server, such as `"http://localhost:8000"`, or a list with one url per process. None, the default,
            runs vLLM in this process.
        tolerance: the maximum difference, in nats, between log-probs of vLLM and of the policy after a weight update. Default
            1e-3 in float32, and 0.1 in bfloat16 and float16. A tolerance of 0.1 does not detect weights that are outdated by
            one small step.
        model: only with `base_url`: the model name that the server must serve; default any name.
        timeout: only with `base_url`: seconds to wait for the answer to a request, default 600.
        attempts: only with `base_url`: maximum number of attempts per request, with pauses of 0.5, 1, 2, ... seconds; default
            4.
        api_key: only with `base_url`: the server's API key, default the environment variable `VLLM_API_KEY`. The value of the
            variable is not saved with the agent.
        settings: without `base_url`: arguments of `vllm.LLM`, such as `gpu_memory_utilization` or `enforce_eager`.

    Raises:
        ImportError: If vLLM has to run in this process and is not installed.
        ValueError: If an argument needs a server and there is none, or the reverse, or if the number of urls is not the number
            of processes.
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
        """Start or connect to vLLM, and check the architecture of its model.

        Raises:
            ImportError: If vLLM is not installed or too old.
            ValueError: If vLLM does not support the model or runs another model, its `max_model_len` is too small, or the base
                of the policy's adapter is quantized.
            ConnectionError: If the server cannot be reached.
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
        """Copy the policy's weights into the running model, and reset its prefix cache.

        Raises:
            ValueError: If some of vLLM's parameters received no weights.
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
        """Generate `group_size` responses to each prompt; see `Engine.generate`.

        The rules decide where a response ends. vLLM matches stop strings differently and may stop too early or too late. Tokens
        after the end are removed, and a response that has not ended is continued with another request.
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
        groups = [range(i * group_size, (i + 1) * group_size) for i in range(len(prompts))]  # rows per request
        while groups:
            seeds = torch.randint(2**31, (len(groups),), generator=sampler.generator, device=_device(sampler)).tolist()
            requests = []
            for rows, seed in zip(groups, seeds, strict=True):
                begun, limit = responses[rows[0]], limits[rows[0] // group_size]
                room = {"max_tokens": limit - len(begun), "min_tokens": max(0, min_tokens - len(begun))}
                # Convert NumPy integers: they give other keys in the prefix cache than ints.
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
                "vLLM generated with other weights than those of the last update: it was restarted, or another run updated them"
            )
        return responses, [np.array(row, dtype=np.float32) for row in logps]

    def close(self) -> None:
        """Shut down vLLM if it runs in this process; a server keeps running."""
        self._version = None
        self.vllm.close()


def own_url(base_url: str | Sequence[str], communicator: Communicator) -> str:
    """Return the url of the server for this process.

    Raises:
        ValueError: If the number of urls is not the number of processes.
    """
    urls: list[Any] = list(base_url) if isinstance(base_url, (list, tuple)) else [base_url]
    count = communicator.size
    if len(urls) != count:
        raise ValueError(
            f"base_url={base_url!r} names {len(urls)} servers for {count} processes; every process updates the weights of "
            f"a separate server. Give a list of {count} urls"
        )
    return urls[communicator.rank]


def _device(sampler: Sampler) -> torch.device | str:
    return "cpu" if sampler.generator is None else sampler.generator.device


def sampling_settings(rules: Rules, sampler: Sampler) -> dict[str, Any]:
    """Return the vLLM `SamplingParams` that all requests of a rollout share.

    Raises:
        ValueError: If the temperature is not between 0.01 and 2. vLLM replaces lower temperatures by 0.01.
    """
    if not 0.01 <= sampler.temperature <= 2:
        raise ValueError(f"temperature={sampler.temperature} is not possible with vLLM, which takes 0.01 to 2")
    settings: dict[str, Any] = {
        "temperature": float(sampler.temperature),
        "top_k": 1 if sampler.deterministic else int(sampler.top_k),
        "top_p": float(sampler.top_p),
        "min_p": float(sampler.min_p),
        "logprobs": 0,  # of the sampled token only
        "ignore_eos": True,  # of the model; `stop_token_ids` has the env's end tokens
        "stop_token_ids": sorted({*rules.eos_ids, *rules.stop_strings.token_ids}),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }
    if rules.stop_strings.texts:  # `extend` matches stop strings with special tokens
        settings |= {"stop": rules.stop_strings.texts, "include_stop_str_in_output": True, "skip_special_tokens": True}
    if rules.constraint is not None and rules.constraint.fixed is not None and not rules.constraint.fixed[0].all():
        settings["allowed_token_ids"] = rules.constraint.fixed[0].nonzero()[0].tolist()
    return settings


def extend(
    response: list[int], logps: list[float], ids: Sequence[int], values: Sequence[float], rules: Rules, limit: int
) -> bool:
    """Append tokens and log-probs to a response, up to the end of the response.

    Returns:
        Whether the response has ended.

    Raises:
        RuntimeError: If there are no tokens to append.
        ValueError: If a log-prob is not finite.
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
    """Yield the language model's weights in chunks of (name, tensor) pairs.

    Adapters are merged, names are those in checkpoints, and floating-point weights are converted to `dtype`. A chunk has at
    most `CHUNK` bytes, or a single weight.
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
