"""LoRA through peft: train low-rank matrices beside the frozen weights of a language model."""

from __future__ import annotations

import copy
import hashlib
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from agents.policy.quantization import is_quantized, quantized_modules
from llm_env.warn import warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, BASE_HASH = "adapter_config.json", "base.sha256"
NAME = "default"  # peft's name of the adapter
INITS = (True, False, "gaussian")  # values of `init_lora_weights` that do not change the base's weights

Module = TypeVar("Module", bound=nn.Module)


def peft() -> ModuleType:
    """Import peft.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need the package peft: pip install "llm-env[peft]"') from error
    return peft


def is_peft_model(model: Any) -> bool:
    """Return whether an object is a `peft.PeftModel`."""
    return sys.modules.get("peft") is not None and isinstance(model, peft().PeftModel)


def is_adapter(model: Any) -> bool:
    """Return whether something is an adapter without its base: a folder, a hub id, or the contents of files by name."""
    from transformers.utils import find_adapter_config_file

    if isinstance(model, dict):
        return CONFIG in model
    return isinstance(model, (str, Path)) and find_adapter_config_file(str(model)) is not None


class Adapter:
    """A LoRA adapter in a language model, and the same model without it.

    Args:
        wrapper: a `peft.PeftModel`.

    Attributes:
        wrapper: the `peft.PeftModel`.
        base: the model without the adapter. It shares its parameters with the model that has the adapter: as a reference it
            takes no memory, and the adapter need not be turned off.
        quantized: whether the base's weights are quantized; the adapter cannot be merged into such a base.

    Raises:
        ValueError: If the model has several adapters, a merged one, or one that changes the base.
    """

    def __init__(self, wrapper: Any) -> None:
        if list(wrapper.peft_config) != [NAME]:
            raise ValueError(f"the model has the adapters {list(wrapper.peft_config)}; it must have one adapter, {NAME!r}")
        check_config(wrapper.peft_config[NAME])
        if any(getattr(layer, "merged", False) for layer in wrapper.modules()):
            raise ValueError("the adapter is merged into the base, which is needed without it; call unmerge_adapter() first")
        if dropout := wrapper.peft_config[NAME].lora_dropout:
            warn(f"lora_dropout={dropout} has no effect: dropout is off in sampling and in training")
        self.wrapper = wrapper
        of_base = {name: p for name, p in wrapper.named_parameters() if not _of_adapter(name)}
        if trained := [name for name, p in of_base.items() if p.requires_grad]:
            raise ValueError(f"{len(trained)} of the base's parameters would be trained, such as {trained[0]}; freeze them")
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_(_of_adapter(name))
        copied = copy_sharing_frozen(wrapper)
        for part in copied.modules():
            if isinstance(part, peft().utils.ModulesToSaveWrapper):
                part.modules_to_save[NAME] = part.original_module  # unload() takes this one
        self.quantized = is_quantized(self.model)
        self.base: PreTrainedModel = copied.unload().requires_grad_(False).eval()

    @property
    def model(self) -> PreTrainedModel:
        """The model with the adapter, an object of transformers' class."""
        return self.wrapper.get_base_model()

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 of the base's weights, which never change."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.base.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """Return the contents of the files that rebuild the adapter on its base, without the trained weights."""
        with tempfile.TemporaryDirectory() as folder:
            self.wrapper.peft_config[NAME].save_pretrained(folder)
            return {CONFIG: (Path(folder) / CONFIG).read_bytes(), BASE_HASH: self.base_hash.encode()}

    def state_dict(self) -> dict[str, Tensor]:
        """Return the trained weights by peft's names."""
        return {name: value for name, value in self.wrapper.state_dict().items() if _of_adapter(name)}

    def save(self, path: str | Path, weights: dict[str, Tensor]) -> None:
        """Write the adapter with these weights in peft's format, for `peft.PeftModel.from_pretrained(base, path)`."""
        self.wrapper.save_pretrained(str(path), state_dict=weights, save_embedding_layers=False)

    def changes(self) -> int:
        """Return how many modules the adapter changes."""
        lora, copied = peft().tuners.lora.LoraLayer, peft().utils.ModulesToSaveWrapper
        count = 0
        for module in self.wrapper.modules():
            if isinstance(module, lora):
                count += bool(module.get_delta_weight(NAME).any())
            elif isinstance(module, copied):
                mine, base = (part.state_dict() for part in (module.modules_to_save[NAME], module.original_module))
                count += not all(torch.equal(mine[name], base[name]) for name in base)
        return count

    def check_mergeable(self) -> None:
        """Raise if merging the adapter into the base would round the trained weights.

        Raises:
            ValueError: If the base is quantized.
        """
        if self.quantized:
            raise ValueError(
                "the adapter cannot be merged: its base is quantized, and the trained weights would be rounded. Save the "
                "adapter, save_pretrained(path), load the base without quantization, and give both: LanguagePolicy(base, "
                "peft_config=path).save_pretrained(merged, merge=True)"
            )

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the merged weights, one at a time, by their names in `base`.

        Raises:
            ValueError: If the base is quantized.
        """
        self.check_mergeable()
        for name, weight in self.base.state_dict().items():
            path, _, leaf = name.rpartition(".")
            module: Any = self.model
            for part in filter(None, path.split(".")):
                module = getattr(module, part)
                if isinstance(module, peft().utils.ModulesToSaveWrapper):
                    module, weight = module.modules_to_save[NAME], None
            if isinstance(module, peft().tuners.lora.LoraLayer):
                module = copy.deepcopy(module)
                module.merge()
                module, weight = module.get_base_layer(), None
            yield name, (getattr(module, leaf) if weight is None else weight).detach()

    def merged(self) -> PreTrainedModel:
        """Return a new model with the adapter merged into the base; this one is unchanged.

        Raises:
            ValueError: If the base is quantized, or the adapter changes one of two tied weights only.
        """
        self.check_mergeable()
        model = copy.deepcopy(self.base)
        weights = model.state_dict()
        for name, weight in self.merged_weights():
            weights[name].copy_(weight)
        for name, weight in self.merged_weights():
            if not torch.equal(weights[name], weight):
                raise ValueError(
                    f"the adapter cannot be merged: it changes {name} and not the weight that is tied to it, or both "
                    "differently. Leave tied embeddings out of target_modules and modules_to_save, or save it unmerged"
                )
        return model


def _of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def copy_sharing_frozen(module: Module) -> Module:
    """Return a deep copy that shares frozen parameters and quantized modules with the original."""
    parameters = [p for p in module.parameters() if not p.requires_grad]
    return copy.deepcopy(module, {id(part): part for part in [*parameters, *quantized_modules(module)]})


def check_config(config: Any) -> None:
    """Raise if a peft config is no LoRA, or would change what the base computes.

    Raises:
        TypeError: If it is no `LoraConfig`.
        ValueError: If a setting changes the base.
    """
    if not isinstance(config, peft().PeftConfig) or config.peft_type != peft().PeftType.LORA:
        kind = getattr(getattr(config, "peft_type", None), "value", None)
        detail = type(config).__name__ + (f" ({kind})" if kind else "")
        raise TypeError(f"peft_config is a {detail}; give a peft.LoraConfig, or the path of a saved LoRA adapter")
    if config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights, or needs data; it must be one of "
            f"{INITS}"
        )
    changes = {"bias": "none", "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None}
    for name, neutral in changes.items():
        if (value := getattr(config, name, neutral)) != neutral:
            raise ValueError(f"{name}={value!r} changes what the base computes with the adapter off; leave it at {neutral!r}")


def check_bare(model: PreTrainedModel) -> None:
    """Raise if a model has an adapter in it.

    Raises:
        ValueError: If it has one.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"the {type(model).__name__} has an adapter already. Give the base without an adapter; to train that adapter on, "
            "give its folder or the peft.PeftModel as the policy"
        )


