"""Find the quantized weights of a model, and prepare it for training an adapter."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32, torch.float64)
PACKED = (torch.uint8, torch.int8, torch.int16, torch.int32)  # dtypes of buffers with packed weights
REMEDY = "Set policy_kwargs={'peft_config': peft.LoraConfig(...)} to train an adapter on it, or load it without quantization"


def is_quantized(model: PreTrainedModel) -> bool:
    """Return whether a model's weights are quantized (bitsandbytes, GPTQ, AWQ, FP8, torchao, ...).

    Decided by the model's flags, or by its parameters if it has no flags.
    """
    is_flagged = bool(getattr(model, "is_quantized", False)) or getattr(model, "hf_quantizer", None) is not None
    return is_flagged or any(_is_of_a_quantizer(parameter) for parameter in model.parameters())


def check_not_quantized(model: PreTrainedModel) -> None:
    """Raise if a model is quantized, so that its weights cannot be trained.

    Raises:
        ValueError: If it is.
    """
    if is_quantized(model):
        raise ValueError(f"the {type(model).__name__} is quantized, so that its weights cannot be trained. {REMEDY}")


def quantized_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with quantized weights: integers, 8-bit floats, or a quantizer's parameter class."""
    for module in model.modules():
        parameters = [p for p in module._parameters.values() if p is not None]
        buffers = [b for b in module._buffers.values() if b is not None]
        packed = not parameters and any(b.ndim > 1 and b.dtype in PACKED for b in buffers)  # GPTQ, AWQ
        if packed or any(map(_is_of_a_quantizer, parameters)):
            yield module


def weight_count(model: nn.Module) -> int:
    """Count the weights of a model; packed quantized weights count one by one, tied weights once."""
    counts: dict[int, int] = {}
    sized = {module for module in quantized_modules(model) if hasattr(module, "in_features")}
    for module in model.modules():
        if module in sized:
            counts[id(module)] = int(vars(module)["in_features"]) * int(vars(module)["out_features"])
        else:
            counts |= {id(p): p.numel() for p in module._parameters.values() if p is not None}  # by id: tied weights count once
    return sum(counts.values())


def prepare(model: nn.Module) -> None:
    """Convert the half-precision weights of a quantized model that are not quantized to float32, to train an adapter on it.

    Those are norms, embeddings, head and adapter, as in `peft.prepare_model_for_kbit_training`. Quantized weights stay as they
    are, bit for bit. bitsandbytes' repacking of 4-bit weights for CPUs with AVX512-BF16 is turned off, because no gradient
    passes through repacked weights. Its message about casting the inputs of 8-bit layers is logged once, not at every call.
    """
    log = logging.getLogger("bitsandbytes.autograd._functions")
    if not any(isinstance(part, _Once) for part in log.filters):
        log.addFilter(_Once())
    quantized = set(quantized_modules(model))
    for module in quantized:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
            module.state_dict()  # unpacks repacked weights
    for module in model.modules():
        if module not in quantized:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dtype in HALF:
                    parameter.data = parameter.data.float()


class _Once(logging.Filter):
    """Lets each message of a logger pass once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the message is new."""
        new = record.msg not in self._seen
        self._seen.add(record.msg)
        return new


def _is_of_a_quantizer(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return type(parameter) not in (nn.Parameter, Tensor, DTensor) or parameter.dtype not in FLOATS
