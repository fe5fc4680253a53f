"""What a vLLM worker needs besides its own: a model whose weights can be replaced, and the log-probs that training wants.

vLLM imports this module where it was told to, before it loads the model: `--worker-extension-cls
agents.engines.vllm.worker.PolicyWeights`. Nothing else may import it, for it changes how vLLM's linear layers compute on a CPU.
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
    """Let a linear layer compute with its weight as it stands.

    On a CPU vLLM packs the weight into a copy, and discards the weight. Then there is nothing left to load
    into, and whoever packs anew does not reach a graph that was compiled with the first copy.
    """
    layer.cpu_linear = torch.nn.functional.linear


if hasattr(layer_utils, "dispatch_cpu_unquantized_gemm"):
    layer_utils.dispatch_cpu_unquantized_gemm = keep_weight


class PolicySampler(Sampler):
    """vLLM's sampler, restricted to the first `vocab_size` ids, whose log-probs are those of the whole tempered distribution.

    vLLM's own are either untempered ("raw_logprobs") or those of what top-k, top-p and min-p leave ("processed_logprobs").
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__("processed_logprobs")
        self.vocab_size = vocab_size
        self._whole: Tensor | None = None

    def forward(self, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Draw from logits (B, V): see vLLM's `Sampler`."""
        logits[:, self.vocab_size :] = -torch.inf
        return super().forward(logits, *args, **kwargs)

    def apply_temperature(self, logits: Tensor, temp: Tensor, all_random: bool) -> Tensor:
        """Divide the logits by the temperature, and keep what that gives: min-p, top-k and top-p come after it."""
        logits = super().apply_temperature(logits, temp, all_random)
        self._whole = self.compute_logprobs(logits)
        return logits

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Tokens (B,) and the log-probs (B, V) of what they were drawn from."""
        self._whole = None
        tokens, processed = super().sample(*args, **kwargs)
        return tokens, processed if self._whole is None else self._whole


class PolicyWeights:
    """Methods that vLLM mixes into its worker, for `collective_rpc`; over HTTP, arguments are strings and whole numbers."""

    model_runner: Any
    _llm_env_version: str | None = None

    def llm_env_begin(self, vocab_size: int) -> dict[str, Any]:
        """Draw among the first `vocab_size` ids from here on; what model this is: its config's entries, dtype and length."""
        if not isinstance(self.model_runner.sampler, Sampler):
            return {"error": f"its sampler is a {type(self.model_runner.sampler).__qualname__}"}
        self.model_runner.sampler = PolicySampler(vocab_size)
        config = self.model_runner.model_config
        plain = {k: v for k, v in config.hf_text_config.to_dict().items() if isinstance(v, (int, str))}
        return {"config": plain, "dtype": str(config.dtype), "max_model_len": config.max_model_len}

    def llm_env_take(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Copy some of the weights, by their names in transformers, into the model that is running."""
        self._llm_env_version = None
        if not hasattr(self, "_llm_env_taken"):
            self._llm_env_taken: set[str] = set()
        self._llm_env_taken |= self.model_runner.get_model().load_weights(iter(tensors))

    def llm_env_take_text(self, text: str) -> None:
        """`llm_env_take` of a safetensors file in base64."""
        self.llm_env_take(list(load(base64.b64decode(text)).items()))

    def llm_env_commit(self, version: str) -> dict[str, Any]:
        """End an update of the weights, and name it; return which parameters it did not reach."""
        if version == self._llm_env_version:  # asked again by somebody who did not get the answer
            return {"missing": []}
        names = {name for name, _ in self.model_runner.get_model().named_parameters()}
        missing = sorted(names - self.__dict__.pop("_llm_env_taken", set()))
        self._llm_env_version = None if missing else version
        return {"missing": missing}

    def llm_env_version(self) -> dict[str, Any]:
        """Return the name of the last push; None where there was none, or one was not ended."""
        return {"version": self._llm_env_version}
