"""Load language models and tokenizers, and convert them to and from the contents of their files."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from agents.policy.identity import check_same_config, check_same_model, describe, is_of_a_library, qualified_name, same_class
from agents.policy.lora import BASE_HASH, Adapter, apply_lora, check_bare, check_base, is_adapter, is_peft_model, load_config
from agents.policy.quantization import HALF, check_not_quantized, is_quantized, prepare
from llm_env.lm.models import check_causal, load_causal_lm
from llm_env.model_names import check_model_name
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PretrainedFiles = dict[str, bytes]
RECORD = "policy.json"  # what transformers' files lack: the model's class, and which of its weights are trained
GENERATION = "generation_config.json"
PROCESSOR = (  # files of a processor of images, sound or video, without its tokenizer
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "chat_template.json",
)


def files_of(
    lm: PreTrainedModel, tokenizer: Any, base: PreTrainedModel | None = None, processor: PretrainedFiles | None = None
) -> PretrainedFiles:
    """Return the contents of the files that rebuild a policy without its weights, by their path in a folder.

    Args:
        lm: the language model.
        tokenizer: its tokenizer, or None.
        base: the model without the adapter, if it has one.
        processor: files of a processor, which are copied.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = copy.deepcopy(lm.config)
        config.architectures = [str(qualified_name(lm)).rpartition(".")[2]]  # a config may be of several classes
        config.save_pretrained(folder)
        generation_config = getattr(lm, "generation_config", None)  # a custom class may have none
        if generation_config is not None:
            generation_config.to_json_file(str(Path(folder) / GENERATION), keys_to_pop=["compile_config"])
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
    record = {**describe(lm if base is None else base), "tokenizer": qualified_name(tokenizer)}
    return {**(processor or {}), **files, RECORD: json.dumps(record).encode()}


def record_of(model: Any) -> dict[str, Any]:
    """Return the record in `files_of` a model; empty if `model` is no such files, or files of version 0.1."""
    return json.loads(model[RECORD]) if isinstance(model, dict) and RECORD in model else {}


def processor_of(model: Any, tokenizer: Any = None) -> PretrainedFiles:
    """Return the files of a model's processor; empty if it has none.

    Args:
        model: see `load`. For a model object, the folder that it was loaded from is searched; a hub id only for models of
            several parts, such as text and images.
        tokenizer: a path, hub id, processor, or anything else.
    """
    from transformers import PreTrainedModel, ProcessorMixin
    from transformers.utils import cached_file

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
    """Load a causal language model in float32, its tokenizer and its adapter.

    Quantized weights stay as they are: see `agents.policy.quantization`.

    Args:
        model: a path, a hub id, a `PreTrainedModel`, or the result of `files_of` (the weights are loaded later). Or an adapter:
            its path, hub id or files, which name the base's path, or a `peft.PeftModel`.
        tokenizer: a path, a hub id, a tokenizer or a processor with one; by default the one in the model's folder.
        peft_config: a `peft.LoraConfig`, or the path or hub id of an adapter, to put an adapter into the model.
        base: for files of a full model, a model of its class; None rebuilds it from the config. For an adapter, its base: a
            path, a hub id or a `PreTrainedModel`; None loads it from the path that the adapter names.

    Returns:
        The model with its adapter, the tokenizer or None, and the adapter or None.

    Raises:
        TypeError: If `model` is none of these, or not a causal language model.
        ValueError: If an adapter does not fit, its base cannot be loaded, a quantized model has no adapter, or a model cannot
            be rebuilt from its files.
        ImportError: If peft is needed and not installed.
    """
    from transformers import AutoTokenizer, ProcessorMixin

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
            raise ValueError(f"base is a {type(base).__name__}, but the model has no adapter and needs no base. Leave it out")
        else:
            lm, tokenizer = _load_whole(model, tokenizer)
        if peft_config is None:
            check_not_quantized(lm)
            return _in_float32(lm), tokenizer, None
        adapter = apply_lora(_in_float32(lm), peft_config)
        return adapter.model, tokenizer, adapter
    if peft_config is not None:
        raise ValueError("the policy has an adapter already. Leave peft_config out to train it on, or give the base as policy")
    if is_peft_model(model):
        adapter = Adapter(model)
        check_causal(adapter.base, "policy")
        _in_float32(model.get_base_model())
    elif isinstance(model, dict):
        with _as_folder(model) as folder:
            tokenizer = _tokenizer_in(folder, model)
            lm, tokenizer = _load_base(load_config(folder), base, tokenizer, **_quantized_settings(model))
            check_same_model(record_of(model), lm)
            with torch.random.fork_rng():  # random weights, into which the saved ones are loaded
                adapter = apply_lora(_in_float32(lm), load_config(folder))
            _restore_generation_config(adapter.model, folder)
        check_base(adapter, model[BASE_HASH].decode())
    else:
        lm, tokenizer = _load_base(load_config(model), base, tokenizer or _tokenizer_beside(model))
        adapter = apply_lora(_in_float32(lm), model)
    return adapter.model, tokenizer, adapter


