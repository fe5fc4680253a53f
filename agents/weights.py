"""A policy's weights: in files, as a state, and as those of a plain model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.adapters import Adapter
from agents.distributed import placed, world
from agents.identity import is_rebuilt, qualified_name
from agents.pretrained import RECORD, PretrainedFiles, files_of, record_of, write
from agents.quantization import is_quantized
from agents.sharded import gathered, is_sharded
from llm_env.lm.capabilities import plain_outputs, trial, trial_rows

SAME = 1e-3  # nats; devices and versions differ by 1e-5


class Weights(BasePolicy):
    """What of a `LanguagePolicy` is written, and how it comes back; the attributes are explained there."""

    lm: PreTrainedModel
    adapter: Adapter | None
    critic: PreTrainedModel | None
    value_head: nn.Linear | None
    tokenizer: Any
    processor: PretrainedFiles
    chat_template_kwargs: dict[str, Any]
    _told_of_class = False

    @placed
    def save_pretrained(self, path: str | Path, merge: bool = False) -> None:
        """Write the language model and its tokenizer so that plain transformers loads them; the value head stays behind.

        With them go the generation config, the chat templates that training used, the files of a processor, and the code of a
        model that was loaded with `trust_remote_code=True`.

        Of a model with an adapter that is the adapter, in peft's format, for `peft.PeftModel.from_pretrained(base, path)`.

        Args:
            path: a folder.
            merge: write a model without an adapter that computes the same. The policy stays as it is; meanwhile there is room
                needed for another model.

        Raises:
            ValueError: If there is no adapter to merge, or it cannot be merged, as into a quantized base.

        Of several processes, all of which call it, the main one writes.
        """
        if merge and self.adapter is None:
            raise ValueError("merge=True, but the policy has no adapter: save_pretrained(path) writes the whole model")
        if merge and self.adapter is not None:
            self.adapter.check_mergeable()
        if merge and is_sharded(self):
            raise ValueError("merge=True, but the weights are sharded: save the agent, and merge it in a single process")
        if is_sharded(self):
            world().gather(None, "weights")
        weights = None if merge else gathered(self.lm.state_dict() if self.adapter is None else self.adapter.state_dict())
        if not world().main:
            return
        if self.adapter is None:
            self.lm.save_pretrained(path, state_dict=weights)
        elif weights is None:
            merged = self.adapter.merged()
            merged.generation_config = getattr(self.lm, "generation_config", None)
            merged.save_pretrained(path)
        else:
            self.adapter.save(path, weights)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)
        if self.adapter is None or merge:
            write({name: content for name, content in self.processor.items() if not (Path(path) / name).exists()}, path)

    @property
    def base(self) -> PreTrainedModel:
        """The language model without the adapter; without one itself."""
        return self.lm if self.adapter is None else self.adapter.base

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The language model's weights by name, one at a time; with an adapter, those that it would have with it merged in."""
        yield from self.lm.state_dict().items() if self.adapter is None else self.adapter.merged_weights()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Of a policy with an adapter the weights that are trained; the base's are where they came from."""
        state = super().state_dict(*args, **kwargs)
        if self.adapter is None:
            return state
        trained = {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take over weights as `state_dict` gives them.

        Raises:
            ValueError: If the weights are those of another model, or an adapter trains others.
        """
        if self.adapter is None:
            try:
                return super().load_state_dict(state_dict, strict, assign)
            except RuntimeError as error:
                raise ValueError(
                    f"the weights do not fit the policy, a {type(self.lm).__name__} ({str(error).splitlines()[-1].strip()}); "
                    "load the file with the algorithm that saved it, and give a model of the same class and config: load(path, "
                    "policy=<model>)"
                ) from error
        if strict and (differing := sorted(self.state_dict().keys() ^ state_dict.keys())):
            raise ValueError(
                f"{len(differing)} weights are trained here and not there, or there and not here, such as {differing[0]}; load "
                "them into a policy with the same kind of adapter"
            )
        return super().load_state_dict(state_dict, False, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """What makes the policy again, weights aside: its files, and in them what is trained.

        Warns where `load` will need a model, because its class does not come back from its config.
        """
        critic = {"value_head": self.value_head is not None, "separate_critic": self.critic is not None}
        files = files_of(self.lm, self.tokenizer, self.base, self.processor)
        record = record_of(files)
        if self.chat_template_kwargs:
            record["chat_template_kwargs"] = self.chat_template_kwargs
        if (said := self._fingerprint()) is not None:
            record["fingerprint"] = said
        files[RECORD] = json.dumps(record, default=str).encode()
        if not self._told_of_class and not is_rebuilt(self.base):
            self._told_of_class = True
            warnings.warn(
                f"transformers does not rebuild this {qualified_name(self.base)} from its config: keep the code that makes it, "
                "and give one when the file is loaded: load(path, policy=<model>)",
                stacklevel=3,
            )
        if self.adapter is not None:
            return {"model": files | self.adapter.files(), **critic}
        record = json.loads(files[RECORD]) | self._trained()
        return {"model": {**files, RECORD: json.dumps(record).encode()}, **critic}

    @torch.no_grad()
    def _fingerprint(self) -> list[float] | None:
        """Log-probs of a few tokens; None where they say nothing: of quantized, sharded or broken weights."""
        if is_quantized(self.base) or is_sharded(self):
            return None
        row = trial_rows(self.lm)[0]
        with trial(self.lm):
            logp = plain_outputs(self.lm, [row])[0].float().log_softmax(-1)
        said = logp[torch.arange(len(row) - 1), torch.tensor(row[1:], device=logp.device)]
        return said.tolist() if bool(said.isfinite().all()) else None

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Warn if the model computes other log-probs than the one that was saved, whose weights it has.

        Args:
            saved: what `_get_constructor_parameters` gave for the file.
        """
        before, now = record_of(saved.get("model")).get("fingerprint"), self._fingerprint()
        if before is None or now is None:
            return
        gap = max(abs(a - b) for a, b in zip(before, now, strict=True)) if len(before) == len(now) else float("inf")
        if not gap <= SAME:
            warnings.warn(
                f"the loaded {qualified_name(self.base)} computes other log-probs than the saved one, by up to {gap:.2g} nats, "
                "with the same weights: something of that model is in no file (a hook, an attribute, a config that was changed "
                "later); make the model as it was and give it: load(path, policy=<model>)",
                stacklevel=3,
            )

    def _trained(self) -> dict[str, list[str]]:
        """The names of the parameters that are frozen, and of those of the critic that it has in common with the model."""
        own = {id(parameter) for parameter in self.lm.parameters()}
        critic = {} if self.critic is None else dict(self.critic.named_parameters(remove_duplicate=False))
        return {
            "frozen": [name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad],
            "shared": [name for name, p in critic.items() if id(p) in own],
        }

    def _train_only(self, record: dict[str, Any]) -> None:
        """Freeze, and have in common, what `_trained` named; nothing for files of version 0.1, of which all is trained."""
        if self.critic is not None and (shared := record.get("shared")):
            of_model = dict(self.lm.base_model.named_parameters(remove_duplicate=False))
            for name in shared:
                path, _, leaf = name.rpartition(".")
                self.critic.get_submodule(path)._parameters[leaf] = of_model[name]
        frozen = set(record.get("frozen", ()))
        for name, parameter in self.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(name not in frozen)
