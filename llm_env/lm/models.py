"""Causal language models of transformers: loading one and refusing what is none."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llm_env.lm.capabilities import REMEDY, NotCausal, refusing, takes_left_padding, trial, vocabulary_of
from llm_env.lm.inputs import model_inputs, without_cache
from llm_env.model_names import check_model_name
from llm_env.warn import warn

_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForNextSentencePrediction")


def load_causal_lm(path: str | Path, name: str, **settings: Any) -> PreTrainedModel:
    """Load a causal language model from a path or hub id.

    Args:
        path: a folder or hub id.
        name: the argument that `path` was given as; for messages.
        settings: keyword arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: If the files hold another kind of model (encoder-decoder, classifier, no head, bidirectional).
        ValueError: If the files hold Python code, which is not run.
        OSError: If there is no model.
    """
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
            f"{name}={text!r} holds a {kind}, which AutoModelForCausalLM does not load; {REMEDY}. A model of images and text "
            "is loaded with its own class, and the object given"
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
            "they do not compute the same, load it with its own class and give the object"
        )
    check_causal(model, name)
    return model


def _is_known(kind: str) -> bool:
    return hasattr(transformers, kind)


def _with_code(path: str, name: str) -> str:
    return (
        f"{name}={path!r} holds Python code, which is not run from a path; load the model yourself and give the "
        f"object: AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)"
    )


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise if a model is not a causal language model, found out by forward passes over a few tokens.

    Args:
        model: any model of transformers.
        name: the argument that it was given as; for messages.

    Raises:
        TypeError: If it is an encoder-decoder, gives no logits over its vocabulary at every token, reads tokens to come, or
            computes nothing from token ids alone.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TypeError(f"{name} is a {kind}, an encoder-decoder model; {REMEDY}")
    if _OTHER_HEAD.search(kind):
        raise TypeError(f"{name} is a {kind}, which is not a causal language model; {REMEDY}")
    if getattr(model, "hf_quantizer", None) is not None:  # on some CPUs a pass would pack its weights into another form
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
    outputs = min(size, getattr(model.config.get_text_config(), "vocab_size", size))  # some have embeddings for images as well
    if logits.ndim != 3 or logits.shape[1] != width or logits.shape[2] < outputs:
        raise TypeError(
            f"{name} is a {kind}, which gives logits of shape {tuple(logits.shape)} for {width} tokens of a vocabulary of "
            f"{size}; {REMEDY}"
        )
