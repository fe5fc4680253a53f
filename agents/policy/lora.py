"""LoRA through peft: low-rank matrices are trained beside a language model's weights, which stay as they are."""

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
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file

from agents.policy.quantization import is_quantized, quantized_modules

CONFIG, BASE_HASH = "adapter_config.json", "base.sha256"
NAME = "default"  # of the adapter, for peft
INITS = (True, False, "gaussian")  # of `init_lora_weights`, that leave the base's weights alone

Module = TypeVar("Module", bound=nn.Module)


def peft() -> ModuleType:
    """The package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('adapters need the package peft: pip install "llm-env[peft]"') from error
    return peft


def is_peft_model(model: Any) -> bool:
    """Whether it is what `peft.get_peft_model` gives."""
    return sys.modules.get("peft") is not None and isinstance(model, peft().PeftModel)


def is_adapter(model: Any) -> bool:
    """Whether it is an adapter without its base: the folder or hub id of one, or the files of one, by name."""
    if isinstance(model, dict):
        return CONFIG in model
    return isinstance(model, (str, Path)) and find_adapter_config_file(str(model)) is not None


class Adapter:
    """A LoRA adapter in a language model, and that model without it.

    Args:
        wrapper: peft's own object around the model that has the adapter.

    Attributes:
        wrapper: likewise.
        base: the model without the adapter. Its parameters are the very ones of the model with it: a reference that is no
            second model in memory, and whose passes do not have to turn anything off.
        quantized: whether the base's weights are, which the adapter can then not be merged into.

    Raises:
        ValueError: the adapter is of a kind beside which the base does not stay as it is.
    """

    def __init__(self, wrapper: Any) -> None:
        if list(wrapper.peft_config) != [NAME]:
            raise ValueError(f"the model has the adapters {list(wrapper.peft_config)}; it must have one, named {NAME!r}")
        check_config(wrapper.peft_config[NAME])
        if any(getattr(layer, "merged", False) for layer in wrapper.modules()):
            raise ValueError("the adapter is merged into the base, which can then not be had without it; unmerge it first")
        if dropout := wrapper.peft_config[NAME].lora_dropout:
            warnings.warn(
                f"lora_dropout={dropout} has no effect: dropout is off, while sampling and in training alike", stacklevel=6
            )
        self.wrapper = wrapper
        of_base = {name: p for name, p in wrapper.named_parameters() if not _of_adapter(name)}
        if trained := [name for name, p in of_base.items() if p.requires_grad]:
            raise ValueError(f"{len(trained)} of the base's parameters would be trained, such as {trained[0]}; freeze them")
        for name, parameter in wrapper.named_parameters():
            parameter.requires_grad_(_of_adapter(name))
        twin = with_frozen_in_common(wrapper)
        for part in twin.modules():
            if isinstance(part, peft().utils.ModulesToSaveWrapper):
                part.modules_to_save[NAME] = part.original_module  # for peft unloads the trained one
        self.quantized = is_quantized(self.model)
        self.base: PreTrainedModel = twin.unload().requires_grad_(False).eval()

    @property
    def model(self) -> PreTrainedModel:
        """The model with the adapter, of transformers' own class."""
        return self.wrapper.get_base_model()

    @cached_property
    def base_hash(self) -> str:
        """SHA-256 of the base's weights; they never change."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.base.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def files(self) -> dict[str, bytes]:
        """What is needed, besides the weights that are trained, to put the adapter on its base again."""
        with tempfile.TemporaryDirectory() as folder:
            self.wrapper.peft_config[NAME].save_pretrained(folder)
            return {CONFIG: (Path(folder) / CONFIG).read_bytes(), BASE_HASH: self.base_hash.encode()}

    def state_dict(self) -> dict[str, Tensor]:
        """The weights that are trained, by peft's names."""
        return {name: value for name, value in self.wrapper.state_dict().items() if _of_adapter(name)}

    def save(self, path: str | Path, weights: dict[str, Tensor]) -> None:
        """Write the adapter with these weights as peft does, for `peft.PeftModel.from_pretrained(base, path)`."""
        self.wrapper.save_pretrained(str(path), state_dict=weights, save_embedding_layers=False)

    def changes(self) -> int:
        """Return how many modules compute something else with the adapter than without."""
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
        """Raise if the adapter cannot be merged into the base without rounding what was trained.

        Raises:
            ValueError: If the base is quantized.
        """
        if self.quantized:
            raise ValueError(
                "the adapter cannot be merged: its base is quantized, and what was trained would be rounded away. Save the "
                "adapter, save_pretrained(path), load the base without quantization, and give both: LanguagePolicy(base, "
                "peft_config=path).save_pretrained(merged, merge=True)"
            )

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the model without an adapter that computes the same, by their names in `base`, one at a time.

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
        """A model of its own, without an adapter, that computes the same; the live one stays as it is.

        Raises:
            ValueError: If there is none: the base is quantized, or has one weight in two places and the adapter changes one.
        """
        self.check_mergeable()
        model = copy.deepcopy(self.base)
        weights = model.state_dict()
        for name, weight in self.merged_weights():
            weights[name].copy_(weight)
        for name, weight in self.merged_weights():
            if not torch.equal(weights[name], weight):
                raise ValueError(
                    f"the adapter cannot be merged: it changes {name} and not what is tied to it, or both differently; train "
                    "an adapter without target_modules or modules_to_save that are tied embeddings, or save it unmerged"
                )
        return model


