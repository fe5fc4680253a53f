"""Language models and tokenizers from whatever a user may give, and as the contents of their files."""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.utils import cached_file

from agents.policy.identity import check_same_config, check_same_model, describe, is_of_a_library, qualified_name, same_class
from agents.policy.lora import BASE_HASH, Adapter, apply_lora, check_bare, check_base, is_adapter, is_peft_model, load_config
from agents.policy.quantization import HALF, check_not_quantized, is_quantized, prepare
from llm_env.lm.models import check_causal, load_causal_lm
from llm_env.model_names import check_model_name

PretrainedFiles = dict[str, bytes]
RECORD = "policy.json"  # what no file of transformers says: the model's class, and which of its weights are trained
GENERATION = "generation_config.json"
PROCESSOR = (  # what a processor of images, sound or video has beside a tokenizer
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
)


def files_of(
    lm: PreTrainedModel, tokenizer: Any, base: PreTrainedModel | None = None, processor: PretrainedFiles | None = None
) -> PretrainedFiles:
    """Return what is needed, besides the weights, to build a policy: the contents of files, by their path in a folder.

    Args:
        lm: the language model.
        tokenizer: its tokenizer, or None.
        base: the model without the adapter, where there is one.
        processor: files of a processor, which are kept as they are.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(lm.config)
        config.architectures = [str(qualified_name(lm)).rpartition(".")[2]]  # a config may have several classes
        config.save_pretrained(folder)
        generation_config = getattr(lm, "generation_config", None)  # a class of the user's own may have none
        if generation_config is not None:
            generation_config.to_json_file(str(Path(folder) / GENERATION), keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
    record = {**describe(lm if base is None else base), "tokenizer": qualified_name(tokenizer)}
    return {**(processor or {}), **files, RECORD: json.dumps(record).encode()}


def record_of(model: Any) -> dict[str, Any]:
    """Return what `files_of` notes of a model besides its files; nothing for what is no files, or files of version 0.1."""
    return json.loads(model[RECORD]) if isinstance(model, dict) and RECORD in model else {}


def processor_of(model: Any, tokenizer: Any = None) -> PretrainedFiles:
    """Return the files of the processor that belongs to a model; none where there is none.

    Args:
        model: what a policy is made of, see `load`. Of a model object, the folder that it was loaded from is looked at. A hub
            id is looked at for models of several parts alone, such as text and images.
        tokenizer: a path, hub id, processor, or anything else.
    """
    if isinstance(model, dict):
        return {name: content for name, content in model.items() if name in PROCESSOR}
    if isinstance(tokenizer, ProcessorMixin):
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return {name: (Path(folder) / name).read_bytes() for name in PROCESSOR if (Path(folder) / name).exists()}
    places = [str(place) for place in (model, tokenizer) if isinstance(place, (str, Path))]
    if isinstance(model, PreTrainedModel) and model.name_or_path:
        places.append(model.name_or_path)
    files: PretrainedFiles = {}
    for place in places:
        if not Path(place).is_dir() and not (isinstance(model, PreTrainedModel) and _has_parts(model)):
            continue
        for name in PROCESSOR:
            file = cached_file(
                place, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
            )
            if file is not None:
                files.setdefault(name, Path(file).read_bytes())
    return files


def _has_parts(model: PreTrainedModel) -> bool:
    return model.config.get_text_config() is not model.config


def load(model: Any, tokenizer: Any, peft_config: Any = None, base: Any = None) -> tuple[PreTrainedModel, Any, Adapter | None]:
    """Load a causal language model in float32, its tokenizer and the adapter in it, where there are such.

    The weights of a quantized model stay as they are, but for those that are not quantized: see `agents.policy.quantization`.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or what `files_of` gave (weights to be loaded). With an adapter: the path,
            hub id or files of one, which know their base's path, or a `peft.PeftModel`.
        tokenizer: a path, a hub id, a tokenizer or a processor with one; None takes the one beside the model's files.
        peft_config: a `peft.LoraConfig`, or the path or hub id of an adapter, to put one into the model.
        base: for files, a model of the class that they are of, or, of an adapter's, its base: a path, a hub id or a
            `PreTrainedModel`. None rebuilds the model from its config, and takes the base from the path that the adapter knows.

    Raises:
        TypeError: If `model` is none of these, or not a causal language model.
        ValueError: If an adapter does not fit, its base is not to be had, a quantized model has no adapter, or the model that
            the files are of cannot be rebuilt.
        ImportError: If an adapter is wanted and peft is not installed.
    """
    check_model_name(model, "policy")
    check_model_name(tokenizer, "tokenizer")
    if isinstance(tokenizer, (str, Path)):
        tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
    elif isinstance(tokenizer, ProcessorMixin):
        tokenizer = tokenizer.tokenizer
    if not is_adapter(model) and not is_peft_model(model):
        if isinstance(model, dict):
            lm, tokenizer = _load_files(model, base)
        elif base is not None:
            raise ValueError(f"a base was given, a {type(base).__name__}, but the model is whole and needs none; leave it out")
        else:
            lm, tokenizer = _load_whole(model, tokenizer)
        if peft_config is None:
            check_not_quantized(lm)
            return _in_float32(lm), tokenizer, None
        adapter = apply_lora(_in_float32(lm), peft_config)
        return adapter.model, tokenizer, adapter
    if peft_config is not None:
        raise ValueError("the policy has an adapter already; leave peft_config out to train it on, or give the base as policy")
    if is_peft_model(model):
        adapter = Adapter(model)
        check_causal(adapter.base, "policy")
        _in_float32(model.get_base_model())
    elif isinstance(model, dict):
        with _as_folder(model) as folder:
            tokenizer = _tokenizer_in(folder, model)
            lm, tokenizer = _load_base(load_config(folder), base, tokenizer, **_as_loaded(model))
            check_same_model(record_of(model), lm)
            with torch.random.fork_rng():  # the weights drawn here are about to be replaced
                adapter = apply_lora(_in_float32(lm), load_config(folder))
            _restore_generation_config(adapter.model, folder)
        check_base(adapter, model[BASE_HASH].decode())
    else:
        lm, tokenizer = _load_base(load_config(model), base, tokenizer or _tokenizer_beside(model))
        adapter = apply_lora(_in_float32(lm), model)
    return adapter.model, tokenizer, adapter


def _load_files(files: PretrainedFiles, model: Any) -> tuple[PreTrainedModel, Any]:
    """The model that `files_of` was given, with weights to be loaded, and its tokenizer.

    Args:
        files: what `files_of` gave.
        model: one of its class and config, in whose place the weights come; None rebuilds it from the config.

    Raises:
        ValueError: If it cannot be rebuilt, or `model` is another one.
    """
    record = record_of(files)
    with _as_folder(files) as folder:
        if model is None:
            lm = _rebuild(folder, record)
        else:
            lm, _ = _load_whole(model, None, "the model given to load")
            check_same_config(folder, lm)
        check_same_model(record, lm)
        _restore_generation_config(lm, folder)
        return lm.requires_grad_(True), _tokenizer_in(folder, files)


def _rebuild(folder: str, record: dict[str, Any]) -> PreTrainedModel:
    try:
        with torch.random.fork_rng():  # the weights drawn here are about to be replaced
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        kind = record.get("class", "model")
        raise ValueError(
            f"the saved {kind} cannot be rebuilt from its config ({str(error).splitlines()[0]}); give one of that class and "
            "config, whose weights are replaced by the file's: load(path, policy=<model>)"
        ) from error


def _restore_generation_config(lm: PreTrainedModel, folder: str) -> None:
    if (Path(folder) / GENERATION).exists():  # not in files of version 0.1
        lm.generation_config = GenerationConfig.from_pretrained(folder)


def _load_whole(model: Any, tokenizer: Any, name: str = "policy", **settings: Any) -> tuple[PreTrainedModel, Any]:
    """A language model whose weights are all its own, and its tokenizer."""
    if isinstance(model, (str, Path)):
        lm = load_causal_lm(model, name, **{"dtype": torch.float32, **settings})
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
        model = lm
    elif not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"{name} is a {type(model).__name__}; give a path, a hub id, a transformers PreTrainedModel or a LanguagePolicy"
        )
    else:
        check_causal(model, name)
    check_bare(model)
    return model, tokenizer


def tokenizer_of_object(model: Any) -> Any:
    """Load the tokenizer from the folder, or the cached files of the hub id, that a model object came from; None if unknown."""
    path = getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else ""
    if not path:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises what it stumbles over: no tokenizer there is no error
        return None


def _load_base(config: Any, base: Any, tokenizer: Any, **settings: Any) -> tuple[PreTrainedModel, Any]:
    """The model that an adapter belongs to, and its tokenizer where `tokenizer` is None.

    Args:
        config: the adapter's.
        base: a path, hub id or model; None takes the path that the adapter knows.
        tokenizer: the tokenizer, if it is known.
        settings: how the base is loaded from a path; see `_as_loaded`.

    Raises:
        ValueError: If it is not where it was.
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
        return _load_whole(path, tokenizer, **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the adapter's base {str(path)!r} cannot be loaded ({str(error).splitlines()[0]}); {remedy}"
        ) from error


