"""Run vLLM in this process."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch import Tensor

from agents.engines.base import StaleWeightsError
from agents.policy import LanguagePolicy
from llm_env.rules import Rules

OLDEST = "0.32"
WORKER = "agents.engines.vllm.worker.PolicyWeights"
INSTALL = 'pip install "llm-env[vllm]"'


class LocalVLLM:
    """A `vllm.LLM` in this process, started with dummy weights.

    Args:
        settings: arguments of `vllm.LLM`. Defaults: `dtype` is float32, or bfloat16 if the policy computes in bfloat16;
            `max_model_len` is the length of the longest prompt plus `max_new_tokens`; the KV cache has 1 GiB on a CPU, and
            `gpu_memory_utilization` is 0.3 on a GPU.

    Raises:
        ImportError: If vLLM is not installed.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        if find_spec("vllm") is None:
            raise ImportError(f"engine='vllm' needs vLLM: {INSTALL}, or engine_kwargs={{'base_url': ...}} of a server")
        self.settings = settings
        self._llm: Any = None
        self._serves: tuple[Any, ...] = ()

    def open(self, policy: LanguagePolicy, rules: Rules) -> None:
        """Start vLLM, unless it already runs with the same model and settings.

        Raises:
            ImportError: If vLLM is too old.
            ValueError: If vLLM cannot run the model.
        """
        length = rules.longest_prompt + rules.max_episode_tokens
        config = copy.deepcopy(policy.lm.config)
        config.architectures = [type(policy.lm).__name__]
        wanted = {
            "dtype": "bfloat16" if policy.bf16 else "float32",
            "max_model_len": length,
            "load_format": "dummy",
            "generation_config": "vllm",
            "skip_tokenizer_init": not rules.stop,
            "disable_log_stats": True,
            "worker_extension_cls": WORKER,
            "logprobs_mode": "processed_logprobs",
            **({"kv_cache_memory_bytes": 1 << 30} if policy.device.type == "cpu" else {"gpu_memory_utilization": 0.3}),
            **self.settings,
        }
        serves = config.to_json_string(), wanted["max_model_len"], wanted["dtype"], rules.tokenizer if rules.stop else None
        if self._llm is not None and serves == self._serves:
            return
        self.close()
        kind = import_vllm().LLM
        with tempfile.TemporaryDirectory() as folder, undisturbed():
            config.save_pretrained(folder)
            rules.tokenizer.save_pretrained(folder)
            try:
                self._llm = kind(folder, **wanted)
                self.complete([{"prompt": [0], "n": 1, "max_tokens": 1, "logprobs": 0}])  # some models fail only here
            except Exception as error:
                raise ValueError(
                    f"vLLM refuses the {type(policy.lm).__name__} in {wanted['dtype']}, with {self.settings}: {error}. What it "
                    "supports is listed at https://docs.vllm.ai/en/latest/models/supported_models/. Without engine=, the "
                    "policy generates its own responses"
                ) from error
        self._serves = serves

    def call(self, method: str, *args: Any) -> list[Any]:
        """Call a method of every worker."""
        return list(self._running().collective_rpc(method, args=args))

    def take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy weights into the running model, within this process's memory."""
        self.call("llm_env_take", tensors)

    def forget_prefixes(self) -> None:
        """Reset the prefix cache.

        Raises:
            RuntimeError: If a request is using the prefix cache.
        """
        if not self._running().reset_prefix_cache():
            raise RuntimeError("vLLM's prefix cache is in use and was not emptied: a request is under way")

    def complete(self, requests: list[dict[str, Any]]) -> list[list[tuple[list[int], list[float]]]]:
        """Generate `n` responses per request; return token ids and log-probs of each."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
        params = [
            SamplingParams(**{key: value for key, value in request.items() if key != "prompt"}, detokenize="stop" in request)
            for request in requests
        ]
        try:
            outputs = self._running().generate(prompts, params, use_tqdm=False)
        except BaseException:  # also on KeyboardInterrupt: else running requests return with the next ones
            self.close()
            raise
        return [[(list(c.token_ids), _drawn(c.token_ids, c.logprobs)) for c in output.outputs] for output in outputs]

    def _running(self) -> Any:
        if self._llm is None:
            raise StaleWeightsError("the vLLM in this process was shut down")
        return self._llm

    def close(self) -> None:
        """Shut down vLLM."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _drawn(ids: Any, logprobs: Any) -> list[float]:
    return [entry[token].logprob for token, entry in zip(ids, logprobs, strict=True)]


def import_vllm() -> Any:
    """Import vLLM and check its version.

    Raises:
        ImportError: If vLLM is too old.
    """
    import vllm

    if Version(vllm.__version__) < Version(OLDEST):
        raise ImportError(f"engine='vllm' needs vLLM {OLDEST} or newer, found {vllm.__version__}: {INSTALL}")
    return vllm


@contextmanager
def undisturbed() -> Iterator[None]:
    """Start vLLM within the block; restore random states and environment afterwards.

    vLLM runs in this process instead of a subprocess. `torch.set_num_threads` is restored, too.
    """
    wanted = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    set_num_threads = torch.set_num_threads  # vLLM replaces this function by one that does nothing
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