def _of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def with_frozen_in_common(module: Module) -> Module:
    """A deep copy that has those parameters that are not trained in common with the original, and its quantized modules."""
    parameters = [p for p in module.parameters() if not p.requires_grad]
    return copy.deepcopy(module, {id(part): part for part in [*parameters, *quantized_modules(module)]})


def check_config(config: Any) -> None:
    """Refuse what is no LoRA beside which the base's weights stay, and are all of the model where it is off.

    Raises:
        TypeError: it is no `LoraConfig`.
        ValueError: a setting changes the base.
    """
    if not isinstance(config, peft().PeftConfig) or config.peft_type != peft().PeftType.LORA:
        kind = getattr(getattr(config, "peft_type", None), "value", None)
        detail = type(config).__name__ + (f" ({kind})" if kind else "")
        raise TypeError(f"peft_config is a {detail}; give a peft.LoraConfig, or the path of a saved LoRA adapter")
    if config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} changes the base's weights, or needs data to begin; it must be "
            f"one of {INITS}"
        )
    changes = {"bias": "none", "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None}
    for name, neutral in changes.items():
        if (value := getattr(config, name, neutral)) != neutral:
            raise ValueError(f"{name}={value!r} changes what the base computes with the adapter off; leave it at {neutral!r}")


def check_bare(model: PreTrainedModel) -> None:
    """Refuse a model that has an adapter in it, which cannot be told from the base any more.

    Raises:
        ValueError: it has.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"the {type(model).__name__} has an adapter in it already; give the base without one, or, to train that adapter "
            "on, its folder or the peft.PeftModel as the policy"
        )


def load_config(path: str | Path) -> Any:
    """The config of an adapter's folder or hub id.

    Raises:
        ValueError: there is none.
    """
    try:
        return peft().PeftConfig.from_pretrained(str(path))
    except (ValueError, OSError) as error:
        raise ValueError(f"no adapter can be read from {str(path)!r} ({_in_short(error)})") from error


def put_on(model: PreTrainedModel, peft_config: Any, weights_from: str | Path | None = None) -> Adapter:
    """Put an adapter into a model, whose linear layers are wrapped by it; the weights stay, and are frozen.

    Args:
        model: a causal language model.
        peft_config: a `peft.LoraConfig`; or an adapter's folder or hub id, whose weights are taken over.
        weights_from: the folder or hub id to take weights from, for a config.

    Raises:
        ValueError: the adapter does not fit the model.
    """
    if isinstance(peft_config, (str, Path)):
        peft_config, weights_from = load_config(peft_config), peft_config
    config = copy.deepcopy(peft_config)
    check_config(config)
    config.inference_mode, config.base_model_name_or_path = False, None
    config.task_type = config.task_type or "CAUSAL_LM"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # of GPT-2; peft sets it right
            wrapper = peft().get_peft_model(model, config)
        missing = [] if weights_from is None else _load_weights(wrapper, weights_from)
    except (ValueError, RuntimeError, OSError, AttributeError) as error:
        raise ValueError(f"the adapter does not fit the model, a {type(model).__name__}: {_in_short(error)}") from error
    if missing:
        raise ValueError(
            f"the adapter in {str(weights_from)!r} does not fit the model, a {type(model).__name__}: it has no weights for "
            f"{len(missing)} places, such as {missing[0]}"
        )
    return Adapter(wrapper)


def _load_weights(wrapper: Any, path: str | Path) -> list[str]:
    """Take over an adapter's weights; the names of those that are not there."""
    loaded = wrapper.load_adapter(str(path), NAME, is_trainable=True)
    if loaded.unexpected_keys:
        raise ValueError(f"it has no place for {loaded.unexpected_keys[0]}")
    return [name for name in loaded.missing_keys if _of_adapter(name)]


def check_base(adapter: Adapter, expected: str) -> None:
    """Refuse to put a saved adapter on another base.

    Raises:
        ValueError: the base has other weights than that which the adapter was trained on.
    """
    if adapter.base_hash != expected:
        raise ValueError(
            f"the base's weights (SHA-256 {adapter.base_hash[:12]}) are not those that the adapter was trained on "
            f"({expected[:12]}); give the right base with load(path, policy=<path or model>)"
        )


def _in_short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
