"""The reference policy: log pi_ref of action tokens, and the coefficient of the KL penalty in the reward.

The shaping is k1, by definition: the reward of token t is r_t - beta * (log pi - log pi_ref).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from llm_env.lm.capabilities import vocabulary_of
from llm_env.lm.micro_batches import micro_batches
from llm_env.lm.models import check_causal, load_causal_lm
from llm_env.lm.positions import check_length, max_positions
from llm_env.lm.scoring import autocast, score
from llm_env.lm.sharing import PrefixSharing


class Reference:
    """A frozen causal language model that knows log pi_ref.

    Args:
        model: a path, a hub id or a transformers causal language model. A model object is copied, since the usual one is
            the model that is about to be trained; `copy_model=False` keeps the object itself.
        device: where it runs; by default where the model is (CPU for a path).
        batch_size: responses per forward pass; bounds the memory.
        copy_model: whether a model object is copied.

    Raises:
        TypeError: If `model` is not a causal language model.

    Attributes:
        max_positions: tokens that it can read, prompt and response together; None without a limit.
        temperature: divides the logits; the agent sets it to its own, so that both policies are tempered alike.
        bf16, prefix_sharing: how it is computed, set by the agent, too; see `agents.policy.LanguagePolicy`.
        max_tokens_per_batch: tokens per forward pass with padding, set by the agent, too; see `llm_env.lm.micro_batches`.
    """

    max_positions: int | None = None

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        copy_model: bool = True,
    ) -> None:
        if isinstance(model, (str, Path)):
            model = load_causal_lm(model, "reference", dtype=torch.float32).requires_grad_(False)
        elif not isinstance(model, PreTrainedModel):
            raise TypeError(
                f"reference is a {type(model).__name__}; give a path, a hub id or a transformers causal language model"
            )
        else:
            check_causal(model, "reference")
            if copy_model:  # an object that is kept may be the one that is trained
                model = copy.deepcopy(model).requires_grad_(False)
        self.model = model.eval()
        self.max_positions = max_positions(model)
        if device is not None:
            self.model.to(device)
        self._init_settings(batch_size)

    def _init_settings(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.temperature = 1.0
        self.bf16 = False
        self.prefix_sharing: PrefixSharing = "auto"
        self.max_tokens_per_batch: int | None = None

    def set_device(self, device: torch.device) -> None:
        """Move the model to a device."""
        self.model.to(device)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse a model that cannot score all token ids of the env.

        Raises:
            ValueError: If the model's vocabulary is smaller.
        """
        size = vocabulary_of(self.model)
        if size < vocab_size:
            raise ValueError(f"the reference's vocabulary has {size} tokens, the tokenizer's {vocab_size}; they must match")
        self._vocab_size = vocab_size

    def check_length(self, prompt: int, new: int, name: str = "max_new_tokens") -> None:
        """Raise if the longest prompt and response of an env have more tokens than the model has positions.

        Args:
            prompt: tokens of the longest prompt.
            new: maximum number of tokens after the prompt.
            name: name of the argument that limits them, for error messages.

        Raises:
            ValueError: If they have.
        """
        check_length(self.max_positions, prompt, new, "the reference", name)

    @torch.no_grad()
    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        allowed: Sequence[np.ndarray] | None = None,
        actions: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """Log pi_ref of every response token, in nats: one float32 array of the response's length a row.

        Args:
            prompts: token ids, one row each.
            responses: token ids, one row each.
            allowed: for each row (n, V) bool, the tokens that were allowed in each action token's place; all by default.
            actions: for each row a bool array, True at action tokens; others get 0. All by default.

        Raises:
            ValueError: If a row has more tokens than the model has positions.
        """
        if not len(prompts):
            return []
        self.check_length(max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)), 0)
        results: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
        lengths, most = list(map(len, responses)), self.max_tokens_per_batch
        for rows in micro_batches(self.model, prompts, lengths, self.batch_size, most, self.prefix_sharing):
            with autocast(self.model.device, self.bf16):
                scored = score(
                    self.model,
                    [prompts[row] for row in rows],
                    [responses[row] for row in rows],
                    self._vocab_size,
                    self.temperature,
                    None if allowed is None else [allowed[row] for row in rows],
                    actions=None if actions is None else [actions[row] for row in rows],
                    prefix_sharing=self.prefix_sharing,
                )
            for row, values in zip(rows, scored.logp.cpu(), strict=True):
                results[row] = values[: lengths[row]].numpy()
        return results


