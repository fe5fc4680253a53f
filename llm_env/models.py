"""Causal language models of transformers: loading one, refusing what is none, and how many positions one has."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llm_env.inputs import model_inputs

LIMITS = (  # the names under which configs give the number of positions
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_target_positions",
    "max_context_length",
    "n_ctx",
    "seq_length",
)
_POSITIONS = re.compile(r"(^|_)(wpe|pos|positions?)(_|$)")  # names of tables of learned or fixed positions
_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|ForNextSentencePrediction")
_EXACT = {torch.float32, torch.float64}
_TOLERANCE, _ROUGH_TOLERANCE = 1e-4, 0.05  # of the largest logit: where all weights are exact, and else

REMEDY = "give a causal language model, as AutoModelForCausalLM.from_pretrained(...) loads it"


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and afterwards back into the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def load_causal_lm(path: str | Path, name: str, **settings: Any) -> PreTrainedModel:
    """Load a causal language model from a path or hub id.

    Args:
        path: a folder or hub id.
        name: the argument that `path` was given as; for messages.
        settings: keyword arguments of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        TypeError: If the files hold another kind of model (encoder-decoder, classifier, no head, bidirectional).
        ValueError: If the files hold code of their own, which is not run.
        OSError: If there is no model.
    """
    text = str(path)
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
        warnings.warn(
            f"{name}={text!r} holds a {kind}, which transformers does not know, and is loaded as a {type(model).__name__}; if "
            "they do not compute the same, load it with its own class and give the object",
            stacklevel=4,
        )
    check_causal(model, name)
    return model


def _is_known(kind: str) -> bool:
    return hasattr(transformers, kind)


def _with_code(path: str, name: str) -> str:
    return (
        f"{name}={path!r} holds Python code of its own, which is not run from a path; load the model yourself and give the "
        f"object: AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)"
    )


def check_causal(model: PreTrainedModel, name: str) -> None:
    """Raise if a model is not a causal language model, found out by two forward passes over two tokens.

    Args:
        model: any model of transformers.
        name: the argument that it was given as; for messages.

    Raises:
        TypeError: If it is an encoder-decoder, gives no logits over its vocabulary at every token, or reads tokens to come.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise TypeError(f"{name} is a {kind}, an encoder-decoder model; {REMEDY}")
    if _OTHER_HEAD.search(kind):
        raise TypeError(f"{name} is a {kind}, which is not a causal language model; {REMEDY}")
    size, width = _vocabulary_of(model, name), 2
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    rows = torch.tensor([[size // 2, size - 1], [size // 2, 0]], device=model.device)
    logits = []
    for ids in rows.split(1):
        try:
            with evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
                output = model(**model_inputs(model, ids, torch.ones_like(ids)), **settings)
        except Exception as error:
            if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                return  # one is meant, whatever keeps it from reading two tokens
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise TypeError(f"{name} is a {kind}, which computes nothing from token ids alone ({reason}); {REMEDY}") from error
        logits.append(getattr(output, "logits", None))
    first, second = logits
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        raise TypeError(f"{name} is a {kind}, which gives no logits: it has no language-model head; {REMEDY}")
    outputs = min(size, getattr(model.config.get_text_config(), "vocab_size", size))  # some have embeddings for images as well
    if first.ndim != 3 or first.shape[1] != width or first.shape[2] < outputs:
        raise TypeError(
            f"{name} is a {kind}, which gives logits of shape {tuple(first.shape)} for {width} tokens of a vocabulary of "
            f"{size}; {REMEDY}"
        )
    before, after = first[0, 0].double(), second[0, 0].double()
    exact = getattr(model, "hf_quantizer", None) is None and {p.dtype for p in model.parameters()} <= _EXACT
    tolerance = _TOLERANCE if exact else _ROUGH_TOLERANCE
    if bool(((before - after).abs() > tolerance * before.abs().max()).any()):  # never where they are NaN
        raise TypeError(
            f"{name} is a {kind} whose logits depend on tokens that come later, as those of an encoder; {REMEDY}, with "
            "config.is_decoder=True where the class has that"
        )


def _vocabulary_of(model: PreTrainedModel, name: str) -> int:
    try:
        return len(model.get_input_embeddings().weight)
    except (NotImplementedError, AttributeError, TypeError) as error:
        raise TypeError(f"{name} is a {type(model).__name__}, which has no token embeddings; {REMEDY}") from error


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model can read, prompt and response together; None where it has no limit.

    The limit is that of the config of the text model, under any of `LIMITS`, or the size of a table of positions (less its
    offset, as in OPT and BART), whichever is smaller. Beyond a table a forward pass fails. Beyond the limit of rotary positions
    it does not, but the model has not learned them, so that they count as a limit as well. `context_length` (RWKV) is a hint
    about its training and is not read; nor is the `seq_length` of models that compute ALiBi for any length (BLOOM).
    """
    config, decoder = model.config.get_text_config(), model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # a part that has the name by chance, such as ModernBERT's head
        decoder = model.base_model
    hints = {"context_length", *(["seq_length"] if hasattr(decoder, "build_alibi_tensor") else [])}
    named = [getattr(config, name, None) for name in LIMITS if config.attribute_map.get(name, name) not in hints]
    known = [value for value in named if isinstance(value, int) and not isinstance(value, bool) and value > 0][:1]
    return min([*known, *map(_usable, _position_tables(decoder, decoder.config))], default=None)


def _position_tables(module: nn.Module, config: Any) -> Iterator[nn.Embedding]:
    """The tables of absolute positions in a text model, but not those of models of images in it, which have other configs."""
    for name, part in module.named_children():
        if isinstance(part, nn.Embedding):
            if _POSITIONS.search(name) and "rel" not in name:
                yield part
        elif not isinstance(part, PreTrainedModel) or part.config is config:
            yield from _position_tables(part, config)


def _usable(table: nn.Embedding) -> int:
    """The positions of a table that tokens can have."""
    reserved = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.weight.shape[0] - int(getattr(table, "offset", 0)) - reserved


def check_length(limit: int | None, prompt: int, new: int, owner: str = "the model") -> None:
    """Raise if a prompt and what follows it have more tokens than a model has positions.

    Args:
        limit: of the model, see `max_positions`.
        prompt: tokens of the longest prompt.
        new: `max_new_tokens`; 0 where nothing follows.
        owner: whose limit it is; for messages.

    Raises:
        ValueError: If there are more.
    """
    if limit is None or prompt + new <= limit:
        return
    if not new:
        raise ValueError(f"the longest row of tokens needs {prompt} positions, {owner} has {limit}; shorten it")
    remedy = "shorten the prompts" if prompt >= limit else f"lower max_new_tokens to {limit - prompt} or shorten the prompts"
    raise ValueError(
        f"the longest prompt, of {prompt} tokens, and max_new_tokens={new} need {prompt + new} positions, {owner} has {limit}; "
        f"{remedy}"
    )
