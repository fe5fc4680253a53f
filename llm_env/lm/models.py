"""Load causal language models of transformers, and check that a model is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_env.lm.capabilities import REMEDY, NotCausal, refusing, takes_left_padding, trial, vocabulary_of
from llm_env.lm.inputs import model_inputs, without_cache
from llm_env.model_names import check_model_name
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForNextSentencePrediction")


def load_causal_lm(path: str | Path, name: str, **settings: Any) -> PreTrainedModel:
    """Load a causal language model from a path or hub id.

    Args:
        path: a folder or a hub id.
        name: name of the caller's argument, for error messages.
        settings: keyword arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: If the checkpoint is not of a causal language model (encoder-decoder, classifier, no head, bidirectional).
        ValueError: If the checkpoint needs its own Python code, which is not run.
        OSError: If there is no model at the path.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    text = str(path)
    check_model_name(path, name)
    try:
        config = AutoConfig.from_pretrained(text, trust_remote_code=False)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(_with_code(text, name)) from error
        raise
    kind = (config.architectures or [type(config).__name__])[0]
    if type(config) not in AutoModelForCausalLM._model_mapping:
        if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            raise ValueError(_with_code(text, name))
        raise TypeError(
            f"{name}={text!r} holds a {kind}, which AutoModelForCausalLM does not load; {REMEDY}. Load a model of images and "
            "text with its own class and pass the object"
        )
    if config.is_encoder_decoder or _OTHER_HEAD.search(kind):
        raise TypeError(f"{name}={text!r} holds a {kind}, which is not a causal language model; {REMEDY}")
    if (code := (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")) and not _is_known(code.split(".")[-1]):
        raise ValueError(_with_code(text, name))
    model, info = AutoModelForCausalLM.from_pretrained(text, output_loading_info=True, trust_remote_code=False, **settings)
    if missing := sorted(info["missing_keys"]):
        raise TypeError(
            f"{name}={text!r} holds a {kind} without {missing[0]}, which would be random in a {type(model).__name__}; {REMEDY}"
        )
    if not _is_known(kind):
        warn(
            f"{name}={text!r} holds a {kind}, which transformers does not know, and is loaded as a {type(model).__name__}; if "
            "the two classes compute different outputs, load the model with its own class and pass the object"
        )
    check_causal(model, name)
    return model


def _is_known(kind: str) -> bool:
    import transformers

    return hasattr(transformers, kind)


def _with_code(path: str, name: str) -> str:
    return (
        f"{name}={path!r} holds Python code, which is not run from a path; load the model yourself and pass the "
        f"object: AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)"
    )


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise if a model is not a causal language model, according to trial forward passes.

    Args:
        model: any model of transformers.
        name: name of the caller's argument, for error messages.

    Raises:
        TypeError: If the model is an encoder-decoder, does not return logits over its vocabulary at every token, attends to
            later tokens, or cannot compute outputs from token ids alone.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TypeError(f"{name} is a {kind}, an encoder-decoder model; {REMEDY}")
    if _OTHER_HEAD.search(kind):
        raise TypeError(f"{name} is a {kind}, which is not a causal language model; {REMEDY}")
    if getattr(model, "hf_quantizer", None) is not None:  # on some CPUs a forward pass repacks quantized weights
        if model.get_output_embeddings() is None:
            raise TypeError(f"{name} is a {kind}, which has no language-model head; {REMEDY}")
        return
    try:
        _check_outputs(model, name)
        takes_left_padding(model)
    except NotCausal as error:
        raise TypeError(f"{name}: {error}") from error


def _check_outputs(model: PreTrainedModel, name: str) -> None:
    kind, size, width = type(model).__name__, vocabulary_of(model), 2
    ids = torch.tensor([[size // 2, size - 1]], device=model.device)
    with trial(model), refusing(model):
        logits = getattr(model(**model_inputs(model, ids, torch.ones_like(ids)), **without_cache(model)), "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"{name} is a {kind}, which gives no logits: it has no language-model head; {REMEDY}")
    outputs = min(size, getattr(model.config.get_text_config(), "vocab_size", size))  # some models embed image tokens as well
    if logits.ndim != 3 or logits.shape[1] != width or logits.shape[2] < outputs:
        raise TypeError(
            f"{name} is a {kind}, which gives logits of shape {tuple(logits.shape)} for {width} tokens of a vocabulary of "
            f"{size}; {REMEDY}"
        )
