"""Language models and tokenizers from whatever a user may give, and as the contents of their files."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

PretrainedFiles = dict[str, bytes]


def files_of(lm: PreTrainedModel, tokenizer: Any) -> PretrainedFiles:
    """Config and tokenizer as the contents of their files: what is needed, besides the weights, to build a policy."""
    with tempfile.TemporaryDirectory() as folder:
        lm.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def load(model: Any, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """A causal language model in float32 and its tokenizer, if there is one.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or what `files_of` gave (weights to be loaded).
        tokenizer: a path, a hub id or a tokenizer; None takes the one beside the model's files.

    Raises:
        TypeError: `model` is none of these.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    if isinstance(model, dict):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in model.items():
                (Path(folder) / name).write_bytes(content)
            if any(name.startswith("tokenizer") for name in model):
                tokenizer = AutoTokenizer.from_pretrained(folder)
            with torch.random.fork_rng():  # the weights drawn here are about to be replaced
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    elif isinstance(model, (str, Path)):
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        model = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    elif not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"policy is a {type(model).__name__}; give a path, a hub id, a transformers PreTrainedModel or a LanguagePolicy"
        )
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        warnings.warn(
            "the model's half-precision weights are converted to float32: small updates would be lost in them", stacklevel=4
        )
        model = model.float()
    return model.requires_grad_(True), tokenizer