def load_config(path: str | Path) -> Any:
    """Load the config of an adapter's folder or hub id.

    Raises:
        ValueError: If there is none.
    """
    try:
        return peft().PeftConfig.from_pretrained(str(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"no adapter can be read from {str(path)!r} ({short_error(error)})") from error


def apply_lora(model: PreTrainedModel, peft_config: Any, weights_from: str | Path | None = None) -> Adapter:
    """Put a LoRA adapter into a model and freeze the model's weights.

    Args:
        model: a causal language model.
        peft_config: a `peft.LoraConfig`; or an adapter's folder or hub id, whose weights are loaded.
        weights_from: the folder or hub id to load weights from, if `peft_config` is a config.

    Raises:
        ValueError: If the adapter does not fit the model.
    """
    if isinstance(peft_config, (str, Path)):
        peft_config, weights_from = load_config(peft_config), peft_config
    config = copy.deepcopy(peft_config)
    check_config(config)
    config.inference_mode, config.base_model_name_or_path = False, None
    config.task_type = config.task_type or "CAUSAL_LM"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # peft corrects it for GPT-2
            wrapper = peft().get_peft_model(model, config)
        missing = [] if weights_from is None else _load_weights(wrapper, weights_from)
    except (ValueError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(f"the adapter does not fit the model, a {type(model).__name__}: {short_error(error)}") from error
    if missing:
        raise ValueError(
            f"the adapter in {str(weights_from)!r} does not fit the model, a {type(model).__name__}: it has no weights for "
            f"{len(missing)} places, such as {missing[0]}"
        )
    return Adapter(wrapper)


def _load_weights(wrapper: Any, path: str | Path) -> list[str]:
    """Load an adapter's weights; return the names of missing ones."""
    loaded = wrapper.load_adapter(str(path), NAME, is_trainable=True)
    if loaded.unexpected_keys:
        raise ValueError(f"it has no place for {loaded.unexpected_keys[0]}")
    return [name for name in loaded.missing_keys if _of_adapter(name)]


def check_base(adapter: Adapter, expected: str) -> None:
    """Raise if an adapter's base is not the one that it was trained on.

    Raises:
        ValueError: If the hashes of the weights differ.
    """
    if adapter.base_hash != expected:
        raise ValueError(
            f"the base's weights (SHA-256 {adapter.base_hash[:12]}) are not those that the adapter was trained on "
            f"({expected[:12]}); give the right base with load(path, policy=<path or model>)"
        )


def short_error(error: BaseException) -> str:
    """Return the message of an error on one line, of up to 300 characters."""
    return " ".join(str(error).split())[:300] or type(error).__name__
