"""A policy's weights: in files, as a state, and as those of a plain model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_baselines3.common.policies import BasePolicy
from torch import Tensor, nn
from transformers import PreTrainedModel

from agents.adapters import Adapter
from agents.distributed import placed, world
from agents.pretrained import files_of
from agents.sharded import gathered, is_sharded


class Weights(BasePolicy):
    """What of a `LanguagePolicy` is written, and how it comes back; the attributes are explained there."""

    lm: PreTrainedModel
    adapter: Adapter | None
    critic: PreTrainedModel | None
    value_head: nn.Linear | None
    tokenizer: Any

    @placed
    def save_pretrained(self, path: str | Path, merge: bool = False) -> None:
        """Write the language model and its tokenizer so that plain transformers loads them; the value head stays behind.

        Of a model with an adapter that is the adapter, in peft's format, for `peft.PeftModel.from_pretrained(base, path)`.

        Args:
            path: a folder.
            merge: write a model without an adapter that computes the same. The policy stays as it is; meanwhile there is room
                needed for another model.

        Raises:
            ValueError: there is no adapter to merge, or it cannot be merged.

        Of several processes, all of which call it, the main one writes.
        """
        if merge and self.adapter is None:
            raise ValueError("merge=True, but the policy has no adapter: save_pretrained(path) writes the whole model")
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
            self.adapter.merged().save_pretrained(path)
        else:
            self.adapter.save(path, weights)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(path)

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
            ValueError: others are trained here than those that were.
        """
        if self.adapter is None:
            return super().load_state_dict(state_dict, strict, assign)
        if strict and (differing := sorted(self.state_dict().keys() ^ state_dict.keys())):
            raise ValueError(
                f"{len(differing)} weights are trained here and not there, or there and not here, such as {differing[0]}; load "
                "them into a policy with the same kind of adapter"
            )
        return super().load_state_dict(state_dict, False, assign)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        critic = {"value_head": self.value_head is not None, "separate_critic": self.critic is not None}
        files = files_of(self.lm, self.tokenizer)
        return {"model": files if self.adapter is None else files | self.adapter.files(), **critic}