def _as_loaded(files: PretrainedFiles) -> dict[str, Any]:
    """How the base of a saved adapter was loaded, where it was quantized: that is what its weights depend on."""
    config = json.loads(files["config.json"])
    if not (quantization := config.get("quantization_config")):
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    dtype = config.get("dtype", config.get("torch_dtype"))
    return {"quantization_config": AutoQuantizationConfig.from_dict(quantization), "dtype": getattr(torch, dtype)}


def _tokenizer_beside(adapter: str | Path) -> Any:
    """The tokenizer that was saved with an adapter; None where none was: peft leaves it with the base."""
    try:
        return AutoTokenizer.from_pretrained(str(adapter))
    except (OSError, ValueError):
        return None


def _tokenizer_in(folder: str, files: PretrainedFiles) -> Any:
    """The tokenizer of a policy's files; None where there is none, or transformers alone cannot rebuild it."""
    if not any(name.startswith("tokenizer") for name in files):
        return None
    kind = record_of(files).get("tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        tokenizer, reason = None, str(error).splitlines()[0]
    else:
        reason = f"they make a {qualified_name(tokenizer)}"
    # One of transformers' own may come back as a more special one of them, under the model's name.
    if tokenizer is not None and (kind is None or is_of_a_library(kind) or same_class(kind, qualified_name(tokenizer))):
        return tokenizer
    warnings.warn(
        f"the saved tokenizer, a {kind}, cannot be rebuilt from its files ({reason}); the policy takes over that of the env",
        stacklevel=5,
    )
    return None


@contextmanager
def _as_folder(files: PretrainedFiles) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        write(files, folder)
        yield folder


def write(files: PretrainedFiles, folder: str | Path) -> None:
    """Write files into a folder."""
    for name, content in files.items():
        path = Path(folder) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _in_float32(model: PreTrainedModel) -> PreTrainedModel:
    if is_quantized(model):
        prepare(model)
    elif any(p.dtype in HALF for p in model.parameters()):
        warnings.warn(
            "the model's half-precision weights are converted to float32: small updates would be lost in them", stacklevel=5
        )
        model = model.float()
    return model
