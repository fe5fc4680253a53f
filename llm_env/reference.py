"""The reference policy: log pi_ref of action tokens, and coefficients of the KL penalty.

The KL penalty in the reward uses the estimator k1: the reward of token t is r_t - beta * (log pi - log pi_ref).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llm_env.lm.capabilities import vocabulary_of
from llm_env.lm.micro_batches import micro_batches
from llm_env.lm.models import check_causal, load_causal_lm
from llm_env.lm.positions import check_length, max_positions
from llm_env.lm.scoring import autocast, score
from llm_env.lm.sharing import PrefixSharing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reference:
    """A frozen causal language model that computes log pi_ref.

    Args:
        model: a path, a hub id or a transformers causal language model. A model object is copied, because it is usually the
            model that will be trained.
        device: device of the model. Default: the model's (CPU for a path).
        batch_size: maximum number of responses per forward pass.
        copy_model: whether to copy a model object.

    Raises:
        TypeError: If `model` is not a causal language model.

    Attributes:
        max_positions: maximum length of prompt and response, in tokens; None for no limit.
        temperature: divides the logits. The agent sets this and the following attributes to its own settings.
        bf16, prefix_sharing: see `agents.policy.LanguagePolicy`.
        max_tokens_per_batch: token budget of a forward pass, including padding; see `llm_env.lm.micro_batches`.
    """

    max_positions: int | None = None

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        device: torch.device | str | None = None,
        batch_size: int = 64,
        copy_model: bool = True,
    ) -> None:
        from transformers import PreTrainedModel

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
        """Check that the model can score all token ids of the env.

        Raises:
            ValueError: If the model's vocabulary is smaller than `vocab_size`.
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
            ValueError: If prompt and response are too long together.
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
        """Compute log pi_ref of response tokens.

        Args:
            prompts: B lists of token ids.
            responses: B lists of token ids.
            allowed: B arrays (n, V) bool, the tokens that were allowed in place of each of the n action tokens. Default: all.
            actions: B bool arrays, True at action tokens; other tokens get 0. Default: all are actions.

        Returns:
            B float32 arrays of the responses' lengths, in nats.

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
    """The agent's policy with its LoRA adapter off: a reference without a second model.

    `reference="base"` makes one. (For a model in a folder named "base", write `"./base"`.) The agent that gets the env sets the
    model; before that, nothing can be scored. Another env, for example for evaluation, can use the same reference:
    `reference=env.unwrapped.rules.reference`.

    Attributes:
        has_model: whether an agent has set the model.
    """

    def __init__(self) -> None:
        self.has_model = False
        self._within: Callable[[], AbstractContextManager[None]] = nullcontext
        self._init_settings(batch_size=64)

    def set_model(self, model: PreTrainedModel, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """Set the model.

        Args:
            model: the base of the agent's adapter; it is not copied.
            within: returns a context manager in which the weights are complete (they may be sharded) and the adapter is off.
        """
        self.model, self.has_model, self._within = model, True, within
        self.max_positions = max_positions(model)
        super().check_vocabulary(self._vocab_size)

    def set_device(self, device: torch.device) -> None:
        """Do nothing: the model is on the agent's device."""

    def check_vocabulary(self, vocab_size: int) -> None:
        """Check the vocabulary; see `Reference`. Without a model, it is checked when the model is set."""
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
        """Compute log pi_ref of response tokens; see `Reference`.

        Raises:
            ValueError: If no agent has set the model yet.
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
    """Make a `Reference` from a path, a hub id, a model, or "base" (see `BaseReference`); return a `Reference` as it is."""
    if isinstance(reference, str) and reference == BASE:
        return BaseReference()
    return reference if isinstance(reference, Reference) else Reference(reference)


class KLController:
    """A constant coefficient beta of the KL penalty.

    Args:
        value: beta, in reward per nat; at least 0.
    """

    def __init__(self, value: float) -> None:
        if not np.isfinite(value) or value < 0:
            raise ValueError(f"kl_coef={value} must be a finite number of at least 0")
        self.value = float(value)

    def update(self, kl: float, n: int) -> None:
        """Adapt beta to the KL of a rollout; agents call this after each one. A constant coefficient ignores it.

        Args:
            kl: KL per episode (the sum over its tokens), mean over n episodes, in nats.
            n: number of episodes.
        """


class AdaptiveKLController(KLController):
    """A coefficient that steers the KL to a target: `beta *= 1 + clip(KL/target - 1, -0.2, 0.2) * n/horizon`.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2. The input is a KL, not a KL reward.

    Args:
        value: initial coefficient.
        target: desired KL per episode, in nats.
        horizon: number of episodes over which the coefficient adapts.
    """

    def __init__(self, value: float = 0.15, target: float = 6.0, horizon: float = 10_000) -> None:
        super().__init__(value)
        if target <= 0 or horizon <= 0:
            raise ValueError(f"target={target} and horizon={horizon} must be positive")
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Multiply beta by 1 + error * n/horizon; see `KLController.update`."""
        error = np.clip(kl / self.target - 1, -0.2, 0.2)
        self.value *= float(1 + error * n / self.horizon)


def coefficient(kl_coef: float | KLController) -> float:
    """Return the current value of a coefficient."""
    return kl_coef.value if isinstance(kl_coef, KLController) else kl_coef


def as_kl_controller(kl_coef: float | KLController) -> KLController | None:
    """Make a controller of a number; return a controller as it is. 0 gives None: no KL penalty."""
    if isinstance(kl_coef, KLController):
        return kl_coef
    return KLController(kl_coef) if kl_coef != 0 else None
