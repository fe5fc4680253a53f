"""Check that a model is the one that a checkpoint's weights belong to: class, custom modules, config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.policy.quantization import is_quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LIBRARIES = ("torch", "transformers")  # their modules are rebuilt from a config
NEUTRAL = {  # entries of a config that do not change what a model computes
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
}
REMEDY = "give a model of that class, into which the file's weights are loaded: load(path, policy=<model>)"


def qualified_name(thing: Any) -> str | None:
    """Return the module and name of an object's class; None for None."""
    if thing is None:
        return None
    from torch.distributed.fsdp import FSDPModule

    kind = type(thing)
    if issubclass(kind, FSDPModule):
        kind = kind.__mro__[2]  # the class of the module before it was sharded
    return f"{kind.__module__}.{kind.__qualname__}"


def is_of_a_library(name: str) -> bool:
    """Return whether a class, by its qualified name, is part of torch or transformers."""
    return name.partition(".")[0] in LIBRARIES


def same_class(a: str | None, b: str | None) -> bool:
    """Return whether two qualified names are of one class.

    The modules may differ: a script that runs is `__main__`, and the code of a hub's model is in a download folder. A class
    of transformers is never the same as a custom class.
    """
    if a is None or b is None:
        return a is b
    return a.rpartition(".")[2] == b.rpartition(".")[2] and is_of_a_library(a) == is_of_a_library(b)


def describe(model: PreTrainedModel) -> dict[str, Any]:
    """Return the classes of a model and its config, and the modules that a config does not rebuild.

    Those are modules of custom classes, or with a replaced forward.
    """
    modules = {}
    for name, module in model.named_modules():
        kind = str(qualified_name(module))
        forward = vars(module).get("forward")
        # accelerate's hooks (which place weights) and a compiled forward compute the same.
        if forward is not None and not hasattr(module, "_hf_hook") and not hasattr(forward, "_torchdynamo_orig_callable"):
            kind += " with another forward"
        elif name == "" or is_of_a_library(kind):
            continue
        modules[name] = kind
    return {"class": qualified_name(model), "config": qualified_name(model.config), "modules": modules}


def is_rebuilt(model: PreTrainedModel) -> bool:
    """Return whether `AutoModelForCausalLM.from_config` rebuilds the model from its config."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known: Any = AutoModelForCausalLM._model_mapping
    config = type(model.config)
    if model.config.model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model.config.model_type] is not config:
        return False
    if config not in known or (describe(model)["modules"] and not is_quantized(model)):  # a quantizer replaces modules
        return False
    kinds = known[config] if isinstance(known[config], (list, tuple)) else [known[config]]
    return any(same_class(qualified_name(model), f"{kind.__module__}.{kind.__qualname__}") for kind in kinds)


def check_same_model(record: dict[str, Any], model: PreTrainedModel) -> None:
    """Raise if a model does not have the class and modules of the saved model.

    Args:
        record: `describe` of the saved model; empty for files of version 0.1.
        model: the model to load its weights into.

    Raises:
        ValueError: If classes or modules differ.
    """
    if "class" not in record:
        return
    saved, found = record["class"], describe(model)
    for part, key in (("model", "class"), ("config", "config")):
        if not same_class(record[key], found[key]):
            raise ValueError(f"the saved {part} is a {record[key]}, but the {part} here is a {found[key]}; {REMEDY}")
    for name in sorted(record["modules"].keys() | found["modules"].keys()):
        before, now = record["modules"].get(name), found["modules"].get(name)
        if before is None or now is None or not _same_module(before, now):
            which = f"module {name!r}" if name else "model itself"
            raise ValueError(
                f"the {which} of the saved {saved} was {before or 'as transformers makes it'}, but in the model here it is "
                f"{now or 'as transformers makes it'}; {REMEDY.replace('of that class', 'with the same modules')}"
            )


def _same_module(a: str, b: str) -> bool:
    (a, _, forward), (b, _, other_forward) = a.partition(" "), b.partition(" ")
    return same_class(a, b) and forward == other_forward


def check_same_config(folder: str, model: PreTrainedModel) -> None:
    """Raise if a model does not have the config of the saved model.

    Args:
        folder: has the saved config.json.
        model: the model to load the weights into.

    Raises:
        ValueError: If they differ in more than names and token ids.
    """
    config, kind = model.config, json.loads((Path(folder) / "config.json").read_text()).get("model_type")
    if kind != config.model_type:
        differing = [("model_type", kind, config.model_type)]
    else:
        differing = _differences(_full_config(type(config).from_pretrained(folder)), _full_config(config))
    if differing:
        name, before, now = min(differing, key=lambda row: row[0])
        raise ValueError(
            f"the saved model's config has {name}={before!r}, that of the {type(model).__name__} given to load has {now!r}; "
            "give a model with the same config: load(path, policy=<model>)"
        )


def _full_config(config: Any) -> dict[str, Any]:
    """Return all entries of a config as JSON has them, defaults included."""
    return json.loads(config.to_json_string(use_diff=False))


def _differences(saved: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return name and both values of the entries in which two configs differ, of those that both have."""
    differing = []
    for name in (saved.keys() & other.keys()) - NEUTRAL:
        a, b = saved[name], other[name]
        if isinstance(a, dict) and isinstance(b, dict):
            differing += [(f"{name}.{inner}", *values) for inner, *values in _differences(a, b)]
        elif a != b:
            differing.append((name, a, b))
    return differing