def _load_files(files: PretrainedFiles, model: Any) -> tuple[PreTrainedModel, Any]:
    """Rebuild a model from its files, with weights to be loaded, and load its tokenizer.

    Args:
        files: the result of `files_of`.
        model: a model of the saved class and config; None rebuilds one from the config.

    Raises:
        ValueError: If it cannot be rebuilt, or `model` has another class or config.
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
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.random.fork_rng():  # random weights, into which the saved ones are loaded
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        kind = record.get("class", "model")
        raise ValueError(
            f"the saved {kind} cannot be rebuilt from its config ({str(error).splitlines()[0]}). Give a model of that class "
            "and config, into which the file's weights are loaded: load(path, policy=<model>)"
        ) from error


def _restore_generation_config(lm: PreTrainedModel, folder: str) -> None:
    from transformers import GenerationConfig

    if (Path(folder) / GENERATION).exists():  # not in files of version 0.1
        lm.generation_config = GenerationConfig.from_pretrained(folder)


def _load_whole(model: Any, tokenizer: Any, name: str = "policy", **settings: Any) -> tuple[PreTrainedModel, Any]:
    """Load a language model without an adapter, and its tokenizer."""
    from transformers import AutoTokenizer, PreTrainedModel

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
    from transformers import AutoTokenizer, PreTrainedModel

    path = getattr(model, "name_or_path", "") if isinstance(model, PreTrainedModel) else ""
    if not path:
        return None
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception:  # transformers raises what it stumbles over: no tokenizer there is no error
        return None


def _load_base(config: Any, base: Any, tokenizer: Any, **settings: Any) -> tuple[PreTrainedModel, Any]:
    """Load the base of an adapter, and its tokenizer if `tokenizer` is None.

    Args:
        config: the adapter's config.
        base: a path, hub id or model; None loads the path in the config.
        tokenizer: the tokenizer, if it is known.
        settings: arguments to load the base from a path; see `_quantized_settings`.

    Raises:
        ValueError: If there is no model at the path.
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


def _quantized_settings(files: PretrainedFiles) -> dict[str, Any]:
    """Return the arguments that the quantized base of a saved adapter was loaded with; its weights depend on them."""
    config = json.loads(files["config.json"])
    if not (quantization := config.get("quantization_config")):
        return {}
    from transformers.quantizers.auto import AutoQuantizationConfig

    dtype = config.get("dtype", config.get("torch_dtype"))
    return {"quantization_config": AutoQuantizationConfig.from_dict(quantization), "dtype": getattr(torch, dtype)}


def _tokenizer_beside(adapter: str | Path) -> Any:
    """Load the tokenizer in an adapter's folder; None if there is none, as in folders that peft wrote."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(adapter))
    except (OSError, ValueError):
        return None


def _tokenizer_in(folder: str, files: PretrainedFiles) -> Any:
    """Load the tokenizer of a policy's files; None if there is none, or transformers cannot rebuild it."""
    from transformers import AutoTokenizer

    if not any(name.startswith("tokenizer") for name in files):
        return None
    kind = record_of(files).get("tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, ImportError, AttributeError) as error:
        tokenizer, reason = None, str(error).splitlines()[0]
    else:
        reason = f"they make a {qualified_name(tokenizer)}"
    # A class of transformers may be loaded as its subclass for the model.
    if tokenizer is not None and (kind is None or is_of_a_library(kind) or same_class(kind, qualified_name(tokenizer))):
        return tokenizer
    warn(f"the saved tokenizer, a {kind}, cannot be rebuilt from its files ({reason}); the policy uses the env's")
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
    """Convert a model to float32, except quantized weights."""
    if is_quantized(model):
        prepare(model)
    elif any(p.dtype in HALF for p in model.parameters()):
        warn("the model's half-precision weights are converted to float32, because small updates would be rounded away")
        model = model.float()
    return model
