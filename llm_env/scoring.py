"""One forward pass over prompts and responses: the path by which a policy is trained and a reference is asked."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

FORBIDDEN = -1e9  # as a logit: its probability is exactly 0, and 0 * log 0 stays finite in the entropy


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one int64 tensor (B, longest row), and the 0/1 mask of the same shape and type.

    The padding is token 0; nothing may depend on its value.
    """
    width = max((len(row) for row in rows), default=0)
    ids, mask = torch.zeros((2, len(rows), width), dtype=torch.int64).unbind()
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at] = torch.as_tensor(row, dtype=torch.int64)
        mask[i, at] = 1
    return ids.to(device), mask.to(device)


def model_inputs(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass, with the positions that padding on the left would otherwise shift.

    GPT-2's absolute positions need them; models without `position_ids` (ALiBi) count by the mask themselves.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs


def response_outputs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    vocab_size: int,
    hidden_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Logits of every response token, from one pass over `[prompt padded left | response padded right]`.

    Args:
        model: any causal language model of transformers.
        prompts: token ids, one row each, at least one token a row.
        responses: token ids, one row each.
        vocab_size: V; logits of ids beyond it, which pad some models' embeddings, are cut off: they are no actions.
        hidden_states: also return the last hidden states.

    Returns:
        logits (B, T, V) of the response tokens, in the model's type; the tokens themselves (B, T); their 0/1 mask (B, T);
        and the hidden states (B, T + 1, H) that every response token is chosen from, with the one after the last, or None.
    """
    inputs, targets, mask = _inputs(model, prompts, responses, with_last=hidden_states)
    length = targets.shape[1]
    first = inputs["input_ids"].shape[1] - length - int(hidden_states)
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    if keeps:
        inputs["logits_to_keep"] = torch.arange(first, first + length, device=model.device)
    outputs = model(**inputs, use_cache=False, output_hidden_states=hidden_states)
    logits = outputs.logits if keeps else outputs.logits[:, first : first + length]
    hidden = outputs.hidden_states[-1][:, first : first + length + 1] if hidden_states else None
    return logits[..., :vocab_size], targets, mask, hidden


def response_states(model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Tensor:
    """The hidden states (B, T + 1, H) of a model without a head, as `response_outputs` returns those of a language model."""
    inputs, targets, _ = _inputs(model, prompts, responses, with_last=True)
    return model(**inputs, use_cache=False).last_hidden_state[:, -targets.shape[1] - 1 :]


def _inputs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], with_last: bool
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """`[prompt padded left | response padded right]` for a forward pass; the responses (B, T) and their 0/1 mask.

    The last response token is fed only `with_last`: nothing but V of the state after it depends on it.
    """
    prompt_ids, prompt_mask = pad(prompts, "left", model.device)
    targets, mask = pad(responses, "right", model.device)
    fed = targets.shape[1] if with_last else targets.shape[1] - 1
    both = torch.cat([prompt_ids, targets[:, :fed]], 1), torch.cat([prompt_mask, mask[:, :fed]], 1)
    return model_inputs(model, *both), targets, mask


def log_probs_of(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log softmax(logits / temperature) at the tokens, in float32: (..., V) and (...) -> (...), in nats."""
    scaled = logits.float() / temperature
    return scaled.gather(-1, tokens[..., None])[..., 0] - scaled.logsumexp(-1)


def restrict(logits: Tensor, allowed: np.ndarray | None) -> Tensor:
    """Logits of the distribution over the allowed tokens, in float32; unchanged where `allowed` (bool) is None."""
    if allowed is None:
        return logits
    return logits.float().masked_fill(torch.as_tensor(~allowed, device=logits.device), FORBIDDEN)


def pad_masks(allowed: Sequence[np.ndarray] | None) -> np.ndarray | None:
    """(n, V) bool arrays, one a row, as one of (B, longest n, V), all True at the padding; None stays None."""
    if allowed is None:
        return None
    table = np.ones((len(allowed), max(map(len, allowed)), allowed[0].shape[1]), dtype=bool)
    for row, masks in zip(table, allowed, strict=True):
        row[: len(masks)] = masks
    return table