BASE = "base"


class BaseReference(Reference):
    """The base of the LoRA adapter that an agent trains, which is the policy with its adapter off: no second model is held.

    `reference="base"` makes one (a model in a folder of that name is `"./base"`). An agent that gets the env binds it to its
    own base, whose weights the base has in common with the policy; before that nothing can be scored. Its passes are cut as
    the update's are.

    Other envs, for evaluation say, may have the same: `reference=env.unwrapped.rules.reference`.

    Attributes:
        has_model: whether an agent has had the env.
    """

    def __init__(self) -> None:
        self.has_model = False
        self._within: Callable[[], AbstractContextManager[None]] = nullcontext
        self._init_settings(batch_size=64)

    def set_model(self, model: PreTrainedModel, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Take this for the model, which stays the agent's, and has its weights `within()`."""
        self.model, self.has_model, self._within = model, True, within
        self.max_positions = max_positions(model)
        super().check_vocabulary(self._vocab_size)

    def set_device(self, device: torch.device) -> None:
        """Do nothing: the model is on the agent's device already."""

    def check_vocabulary(self, vocab_size: int) -> None:
        """See `Reference`; a model that comes later is checked then."""
        self._vocab_size = vocab_size
        if self.has_model:
            super().check_vocabulary(vocab_size)

    def log_probs(
        self,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        allowed: Sequence[np.ndarray] | None = None,
        actions: Sequence[np.ndarray] | None = None,
    ) -> list[np.ndarray]:
        """See `Reference`.

        Raises:
            ValueError: If no agent has had the env yet.
        """
        if not self.has_model:
            raise ValueError(
                "reference='base' is the base of the adapter that an agent trains, and no agent with one has been given this "
                "env; give it to one, or make the env with reference=<path or model>, or with the rules.reference of the env "
                "that the agent trains on"
            )
        with self._within():
            return super().log_probs(prompts, responses, allowed, actions)


def as_reference(reference: Any) -> Reference:
    """A `Reference` from whatever a user may give: itself, a path, a hub id, a model, or "base" (see `BaseReference`)."""
    if isinstance(reference, str) and reference == BASE:
        return BaseReference()
    return reference if isinstance(reference, Reference) else Reference(reference)


class KLController:
    """A coefficient beta of the KL penalty that stays as it is.

    Args:
        value: beta, in reward per nat; at least 0.
    """

    def __init__(self, value: float) -> None:
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"kl_coef={value} must be a finite number of at least 0")
        self.value = float(value)

    def update(self, kl: float, n: int) -> None:
        """Take note of the KL (sum over an episode's tokens, mean over n episodes, in nats); agents do so every rollout."""


class AdaptiveKLController(KLController):
    """Steers the KL to a target: beta *= 1 + clip(KL/target - 1, -0.2, 0.2) * n/horizon.

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2. It is fed a KL, never a KL reward.

    Args:
        value: the coefficient to begin with.
        target: KL per episode, in nats, that is aimed at.
        horizon: in episodes.
    """

    def __init__(self, value: float = 0.15, target: float = 6.0, horizon: float = 10_000) -> None:
        super().__init__(value)
        if target <= 0 or horizon <= 0:
            raise ValueError(f"target={target} and horizon={horizon} must be positive")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Multiply beta by 1 + error * n/horizon, where n episodes had the mean KL `kl`."""
        error = np.clip(kl / self.target - 1, -0.2, 0.2)
        self.value *= float(1 + error * n / self.horizon)


def coefficient(kl_coef: float | KLController) -> float:
    """Return the number that a coefficient is now."""
    return kl_coef.value if isinstance(kl_coef, KLController) else kl_coef


def as_kl_controller(kl_coef: float | KLController) -> KLController | None:
    """Return a controller from a number or a controller; None for 0, which means no shaping."""
    if isinstance(kl_coef, KLController):
        return kl_coef
    return KLController(kl_coef) if kl_coef != 0 else None
