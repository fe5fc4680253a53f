"""Language models and tokenizers from whatever a user may give, and as the contents of their files."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from agents.adapters import BASE_HASH, Adapter, check_bare, check_base, is_adapter, is_peft_model, load_config, put_on

PretrainedFiles = dict[str, bytes]


def files_of(lm: PreTrainedModel, tokenizer: Any) -> PretrainedFiles:
    """Config and tokenizer as the contents of their files: what is needed, besides the weights, to build a policy."""
    with tempfile.TemporaryDirectory() as folder:
        lm.config.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in Path(folder).iterdir() if file.is_file()}


def load(model: Any, tokenizer: Any, peft_config: Any = None, base: Any = None) -> tuple[PreTrainedModel, Any, Adapter | None]:
    """A causal language model in float32, its tokenizer, if there is one, and the adapter in it, if there is one.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or what `files_of` gave (weights to be loaded). With an adapter: the path,
            hub id or files of one, which know their base's path, or a `peft.PeftModel`.
        tokenizer: a path, a hub id or a tokenizer; None takes the one beside the model's files.
        peft_config: a `peft.LoraConfig`, or the path or hub id of an adapter, to put one into the model.
        base: the base of the adapter `model`: a path, a hub id or a `PreTrainedModel`; None is the path that it knows.

    Raises:
        TypeError: `model` is none of these.
        ValueError: an adapter does not fit, or its base is not to be had.
        ImportError: an adapter is wanted and peft is not installed.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    if not is_adapter(model) and not is_peft_model(model):
        if base is not None:
            raise ValueError(f"a base was given, a {type(base).__name__}, but the model is whole and needs none; leave it out")
        lm, tokenizer = _load_whole(model, tokenizer)
        if peft_config is None:
            return lm.requires_grad_(True), tokenizer, None
        adapter = put_on(lm, peft_config)
        return adapter.model, tokenizer, adapter
    if peft_config is not None:
        raise ValueError("the policy has an adapter already; leave peft_config out to train it on, or give the base as policy")
    if is_peft_model(model):
        _in_float32(model.get_base_model())
        adapter = Adapter(model)
    elif isinstance(model, dict):
        with _as_folder(model) as folder:
            tokenizer = _tokenizer_beside(folder)
            lm, tokenizer = _load_base(load_config(folder), base, tokenizer)
            with torch.random.fork_rng():  # the weights drawn here are about to be replaced
                adapter = put_on(lm, load_config(folder))
        check_base(adapter, model[BASE_HASH].decode())
    else:
        lm, tokenizer = _load_base(load_config(model), base, tokenizer or _tokenizer_beside(model))
        adapter = put_on(lm, model)
    return adapter.model, tokenizer, adapter


def _load_whole(model: Any, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """A language model whose weights are all its own, and its tokenizer."""
    if isinstance(model, dict):
        with _as_folder(model) as folder:
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
    check_bare(model)
    return _in_float32(model), tokenizer


def _load_base(config: Any, base: Any, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """The model that an adapter belongs to, and its tokenizer where `tokenizer` is None.

    Raises:
        ValueError: it is not where it was.
    """
    if base is not None and not isinstance(base, (str, Path)):
        return _load_whole(base, tokenizer)
    path = base or config.base_model_name_or_path
    remedy = (
        "give it: load(path, policy=<path or model>) for an agent, or, for an adapter's folder, the base as policy and "
        "policy_kwargs={'peft_config': <that folder>}"
    )
    if not path:
        raise ValueError(f"the adapter's base was a model object, which has no path to load it from; {remedy}")
    try:
        return _load_whole(path, tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the adapter's base {str(path)!r} cannot be loaded ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def _tokenizer_beside(adapter: str | Path) -> Any:
    """The tokenizer that was saved with an adapter; None where none was: peft leaves it with the base."""
    try:
        return AutoTokenizer.from_pretrained(str(adapter))
    except (OSError, ValueError):
        return None


@contextmanager
def _as_folder(files: PretrainedFiles) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        yield folder


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        warnings.warn(
            "the model's half-precision weights are converted to float32: small updates would be lost in them", stacklevel=5
        )
        model = model.float()
    return model
