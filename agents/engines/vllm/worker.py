"""vLLM worker extension: replaceable weights, and log-probs for training.

vLLM imports this module before it loads the model, because of `--worker-extension-cls
agents.engines.vllm.worker.PolicyWeights`. Do not import it elsewhere: the import changes how vLLM's linear layers compute on a
CPU.
"""

from __future__ import annotations

import base64
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from vllm.model_executor.layers import utils as layer_utils
from vllm.v1.sample.sampler import Sampler


def keep_weight(layer: Any, remove_weight: bool) -> None:
    """Make a linear layer compute with its unpacked weight.

    On a CPU, vLLM packs the weight into a copy and discards the original. Then no weight is left to update, and packing again
    does not update a graph that was compiled with the first copy.
    """
    layer.cpu_linear = torch.nn.functional.linear


if hasattr(layer_utils, "dispatch_cpu_unquantized_gemm"):
    layer_utils.dispatch_cpu_unquantized_gemm = keep_weight


class PolicySampler(Sampler):
    """Sampler with log-probs after temperature and before top-k, top-p and min-p.

    vLLM offers log-probs only before temperature ("raw_logprobs") or after all truncation ("processed_logprobs").

    Args:
        vocab_size: only token ids below this are sampled.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__("processed_logprobs")
        self.vocab_size = vocab_size
        self._whole: Tensor | None = None

    def forward(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Sample from logits (B, V); see vLLM's `Sampler`."""
        logits[:, self.vocab_size :] = -torch.inf
        return super().forward(logits, *args, **kwargs)

    def apply_temperature(self, logits: Tensor, temp: Tensor, all_random: bool) -> Tensor:
        """Divide the logits by the temperature, and store the log-probs.

        vLLM applies min-p, top-k and top-p after this method.
        """
        logits = super().apply_temperature(logits, temp, all_random)
        self._whole = self.compute_logprobs(logits)
        return logits

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Sample tokens (B,); return them and log-probs (B, V) before truncation."""
        self._whole = None
        tokens, processed = super().sample(*args, **kwargs)
        return tokens, processed if self._whole is None else self._whole


class PolicyWeights:
    """Worker methods for `collective_rpc`; vLLM mixes this class into its worker.

    Over HTTP, the arguments must be strings or integers.
    """

    model_runner: Any
    _llm_env_version: str | None = None

    def llm_env_begin(self, vocab_size: int) -> dict[str, Any]:
        """Install `PolicySampler`; return the model's config, dtype and maximum length.

        Returns a dict with `error` if the worker's sampler cannot be replaced.
        """
        if not isinstance(self.model_runner.sampler, Sampler):
            return {"error": f"its sampler is a {type(self.model_runner.sampler).__qualname__}"}
        self.model_runner.sampler = PolicySampler(vocab_size)
        config = self.model_runner.model_config
        plain = {k: v for k, v in config.hf_text_config.to_dict().items() if isinstance(v, (int, str))}
        return {"config": plain, "dtype": str(config.dtype), "max_model_len": config.max_model_len}

    def llm_env_take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy weights, named as in transformers, into the running model."""
        self._llm_env_version = None
        if not hasattr(self, "_llm_env_taken"):
            self._llm_env_taken: set[str] = set()
        self._llm_env_taken |= self.model_runner.get_model().load_weights(iter(tensors))

    def llm_env_take_text(self, text: str) -> None:
        """Call `llm_env_take` with the contents of a safetensors file in base64."""
        self.llm_env_take(list(load(base64.b64decode(text)).items()))

    def llm_env_commit(self, version: str) -> dict[str, Any]:
        """Finish a weight update; return the parameters that received no weights.

        Args:
            version: name of the update; see `llm_env_version`.
        """
        if version == self._llm_env_version:  # a retried request, whose first answer was lost
            return {"missing": []}
        names = {name for name, _ in self.model_runner.get_model().named_parameters()}
        missing = sorted(names - self.__dict__.pop("_llm_env_taken", set()))
        self._llm_env_version = None if missing else version
        return {"missing": missing}

    def llm_env_version(self) -> dict[str, Any]:
        """Return the version of the last finished weight update.

        The version is None if there was no update, or an update has not been finished.
        """
        return {"version": self._llm_env_version}
